"""The feature table, as it is read: opened, scanned, sampled, picked from."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from fusion_core import files, manifest
from fusion_core.manifest import read_spec
from schemas.errors import TableError
from schemas.feature_table import (
    EMBEDDINGS,
    ROW_GROUP_ROWS,
    ManifestRecord,
    Part,
    TableSpec,
    features_schema,
)
from schemas.records import SchemaMismatch
from schemas.samples import DEAD_LETTERS

if TYPE_CHECKING:
    from fusion_core.feed import Feed

NumberT = TypeVar("NumberT", int, float)


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
        ledger = manifest.read(place)
        if ledger.damaged:
            raise TableError(
                f"{place}: damaged manifest files {', '.join(ledger.damaged)}: "
                "repeat the `fusion embed` that wrote it: it does those units anew"
            )
        return cls(place, spec, ledger.live)

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
