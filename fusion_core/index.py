"""A FAISS index of a feature table: built, measured against exact search, saved, opened and asked.

Up to EXACT_ROWS vectors the index is exact. Beyond that it is an inverted file over spherical k-means cells whose
vectors are stored as the table stores them, in float16, so that its scores are exact and only the choice of cells
approximates. How many cells a query visits (`nprobe`) is found by measurement, with queries of the other modality:
an index tuned on image queries alone loses a third of the answers to text queries.
"""

import math
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import faiss as _faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core import files
from fusion_core.table import Table
from schemas import records
from schemas.feature_table import EMBEDDINGS, Part, TableSpec
from schemas.index import META, IndexRecord, Recall

faiss: Any = _faiss  # its own stubs know only a part of it

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

EXACT_ROWS = 50_000  # up to this many vectors, exact search answers in some milliseconds
TARGET_RECALL = 0.95
RECALL_K = 10
QUERIES = 1_000  # of each kind, to measure recall with
SCORE_TOLERANCE = 1e-5  # two float32 sums of one inner product differ by less; identical vectors are equally right
NORM_TOLERANCE = 5e-3  # float16 moves a unit vector's length by less than 1e-3

_RECORD = "index.json"
_FLAT = "IDMap2,Flat"
_IVF = re.compile(r"IVF(\d+),SQfp16")
_HEADER = struct.Struct("<4siqqqBi")  # fourcc, dim, vectors, two unused, is trained, metric
_INNER_PRODUCT = 0  # in that header
_OWN_FILE = re.compile(r"(vectors|meta)-[0-9a-f]{8}\.(faiss|arrow)")
_BLOCK_ROWS = 16_384
_EXACT_AMONG = 8_192  # a search among no more than these rows is exact
_SCAN_SHARE = 128  # one vector read by its id costs as much as passing over these many
_META_BATCH_ROWS = 65_536
_TRAIN_PER_LIST = 64
_MIN_TRAIN_PER_LIST = 39  # below this FAISS itself warns that cells are guesses
_TRAIN_BYTES = 4 << 30
_LATENCY_QUERIES = 200
_STALE_SECONDS = 24 * 3600


class BadIndex(ValueError):
    """An index that cannot be used: what is wrong with it, and the remedy."""


@dataclass(frozen=True)
class _Queries:
    """Vectors drawn from one column; `own` when that is the indexed column, so that each would find itself."""

    name: str
    ids: Ids
    vectors: Floats
    own: bool


@dataclass
class _Clock:
    """Seconds by stage, told to `log` as each stage ends."""

    log: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.log(f"index: {name} took {self.seconds[name]:.1f} s")


def build(
    table: Table,
    place: str,
    column: str = "image_embedding",
    *,
    seed: int = 0,
    target_recall: float = TARGET_RECALL,
    exact_rows: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> IndexRecord:
    """The record of the index of `table`'s `column` that now stands at `place`; an older one there is replaced.

    Memory is that of the index, the training sample (at most 4 GiB) and some blocks of vectors. The same table and
    seed give the same bytes. Above `exact_rows` vectors (EXACT_ROWS unless given) the index is approximate, and
    visits as many cells as it takes for every kind of query to reach `target_recall`.
    """
    place = files.absolute(place)
    _check_request(table.spec, place, column, target_recall)
    clock = _Clock(log)
    rng = np.random.default_rng(seed)
    dim = _dim(table.spec, column)
    with clock.stage("check"):
        rows = _count_checked(table, column)
    exact = rows <= (EXACT_ROWS if exact_rows is None else exact_rows)
    factory = _FLAT if exact else f"IVF{_n_lists(rows, dim)},SQfp16"
    log(f"index: {rows:,} of {table.num_rows:,} rows have a {column}; {factory}")
    with clock.stage("train"):
        index = _trained(table, column, factory, rows, seed, rng)
    with clock.stage("add"):
        for ids, vectors in _blocks(table, column):
            index.add_with_ids(vectors, ids)
    with clock.stage("measure"):
        queries = [_draw(table, name, column, rows, rng) for name in _kinds_of_query(table.spec, column)]
        parameters, recalls = _tune(index, table, column, queries, target_recall)
        latency = _latency(index, queries, parameters)
    log(f"index: {parameters}, " + ", ".join(f"recall@{r.k} of {r.queries} queries {r.recall:.3f}" for r in recalls))

    def record(vectors: Part, meta: Part) -> IndexRecord:
        return IndexRecord(
            table=table.place,
            table_spec=table.spec,
            parts=tuple(table.parts),
            column=column,
            dim=dim,
            rows_table=table.num_rows,
            rows_indexed=rows,
            factory=factory,
            metric="inner_product",
            parameters=parameters,
            vectors=vectors,
            meta=meta,
            recalls=tuple(recalls),
            latency_ms=latency,
            seconds=clock.seconds,
            seed=seed,
        )

    return _publish(place, index, table, record)


def exact_search(table: Table, column: str, queries: Floats, k: int) -> tuple[Floats, Ids]:
    """The true `k` best rows of `column` for each query: scores [q, k] and ids [q, k], padded with -inf and -1.

    Reads the table once, block by block; among equal scores the lower id comes first.
    """
    queries = _checked_queries(queries, _dim(table.spec, column), k)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for block_ids, vectors in _blocks(table, column):
        new_scores, places = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, ids = _best(np.hstack([scores, new_scores]), np.hstack([ids, block_ids[places]]), k)
    return scores, ids


def recall(scores: Floats, ids: Ids, exact_scores: Floats, exact_ids: Ids, k: int) -> float:
    """The share of the true `k` best that an answer found, over all queries; NaN where there was nothing to find.

    An answer is right when it scores as high as the k-th true one, so that any of several identical vectors counts.
    """
    wanted = (exact_ids[:, :k] >= 0).sum(axis=1)
    found = wanted > 0
    last = exact_scores[found, wanted[found] - 1]
    right = (scores[found, :k] >= last[:, None] - SCORE_TOLERANCE) & (ids[found, :k] >= 0)
    return float(right.sum() / wanted.sum()) if found.any() else float("nan")


class Index:
    """An index whose files were found to be whole: memory-mapped where local, and safe to ask from many threads."""

    def __init__(self, place: str, record: IndexRecord, searchable: Any, batches: list[pa.RecordBatch]):
        """Takes over what `open` has checked."""
        self.place = place
        self.record = record
        self._faiss = searchable
        self._batches = batches
        self._batch_rows = batches[0].num_rows if batches else 1
        self._stored: _Stored | None = None
        self._storing = threading.Lock()

    @classmethod
    def open(cls, place: str, verify: bool = True) -> "Index":
        """The index at `place`; raises BadIndex, before FAISS reads a byte, when a file is not what index.json says.

        Without `verify` sizes and headers are checked but not hashes: for a place that nobody else can write to.
        """
        place = files.absolute(place)
        record = _read_record(place)
        try:
            return cls._open_as(place, record, verify)
        except BadIndex:
            # A rebuild may have replaced the index between our reading of index.json and of the files it names.
            again = _read_record(place)
            if again == record:
                raise
            return cls._open_as(place, again, verify)

    @classmethod
    def _open_as(cls, place: str, record: IndexRecord, verify: bool) -> "Index":
        # What was downloaded stays mapped, and on disk, after its name is gone.
        folder: Any = nullcontext("") if files.is_local(place) else tempfile.TemporaryDirectory(prefix="fusion-index-")
        with folder as scratch:
            vectors, meta = (_checked_file(place, part, verify, scratch) for part in (record.vectors, record.meta))
            _check_header(vectors, record)
            batches = _read_meta(meta, record)
            return cls(place, record, _read_vectors(vectors, record), batches)

    def search(
        self, vectors: Floats, k: int, nprobe: int | None = None, allowed: Ids | None = None
    ) -> tuple[Floats, Ids]:
        """Scores [q, k] float32, falling, and ids [q, k] int64 of the best rows, padded with -inf and -1.

        There are min(k, rows indexed) answers to each query. `nprobe` overrides the measured one. `allowed`, ascending
        ids, restricts the answers to these rows, be they indexed or not: few are searched exactly, among many as many
        more cells are visited as they are fewer than all.
        """
        vectors = _checked_queries(vectors, self.record.dim, k)
        if nprobe is not None and nprobe < 1:
            raise ValueError(f"nprobe must be at least 1, got {nprobe}")
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        ids = np.full((len(vectors), k), -1, np.int64)
        full = min(k, self.record.rows_indexed)
        if full and len(vectors):
            probes = nprobe if nprobe is not None else self.record.parameters.get("nprobe", 1)
            if allowed is None:
                scores[:, :full], ids[:, :full] = _search(self._faiss, vectors, full, probes)
            else:
                stored = self._by_id()
                among = stored.among(allowed)
                full = min(full, len(among))
                scores[:, :full], ids[:, :full] = _search_among(self._faiss, stored, vectors, full, probes, among)
        return scores, ids

    def vectors(self, ids: Ids | Sequence[int]) -> Floats:
        """The vectors of these ids as the index stores them, float32 [n, D]. Raises ValueError for an id without one.

        The first call reads where each vector lies: 9 bytes of memory a row of the table.
        """
        wanted = np.asarray(ids, np.int64).reshape(-1)
        stored = self._by_id()
        absent = np.setdiff1d(wanted, stored.among(np.unique(wanted)))
        if len(absent):
            rows = self.record.rows_table
            why = f"has no {self.record.column}" if 0 <= absent[0] < rows else f"is none of the table's 0..{rows - 1}"
            raise ValueError(f"{self.place} holds no vector of row {absent[0]}: it {why}")
        return stored.take(wanted)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of META of every row of the table, indexed or not, in id order."""
        return (batch.select(list(columns)) for batch in self._batches)

    def _by_id(self) -> "_Stored":
        with self._storing:
            if self._stored is None:
                self._stored = _Stored(self._faiss, self.record.rows_table, self.place)
            return self._stored

    def meta(self, ids: Ids | Sequence[int]) -> pa.Table:
        """The rows (META) of these ids, in their order."""
        wanted = np.asarray(ids, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.record.rows_table):
            raise ValueError(f"ids must lie in 0..{self.record.rows_table - 1}, got {wanted.min()}..{wanted.max()}")
        batch_of = wanted // self._batch_rows
        pieces, positions = [], []
        for number in np.unique(batch_of):
            where = np.flatnonzero(batch_of == number)
            pieces.append(self._batches[number].take(pa.array(wanted[where] - number * self._batch_rows)))
            positions.append(where)
        rows = pa.Table.from_batches(pieces, META)
        rows = rows.take(pa.array(np.argsort(np.concatenate(positions)))) if positions else rows
        if not np.array_equal(rows["id"].to_numpy(), wanted):
            raise BadIndex(f"{files.join(self.place, self.record.meta.path)} is not in id order: build the index anew")
        return rows

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


class _Stored:
    """The vectors of a FAISS index by their id."""

    def __init__(self, index: Any, rows: int, place: str):
        """`rows`: ids lie below this number. Raises BadIndex for others."""
        self._index = index
        cells = [faiss.vector_to_array(index.id_map)] if not hasattr(index, "nlist") else _ids_by_cell(index)
        places = np.full(rows, -1, np.int64)
        for cell, ids in enumerate(cells):
            if len(ids) and not (ids.min() >= 0 and ids.max() < rows):
                raise BadIndex(f"{place} holds ids outside 0..{rows - 1}: build the index anew")
            places[ids] = (cell << 32) | np.arange(len(ids))
        if hasattr(index, "nlist"):  # FAISS makes this map itself only where every id below ntotal is there
            faiss.copy_array_to_vector(places, index.direct_map.array)
            index.direct_map.type = faiss.DirectMap.Array
        self._present = places >= 0

    def among(self, ids: Ids) -> Ids:
        """Those of the ids that have a vector."""
        ids = ids[(ids >= 0) & (ids < len(self._present))]
        return ids[self._present[ids]]

    def take(self, ids: Ids) -> Floats:
        """Vectors [n, D] of ids that have one."""
        vectors: Floats = self._index.reconstruct_batch(np.ascontiguousarray(ids))
        return vectors


def _ids_by_cell(index: Any) -> Iterator[Ids]:
    for cell in range(index.nlist):
        size = index.invlists.list_size(cell)
        yield faiss.rev_swig_ptr(index.invlists.get_ids(cell), size) if size else np.empty(0, np.int64)


def _search_among(index: Any, stored: _Stored, vectors: Floats, k: int, nprobe: int, among: Ids) -> tuple[Floats, Ids]:
    """The best `k` of the ids `among` (ascending, at least `k`, all indexed).

    A query without a filter meets the vectors of nprobe cells; a query among fewer rows visits as many more cells as it
    takes to meet as many of these, so that it finds at least as large a share of the true best.
    """
    if not k:
        return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
    if len(among) <= index.ntotal // _SCAN_SHARE:
        return _scan(stored, vectors, k, among)
    selector = faiss.IDSelectorBitmap(_bitmap(among))
    if not hasattr(index, "nlist"):
        scores, ids = index.search(vectors, k, params=faiss.SearchParameters(sel=selector))
        return scores, ids
    enough = index.nlist if len(among) <= _EXACT_AMONG else math.ceil(nprobe * index.ntotal / len(among))
    return _search_selected(index, vectors, k, enough, selector)


def _search_selected(index: Any, vectors: Floats, k: int, nprobe: int, selector: Any) -> tuple[Floats, Ids]:
    nprobe = min(nprobe, index.nlist)
    scores, ids = index.search(vectors, k, params=faiss.SearchParametersIVF(nprobe=nprobe, sel=selector))
    short = ids[:, -1] < 0
    if nprobe < index.nlist and short.any():
        scores[short], ids[short] = _search_selected(index, vectors[short], k, 4 * nprobe, selector)
    return scores, ids


def _scan(stored: _Stored, vectors: Floats, k: int, among: Ids) -> tuple[Floats, Ids]:
    """The true `k` best of the ids `among`; among equal scores the lower id comes first."""
    scores = np.full((len(vectors), k), -np.inf, np.float32)
    ids = np.full((len(vectors), k), -1, np.int64)
    for start in range(0, len(among), _BLOCK_ROWS):
        block = among[start : start + _BLOCK_ROWS]
        found, places = faiss.knn(vectors, stored.take(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, ids = _best(np.hstack([scores, found]), np.hstack([ids, block[places]]), k)
    return scores, ids


def _bitmap(ids: Ids) -> npt.NDArray[np.uint8]:
    """One bit for each id up to the last of `ids` (ascending), without a byte for each on the way."""
    bits = np.zeros(int(ids[-1]) // 8 + 1, np.uint8)
    for start in range(0, len(ids), _BLOCK_ROWS):
        block = ids[start : start + _BLOCK_ROWS]
        np.bitwise_or.at(bits, block >> 3, np.left_shift(1, block & 7).astype(np.uint8))
    return bits


def _difference(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> str:
    gone, new = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if not gone and not new:
        return "the same parts in another order"
    samples = [f"{path} only {where}" for where, parts in (("here", gone), ("there", new)) for path, _ in parts[:2]]
    return f"{len(ours)} parts here, {len(theirs)} there; {', '.join(samples)}"


# --- building


def _check_request(spec: TableSpec, place: str, column: str, target_recall: float) -> None:
    _dim(spec, column)
    if not 0 < target_recall <= 1:
        raise ValueError(f"target recall must lie above 0 and not above 1, got {target_recall}")
    if files.stat(files.join(place, _RECORD)):
        _read_record(place)  # refuses to replace what is not an index of ours
    with files.PendingFile(place):
        pass  # a place that cannot be written to should be known before the work, not after


def _dim(spec: TableSpec, column: str) -> int:
    if column not in EMBEDDINGS:
        raise ValueError(f"no such vector column: {column!r}; expected one of {', '.join(EMBEDDINGS)}")
    if column != "fused_embedding":
        return spec.tower.embedding_dim
    if spec.fuser is None:
        raise ValueError("the table has no fused_embedding: it was written without a fuser; add one with `fusion fuse`")
    return spec.fuser.out_dim


def _kinds_of_query(spec: TableSpec, column: str) -> list[str]:
    """Which columns give the queries that an index of `column` will be asked, the hardest first."""
    if column == "fused_embedding":
        return ["text", "image"] if spec.fuser and spec.fuser.space == "backbone" else ["fused"]
    return ["text", "image"] if column == "image_embedding" else ["image", "text"]


def _blocks(table: Table, column: str) -> Iterator[tuple[Ids, Floats]]:
    """Ids [n] and vectors [n, D] of the rows that have the column, in id order."""
    for first, vectors, present in table.vectors(column, _BLOCK_ROWS):
        positions = np.flatnonzero(present)
        if len(positions):
            yield first + positions, np.ascontiguousarray(vectors[positions], np.float32)


def _count_checked(table: Table, column: str) -> int:
    rows = 0
    for ids, vectors in _blocks(table, column):
        _check_lengths(table, column, ids, vectors)
        rows += len(ids)
    return rows


def _check_lengths(table: Table, column: str, ids: Ids, vectors: Floats) -> None:
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE))  # so written, NaN is bad too
    if len(bad):
        _refuse_row(table, column, int(ids[bad[0]]), float(lengths[bad[0]]))


def _refuse_row(table: Table, column: str, row: int, length: float) -> NoReturn:
    found = table.take([row], ["key", "shard"]).to_pylist()[0]
    raise ValueError(
        f"row {row} of {table.place} (key {found['key']!r} of {found['shard']}) has a {column} of length {length}; "
        "expected 1: embed that shard again"
    )


def _take(table: Table, column: str, ordinals: Ids, dim: int) -> tuple[Ids, Floats]:
    """Ids and vectors of the rows whose rank among those with the column is in `ordinals` (ascending)."""
    ids, vectors = np.empty(len(ordinals), np.int64), np.empty((len(ordinals), dim), np.float32)
    seen = done = 0
    for block_ids, block in _blocks(table, column) if len(ordinals) else ():
        stop = int(np.searchsorted(ordinals, seen + len(block_ids)))
        chosen = ordinals[done:stop] - seen
        ids[done:stop], vectors[done:stop] = block_ids[chosen], block[chosen]
        seen, done = seen + len(block_ids), stop
        if done == len(ordinals):
            break
    return ids, vectors


def _sample(rng: np.random.Generator, population: int, size: int) -> Ids:
    return np.sort(rng.choice(population, min(population, size), replace=False)).astype(np.int64)


def _n_lists(rows: int, dim: int) -> int:
    """About 4 √rows cells, fewer where the training sample cannot fill them."""
    trainable = min(rows, _TRAIN_BYTES // (4 * dim))
    return max(1, min(round(4 * math.sqrt(rows)), trainable // _MIN_TRAIN_PER_LIST))


def _trained(table: Table, column: str, factory: str, rows: int, seed: int, rng: np.random.Generator) -> Any:
    dim = _dim(table.spec, column)
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if factory == _FLAT:
        return index
    index.by_residual = False  # float16 as in the table, bit for bit; a residual would be rounded again
    index.cp.spherical = True
    index.cp.seed = seed
    size = min(_TRAIN_PER_LIST * index.nlist, _TRAIN_BYTES // (4 * dim))
    _, vectors = _take(table, column, _sample(rng, rows, size), dim)
    index.train(vectors)
    return index


# --- measuring


def _draw(table: Table, name: str, column: str, rows: int, rng: np.random.Generator) -> _Queries:
    source = f"{name}_embedding"
    present = rows if source == column else _count(table, f"has_{name}")
    ids, vectors = _take(table, source, _sample(rng, present, QUERIES), _dim(table.spec, source))
    _check_lengths(table, source, ids, vectors)
    return _Queries(name, ids, vectors, own=source == column)


def _count(table: Table, flag: str) -> int:
    return sum(batch.column(0).true_count for batch in table.scan([flag]))


def _tune(
    index: Any, table: Table, column: str, queries: Sequence[_Queries], target: float
) -> tuple[dict[str, int], list[Recall]]:
    """The fewest cells to visit (a power of two) that reach the target for every kind of query, and what they reach."""
    measurable = []
    for drawn in queries:
        truth = _without_self(drawn, *exact_search(table, column, drawn.vectors, RECALL_K + drawn.own))
        if (truth[1] >= 0).any():
            measurable.append((drawn, truth))
    n_lists = getattr(index, "nlist", 1)
    recalls: list[Recall] = []
    for nprobe in [*(1 << i for i in range((n_lists - 1).bit_length())), n_lists]:
        recalls = [_measure(index, drawn, truth, nprobe) for drawn, truth in measurable]
        if all(measured.recall >= target for measured in recalls):
            break
    return ({"nprobe": nprobe} if hasattr(index, "nlist") else {}), recalls


def _measure(index: Any, drawn: _Queries, truth: tuple[Floats, Ids], nprobe: int) -> Recall:
    k = min(RECALL_K + drawn.own, index.ntotal)
    found = _without_self(drawn, *_search(index, drawn.vectors, k, nprobe))
    return Recall(drawn.name, RECALL_K, len(drawn.ids), round(recall(*found, *truth, RECALL_K), 4))


def _without_self(drawn: _Queries, scores: Floats, ids: Ids) -> tuple[Floats, Ids]:
    if not drawn.own:
        return scores, ids
    own = ids == drawn.ids[:, None]
    return _best(np.where(own, np.float32(-np.inf), scores), np.where(own, -1, ids), RECALL_K)


def _best(scores: Floats, ids: Ids, k: int) -> tuple[Floats, Ids]:
    """The `k` highest of each row, equal scores by id."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _latency(index: Any, queries: Sequence[_Queries], parameters: dict[str, int]) -> dict[str, float]:
    """Milliseconds of one query of the hardest kind there is, on one thread."""
    k = min(RECALL_K, index.ntotal)
    vectors = next((drawn.vectors for drawn in queries if len(drawn.vectors)), np.empty((0, index.d), np.float32))
    taken = []
    with _one_thread():
        for query in vectors[:_LATENCY_QUERIES] if k else ():
            started = time.perf_counter()
            _search(index, query[None], k, parameters.get("nprobe", 1))
            taken.append(1e3 * (time.perf_counter() - started))
    return {f"p{q}": round(float(np.percentile(taken, q)), 3) for q in (50, 99)} if taken else {}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _search(index: Any, vectors: Floats, k: int, nprobe: int) -> tuple[Floats, Ids]:
    """The best `k` of at most all vectors. Where the visited cells hold fewer than `k`, more cells are visited."""
    if not hasattr(index, "nlist"):
        scores, ids = index.search(vectors, k)
        return scores, ids
    nprobe = min(nprobe, index.nlist)
    scores, ids = index.search(vectors, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
    short = ids[:, -1] < 0
    if nprobe < index.nlist and short.any():
        scores[short], ids[short] = _search(index, vectors[short], k, 4 * nprobe)
    return scores, ids


def _checked_queries(vectors: Floats, dim: int, k: int) -> Floats:
    if k <= 0:
        raise ValueError(f"k must be at least 1, got {k}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"expected query vectors of shape [q, {dim}], got {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        raise ValueError("a query vector holds NaN or infinity")
    return vectors


# --- writing


def _publish(place: str, index: Any, table: Table, record: Callable[[Part, Part], IndexRecord]) -> IndexRecord:
    with files.PendingFile(place) as vectors, files.PendingFile(place) as meta:
        writer = faiss.PyCallbackIOWriter(vectors.write, 1 << 20)
        faiss.write_index(index, writer)
        del writer  # hands over what it has buffered
        rows = _write_meta(meta, table)
        if rows != table.num_rows:
            raise ValueError(f"{table.place} gave {rows} rows where its manifest counts {table.num_rows}")
        written = record(
            Part(f"vectors-{vectors.sha256[:8]}.faiss", index.ntotal, vectors.size_bytes, vectors.sha256),
            Part(f"meta-{meta.sha256[:8]}.arrow", rows, meta.size_bytes, meta.sha256),
        )
        before = _read_record(place) if files.stat(files.join(place, _RECORD)) else None
        vectors.publish(written.vectors.path)
        meta.publish(written.meta.path)
    files.write_bytes(place, _RECORD, records.to_json(written, indent=2))
    _remove_replaced(place, before, written)
    return written


def _remove_replaced(place: str, before: IndexRecord | None, now: IndexRecord) -> None:
    """Deletes the files of the index that was replaced, and those of builds that died a day ago or earlier."""
    replaced = {before.vectors.path, before.meta.path} if before else set()
    for entry in files.list_files(place):
        name = entry.place.rpartition("/")[2]
        stale = _OWN_FILE.fullmatch(name) and time.time() - entry.mtime_ns / 1e9 > _STALE_SECONDS
        if (name in replaced or stale) and name not in (now.vectors.path, now.meta.path):
            files.remove(entry.place)
    files.remove_stale_temporaries(place)


def _write_meta(pending: files.PendingFile, table: Table) -> int:
    rows = 0
    with pa.ipc.new_file(pa.PythonFile(pending, "w"), META) as writer:
        for batch in _of_equal_size(table.scan([name for name in META.names if name != "id"]), _META_BATCH_ROWS):
            columns = {"id": pa.array(np.arange(rows, rows + batch.num_rows))}
            columns |= {name: batch.column(name) for name in META.names if name != "id"}
            writer.write_batch(pa.record_batch([columns[name] for name in META.names], schema=META))
            rows += batch.num_rows
    return rows


def _of_equal_size(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows`, but for the last."""
    held: list[pa.RecordBatch] = []
    n_held = 0
    for batch in batches:
        held.append(batch)
        n_held += batch.num_rows
        while n_held >= rows:
            whole = pa.concat_batches(held)
            yield whole.slice(0, rows)
            held, n_held = [whole.slice(rows)], n_held - rows
    if n_held:
        yield pa.concat_batches(held)


# --- opening


def _read_record(place: str) -> IndexRecord:
    where = files.join(place, _RECORD)
    try:
        record = records.from_json(IndexRecord, files.read_bytes(where), where)
    except FileNotFoundError as error:
        raise BadIndex(f"there is no index at {place}: build one with `fusion index TABLE --output {place}`") from error
    except records.SchemaMismatch as error:
        raise BadIndex(str(error)) from error
    wrong = _wrong_in(record)
    if wrong:
        raise BadIndex(f"{where} {wrong}: build the index anew")
    return record


def _wrong_in(record: IndexRecord) -> str:
    for part in (record.vectors, record.meta):
        if not _OWN_FILE.fullmatch(part.path):
            return f"names a file that is none of an index: {part.path!r}"
    if record.factory != _FLAT and not _IVF.fullmatch(record.factory):
        return f"names an index type that this release does not read: {record.factory!r}"
    if record.metric != "inner_product" or record.column not in EMBEDDINGS or record.dim < 1:
        return f"is of no known kind: {record.column!r} of {record.dim} dimensions by {record.metric!r}"
    if not 0 <= record.rows_indexed <= record.rows_table:
        return f"counts {record.rows_indexed} indexed of {record.rows_table} rows"
    return ""


def _checked_file(place: str, part: Part, verify: bool, scratch: str) -> str:
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


def _check_header(path: str, record: IndexRecord) -> None:
    """Raises BadIndex unless the file begins as the index that index.json describes and can hold its vectors."""
    ivf = _IVF.fullmatch(record.factory)
    with files.open_input(path) as stream:
        head = stream.read(_HEADER.size + 8)
    expected = (b"IwSq" if ivf else b"IxM2", record.dim, record.rows_indexed, _INNER_PRODUCT)
    least = record.rows_indexed * (8 + record.dim * (2 if ivf else 4)) + len(head)
    if len(head) < _HEADER.size + 8 or record.vectors.size_bytes < least:
        raise BadIndex(f"{path} is too short for {record.rows_indexed} vectors: build the index anew")
    fourcc, dim, rows, _, _, trained, metric = _HEADER.unpack(head[: _HEADER.size])
    if (fourcc, dim, rows, metric) != expected or trained != 1:
        raise BadIndex(
            f"{path} begins as {fourcc!r}, {dim} dimensions, {rows} vectors, metric {metric}; index.json says "
            f"{expected[0]!r}, {record.dim}, {record.rows_indexed}, {_INNER_PRODUCT}: build the index anew"
        )
    if ivf and struct.unpack("<q", head[_HEADER.size :])[0] != int(ivf[1]):
        raise BadIndex(f"{path} has another number of cells than {record.factory}: build the index anew")


def _read_vectors(path: str, record: IndexRecord) -> Any:
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if record.factory != _FLAT else 0
    try:
        index = faiss.read_index(path, flags)
    except RuntimeError as error:
        raise BadIndex(f"{path} cannot be read by FAISS {faiss.__version__}: build the index anew") from error
    if (index.d, index.ntotal) != (record.dim, record.rows_indexed):
        raise BadIndex(f"{path} holds {index.ntotal} vectors of {index.d} dimensions: build the index anew")
    return index


def _read_meta(path: str, record: IndexRecord) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
    except (pa.ArrowInvalid, OSError) as error:
        raise BadIndex(f"{path} is not an Arrow file: build the index anew") from error
    sizes = [batch.num_rows for batch in batches]
    equal = not sizes or (set(sizes[:-1]) <= {sizes[0]} and sizes[-1] <= sizes[0])
    if reader.schema != META or sum(sizes) != record.rows_table or not equal:
        raise BadIndex(f"{path} does not hold the {record.rows_table} rows of the table: build the index anew")
    return batches
