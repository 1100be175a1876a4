"""The feature table: what is written is what is read, and only what a record names is in it."""

import dataclasses
import itertools
import json
import resource
import threading
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core import files, manifest, table, verify
from fusion_core.writer import LedgerError, UnitWriter
from schemas.errors import TableError
from schemas.feature_table import TableSpec, features_schema
from schemas.fuser import FuserSpec
from schemas.records import SchemaMismatch
from schemas.samples import DeadLetter
from tests.corpora import SPEC, TOWER, toy_batch, toy_unit, toy_vectors, write_unit

FUSED = TableSpec(TOWER, SPEC.input, FuserSpec("concat", {"image": 0.5, "text": 0.5}, 32, "own", "f" * 64))


def visible(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_written_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = list(range(20_000))
    write_unit(tmp_path, toy_unit(), rows, spec=FUSED)
    opened = table.Table.open(str(tmp_path))
    assert opened.num_rows == 20_000
    read = pa.Table.from_batches(opened.scan(batch_rows=3000))
    assert read.schema == features_schema(FUSED)
    assert read.equals(pa.Table.from_batches([toy_batch(rows, FUSED)]))
    found = [
        (first, matrix.copy(), present.all()) for first, matrix, present in opened.vectors("fused_embedding", 7000)
    ]
    assert [first for first, _, _ in found] == list(np.cumsum([0, *(len(matrix) for _, matrix, _ in found[:-1])]))
    np.testing.assert_array_equal(np.concatenate([m for _, m, _ in found]), toy_vectors(rows, 32, "fused_embedding"))


def test_vectors_are_stored_raw_and_the_footer_repeats_the_spec(tmp_path: Path) -> None:
    record = write_unit(tmp_path, toy_unit(), range(10_000))
    assert record.features is not None
    footer = pq.read_metadata(tmp_path / record.features.path)
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [8192, 1808]
    by_name = {
        footer.row_group(0).column(i).path_in_schema: footer.row_group(0).column(i) for i in range(footer.num_columns)
    }
    vector = by_name["image_embedding.list.element"]
    assert (vector.compression, vector.is_stats_set) == ("UNCOMPRESSED", False)
    assert not any("DICTIONARY" in encoding for encoding in vector.encodings)
    assert by_name["shard"].compression == "ZSTD"
    spec = pq.read_schema(tmp_path / record.features.path).metadata[b"fusion.table_spec"]
    assert json.loads(spec)["tower"]["weights_sha256"] == TOWER.weights_sha256


def test_take_and_sample_follow_manifest_order_over_parts(tmp_path: Path) -> None:
    write_unit(tmp_path, toy_unit("b-1", "/data/b.tar"), range(9000))
    write_unit(tmp_path, toy_unit("a-1", "/data/a.tar"), range(5))
    opened = table.Table.open(str(tmp_path))
    everything = pa.Table.from_batches(opened.scan(["shard", "row"]))
    assert everything["shard"][0].as_py() == "/data/a.tar"
    wanted = [9004, 0, 4, 5, 8200, 8197, 4]
    assert opened.take(wanted, ["shard", "row"]).equals(everything.take(wanted).combine_chunks())
    assert opened.take([], ["row"]).num_rows == 0
    assert opened.sample(50, seed=3, columns=["row"]).equals(opened.sample(50, seed=3, columns=["row"]))
    assert len(set(opened.sample(100_000, columns=["shard", "row"])["row"].to_pylist())) == 9000
    with pytest.raises(IndexError, match="9005"):
        opened.take([9005])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sets(st.integers(0, 59), max_size=20))
def test_every_row_is_a_feature_or_a_dead_letter(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], dead: set[int]
) -> None:
    place = tmp_path_factory.mktemp("table")
    manifest.claim(str(place), SPEC)
    edges = sorted({0, 60, *cuts})
    with UnitWriter(str(place), SPEC, toy_unit()) as writer:
        for start, stop in itertools.pairwise(edges):
            writer.write(toy_batch(range(start, stop)))  # a dead letter takes back a row written before it
        writer.reject(DeadLetter(f"k{row}", row, "read", "ScatteredKey", "late") for row in dead)
        record = writer.commit()
    opened = table.Table.open(str(place))
    alive = [row for batch in opened.scan(["row"]) for row in batch["row"].to_pylist()]
    assert alive == sorted(set(range(60)) - dead)
    assert opened.dead_letters()["row"].to_pylist() == sorted(dead)
    assert (record.rows_in, record.rows_out, record.rows_dead) == (60, 60 - len(dead), len(dead))
    assert verify.findings(str(place)) == []


@pytest.mark.parametrize("rows", [[0, 1, 3], [0, 1, 1, 2], [1, 2, 3]])
def test_a_ledger_that_does_not_close_publishes_nothing(tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(LedgerError, match="lost or double"):
        write_unit(tmp_path, toy_unit(), rows)
    assert visible(tmp_path) == ["table.json"]


def test_fewer_rows_than_the_shard_promised_publish_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="promised 4 samples, 3 came"):
        write_unit(tmp_path, toy_unit(rows=4), range(3))
    assert visible(tmp_path) == ["table.json"]


def test_an_empty_unit_has_a_record_and_no_parts(tmp_path: Path) -> None:
    record = write_unit(tmp_path, toy_unit(), [])
    assert (record.features, record.dead_letters, record.rows_in) == (None, None, 0)
    assert table.Table.open(str(tmp_path)).num_rows == 0
    assert verify.findings(str(tmp_path)) == []


def test_writing_a_unit_again_gives_the_same_part(tmp_path: Path) -> None:
    first = write_unit(tmp_path, toy_unit(), range(100), dead=[7])
    before = visible(tmp_path)
    second = write_unit(tmp_path, toy_unit(), range(100), dead=[7], previous=first)
    assert (second.features, second.dead_letters, second.revision) == (first.features, first.dead_letters, 1)
    assert visible(tmp_path) == before


def test_a_changed_unit_replaces_its_parts_and_removes_leftovers(tmp_path: Path) -> None:
    first = write_unit(tmp_path, toy_unit(), range(10), dead=[3])
    leftover = "features/shard-0123456789ab-deadbeef.parquet"
    (tmp_path / leftover).write_bytes(b"of a run that died")
    assert [f.what for f in verify.findings(str(tmp_path))] == [
        f"{leftover}: no record names it (left by a run that was cut off)"
    ]
    second = write_unit(tmp_path, toy_unit(), range(12), previous=first, stale=(leftover,))
    assert first.features and second.features
    assert visible(tmp_path) == [second.features.path, f"manifest/{second.unit.id}.json", "table.json"]


def test_the_highest_revision_counts_whatever_file_holds_it(tmp_path: Path) -> None:
    first = write_unit(tmp_path, toy_unit(), range(10))
    manifest.compact(str(tmp_path))
    second = write_unit(tmp_path, toy_unit(), range(12), previous=first)
    assert manifest.read(str(tmp_path)).live == (second,)
    manifest.compact(str(tmp_path))
    manifest.write_record(str(tmp_path), first)  # a late launcher's older record does not win
    assert manifest.read(str(tmp_path)).live == (second,)
    assert len(list((tmp_path / "manifest").iterdir())) == 2


def test_removed_units_stay_removed_through_compaction(tmp_path: Path) -> None:
    record = write_unit(tmp_path, toy_unit("a-1", "/a.tar"), range(10), dead=[2])
    write_unit(tmp_path, toy_unit("b-1", "/b.tar"), range(3))
    manifest.compact(str(tmp_path))
    manifest.remove_unit(str(tmp_path), record)
    manifest.compact(str(tmp_path))
    assert table.Table.open(str(tmp_path)).num_rows == 3
    assert verify.findings(str(tmp_path)) == []


def test_readers_see_whole_tables_while_records_are_compacted(tmp_path: Path) -> None:
    for i in range(30):
        write_unit(tmp_path, toy_unit(f"u{i}-1", f"/{i}.tar"), range(3))
    ended = threading.Event()

    def churn() -> None:
        for i in range(40):
            record = manifest.read(str(tmp_path)).by_unit[f"u{i % 30}-1"]
            manifest.write_record(str(tmp_path), msgspec.structs.replace(record, revision=record.revision + 1))
            manifest.compact(str(tmp_path))
        ended.set()

    thread = threading.Thread(target=churn)
    thread.start()
    looks = 0
    while not ended.is_set():
        assert table.Table.open(str(tmp_path)).num_rows == 90
        looks += 1
    thread.join()
    assert looks > 0


def test_another_job_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    manifest.claim(str(tmp_path), SPEC)
    moved = dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, model="elsewhere/toy"))
    assert manifest.claim(str(tmp_path), moved) == SPEC
    other = dataclasses.replace(FUSED, tower=dataclasses.replace(TOWER, precision="bf16"))
    with pytest.raises(TableError, match=r"(?s)fuser: .*concat.*tower.precision: 'bf16' here, 'fp32' there"):
        manifest.claim(str(tmp_path), other)


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(TableError, match=r"holiday\.jpg"):
        manifest.claim(str(tmp_path), SPEC)


def test_no_table_damaged_manifest_and_other_version_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no table\.json"):
        table.Table.open(str(tmp_path))
    write_unit(tmp_path, toy_unit(), range(3))
    record = tmp_path / "manifest" / "shard-0123456789ab.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:50])
    with pytest.raises(TableError, match=r"damaged manifest files .*shard-0123456789ab\.json"):
        table.Table.open(str(tmp_path))
    record.write_bytes(whole.replace(b'"schema_version":"1.', b'"schema_version":"2.'))
    with pytest.raises(SchemaMismatch, match=r"'2\.\d'; this release reads 1\.x"):
        table.Table.open(str(tmp_path))


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("harm", "finding"),
    [(Path.unlink, "missing"), (shorten, "bytes, recorded"), (damage_byte, "differs from its recorded SHA-256")],
)
def test_verify_names_what_is_wrong(tmp_path: Path, harm, finding: str) -> None:
    write_unit(tmp_path, toy_unit("good-1", "/good.tar"), range(50))
    record = write_unit(tmp_path, toy_unit("bad-1", "/bad.tar"), range(50), dead=[1])
    assert record.features
    harm(tmp_path / record.features.path)
    findings = verify.findings(str(tmp_path))
    assert [found.unit for found in findings] == ["bad-1"]
    assert finding in findings[0].what


def test_verify_finds_vectors_that_contradict_their_flags(tmp_path: Path) -> None:
    manifest.claim(str(tmp_path), SPEC)
    with UnitWriter(str(tmp_path), SPEC, toy_unit()) as writer:
        writer.write(toy_batch(range(5), has_text=[True, True, False, True, True]))
        writer.commit()
    assert "text_embedding: row 2 of the part has length 1.0" in verify.findings(str(tmp_path))[0].what


def test_wrong_columns_are_refused_before_they_are_written(tmp_path: Path) -> None:
    manifest.claim(str(tmp_path), SPEC)
    with UnitWriter(str(tmp_path), SPEC, toy_unit()) as writer, pytest.raises(SchemaMismatch):
        writer.write(toy_batch(range(3), FUSED))
    assert visible(tmp_path) == ["table.json"]


def test_a_pending_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="too large"), files.PendingFile(str(tmp_path)) as pending:
            pending.write(bytes(100))  # waits in a buffer, and finds no room
            pending.publish("x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert pending.closed


def test_a_part_that_cannot_be_published_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: files.PendingFile, name: str) -> None:
        raise OSError(28, "No space left on device")

    manifest.claim(str(tmp_path), SPEC)
    monkeypatch.setattr(files.PendingFile, "publish", full)
    with pytest.raises(OSError, match="No space left"):
        write_unit(tmp_path, toy_unit(), range(3))
    assert visible(tmp_path) == ["table.json"]


def test_pandas_duckdb_polars_datasets_and_pyarrow_open_the_features(tmp_path: Path) -> None:
    import datasets
    import duckdb
    import polars as pl

    write_unit(tmp_path, toy_unit("a-1", "/a.tar"), range(40), spec=FUSED)
    write_unit(tmp_path, toy_unit("b-1", "/b.tar"), range(25), spec=FUSED)
    folder = str(tmp_path / "features")
    vector = toy_vectors([24], 16, "image_embedding")[0].astype(np.float32)

    frame = pd.read_parquet(folder)
    assert len(frame) == 65
    np.testing.assert_array_equal(frame.iloc[-1]["image_embedding"].astype(np.float32), vector)
    assert pads.dataset(folder).count_rows() == 65
    lazy = pl.scan_parquet(f"{folder}/*.parquet").collect()
    assert lazy.height == 65
    np.testing.assert_array_equal(np.array(lazy["image_embedding"][-1].to_list(), np.float32), vector)
    row = duckdb.sql(
        f"select image_embedding from '{folder}/*.parquet' where shard = '/b.tar' and row = 24"
    ).fetchall()[0]
    np.testing.assert_array_equal(np.array(row[0], np.float32), vector)
    loaded = datasets.load_dataset("parquet", data_dir=folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 65
    np.testing.assert_array_equal(np.array(loaded[64]["image_embedding"], np.float32), vector)


def test_a_brief_manifest_lacks_only_what_units_cost(tmp_path: Path) -> None:
    for number in range(3):
        record = write_unit(tmp_path, toy_unit(f"u{number}"), range(4), [3])
        cost = {"seconds": {"unit": 1.5}, "versions": {"python": "3"}, "finished_at": "2026-11-21T00:00:00+00:00"}
        manifest.write_record(str(tmp_path), msgspec.structs.replace(record, **cost))
    full = manifest.read(str(tmp_path))
    for _ in range(2):  # of single records, and of a snapshot
        brief = manifest.read(str(tmp_path), brief=True)
        assert brief.by_unit.keys() == full.by_unit.keys()
        for unit, record in full.by_unit.items():
            assert record.seconds and record.versions
            assert brief.by_unit[unit] == msgspec.structs.replace(record, seconds={}, versions={}, finished_at="")
        manifest.compact(str(tmp_path))


def test_a_part_that_is_not_what_its_record_says_is_named_when_it_is_read(tmp_path: Path) -> None:
    record = write_unit(tmp_path, toy_unit(), range(20), dead=[20])
    assert record.features is not None and record.dead_letters is not None
    part, letters = tmp_path / record.features.path, tmp_path / record.dead_letters.path
    whole = pq.read_table(part)
    opened = table.Table.open(str(tmp_path))

    def refuse(why: str) -> None:
        with pytest.raises(TableError, match=f"{record.features.path} is damaged .*{why}.*--repair"):  # type: ignore[union-attr]
            list(opened.scan())

    pq.write_table(whole.slice(0, 19), part)
    refuse("19 rows, recorded 20")
    pq.write_table(whole.rename_columns(["kex", *whole.column_names[1:]]), part)
    refuse("columns are not those of the table")
    with pytest.raises(TableError, match="columns are not"):
        opened.take([3])
    part.write_bytes(b"PAR1 this is no part PAR1")
    refuse("")
    pq.write_table(pa.table({"key": ["k20"]}), letters)
    with pytest.raises(TableError, match="not the columns of dead letters"):
        opened.dead_letters()


@pytest.mark.parametrize("harm", [b'{"unit": "\xff"}', b'{"a":' * 5000])
def test_bytes_that_are_no_json_are_a_damaged_record(tmp_path: Path, harm: bytes) -> None:
    write_unit(tmp_path, toy_unit(), range(3))
    (path,) = (tmp_path / "manifest").iterdir()
    path.write_bytes(harm)
    with pytest.raises(TableError, match="damaged"):
        table.Table.open(str(tmp_path))


@pytest.mark.parametrize("path", ["../outside.parquet", "/etc/passwd", "features/../../outside.parquet", "a//b"])
def test_no_record_names_a_file_outside_of_its_table(tmp_path: Path, path: str) -> None:
    write_unit(tmp_path, toy_unit(), range(3))
    (place,) = (tmp_path / "manifest").iterdir()
    record = json.loads(place.read_bytes())
    record["features"]["path"] = path
    place.write_text(json.dumps(record))
    with pytest.raises(TableError, match="damaged"):
        table.Table.open(str(tmp_path))
