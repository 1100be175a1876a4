"""Training: what a caption fits, which negatives are left out, and a run of a few steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_core.demo.evaluate import BPE_NAME, Model
from fusion_core.demo.scenes import HELD_OUT, Scene, caption, sample_scene, some_fields
from fusion_core.demo.train import (
    LABELS,
    Heads,
    contrastive_loss,
    fits,
    held_out_claims,
    make_block,
    make_tokenizer,
    named_labels,
    scene_labels,
    train,
    write_bpe,
)

RED_STAR = Scene("star", "red", "small", 1, "left", "white", "plain")
RED_RING = Scene("ring", "red", "small", 1, "left", "white", "plain")
BLUE_STARS = Scene("star", "blue", "large", 3, "", "grey", "dotted")
STAR_LEFT_OF_RING = Scene("star", "red", "small", 1, "", "white", "plain", "left of", "ring", "blue")
RING_LEFT_OF_STAR = Scene("ring", "blue", "small", 1, "", "white", "plain", "left of", "star", "red")


def _fit(scene: Scene, fields: set[str], others: list[Scene]) -> list[bool]:
    named = torch.tensor([named_labels(scene, caption(scene, np.random.default_rng(0), frozenset(fields)).fields)])
    return [bool(fit) for fit in fits(named, torch.tensor([scene_labels(other) for other in others]))[0]]


def test_caption_fits_what_it_does_not_contradict() -> None:
    others = [RED_STAR, RED_RING, BLUE_STARS]
    assert _fit(RED_STAR, {"colour"}, others) == [True, True, False]
    assert _fit(RED_STAR, {"shape"}, others) == [True, False, False]
    assert _fit(BLUE_STARS, {"shape", "count"}, others) == [False, False, True]


def test_order_counts_only_where_the_caption_tells_it() -> None:
    others = [STAR_LEFT_OF_RING, RING_LEFT_OF_STAR, RED_STAR]
    assert _fit(STAR_LEFT_OF_RING, {"shape", "colour"}, others) == [True, True, False]
    assert _fit(STAR_LEFT_OF_RING, {"shape", "colour", "relation"}, others) == [True, False, False]


def test_every_caption_fits_its_own_scene() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = sample_scene(rng, held_out=None)
        assert _fit(scene, set(some_fields(scene, rng)), [scene]) == [True]


def test_claims_of_held_out_pairs_are_found() -> None:
    assert ("circle", "red") in HELD_OUT and ("circle", "blue") not in HELD_OUT
    labels = torch.tensor([scene_labels(scene) for scene in (RED_STAR, BLUE_STARS, RING_LEFT_OF_STAR)])
    green_circle = Scene("circle", "green", "small", 1, "left", "white", "plain")
    named = torch.tensor([named_labels(green_circle, frozenset(fields)) for fields in ({"shape"}, {"shape", "colour"})])
    assert held_out_claims(named, labels).tolist() == [[True, False, True], [False, False, False]]


def test_left_out_negatives_do_not_change_the_loss() -> None:
    images = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    alike = torch.stack([images[0], images[0], images[2]])
    scale, none = torch.tensor(20.0), torch.zeros(3, 3, dtype=torch.bool)
    hidden = none.clone()
    hidden[0, 1] = hidden[1, 0] = True
    assert contrastive_loss(alike, alike, scale, none) > 0.4
    assert contrastive_loss(alike, alike, scale, hidden | torch.eye(3, dtype=torch.bool)) < 0.1


def test_heads_do_not_push_held_out_shapes_away() -> None:
    heads = Heads(8)
    embeddings = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    heads.loss(embeddings, torch.tensor([scene_labels(RED_STAR)])).backward()  # type: ignore[no-untyped-call]
    gradient = dict(heads.named_parameters())["readers.shape.bias"].grad
    assert gradient is not None
    assert gradient[LABELS["shape"].index("circle")] == 0
    assert gradient[LABELS["shape"].index("ring")] > 0 > gradient[LABELS["shape"].index("star")]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / BPE_NAME
    write_bpe(path)
    return path


def test_blocks_repeat_and_hold_no_held_out_pair(bpe_path: Path) -> None:
    block, again = (make_block(np.random.default_rng(3), make_tokenizer(bpe_path)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(block, again, strict=True))
    for row in block.labels.tolist():
        values = {name: LABELS[name][i] for name, i in zip(LABELS, row, strict=True)}
        assert (values["shape"], values["colour"]) not in HELD_OUT
        assert (values["other_shape"], values["other_colour"]) not in HELD_OUT


def test_rows_of_a_group_differ_in_little(bpe_path: Path) -> None:
    labels = make_block(np.random.default_rng(4), make_tokenizer(bpe_path)).labels
    rows = [i for i in range(len(labels)) if i % 4]
    differences = [int((labels[i] != labels[i - i % 4]).sum()) for i in rows]
    assert set(differences) <= {1, 4} and differences.count(1) > differences.count(4)


def test_a_few_steps_leave_a_model_that_loads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert train(tmp_path, minutes=1, steps=3, seed=0) == 3
    finally:
        torch.set_num_threads(threads)
    assert Model(tmp_path).texts(["a red star"]).shape == (1, 64)
