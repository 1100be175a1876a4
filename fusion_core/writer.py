"""One unit's parts being written: buffered in row groups, settled against what was read, published with the record."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files
from fusion_core.manifest import digests_of, part_paths, write_record
from schemas.feature_table import (
    ROW_GROUP_ROWS,
    ManifestRecord,
    Part,
    TableSpec,
    features_schema,
)
from schemas.records import SchemaMismatch
from schemas.samples import DEAD_LETTERS, DeadLetter, Unit


class LedgerError(RuntimeError):
    """The rows of a unit do not add up: its part is not published."""


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


def _letters_batch(unit: Unit, letters: Sequence[DeadLetter]) -> pa.RecordBatch:
    columns = {name: [getattr(letter, name) for letter in letters] for name in DEAD_LETTERS.names if name != "shard"}
    return pa.RecordBatch.from_pydict({**columns, "shard": [unit.shard] * len(letters)}, DEAD_LETTERS)


def _count(values: Iterable[str]) -> dict[str, int]:
    return {value: len(list(group)) for value, group in itertools.groupby(sorted(values))}


def _gap(rows: np.ndarray, first: int) -> int:
    expected = np.arange(first, first + len(rows))
    return int(expected[int(np.argmax(rows != expected))])
