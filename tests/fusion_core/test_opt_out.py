"""Opt-out lists: read from any of their forms; recorded units lose the listed keys and nothing else."""

import contextlib
import errno
import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core import build, files, manifest, opt_out, table, verify
from fusion_core.fields import InputError
from fusion_core.writer import UnitWriter
from tests.corpora import SPEC, toy_batch, toy_unit, toy_vectors, write_unit, write_vectors
from tests.faults import storage


def write_list(place: Path, keys: list[str]) -> opt_out.OptOut:
    place.write_text("".join(f"{key}\n" for key in keys), "utf-8")
    return opt_out.load(str(place))


def read(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def lying(place: Path) -> set[str]:
    return set(manifest.list_parts(str(place)))


KEYS = ["plain", "with, comma", "süß\t✓", " spaces ", "000017"]


@pytest.mark.parametrize("form", ["txt", "crlf", "csv", "tsv", "parquet", "numbers"])
def test_a_list_is_read_from_lines_and_from_columns(tmp_path: Path, form: str) -> None:
    place, keys = tmp_path / f"list.{'parquet' if form == 'numbers' else form}", KEYS
    if form == "parquet":
        pq.write_table(pa.table({"other": [1.0] * 6, "key": [*keys, None]}), place)
    elif form == "numbers":
        keys = ["17", "-3"]
        pq.write_table(pa.table({"key": [17, -3, 17]}), place)
    elif form in ("csv", "tsv"):
        delimiter = "\t" if form == "tsv" else ","
        quoted = [f'"{key}"' for key in keys]
        place.write_bytes("".join(f"x{delimiter}{key}\n" for key in ["key", *quoted]).encode())
    else:
        end = "\r\n" if form == "crlf" else "\n"
        place.write_bytes(("\ufeff" + end.join([*keys, "", *keys[:2]])).encode())
    found = opt_out.load(str(place))
    assert found.sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
    assert len(found.digests) == len(keys)
    assert found.holds([opt_out.digest(key) for key in [*keys, "key", "", "plain "]]).tolist() == (
        [True] * len(keys) + [False] * 3
    )
    count, examples = found.missing(np.array([opt_out.digest(keys[1])], found.digests.dtype))
    assert (count, set(examples) <= set(keys)) == (len(keys) - 1, True) and keys[1] not in examples


@pytest.mark.parametrize(
    "name, data, why",
    [
        ("a.txt", b"", "holds no key: say --opt-out none"),
        ("a.txt", b"caf\xe9\n", "cannot read the opt-out list"),
        ("a.csv", b"id,url\n1,2\n", "no column 'key'; it has id, url"),
        ("a.parquet", b"PAR1 not really", "cannot read the opt-out list"),
        (None, b"", "no opt-out list"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str | None, data: bytes, why: str) -> None:
    if name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=why):
        opt_out.load(str(tmp_path / (name or "absent.txt")))
    with pytest.raises(InputError, match=r"no opt-out list .*: name a file"):
        opt_out.load(str(tmp_path))
    with pytest.raises(InputError, match="changed while the job ran"):
        write_list(tmp_path / "list", ["a"])
        opt_out.load(str(tmp_path / "list"), "0" * 64)


def test_a_worker_reads_the_list_once(tmp_path: Path) -> None:
    keys = write_list(tmp_path / "list", ["a", "b"])
    (tmp_path / "list").unlink()
    assert opt_out.load(keys.place, keys.sha256) is keys


def test_units_are_looked_at_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt_out, "_UNITS_AT_ONCE", 2)
    for number in range(5):
        write_unit(tmp_path / "table", toy_unit(f"unit-{number}", f"/{number}.tar"), range(number + 2))
    keys, place = write_list(tmp_path / "list", ["k2"]), str(tmp_path / "table")
    swept = opt_out.sweep(place, SPEC, table.Table.open(place).records, keys)
    assert (swept.rows, swept.clean, swept.failures) == (4, {"unit-0": 0}, ())
    assert [part.rows for part in table.Table.open(place).parts] == [2, 2, 3, 4, 5]


@settings(max_examples=6, deadline=None)
@given(st.sets(st.integers(0, 59)), st.sets(st.integers(0, 59)), st.sets(st.integers(0, 59)))
def test_what_is_taken_out_is_as_if_it_had_never_been_there(
    tmp_path_factory: pytest.TempPathFactory, dead: set[int], first: set[int], more: set[int]
) -> None:
    folder, unit = tmp_path_factory.mktemp("table"), toy_unit()
    good = [row for row in range(60) if row not in dead]
    write_unit(folder / "table", unit, good, sorted(dead))
    place, whole = str(folder / "table"), read(folder / "table") if good else None
    for listed in (first, first | more):
        keys = write_list(folder / "list", ["elsewhere", *(f"k{row}" for row in listed)])
        (record,) = table.Table.open(place).records
        swept = opt_out.sweep(place, SPEC, [record], keys)
        assert swept.failures == ()
        (now,) = table.Table.open(place).records
        assert swept.rows == now.rows_opted_out - record.rows_opted_out
        assert swept.clean == ({} if swept.rows else {unit.id: record.revision})
        assert now.rows_opted_out == len(listed) and set(manifest.digests_of(now)) == {
            opt_out.digest(f"k{row}") for row in listed
        }
        kept = [row for row in good if row not in listed]
        assert (now.rows_in, now.rows_out, now.rows_dead) == (60, len(kept), len(dead - listed))
        if whole:
            assert kept == whole["row"].filter(pa.array(np.isin(whole["row"], kept))).to_pylist()
            if kept:
                assert read(folder / "table").equals(whole.filter(np.isin(whole["row"], kept)))
        assert lying(folder / "table") == set(manifest.part_paths(now))
        assert verify.findings(place) == []


def test_what_a_unit_cost_and_where_it_came_from_stays_said(tmp_path: Path) -> None:
    with UnitWriter(str(tmp_path / "table"), manifest.claim(str(tmp_path / "table"), SPEC), toy_unit()) as writer:
        writer.write(toy_batch(range(5)))
        writer.commit(seconds={"unit": 3.0}, versions={"torch": "9"}, finished_at="2026-01-01", source_sha256="s" * 64)
    place = str(tmp_path / "table")
    manifest.compact(place)
    keys = write_list(tmp_path / "list", ["k3"])
    brief = manifest.read(place, brief=True).live
    opt_out.sweep(place, SPEC, brief, keys)
    (record,) = table.Table.open(place).records
    assert (record.seconds, record.versions, record.finished_at) == ({"unit": 3.0}, {"torch": "9"}, "2026-01-01")
    assert (record.source_sha256, record.opt_out_sha256) == ("s" * 64, keys.sha256)


def test_units_without_a_listed_key_are_marked_and_not_touched(tmp_path: Path) -> None:
    place = str(tmp_path / "table")
    for name in ("a", "b", "c"):
        write_unit(tmp_path / "table", toy_unit(f"{name}-000000000000", f"/data/{name}.tar"), range(5))
    keys = write_list(tmp_path / "list", ["nobody"])
    before = {path: (tmp_path / "table" / path).stat().st_mtime_ns for path in lying(tmp_path / "table")}
    found = table.Table.open(place).records
    swept = opt_out.sweep(place, SPEC, found, keys)
    redone = msgspec.structs.replace(found[1], revision=7)  # meanwhile, by another launcher
    manifest.write_record(place, redone)
    manifest.compact(place, lambda record: opt_out.marked(record, swept, keys))
    assert [record.opt_out_sha256 for record in table.Table.open(place).records] == [keys.sha256, "", keys.sha256]
    assert before == {path: (tmp_path / "table" / path).stat().st_mtime_ns for path in lying(tmp_path / "table")}
    assert len(list((tmp_path / "table" / "manifest").iterdir())) == 1


@pytest.mark.parametrize("kind, times", [("publish", 3), ("write", 12), ("open", 7)])
def test_cut_off_anywhere_a_reader_sees_the_unit_before_or_after(tmp_path: Path, kind: str, times: int) -> None:
    keys = write_list(tmp_path / "list", ["k1", "k7", "k8"])
    for number in range(times):
        folder = tmp_path / f"{kind}-{number}"
        write_unit(folder, toy_unit(), [0, 1, 2, 3, 4, 5, 6, 7], dead=[8, 9])
        before = read(folder)
        found = table.Table.open(str(folder)).records
        swept = None
        with storage.failing(storage.at(number, kind, errno.EIO)), contextlib.suppress(OSError):
            swept = opt_out.sweep(str(folder), SPEC, found, keys)
        after = before.filter(np.isin(before["row"], [0, 2, 3, 4, 5, 6]))
        (record,) = table.Table.open(str(folder)).records
        assert read(folder).equals(before if record.revision == 0 else after)
        assert swept is None or bool(swept.failures) == (record.revision == 0)
        swept = opt_out.sweep(str(folder), SPEC, table.Table.open(str(folder)).records, keys)
        assert swept.failures == () and read(folder).equals(after)
        assert table.Table.open(str(folder)).dead_letters()["row"].to_pylist() == [9]
        assert not list((folder / files.TEMPORARY).iterdir())


def test_a_damaged_part_is_told_and_not_passed_on(tmp_path: Path) -> None:
    record = write_unit(tmp_path / "table", toy_unit(), range(5))
    assert record.features
    path = tmp_path / "table" / record.features.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    keys = write_list(tmp_path / "list", ["k1"])
    swept = opt_out.sweep(str(tmp_path / "table"), SPEC, [record], keys)
    assert len(swept.failures) == 1 and "shard.tar: not held against the opt-out list" in swept.failures[0]
    assert table.Table.open(str(tmp_path / "table")).records == (record,)


def test_verify_counts_what_is_left_out(tmp_path: Path) -> None:
    record = write_unit(tmp_path / "table", toy_unit(), range(5))
    manifest.write_record(str(tmp_path / "table"), msgspec.structs.replace(record, rows_opted_out=1, revision=1))
    (finding,) = verify.findings(str(tmp_path / "table"))
    assert "5 rows and 0 dead letters and 1 left out" in finding.what
    manifest.write_record(
        str(tmp_path / "table"), msgspec.structs.replace(record, rows_in=6, rows_opted_out=1, revision=2)
    )
    assert verify.findings(str(tmp_path / "table")) == []
    manifest.write_record(str(tmp_path / "table"), msgspec.structs.replace(record, rows_in=4, revision=3))
    assert len(verify.findings(str(tmp_path / "table"))) == 1


def test_an_index_is_searched_for_listed_keys(tmp_path: Path) -> None:
    vectors = toy_vectors(range(40), 16, "image").astype(np.float32)
    whole = write_vectors(tmp_path / "table", vectors, vectors, SPEC, per_unit=20)
    folder = tmp_path / "index"
    build.build(whole, str(folder), "image_embedding")
    keys = read(tmp_path / "table")["key"].to_pylist()
    there, not_there = (write_list(tmp_path / name, [key]) for name, key in (("a", keys[30]), ("b", "another")))
    assert opt_out.is_in_index(str(folder), there) and not opt_out.is_in_index(str(folder), not_there)

    with storage.failing(storage.at(1, "open", errno.EIO)), pytest.raises(OSError):
        opt_out.is_in_index(str(folder), not_there)
    (columns,) = folder.glob("meta-*.arrow")
    whole_columns = columns.read_bytes()
    with pa.ipc.new_file(columns, pa.schema([("caption", pa.string())])):
        pass
    assert opt_out.is_in_index(str(folder), not_there), "it has no keys"
    columns.write_bytes(whole_columns[:200])
    assert opt_out.is_in_index(str(folder), not_there), "nobody can tell"
    columns.unlink()
    assert opt_out.is_in_index(str(folder), not_there)
