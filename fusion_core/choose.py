"""Which index: queries held out from training, recall against exact search, candidates measured on a sample.

Queries of the other modality decide: an index tuned on image queries alone loses a third of the answers to texts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core import table as tables
from fusion_core import vectors
from fusion_core.index import recall
from fusion_core.table import Table
from fusion_core.vectors import Floats, Ids, Kind, Parameters, Shard
from schemas.feature_table import ROW_GROUP_ROWS, TableSpec
from schemas.index import Candidate

RECALL_K = 10
QUERIES = 1_000  # of each kind, to tune and measure the index with
SAMPLE_ROWS = 100_000
_SAMPLE_BYTES = 128 << 20  # in float32: memory stays bounded whatever the dimension
_CHOICE_QUERIES = 250  # of each kind, enough to tell candidates apart
_TIMED_QUERIES = 200
_SAMPLED_GROUPS = 256  # row groups of a large table that a sample is drawn from: some gigabytes are read, not all
_K_FACTORS = (32, 16, 8, 4, 2, 1)
_PROJECTED = ("SVD{0},IVF1,SQ8", "SVD{0},IVF1,PQ{0}x4fs")
NEARLY = 0.01  # a recall that is lower by this is as good
_AS_FAST = 1.1  # within this of the fastest, the smallest wins


@dataclass(frozen=True)
class Queries:
    """Vectors [q, D] drawn from one column."""

    name: str
    vectors: Floats
    parts: npt.NDArray[np.str_]  # where each was drawn: the path of its part,
    rows: Ids  # and the row in it


def kinds_of_query(spec: TableSpec, column: str) -> list[str]:
    """Which columns give the queries that an index of `column` will be asked, the hardest first."""
    if column == "fused_embedding":
        return ["text", "image"] if spec.fuser and spec.fuser.space == "backbone" else ["fused"]
    return ["text", "image"] if column == "image_embedding" else ["image", "text"]


# --- drawing


def draw(
    table: Table, column: str, wanted: int, rng: np.random.Generator, without: Ids | None = None
) -> tuple[Ids, npt.NDArray[np.float16]]:
    """Ids (rising) and vectors of random rows that have the column, as many as wanted or there are, not in `without`.

    Of a large table the rows come from a random choice of row groups, so that not all of it is read.
    """
    excluded = np.empty(0, np.int64) if without is None else without
    tried = wanted + len(excluded)
    while True:
        ids = np.setdiff1d(_positions(table, tried, rng), excluded)
        matrix, present = _take(table, column, ids)
        places = np.flatnonzero(present)
        if len(places) >= wanted or tried >= table.num_rows:
            chosen = np.sort(rng.choice(places, min(wanted, len(places)), replace=False)) if len(places) else places
            return ids[chosen], matrix[chosen]
        tried *= 4


def _take(table: Table, column: str, ids: Ids) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """The vectors [n, D] of these ids, and whether they are present; read part by part into one matrix."""
    flag = {"image_embedding": "has_image", "text_embedding": "has_text"}.get(column)
    matrix = np.empty((len(ids), table.schema.field(column).type.list_size), np.float16)
    present = np.ones(len(ids), bool)
    ends = np.cumsum([part.rows for part in table.parts])
    part = np.searchsorted(ends, ids, "right")
    for start in np.flatnonzero(np.diff(part, prepend=-1)):
        here = slice(start, int(np.searchsorted(part, part[start], "right")))
        rows = table.take(ids[here].tolist(), [column, *([flag] if flag else [])]).combine_chunks()
        matrix[here] = tables.to_numpy(rows[column].chunk(0))
        present[here] = rows[flag].to_numpy() if flag else matrix[here].any(axis=1)
    pa.default_memory_pool().release_unused()  # of whole row groups, more than what was taken
    return matrix, present


def _positions(table: Table, wanted: int, rng: np.random.Generator) -> Ids:
    rows = np.array([part.rows for part in table.parts], np.int64)
    if not len(rows) or wanted >= rows.sum():
        return np.arange(rows.sum())
    n_groups = -(-rows // ROW_GROUP_ROWS)
    in_part = np.arange(n_groups.sum()) - np.repeat(np.cumsum(n_groups) - n_groups, n_groups)
    starts = np.repeat(np.cumsum(rows) - rows, n_groups) + in_part * ROW_GROUP_ROWS
    sizes = np.minimum(np.repeat(rows, n_groups) - in_part * ROW_GROUP_ROWS, ROW_GROUP_ROWS)
    groups = np.arange(len(starts))
    n_sampled = max(_SAMPLED_GROUPS, 2 * wanted // ROW_GROUP_ROWS)
    if len(groups) > n_sampled:
        groups = np.sort(rng.choice(groups, n_sampled, replace=False))
    ends = np.cumsum(sizes[groups])
    chosen = np.sort(rng.choice(int(ends[-1]), min(wanted, int(ends[-1])), replace=False))
    group = np.searchsorted(ends, chosen, "right")
    found: Ids = starts[groups[group]] + chosen - (ends[group] - sizes[groups[group]])
    return found


def draw_queries(table: Table, column: str, seed: int) -> tuple[list[Queries], Ids]:
    """Queries of each kind, of the same rows as far as these have both, and their ids: not to be trained on."""
    found, drawn = [], np.empty(0, np.int64)
    firsts = np.cumsum([0, *(part.rows for part in table.parts)])
    paths = np.array([part.path for part in table.parts])
    for name in kinds_of_query(table.spec, column):
        ids, matrix = draw(table, f"{name}_embedding", QUERIES, np.random.default_rng(seed))
        part = np.searchsorted(firsts, ids, "right") - 1
        named = paths[part] if len(ids) else np.empty(0, "U1")
        found.append(Queries(name, matrix.astype(np.float32), named, ids - firsts[part]))
        drawn = np.union1d(drawn, ids)
    return found, drawn


def sample_rows(dim: int) -> int:
    """How many vectors candidates are measured on."""
    return min(SAMPLE_ROWS, _SAMPLE_BYTES // (4 * dim))


# --- tuning


def tune(
    kind: Kind, recalls: Callable[[Parameters], Sequence[float]], seconds: Callable[[Parameters], float], target: float
) -> Parameters:
    """The fastest parameters found whose recall reaches the target for every kind of query.

    Where none does, the target is what the most thorough parameters reach, less NEARLY: what the codes have lost is
    not found by visiting every cell. The more answers are refined, the fewer cells need to be visited: the most refined
    setting says where to begin.
    """
    factors = _K_FACTORS if kind.refine else (0,)
    grid = _steps(kind.lists) if kind.lists else [0]

    def reaching(targets: float | Sequence[float]) -> list[Parameters]:
        start, found = 0, []
        for factor in factors:
            least = _least(grid[start:], lambda n, f=factor: _reaches(recalls(_named(n, f)), targets))  # type: ignore[misc]
            if least is None:
                break
            start += least
            found.append(_named(grid[start], factor))
        return found

    most = _named(grid[-1], factors[0])
    found = reaching(target) or reaching([min(target, value - NEARLY) for value in recalls(most)])
    if len(found) < 2:
        return found[0] if found else most
    return min(found, key=seconds)


def raised(
    kind: Kind, recalls: Callable[[Parameters], Sequence[float]], parameters: Parameters, target: float
) -> Parameters | None:
    """The same parameters, but for as few more cells to visit as reach the target; None where no number does."""
    grid = [nprobe for nprobe in _steps(kind.lists) if nprobe > parameters["nprobe"]] if kind.lists else []
    if not grid:
        return None
    least = _least(grid, lambda nprobe: _reaches(recalls({**parameters, "nprobe": nprobe}), target))
    return None if least is None else {**parameters, "nprobe": grid[least]}


def _steps(lists: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the number of all cells."""
    steps = sorted({1, *(n for i in range(lists.bit_length()) for n in (1 << i, 3 << i >> 1))})
    return [*(step for step in steps if step < lists), lists]


def _named(nprobe: int, factor: int) -> Parameters:
    return {name: value for name, value in (("nprobe", nprobe), ("k_factor", factor)) if value}


def _least(grid: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The position of the least value that reaches; looked for by doubling steps, then by halving."""
    low, high, step = -1, 0, 1
    while not reaches(grid[high]):
        if high == len(grid) - 1:
            return None
        low, high, step = high, min(high + step, len(grid) - 1), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(grid[middle]) else (middle, high)
    return high


def _reaches(recalls: Sequence[float], targets: float | Sequence[float]) -> bool:
    values = np.array(recalls)
    return bool((np.isnan(values) | (values >= targets)).all())


def microseconds(search: Callable[[Floats], object], queries: Floats) -> npt.NDArray[np.float64]:
    """What single queries take on one thread."""
    taken = []
    with vectors.threads(1):
        for query in queries[:_TIMED_QUERIES]:
            started = time.perf_counter()
            search(query[None])
            taken.append(1e6 * (time.perf_counter() - started))
    return np.array(taken)


# --- choosing


def factories(dim: int, max_bytes: float, rows: int = 0, lists: int = 1) -> list[str]:
    """The types worth a trial, with the number of cells left open (1): one that is sure, then the most promising.

    Where bytes are short, these are followed by projections onto as many dimensions as the bytes allow. Raises
    ValueError, naming the smallest, where no type is as small as asked for.
    """
    h, q = dim // 2, dim // 4
    found = ["IVF1,SQfp16"]
    if dim % 8 == 0:
        found += [f"SVD{q},IVF1,PQ{q}x4fs,Refine(SQ8)", f"IVF1,PQ{h}x4fs,Refine(SQ8)",
                  f"SVD{q},IVF1,PQ{q}x4fs,Refine(SQfp16)", f"SVD{h},IVF1,PQ{q}x4fs,Refine(SQ8)", f"SVD{h},IVF1,SQ8",
                  f"IVF1,PQ{q}x4fs,Refine(SQ8)", f"IVF1,PQ{h}x4fs,Refine(SQfp16)", f"SVD{q},IVF1,SQ8",
                  f"SVD{h},IVF1,PQ{h}x4fs", f"SVD{q},IVF1,PQ{q}x4fs", "IVF1,RaBitQ,Refine(SQ8)"]  # fmt: skip
    found += ["IVF1,SQ8", "Flat", "SQfp16", "SQ8", "SQ4"]

    def size(factory: str) -> float:
        return Kind.parse(factory).with_lists(lists).bytes_per_vector(dim, rows)

    if not max_bytes:
        return found
    fitting = [factory for factory in found if size(factory) <= max_bytes]
    filled = [[form.format(dims) for dims in range(dim - dim % 8, 0, -8) if dims < dim] for form in _PROJECTED]
    for forms in filled:
        sizes = [size(form) for form in forms]
        fitting += [form for form, taken in zip(forms, sizes, strict=True) if taken <= max_bytes < sizes[0]][:1]
    if not fitting:
        least = min(map(size, [*found, *(forms[-1] for forms in filled if forms)]))
        raise ValueError(
            f"no index of {rows:,} vectors of {dim} dimensions takes at most {max_bytes:g} bytes for a vector; the "
            f"smallest takes {least:.0f}"
        )
    return list(dict.fromkeys(fitting))


@dataclass(frozen=True)
class Trial:
    """What candidates are measured with: a sample, the queries, and what exact search over the sample answers."""

    sample: Floats
    queries: Sequence[Queries]
    truths: Sequence[tuple[Floats, Ids]]
    rows: int  # of the whole table
    lists: int  # for the sample,
    full_lists: int  # and for the whole table
    seed: int
    known: dict[tuple[int, int], Floats]

    @classmethod
    def of(
        cls, sample: Floats, queries: Sequence[Queries], rows: int, lists: int, full_lists: int, seed: int
    ) -> "Trial":
        """A trial; at most _CHOICE_QUERIES of each kind are used."""
        few = [replace(asked, vectors=asked.vectors[:: max(1, len(asked.vectors) // _CHOICE_QUERIES)])
               for asked in queries if len(asked.vectors)]  # fmt: skip
        truths = [vectors.exact(asked.vectors, sample, RECALL_K) for asked in few]
        return cls(sample, few, truths, rows, lists, full_lists, seed, {})

    def measure(self, factory: str, target: float) -> Candidate:
        """One candidate, tuned."""
        kind = Kind.parse(factory).with_lists(self.lists)
        shard = vectors.train(kind, self.sample, self.seed, self.known)
        shard.add(self.sample)
        parameters = tune(kind, lambda p: self._recalls(shard, p), lambda p: self._microseconds(shard, p), target)
        taken, growth = self._microseconds(shard, parameters), self.rows / len(self.sample)
        return Candidate(
            kind.with_lists(self.full_lists).text,
            parameters,
            {asked.name: round(r, 4) for asked, r in zip(self.queries, self._recalls(shard, parameters), strict=True)},
            round(kind.with_lists(self.full_lists).bytes_per_vector(self.sample.shape[1], self.rows), 1),
            round(taken, 1),
            # With 4 √n cells both their number and their size grow by √n; about as many of them need to be visited.
            round(taken * (growth**0.5 if kind.lists else growth), 1),
        )

    def _recalls(self, shard: Shard, parameters: Parameters) -> list[float]:
        found = []
        for asked, truth in zip(self.queries, self.truths, strict=True):
            _, ids = shard.search(asked.vectors, RECALL_K, parameters)
            scores = np.einsum("qd,qkd->qk", asked.vectors, self.sample[np.maximum(ids, 0)])
            found.append(recall(scores, ids, *truth, RECALL_K))
        return found

    def _microseconds(self, shard: Shard, parameters: Parameters) -> float:
        taken = microseconds(lambda query: shard.search(query, RECALL_K, parameters), self.queries[0].vectors)
        return float(np.median(taken))


def choose(
    trial: Trial, target: float, max_bytes: float, seconds: float, log: Callable[[str], None]
) -> tuple[Candidate, ...]:
    """The candidates that the time allowed to try (at least one), with one of them chosen.

    The fastest of those that reach the target, or the smallest of those about as fast; where none does, the one of the
    highest recall.
    """
    tried: list[Candidate] = []
    deadline = time.perf_counter() + seconds
    for factory in factories(trial.sample.shape[1], max_bytes, trial.rows, trial.full_lists):
        if tried and time.perf_counter() > deadline:
            log(f"index: the time for the choice is over; {len(tried)} candidates were tried")
            break
        tried.append(trial.measure(factory, target))
        last = tried[-1]
        log(f"index: tried {factory} {last.parameters or ''}: recall {last.recalls}, {last.bytes_per_vector:g} bytes, "
            f"{last.microseconds:g} µs")  # fmt: skip
    reaching = [item for item in tried if _reaches(list(item.recalls.values()), target)]
    if reaching:
        fastest = min(item.expected_microseconds for item in reaching)
        alike = [item for item in reaching if item.expected_microseconds <= _AS_FAST * fastest]
        best = min(alike, key=lambda item: item.bytes_per_vector)
    else:
        best = max(tried, key=lambda item: min(item.recalls.values(), default=0))
        log(f"index: no candidate reaches a recall of {target}; {best.factory} comes nearest")
    return tuple(replace(item, chosen=item is best) for item in tried)
