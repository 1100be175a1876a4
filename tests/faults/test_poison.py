"""One sample in a hundred is broken: the others get the rows of a clean run, and each broken one is told with why."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_core import table, towers, verify
from fusion_core.demo import shards as demo
from pipelines import cli
from tests.corpora import assert_same_rows, pairs, photo, write_tar

Members = list[tuple[str, bytes]]  # of one sample: picture, caption, sidecar


def picture(make: Callable[[bytes], bytes], extension: str = "jpg") -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        (name, image), *rest = members
        return [(name.replace("jpg", extension), make(image)), *rest]

    return change


BOMB = demo._bomb(None)  # type: ignore[arg-type]
POISON: dict[str, tuple[Callable[[Members], Members], str]] = {
    "truncated": (picture(lambda image: image[: len(image) // 2]), "TruncatedImage"),
    "empty": (picture(lambda image: b""), "EmptyImage"),
    "bomb": (picture(lambda image: BOMB, "png"), "TooManyPixels"),
    "html": (picture(lambda image: b"<!DOCTYPE html><html>404</html>"), "NotAnImage"),
    "zeros": (picture(lambda image: bytes(512), "webp"), "NotAnImage"),
    "header only": (picture(lambda image: image[:20]), "TruncatedImage"),
    "caption not UTF-8": (lambda m: [m[0], (m[1][0], b"caf\xe9"), m[2]], "CaptionNotUtf8"),
    "cut JSON": (lambda m: [m[0], m[1], (m[2][0], m[2][1][:9])], "MetadataNotJson"),
    "sidecar alone": (lambda m: [m[2]], "EmptySample"),
    "repeated key": (lambda m: m, "DuplicateKey"),
    "scattered key": (lambda m: m, "ScatteredKey"),
}
UNUSUAL = {
    "cmyk": picture(lambda image: photo(1, mode="CMYK")),
    "16 bit": picture(lambda image: photo(2, format="PNG", mode="I;16"), "png"),
    "animated": picture(lambda image: photo(3, format="GIF", save_all=True), "gif"),
    "no caption": lambda m: [m[0], m[2]],
}


def corpus(each: int, number: int) -> list[Members]:
    """A shard's samples, some of them unusual and all of them good."""
    flat = pairs(each, start=number * each)
    samples = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    for place, change in zip(range(1, each, max(2, each // 5)), UNUSUAL.values(), strict=False):
        samples[place] = change(samples[place])
    return samples


def write(path: Path, samples: list[Members]) -> None:
    write_tar(path, [member for sample in samples for member in sample])


def write_poisoned(path: Path, samples: list[Members], every: int, number: int, kinds: list[str]) -> Counter[str]:
    """Writes a shard with one broken sample in `every`, classes counted; every other shard ends in its last picture."""
    samples, errors = list(samples), Counter[str]()
    places = list(range(every // 2, len(samples), every))
    cut = number % 2 == 0
    places[-1] = len(samples) - 1 if cut else places[-1]
    for place in places[: -1 if cut else None]:
        kind = kinds.pop(0)
        kinds.append(kind)
        change, error = POISON[kind]
        errors[error] += 1
        samples[place] = change(samples[place])
        if kind == "repeated key":
            first = samples[0][0][0].split(".")[0]
            samples[place] = [(f"{first}.{name.split('.')[1]}", data) for name, data in samples[place]]
        elif kind == "scattered key":
            *samples[place], moved = samples[place]
            samples[place + 1] = [*samples[place + 1], moved]
    write(path, samples)
    if cut:
        errors["TruncatedShard"] += 1
        data = path.read_bytes()
        path.write_bytes(data[: data.rindex(samples[-1][0][1][-200:]) + 100])
    return errors


def read(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def check(folder: Path, shards: int, each: int, every: int, *options: str) -> None:
    def embed(output: str) -> int:
        place = ["--input", str(folder / "shards"), "--output", str(folder / output)]
        return cli.main(["embed", *place, "--model", towers.DEMO, "--device", "cpu", "--quiet", *options])

    samples = [corpus(each, number) for number in range(shards)]
    paths = [folder / "shards" / f"{number:05d}.tar" for number in range(shards)]
    for path, good in zip(paths, samples, strict=True):
        write(path, good)
    assert embed("clean") == 0
    clean = read(folder / "clean")
    assert clean.num_rows == shards * each

    kinds, errors = list(POISON), Counter[str]()
    for number, path in enumerate(paths):
        errors += write_poisoned(path, samples[number], every, number, kinds)
    assert embed("table") == 0
    rows, letters = read(folder / "table"), table.Table.open(str(folder / "table")).dead_letters()
    assert Counter(letters["error"].to_pylist()) == errors
    assert letters.num_rows == errors.total() == shards * each // every
    assert rows.num_rows == shards * each * (every - 1) // every
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    expected = clean.filter(np.isin(clean["key"].to_pylist(), keys))
    moved = ["offset", "row"]  # neighbours of another length
    assert rows.drop(moved).equals(expected.drop(moved))

    for path, good in zip(paths, samples, strict=True):
        write(path, good)
    assert cli.main(["retry", str(folder / "table"), "--device", "cpu", "--quiet", *options]) == 0
    assert table.Table.open(str(folder / "table")).dead_letters().num_rows == 0
    assert_same_rows(read(folder / "table"), clean)
    assert verify.findings(str(folder / "table")) == []


def test_each_kind_of_broken_sample_costs_only_itself(tmp_path: Path) -> None:
    check(tmp_path, 4, 40, 10, "--workers", "1")


@pytest.mark.slow
def test_ten_thousand_samples_with_one_percent_broken(tmp_path: Path) -> None:
    check(tmp_path, 20, 500, 100)
