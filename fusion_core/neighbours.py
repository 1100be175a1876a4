"""Pairs of rows that are equal or near, found without comparing all with all, and joined into components.

Rows are numbers 0…n-1. What is compared is written to scratch files by what must meet (a digest, bits of a hash, a
cell), and read back a bucket at a time: memory is bounded however many rows there are, and the scratch space is not.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from schemas.dedup import PairsFound

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.float16]
Records = npt.NDArray[Any]  # of a structured dtype

TOLERANCE = 1e-6  # a cosine this little below the threshold is at it
BRUTE_ROWS = 20_000  # up to so many vectors are compared all with all

_MAX_BUCKETS = 4096
_READ_ROWS = 65_536
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads a number's low bits over its high ones
_VERIFIED_ROWS = 4096
_DOUBT = 1e-4  # a float32 product may be off by less: a pair that is this near the threshold is computed in float64

_VISITED_CELLS = 4  # cells that a row is compared with: its own and the next ones
_TRAIN_PER_CELL = 32
_MIN_TRAIN_PER_CELL = 8
_TRAIN_ROUNDS = 8
_TRAIN_BYTES = 1 << 30  # whatever memory is allowed, so that it does not change the cells
_QUERIES = 1000  # rows for which all their pairs are looked for, to tell how many the cells find
_SCORES = 16 << 20  # elements of one block of products
_TILE = 1024, 8192  # rows compared at once with how many others


# --- components -----------------------------------------------------------------------------------------------------


class Components:
    """A union-find over rows, 8 bytes each. The root of a component is its first row, in whatever order it grew."""

    def __init__(self, rows: int):
        self._parent = np.arange(rows, dtype=np.int64)  # never above the row itself

    def __len__(self) -> int:
        return len(self._parent)

    def roots(self, rows: Ids) -> Ids:
        """The root of each row's component."""
        above = self._parent[rows]
        while not np.array_equal(higher := self._parent[above], above):
            self._parent[rows] = higher  # halves the path
            rows, above = higher, self._parent[higher]
        return above

    def join(self, left: Ids, right: Ids) -> None:
        """Joins row `left[i]` with row `right[i]`."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            low, high = np.minimum(left, right), np.maximum(left, right)
            apart = low != high
            left, right = low[apart], high[apart]
            np.minimum.at(self._parent, right, left)

    def is_joined(self) -> npt.NDArray[np.bool_]:
        """For each row whether its component has another one, too."""
        joined = np.zeros(len(self), bool)
        for start in range(0, len(self), _READ_ROWS):
            rows = np.arange(start, min(start + _READ_ROWS, len(self)))
            roots = self.roots(rows)
            children = roots != rows
            joined[rows[children]] = joined[roots[children]] = True
        return joined


class Scratch:
    """Records of one dtype in files by bucket, appended in any order and read back once, bucket after bucket."""

    def __init__(self, folder: str, name: str, fields: list[Any], buckets: int = 1):
        self._stem = Path(folder) / name
        self.dtype = np.dtype(fields)
        self.buckets = buckets

    def append(self, buckets: npt.NDArray[np.integer], records: Records) -> None:
        """Adds each record to its bucket."""
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
            with self._path(number).open("ab") as stream:
                stream.write(records[chosen].tobytes())

    def __iter__(self) -> Iterator[Records]:
        """The records of each bucket that has some, mapped from its file, in the order in which they were added."""
        for number in range(self.buckets):
            path = self._path(number)
            if path.exists():
                yield np.memmap(path, self.dtype, "r")
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{number}")


def n_buckets(rows: int, row_bytes: int, memory_bytes: int) -> int:
    """How many buckets it takes until one, and what working on it takes, fits into the memory."""
    return max(1, min(_MAX_BUCKETS, math.ceil(4 * rows * row_bytes / memory_bytes)))


def _scattered(words: Words, buckets: int) -> Words:
    """A bucket for each word, the same for equal ones."""
    with np.errstate(over="ignore"):
        return ((words * _ODD) >> np.uint64(32)) % np.uint64(buckets)


def _records(dtype: np.dtype[Any], **columns: npt.NDArray[Any]) -> Records:
    records = np.empty(len(next(iter(columns.values()))), dtype)
    for name, values in columns.items():
        records[name] = values
    return records


# --- equal ----------------------------------------------------------------------------------------------------------


def join_equal(
    components: Components, blocks: Iterable[tuple[Ids, Words]], rows: int, folder: str, memory_bytes: int
) -> None:
    """Joins rows of equal digests; `blocks` gives row numbers [n] and digests [n, 4]: uint64 of SHA-256."""
    scratch = Scratch(folder, "equal", [("digest", "<u8", (4,)), ("row", "<i8")], n_buckets(rows, 40, memory_bytes))
    for numbers, digests in blocks:
        scratch.append(_scattered(digests[:, 0], scratch.buckets), _records(scratch.dtype, row=numbers, digest=digests))
    for found in scratch:
        digests = np.ascontiguousarray(found["digest"])
        order = np.lexsort(digests.T)
        _join_runs(components, found["row"][order], (digests[order][1:] != digests[order][:-1]).any(axis=1))


def _join_runs(components: Components, rows: Ids, is_new: npt.NDArray[np.bool_]) -> Ids:
    """Joins rows that stand together; `is_new` [n - 1] says where one differs from that before. Returns the starts."""
    starts = np.flatnonzero(np.concatenate([[True], is_new]))
    firsts = np.repeat(rows[starts], np.diff(np.append(starts, len(rows))))
    components.join(firsts, rows)
    return starts


# --- bits -----------------------------------------------------------------------------------------------------------


def join_near_bits(
    components: Components, blocks: Iterable[tuple[Ids, Words]], rows: int, bits: int, folder: str, memory_bytes: int
) -> None:
    """Joins rows whose 64-bit hashes differ in at most `bits` bits: all such pairs, by the pigeonhole principle.

    Of m bands of the hash at most `bits` differ, so such hashes agree in m - `bits` bands: in one of the choices of
    so many bands they have equal keys, and are compared. `blocks` gives row numbers [n] and hashes [n].
    """
    fields = [("hash", "<u8"), ("row", "<i8")]
    buckets = n_buckets(rows, 16, memory_bytes)
    equal, distinct = Scratch(folder, "hash", fields, buckets), Scratch(folder, "distinct", fields)
    for numbers, hashes in blocks:
        equal.append(_scattered(hashes, buckets), _records(equal.dtype, row=numbers, hash=hashes))
    for found in equal:
        found = found[np.argsort(found["hash"], kind="stable")]
        starts = _join_runs(components, found["row"], found["hash"][1:] != found["hash"][:-1])
        distinct.append(np.zeros(len(starts), int), found[starts])
    for found in distinct:
        for mask in _masks(len(found), bits):
            same_key = Scratch(folder, "key", fields, buckets)
            for start in range(0, len(found), _READ_ROWS):
                part = found[start : start + _READ_ROWS]
                same_key.append(_scattered(part["hash"] & mask, buckets), part)
            for group in same_key:
                _join_masked(components, group, mask, bits)


def _masks(rows: int, bits: int) -> list[np.uint64]:
    """The choices of bands that are cheapest for so many hashes: few and short, or many and long ones."""

    def cost(bands: int) -> float:
        pairs = rows**2 / 2 / 2 ** (64 * (bands - bits) / bands)
        return math.comb(bands, bits) * (pairs + 20 * rows)  # sorting a row costs as much as comparing 20 pairs

    bands = min(range(bits + 1, bits + 5), key=cost)
    edges = [64 * band // bands for band in range(bands + 1)]
    values = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(values, bands - bits)]


def _join_masked(components: Components, found: Records, mask: np.uint64, bits: int) -> None:
    keys = found["hash"] & mask
    order = np.argsort(keys)
    keys, hashes, rows = keys[order], found["hash"][order], found["row"][order]
    left, ahead = np.arange(len(keys) - 1), 1
    while len(left := left[keys[left] == keys[left + ahead]]):
        near = left[np.bitwise_count(hashes[left] ^ hashes[left + ahead]) <= bits]
        components.join(rows[near], rows[near + ahead])
        ahead += 1
        left = left[left + ahead < len(keys)]


# --- cosine ---------------------------------------------------------------------------------------------------------


def join_near_vectors(
    components: Components,
    blocks: Callable[[], Iterable[tuple[Ids, Halves]]],
    rows: int,
    cosine: float,
    folder: str,
    memory_bytes: int,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[int, PairsFound | None]:
    """Joins rows whose vectors have at least this cosine; returns the number of cells and how many pairs they find.

    `blocks()` gives, twice over, the row numbers [n] and vectors [n, D] of at most `rows` rows to compare. Up to
    20,000 rows all are compared with all. Beyond that they are dealt to about 2 √rows k-means cells, and a row is
    compared with those at home in the 4 cells next to it: some pairs are missed. How many, is measured by comparing
    about 1000 rows with all. A pair is judged by its cosine in float64: neither blocks nor device change the verdict.
    """
    cells, queries = _train(blocks(), rows, cosine, seed, device) if rows > BRUTE_ROWS else (None, None)
    dealt, pairs, found = None, 0, 0
    for numbers, vectors in blocks():
        unit = _unit(vectors, device)
        near = cells.near(unit) if cells else np.zeros((len(numbers), 1), np.int32)
        if dealt is None:
            fields = [("cell", "<i4"), ("guest", "?"), ("row", "<i8"), ("vector", "<f2", vectors.shape[1:])]
            row_bytes = np.dtype(fields).itemsize
            dealt = Scratch(folder, "cell", fields, n_buckets(rows * near.shape[1], row_bytes, memory_bytes))
        _deal(dealt, numbers, vectors, near)
        if queries:
            more_pairs, more_found = queries.met(numbers, unit, near, cosine)
            pairs, found = pairs + more_pairs, found + more_found
    for bucket in dealt or ():
        order = np.lexsort((bucket["guest"], bucket["cell"]))
        for members in np.split(order, np.flatnonzero(np.diff(bucket["cell"][order])) + 1):
            _join_cell(components, bucket, members, cosine, device)
    if cells is None or queries is None:
        return 1, None
    return len(cells.centres), PairsFound(len(queries.rows), pairs, found)


def _deal(dealt: Scratch, numbers: Ids, vectors: Halves, near: npt.NDArray[np.int32]) -> None:
    """Puts the rows into their own cells and, as guests, into those that they visit; `near` as _Cells.near gives it."""
    for place, cell in enumerate(near.T):
        goes = np.flatnonzero(cell >= 0)
        guest = np.full(len(goes), place > 0)
        chosen = _records(dealt.dtype, cell=cell[goes], guest=guest, row=numbers[goes], vector=vectors[goes])
        dealt.append(cell[goes] % dealt.buckets, chosen)


def cosines(left: Halves, right: Halves) -> npt.NDArray[np.float64]:
    """The cosine of each row of one matrix with the same row of the other, [n, D] each; 0 for a zero vector."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b))
    return np.einsum("nd,nd->n", a, b) / np.where(lengths > 0, lengths, 1)  # type: ignore[no-any-return]


def near_pairs(left: Halves, right: Halves, cosine: float, device: str = "cpu") -> tuple[Ids, Ids]:
    """Where in `left` [n, D] and `right` [m, D] the pairs of at least this cosine stand."""
    return _near_pairs(_unit(left, device), _unit(right, device), cosine, lambda a, b: cosines(left[a], right[b]))


def _near_pairs(
    left: "torch.Tensor", right: "torch.Tensor", cosine: float, exactly: Callable[[Ids, Ids], npt.NDArray[np.float64]]
) -> tuple[Ids, Ids]:
    products = left @ right.T
    a, b = _where(products >= cosine - _DOUBT)
    near = np.ones(len(a), bool)
    for chosen in _pieces(np.flatnonzero(products[a, b].cpu().numpy() < cosine + _DOUBT)):
        near[chosen] = exactly(a[chosen], b[chosen]) >= cosine - TOLERANCE
    return a[near], b[near]


def _where(mask: "torch.Tensor") -> tuple[Ids, Ids]:
    if mask.is_cuda:
        a, b = mask.nonzero(as_tuple=True)
        return a.cpu().numpy(), b.cpu().numpy()
    return np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])  # three times as fast as torch's own


def _pieces(places: Ids) -> Iterator[Ids]:
    return (places[start : start + _VERIFIED_ROWS] for start in range(0, len(places), _VERIFIED_ROWS))


def _unit(vectors: Halves, device: str) -> "torch.Tensor":
    import torch

    matrix = torch.from_numpy(np.ascontiguousarray(vectors)).to(device).float()
    return torch.nn.functional.normalize(matrix, dim=1)


def _join_cell(components: Components, bucket: Records, members: Ids, cosine: float, device: str) -> None:
    """Joins the near ones among those at home in a cell, and these with its guests, who come last in `members`.

    A crowd of alike rows is one component after its first block. From then on it is compared with others only, so that
    a million copies of one placeholder do not cost the square of a million.
    """
    rows, vectors = bucket["row"][members], bucket["vector"]
    rest, home = np.arange(len(members)), int((~bucket["guest"][members]).sum())
    whole = _unit(vectors[members], device) if len(members) <= _TILE[1] else None

    def unit(places: Ids) -> "torch.Tensor":
        return _unit(vectors[members[places]], device) if whole is None else whole[places]

    while home:
        roots = components.roots(rows[rest])
        by_root = np.argsort(roots[:home], kind="stable")
        rest[:home], roots[:home] = rest[by_root], roots[by_root]
        block = rest[: min(home, _TILE[0])]
        others = rest[roots != roots[0]] if roots[0] == roots[len(block) - 1] else rest
        left = unit(block)
        for start in range(0, len(others), _TILE[1]):
            tile = others[start : start + _TILE[1]]

            def exactly(a: Ids, b: Ids, block: Ids = block, tile: Ids = tile) -> npt.NDArray[np.float64]:
                return cosines(vectors[members[block[a]]], vectors[members[tile[b]]])

            a, b = _near_pairs(left, unit(tile), cosine, exactly)
            components.join(rows[block[a]], rows[tile[b]])
        rest, home = rest[len(block) :], home - len(block)


class _Cells:
    """Spherical k-means cells of unit vectors."""

    def __init__(self, centres: "torch.Tensor", cosine: float):
        self.centres = centres  # [k, D]
        self._reach = math.sqrt(max(0.0, 2 - 2 * cosine)) + 1e-3  # how far apart near rows are, at most

    def near(self, unit: "torch.Tensor") -> npt.NDArray[np.int32]:
        """The cell of each vector and up to 3 more to visit, int32 [n, 4]; -1 where a visit could find nothing.

        Near rows are at most `reach` apart, so whoever is further from the border of a cell has none in it.
        """
        import torch

        n_visited = min(_VISITED_CELLS, len(self.centres))
        found = torch.empty((len(unit), n_visited), dtype=torch.int64, device=unit.device)
        step = max(1, _SCORES // len(self.centres))
        for start in range(0, len(unit), step):
            block = unit[start : start + step]
            scores, cells = (block @ self.centres.T).topk(n_visited, dim=1)
            for place in range(1, n_visited):
                apart = (self.centres[cells[:, 0]] - self.centres[cells[:, place]]).norm(dim=1)
                cells[scores[:, 0] - scores[:, place] > self._reach * apart, place] = -1
            found[start : start + step] = cells
        return found.cpu().numpy().astype(np.int32)


class _Queries:
    """Some of the rows, compared with all, to tell which share of the near pairs meets in a cell."""

    def __init__(self, rows: Ids, unit: "torch.Tensor", cells: _Cells):
        self.rows = rows
        self._unit = unit
        self._near = cells.near(unit)

    def met(self, numbers: Ids, unit: "torch.Tensor", near: npt.NDArray[np.int32], cosine: float) -> tuple[int, int]:
        """Of the near pairs with these rows: how many there are, and in how many one visits the other's cell."""
        if not len(self.rows):
            return 0, 0
        a, b = _where(self._unit @ unit.T >= cosine)
        others = self.rows[a] != numbers[b]
        a, b = a[others], b[others]
        met = (self._near[a] == near[b, :1]).any(axis=1) | (near[b] == self._near[a, :1]).any(axis=1)
        return len(a), int(met.sum())


def _train(
    blocks: Iterable[tuple[Ids, Halves]], rows: int, cosine: float, seed: int, device: str
) -> tuple[_Cells, _Queries] | tuple[None, None]:
    """Cells trained on some of the rows, and other rows to measure them with; neither where vectors are few."""
    rng = np.random.default_rng(seed)
    sample, query_rows, queries, wanted = list[Halves](), list[Ids](), list[Halves](), 0.0
    for numbers, vectors in blocks:
        if not wanted:
            fitting = _TRAIN_BYTES // (10 * vectors.shape[1])  # in float16, in float32, and sorted by cell
            wanted = min(_TRAIN_PER_CELL * 2 * math.sqrt(rows), fitting, rows)
        drawn = rng.random(len(numbers))
        sample.append(vectors[drawn < wanted / rows])
        chosen = drawn > 1 - _QUERIES / rows
        query_rows.append(numbers[chosen])
        queries.append(vectors[chosen])
    n_cells = min(round(2 * math.sqrt(rows)), sum(map(len, sample)) // _MIN_TRAIN_PER_CELL)
    if n_cells < 2:
        return None, None
    vectors = np.concatenate(sample)
    cells = _Cells(_k_means(_unit(vectors, "cpu"), n_cells, rng, device), cosine)
    return cells, _Queries(np.concatenate(query_rows), _unit(np.concatenate(queries), device), cells)


def _k_means(unit: "torch.Tensor", n_cells: int, rng: np.random.Generator, device: str) -> "torch.Tensor":
    """Centres of unit length, [n_cells, D]. Means are summed on the CPU, where a sum always has the same order."""
    import torch

    centres = unit[torch.from_numpy(rng.choice(len(unit), n_cells, replace=False))].to(device)
    step = max(1, _SCORES // n_cells)
    for _ in range(_TRAIN_ROUNDS):
        parts = (unit[start : start + step].to(device) @ centres.T for start in range(0, len(unit), step))
        home = np.concatenate([scores.argmax(dim=1).cpu().numpy() for scores in parts])
        order = np.argsort(home, kind="stable")
        filled, starts = np.unique(home[order], return_index=True)
        sums = np.add.reduceat(unit.numpy()[order], starts, axis=0)
        centres[torch.from_numpy(filled).to(device)] = torch.from_numpy(sums).to(device)
        centres = torch.nn.functional.normalize(centres, dim=1)
    return centres
