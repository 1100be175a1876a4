"""Patterns in, units out: every sample in exactly one unit, and a wrong pattern is said before work starts."""

import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_core import files, readers, shards, tabular
from schemas.feature_table import InputSpec
from schemas.samples import Unit

SPEC = InputSpec()


def touch(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tar(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / name, "w"):
            pass


def parquet(path: Path, columns: dict[str, object] | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"image": [b"1", b"2"], "caption": ["a", "b"]}), path, **options)


def plan(*patterns: object, rows: int = 10_000, spec: InputSpec = SPEC) -> list[Unit]:
    return list(shards.plan([str(pattern) for pattern in patterns], spec, rows))


def names(units: list[Unit], root: Path) -> list[str]:
    return [str(Path(unit.shard).relative_to(root)) for unit in units]


def error(*patterns: object, spec: InputSpec = SPEC) -> str:
    with pytest.raises(shards.InputError) as caught:
        plan(*patterns, spec=spec)
    return str(caught.value)


# --- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("0.tar", ["0.tar"]),
        ("{0..1}.tar", ["0.tar", "1.tar"]),
        ("{1,0}.tar", ["0.tar", "1.tar"]),
        ("*.tar", ["0.tar", "1.tar"]),
        ("?.tar", ["0.tar", "1.tar"]),
        ("[1-9].tar", ["1.tar"]),
        ("*", ["0.tar", "1.tar", "sub/2.tgz", "sub/deep/3.TAR"]),
        ("s*b", ["sub/2.tgz", "sub/deep/3.TAR"]),
        ("s*/", ["sub/2.tgz", "sub/deep/3.TAR"]),
        ("*/*.tgz", ["sub/2.tgz"]),
        ("**/*.tar", ["0.tar", "1.tar"]),
        ("**/*.TAR", ["sub/deep/3.TAR"]),
        ("{*,sub/*}.t*", ["0.tar", "1.tar", "sub/2.tgz"]),
        ("sub/**", ["sub/2.tgz", "sub/deep/3.TAR"]),
        ("", ["0.tar", "1.tar", "sub/2.tgz", "sub/deep/3.TAR"]),
        ("sub/../0.tar", ["0.tar"]),
    ],
)
def test_patterns_find(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    tar(tmp_path, "1.tar", "0.tar", "sub/2.tgz", "sub/deep/3.TAR", ".hidden.tar")
    touch(tmp_path, "notes.md")
    assert names(plan(f"{tmp_path}/{pattern}"), tmp_path) == expected


def test_each_shard_once_and_sorted_though_patterns_overlap(tmp_path: Path) -> None:
    tar(tmp_path, "b.tar", "a.tar", "sub/c.tar")
    assert names(plan(tmp_path / "sub", tmp_path / "b.tar", tmp_path, tmp_path / "*.tar"), tmp_path) == [
        "a.tar",
        "b.tar",
        "sub/c.tar",
    ]


def test_a_place_has_one_name(tmp_path: Path) -> None:
    tar(tmp_path, "0.tar")
    assert names(plan(f"/{tmp_path}", tmp_path / "0.tar", f"//{tmp_path}/*"), tmp_path) == ["0.tar"]
    assert files.join("/", "0.tar") == "/0.tar"


def test_links_that_lead_back_are_not_followed_round_and_round(tmp_path: Path) -> None:
    tar(tmp_path, "a/0.tar", "b/1.tar")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "c").symlink_to("b")  # to another folder: followed
    assert names(plan(tmp_path), tmp_path) == ["a/0.tar", "b/1.tar", "c/1.tar"]


def test_each_loose_image_once_though_folders_overlap(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/1.jpg", "a/2.jpg", "ab/3.jpg")
    units = plan(tmp_path / "a/b", tmp_path / "a", tmp_path / "ab")
    assert [(Path(unit.shard).name, unit.rows) for unit in units] == [("a", 2), ("ab", 1)]


def test_a_name_that_looks_like_a_pattern_is_taken_as_it_stands(tmp_path: Path) -> None:
    tar(tmp_path, "a[1].tar", "{a,b}.tar")
    assert names(plan(tmp_path / "a[1].tar"), tmp_path) == ["a[1].tar"]
    assert names(plan(tmp_path / "{a,b}.tar"), tmp_path) == ["{a,b}.tar"]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An object store of one bucket, `mem://bucket`, held below the returned folder."""
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    resolve = files.resolve

    def fake(place: str) -> tuple[object, str]:
        if not place.startswith("mem://"):
            return resolve(place)
        if "{" in place:
            raise ValueError(f"not a URI: {place}")
        return store, place.removeprefix("mem://")

    monkeypatch.setattr(files, "resolve", fake)
    return tmp_path / "bucket"


def test_object_store(bucket: Path) -> None:
    tar(bucket, "t/0.tar", "t/1.tar")
    touch(bucket, "f/a.jpg", "f/a.txt")
    touch(bucket, "l/i.csv", data=b"path,caption\na.jpg,x\n")
    touch(bucket, "l/a.jpg")
    for index in range(3):
        parquet(bucket / f"p/{index}.parquet")
    units = plan("mem://bucket/t/{0..1}.tar", "mem://bucket/p/*.parquet", "mem://bucket/f", "mem://bucket/l/i.csv")
    assert [(unit.layout, unit.shard.removeprefix("mem://bucket/")) for unit in units] == [
        ("folder", "f"),
        ("listing", "l/i.csv"),
        ("parquet", "p/0.parquet"),
        ("parquet", "p/1.parquet"),
        ("parquet", "p/2.parquet"),
        ("tar", "t/0.tar"),
        ("tar", "t/1.tar"),
    ]
    assert [unit.identity for unit in units] == [shards.identity(unit) for unit in units]
    read = [[item.key for item in readers.read(unit, SPEC)] for unit in units]
    assert read == [["a"], ["i:0"], *[[f"{n}:0", f"{n}:1"] for n in range(3)], [], []]
    assert "nearest folder that exists is 'mem://bucket/t'" in error("mem://bucket/t/no/{0..1}.tar")


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_wrong_patterns_are_said_at_once(tmp_path: Path) -> None:
    tar(tmp_path, "data/0.tar", "data/1.tar")
    touch(tmp_path, "empty/readme.md", "photos/a.jpg", "data/x.bin")
    for pattern, said in {
        "dota/*.tar": ["dota/*.tar", f"nearest folder that exists is '{tmp_path}'"],
        "data/9.tar": ["data/9.tar", f"{tmp_path}/data", "0.tar"],
        "data/{0..3}.tar": ["data/2.tar", "2 of the 4 places"],
        "empty": ["empty", "1 files of other kinds"],
        "empty/*": ["empty/*", "other kinds"],
        "photos/*.jpg": ["by folder", "photos"],
        "photos/a.jpg": ["photos/a.jpg", "name", "/photos'"],
        "data/x.bin": ["data/x.bin", ".tar", "leave it out"],
        "nosuch://b/0.tar": ["nosuch://b/0.tar"],
        "{0..99999999}.tar": ["more than 1000000"],
    }.items():
        with pytest.raises(shards.InputError) as caught:
            shards.plan([pattern if "://" in pattern else f"{tmp_path}/{pattern}"], SPEC)  # the iterator is not touched
        assert all(part in str(caught.value) for part in said), caught.value


def test_wrong_arguments() -> None:
    with pytest.raises(shards.InputError, match="not 0"):
        plan("x", rows=0)
    with pytest.raises(shards.InputError, match="list of patterns"):
        shards.plan("x", SPEC)
    assert "list of patterns" in error()


def test_columns_that_are_missing_or_of_the_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, {"picture": [b"1"], "words": ["a"], "n": [1]})
    said = error(path)
    assert "picture (binary), words (string), n (int64)" in said and "--image-column" in said and str(path) in said
    assert plan(path, spec=InputSpec(image_column="picture"))[0].layout == "parquet"
    assert "'nope'" in error(path, spec=InputSpec(image_column="picture", caption_column="nope"))
    assert "is int64" in error(path, spec=InputSpec(image_column="n"))
    assert "is int64" in error(path, spec=InputSpec(image_column="picture", url_column="n"))


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "id,words\n1,a\n"), ("a.tsv", "a\tb\n"), ("a.jsonl", '{"b": 1}\n'), ("a.csv", "\n")]
)
def test_listing_without_paths(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert name in error(tmp_path / name)


def test_storage_that_refuses_is_no_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a.parquet")

    def refuse(place: str) -> None:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(files, "open_input", refuse)
    with pytest.raises(PermissionError, match=r"a\.parquet"):
        plan(tmp_path)


# --- layouts --------------------------------------------------------------------------------------------------------


def img2dataset(folder: Path) -> None:
    """Both layouts of img2dataset's output, with its metadata."""
    columns = {"url": ["u"], "caption": ["c"], "key": ["000000000"], "status": ["success"], "sha256": ["0"]}
    tar(folder, "packed/00000.tar", "packed/00001.tar")
    for shard in ("packed/00000", "packed/00001", "files/00000"):
        parquet(folder / f"{shard}.parquet", columns)
        touch(folder, f"{shard}_stats.json", data=b"{}")
    touch(folder, *(f"files/00000/00000000{row}{suffix}" for row in range(2) for suffix in (".jpg", ".txt", ".json")))


def test_img2dataset_metadata_is_passed_over(tmp_path: Path) -> None:
    img2dataset(tmp_path)
    expected = [("folder", "."), ("tar", "packed/00000.tar"), ("tar", "packed/00001.tar")]
    assert [(u.layout, str(Path(u.shard).relative_to(tmp_path))) for u in plan(tmp_path)] == expected
    everything = sorted((tmp_path / "packed").iterdir())  # as a shell expands packed/*
    assert names(plan(*everything), tmp_path) == ["packed/00000.tar", "packed/00001.tar"]
    (unit,) = plan(tmp_path / "files")
    assert (unit.rows, unit.first_name, unit.last_name) == (2, "00000/000000000.jpg", "00000/000000001.jpg")
    assert "metadata" in error(tmp_path / "packed" / "*.parquet")


def test_archives_that_are_passed_over_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(tmp_path, "a.tar")
    touch(tmp_path, "b.tar.zst", "c.zip")
    assert [unit.shard for unit in plan(tmp_path)] == [f"{tmp_path}/a.tar"]
    assert "2 files of kinds that are not read are passed over" in caplog.text and "b.tar.zst" in caplog.text


def test_parquet_with_images_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    tar(tmp_path, "a.tar")
    parquet(tmp_path / "a.parquet")
    assert names(plan(tmp_path), tmp_path) == ["a.tar"]
    assert names(plan(tmp_path / "*.parquet"), tmp_path) == ["a.parquet"]
    assert names(plan(tmp_path, tmp_path / "a.parquet"), tmp_path) == ["a.parquet", "a.tar"]


def test_images_beside_a_listing_are_the_listings(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "train/sub/b.jpg", "other/c.jpg")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.jpg,x\nsub/b.jpg,y\n")
    units = plan(tmp_path)
    assert [(u.layout, u.rows) for u in units] == [("folder", 1), ("listing", 2)]
    assert [item.key for item in readers.read(units[0], SPEC)] == ["other/c"]
    (tmp_path / "train" / "metadata.csv").unlink()
    parquet(tmp_path / "train" / "metadata.parquet", {"file_name": ["a.jpg"], "text": ["x"]})
    assert "name one of the two" in error(tmp_path)
    assert plan(tmp_path / "train" / "metadata.parquet")[0].layout == "listing"


def test_parquet_row_groups_become_units(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, {"image": [b"x"] * 95}, row_group_size=10)
    assert [(u.start, u.stop, u.first_row, u.rows) for u in plan(path, rows=25)] == [
        (0, 2, 0, 20),
        (2, 4, 20, 20),
        (4, 6, 40, 20),
        (6, 8, 60, 20),
        (8, 10, 80, 15),
    ]
    assert [u.rows for u in plan(path, rows=3)] == [10] * 9 + [5]
    assert [u.rows for u in plan(path)] == [95]


def test_parquet_that_cannot_be_read_is_still_planned(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", data=b"PAR1 and nothing else")
    (unit,) = plan(tmp_path)
    assert (unit.rows, unit.layout, unit.start, unit.stop) == (None, "parquet", 0, 0)
    assert unit.identity == shards.identity(unit)


def test_empty_shards_are_planned_too(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", data=b"")
    parquet(tmp_path / "b.parquet", {"image": pa.array([], pa.binary())})
    (tmp_path / "c.csv").write_text("path,caption\n")
    touch(tmp_path, "d.csv", "e.jsonl", data=b"")
    units = plan(tmp_path)
    known = [("tar", None), ("parquet", 0), ("listing", 0), ("listing", None), ("listing", None)]
    assert [(u.layout, u.rows) for u in units] == known
    found = [[getattr(item, "error", "") for item in readers.read(unit, SPEC)] for unit in units]
    assert found == [["TruncatedShard"], [], [], ["CorruptShard"], ["CorruptShard"]]
    assert all(unit.identity == shards.identity(unit) for unit in units)


def test_ids_are_unique_stable_and_fit_for_file_names(tmp_path: Path) -> None:
    tar(tmp_path, "x/ü b*.tar", "y/ü b*.tar", f"{'n' * 200}.tar.gz")
    parquet(tmp_path / "p.parquet", {"image": [b"x"] * 4}, row_group_size=1)
    touch(tmp_path, "i/a.jpg", "i/b.jpg")
    units = plan(tmp_path, rows=1)
    ids = [unit.id for unit in units]
    assert len(set(ids)) == len(ids) == 9
    assert ids == [unit.id for unit in plan(tmp_path / "x", tmp_path, rows=1)]
    for unit in units:
        assert len(unit.id) <= 60 + 1 + 12 + 9 and unit.id.isascii() and "/" not in unit.id and "*" not in unit.id
    assert [i[-9:] for i in ids if i.startswith("p-")] == ["-00000000", "-00000001", "-00000002", "-00000003"]


# --- coverage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout whose shards are cut into units, with odd and broken rows among them."""
    root = tmp_path_factory.mktemp("mixed")
    for row in range(30):
        touch(root, f"f/{row % 3}/i{row}.jpg", data=b"%d" % row)
        if row % 4:
            touch(root, f"f/{row % 3}/i{row}.txt", f"f/{row % 3}/i{row}.extra.txt")
        if row % 5 == 0:
            touch(root, f"f/{row % 3}/i{row}.png")
    parquet(root / "p.parquet", {"image": [b"%d" % n for n in range(47)]}, row_group_size=7)
    listed = [f"f/0/i{row}.jpg" for row in range(30)]
    parquet(root / "lp.parquet", {"path": listed, "caption": listed}, row_group_size=4)
    rows = [f'{path},"a, {row}\nb"' if row % 3 else f"{path},{row}" for row, path in enumerate(listed)]
    rows[11:13] = ['f/0/i0.jpg,"open', "f/0/i3.jpg,closed"]
    (root / "l.csv").write_text("path,caption\r\n" + "\n".join(rows))
    lines = [f'{{"path": "{path}", "caption": "{row}"}}' for row, path in enumerate(listed)]
    (root / "l.jsonl").write_text("\n".join([*lines[:9], "", "{broken", *lines[9:]]))
    return root


@pytest.mark.parametrize("name", ["f", "p.parquet", "lp.parquet", "l.csv", "l.jsonl"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit_rows=st.integers(1, 60))
def test_any_unit_size_covers_each_row_once(mixed: Path, name: str, unit_rows: int) -> None:
    (whole,) = plan(mixed / name)
    units = plan(mixed / name, rows=unit_rows)
    read = [list(readers.read(unit, SPEC)) for unit in units]
    assert [item for items in read for item in items] == list(readers.read(whole, SPEC))
    assert [item.row for items in read for item in items] == list(range(whole.rows or 0))
    assert [len(items) for items in read] == [unit.rows for unit in units]
    assert [items[0].row for items in read] == [unit.first_row for unit in units]


def test_a_unit_deep_in_a_long_listing_is_the_same_with_and_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    lines = [f'x{row}.jpg,"caption\n{row}"' if row % 2 else f"x{row}.jpg,{row}" for row in range(5000)]
    lines[2999] = '"never closed'  # so that a mark is set while lines are given back
    path.write_text("\ufeffpath,caption\n" + "\n".join(lines) + "\n", encoding="utf-8")
    units = plan(path, rows=700)
    with_marks = [list(readers.read(unit, SPEC)) for unit in reversed(units)]
    tabular._marks.clear()
    without = []
    for unit in reversed(units):
        tabular._marks.clear()
        without.append(list(readers.read(unit, SPEC)))
    assert with_marks == without
    assert sum(map(len, without)) == 5000
    assert {getattr(item, "error", "") for items in without for item in items} == {"MissingFile", "BrokenRow"}


# --- identity -------------------------------------------------------------------------------------------------------


def test_identity_is_the_plans_until_the_input_changes(mixed: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(mixed, root)
    tar(root, "t.tar")
    patterns = [root / name for name in ("t.tar", "p.parquet", "lp.parquet", "l.csv", "l.jsonl", "f")]
    units = plan(*patterns, rows=9)
    assert [shards.identity(unit) for unit in units] == [unit.identity for unit in units]

    def changed() -> set[str]:
        return {unit.layout for unit in units if shards.identity(unit) != unit.identity}

    os.utime(root / "t.tar", ns=(1, 1))
    assert changed() == {"tar"}
    touch(root, "f/0/i0.jpg", data=b"another image")  # which the listings name too
    assert changed() == {"tar", "folder", "listing"}


def test_a_new_file_changes_the_identity_of_its_slice_only(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{row}.jpg" for row in range(10, 30)))
    units = plan(tmp_path, rows=5)
    touch(tmp_path, "17.txt")
    assert [shards.identity(unit) == unit.identity for unit in units] == [True, False, True, True]
    (tmp_path / "29.jpg").unlink()
    assert [shards.identity(unit) == unit.identity for unit in units] == [True, False, True, False]


def test_rows_appended_to_a_listing_leave_earlier_units_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"path": "{row}.jpg"}}\n' for row in range(10)))
    before = plan(path, rows=4)
    with path.open("a") as stream:
        stream.write('{"path": "10.jpg"}\n')
    assert plan(path, rows=4)[:2] == before[:2]
    assert plan(path, rows=4)[2].id == before[2].id and plan(path, rows=4)[2] != before[2]
    path.write_text(path.read_text().replace('"5.jpg"', '"5.jpg", "caption": "new"'))
    assert [shards.identity(unit) == unit.identity for unit in before] == [True, False, True]


def test_a_shard_that_is_gone_is_named(mixed: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(mixed, root)
    units = plan(*(root / name for name in ("p.parquet", "l.csv", "f")), rows=20)
    shutil.rmtree(root)
    for unit in units:
        with pytest.raises(OSError, match=Path(unit.shard).name):
            shards.identity(unit)
        with pytest.raises(OSError, match=Path(unit.shard).name):
            list(readers.read(unit, SPEC))


def test_a_large_folder_is_listed_once_for_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{row}.jpg" for row in range(20)))
    listed, list_files = [], files.list_files

    def count(folder: str, recursive: bool = False) -> list[files.Entry]:
        listed.append(folder)
        return list_files(folder, recursive)

    monkeypatch.setattr(files, "list_files", count)
    monkeypatch.setattr(shards, "_REUSED_SECONDS", -1.0)
    monkeypatch.setattr(shards.time, "monotonic", iter(range(1000)).__next__)  # each listing takes a second
    units = plan(tmp_path, rows=5)
    assert [shards.identity(unit) for unit in units] == [unit.identity for unit in units]
    assert sum(len(list(readers.read(unit, SPEC))) for unit in units) == 20
    assert len(listed) == 2  # a listing serves for ten seconds
    touch(tmp_path, "7.jpg", data=b"changed")
    assert sum(shards.identity(unit) != unit.identity for unit in units) == 1 and len(listed) == 2
