"""Vectors stored by FAISS: types, training, adding, merging on disk, checking and reading, searching.

A `Shard` numbers its vectors 0, 1, ... in the order they were added. Its type is written like a FAISS factory string:

    [SVD128,] Flat | SQfp16 | SQ8 | SQ4 | IVF1264,<SQfp16 | SQ8 | PQ128x4fs | RaBitQ> [,Refine(SQfp16 | SQ8)]

`SVD` projects onto the leading directions of the second moment, not of the covariance as PCA does: inner products with
queries of the other modality are kept, and a random rotation spreads what is left evenly over the codes. Cells are
spherical k-means; from GRAPH_LISTS cells on they are found through an HNSW graph (IVF…_HNSW32). The refinement is a
flat file of its own, so that it can be longer than memory.

Everything is read memory-mapped. FAISS ends the process on some damaged files, so `check_file` comes first.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from fusion_core import files

faiss: Any = _faiss  # its own stubs know only a part of it

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_] | None  # which vectors are taken; None: all
Parameters = dict[str, int]  # nprobe: cells visited; k_factor: answers refined for each that is asked for

FAISS_VERSION: str = faiss.__version__

GRAPH_LISTS = 4096  # below this a flat search among the cells' centres is faster than a graph
TRAIN_PER_LIST = 39  # below this FAISS itself warns that cells are guesses
WIDER = 4  # times as many cells are visited where those visited hold too few vectors
LEGACY_FLAT = "IDMap2,Flat"  # written before 1.1, as was IVF…,SQfp16 with ids of its own

_METRIC = faiss.METRIC_INNER_PRODUCT
_KIND = re.compile(
    r"(?:SVD(?P<dims>\d+),)?(?:IVF(?P<lists>\d+)(?P<graph>_HNSW32)?,)?"
    r"(?P<codec>Flat|SQfp16|SQ8|SQ4|PQ(?P<m>\d+)x4fs|RaBitQ)(?:,Refine\((?P<refine>SQfp16|SQ8)\))?"
)
_SCALARS = {"SQfp16": faiss.ScalarQuantizer.QT_fp16, "SQ8": faiss.ScalarQuantizer.QT_8bit,
            "SQ4": faiss.ScalarQuantizer.QT_4bit}  # fmt: skip
_HEADER = struct.Struct("<4siqqqBi")  # fourcc, dim, vectors, two unused, is trained, metric
_INNER_PRODUCT = 0  # in that header
_EMPTY_LISTS = struct.Struct("<4sqq4sq")  # ilar, cells, bytes of a code, sprs, none of them filled


@dataclass(frozen=True)
class Kind:
    """A type of index, parsed."""

    text: str
    dims: int  # that vectors are projected to; 0: not projected
    lists: int  # cells; 0: none
    graph: bool
    codec: str
    refine: str

    @classmethod
    def parse(cls, text: str) -> "Kind":
        """The kind that a factory string names; raises ValueError for one that this release does not write or read."""
        if text == LEGACY_FLAT:
            return cls(text, 0, 0, False, "Flat", "")
        found = _KIND.fullmatch(text)
        ivf_only = found and (found["m"] or found["codec"] == "RaBitQ")
        if not found or (ivf_only and not found["lists"]) or (found["lists"] and found["codec"] == "Flat"):
            raise ValueError(f"an index type that this release does not read: {text!r}")
        codec = "PQ" if found["m"] else found["codec"]
        return cls(
            text, int(found["dims"] or 0), int(found["lists"] or 0), bool(found["graph"]), codec, found["refine"] or ""
        )

    def with_lists(self, lists: int) -> "Kind":
        """The same with another number of cells."""
        if not self.lists:
            return self
        graph = "_HNSW32" if lists >= GRAPH_LISTS else ""
        return self.parse(re.sub(r"IVF\d+(_HNSW32)?", f"IVF{lists}{graph}", self.text))

    @property
    def exact_scores(self) -> bool:
        """Whether scores are those of the vectors as the table stores them."""
        last = self.refine or self.codec
        return last in ("Flat", "SQfp16") and (bool(self.refine) or not self.dims)

    def bytes_per_vector(self, dim: int, rows: int = 0) -> float:
        """Of codes and the numbers that cells keep; with `rows`, also the share of cells' centres and projection, and
        of what fills each cell's last block of 32 where codes are looked up in blocks."""
        code = self._code_bytes(dim)
        own = code + (8 if self.lists else 0) + {"": 0, "SQ8": dim, "SQfp16": 2 * dim}[self.refine]
        filling = 16 * code * self.lists if self.codec == "PQ" else 0
        shared = 4 * ((self.dims or dim) * self.lists + self.dims * dim) + 300 * self.lists * self.graph + filling
        return own + (shared / rows if rows else 0)

    def _code_bytes(self, dim: int) -> int:
        d = self.dims or dim
        sub = int(match[1]) if (match := re.search(r"PQ(\d+)", self.text)) else 0
        return {
            "Flat": 4 * d, "SQfp16": 2 * d, "SQ8": d, "SQ4": (d + 1) // 2, "PQ": (sub + 1) // 2,
            "RaBitQ": (d + 7) // 8 + 8,
        }[self.codec]  # fmt: skip

    @property
    def fourcc(self) -> bytes:
        """How the file of such an index begins."""
        if self.text == LEGACY_FLAT:
            return b"IxM2"
        if self.dims:
            return b"IxPT"
        if not self.lists:
            return b"IxFI" if self.codec == "Flat" else b"IxSQ"
        return {"PQ": b"IwPf", "RaBitQ": b"Iwrq"}.get(self.codec, b"IwSq")


class Shard:
    """One index and its refinement; vectors are numbered in the order they were added."""

    def __init__(self, kind: Kind, base: Any, refine: Any = None):
        self.kind, self.base, self.refine = kind, base, refine
        self._whole = faiss.IndexRefine(base, refine) if refine is not None else base
        inner = faiss.downcast_index(base.index) if kind.dims else base
        self._ivf: Any = inner if kind.lists else None
        if kind.codec == "PQ":
            inner.fine_quantizer = inner.pq  # reading leaves it null, and to reconstruct then ends the process
        self._mapped = False

    @property
    def rows(self) -> int:
        """The number of vectors."""
        return int(self.base.ntotal)

    @property
    def dim(self) -> int:
        """Of the vectors that go in."""
        return int(self.base.d)

    def add(self, vectors: Floats) -> None:
        """Appends vectors [n, D]."""
        self.base.add(vectors)
        if self.refine is not None:
            self.refine.add(vectors)
            self._whole.ntotal = self.base.ntotal

    def empty_copy(self) -> "Shard":
        """An index trained like this one (which must be empty itself)."""
        return Shard(self.kind, faiss.clone_index(self.base), self.refine and faiss.clone_index(self.refine))

    def search(
        self, vectors: Floats, k: int, parameters: Parameters, selector: Any = None, widen: bool = True
    ) -> tuple[Floats, Ids]:
        """Scores and numbers [q, k] of the best, padded with -inf and -1; of those in `selector` where one is given.

        Where the visited cells hold fewer than `k`, more are visited, unless they are not to be (`widen`).
        """
        if not len(vectors) or not self.rows:
            return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
        nprobe = min(parameters.get("nprobe", 1), self.kind.lists)
        asked = min(k, self.rows)
        scores, ids = self._whole.search(
            vectors, asked, params=self._parameters(nprobe, parameters.get("k_factor", 1), selector)
        )
        short = ids[:, -1] < 0
        if widen and nprobe < self.kind.lists and short.any():
            more = {**parameters, "nprobe": WIDER * nprobe}
            scores[short], ids[short] = self.search(vectors[short], asked, more, selector)
        scores[ids < 0] = -np.inf
        padding = ((0, 0), (0, k - asked))
        return np.pad(scores, padding, constant_values=-np.inf), np.pad(ids, padding, constant_values=-1)

    def reconstruct(self, numbers: Ids) -> Floats:
        """The vectors [n, D] of these numbers, as exact as the index has them."""
        if not len(numbers):
            return np.empty((0, self.dim), np.float32)
        if self.refine is not None:
            found: Floats = self.refine.reconstruct_batch(numbers)
            return found
        if self._ivf is not None and not self._mapped:
            legacy = self.rows and self._largest_number() >= self.rows  # written before 1.1: not 0, 1, ...
            self._ivf.set_direct_map_type(faiss.DirectMap.Hashtable if legacy else faiss.DirectMap.Array)
            self._mapped = True
        found = self.base.reconstruct_batch(numbers)
        return found

    def _largest_number(self) -> int:
        lists, largest = self._ivf.invlists, -1
        for i in range(self.kind.lists):
            if size := lists.list_size(i):
                largest = max(largest, int(faiss.rev_swig_ptr(lists.get_ids(i), size).max()))
        return largest

    def _parameters(self, nprobe: int, k_factor: int, selector: Any) -> Any:
        options = {"sel": selector} if selector is not None else {}
        if self.kind.lists:
            cells = faiss.SearchParametersHNSW(efSearch=max(64, 2 * nprobe)) if self.kind.graph else None
            kind = faiss.IVFRaBitQSearchParameters if self.kind.codec == "RaBitQ" else faiss.SearchParametersIVF
            parameters = kind(nprobe=nprobe, quantizer_params=cells, **options)
            if self.kind.codec == "RaBitQ":
                parameters.qb = 8
        else:
            parameters = faiss.SearchParameters(**options)
        if self.kind.dims:
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        if self.refine is not None:
            parameters = faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=parameters)
        return parameters


def selector(numbers: Ids, rows: int) -> tuple[Any, Any]:
    """A FAISS selector of some of `rows` vectors, and the bitmap that must outlive it."""
    chosen = np.zeros(rows, bool)
    chosen[numbers] = True
    bitmap = np.packbits(chosen, bitorder="little")
    return faiss.IDSelectorBitmap(bitmap), bitmap


# --- training


def train(kind: Kind, vectors: Floats, seed: int, known: dict[tuple[int, int], Floats] | None = None) -> Shard:
    """An empty index trained on vectors [n, D]; the same vectors and seed give the same index.

    `known` keeps cells by (dimensions, number of them), so that several kinds share what takes long.
    """
    dim = vectors.shape[1]
    refine = _scalar(dim, kind.refine) if kind.refine else None
    if refine is not None and len(vectors):
        refine.train(vectors)
    if not kind.dims:
        return Shard(kind, _trained(kind, vectors, seed, {} if known is None else known), refine)
    projection = _projection(vectors, kind.dims, seed)
    inner = _trained(kind, projection.apply(vectors), seed, {} if known is None else known)
    base = faiss.IndexPreTransform(projection, inner)
    base.referenced_objects = [projection, inner]
    return Shard(kind, base, refine)


def _trained(kind: Kind, vectors: Floats, seed: int, known: dict[tuple[int, int], Floats]) -> Any:
    dim = vectors.shape[1]
    if not kind.lists:
        index = faiss.IndexFlatIP(dim) if kind.codec == "Flat" else _scalar(dim, kind.codec)
        if len(vectors):
            index.train(vectors)
        return index
    if (dim, kind.lists) not in known:
        known[dim, kind.lists] = _cells(vectors, kind.lists, seed)
    cells = faiss.IndexHNSWFlat(dim, 32, _METRIC) if kind.graph else faiss.IndexFlatIP(dim)
    with threads(1):  # a graph built by several threads differs from run to run
        cells.add(known[dim, kind.lists])
    if kind.codec == "PQ":
        index = faiss.IndexIVFPQFastScan(
            cells, dim, kind.lists, int(kind.text.split("PQ")[1].split("x")[0]), 4, _METRIC
        )
        index.by_residual = True  # FAISS leaves it out for inner products, and loses 0.05 of recall
        index.pq.cp.seed = seed
    elif kind.codec == "RaBitQ":
        index = faiss.IndexIVFRaBitQ(cells, dim, kind.lists, _METRIC)
    else:  # float16 as in the table, bit for bit: a residual would be rounded again
        index = faiss.IndexIVFScalarQuantizer(
            cells, dim, kind.lists, _SCALARS[kind.codec], _METRIC, kind.codec != "SQfp16"
        )
    cells.this.disown()
    index.own_fields = True
    index.cp.seed = seed
    index.train(vectors)  # the cells are there: only the codes are learned
    return index


def _scalar(dim: int, codec: str) -> Any:
    return faiss.IndexScalarQuantizer(dim, _SCALARS[codec], _METRIC)


def _cells(vectors: Floats, lists: int, seed: int) -> Floats:
    dim = vectors.shape[1]
    clustering = faiss.Clustering(dim, lists)
    clustering.spherical, clustering.seed, clustering.niter = True, seed, 10
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = 64
    clustering.train(np.ascontiguousarray(vectors), on_device(faiss.IndexFlatIP(dim)))
    centres: Floats = faiss.vector_to_array(clustering.centroids).reshape(lists, dim).copy()
    return centres


def _projection(vectors: Floats, dims: int, seed: int) -> Any:
    """Onto the leading eigenvectors of the second moment, then rotated at random."""
    _, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((dims, dims)))[0]
    matrix = (rotation @ directions[:, ::-1][:, :dims].T).astype(np.float32)
    projection = faiss.LinearTransform(vectors.shape[1], dims, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix).ravel(), projection.A)
    projection.is_trained = True
    projection.set_is_orthonormal()
    return projection


def on_device(index: Any) -> Any:
    """The same index in the memory of the GPUs, in float16, where there are any."""
    if not faiss.get_num_gpus():
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_all_gpus(index, options)


def exact(queries: Floats, vectors: Floats, k: int, gpu: bool = True) -> tuple[Floats, Ids]:
    """Scores and positions [q, min(k, n)] of the best of `vectors` [n, D] for each query; on a GPU if there is one."""
    k = min(k, len(vectors))
    if gpu and faiss.get_num_gpus():
        scores, ids = faiss.knn_gpu(faiss.StandardGpuResources(), queries, vectors, k, metric=_METRIC)
    else:
        scores, ids = faiss.knn(queries, vectors, k, metric=_METRIC)
    return scores, ids


def may_use_gpu(device: str) -> bool:
    """Whether exact search may run on a GPU, for auto, cpu or cuda; raises ValueError for what cannot be had."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is not auto, cpu or cuda: FAISS uses the first GPU that is visible")
    if device == "cuda" and not faiss.get_num_gpus():
        raise ValueError("device 'cuda': FAISS sees no GPU here; use --device cpu or auto")
    return device != "cpu"


def best(scores: Floats, ids: Ids, k: int) -> tuple[Floats, Ids]:
    """The `k` highest of each row, equal scores by id, absent ones (-1) last."""
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """FAISS uses so many threads for calls from this thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# --- files


def write(index: Any, pending: files.PendingFile) -> None:
    """Writes a FAISS index."""
    writer = faiss.PyCallbackIOWriter(pending.write, 1 << 20)
    faiss.write_index(index, writer)
    del writer  # hands over what it has buffered


def merge(empty: Any, pieces: Sequence[Any], kept: Sequence[Kept], pending: files.PendingFile) -> None:
    """Writes one index of the vectors of all pieces, in their order, as adding them to `empty` one by one would give.

    `empty` is the trained index that all pieces were made from. `kept` says which vectors of each piece are taken
    (None: all). Only packed codes (PQ…fs) are put together in memory.
    """
    inner = faiss.downcast_index(empty.index) if isinstance(empty, faiss.IndexPreTransform) else empty
    if isinstance(inner, faiss.IndexIVFPQFastScan):
        for piece, chosen in zip(pieces, kept, strict=True):
            # Copied one at a time: merging empties what it takes from, and a mapped file cannot be emptied.
            copy = faiss.deserialize_index(faiss.serialize_index(piece))
            if chosen is not None:
                _cut_packed(copy, chosen)
            empty.merge_from(copy, empty.ntotal)
        write(empty, pending)
        return
    sources = [faiss.downcast_index(piece.index) if inner is not empty else piece for piece in pieces]
    empty.ntotal = inner.ntotal = sum(map(_n_kept, sources, kept))
    head = faiss.serialize_index(empty).tobytes()
    if hasattr(inner, "nlist"):
        pending.write(head[: -_EMPTY_LISTS.size])
        _write_lists(inner, sources, kept, pending)
    else:
        code_bytes = inner.code_size
        unit = 4 if isinstance(inner, faiss.IndexFlat) else 1  # its length counts floats
        pending.write(head[:-8] + struct.pack("<q", inner.ntotal * code_bytes // unit))
        for source, chosen in zip(sources, kept, strict=True):
            for codes in _codes(source, chosen):
                pending.write(codes)


def _n_kept(piece: Any, chosen: Kept) -> int:
    return int(piece.ntotal if chosen is None else chosen.sum())


def _cut_packed(index: Any, chosen: npt.NDArray[np.bool_]) -> None:
    """Takes what is not chosen out of an index of packed codes; those that stay are numbered anew."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    leaving, bitmap = selector(np.flatnonzero(~chosen), len(chosen))
    inner.remove_ids(leaving)
    del bitmap
    index.ntotal = inner.ntotal
    numbers = np.cumsum(chosen) - 1
    for cell in range(inner.nlist):
        if size := inner.invlists.list_size(cell):
            ids = faiss.rev_swig_ptr(inner.invlists.get_ids(cell), size)
            ids[:] = numbers[ids]


def _codes(index: Any, chosen: Kept, block_rows: int = 1 << 14) -> Iterator[Any]:
    if not index.ntotal:
        return
    size = index.code_size  # in bytes; of a flat index the pointer counts bytes, too
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * size).view(np.uint8).reshape(-1, size)
    for start in range(0, len(codes), block_rows):
        block = codes[start : start + block_rows]
        yield np.ascontiguousarray(block if chosen is None else block[chosen[start : start + block_rows]])


def _write_lists(empty: Any, sources: Sequence[Any], kept: Sequence[Kept], pending: files.PendingFile) -> None:
    n_lists, code_bytes = empty.nlist, empty.invlists.code_size
    sizes = np.zeros((len(sources), n_lists), np.int64)
    for i, (piece, chosen) in enumerate(zip(sources, kept, strict=True)):
        sizes[i] = _list_sizes(piece, chosen, n_lists)
    total, filled = sizes.sum(axis=0), np.flatnonzero(sizes.sum(axis=0))
    pending.write(struct.pack("<4sqq", b"ilar", n_lists, code_bytes))
    if len(filled) > n_lists // 2:
        pending.write(struct.pack("<4sq", b"full", n_lists) + total.tobytes())
    else:
        pending.write(struct.pack("<4sq", b"sprs", 2 * len(filled)) + np.stack([filled, total[filled]], 1).tobytes())
    firsts = np.cumsum([0, *map(_n_kept, sources, kept)])
    numbers = [None if chosen is None else np.cumsum(chosen) - 1 for chosen in kept]
    for cell in map(int, filled):
        here = [(i, piece.invlists) for i, piece in enumerate(sources) if sizes[i, cell]]
        for i, lists in here:
            size = lists.list_size(cell)
            codes = lists.get_codes(cell)
            found = faiss.rev_swig_ptr(codes, size * code_bytes)
            if (chosen := kept[i]) is not None:
                found = found.reshape(size, code_bytes)[chosen[_list_ids(lists, cell)]]
            pending.write(found)
            lists.release_codes(cell, codes)
        for i, lists in here:
            ids, chosen, mine = _list_ids(lists, cell), kept[i], numbers[i]
            if chosen is not None and mine is not None:
                ids = mine[ids[chosen[ids]]]
            pending.write(ids + firsts[i])


def _list_sizes(index: Any, chosen: Kept, n_lists: int) -> Ids:
    lists = index.invlists
    if chosen is None:
        return np.array([lists.list_size(cell) for cell in range(n_lists)], np.int64)
    return np.array([int(chosen[_list_ids(lists, cell)].sum()) for cell in range(n_lists)], np.int64)


def _list_ids(lists: Any, cell: int) -> Ids:
    size = lists.list_size(cell)
    if not size:
        return np.empty(0, np.int64)
    ids = lists.get_ids(cell)
    found: Ids = faiss.rev_swig_ptr(ids, size).copy()
    lists.release_ids(cell, ids)
    return found


def check_file(path: str, fourcc: bytes, dim: int, rows: int, least_bytes: float, lists: int = 0) -> str:
    """What is wrong with a file that should begin as such an index; empty where nothing is."""
    with files.open_input(path) as stream:
        head = stream.read(_HEADER.size + 8)
        size = stream.seek(0, 2)
    if len(head) < _HEADER.size + 8 or size < least_bytes:
        return f"is too short for {rows} vectors"
    found = _HEADER.unpack(head[: _HEADER.size])
    if (found[0], found[1], found[2], found[6]) != (fourcc, dim, rows, _INNER_PRODUCT) or found[5] != 1:
        return (
            f"begins as {found[0]!r}, {found[1]} dimensions, {found[2]} vectors, metric {found[6]}; index.json says "
            f"{fourcc!r}, {dim}, {rows}, {_INNER_PRODUCT}"
        )
    if lists and fourcc != b"IxPT" and struct.unpack("<q", head[_HEADER.size :])[0] != lists:
        return f"has another number of cells than {lists}"
    return ""


def check_shard(kind: Kind, dim: int, rows: int, path: str, refine_path: str = "") -> str:
    """What is wrong with the files of a shard, by their beginnings and sizes; empty where nothing is."""
    d, refine_bytes = kind.dims or dim, {"": 0, "SQ8": dim, "SQfp16": 2 * dim}[kind.refine]
    base_bytes = kind.bytes_per_vector(dim) - refine_bytes
    if kind.text == LEGACY_FLAT:
        base_bytes += 8
    wrong = check_file(path, kind.fourcc, dim, rows, rows * base_bytes + 4 * d * kind.lists, kind.lists)
    if wrong or not refine_path:
        return wrong and f"{path} {wrong}"
    wrong = check_file(refine_path, b"IxSQ", dim, rows, rows * refine_bytes)
    return wrong and f"{refine_path} {wrong}"


def read(path: str, kind: Kind | None = None, writable: bool = False) -> Any:
    """The FAISS index in a local file that was checked, memory-mapped unless it is to be `writable`.

    Raises ValueError for one that FAISS cannot read.
    """
    legacy = kind is not None and kind.text == LEGACY_FLAT
    try:
        return faiss.read_index(path, 0 if legacy or writable else faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:  # it believes the lengths in a damaged file
        raise ValueError(f"{path} cannot be read by FAISS {faiss.__version__}") from error
