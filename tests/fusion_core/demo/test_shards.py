"""Shards of the demo: members, repeatable bytes, and samples that are broken in the way their name says."""

import io
import json
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from fusion_core.demo.scenes import COLOURS, Scene
from fusion_core.demo.shards import BROKEN, UNUSUAL, write_shards, write_views


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), pairs=50, per_shard=20, seed=1)


def _members(paths: list[Path]) -> list[tuple[str, bytes]]:
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member)
                assert content is not None
                found.append((member.name, content.read()))
    return found


@pytest.fixture(scope="module")
def members(shards: list[Path]) -> dict[str, bytes]:
    return dict(_members(shards))


def test_clean_shards_hold_whole_samples(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "new" / "folder", pairs=7, per_shard=3, seed=0, broken=False)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    found = _members(paths)
    assert [name for name, _ in found] == [f"{i:09d}.{suffix}" for i in range(7) for suffix in ("jpg", "txt", "json")]
    for name, content in found:
        if name.endswith("jpg"):
            Image.open(io.BytesIO(content)).load()
        elif name.endswith("json"):
            record = json.loads(content)
            Scene(**{field: record[field] for field in Scene.__dataclass_fields__})
            assert record["url"].endswith(f"{record['key']}.jpg") and record["held_out"] in (True, False)
        else:
            assert content.decode().strip()


def test_same_arguments_give_same_bytes(shards: list[Path], tmp_path: Path) -> None:
    again = write_shards(tmp_path / "again", pairs=50, per_shard=20, seed=1)
    other = write_shards(tmp_path / "other", pairs=50, per_shard=20, seed=2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(again, other, strict=True))


def test_samples_do_not_depend_on_the_shard_size(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", pairs=6, per_shard=6, seed=3, broken=False)
    three = write_shards(tmp_path / "three", pairs=6, per_shard=2, seed=3, broken=False)
    assert _members(one) == _members(three)


def test_specials_come_on_top_once_each_and_are_spread(shards: list[Path]) -> None:
    names = [name for name, _ in _members(shards)]
    keys = {name.split(".")[0] for name in names}
    assert keys == {f"{i:09d}" for i in range(50)} | {*BROKEN, *UNUSUAL} - {"repeated_key"}
    specials = [sum(not name[0].isdigit() for name, _ in _members([path])) for path in shards]
    assert min(specials) > 5


def test_repeated_key_is_a_second_whole_sample_of_one_shard(shards: list[Path]) -> None:
    repeats = []
    for path in shards:
        with tarfile.open(path) as tar:
            names = tar.getnames()
        repeats += [(name, names.index(name), len(names)) for name in set(names) if names.count(name) == 2]
        assert len(set(names)) in (len(names), len(names) - 3)
    assert len(repeats) == 3
    assert all(first < 3 < total for _, first, total in repeats)


@pytest.mark.parametrize(
    "name", ["truncated_jpeg.jpg", "empty_image.jpg", "html_as_jpeg.jpg", "zeros_as_webp.webp", "header_only_jpeg.jpg"]
)
def test_broken_images_do_not_open(members: dict[str, bytes], name: str) -> None:
    with pytest.raises(OSError):
        Image.open(io.BytesIO(members[name])).load()


def test_bomb_is_small_and_declares_ten_gigapixels(members: dict[str, bytes]) -> None:
    bomb = members["bomb_png.png"]
    assert len(bomb) < 1000 and bomb[16:24] == (100_000).to_bytes(4, "big") * 2
    with warnings.catch_warnings(), pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb))


def test_broken_text_does_not_decode(members: dict[str, bytes]) -> None:
    with pytest.raises(UnicodeDecodeError):
        members["latin1_caption.txt"].decode()
    with pytest.raises(json.JSONDecodeError):
        json.loads(members["broken_json.json"])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("grey_png.png", "L"),
        ("cmyk_jpeg.jpg", "CMYK"),
        ("rgba_png.png", "RGBA"),
        ("grey16_png.png", "I;16"),
        ("rotated_jpeg.jpg", "RGB"),
    ],
)
def test_unusual_images_open_in_their_mode(members: dict[str, bytes], name: str, mode: str) -> None:
    image = Image.open(io.BytesIO(members[name]))
    image.load()
    assert image.mode == mode


def test_animation_has_frames_and_rotation_is_recorded(members: dict[str, bytes]) -> None:
    animation = Image.open(io.BytesIO(members["animated_gif.gif"]))
    assert getattr(animation, "n_frames", 1) == 2
    stored = Image.open(io.BytesIO(members["rotated_jpeg.jpg"]))
    upright = ImageOps.exif_transpose(stored)
    assert stored.width > stored.height and upright.size == stored.size[::-1]


def test_samples_of_one_modality_lack_the_other(members: dict[str, bytes]) -> None:
    suffixes = {kind: {name.split(".")[1] for name in members if name.startswith(f"{kind}.")} for kind in UNUSUAL}
    assert suffixes["image_only"] == {"jpg", "json"} and suffixes["caption_only"] == {"txt", "json"}
    assert {name for name in members if name.startswith("json_only.")} == {"json_only.json"}


@pytest.mark.parametrize(("pairs", "per_shard"), [(0, 5), (5, 0)])
def test_sizes_below_one_are_refused(tmp_path: Path, pairs: int, per_shard: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_shards(tmp_path, pairs, per_shard, seed=0)


def test_views_have_the_keys_and_scenes_of_the_good_samples(tmp_path: Path) -> None:
    whole = dict(_members(write_shards(tmp_path / "whole", 120, 50, seed=3, broken=False)))
    views = dict(_members(write_views(tmp_path / "views", 120, 50, seed=3)))
    assert views == dict(_members(write_views(tmp_path / "again", 120, 50, seed=3)))
    assert views.keys() == whole.keys()
    assert all(views[name] == whole[name] for name in whole if name.endswith(".json"))
    assert all(views[name] != whole[name] for name in whole if name.endswith(".jpg"))
    other = dict(_members(write_views(tmp_path / "other", 120, 50, seed=3, drawing=2)))
    assert all((other[name] == views[name]) == name.endswith(".json") for name in views if not name.endswith(".txt"))
    words = (*COLOURS, "violet")
    silent = sum(not any(word in views[name].decode() for word in words) for name in views if name.endswith(".txt"))
    blurred = sum(len(views[name]) < 0.9 * len(whole[name]) for name in views if name.endswith(".jpg"))
    assert 40 < silent < 80 and 40 < blurred < 80
    clear = write_views(tmp_path / "clear", 30, 50, seed=3, blurred=0, colourless=0)
    assert all(any(w in text.decode() for w in words) for name, text in _members(clear) if name.endswith(".txt"))
