"""The feature table: written unit by unit, opened, scanned, sampled, verified.

A unit's parts are content-addressed files; its manifest record, written last, makes them part of the table. So whatever
dies half-way leaves at most files that no record names, and repeating a unit is harmless.
"""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from fusion_core import files, fusers
from schemas import records
from schemas.errors import UserError
from schemas.feature_table import (
    EMBEDDINGS,
    KEY_DIGEST_BYTES,
    ManifestRecord,
    Part,
    RunRecord,
    TableSpec,
    features_schema,
)
from schemas.records import SchemaMismatch
from schemas.samples import DEAD_LETTERS, DeadLetter, Unit

if TYPE_CHECKING:
    from fusion_core.feed import Feed

NumberT = TypeVar("NumberT", int, float)

ROW_GROUP_ROWS = 8192
_SNAPSHOT = pa.schema([("unit", pa.string()), ("record", pa.binary())])
_LISTING_TRIES = 100  # a reader lists again when a compaction moved the records under it


class LedgerError(RuntimeError):
    """The rows of a unit do not add up: its part is not published."""


class TableError(UserError):
    """A place is not the table that was asked for, and why."""


# --- the spec -------------------------------------------------------------------------------------------------------


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


# --- the manifest ---------------------------------------------------------------------------------------------------


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


def read_manifest(place: str, brief: bool = False) -> Manifest:
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


# --- writing one unit -----------------------------------------------------------------------------------------------


class _ParquetFile:
    """A Parquet part being written, one row group per 8192 rows."""

    def __init__(self, place: str, schema: pa.Schema):
        self._schema = schema
        self._pending = files.PendingFile(place)
        try:
            self._writer: Any = pq.ParquetWriter(self._pending, schema, **_writer_settings(schema))
        except BaseException:  # a full disk does not even take its first bytes
            self._pending.__exit__()
            raise
        self._buffer: list[pa.RecordBatch] = []
        self._buffered = 0
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.schema != self._schema:
            raise SchemaMismatch(f"rows for {self._pending.path} have the schema\n{batch.schema}\nnot\n{self._schema}")
        self._buffer.append(batch)
        self._buffered += batch.num_rows
        self.rows += batch.num_rows
        if self._buffered >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)

    def finish(self) -> None:
        self._flush(1)
        self._writer.close()
        self._pending.flush()

    def _flush(self, least: int) -> None:
        table = pa.Table.from_batches(self._buffer, self._schema)
        start = 0
        while self._buffered - start >= least:
            self._writer.write_table(table.slice(start, ROW_GROUP_ROWS), row_group_size=ROW_GROUP_ROWS)
            start = min(start + ROW_GROUP_ROWS, self._buffered)
        self._buffer = table.slice(start).to_batches()
        self._buffered -= start

    def without(self, place: str, rows: set[int]) -> "_ParquetFile":
        """A finished copy of this finished file that lacks the given row numbers."""
        copy = _ParquetFile(place, self._schema)
        unwanted = pa.array(sorted(rows), pa.int64())
        with pq.ParquetFile(self._pending.path) as source:
            for batch in source.iter_batches(ROW_GROUP_ROWS):
                keep = pa.compute.invert(pa.compute.is_in(batch["row"], value_set=unwanted))
                copy.write(batch.filter(keep).cast(self._schema))
        copy.finish()
        return copy

    def publish(self, prefix: str) -> Part | None:
        """Publishes the finished file as `<prefix>-<hash>.parquet`; nothing when it has no rows."""
        if not self.rows:
            return None
        part = Part(
            f"{prefix}-{self._pending.sha256[:16]}.parquet", self.rows, self._pending.size_bytes, self._pending.sha256
        )
        self._pending.publish(part.path)
        return part

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk not even the footer of what is thrown away can be written
            self._writer.close()
        self._writer.is_open = False
        self._pending.__exit__()


def _writer_settings(schema: pa.Schema) -> dict[str, Any]:
    """Vectors raw (reading is 5x cheaper than with the defaults), the rest zstd with dictionaries and statistics."""
    scalars = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
    vectors = [f"{field.name}.list.element" for field in schema if pa.types.is_fixed_size_list(field.type)]
    return {
        "compression": {**dict.fromkeys(scalars, "ZSTD"), **dict.fromkeys(vectors, "NONE")},
        "use_dictionary": [name for name in scalars if name in ("shard", "caption", "url", "error", "stage")],
        "write_statistics": scalars,
    }


class UnitWriter:
    """Writes one unit's feature rows and dead letters; `commit` publishes them, leaving the block without it nothing.

    A dead letter takes back a feature row of the same row number. `stale` names parts that earlier, unrecorded or
    superseded executions of the unit left behind: they are removed once the new record stands.
    """

    def __init__(
        self, place: str, spec: TableSpec, unit: Unit, previous: ManifestRecord | None = None, stale: Sequence[str] = ()
    ):
        self._place, self._spec, self._unit, self._previous, self._stale = place, spec, unit, previous, stale
        self._features = _ParquetFile(place, features_schema(spec))
        self._letters: dict[int, DeadLetter] = {}
        self._left_out: set[int] = set()
        self._left_out_digests: set[bytes] = set()
        self._rows: list[np.ndarray] = []
        self._keys: set[int] = set()
        self._repeated_keys = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._features.discard()

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends feature rows (schema: `features_schema`), in rising row order."""
        self._features.write(batch)
        self._rows.append(batch["row"].to_numpy())
        for key in batch["key"].to_pylist():
            known = len(self._keys)
            self._keys.add(hash(key))
            self._repeated_keys += len(self._keys) == known

    def reject(self, letters: Iterable[DeadLetter]) -> None:
        """Records samples that are not in the table, and why."""
        for letter in letters:
            self._letters[letter.row] = letter

    def leave_out(self, rows: Iterable[int], digests: Iterable[bytes]) -> None:
        """Records samples that are neither, because their keys (known by 16-byte digests) are on the opt-out list."""
        self._left_out.update(rows)
        self._left_out_digests.update(digests)

    def leave_out_as(self, record: ManifestRecord) -> None:
        """Records, when all else is written, the samples that an earlier record of the same unit left out.

        Raises LedgerError unless what is missing of its samples is as many.
        """
        first = record.unit.first_row
        here = np.concatenate([*self._rows, np.array([*self._letters, *self._left_out], np.int64)])
        missing = np.setdiff1d(np.arange(first, first + record.rows_in), here)
        if len(missing) != record.rows_opted_out:
            raise LedgerError(
                f"unit {record.unit.id}: {len(missing)} samples are missing, {record.rows_opted_out} were left out"
            )
        self.leave_out(missing.tolist(), digests_of(record))

    def commit(self, **outcome: Any) -> ManifestRecord:
        """Publishes the unit and returns its record; `outcome` fills the record's fields about cost and origin.

        Raises LedgerError, with nothing published, unless every sample read is a feature row, a dead letter or left
        out.
        """
        rows_in = self._settle()
        letters = _ParquetFile(self._place, DEAD_LETTERS)
        try:
            letters.write(_letters_batch(self._unit, [self._letters[row] for row in sorted(self._letters)]))
            letters.finish()
            record = ManifestRecord(
                unit=self._unit,
                spec_fingerprint=self._spec.fingerprint,
                rows_in=rows_in,
                rows_out=self._features.rows,
                rows_dead=len(self._letters),
                features=self._features.publish(f"features/{self._unit.id}"),
                dead_letters=letters.publish(f"dead_letters/{self._unit.id}"),
                revision=self._previous.revision + 1 if self._previous else 0,
                repeated_keys=self._repeated_keys,
                errors=_count(letter.error for letter in self._letters.values()),
                rows_opted_out=len(self._left_out),
                opted_out=b"".join(sorted(self._left_out_digests)),
                **outcome,
            )
        finally:
            letters.discard()
        write_record(self._place, record)
        self._remove_superseded(record)
        return record

    def _settle(self) -> int:
        """Ends the features file without the rows that were taken back; returns the number of samples read."""
        self._features.finish()
        written = np.concatenate([*self._rows, np.empty(0, np.int64)])
        retracted = {int(row) for row in written if int(row) in self._letters} if self._letters else set()
        if retracted:
            kept = self._features.without(self._place, retracted)
            self._features.discard()
            self._features = kept
            written = written[~np.isin(written, list(retracted))]
        accounted = np.sort(np.concatenate([written, np.array([*self._letters, *self._left_out], np.int64)]))
        first = self._unit.first_row
        if not np.array_equal(accounted, np.arange(first, first + len(accounted))):
            raise LedgerError(
                f"unit {self._unit.id}: rows {_gap(accounted, first)} of {self._unit.shard} is lost or double"
            )
        if self._unit.rows is not None and self._unit.rows != len(accounted):
            raise LedgerError(
                f"unit {self._unit.id}: {self._unit.shard} promised {self._unit.rows} samples, {len(accounted)} came"
            )
        return len(accounted)

    def _remove_superseded(self, record: ManifestRecord) -> None:
        current = {part.path for part in (record.features, record.dead_letters) if part}
        for path in {*part_paths(self._previous), *self._stale} - current:
            files.remove(files.join(self._place, path))


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
    manifest, wanted = read_manifest(place), set(units)
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


def _letters_batch(unit: Unit, letters: Sequence[DeadLetter]) -> pa.RecordBatch:
    columns = {name: [getattr(letter, name) for letter in letters] for name in DEAD_LETTERS.names if name != "shard"}
    return pa.RecordBatch.from_pydict({**columns, "shard": [unit.shard] * len(letters)}, DEAD_LETTERS)


def _count(values: Iterable[str]) -> dict[str, int]:
    return {value: len(list(group)) for value, group in itertools.groupby(sorted(values))}


def _gap(rows: np.ndarray, first: int) -> int:
    expected = np.arange(first, first + len(rows))
    return int(expected[int(np.argmax(rows != expected))])


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A feature table as it stood when it was opened."""

    place: str
    spec: TableSpec
    records: tuple[ManifestRecord, ...]

    @classmethod
    def open(cls, place: str) -> "Table":
        """Opens the table at `place`; raises TableError when there is none, or its manifest is damaged."""
        place = files.absolute(place)
        spec = read_spec(place)
        if spec is None:
            raise TableError(f"{place} is no feature table: it has no table.json (write one with `fusion embed`)")
        manifest = read_manifest(place)
        if manifest.damaged:
            raise TableError(
                f"{place}: damaged manifest files {', '.join(manifest.damaged)}: "
                "repeat the `fusion embed` that wrote it: it does those units anew"
            )
        return cls(place, spec, manifest.live)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The feature parts in manifest order."""
        return tuple(record.features for record in self.records if record.features)

    @property
    def num_rows(self) -> int:
        """The number of feature rows."""
        return sum(part.rows for part in self.parts)

    @property
    def errors(self) -> dict[str, int]:
        """How many dead letters there are of each error, the most first."""
        return dict(sorted(_sums(record.errors for record in self.records).items(), key=lambda item: -item[1]))

    @property
    def seconds(self) -> dict[str, float]:
        """What the rows cost, by stage, all workers together."""
        return _sums(record.seconds for record in self.records)

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the feature rows."""
        return features_schema(self.spec)

    def dataset(self) -> Any:
        """The feature rows as a pyarrow dataset, in manifest order."""
        filesystem, root = files.resolve(self.place)
        paths = [files.join(root, part.path) for part in self.parts]
        return pads.dataset(paths, schema=self.schema, format="parquet", filesystem=filesystem)

    def scan(self, columns: Sequence[str] | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """All feature rows in manifest order, as record batches of at most `batch_rows` rows."""
        for part in self.parts:
            yield from self._part_batches(part, columns, batch_rows)

    def vectors(self, column: str, batch_rows: int = 65_536) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """An embedding column piece by piece: (number of the first row, float16 [n, D], bool [n]: vector present)."""
        self.check_embedding(column)
        first = 0
        flag = {"image_embedding": "has_image", "text_embedding": "has_text"}.get(column)
        for batch in self.scan([column, *([flag] if flag else [])], batch_rows):
            matrix = to_numpy(batch[column])
            present = batch[flag].to_numpy(zero_copy_only=False) if flag else matrix.any(axis=1)
            yield first, matrix, np.asarray(present)
            first += batch.num_rows

    @property
    def embedding_columns(self) -> list[str]:
        """The names of the table's embedding columns."""
        return [name for name in EMBEDDINGS if name in self.schema.names]

    def check_embedding(self, column: str) -> None:
        """Raises TableError, listing those there are, unless `column` is one of the table's embedding columns."""
        if column not in self.embedding_columns:
            raise TableError(
                f"{self.place} has no embedding column {column!r}; it has {', '.join(self.embedding_columns)}"
            )

    def take(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows at the given positions (in manifest order), in the order asked for."""
        positions = np.asarray(rows, np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= self.num_rows):
            raise IndexError(f"row {positions[(positions < 0) | (positions >= self.num_rows)][0]} of {self.num_rows}")
        order = np.argsort(positions, kind="stable")
        found = list(self.pick(positions[order], columns))
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        taken = pa.concat_tables(found) if found else schema.empty_table()
        return taken.take(pa.array(np.argsort(order, kind="stable")))

    def pick(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows at ascending positions, part by part, reading only the row groups that hold them."""
        first = 0
        for part in self.parts:
            start, stop = np.searchsorted(rows, (first, first + part.rows))
            if stop > start:
                yield self._take_part(part, rows[start:stop] - first, columns)
            first += part.rows

    def sample(self, rows: int, seed: int = 0, columns: Sequence[str] | None = None) -> pa.Table:
        """`rows` random rows (all, if there are fewer), none twice, in manifest order; the seed decides which."""
        chosen = random.Random(seed).sample(range(self.num_rows), min(rows, self.num_rows))
        return self.take(sorted(chosen), columns)

    def torch(
        self,
        columns: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **more: Any,
    ) -> "Feed":
        """The rows as batches of tensors, for a DataLoader with `batch_size=None`; `more` as fusion_core.feed.Feed.

        Columns: by default the embeddings and the flags that say whether they are present.
        """
        from fusion_core.feed import Feed

        return Feed(self, columns, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, **more)

    @property
    def rows_opted_out(self) -> int:
        """How many samples are left out because of their keys."""
        return sum(record.rows_opted_out for record in self.records)

    def dead_letters(self) -> pa.Table:
        """All dead letters, in manifest order."""
        found = []
        for part in (record.dead_letters for record in self.records):
            if part:
                found.append(self.read_part(part))
                if not found[-1].schema.equals(DEAD_LETTERS):
                    raise self._damaged(part, "it has not the columns of dead letters")
        return pa.concat_tables(found) if found else DEAD_LETTERS.empty_table()

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """One part, whole; raises TableError where its file is damaged."""
        with self._opened(part) as stream:
            return pq.read_table(stream, columns=columns)

    def _part_batches(self, part: Part, columns: Sequence[str] | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
        with self._opened(part) as stream, pq.ParquetFile(stream) as source:
            self._check_columns(part, source.schema_arrow)
            missing = [name for name in columns or () if name not in source.schema_arrow.names]
            if missing:
                raise SchemaMismatch(f"{part.path} has no column {missing[0]!r}; it has {source.schema_arrow.names}")
            rows = 0
            for batch in source.iter_batches(batch_rows, columns=columns):
                rows += batch.num_rows
                yield batch.select(list(columns)) if columns is not None else batch
            if rows != part.rows:
                raise self._damaged(part, f"it has {rows} rows, recorded {part.rows}")

    def _take_part(self, part: Part, rows: np.ndarray, columns: Sequence[str] | None) -> pa.Table:
        """Rows (sorted) of one part, reading only the row groups that hold them."""
        with self._opened(part) as stream, pq.ParquetFile(stream) as source:
            self._check_columns(part, source.schema_arrow)
            groups = np.unique(rows // ROW_GROUP_ROWS)
            table = source.read_row_groups(groups.tolist(), columns=columns)
            shift = np.searchsorted(groups, rows // ROW_GROUP_ROWS) * ROW_GROUP_ROWS
            return table.take(pa.array(rows % ROW_GROUP_ROWS + shift))

    @contextlib.contextmanager
    def _opened(self, part: Part) -> Iterator[Any]:
        try:
            with files.open_input(files.join(self.place, part.path)) as stream:
                yield stream
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # the storage failed: Arrow tells damage without a number
                raise
            raise self._damaged(part, str(error).strip()) from error

    def _check_columns(self, part: Part, found: pa.Schema) -> None:
        if not found.equals(self.schema):
            raise self._damaged(part, "its columns are not those of the table")

    def _damaged(self, part: Part, why: str) -> TableError:
        where = files.join(self.place, part.path)
        return TableError(f"{where} is damaged ({why}): `fusion verify --repair` makes it anew")


def _sums(found: Iterable[dict[str, NumberT]]) -> dict[str, NumberT]:
    sums: dict[str, NumberT] = {}
    for counts in found:
        for name, value in counts.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def to_numpy(column: pa.Array) -> np.ndarray:
    """A fixed-size-list array without nulls as a matrix [n, D], without a copy."""
    values = column.flatten().to_numpy(zero_copy_only=True)
    return np.asarray(values).reshape(-1, column.type.list_size)


def to_arrow(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A C-contiguous matrix [n, D] as a fixed-size-list array of type `kind`, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), type=kind)


# --- runs and verification ------------------------------------------------------------------------------------------


def write_run(place: str, run: RunRecord) -> None:
    """Publishes where a run stands."""
    files.write_bytes(place, f"runs/{run.id}.json", records.to_json(run, indent=2))


def read_runs(place: str) -> list[RunRecord]:
    """The runs on a table, oldest first."""
    entries = sorted(files.list_files(files.join(place, "runs")), key=lambda entry: entry.mtime_ns)
    runs = [records.from_json(RunRecord, files.read_bytes(entry.place), entry.place) for entry in entries]
    return sorted(runs, key=lambda run: run.started_at)  # of those in one second, the order of their files


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a table."""

    unit: str
    what: str


def verify(place: str, progress: Callable[[ManifestRecord], None] = lambda record: None) -> list[Finding]:
    """Everything that is wrong with the table: damaged, missing or foreign files, wrong hashes, counts or vectors."""
    place = files.absolute(place)
    spec = read_spec(place)
    if spec is None:
        raise TableError(f"{place} is no feature table: it has no table.json")
    manifest = read_manifest(place)
    findings = [Finding("", f"{path}: damaged manifest file") for path in manifest.damaged]
    lying = list_parts(place)
    for record in manifest.live:
        findings += [
            Finding(record.unit.id, what) for what in _verify_unit(Table(place, spec, (record,)), record, lying)
        ]
        progress(record)
    if spec.fuser:
        try:
            fusers.from_spec(spec.fuser, place)
        except (fusers.FuserError, SchemaMismatch, OSError) as error:
            findings.append(Finding("", str(error)))
    recorded = {path for record in manifest.live for path in part_paths(record)}
    findings += [
        Finding(unit_of_part(path), f"{path}: no record names it (left by a run that was cut off)")
        for path in sorted(lying.keys() - recorded)
    ]
    return findings


def _verify_unit(table: Table, record: ManifestRecord, lying: dict[str, int]) -> list[str]:
    if record.spec_fingerprint != table.spec.fingerprint:
        return [f"recorded for another table spec ({record.spec_fingerprint[:12]})"]
    if record.rows_in != record.rows_out + record.rows_dead + record.rows_opted_out:
        left_out = f" and {record.rows_opted_out} left out" if record.rows_opted_out else ""
        return [
            f"{record.rows_in} samples in, but {record.rows_out} rows and {record.rows_dead} dead letters{left_out}"
        ]
    for part in (record.features, record.dead_letters):
        if part and (problem := _verify_file(table.place, part, lying)):
            return [problem]
    counts = [part.rows if part else 0 for part in (record.features, record.dead_letters)]
    if counts != [record.rows_out, record.rows_dead]:
        return [f"parts of {counts} rows, but the record says {[record.rows_out, record.rows_dead]}"]
    return _verify_rows(table, record)


def _verify_file(place: str, part: Part, lying: dict[str, int]) -> str | None:
    if part.path not in lying:
        return f"{part.path}: missing"
    if lying[part.path] != part.size_bytes:
        return f"{part.path}: {lying[part.path]} bytes, recorded {part.size_bytes}"
    if files.sha256(files.join(place, part.path)) != part.sha256:
        return f"{part.path}: content differs from its recorded SHA-256"
    return None


def _verify_rows(table: Table, record: ManifestRecord) -> list[str]:
    """Alignment: each row number of the unit once, vectors of unit length exactly where the flags say so."""
    problems = []
    rows = [batch["row"].to_numpy() for batch in table.scan(["row"])]
    if record.dead_letters:
        rows.append(table.read_part(record.dead_letters, ["row"])["row"].to_numpy())
    numbers = np.concatenate([*rows, np.empty(0, np.int64)])
    first, last = record.unit.first_row, record.unit.first_row + record.rows_in - 1
    is_range = np.isin(numbers, np.arange(first, last + 1)).all() and len(np.unique(numbers)) == len(numbers)
    if not is_range or len(numbers) != record.rows_in - record.rows_opted_out:
        problems.append(f"row numbers are not {first}…{last}, each once")
    for column in table.embedding_columns:
        for start, matrix, present in table.vectors(column):
            norms = np.linalg.norm(matrix.astype(np.float32), axis=1)
            wrong = np.flatnonzero(~(np.abs(norms - present) < 5e-3))
            if len(wrong):
                problems.append(f"{column}: row {start + int(wrong[0])} of the part has length {norms[wrong[0]]:.4f}")
                break
    return problems
