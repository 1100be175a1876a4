"""The training feed: a feature table as batches of tensors, for training on frozen embeddings.

An epoch is one order of the rows, decided by (seed, epoch): row groups in shuffled order form a stream, which is cut
into batches; each reader (a rank's loader worker) has a run of them, and shuffles rows within buffers of that run. So
every row comes exactly once, whatever the number of readers, and a position is a number of batches.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import IterableDataset, get_worker_info

from fusion_core import files
from fusion_core.table import to_numpy
from schemas import records
from schemas.errors import TableError
from schemas.feature_table import ROW_GROUP_ROWS

if TYPE_CHECKING:
    from fusion_core.table import Table

Batch = dict[str, torch.Tensor | list[Any]]
Ids = npt.NDArray[np.int64]

ID = "id"  # the row's position in manifest order: what Table.take asks for and an index answers with
_READERS = 4  # row groups read at once


@dataclass(frozen=True)
class _Piece:
    """Rows start…stop of a row group, which stand at `at` in a buffer."""

    group: int
    start: int
    stop: int
    at: int


class Feed(IterableDataset[Batch]):
    """Batches of a table's rows: {column: tensor or list}; give it to a DataLoader with `batch_size=None`.

    Embeddings are float16 tensors [n, D]; numbers and flags tensors [n], an absent float being NaN and an absent
    integer -1; strings and bytes lists of n, None where absent. `id` may be asked for beside the table's columns.

    Batches have `batch_rows` rows, the epoch's last one the rest. Ranks differ by one batch at most; with `drop_last`
    all have the same number of full batches, as DistributedDataParallel needs: fewer than world_size * batch_rows rows,
    others in each epoch, are then left out. Memory is that of two buffers of `buffer_rows` rows, in each loader worker.

    It resumes mid-epoch by itself under torchdata's StatefulDataLoader (`state_dict` and `load_state_dict` of the
    loader, with or without workers), and under a plain DataLoader by its own `state_dict`.

    With a table on an object store, start loader workers with multiprocessing_context="spawn".
    Raises TableError for a column that is not there, and ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        table: "Table",
        columns: Sequence[str] | None = None,
        batch_rows: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        buffer_rows: int = 8 * ROW_GROUP_ROWS,
    ):
        super().__init__()
        if batch_rows < 1 or buffer_rows < 1:
            raise ValueError(f"batch_rows {batch_rows} and buffer_rows {buffer_rows} must be at least 1")
        if seed < 0:
            raise ValueError(f"a seed is a whole number from 0, not {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of 0…{world_size - 1} (world_size {world_size})")
        flags = ["has_image", "has_text"]
        self.columns = list(columns if columns is not None else [*table.embedding_columns, *flags])
        known = [*table.schema.names, ID]
        if missing := [name for name in self.columns if name not in known]:
            raise TableError(f"{table.place} has no column {missing[0]!r}; it has {', '.join(known)}")
        self.batch_rows, self.shuffle, self.seed = batch_rows, shuffle, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._block_batches = max(1, buffer_rows // batch_rows)
        self._schema = pa.schema([table.schema.field(name) for name in self.columns if name != ID])
        self._place, self._paths = table.place, [part.path for part in table.parts]
        rows = np.array([part.rows for part in table.parts], np.int64)
        self._part, self._number, self._rows, self._first = _row_groups(rows)
        self._batches = int(rows.sum()) // batch_rows if drop_last else -(-int(rows.sum()) // batch_rows)
        if drop_last:
            self._batches -= self._batches % world_size
        order = [batch_rows, self._block_batches, shuffle, seed, rank, world_size, drop_last]
        self._fingerprint = records.fingerprint([order, [part.sha256 for part in table.parts]])
        # workers that live on see the next epoch
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._resumed: dict[str, Any] = {}
        self._taken, self._reader = 0, (0, 1)

    def __len__(self) -> int:
        """The number of batches of this rank in an epoch."""
        start, stop = _share(0, self._batches, self.rank, self.world_size)
        return stop - start

    @property
    def epoch(self) -> int:
        """Which order of the rows comes next, or is coming."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; without it each pass repeats the last. Drops a position in another."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._resumed, self._taken = {}, 0

    def state_dict(self, batches: int | None = None, workers: int = 0) -> dict[str, Any]:
        """The position, for load_state_dict; JSON types only.

        Without arguments it is that of the pass in this process: exact where no loader workers are used, and in each
        worker, for a loader that asks its workers. A plain DataLoader's workers read ahead in processes of
        their own: say there how many `batches` of this epoch came from the loader, and its number of `workers`.
        """
        state = {"fingerprint": self._fingerprint, "epoch": self.epoch}
        if batches is not None:
            if not 0 <= batches <= len(self):
                raise ValueError(f"{batches} batches of an epoch that has {len(self)}")
            return state | {"batches": batches, "reader": -1, "readers": max(1, workers)}
        if self._resumed:
            return dict(self._resumed)
        return state | {"batches": self._taken, "reader": self._reader[0], "readers": self._reader[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on behind a position. Raises ValueError if it was taken on other rows or in another order.

        The number of loader workers must be as it was; this is checked when the pass begins.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "this position belongs to another feed: the table's parts, batch_rows, buffer_rows, shuffle, seed, "
                "rank, world_size and drop_last must be those it was taken with"
            )
        self._epoch.fill_(state["epoch"])
        self._resumed = dict(state)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this reader, from the loaded position on."""
        worker = get_worker_info()
        index, readers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = _share(0, self._batches, self.rank, self.world_size)
        runs = [_share(*mine, reader, readers) for reader in range(readers)]
        reader, self._taken = self._resume(index, [last - first for first, last in runs])
        self._reader = (reader, readers)
        return self._pass(self.epoch, *runs[reader])

    # --- the order

    def _resume(self, index: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Which run of batches the index-th reader takes up, and how many of them are done. Uses up the position."""
        state, self._resumed = self._resumed, {}
        if not state or state["epoch"] != self.epoch:
            return index, 0
        readers = len(sizes)
        if state["readers"] != readers or (state["reader"] not in (-1, index)):
            raise ValueError(
                f"this position was taken with {state['readers']} readers; here are {readers}: use as many loader "
                "workers (none counts as one)"
            )
        if state["reader"] >= 0:
            return index, int(state["batches"])
        done = _dealt(sizes, state["batches"])
        turn = min(range(readers), key=lambda reader: (done[reader] >= sizes[reader], done[reader], reader))
        reader = (
            turn + index
        ) % readers  # a new loader begins with its first worker: it takes the one whose turn it is
        return reader, done[reader]

    def _order(self, epoch: int) -> Ids:
        """The row groups in the epoch's order."""
        groups = np.arange(len(self._rows))
        return np.random.default_rng([self.seed, epoch]).permutation(groups) if self.shuffle else groups

    def _pass(self, epoch: int, first: int, last: int) -> Iterator[Batch]:
        """Batches first…last of the epoch's stream, without those that were taken."""
        order = self._order(epoch)
        ends = np.cumsum(self._rows[order])
        done, total = self._taken, int(ends[-1]) if len(ends) else 0
        blocks = range(first, last, self._block_batches)
        skipped = min(done // self._block_batches, len(blocks))
        taken = done - skipped * self._block_batches
        bounds = [
            (start * self.batch_rows, min(total, min(start + self._block_batches, last) * self.batch_rows))
            for start in blocks[skipped:]
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            ahead = self._read(pool, order, ends, *bounds[0]) if bounds else None
            for number, (start, stop) in enumerate(bounds):
                assert ahead is not None
                block, waiting = ahead
                for future in waiting:
                    future.result()
                if number + 1 < len(bounds):
                    ahead = self._read(pool, order, ends, *bounds[number + 1])
                rows: Ids = np.arange(stop - start)
                if self.shuffle:
                    rows = np.random.default_rng([self.seed, epoch, start]).permutation(rows)
                for at in range(taken * self.batch_rows, stop - start, self.batch_rows):
                    self._taken += 1
                    yield block.batch(self.columns, rows[at : at + self.batch_rows])
                taken = 0

    # --- reading

    def _read(
        self, pool: ThreadPoolExecutor, order: Ids, ends: Ids, start: int, stop: int
    ) -> tuple["_Block", list[Future[None]]]:
        """The rows start…stop of the stream, as a block that is being filled."""
        block, pieces = _Block(self._schema, stop - start), []
        for place in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop)) + 1):
            group = int(order[place])
            begin = int(ends[place] - self._rows[group])  # where the group's rows begin in the stream
            low, high = max(start, begin), min(stop, int(ends[place]))
            pieces.append(_Piece(group, low - begin, high - begin, low - start))
        pieces.sort(key=lambda piece: piece.group)
        by_part = groupby(pieces, key=lambda piece: int(self._part[piece.group]))
        return block, [pool.submit(self._fill, block, part, list(found)) for part, found in by_part]

    def _fill(self, block: "_Block", part: int, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            first = int(self._first[piece.group]) + piece.start
            block.ids[piece.at : piece.at + piece.stop - piece.start] = np.arange(
                first, first + piece.stop - piece.start
            )
        if not self._schema.names:
            return
        path = self._paths[part]
        with files.open_input(files.join(self._place, path)) as stream, pq.ParquetFile(stream) as source:
            for piece in pieces:
                number, rows = int(self._number[piece.group]), int(self._rows[piece.group])
                if number >= source.num_row_groups or source.metadata.row_group(number).num_rows != rows:
                    raise TableError(f"{self._place}: {path} is not the part that was recorded: run `fusion verify`")
                found = source.read_row_group(number, columns=self._schema.names, use_threads=False)
                block.put(piece.at, found.slice(piece.start, piece.stop - piece.start))


class _Block:
    """A buffer of rows: matrices and vectors in numpy, strings in Arrow."""

    def __init__(self, schema: pa.Schema, rows: int):
        self.ids: Ids = np.empty(rows, np.int64)
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._strings: dict[str, dict[int, pa.Array]] = {}
        for field in schema:
            if pa.types.is_fixed_size_list(field.type):
                self._arrays[field.name] = np.empty((rows, field.type.list_size), np.float16)
            elif pa.types.is_primitive(field.type):
                self._arrays[field.name] = np.empty(rows, field.type.to_pandas_dtype())
            else:
                self._strings[field.name] = {}

    def put(self, at: int, found: pa.Table) -> None:
        """Rows of one row group, which stand from `at` on."""
        for name in found.column_names:
            column = found[name].combine_chunks()
            if name in self._strings:
                self._strings[name][at] = column
            else:
                self._arrays[name][at : at + len(column)] = _numbers(column)

    def batch(self, columns: Sequence[str], rows: Ids) -> Batch:
        """The rows at these places of the buffer: one gather for each column."""
        found: Batch = {}
        for name in columns:
            if name in self._strings:
                pieces = [array for _, array in sorted(self._strings[name].items())]
                found[name] = pa.chunked_array(pieces).take(pa.array(rows)).to_pylist()
            else:
                found[name] = torch.from_numpy((self.ids if name == ID else self._arrays[name])[rows])
        return found


def _numbers(column: pa.Array) -> npt.NDArray[Any]:
    """Vectors [n, D] as a view; scalars [n], an absent float as NaN, an absent integer as -1."""
    if pa.types.is_fixed_size_list(column.type):
        return to_numpy(column)
    if column.null_count and pa.types.is_integer(column.type):
        column = pc.fill_null(column, -1)
    found: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found


def _row_groups(rows: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Of each row group of parts of so many rows: its part, its number there, its rows, the position of its first."""
    counts = -(-rows // ROW_GROUP_ROWS)
    part = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    own = np.minimum(ROW_GROUP_ROWS, rows[part] - number * ROW_GROUP_ROWS)
    return part, number, own, np.cumsum(own) - own


def _share(start: int, stop: int, index: int, of: int) -> tuple[int, int]:
    """The index-th of so many runs of start…stop, alike in length up to one."""
    size = stop - start
    return start + size * index // of, start + size * (index + 1) // of


def _dealt(sizes: Sequence[int], batches: int) -> list[int]:
    """How many came from each worker when a DataLoader gave so many: in turns, passing over those that have ended."""
    given = [0] * len(sizes)
    levels = sorted({0, *sizes})
    for low, high in pairwise(levels):
        going = [index for index, size in enumerate(sizes) if size >= high]
        turns = min(batches, (high - low) * len(going))
        for place, index in enumerate(going):
            given[index] += turns // len(going) + (place < turns % len(going))
        batches -= turns
    return given
