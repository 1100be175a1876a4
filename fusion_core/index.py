"""An index of a feature table, opened: checked before FAISS reads it, memory-mapped, and asked.

An index is one or more shards, each of the vectors of some of the table's parts; they are searched as one. build.py
makes it, vectors.py knows FAISS.
"""

import math
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_core import files, vectors, versions
from fusion_core.table import Table
from fusion_core.vectors import Floats, Ids, Kind, Parameters, Shard
from schemas import records
from schemas.errors import UserError
from schemas.feature_table import EMBEDDINGS, Part
from schemas.index import META, STORED_META, IndexRecord, IndexShard

RECORD = "index.json"
SCORE_TOLERANCE = 1e-5  # two float32 sums of one inner product differ by less; identical vectors are equally right
OWN_FILE = re.compile(r"(vectors|refine|rows|truth|trained|queries|meta)-[0-9a-f]{8}\.(faiss|npy|npz|arrow)")

_BLOCK_ROWS = 8192
_EXACT_AMONG = 8_192  # a search among no more than these rows is exact
_SCAN_SHARE = 128  # one vector read by its id costs as much as passing over these many


class BadIndex(UserError):
    """An index that cannot be used: what is wrong with it, and the remedy."""


def exact_search(table: Table, column: str, queries: Floats, k: int) -> tuple[Floats, Ids]:
    """The true `k` best rows of `column` for each query: scores [q, k] and ids [q, k], padded with -inf and -1.

    Reads the table once, block by block; among equal scores the lower id comes first.
    """
    table.check_embedding(column)
    queries = checked_queries(queries, table.schema.field(column).type.list_size, k)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for rows, block in blocks(table, column):
        new_scores, places = vectors.exact(queries, block, k)
        scores, ids = vectors.best(np.hstack([scores, new_scores]), np.hstack([ids, rows[places]]), k)
    return scores, ids


def blocks(table: Table, column: str) -> Iterator[tuple[Ids, Floats]]:
    """Row numbers [n] and vectors [n, D] of the rows that have the column, in order."""
    for first, matrix, present in table.vectors(column, _BLOCK_ROWS):
        positions = np.flatnonzero(present)
        if len(positions):
            yield first + positions, np.ascontiguousarray(matrix[positions], np.float32)


def recall(scores: Floats, ids: Ids, exact_scores: Floats, exact_ids: Ids, k: int) -> float:
    """The share of the true `k` best that an answer found, over all queries; NaN where there was nothing to find.

    An answer is right when it scores as high as the k-th true one, so that any of several identical vectors counts.
    """
    right, wanted = right_answers(scores, ids, exact_scores, exact_ids, k)
    return float(right.sum() / wanted.sum()) if wanted.any() else float("nan")


def right_answers(scores: Floats, ids: Ids, exact_scores: Floats, exact_ids: Ids, k: int) -> tuple[Ids, Ids]:
    """What `recall` counts, query by query: how many of the answers [q] are right, and how many [q] could be."""
    wanted = (exact_ids[:, :k] >= 0).sum(axis=1)
    last = exact_scores[np.arange(len(wanted)), np.maximum(wanted, 1) - 1]
    right = (scores[:, :k] >= last[:, None] - SCORE_TOLERANCE) & (ids[:, :k] >= 0) & (wanted > 0)[:, None]
    return right.sum(axis=1), wanted


class Rows:
    """Where the vectors of one shard stand in the table: their numbers in the shard to ids, and back."""

    def __init__(self, first_ids: Ids, part_rows: Ids, row_numbers: Any = None):
        """`first_ids`, `part_rows`: of the shard's parts, in its order. `row_numbers` (uint32) where rows lack one."""
        self._first_ids, self._part_rows, self._numbers = first_ids, part_rows, row_numbers
        self._starts = np.cumsum([0, *part_rows])[:-1]
        self._order = np.argsort(first_ids)

    @property
    def n_numbers(self) -> int:
        """Numbers in use are below this."""
        return len(self._numbers) if self._numbers is not None else int(sum(self._part_rows))

    def runs(self) -> list[tuple[int, int, int]]:
        """Parts that follow one another both here and in the table, as one: first id, rows, and first row here."""
        if not len(self._starts):
            return []
        begins = np.flatnonzero(np.diff(self._first_ids - self._starts, prepend=-1))
        begins = np.union1d([0], begins)
        rows = np.add.reduceat(self._part_rows, begins)
        return list(zip(self._first_ids[begins].tolist(), rows.tolist(), self._starts[begins].tolist(), strict=True))

    def ids(self, numbers: Ids) -> Ids:
        """The ids of these vectors; -1 stays -1."""
        rows = np.maximum(numbers, 0)
        if self._numbers is not None and len(self._numbers):
            rows = np.asarray(self._numbers[rows], np.int64)
        if not len(self._starts):
            return numbers
        part = np.searchsorted(self._starts, rows, "right") - 1
        found: Ids = np.where(numbers < 0, -1, self._first_ids[part] + rows - self._starts[part])
        return found

    def numbers(self, ids: Ids) -> tuple[Ids, Ids]:
        """Which of these ids are vectors of this shard (positions in `ids`), and their numbers in it."""
        if not len(self._starts) or not len(ids):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        sorted_firsts = self._first_ids[self._order]
        place = np.searchsorted(sorted_firsts, ids, "right") - 1
        part = self._order[np.maximum(place, 0)]
        rows = ids - self._first_ids[part]
        here = np.flatnonzero((place >= 0) & (rows < self._part_rows[part]))
        rows = rows[here] + self._starts[part[here]]
        if self._numbers is None:
            return here, rows
        if not len(self._numbers):
            return here[:0], rows[:0]
        numbers = np.minimum(np.searchsorted(self._numbers, rows), len(self._numbers) - 1)
        found = np.asarray(self._numbers[numbers], np.int64) == rows
        return here[found], numbers[found].astype(np.int64)


class Shards:
    """Shards that are searched as one; ids are the table's."""

    def __init__(self, dim: int, shards: Sequence[tuple[Shard, Rows]]):
        self.dim = dim
        self._shards = shards

    @property
    def rows(self) -> int:
        """The number of vectors."""
        return sum(shard.rows for shard, _ in self._shards)

    def search(self, queries: Floats, k: int, parameters: Parameters, allowed: Ids | None = None) -> tuple[Floats, Ids]:
        """Scores [q, k] float32, falling, and ids [q, k] of the best (among `allowed`, sorted), padded: -inf and -1.

        All shards have the same cells, so that one visits those that it would visit were it the only one.
        """
        alone = len(self._shards) == 1
        found = [self._search(shard, rows, queries, k, parameters, allowed, alone) for shard, rows in self._shards]
        if alone:
            return found[0]
        scores = np.hstack([np.full((len(queries), k), -np.inf, np.float32), *(scores for scores, _ in found)])
        ids = np.hstack([np.full((len(queries), k), -1, np.int64), *(ids for _, ids in found)])
        scores, ids = vectors.best(scores, ids, k)
        short, nprobe = ids[:, -1] < 0, parameters.get("nprobe", 1)
        if short.any() and nprobe < max((shard.kind.lists for shard, _ in self._shards), default=0):
            wider = {**parameters, "nprobe": vectors.WIDER * nprobe}
            scores[short], ids[short] = self.search(queries[short], k, wider, allowed)
        return scores, ids

    @staticmethod
    def _search(
        shard: Shard, rows: Rows, queries: Floats, k: int, parameters: Parameters, allowed: Ids | None, widen: bool
    ) -> tuple[Floats, Ids]:
        chosen = bitmap = None
        if allowed is not None:
            chosen, bitmap = vectors.selector(rows.numbers(allowed)[1], rows.n_numbers)
        try:
            scores, numbers = shard.search(queries, k, parameters, chosen, widen)
        except RuntimeError as error:  # FAISS looks at what it was given
            raise BadIndex(f"the index's vectors are damaged ({error}): copy or build it anew") from error
        if numbers.max(initial=-1) >= rows.n_numbers:
            raise BadIndex(f"the index's vectors are damaged (number {numbers.max()}): copy or build it anew")
        del bitmap
        return scores, rows.ids(numbers)

    def among(self, ids: Ids) -> Ids:
        """Those of the ids (ascending) that have a vector."""
        present = np.zeros(len(ids), bool)
        for _, rows in self._shards:
            present[rows.numbers(ids)[0]] = True
        found: Ids = ids[present]
        return found

    def reconstruct(self, ids: Ids) -> Floats:
        """The vectors [n, D] of these ids, as exact as the index has them; zeros for rows without one."""
        found = np.zeros((len(ids), self.dim), np.float32)
        for shard, rows in self._shards:
            places, numbers = rows.numbers(ids)
            found[places] = shard.reconstruct(numbers)
        return found


class Meta:
    """Columns of the table's rows by id, from files that hold the rows of some parts each."""

    def __init__(self, stored: Sequence[tuple[Rows, list[pa.RecordBatch]]]):
        """Each file's place in the table (without row numbers), and its rows (STORED_META), memory-mapped."""
        self._stored = stored
        self._ends = [np.cumsum([batch.num_rows for batch in batches]) for _, batches in stored]

    def take(self, ids: Ids) -> pa.Table:
        """The rows (META) of these ids, each known, in their order."""
        pieces, places = [pa.RecordBatch.from_pylist([], META)], [np.empty(0, np.int64)]
        for (rows, batches), ends in zip(self._stored, self._ends, strict=True):
            here, numbers = rows.numbers(ids)
            batch_of = np.searchsorted(ends, numbers, "right")
            for number in np.unique(batch_of):
                mine = np.flatnonzero(batch_of == number)
                batch = batches[number]
                chosen = batch.take(pa.array(numbers[mine] - (ends[number] - batch.num_rows)))
                pieces.append(_with_ids(chosen, ids[here[mine]]))
                places.append(here[mine])
        return pa.Table.from_batches(pieces, META).take(pa.array(np.argsort(np.concatenate(places))))

    def scan(self) -> Iterator[pa.RecordBatch]:
        """All rows (META) in id order, as they lie."""
        runs = [
            (first, rows, start, i)
            for i, (places, _) in enumerate(self._stored)
            for first, rows, start in places.runs()
        ]
        for first, rows, start, i in sorted(runs):
            batches, ends = self._stored[i][1], self._ends[i]
            at, stop = start, start + rows
            while at < stop:
                number = int(np.searchsorted(ends, at, "right"))
                begin = int(ends[number]) - batches[number].num_rows
                piece = batches[number].slice(at - begin, stop - at)
                yield _with_ids(piece, np.arange(first + at - start, first + at - start + piece.num_rows))
                at += piece.num_rows


def _with_ids(batch: pa.RecordBatch, ids: Ids) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(ids, pa.int64()), *batch.columns], schema=META)


class Index:
    """An index whose files were found to be whole: memory-mapped where local, and safe to ask from many threads."""

    def __init__(self, place: str, record: IndexRecord, shards: Shards, columns: Meta):
        """Takes over what `open` has checked."""
        self.place = place
        self.record = record
        self._shards = shards
        self._columns = columns
        self._mapping = threading.Lock()

    @classmethod
    def open(cls, place: str, verify: bool = True) -> "Index":
        """The index at `place`, or its current version; raises BadIndex, before FAISS reads a byte, when a file is not
        what index.json says.

        Without `verify` sizes and headers are checked but not hashes: for a place that nobody else can write to.
        """
        root, record = files.absolute(place), None
        place = versions.standing(root)
        try:
            record = read_record(place)
            return cls._open_as(place, record, verify)
        except (BadIndex, FileNotFoundError):
            # A rebuild may have replaced the index between our reading of index.json and of the files it names; or a
            # run removed the version that it was, because of a key that is opted out.
            now = versions.standing(root)
            again = read_record(now)
            if (now, again) == (place, record):
                raise
            return cls._open_as(now, again, verify)

    @classmethod
    def _open_as(cls, place: str, record: IndexRecord, verify: bool) -> "Index":
        # What was downloaded stays mapped, and on disk, after its name is gone.
        folder: Any = nullcontext("") if files.is_local(place) else tempfile.TemporaryDirectory(prefix="fusion-index-")
        with folder as scratch:
            shards = shards_of(record)
            wanted = {part.path: part for shard in shards for part in shard.files if part != shard.truth}
            wanted[record.meta.path] = record.meta
            paths = {path: checked_file(place, part, verify, scratch) for path, part in wanted.items()}
            kind, first_ids = Kind.parse(record.factory), part_starts(record.parts)
            for shard in shards:  # all are checked before the first is read
                refine = paths[shard.refine.path] if shard.refine else ""
                wrong = vectors.check_shard(kind, record.dim, shard.vectors.rows, paths[shard.vectors.path], refine)
                if wrong:
                    raise BadIndex(f"{wrong}: build the index anew")
            columns = _read_columns(record, paths, first_ids)
            opened = [read_shard(kind, record.dim, shard, paths, first_ids) for shard in shards]
            return cls(place, record, Shards(record.dim, opened), columns)

    def search(
        self, vectors: Floats, k: int, nprobe: int | None = None, allowed: Ids | None = None
    ) -> tuple[Floats, Ids]:
        """Scores [q, k] float32, falling, and ids [q, k] int64 of the best rows, padded with -inf and -1.

        There are min(k, rows indexed) answers to each query. `nprobe` overrides the measured one. `allowed`, ascending
        ids, restricts the answers to these rows, be they indexed or not: few are searched exactly, among many as many
        more cells are visited as they are fewer than all.
        """
        vectors = checked_queries(vectors, self.record.dim, k)
        if nprobe is not None and nprobe < 1:
            raise ValueError(f"nprobe must be at least 1, got {nprobe}")
        parameters = self.record.parameters if nprobe is None else {**self.record.parameters, "nprobe": nprobe}
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        ids = np.full((len(vectors), k), -1, np.int64)
        full = min(k, self.record.rows_indexed)
        if full and len(vectors):
            if allowed is None:
                scores[:, :full], ids[:, :full] = self._shards.search(vectors, full, parameters)
            else:
                among = self._shards.among(allowed)
                full = min(full, len(among))
                scores[:, :full], ids[:, :full] = self._search_among(vectors, full, parameters, among)
        return scores, ids

    def retuned(self, **parameters: int) -> "Index":
        """The same index, searched with these parameters instead of its own."""
        record = replace(self.record, parameters={**self.record.parameters, **parameters})
        return Index(self.place, record, self._shards, self._columns)

    def _search_among(self, queries: Floats, k: int, parameters: Parameters, among: Ids) -> tuple[Floats, Ids]:
        """The best `k` of the ids `among` (ascending, at least `k`, all indexed).

        A query without a filter meets the vectors of nprobe cells; a query among fewer rows visits as many more cells
        as it takes to meet as many of these, so that it finds at least as large a share of the true best.
        """
        rows = self._shards.rows
        if len(among) <= max(_EXACT_AMONG, rows // _SCAN_SHARE):
            return self._scan(queries, k, among)
        nprobe = math.ceil(parameters.get("nprobe", 1) * rows / len(among))
        return self._shards.search(queries, k, {**parameters, "nprobe": nprobe}, among)

    def _scan(self, queries: Floats, k: int, among: Ids) -> tuple[Floats, Ids]:
        """The true `k` best of the ids `among`; among equal scores the lower id comes first."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        for start in range(0, len(among) if k else 0, _BLOCK_ROWS):
            block = among[start : start + _BLOCK_ROWS]
            with self._mapping:
                stored = self._shards.reconstruct(block)
            found, places = vectors.exact(queries, stored, k)
            scores, ids = vectors.best(np.hstack([scores, found]), np.hstack([ids, block[places]]), k)
        return scores, ids

    def vectors(self, ids: Ids | Sequence[int]) -> Floats:
        """The vectors of these ids, float32 [n, D], as exact as the index has them.

        Raises ValueError for an id without one. On cells the first call reads where each lies: 8 bytes of memory a row.
        """
        wanted = np.asarray(ids, np.int64).reshape(-1)
        absent = np.setdiff1d(wanted, self._shards.among(np.unique(wanted)))
        if len(absent):
            rows = self.record.rows_table
            why = f"has no {self.record.column}" if 0 <= absent[0] < rows else f"is none of the table's 0..{rows - 1}"
            raise ValueError(f"{self.place} holds no vector of row {absent[0]}: it {why}")
        with self._mapping:  # FAISS builds its map of places at the first call
            return self._shards.reconstruct(wanted)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of META of every row of the table, indexed or not, in id order."""
        return (batch.select(list(columns)) for batch in self._columns.scan())

    def meta(self, ids: Ids | Sequence[int]) -> pa.Table:
        """The rows (META) of these ids, in their order."""
        wanted = np.asarray(ids, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.record.rows_table):
            raise ValueError(f"ids must lie in 0..{self.record.rows_table - 1}, got {wanted.min()}..{wanted.max()}")
        return self._columns.take(wanted)

    def check_table(self, table: Table) -> None:
        """Raises BadIndex naming the difference when the index was not built from this table as it is now."""
        different = records.differences(self.record.table_spec.decisive, table.spec.decisive)
        if different:
            raise BadIndex(
                f"{self.place} was built from a table of another kind than {table.place} ({'; '.join(different[:5])}): "
                "build the index anew, or name the table it was built from"
            )
        ours, theirs = [[(part.path, part.sha256) for part in parts] for parts in (self.record.parts, table.parts)]
        if ours != theirs:
            raise BadIndex(
                f"{self.place} is not of {table.place} as it is now ({_difference(ours, theirs)}): build the index anew"
            )


def _difference(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> str:
    gone, new = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if not gone and not new:
        return "the same parts in another order"
    samples = [f"{path} only {where}" for where, parts in (("here", gone), ("there", new)) for path, _ in parts[:2]]
    return f"{len(ours)} parts here, {len(theirs)} there; {', '.join(samples)}"


# --- opening


def read_record(place: str) -> IndexRecord:
    """The record of the index at `place`; raises BadIndex where there is none, or none that can be."""
    where = files.join(place, RECORD)
    try:
        record = records.from_json(IndexRecord, files.read_bytes(where), where)
    except FileNotFoundError as error:
        if files.stat(files.join(place, "table.json")):
            raise BadIndex(
                f"{place} is a feature table: `fusion index {place} --output INDEX` makes its index"
            ) from error
        raise BadIndex(f"there is no index at {place}: build one with `fusion index TABLE --output {place}`") from error
    except records.SchemaMismatch as error:
        raise BadIndex(str(error)) from error
    wrong = _wrong_in(record)
    if wrong:
        raise BadIndex(f"{where} {wrong}: build the index anew")
    return record


def _wrong_in(record: IndexRecord) -> str:
    for part in record.files:
        if not OWN_FILE.fullmatch(part.path):
            return f"names a file that is none of an index: {part.path!r}"
    try:
        kind = Kind.parse(record.factory)
    except ValueError as error:
        return f"names {error}"
    if record.metric != "inner_product" or record.column not in EMBEDDINGS or record.dim < 1:
        return f"is of no known kind: {record.column!r} of {record.dim} dimensions by {record.metric!r}"
    if not 0 <= record.rows_indexed <= record.rows_table:
        return f"counts {record.rows_indexed} indexed of {record.rows_table} rows"
    return _wrong_in_shards(record, kind) if record.shards else ""


def _wrong_in_shards(record: IndexRecord, kind: Kind) -> str:
    rows = {part.path: part.rows for part in record.parts}
    named = [part for shard in record.shards for part in shard.parts]
    if sorted(named) != sorted(rows):
        return "has shards that are not of the parts it names"
    if sum(shard.vectors.rows for shard in record.shards) != record.rows_indexed:
        return "has shards of another number of vectors"
    for shard in record.shards:
        known = sum(rows[part] for part in shard.parts)
        counts = [part.rows for part in (shard.refine, shard.row_numbers) if part]
        if bool(shard.meta) != bool(record.shards[0].meta) or (shard.meta and shard.meta.rows != known):
            return f"has no columns of the rows of the shard {shard.vectors.path}"
        if shard.rows != known or shard.vectors.rows > known or set(counts) - {shard.vectors.rows}:
            return f"counts wrongly in the shard {shard.vectors.path}"
        if bool(shard.refine) != bool(kind.refine) or (not shard.row_numbers and shard.vectors.rows != known):
            return f"lacks a file of the shard {shard.vectors.path}"
    return ""


def shards_of(record: IndexRecord) -> tuple[IndexShard, ...]:
    """The shards of an index; of an index written before there were any, one of all parts."""
    parts = tuple(part.path for part in record.parts)
    return record.shards or (IndexShard(parts, record.rows_table, record.vectors),)


def part_starts(parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """The first id and the number of rows of each part, by its path (which has its hash)."""
    starts = np.cumsum([0, *(part.rows for part in parts)])
    return {part.path: (int(start), part.rows) for part, start in zip(parts, starts, strict=False)}


def read_shard(
    kind: Kind, dim: int, shard: IndexShard, paths: dict[str, str], starts: dict[str, tuple[int, int]]
) -> tuple[Shard, Rows]:
    """A shard whose files, here given by their local paths, were checked."""
    try:
        base = vectors.read(paths[shard.vectors.path], kind)
        refine = vectors.read(paths[shard.refine.path]) if shard.refine else None
        numbers = np.load(paths[shard.row_numbers.path], "r", allow_pickle=False) if shard.row_numbers else None
    except ValueError as error:
        raise BadIndex(f"{error}: build the index anew") from error
    for index in (base, refine):
        if index is not None and (index.d, index.ntotal) != (dim, shard.vectors.rows):
            raise BadIndex(f"{shard.vectors.path} holds {index.ntotal} vectors of {index.d} dimensions: build it anew")
    if numbers is not None and (numbers.shape, numbers.dtype) != ((shard.vectors.rows,), np.uint32):
        raise BadIndex(f"{shard.row_numbers} holds no row numbers of its shard: build the index anew")
    return Shard(kind, base, refine), _rows_of(shard.parts, starts, numbers)


def _rows_of(parts: Sequence[str], starts: dict[str, tuple[int, int]], numbers: Any = None) -> Rows:
    places = [starts[part] for part in parts]
    firsts, rows = (np.array([place[i] for place in places], np.int64) for i in (0, 1))
    return Rows(firsts, rows, numbers)


def checked_file(place: str, part: Part, verify: bool, scratch: str) -> str:
    """The local path of a part whose size (and hash) are as recorded, downloaded to `scratch` if that is given."""
    where = files.join(place, part.path)
    entry = files.stat(where)
    if entry is None or entry.size_bytes != part.size_bytes:
        found = "is missing" if entry is None else f"has {entry.size_bytes} bytes"
        raise BadIndex(f"{where} {found}; index.json says {part.size_bytes} bytes: copy or build the index anew")
    local = _download(where, files.join(scratch, part.path)) if scratch else where
    if verify and files.sha256(local) != part.sha256:
        raise BadIndex(f"{where} does not have the SHA-256 that index.json says: copy or build the index anew")
    return local


def _download(where: str, target: str) -> str:
    with files.open_input(where) as source, Path(target).open("wb") as sink:
        shutil.copyfileobj(source, sink, 8 << 20)
    return target


def checked_queries(vectors: Floats, dim: int, k: int) -> Floats:
    """The queries as float32 [q, dim]; raises ValueError for what cannot be asked."""
    if k <= 0:
        raise ValueError(f"k must be at least 1, got {k}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"expected query vectors of shape [q, {dim}], got {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        raise ValueError("a query vector holds NaN or infinity")
    return vectors


def _read_columns(record: IndexRecord, paths: dict[str, str], starts: dict[str, tuple[int, int]]) -> Meta:
    if not all(shard.meta for shard in shards_of(record)):  # written before 1.2: all rows in one file, in id order
        everything = Rows(np.zeros(1, np.int64), np.array([record.rows_table], np.int64))
        return Meta([(everything, read_meta(paths[record.meta.path], record.rows_table, META))])
    return Meta(
        [
            (_rows_of(shard.parts, starts), read_meta(paths[shard.meta.path], shard.rows))
            for shard in record.shards
            if shard.meta
        ]
    )


def read_meta(path: str, rows: int, schema: pa.Schema = STORED_META) -> list[pa.RecordBatch]:
    """The rows (STORED_META) of a local file that was checked, memory-mapped; raises BadIndex where it has others."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
    except (pa.ArrowInvalid, OSError) as error:
        raise BadIndex(f"{path} is not an Arrow file: build the index anew") from error
    if reader.schema != schema or sum(batch.num_rows for batch in batches) != rows:
        raise BadIndex(f"{path} does not hold the columns of {rows} rows: build the index anew")
    return [batch.select(STORED_META.names) for batch in batches if batch.num_rows]
