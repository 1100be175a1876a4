"""The training feed: every row once, in an order that the seed decides, from any position on."""

import itertools
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fusion_core import feed as feed_module
from fusion_core import manifest, table, writer
from fusion_core.feed import Feed
from fusion_core.writer import UnitWriter
from schemas.errors import TableError
from tests.corpora import SPEC, toy_batch, toy_unit, toy_vectors

SIZES = (30, 1, 64, 17, 8, 100, 3)
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterable[table.Table]:
    """A table of seven parts in row groups of 16 rows, so that few rows make many row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "ROW_GROUP_ROWS", 16)
        patch.setattr(writer, "ROW_GROUP_ROWS", 16)
        patch.setattr(feed_module, "ROW_GROUP_ROWS", 16)
        place, start = tmp_path_factory.mktemp("feed"), 0
        manifest.claim(str(place), SPEC)
        for number, size in enumerate(SIZES):
            rows = list(range(start, start + size))
            extra = {
                "caption": [f"caption {row}" if row % 3 else None for row in rows],
                "width": [row if row % 5 else None for row in rows],
                "similarity": pa.array([row / 10 if row % 4 else None for row in rows], pa.float32()),
                "has_text": [bool(row % 3) for row in rows],
            }
            unit = toy_unit(f"unit-{number:012d}", f"/data/{number}.tar", start=0)
            batch = toy_batch(rows, row=list(range(size)), **extra)
            with UnitWriter(str(place), SPEC, unit) as out:
                out.write(batch)
                out.commit()
            start += size
        yield table.Table.open(str(place))


def ids(batches: Iterable[Any]) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: Iterable[Any]) -> list[int]:
    return list(itertools.chain.from_iterable(ids(batches)))


def readers(make: Any, workers: int) -> list[list[list[int]]]:
    """What each of a loader's workers would give, in this process."""
    found = []
    for worker in range(workers):
        with pytest.MonkeyPatch.context() as patch:
            info = type("Info", (), {"id": worker, "num_workers": workers})
            patch.setattr(feed_module, "get_worker_info", lambda info=info: info)
            found.append(ids(make()))
    return found


def round_robin(runs: list[list[list[int]]]) -> list[list[int]]:
    """The order in which a DataLoader hands over what its workers make."""
    rounds = itertools.zip_longest(*runs)
    return [batch for turn in rounds for batch in turn if batch is not None]


def test_what_comes_is_what_the_table_holds(small: table.Table) -> None:
    columns = ["id", "image_embedding", "width", "similarity", "has_text", "caption", "sha256", "text_embedding"]
    rows = pa.Table.from_batches(small.scan()).to_pandas()
    seen: list[int] = []
    for batch in small.torch(columns, seed=3, batch_rows=10, buffer_rows=50):
        at = batch["id"].tolist()
        seen += at
        for name in ("image_embedding", "text_embedding"):
            assert batch[name].dtype == torch.float16
            np.testing.assert_array_equal(batch[name].numpy(), toy_vectors(range(TOTAL), 16, name)[at])
        assert batch["width"].tolist() == [row if row % 5 else -1 for row in at]
        assert batch["width"].dtype == torch.int32
        expected = np.array([row / 10 if row % 4 else np.nan for row in at], np.float32)
        np.testing.assert_array_equal(batch["similarity"].numpy(), expected)
        assert batch["has_text"].dtype == torch.bool
        assert batch["has_text"].tolist() == rows["has_text"][at].tolist()
        assert batch["caption"] == [f"caption {row}" if row % 3 else None for row in at]
        assert batch["sha256"] == [None] * len(at)
        assert list(batch) == columns
    assert sorted(seen) == list(range(TOTAL))
    assert set(next(iter(small.torch()))) == {"image_embedding", "text_embedding", "has_image", "has_text"}


@settings(max_examples=25, deadline=None)
@given(
    batch_rows=st.integers(1, 70), buffer_rows=st.integers(1, 300), world=st.integers(1, 5), workers=st.integers(1, 4),
    shuffle=st.booleans(), seed=st.integers(0, 3), epoch=st.integers(0, 2), drop_last=st.booleans(),
)  # fmt: skip
def test_every_row_comes_once_over_ranks_and_workers(
    small: table.Table, batch_rows: int, buffer_rows: int, world: int, workers: int, shuffle: bool, seed: int,
    epoch: int, drop_last: bool,
) -> None:  # fmt: skip
    def make(rank: int) -> Feed:
        feed = Feed(small, ["id"], batch_rows, shuffle, seed, rank, world, drop_last, buffer_rows)
        feed.set_epoch(epoch)
        return feed

    batches = []
    for rank in range(world):
        given_by_rank = round_robin(readers(lambda rank=rank: make(rank), workers))
        assert len(given_by_rank) == len(make(rank))
        batches += given_by_rank
    rows = list(itertools.chain.from_iterable(batches))
    assert len(rows) == len(set(rows))
    lengths = [len(make(rank)) for rank in range(world)]
    if drop_last:
        assert len(set(lengths)) == 1
        assert {len(batch) for batch in batches} <= {batch_rows}
        assert TOTAL - len(rows) < world * batch_rows
    else:
        assert sorted(rows) == list(range(TOTAL))
        assert max(lengths) - min(lengths) <= 1
        assert sorted(len(batch) for batch in batches)[1:] == [batch_rows] * (len(batches) - 1)


@settings(max_examples=30, deadline=None)
@given(
    batch_rows=st.integers(1, 40), buffer_rows=st.integers(1, 120), workers=st.integers(1, 4), share=st.floats(0, 1),
    rank=st.integers(0, 1),
)  # fmt: skip
def test_from_any_position_the_rest_comes_as_it_would_have(
    small: table.Table, batch_rows: int, buffer_rows: int, workers: int, share: float, rank: int
) -> None:
    def make() -> Feed:
        feed = Feed(small, ["id"], batch_rows, seed=5, rank=rank, world_size=2, buffer_rows=buffer_rows)
        feed.set_epoch(2)
        return feed

    whole = round_robin(readers(make, workers))
    taken = int(share * len(whole))
    state = json.loads(json.dumps(make().state_dict(taken, workers)))

    def resumed() -> Feed:
        feed = Feed(small, ["id"], batch_rows, seed=5, rank=rank, world_size=2, buffer_rows=buffer_rows)
        feed.load_state_dict(state)
        assert feed.epoch == 2
        return feed

    runs = readers(resumed, workers)
    assert round_robin(runs) == whole[taken:]
    if workers == 1:
        feed = make()
        walk = iter(feed)
        assert ids(itertools.islice(walk, taken)) == whole[:taken]
        own = feed.state_dict()
        assert ids(walk) == whole[taken:]
        again = make()
        again.load_state_dict(own)
        assert again.state_dict() == own
        assert ids(again) == whole[taken:]
        assert ids(again) == whole  # the position is used up


class _Worker:
    """A loader's worker as torchdata's StatefulDataLoader runs it: it asks its own copy for the state after a batch."""

    def __init__(self, feed: Feed, index: int, of: int, state: dict[str, Any] | None = None):
        self.feed, self._info = pickle.loads(pickle.dumps(feed)), type("Info", (), {"id": index, "num_workers": of})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed_module, "get_worker_info", lambda: self._info if of else None)
            if state is not None:
                self.feed.load_state_dict(json.loads(json.dumps(state)))
            self._walk = iter(self.feed)
        self.state = self.feed.state_dict()

    def next(self) -> list[int] | None:
        batch = next(self._walk, None)
        self.state = self.feed.state_dict()
        return None if batch is None else batch["id"].tolist()


def dealt(workers: Sequence[_Worker], batches: int, turn: int = 0) -> tuple[list[list[int]], int]:
    """At most so many batches in the loader's turns, and whose turn is next."""
    found, ended = list[list[int]](), set[int]()
    while len(found) < batches and len(ended) < len(workers):
        batch = None if turn in ended else workers[turn].next()
        found += [batch] if batch is not None else []
        ended |= {turn} if batch is None else set()
        turn = (turn + 1) % len(workers)
    return found, turn


@settings(max_examples=30, deadline=None)
@given(
    batch_rows=st.integers(5, 40), buffer_rows=st.integers(1, 120), workers=st.integers(0, 3), share=st.floats(0, 1),
    epoch=st.integers(0, 2), ahead=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)  # fmt: skip
def test_each_worker_goes_on_from_the_state_it_gave(
    small: table.Table, batch_rows: int, buffer_rows: int, workers: int, share: float, epoch: int, ahead: list[int]
) -> None:
    def start(states: Sequence[dict[str, Any] | None], epoch: int) -> list[_Worker]:
        feed = small.torch(["id"], seed=5, batch_rows=batch_rows, buffer_rows=buffer_rows)
        feed.set_epoch(epoch)
        return [_Worker(feed, index, workers, state) for index, state in enumerate(states)]

    nothing = [None] * max(1, workers)
    whole, _ = dealt(start(nothing, epoch), TOTAL)
    assert sorted(itertools.chain.from_iterable(whole)) == list(range(TOTAL))
    first = start(nothing, epoch)
    taken, turn = dealt(first, int(share * len(whole)))
    states = [worker.state for worker in first]
    for worker, more in zip(first, ahead, strict=False):  # what is made ahead of the snapshot does not count
        for _ in range(more):
            worker.next()
    rest, _ = dealt(start(states, 0), TOTAL, turn)  # the position brings its epoch along
    assert taken + rest == whole


def test_the_order_is_decided_by_seed_and_epoch_and_mixes(small: table.Table) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        feed = small.torch(["id"], shuffle, seed, batch_rows=20, buffer_rows=64)
        feed.set_epoch(epoch)
        return flat(feed)

    assert order(1, 0) == order(1, 0)
    orders = [order(seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert order(1, 0, shuffle=False) == list(range(TOTAL))
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(orders[0]))
    assert neighbours < TOTAL / 8
    groups = [row // 16 for row in orders[0][:20]]  # a first batch holds rows of several row groups
    assert len(set(groups)) > 2


def test_a_loader_with_workers_gives_every_row_in_every_epoch_and_goes_on(small: table.Table) -> None:
    feed = small.torch(["id", "image_embedding"], seed=4, batch_rows=20, buffer_rows=40)
    loader = DataLoader(feed, batch_size=None, num_workers=2, persistent_workers=True)
    first = ids(loader)
    feed.set_epoch(1)
    second = ids(loader)
    assert len(first) == len(loader) == len(feed) == 12
    assert first != second
    for found in (first, second):
        assert sorted(itertools.chain.from_iterable(found)) == list(range(TOTAL))
    other = pickle.loads(pickle.dumps(small.torch(["id"], seed=4, batch_rows=20, buffer_rows=40)))
    other.load_state_dict(feed.state_dict(5, workers=2))
    assert ids(DataLoader(other, batch_size=None, num_workers=2)) == second[5:]


def test_a_position_of_something_else_is_refused(small: table.Table) -> None:
    state = small.torch(["id"], batch_rows=10).state_dict(3, workers=2)
    with pytest.raises(ValueError, match="belongs to another feed"):
        small.torch(["id"], batch_rows=11).load_state_dict(state)
    feed = small.torch(["id", "caption"], batch_rows=10)  # other columns are the same rows
    feed.load_state_dict(state)
    with pytest.raises(ValueError, match="taken with 2 readers; here are 1"):
        iter(feed)
    with pytest.raises(ValueError, match="99 batches of an epoch that has 23"):
        feed.state_dict(99)


def test_wrong_requests_are_named(small: table.Table, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no column 'nope'"):
        small.torch(["nope"])
    with pytest.raises(ValueError, match="rank 2 is not one of 0…1"):
        small.torch(rank=2, world_size=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        small.torch(batch_rows=0)
    with pytest.raises(ValueError, match="a seed is a whole number from 0, not -1"):
        small.torch(seed=-1)
    manifest.claim(str(tmp_path), SPEC)
    empty = table.Table.open(str(tmp_path)).torch()
    assert (len(empty), list(empty)) == (0, [])
