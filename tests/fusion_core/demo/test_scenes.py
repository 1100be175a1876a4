"""Scenes: repeatable, true to their description, and free of held-out pairs when training."""

import subprocess
import sys

import numpy as np
import pytest

from fusion_core.demo.scenes import (
    COLOURS,
    COUNTS,
    HELD_OUT,
    IMAGE_PIXELS,
    POSITIONS,
    SHAPES,
    Scene,
    caption,
    captions,
    render,
    sample_scene,
    some_fields,
)

RED_STAR = Scene(shape="star", colour="red", size="large", count=1, position="left", tone="white", pattern="plain")


def _scenes(seed: int, count: int, held_out: bool | None = False, kind: str | None = None) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out=held_out, kind=kind) for _ in range(count)]


def _words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())


def test_same_seed_gives_same_scenes_captions_and_pixels() -> None:
    def draw(seed: int) -> list[tuple[Scene, list[str], bytes]]:
        rng = np.random.default_rng(seed)
        scenes = [sample_scene(rng) for _ in range(5)]
        return [(scene, captions(scene, rng), render(scene, rng).tobytes()) for scene in scenes]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_held_out_pairs_never_occur_in_training_scenes() -> None:
    seen = {pair for scene in _scenes(0, 5000) for pair in scene.pairs}
    assert not seen & HELD_OUT
    assert len(seen) == len(SHAPES) * len(COLOURS) - len(HELD_OUT)


def test_held_out_scenes_hold_nothing_else() -> None:
    assert {pair for scene in _scenes(0, 1000, held_out=True) for pair in scene.pairs} == HELD_OUT


def test_every_shape_and_colour_is_trained_and_held_out() -> None:
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)


def test_kinds_differ_in_count_position_and_relation() -> None:
    assert {(s.count, bool(s.position), s.relation) for s in _scenes(1, 200, kind="single")} == {(1, True, "")}
    groups = _scenes(2, 200, kind="group")
    assert {s.count for s in groups} == set(COUNTS[1:]) and not any(s.position or s.relation for s in groups)
    relations = _scenes(3, 200, kind="relation")
    assert all(s.relation and s.shape != s.other_shape and s.colour != s.other_colour for s in relations)
    with pytest.raises(ValueError, match="pair"):
        sample_scene(np.random.default_rng(0), kind="pair")


def test_full_captions_of_different_scenes_differ() -> None:
    scenes = sorted(set(_scenes(4, 300)), key=repr)
    texts = [caption(scene, np.random.default_rng(0)).text for scene in scenes]
    assert len(set(texts)) == len(scenes)


def test_caption_names_the_asked_fields_and_no_others() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        text, fields = caption(RED_STAR, rng, frozenset({"colour", "position"}))
        assert fields == {"colour", "position", "count"}
        assert "red" in _words(text) and "left" in _words(text)
        assert not _words(text) & {"star", "large", "big", "huge", "white", "plain", "background"}


def test_inverse_relation_swaps_the_objects() -> None:
    scene = Scene("star", "red", "small", 1, "", "grey", "plain", "above", "ring", "blue")
    rng = np.random.default_rng(6)
    texts = {caption(scene, rng, frozenset({"shape", "relation"})).text.replace("hoop", "ring") for _ in range(200)}
    assert any("a star above a ring" in text for text in texts)
    assert any("a ring below a star" in text for text in texts)
    assert not any("a ring above a star" in text or "a star below a ring" in text for text in texts)


def test_partial_captions_are_never_empty() -> None:
    rng = np.random.default_rng(7)
    for scene in _scenes(8, 300):
        fields = some_fields(scene, rng)
        assert fields and fields <= scene.fields


def _coloured(scene: Scene) -> np.ndarray:
    """The mask of pixels that are far from grey, i.e. those of objects."""
    pixels = np.asarray(render(scene, np.random.default_rng(9))).astype(int)
    mask: np.ndarray = pixels.max(axis=2) - pixels.min(axis=2) > 60
    return mask


@pytest.mark.parametrize("position", POSITIONS)
def test_object_is_drawn_at_its_position(position: str) -> None:
    rows, columns = np.nonzero(_coloured(Scene("circle", "green", "small", 1, position, "white", "dotted")))
    x, y = columns.mean() / IMAGE_PIXELS, rows.mean() / IMAGE_PIXELS
    expected = {
        "centre": (0.5, 0.5),
        "left": (0.25, 0.5),
        "right": (0.75, 0.5),
        "top": (0.5, 0.25),
        "bottom": (0.5, 0.75),
    }
    assert abs(x - expected[position][0]) < 0.12 and abs(y - expected[position][1]) < 0.12


def test_large_objects_and_more_objects_cover_more() -> None:
    small = _coloured(Scene("circle", "green", "small", 1, "centre", "black", "plain")).sum()
    large = _coloured(Scene("circle", "green", "large", 1, "centre", "black", "plain")).sum()
    four = _coloured(Scene("circle", "green", "small", 4, "", "black", "plain")).sum()
    assert large > 1.8 * small and 2.5 * small < four < 6 * small


def test_render_has_the_asked_side() -> None:
    image = render(RED_STAR, np.random.default_rng(0), pixels=96)
    assert image.size == (96, 96) and image.mode == "RGB"


def test_scenes_and_shards_import_without_torch() -> None:
    code = "import sys, fusion_core.demo.scenes, fusion_core.demo.shards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
