"""Records and their version rule; files written by every released version."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_core import fusers, index, table, verify
from schemas import records
from schemas.feature_table import ManifestRecord, TableSpec
from schemas.records import SchemaMismatch
from tests.corpora import SPEC, TOWER, toy_unit, toy_vectors

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("v*"))


def test_records_come_back_as_they_were() -> None:
    record = ManifestRecord(toy_unit(rows=3), "f" * 64, 3, 2, 1, errors={"EmptyImage": 1}, seconds={"read": 0.25})
    assert records.from_json(ManifestRecord, records.to_json(record), "x.json") == record
    assert records.from_json(TableSpec, records.to_json(SPEC, indent=2), "table.json") == SPEC


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(records.to_json(SPEC)), **fields}).encode()


def test_a_later_minor_version_is_read_and_its_new_fields_ignored() -> None:
    assert records.from_json(TableSpec, changed(schema_version="1.9", colour="blue"), "x").tower == TOWER


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(schema_version="2.0"), r"x\.json has schema version '2\.0'; this release reads 1\.x"),
        (changed(tower=None), r"x\.json is not a TableSpec record: .*tower"),
        (b'{"schema_version": "1.0"}', r"missing required field `tower`"),
        (b"{}", r"x\.json is not a TableSpec record: .*missing required field `tower`"),
        (b"[1, 2", r"x\.json is not a TableSpec record"),
        (b"\xff\xfe", r"x\.json is not a TableSpec record"),
    ],
)
def test_other_records_are_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(SchemaMismatch, match=message):
        records.from_json(TableSpec, data, "x.json")


def test_the_fingerprint_follows_what_decides_the_rows_only() -> None:
    moved = dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, model="m", pretrained="p"))
    assert moved.fingerprint == SPEC.fingerprint
    for field, value in (("precision", "bf16"), ("weights_sha256", "0" * 64), ("embedding_dim", 17)):
        other = dataclasses.replace(SPEC, tower=dataclasses.replace(TOWER, **{field: value}))
        assert other.fingerprint != SPEC.fingerprint
        assert [line.partition(":")[0] for line in records.differences(other, SPEC)] == [f"tower.{field}"]
    assert (
        dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, max_pixels=1)).fingerprint != SPEC.fingerprint
    )


def test_the_fingerprint_of_version_1_never_changes() -> None:
    # A table's records carry it: were it to change, every table would look like another job's.
    for version in ("1.0", "1.9"):
        assert dataclasses.replace(SPEC, schema_version=version).fingerprint == SPEC.fingerprint
    assert SPEC.fingerprint == "33250edf58e48c69a56696478a2c00dc16d2f730372bd9e2464cfd4a2c6bf0a0"


def test_there_are_golden_files_of_this_version() -> None:
    assert f"v{records.VERSION}" in [folder.name for folder in GOLDEN]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_tables_are_read(folder: Path) -> None:
    opened = table.Table.open(str(folder / "table"))
    rows = pa.Table.from_batches(opened.scan())
    assert rows["shard"].to_pylist() == ["/data/a.tar"] * 4 + ["/data/b.tar"] * 3 + ["/data/c.tar"] * 2
    assert rows["row"].to_pylist() == [0, 1, 2, 4, 0, 1, 2, 0, 1]
    vectors = table.to_numpy(rows["fused_embedding"].combine_chunks())
    np.testing.assert_array_equal(vectors[:4], toy_vectors([0, 1, 2, 4], 16, "fused_embedding"))
    assert opened.dead_letters().to_pylist() == [
        {"key": "k3", "shard": "/data/a.tar", "row": 3, "offset": None, "stage": "decode", "error": "CorruptImage",
         "message": "broken on purpose"}
    ]  # fmt: skip
    assert opened.spec.fuser == fusers.parse("weighted_sum:image=0.7,text=0.3", 16).spec
    assert verify.findings(str(folder / "table")) == []


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_fusers_and_indexes_are_read(folder: Path) -> None:
    assert fusers.load(str(folder / "fuser"), 16).spec.params == {"image": 0.7, "text": 0.3}
    found = index.Index.open(str(folder / "index"))
    query = toy_vectors([2], 16, "image_embedding").astype(np.float32)
    scores, ids = found.search(query / np.linalg.norm(query), 2)
    assert ids[0][0] in (2, 6) and scores[0][0] == pytest.approx(1, abs=2e-3)
    assert found.meta(ids[0][:1])["key"].to_pylist() == ["k2"]
