"""Versions of an index: begun with the files of the current one, published by one pointer, kept, rolled back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_core import build, index, versions
from fusion_core.table import Table
from schemas.records import SchemaMismatch
from tests.corpora import SPEC, toy_vectors, write_vectors

IDS = [f"2026010{day}T000000000Z-{day:08x}" for day in range(1, 8)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    place = tmp_path_factory.mktemp("versions") / "table"
    image, text = (toy_vectors(range(60), 16, name).astype(np.float32) for name in ("image", "text"))
    return write_vectors(place, image, text, SPEC, per_unit=30)


def publish(table: Table, root: Path, version: str, column: str = "image_embedding", keep: int = 2) -> Path:
    folder = versions.begin(str(root), version)
    build.build(table, folder, column)
    versions.publish(str(root), folder.rpartition("/")[2], f"run-{version}", ("--x",), keep)
    return Path(folder)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def names(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.is_file()}


def test_a_version_begins_as_the_current_one_without_its_bytes(table: Table, tmp_path: Path) -> None:
    first = publish(table, tmp_path, IDS[0])
    begun = Path(versions.begin(str(tmp_path), IDS[1]))
    assert names(begun) == names(first), "the same files, by hard links"
    before = (first / "index.json").read_bytes()
    build.build(table, str(begun), "text_embedding")
    assert (first / "index.json").read_bytes() == before
    assert index.Index.open(str(tmp_path)).place == str(first), "a candidate is nobody's"
    assert versions.candidates(str(tmp_path)) == [IDS[1]]
    versions.publish(str(tmp_path), IDS[1], "run", (), 2)
    opened = index.Index.open(str(tmp_path))
    assert (opened.place, opened.record.column) == (str(begun), "text_embedding")
    assert index.Index.open(str(first)).record.column == "image_embedding"


def test_the_last_ones_stay_and_one_that_was_just_current(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in IDS[:3]:
        publish(table, tmp_path, version)
    assert folders(tmp_path) == IDS[:3], "a reader may just have been told of the first"
    monkeypatch.setattr(versions, "_GRACE_SECONDS", -1.0)
    publish(table, tmp_path, IDS[3])
    assert folders(tmp_path) == IDS[2:4]
    found = versions.read(str(tmp_path))
    assert found and [item.id for item in found.versions] == [IDS[3], IDS[2]]
    publish(table, tmp_path, IDS[4], keep=1)
    assert folders(tmp_path) == [IDS[4]]
    assert index.Index.open(str(tmp_path)).record.rows_indexed == 60


def test_rolling_back_goes_one_version_back_at_a_time(table: Table, tmp_path: Path) -> None:
    assert versions.roll_back(str(tmp_path)) is None
    for version in IDS[:3]:
        publish(table, tmp_path, version, keep=3)
    for expected in (IDS[1], IDS[0]):
        earlier = versions.roll_back(str(tmp_path))
        assert earlier and earlier.id == expected and earlier.run == f"run-{expected}"
        assert versions.standing(str(tmp_path)) == str(tmp_path / expected)
    assert versions.roll_back(str(tmp_path)) is None
    publish(table, tmp_path, IDS[3], keep=3)
    assert versions.standing(str(tmp_path)) == str(tmp_path / IDS[3])


def test_after_rolling_back_the_version_that_was_left_is_not_gone_back_to(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_GRACE_SECONDS", -1.0)
    for version in IDS[:2]:
        publish(table, tmp_path, version)
    versions.roll_back(str(tmp_path))
    publish(table, tmp_path, IDS[2])
    assert folders(tmp_path) == [IDS[0], IDS[2]]
    earlier = versions.roll_back(str(tmp_path))
    assert earlier and earlier.id == IDS[0]


def test_what_has_keys_of_a_list_is_forgotten_at_once_and_asked_once(table: Table, tmp_path: Path) -> None:
    place, asked = str(tmp_path), []

    def has_listed(folder: str) -> bool:
        asked.append(folder.rpartition("/")[2])
        return asked[-1] == IDS[1]

    assert not versions.hold_against(place, "list", has_listed)
    for version in IDS[:3]:
        publish(table, tmp_path, version, keep=3)
    for _ in range(2):
        assert not versions.hold_against(place, "list", has_listed)
        assert folders(tmp_path) == [IDS[0], IDS[2]] and versions.candidates(place) == []
        assert sorted(asked) == IDS[:3]
    earlier = versions.roll_back(place)
    assert earlier and earlier.id == IDS[0]
    assert not versions.hold_against(place, "other", lambda _: False)
    assert versions.hold_against(place, "list", lambda folder: folder.endswith(IDS[0])), "it is the current one"
    assert index.Index.open(place).record.rows_indexed == 60


@pytest.mark.parametrize("step", ["read_record", "checked_file", "read_shard"])
def test_a_reader_whose_version_is_forgotten_meanwhile_opens_the_next(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = publish(table, tmp_path, IDS[0])
    build.build(table, versions.begin(str(tmp_path), IDS[1]), "text_embedding")
    really = getattr(index, step)

    def forgotten(*arguments: Any) -> Any:
        if first.exists():
            versions.publish(str(tmp_path), IDS[1], "run", (), 2)
            versions.hold_against(str(tmp_path), "list", lambda folder: folder == str(first))
        return really(*arguments)

    monkeypatch.setattr(index, step, forgotten)
    assert index.Index.open(str(tmp_path)).record.column == "text_embedding"


def test_a_candidate_is_gone_on_with_and_an_older_one_removed(table: Table, tmp_path: Path) -> None:
    first = publish(table, tmp_path, IDS[0])
    for left in IDS[1:3]:
        (tmp_path / left).mkdir()
        (tmp_path / left / "something").write_bytes(b"")
    begun = Path(versions.begin(str(tmp_path), IDS[5]))
    assert begun.name == IDS[2] and folders(tmp_path) == [IDS[0], IDS[2]]
    assert names(first).items() <= names(begun).items(), "what a run died in the middle of linking"


def test_without_all_files_of_the_current_one_it_begins_from_nothing(table: Table, tmp_path: Path) -> None:
    first = publish(table, tmp_path, IDS[0])
    next(first.glob("vectors-*")).unlink()
    begun = Path(versions.begin(str(tmp_path), IDS[1]))
    assert not (begun / "index.json").exists()
    build.build(table, str(begun))
    versions.publish(str(tmp_path), IDS[1], "run", (), 2)
    assert index.Index.open(str(tmp_path)).record.rows_indexed == 60


@pytest.mark.parametrize(
    "pointer",
    ['{"current": "../elsewhere", "versions": [], "schema_version": "1.0"}', "{}", "no JSON",
     f'{{"current": "{IDS[0]}", "versions": [], "schema_version": "2.0"}}'],
)  # fmt: skip
def test_a_pointer_to_anywhere_else_is_refused(tmp_path: Path, pointer: str) -> None:
    (tmp_path / "current.json").write_text(pointer)
    with pytest.raises(SchemaMismatch):
        index.Index.open(str(tmp_path))
