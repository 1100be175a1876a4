"""The ledger of a feature table: its spec, one record for each unit, their snapshot, the runs.

A unit's parts are content-addressed files; its manifest record, written last, makes them part of the table. So whatever
dies half-way leaves at most files that no record names, and repeating a unit is harmless.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files
from schemas import records
from schemas.errors import TableError
from schemas.feature_table import (
    KEY_DIGEST_BYTES,
    ManifestRecord,
    RunRecord,
    TableSpec,
)
from schemas.records import SchemaMismatch

_SNAPSHOT = pa.schema([("unit", pa.string()), ("record", pa.binary())])


_LISTING_TRIES = 100  # a reader lists again when a compaction moved the records under it


def read_spec(place: str) -> TableSpec | None:
    """The spec of the table at `place`; None where there is no table. Raises SchemaMismatch for a foreign one."""
    where = files.join(place, "table.json")
    if files.stat(where) is None:
        return None
    return records.from_json(TableSpec, files.read_bytes(where), where)


def claim(place: str, spec: TableSpec) -> TableSpec:
    """The spec that the table at `place` is written with: its own if it stands already, else `spec`, now written there.

    Raises TableError naming every difference when the table there holds another kind of rows.
    """
    if files.stat(place):
        raise TableError(f"{place} is a file: name a folder")
    existing = read_spec(place)
    if existing is None:
        strangers = [entry.place for entry in files.list_files(place) if not entry.place.endswith(".html")]
        if strangers:
            raise TableError(f"{place} holds files but no table.json (e.g. {strangers[0]}): name an empty folder")
        files.write_bytes(place, "table.json", records.to_json(spec, indent=2))
        if read_spec(place) is None:  # parts without it would be nobody's
            raise OSError(f"{place}/table.json was written and is not there: does the storage keep what is written?")
        return spec
    if existing.fingerprint != spec.fingerprint:
        lines = records.differences(spec.decisive, existing.decisive)
        raise TableError(
            f"{place} is a table of another job; use another --output, or repeat its options:\n  " + "\n  ".join(lines)
        )
    return existing


@dataclass(frozen=True)
class Manifest:
    """The records of a table: the highest revision of each unit, and the files that could not be read as records."""

    by_unit: dict[str, ManifestRecord]
    damaged: tuple[str, ...] = ()

    @property
    def live(self) -> tuple[ManifestRecord, ...]:
        """The records whose rows belong to the table, in manifest order: by shard, then by place in the shard."""
        alive = (record for record in self.by_unit.values() if not record.removed)
        return tuple(sorted(alive, key=lambda record: (record.unit.shard, record.unit.start, record.unit.id)))


def read(place: str, brief: bool = False) -> Manifest:
    """The manifest of the table at `place`, also while jobs write to it.

    `brief`: the records without what their units cost and which versions made them: half of what a million records
    would hold in memory, and nothing that a launcher asks about.
    """
    before = _manifest_files(place)
    for _ in range(_LISTING_TRIES):
        with contextlib.suppress(FileNotFoundError):
            manifest = _read_listing(before, brief)
            after = _manifest_files(place)
            if _nothing_moved(before, after):
                return manifest
            before = after
            continue
        before = _manifest_files(place)
    raise TableError(f"{place}: the manifest was compacted {_LISTING_TRIES} times while it was read: try again")


def _nothing_moved(before: Sequence[files.Entry], after: Sequence[files.Entry]) -> bool:
    """Whether no compaction ran between two listings: it may hide a record from a listing that passes by meanwhile."""
    earlier, later = ({entry.place for entry in entries} for entries in (before, after))
    return earlier <= later and not any(place.endswith(".parquet") for place in later - earlier)


def compact(place: str, revise: Callable[[ManifestRecord], ManifestRecord] | None = None) -> None:
    """Folds all records into one snapshot, so that opening the table lists few files.

    Only files whose content is in the new snapshot are removed, so that launchers side by side lose nothing; when
    another one compacts at the same time, it is left to it. `revise` may change what a record says of rows
    that stay what they are.
    """
    entries = _manifest_files(place)
    if not revise and len(entries) <= 1 and all(entry.place.endswith(".parquet") for entry in entries):
        return
    try:
        manifest = _read_listing(entries)
    except FileNotFoundError:
        return
    rows = sorted(manifest.by_unit.items())
    kept = (revise(record) if revise else record for _, record in rows)
    table = pa.table(
        {"unit": [unit for unit, _ in rows], "record": [records.to_json(record) for record in kept]}, _SNAPSHOT
    )
    with files.PendingFile(place) as pending:
        pq.write_table(table, pending, compression="zstd")
        name = f"snapshot-{len(rows):08d}-{pending.sha256[:16]}.parquet"
        pending.publish(f"manifest/{name}")
    written = files.stat(files.join(place, "manifest", name))
    if written is None or written.size_bytes != pending.size_bytes:
        return  # a storage that lost it still has the records
    for entry in entries:
        if not entry.place.endswith(name) and files.stat(entry.place) == entry:
            files.remove(entry.place)


def _manifest_files(place: str) -> list[files.Entry]:
    entries = files.list_files(files.join(place, "manifest"))
    return [entry for entry in entries if entry.place.endswith((".json", ".parquet"))]


def _read_listing(entries: Iterable[files.Entry], brief: bool = False) -> Manifest:
    by_unit: dict[str, ManifestRecord] = {}
    damaged = []
    with ThreadPoolExecutor(8) as pool:
        for place, found in pool.map(partial(_read_records, brief=brief), (entry.place for entry in entries)):
            if found is None:
                damaged.append(place)
                continue
            for record in found:
                known = by_unit.get(record.unit.id)
                if known is None or record.revision >= known.revision:
                    by_unit[record.unit.id] = record
    return Manifest(by_unit, tuple(damaged))


def _read_records(place: str, brief: bool) -> tuple[str, list[ManifestRecord] | None]:
    """The records of one manifest file; None when it is damaged. Another schema version is an error, not damage."""
    data = files.read_bytes(place)
    try:
        if place.endswith(".json"):
            msgspec.json.decode(data)  # tells damage from another version
            blobs: Iterator[bytes] = iter([data])
        else:
            batches = pq.ParquetFile(pa.BufferReader(data)).iter_batches(8192, columns=["record"])
            blobs = itertools.chain.from_iterable(batch["record"].to_pylist() for batch in batches)
        found = (records.from_json(ManifestRecord, blob, place) for blob in blobs)
        return place, [_brief(record) for record in found] if brief else list(found)
    except records.OtherVersion:
        raise
    except (SchemaMismatch, *records.NOT_JSON, pa.ArrowException, OSError):
        return place, None


_NOTHING: dict[str, Any] = {}  # one for all


def _brief(record: ManifestRecord) -> ManifestRecord:
    return msgspec.structs.replace(
        record,
        spec_fingerprint=sys.intern(record.spec_fingerprint),
        opt_out_sha256=sys.intern(record.opt_out_sha256),
        errors=record.errors or _NOTHING,
        seconds=_NOTHING,
        versions=_NOTHING,
        finished_at="",
    )


def write_record(place: str, record: ManifestRecord) -> None:
    """Publishes a manifest record: from here on its parts belong to the table."""
    files.write_bytes(place, f"manifest/{record.unit.id}.json", records.to_json(record))


def read_record(place: str, unit: str) -> ManifestRecord | None:
    """The record of a unit that was written since the last compaction; None where there is none, or a damaged one."""
    try:
        _, found = _read_records(files.join(place, f"manifest/{unit}.json"), brief=False)
    except FileNotFoundError:
        return None
    return found[0] if found else None


def remove_unit(place: str, record: ManifestRecord) -> None:
    """Takes a unit out of the table, record first."""
    gone = msgspec.structs.replace(
        record, revision=record.revision + 1, removed=True, features=None, dead_letters=None, rows_in=0, rows_out=0,
        rows_dead=0, rows_opted_out=0, opted_out=b"", opt_out_sha256="",
    )  # fmt: skip
    write_record(place, gone)
    for path in part_paths(record):
        files.remove(files.join(place, path))


def digests_of(record: ManifestRecord) -> list[bytes]:
    """The digests, 16 bytes each, of the keys that a record says are left out."""
    blob = record.opted_out
    return [blob[at : at + KEY_DIGEST_BYTES] for at in range(0, len(blob), KEY_DIGEST_BYTES)]


def digests_left_out(records: Iterable[ManifestRecord]) -> np.ndarray:
    """The digests of all keys that the records leave out: S16 [n], sorted, each once."""
    blobs = b"".join(record.opted_out for record in records)
    return np.unique(np.frombuffer(blobs, f"S{KEY_DIGEST_BYTES}"))


def part_paths(record: ManifestRecord | None) -> list[str]:
    """The paths, below the table, of a record's parts."""
    return [part.path for part in (record.features, record.dead_letters) if part] if record else []


def list_parts(place: str) -> dict[str, int]:
    """Every file that lies where parts lie, by its path below the table, with its size: recorded or not."""
    return {
        files.join(folder, entry.place.rpartition("/")[2]): entry.size_bytes
        for folder in ("features", "dead_letters")
        for entry in files.list_files(files.join(place, folder))
    }


def has_parts(record: ManifestRecord, lying: dict[str, int]) -> bool:
    """Whether the parts that a record names are among those that lie there, in the size that they were written."""
    return all(lying.get(part.path) == part.size_bytes for part in (record.features, record.dead_letters) if part)


def shards_of(place: str, units: Iterable[str]) -> list[str]:
    """The shards of units of the table at `place`, by their records or, without one, by what their parts say; of a unit
    that was taken out none.
    """
    manifest, wanted = read(place), set(units)
    known = [record for unit in sorted(wanted) if (record := manifest.by_unit.get(unit))]
    found = [record.unit.shard for record in known if not record.removed]
    for path in list_parts(place):
        if unit_of_part(path) in wanted - manifest.by_unit.keys():
            part = pa.BufferReader(files.read_bytes(files.join(place, path)))
            with contextlib.suppress(pa.ArrowException, OSError):  # a damaged part cannot say it; Arrow raises both
                found += pq.read_table(part, columns=["shard"])["shard"].slice(0, 1).to_pylist()
    return found


def unit_of_part(path: str) -> str:
    """The id of the unit that a part's path belongs to."""
    return path.rpartition("/")[2].rpartition("-")[0]


def write_run(place: str, run: RunRecord) -> None:
    """Publishes where a run stands."""
    files.write_bytes(place, f"runs/{run.id}.json", records.to_json(run, indent=2))


def read_runs(place: str) -> list[RunRecord]:
    """The runs on a table, oldest first."""
    entries = sorted(files.list_files(files.join(place, "runs")), key=lambda entry: entry.mtime_ns)
    runs = [records.from_json(RunRecord, files.read_bytes(entry.place), entry.place) for entry in entries]
    return sorted(runs, key=lambda run: run.started_at)  # of those in one second, the order of their files
