"""`fusion export`: every row in the other layout, bit for bit, and what is left out is told."""

import gc
import hashlib
import json
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core import manifest, table
from fusion_core.export import _NAME, BadExport, write
from fusion_core.writer import UnitWriter
from pipelines import cli
from tests.corpora import SPEC, pairs, photo, toy_batch, toy_unit, toy_vectors, write_tar, write_unit

KEYS = ["000000", "a/000001", "../../etc/passwd", "k.ey", "000000", "", "/abs", "naïve key", "__meta__", "000009"]
NAMES = ["000000", "a/000001", "row-000000000002", "row-000000000003", "row-000000000004", "row-000000000005",
         "row-000000000006", "naïve key", "row-000000000008", "000009"]  # fmt: skip


def absent(vectors: np.ndarray, rows: list[int]) -> np.ndarray:
    vectors[rows] = 0
    return vectors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> table.Table:
    """Ten rows of odd keys: 3 has no caption, 6 no picture; 0 and 1 lie in a shard, 9 is another picture now."""
    folder = tmp_path_factory.mktemp("export")
    shard = write_tar(folder / "shard.tar", [*pairs(2), ("000009.png", photo(3, format="PNG"))])
    with tarfile.open(shard) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    digests = [hashlib.sha256(photo(row)).digest() for row in range(10)]
    where: Mapping[int, tuple[int, int]] = {
        0: places["000000.jpg"], 1: places["000001.jpg"], 9: places["000009.png"],
    }  # fmt: skip
    given: dict[str, Any] = {
        "key": KEYS,
        "offset": [where[row][0] if row in where else 10**9 for row in range(10)],
        "length": [where[row][1] if row in where else 10 for row in range(10)],
        "caption": [None if row == 3 else f"caption {row}" for row in range(10)],
        "has_text": [row != 3 for row in range(10)],
        "has_image": [row != 6 for row in range(10)],
        "sha256": pa.array([None if row == 6 else digests[row] for row in range(10)], pa.binary(32)),
        "meta": ['{"note": "na\\u00efve", "n": 1}', "not json", *['{"x": "\\ud800"}'] * 8],
    }
    kind = table.features_schema(SPEC).field("image_embedding").type
    for name, row in (("image_embedding", 6), ("text_embedding", 3)):
        given[name] = table.to_arrow(absent(toy_vectors(range(10), 16, name), [row]), kind)
    place = folder / "table"
    manifest.claim(str(place), SPEC)
    for start, stop in ((0, 4), (4, 10)):
        part = {name: value[start:stop] for name, value in given.items()}
        unit = toy_unit(f"unit-{start:012d}", str(shard))
        with UnitWriter(str(place), SPEC, unit) as out:
            out.write(toy_batch(range(stop - start), SPEC, str(shard), **part))
            out.commit()
    return table.Table.open(str(place))


def column(source: table.Table, name: str) -> np.ndarray:
    return np.concatenate([matrix for _, matrix, _ in source.vectors(name)])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "export.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_webdataset_reads_the_tars(source: table.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["export", source.place, "--format", "webdataset", "--output", str(tmp_path / "out")]
    assert cli.main([*options, "--images", "--rows-per-file", "5"]) == 0
    said = capsys.readouterr().out
    assert "10 of 10 rows in 2 files" in said
    assert "1 rows without a picture: without that member" in said
    assert "1 rows without a caption: without that member" in said
    assert "6 samples go by their row's number" in said
    assert "2 original pictures" in said
    assert "7 pictures missing" in said and "e.g. " in said
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == ["00000.tar", "00001.tar"]
    urls = [str(tmp_path / "out" / name) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its last file to the collector
        samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
        raw = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == NAMES
    for row, sample in enumerate(samples):
        assert sample["json"]["key"] == KEYS[row]
        assert (sample["json"]["shard"], sample["json"]["row"]) == (
            source.take([row])["shard"][0].as_py(),
            row % 4 if row < 4 else row - 4,
        )
        assert sample.get("txt") == (None if row == 3 else f"caption {row}")
        for name, gone in (("image_embedding", 6), ("text_embedding", 3)):
            assert (f"{name}.npy" in sample) == (row != gone)
            if row != gone:
                found = sample[f"{name}.npy"]
                assert found.dtype == np.float16
                np.testing.assert_array_equal(found, column(source, name)[row])
        assert raw[row].get("jpg") == (photo(row) if row < 2 else None)
    assert samples[0]["json"]["meta"] == {"note": "naïve", "n": 1}
    assert samples[1]["json"]["meta"] == "not json"
    assert samples[0]["json"]["sha256"] == hashlib.sha256(photo(0)).hexdigest()


@pytest.mark.parametrize(("modality", "kept"), [
    ("both", [0, 1, 2, 4, 5, 7, 8, 9]), ("image", [0, 1, 2, 3, 4, 5, 7, 8, 9]), ("text", [0, 1, 2, 4, 5, 6, 7, 8, 9]),
])  # fmt: skip
def test_clip_retrieval_layout_is_aligned(
    source: table.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str], modality: str, kept: list[int]
) -> None:
    options = ["export", source.place, "--format", "clip-retrieval", "--output", str(tmp_path)]
    assert cli.main([*options, "--modality", modality, "--rows-per-file", "3"]) == 0
    said = capsys.readouterr().out
    assert f"{len(kept)} of 10 rows" in said
    assert said.count("left out") == (2 if modality == "both" else 1)
    count = -(-len(kept) // 3)
    expected = source.take(kept)
    meta = [pq.read_table(tmp_path / "metadata" / f"metadata_{number}.parquet") for number in range(count)]
    assert [rows.num_rows for rows in meta] == [len(kept[i : i + 3]) for i in range(0, len(kept), 3)]
    assert len(list((tmp_path / "metadata").iterdir())) == count
    joined = pa.concat_tables(meta)
    assert joined["image_path"].to_pylist() == [KEYS[row] for row in kept]
    assert joined["caption"].to_pylist() == expected["caption"].to_pylist()
    assert joined["metadata"].to_pylist() == expected["meta"].to_pylist()
    sides = {"image": "img_emb", "text": "text_emb"}
    for side, folder in sides.items():
        if modality not in ("both", side):
            assert not (tmp_path / folder).exists()
            continue
        arrays = [np.load(tmp_path / folder / f"{folder}_{number}.npy") for number in range(count)]
        assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
        np.testing.assert_array_equal(np.concatenate(arrays), column(source, f"{side}_embedding")[kept])


@pytest.mark.parametrize("format", ["webdataset", "clip-retrieval"])
def test_it_is_written_once_and_alike(
    source: table.Table, tmp_path: Path, format: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record = write(source, str(out), format, rows_per_file=4)
    first = contents(out)
    assert (record.files, record.size_bytes) == (len(first), sum(map(len, first.values())))
    assert not any(".tmp" in name for name in first)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write(source, str(out), format, rows_per_file=4) == record
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    next(out.rglob("*.npy" if format == "clip-retrieval" else "*.tar")).unlink()
    write(source, str(out), format, rows_per_file=4)
    assert contents(out) == first
    with pytest.raises(BadExport, match="rows_per_file: 5 here, 4 there"):
        write(source, str(out), format, rows_per_file=5)
    assert cli.main(["export", source.place, "--format", format, "--output", source.place]) == 2
    assert "name an empty folder" in capsys.readouterr().err
    assert contents(out) == first


def test_an_export_that_was_cut_off_is_taken_up(source: table.Table, tmp_path: Path) -> None:
    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    for format in ("webdataset", "clip-retrieval"):
        out = tmp_path / format
        with pytest.raises(KeyboardInterrupt):
            write(source, str(out), format, rows_per_file=2, passed=stop)
        assert json.loads((out / "export.json").read_bytes())["finished_at"] == ""
        assert not list((out / ".tmp").iterdir())
        record = write(source, str(out), format, rows_per_file=2)
        assert record.finished_at
        write(source, str(tmp_path / "whole" / format), format, rows_per_file=2)
        assert contents(out) == contents(tmp_path / "whole" / format)


def test_options_of_the_other_format_are_refused(source: table.Table, tmp_path: Path) -> None:
    for options in (["webdataset", "--modality", "image"], ["clip-retrieval", "--images"]):
        assert cli.main(["export", source.place, "--output", str(tmp_path / "o"), "--format", *options]) == 2
    assert not (tmp_path / "o").exists()


def test_a_table_without_rows_exports_nothing(tmp_path: Path) -> None:
    write_unit(tmp_path / "t", toy_unit(), [], dead=[0])
    for format in ("webdataset", "clip-retrieval"):
        record = write(table.Table.open(str(tmp_path / "t")), str(tmp_path / format), format)
        assert (record.rows, record.files) == (0, 0)


@settings(max_examples=300)
@given(st.text(st.sampled_from("ab_./\\ -é\n\0"), max_size=8))
def test_names_in_a_tar_stay_below_its_folder(key: str) -> None:
    if _NAME.fullmatch(key):
        assert wds.tariterators.base_plus_ext(f"{key}.image_embedding.npy") == (key, "image_embedding.npy")
        assert not key.startswith(("/", "__"))
        assert all(part not in ("", ".", "..") for part in key.split("/"))
