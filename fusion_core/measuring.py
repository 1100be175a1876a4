"""What an index finds, measured with the queries that were held out from its training; parameters tuned to a target.

Exact answers are kept beside each shard (merge.py), so that measuring searches the index but never the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_core import choose, index, vectors
from fusion_core.choose import NEARLY, RECALL_K, Queries
from fusion_core.index import Rows, Shards
from fusion_core.merge import Truth, join_truths
from fusion_core.vectors import Floats, Ids, Kind, Parameters, Shard
from schemas.index import Recall

_JUDGED_AT_ONCE = 1024


@dataclass(frozen=True)
class Measured:
    """Search parameters, the recall of each kind of query with them, and what one query takes."""

    parameters: Parameters
    recalls: tuple[Recall, ...]
    latency_ms: dict[str, float]
    is_tuned: bool  # else the parameters that were given do still

    def reaches(self, target: float) -> bool:
        """Whether every kind of query finds what it should."""
        return all(found.recall >= target for found in self.recalls)


def measure(
    kind: Kind,
    shards: Sequence[tuple[Shard, Rows]],
    truths: Sequence[Truth],
    queries: Sequence[Queries],
    starts: dict[str, tuple[int, int]],
    target: float,
    before: Measured | None = None,
) -> Measured:
    """Parameters that reach the target (those of `before` if they do), the recall they give, and their speed.

    `truths` are of the shards; `starts` (index.part_starts) says where the parts stand that queries were drawn from.
    Queries whose own row has left the table are passed over, and those of whose answers too many have.
    """
    whole = Shards(shards[0][0].dim, shards)
    search = _Search(kind, whole, [one for one in (_asked(q, shards, truths, starts) for q in queries) if one])
    if not search.asked:
        return Measured({}, (), {}, False)
    parameters, tuned = (before.parameters, False) if before else ({}, True)
    if before and not _as_good(search.recalls(parameters), before, search, target):
        found = choose.raised(kind, search.recalls, parameters, target) if before.reaches(target) else None
        parameters, tuned = found or {}, True
    if tuned and not parameters:
        parameters = choose.tune(kind, search.recalls, lambda p: float(np.median(search.microseconds(p))), target)
    recalls = tuple(
        Recall(asked.name, RECALL_K, len(asked.vectors), round(value, 4))
        for asked, value in zip(search.asked, search.recalls(parameters), strict=True)
    )
    times = search.microseconds(parameters)
    latency = {f"p{q}": round(float(np.percentile(times, q)) / 1e3, 3) for q in (50, 99)}
    return Measured(parameters, recalls, latency, tuned)


def _as_good(recalls: Sequence[float], before: Measured, search: "_Search", target: float) -> bool:
    """Whether these reach the target or, where it could not be reached before, nearly what was."""
    known = {found.queries: found.recall for found in before.recalls}
    goals = [min(target, known[asked.name] - NEARLY) if not before.reaches(target) else target
             for asked in search.asked if asked.name in known]  # fmt: skip
    return len(goals) == len(recalls) and all(value >= goal for value, goal in zip(recalls, goals, strict=True))


@dataclass(frozen=True)
class _Asked:
    """Queries of one kind [q, D], the ids of their own rows, and the true answers without these."""

    name: str
    vectors: Floats
    own: Ids
    truth: tuple[Floats, Ids]


def _asked(
    queries: Queries,
    shards: Sequence[tuple[Shard, Rows]],
    truths: Sequence[Truth],
    starts: dict[str, tuple[int, int]],
) -> _Asked | None:
    """The queries that can be measured; None where there are none.

    A caption's own picture is its easiest answer, and not one that a user's text has.
    """
    own = own_rows(queries, starts)
    found, rows = [], []
    for (shard, places), truth in zip(shards, truths, strict=True):
        if shard.rows:
            scores, numbers = truth[queries.name]
            found.append((scores, places.ids(numbers)))
            rows.append(shard.rows)
    if not found:
        return None
    scores, ids = without(own, *join_truths(found, rows))
    most = np.minimum(RECALL_K, sum(rows) - np.isin(own, _indexed(own, shards)))
    chosen = np.flatnonzero((own >= 0) & ((ids >= 0).sum(axis=1) >= most) & (ids[:, 0] >= 0))
    if not len(chosen):
        return None
    return _Asked(queries.name, queries.vectors[chosen], own[chosen], (scores[chosen], ids[chosen]))


def _indexed(ids: Ids, shards: Sequence[tuple[Shard, Rows]]) -> Ids:
    return np.concatenate([ids[places.numbers(ids)[0]] for _, places in shards])


def own_rows(queries: Queries, starts: dict[str, tuple[int, int]]) -> Ids:
    """The id of the row that each query was drawn from; -2 where its part is not the table's any more."""
    return np.array(
        [starts[part][0] + row if part in starts else -2
         for part, row in zip(queries.parts.tolist(), queries.rows.tolist(), strict=True)], np.int64,
    )  # fmt: skip


def without(own: Ids, scores: Floats, ids: Ids) -> tuple[Floats, Ids]:
    """The best RECALL_K but for each query's own row."""
    mine = ids == own[:, None]
    return vectors.best(np.where(mine, np.float32(-np.inf), scores), np.where(mine, -1, ids), RECALL_K)


class _Search:
    """The whole index, asked."""

    def __init__(self, kind: Kind, whole: Shards, asked: Sequence[_Asked]):
        self.asked = asked
        self._kind, self._whole = kind, whole
        self._stored = {}
        if not kind.exact_scores:
            for one in asked:
                ids = one.truth[1]
                self._stored[one.name] = whole.reconstruct(ids.reshape(-1)).reshape(*ids.shape, whole.dim)

    def recalls(self, parameters: Parameters) -> list[float]:
        """Of each kind of query."""
        found, k = [], min(RECALL_K + 1, self._whole.rows)
        for one in self.asked:
            scores, ids = without(one.own, *self._whole.search(one.vectors, k, parameters))
            if not self._kind.exact_scores:
                scores = _judged(self._whole, ids, one.truth[1], self._stored[one.name])
            found.append(index.recall(scores, ids, *one.truth, RECALL_K))
        return found

    def microseconds(self, parameters: Parameters) -> npt.NDArray[np.float64]:
        """Of single queries on one thread."""
        k = min(RECALL_K, self._whole.rows)
        return choose.microseconds(lambda query: self._whole.search(query, k, parameters), self.asked[0].vectors)


def _judged(whole: Shards, ids: Ids, truth: Ids, stored: Floats) -> Floats:
    """Scores that say only what is right: the true best, and what the index cannot tell from one of them.

    Its own scores are of lossy codes. Of identical vectors the codes are identical, so `stored` (what the index has of
    the true best, [q, k, D]) is found again.
    """
    right = (ids[:, :, None] == truth[:, None, :]).any(axis=2)
    query, place = np.nonzero(~right & (ids >= 0))
    for some in np.array_split(np.arange(len(query)), -(-len(query) // _JUDGED_AT_ONCE) or 1):
        found = whole.reconstruct(ids[query[some], place[some]])
        theirs = stored[query[some]]
        apart = (found**2).sum(1)[:, None] + (theirs**2).sum(2) - 2 * np.einsum("nd,nkd->nk", found, theirs)
        right[query[some], place[some]] = (apart < 1e-6).any(axis=1)
    return np.where(right & (ids >= 0), np.float32(np.inf), np.float32(-np.inf))
