"""Columns written beside a table's rows: one part for each of its parts, row for row.

A part bears the fingerprint of what decides it, so that a run that was cut off, or that meets new parts of the table,
works on what is missing only. The record that names all parts is written last.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files
from fusion_core.table import Table
from schemas import records
from schemas.columns import CaptionRecord, LabelRecord
from schemas.errors import UserError
from schemas.feature_table import ManifestRecord, Part

RecordT = TypeVar("RecordT", LabelRecord, CaptionRecord)

_FINGERPRINT = b"fusion.columns"


class BadColumns(UserError):
    """Columns that cannot be written or used: what is wrong, and the remedy."""


@dataclass(frozen=True)
class Columns(Generic[RecordT]):
    """The columns of one kind at a place: `kind.json`, and parts below `kind/`."""

    kind: str
    record: type[RecordT]
    place: str

    def standing(self) -> RecordT | None:
        """The record there; None in an empty place. Refuses, with BadColumns, a folder that holds something else."""
        where = files.join(self.place, f"{self.kind}.json")
        if files.stat(where) is not None:
            return records.from_json(self.record, files.read_bytes(where), where)
        ours = files.join(self.place, f"{self.kind}/")
        for entry in files.list_files(self.place, recursive=True):
            if not entry.place.startswith(ours):
                raise BadColumns(
                    f"{self.place} holds files but no {self.kind}.json (e.g. {entry.place}): name an empty folder"
                )
        return None

    def write_parts(
        self, table: Table, decisive: Any, schema: pa.Schema, columns_of: Callable[[ManifestRecord], pa.Table]
    ) -> list[Part]:
        """Publishes one part for each of the table's, by `columns_of`, unless it stands already.

        `decisive` is the record that decides the rows; `schema` that of the parts.
        """
        files.remove_stale_temporaries(self.place)
        fingerprint = records.fingerprint([records.fingerprint(decisive), table.spec.fingerprint])
        schema = schema.with_metadata({_FINGERPRINT: fingerprint.encode()})
        return [self._part(record, schema, columns_of) for record in table.records if record.features]

    def finish(self, record: RecordT) -> None:
        """Publishes the record, and removes parts that it does not name."""
        files.write_bytes(self.place, f"{self.kind}.json", records.to_json(record, indent=2))
        named = {files.join(self.place, part.path) for part in record.outputs}
        for entry in files.list_files(files.join(self.place, self.kind)):
            if entry.place not in named:
                files.remove(entry.place)

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """A part's columns; BadColumns when it is damaged."""
        data = files.read_bytes(files.join(self.place, part.path))
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise BadColumns(f"{self.place}: {part.path} is damaged or was replaced: write it again")
        return pq.read_table(pa.BufferReader(data), columns=columns)

    def _part(
        self, record: ManifestRecord, schema: pa.Schema, columns_of: Callable[[ManifestRecord], pa.Table]
    ) -> Part:
        assert record.features is not None
        path = f"{self.kind}/{record.features.path.rpartition('/')[2]}"
        if standing := self._standing_part(path, record.features.rows, schema):
            return standing
        rows = columns_of(record).cast(schema)
        with files.PendingFile(self.place) as pending:
            pq.write_table(rows, pending, compression="zstd", use_dictionary=_texts(schema))
            part = Part(path, len(rows), pending.size_bytes, pending.sha256)
            pending.publish(path)
        return part

    def _standing_part(self, path: str, rows: int, schema: pa.Schema) -> Part | None:
        where = files.join(self.place, path)
        entry = files.stat(where)
        if entry is None:
            return None
        with files.open_input(where) as stream, contextlib.suppress(pa.ArrowInvalid):
            found = pq.ParquetFile(stream)
            written = (found.schema_arrow.metadata or {}).get(_FINGERPRINT)
            if written == schema.metadata[_FINGERPRINT] and found.metadata.num_rows == rows:
                return Part(path, rows, entry.size_bytes, files.sha256(where))
        return None


def _texts(schema: pa.Schema) -> list[str]:
    """The columns that repeat few texts."""
    repeated = ("shard", "label", "caption_model", "error")
    return [name for name in repeated if name in schema.names]
