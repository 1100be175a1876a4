"""Shards of an index as files: their columns and exact answers written beside the vectors, several merged into one.

Where parts have left the table, merging takes their rows out: nothing is computed anew, and what is written is what
adding only the rest would give.
"""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core import files, index, vectors
from fusion_core.table import Table
from fusion_core.vectors import Floats, Ids, Kept
from schemas.feature_table import Part
from schemas.index import STORED_META, IndexShard

TRUTH_K = 32  # exact answers kept for each query: more than are asked for, so that rows can leave
_META_BATCH_ROWS = 65_536
_FEWER = 4  # a shard is merged with what is new unless it is larger by this: so shards stay few, and large ones stand

Truth = dict[str, tuple[Floats, Ids]]  # by kind of query: scores and ids [q, TRUTH_K], -inf and -1 where not known


class Source:
    """A shard that stands, and which of its rows are still the table's."""

    def __init__(self, shard: IndexShard, part_rows: Mapping[str, int], live: Collection[str]):
        """`part_rows`: of all its parts by their paths; `live`: parts of the table."""
        self.shard = shard
        self.parts = tuple(part for part in shard.parts if part in live)
        self._alive = [part in live for part in shard.parts]
        self._part_rows = [part_rows[part] for part in shard.parts]
        self.rows = sum(rows for rows, alive in zip(self._part_rows, self._alive, strict=True) if alive)

    @property
    def is_whole(self) -> bool:
        """Whether all its rows are."""
        return all(self._alive)

    @property
    def size_bytes(self) -> int:
        """About what the shard takes without the others."""
        return self.shard.size_bytes * self.rows // max(1, self.shard.rows)

    def rows_kept(self) -> Kept:
        """Which rows of the shard are the table's; None: all."""
        return None if self.is_whole else np.repeat(self._alive, self._part_rows)


def groups(standing: Sequence[Source], new: Sequence[Source], max_bytes: int) -> list[list[Source]]:
    """What is to be one shard each, of at most `max_bytes`; there is at least one.

    What is new is merged with shards of not many more rows, the fewest first. So at most as many shards stand as the
    index has powers of _FEWER (and multiples of `max_bytes`), and a byte is rarely written again.
    """
    joined: list[Source] = []
    rows = sum(source.rows for source in new)
    for source in sorted(standing, key=lambda source: source.rows) if new else ():
        if source.rows > _FEWER * rows or 2 * source.size_bytes > max_bytes:
            break
        joined.append(source)
        rows += source.rows
    found = [[source] for source in standing if source not in joined]
    size = max_bytes + 1
    for source in (*(source for source in standing if source in joined), *new):
        size += source.size_bytes
        if size > max_bytes:
            found.append([])
            size = source.size_bytes
        found[-1].append(source)
    return found or [[]]


def merge(place: str, trained: vectors.Shard, group: Sequence[Source], scratch: str) -> IndexShard:
    """One shard of all in the group, in their order, without the rows that left, published in the index's folder.

    `trained` is the empty index that all were made from, read anew for each merge: it does not stay empty.
    """
    held = [_numbers(place, source.shard, scratch) for source in group]
    alive = [source.rows_kept() for source in group]
    kept = [None if rows is None else rows[numbers] for rows, numbers in zip(alive, held, strict=True)]
    counts = [source.shard.vectors.rows if some is None else int(some.sum())
              for source, some in zip(group, kept, strict=True)]  # fmt: skip

    def merged(name: str, parts: Sequence[Part | None], empty: Any) -> Part:
        sources = [vectors.read(_local(place, part, scratch)) for part in parts if part]
        with files.PendingFile(place) as pending:
            vectors.merge(empty, sources, kept, pending)
            return publish(pending, name, "faiss", sum(counts))

    rows = sum(source.rows for source in group)
    return IndexShard(
        tuple(part for source in group for part in source.parts),
        rows,
        merged("vectors", [source.shard.vectors for source in group], trained.base),
        merged("refine", [source.shard.refine for source in group], trained.refine)
        if trained.refine is not None
        else None,
        _merge_numbers(place, group, held, alive, kept) if sum(counts) < rows else None,
        _merge_truths(place, group, kept, counts, scratch) if group else None,
        _merge_meta(place, group, alive, scratch),
        sum(source.shard.rows_cut + source.shard.rows - source.rows for source in group),
    )


def _local(place: str, part: Part, scratch: str) -> str:
    return index.checked_file(place, part, False, scratch)


# --- row numbers


def _numbers(place: str, shard: IndexShard, scratch: str) -> npt.NDArray[np.uint32]:
    """The row within the concatenated parts for each vector."""
    if shard.row_numbers is None:
        return np.arange(shard.rows, dtype=np.uint32)
    found: npt.NDArray[np.uint32] = np.load(_local(place, shard.row_numbers, scratch), "r", allow_pickle=False)
    return found


def vectors_by_part(
    place: str, shard: IndexShard, part_rows: Mapping[str, int], scratch: str
) -> Iterator[tuple[str, int]]:
    """How many vectors a shard holds of each of its parts."""
    numbers = _numbers(place, shard, scratch)
    ends = np.cumsum([part_rows[part] for part in shard.parts], dtype=np.int64)
    places = np.searchsorted(numbers, ends)
    yield from zip(shard.parts, np.diff(places, prepend=0).tolist(), strict=True)


def _merge_numbers(
    place: str,
    group: Sequence[Source],
    held: Sequence[npt.NDArray[np.uint32]],
    alive: Sequence[Kept],
    kept: Sequence[Kept],
) -> Part:
    found, first = [], 0
    for source, numbers, rows, some in zip(group, held, alive, kept, strict=True):
        if rows is not None:
            numbers = (np.cumsum(rows, dtype=np.uint32) - np.uint32(1))[numbers[some]]
        found.append(numbers + np.uint32(first))
        first += source.rows
    return publish_numbers(place, found)


# --- exact answers


def read_truth(place: str, shard: IndexShard, scratch: str) -> Truth:
    """The exact best of one shard, by their numbers in it."""
    if shard.truth is None:
        return {}
    with np.load(_local(place, shard.truth, scratch), allow_pickle=False) as held:
        names = [name.removesuffix("_ids") for name in held.files if name.endswith("_ids")]
        return {name: (held[f"{name}_scores"], held[f"{name}_ids"]) for name in names}


def join_truths(found: Sequence[tuple[Floats, Ids]], rows: Sequence[int]) -> tuple[Floats, Ids]:
    """The best of several lists, each the best of so many vectors, as far down as all of them are known.

    A list that has fewer entries than there are vectors says nothing of what scores below its last entry.
    """
    floors = []
    for (scores, ids), n in zip(found, rows, strict=True):
        known = (ids >= 0).sum(axis=1)
        last = np.where(known > 0, scores[np.arange(len(known)), np.maximum(known, 1) - 1], np.inf)
        floors.append(np.where(known < n, last, -np.inf))
    all_scores, all_ids = np.hstack([scores for scores, _ in found]), np.hstack([ids for _, ids in found])
    scores, ids = vectors.best(all_scores, all_ids, TRUTH_K)
    unknown = scores < np.max(floors, axis=0)[:, None]
    return np.where(unknown, np.float32(-np.inf), scores), np.where(unknown, -1, ids)


def _merge_truths(
    place: str, group: Sequence[Source], kept: Sequence[Kept], counts: Sequence[int], scratch: str
) -> Part:
    found = [read_truth(place, source.shard, scratch) for source in group]
    firsts = np.cumsum([0, *counts])
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in found[0]:
        lists = []
        for truth, some, first in zip(found, kept, firsts, strict=False):
            scores, ids = truth[name]
            if some is not None:
                numbers = np.append(np.where(some, np.cumsum(some) - 1, -1), -1)  # the last is that of -1
                ids = numbers[ids]
                scores, ids = vectors.best(np.where(ids < 0, np.float32(-np.inf), scores), ids, ids.shape[1])
            lists.append((scores, np.where(ids < 0, -1, ids + first)))
        arrays[f"{name}_scores"], arrays[f"{name}_ids"] = join_truths(lists, counts)
    return publish_arrays(place, "truth", arrays, sum(counts))


# --- columns


def write_meta(place: str, table: Table) -> Part:
    """The columns that results show, of all rows of a table (or of some records of one)."""
    return _publish_meta(place, table.scan(STORED_META.names), table.num_rows)


def _merge_meta(place: str, group: Sequence[Source], alive: Sequence[Kept], scratch: str) -> Part:
    def batches() -> Iterator[pa.RecordBatch]:
        for source, rows in zip(group, alive, strict=True):
            assert source.shard.meta is not None
            start = 0
            for batch in index.read_meta(_local(place, source.shard.meta, scratch), source.shard.rows):
                mask = None if rows is None else rows[start : start + batch.num_rows]
                start += batch.num_rows
                yield batch if mask is None else batch.filter(pa.array(mask))

    return _publish_meta(place, batches(), sum(source.rows for source in group))


def _publish_meta(place: str, batches: Iterable[pa.RecordBatch], rows: int) -> Part:
    written = 0
    with files.PendingFile(place) as pending:
        with pa.ipc.new_file(pa.PythonFile(pending, "w"), STORED_META) as writer:
            for batch in _of_equal_size(batches, _META_BATCH_ROWS):
                columns = [batch.column(name) for name in STORED_META.names]
                writer.write_batch(pa.record_batch(columns, schema=STORED_META))
                written += batch.num_rows
        if written != rows:
            raise ValueError(f"{place}: {written} rows were read where the table's manifest counts {rows}")
        return publish(pending, "meta", "arrow", rows)


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


# --- files


def publish(pending: files.PendingFile, name: str, suffix: str, rows: int) -> Part:
    """Makes what was written visible, with its hash in its name."""
    part = Part(f"{name}-{pending.sha256[:8]}.{suffix}", rows, pending.size_bytes, pending.sha256)
    pending.publish(part.path)
    return part


def publish_index(folder: str, name: str, faiss_index: Any) -> Part:
    """A FAISS index as a file."""
    with files.PendingFile(folder) as pending:
        vectors.write(faiss_index, pending)
        return publish(pending, name, "faiss", faiss_index.ntotal)


def publish_arrays(folder: str, name: str, arrays: Mapping[str, npt.NDArray[Any]], rows: int) -> Part:
    """Some arrays as one file (npz)."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    with files.PendingFile(folder) as pending:
        pending.write(stream.getvalue())
        return publish(pending, name, "npz", rows)


def publish_numbers(folder: str, pieces: Sequence[npt.NDArray[np.uint32]]) -> Part:
    """Row numbers, in this order, as one file (npy)."""
    rows = sum(map(len, pieces))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<u4", "fortran_order": False, "shape": (rows,)})
    with files.PendingFile(folder) as pending:
        pending.write(head.getvalue())
        for piece in pieces:
            pending.write(np.ascontiguousarray(piece))
        return publish(pending, "rows", "npy", rows)
