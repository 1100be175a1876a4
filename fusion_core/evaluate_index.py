"""An index, measured on its table: what it finds of what exact search finds, what that takes, and what it weighs.

Queries are rows of the table, drawn anew: not those that the index was tuned with. What is right is decided by the
vectors as the table stores them, in one pass over it, block by block: memory is that of a block and of the answers.
"""

import hashlib
import math
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_core import choose, files, index_page, vectors
from fusion_core import index as indexes
from fusion_core import table as tables
from fusion_core.choose import RECALL_K
from fusion_core.clock import Clock
from fusion_core.index import RECORD, SCORE_TOLERANCE, BadIndex, Index
from fusion_core.table import Table
from fusion_core.vectors import Floats, Ids, Kind
from schemas import records
from schemas.errors import TableError
from schemas.index import Recall
from schemas.index_evaluation import Claim, IndexEvaluation, Latency, MeasuredRecall, Retrieval, Setting

QUERIES = 1_000
KS = (1, 2, 5, 10, 20, 50, 100)
CONCURRENT = (1, 32)
ALLOWED = 0.01  # that a reported recall may be off

_DEEPEST = KS[-1] + 1  # a query's own row does not count
_FEWEST_NEW = 100  # queries: fewer say little, so that rows which tuned the index are taken too
_TIMED, _TIMED_SECONDS = 2_000, 10.0
_RESAMPLES = 1_000
_SIGMAS = 1.96  # of 95 in 100
_BINS = 40
_AT_ONCE = 4_096  # pairs of vectors that are compared together
_TIMED_ROUNDS = 3
_MOST_REFINED = 1_000
_FACTORS = (0.125, 0.25, 0.5, 2, 4)  # by which a stored parameter is varied

Answers = tuple[Floats, Ids]  # scores and ids [q, k], falling, padded with -inf and -1
Truth = npt.NDArray[np.bool_]


@dataclass
class _Asked:
    """The queries of one kind, and their answers."""

    name: str
    own: Ids  # [q] the rows they were drawn from
    vectors: Floats  # [q, D]
    exact: Answers
    found: dict[int, Answers] = field(default_factory=dict)  # by k: the index's best k + 1


def run(
    place: str,
    table_place: str = "",
    output: str = "",
    queries: int = QUERIES,
    seed: int = 0,
    gpu: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> IndexEvaluation:
    """Evaluates the index at `place`; writes eval.json and eval.html to `output`, or else into the index's folder.

    `table_place`: where its table lies now. Raises BadIndex and TableError, before any work.
    """
    index = Index.open(place)
    table, rows_since = open_table(index, table_place)
    output = files.absolute(output or place)
    with files.PendingFile(output):
        pass  # a place that cannot be written to should be known before the work, not after
    found = evaluate(index, table, queries, seed, gpu, log, rows_since)
    files.write_bytes(output, "eval.json", records.to_json(found, indent=2))
    files.write_bytes(output, "eval.html", index_page.render(found).encode())
    return found


def open_table(index: Index, place: str = "") -> tuple[Table, int]:
    """Of the index's table the rows that the index is of, and how many others there are: they came later.

    `place`: where the table lies now. Raises BadIndex where it is another table, or lost parts since.
    """
    record = index.record
    try:
        table = Table.open(place or record.table)
    except TableError as error:
        if place:
            raise
        raise BadIndex(
            f"{index.place} was built from {record.table}, where no table can be opened now ({error}): if it was "
            "moved, say where to with --table"
        ) from error
    ours = {(part.path, part.sha256) for part in record.parts}
    held = tuple(item for item in table.records if item.features and (item.features.path, item.features.sha256) in ours)
    known = replace(table, records=held)
    index.check_table(known if len(held) == len(ours) else table)
    return known, table.num_rows - known.num_rows


def evaluate(
    index: Index,
    table: Table,
    queries: int = QUERIES,
    seed: int = 0,
    gpu: bool = True,
    log: Callable[[str], None] = lambda line: None,
    rows_since: int = 0,
) -> IndexEvaluation:
    """The index measured on `table` with at most `queries` of its rows, of each kind, as queries.

    `gpu`: exact search may run there. Raises BadIndex for an index without vectors, or of another table.
    """
    index.check_table(table)
    record, clock = index.record, Clock(log, "eval")
    if not record.rows_indexed:
        raise BadIndex(
            f"{index.place} holds no vectors, as none of the {record.rows_table:,} rows has {record.column}: there is "
            "nothing to measure"
        )
    notes = [f"{rows_since:,} rows came to the table after the index was built and are left out"] if rows_since else []
    with clock.stage("draw"):
        asked, are_new = _draw(index, table, queries, seed, notes)
    with clock.stage("search"):
        for one in asked:
            one.found = {k: index.search(one.vectors, k + 1) for k in KS}
        varied = _vary(index, asked)
    with clock.stage("exact"):
        pairs = _Pairs(asked, record.rows_table, [answers for _, answers in varied])
        _search_exactly(table, record.column, asked, gpu, pairs)
    measured = _recalls(asked, pairs, seed)
    with clock.stage("partners"):
        retrievals = [item for one in asked if (item := _retrieval(index, table, one, pairs, gpu))]
    with clock.stage("latency"):
        latencies = [_latency(index, asked[0].vectors, concurrent) for concurrent in CONCURRENT]
    return IndexEvaluation(
        index=index.place,
        index_sha256=files.sha256(files.join(index.place, RECORD)),
        table=table.place,
        rows_table=record.rows_table,
        rows_indexed=record.rows_indexed,
        rows_since=rows_since,
        column=record.column,
        dim=record.dim,
        factory=record.factory,
        parameters=record.parameters,
        target_recall=record.target_recall,
        bytes_files=sum(part.size_bytes for part in record.files),
        bytes_vectors=record.size_bytes,
        shards=max(1, len(record.shards)),
        build_seconds=record.seconds,
        seed=seed,
        queries_are_new=are_new,
        notes=tuple(notes),
        recalls=tuple(measured),
        claims=tuple(claim for reported in record.recalls for claim in _claims(reported, measured)),
        retrievals=tuple(retrievals),
        latencies=tuple(latencies),
        settings=tuple(_judged(setting, asked, answers, pairs) for setting, answers in varied),
        cores=_cores(),
        faiss_version=vectors.FAISS_VERSION,
        seconds=clock.seconds,
        evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# --- queries


def _draw(index: Index, table: Table, wanted: int, seed: int, notes: list[str]) -> tuple[list[_Asked], bool | None]:
    """Queries of each kind that there are, of the same rows as far as these have both; whether none tuned the index."""
    tuned = _tuned(index)
    asked, are_new = [], None if tuned is None else True
    for name in choose.kinds_of_query(table.spec, index.record.column):
        column = f"{name}_embedding"

        def draw(without: Ids | None, column: str = column) -> tuple[Ids, npt.NDArray[np.float16]]:
            # Another stream than the build's, which would choose the same row groups of a large table.
            return choose.draw(table, column, wanted, np.random.default_rng((seed, 1)), without)

        own, matrix = draw(tuned)
        if tuned is not None and len(own) < min(wanted, _FEWEST_NEW):
            own, matrix = draw(None)
            if np.isin(own, tuned).any():
                are_new = False
        if not len(own):
            notes.append(f"no row has {column}: there are no {name} queries")
            continue
        if len(own) < wanted:
            notes.append(f"{len(own):,} {name} queries instead of {wanted:,}: there are no more rows to draw from")
        nothing = np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
        asked.append(_Asked(name, own, matrix.astype(np.float32), nothing))
    if are_new is False:
        notes.append("the table is too small for queries that the index was not tuned with")
    if are_new is None:
        notes.append("the index does not record which rows it was tuned with: some of them may be queries")
    return asked, are_new


def _tuned(index: Index) -> Ids | None:
    """The rows whose vectors tuned the index; None where it does not say."""
    training, record = index.record.training, index.record
    if training is None:
        return None
    starts = indexes.part_starts(record.parts)
    found = [np.empty(0, np.int64)]
    folder: Any = nullcontext("") if files.is_local(index.place) else tempfile.TemporaryDirectory(prefix="fusion-eval-")
    with folder as scratch:
        path = indexes.checked_file(index.place, training.queries, True, scratch)
        try:
            with np.load(path, allow_pickle=False) as held:
                for name in choose.kinds_of_query(record.table_spec, record.column):
                    parts, rows = held[f"{name}_parts"].astype(str).tolist(), held[f"{name}_rows"].tolist()
                    here = [starts[part][0] + row for part, row in zip(parts, rows, strict=True) if part in starts]
                    found.append(np.array(here, np.int64))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise BadIndex(f"{path} holds no queries of {index.place}: build the index anew") from error
    return np.unique(np.concatenate(found))


# --- recall


class _Pairs:
    """What the answers to all queries truly score, by the vectors that the table stores."""

    def __init__(self, asked: Sequence[_Asked], rows: int, more: Iterable[Sequence[Answers]]):
        """`more`: answers beside those in `asked`, of each kind in its order."""
        self._rows = rows
        self._firsts = dict(
            zip((one.name for one in asked), np.cumsum([0, *(len(one.own) for one in asked)]), strict=False)
        )
        keys = [self._keys(one.name, ids) for one in asked for _, ids in one.found.values()]
        keys += [self._keys(one.name, ids) for each in more for one, (_, ids) in zip(asked, each, strict=True)]
        found = np.unique(np.concatenate([key.reshape(-1) for key in keys]))
        self._known = found[found >= 0]
        self._by_row = np.argsort(self._known % rows, kind="stable")
        self._row = (self._known % rows)[self._by_row]
        self._scores = np.full(len(self._known), -np.inf, np.float32)

    def _keys(self, name: str, ids: Ids) -> Ids:
        """One number [q, k] for each pair of a query and a row; -1 stays -1."""
        query = self._firsts[name] + np.arange(len(ids))
        keys: Ids = np.where(ids < 0, -1, query[:, None] * self._rows + ids)
        return keys

    def see(self, queries: Floats, rows: Ids, block: Floats) -> None:
        """Takes in the vectors of these rows (ascending); `queries` are those of all kinds, one below the other."""
        start, stop = np.searchsorted(self._row, [rows[0], rows[-1] + 1])
        for first in range(start, stop, _AT_ONCE):
            here = slice(first, min(first + _AT_ONCE, stop))
            places, pair = np.searchsorted(rows, self._row[here]), self._by_row[here]
            self._scores[pair] = np.einsum("nd,nd->n", queries[self._known[pair] // self._rows], block[places])

    def scores(self, name: str, ids: Ids) -> Floats:
        """Of these answers [q, k] to the queries of a kind; -inf for padding."""
        keys = self._keys(name, ids)
        places = np.minimum(np.searchsorted(self._known, keys), max(0, len(self._known) - 1))
        return np.where(keys < 0, np.float32(-np.inf), self._scores[places])


def _search_exactly(table: Table, column: str, asked: Sequence[_Asked], gpu: bool, pairs: _Pairs | None = None) -> None:
    """Sets `exact` of all queries, in one pass over the column; and the scores of `pairs`."""
    queries = np.concatenate([one.vectors for one in asked])
    scores = np.full((len(queries), _DEEPEST), -np.inf, np.float32)
    ids = np.full((len(queries), _DEEPEST), -1, np.int64)
    for rows, block in indexes.blocks(table, column):
        found, places = vectors.exact(queries, block, _DEEPEST, gpu)
        scores, ids = vectors.best(np.hstack([scores, found]), np.hstack([ids, rows[places]]), _DEEPEST)
        if pairs:
            pairs.see(queries, rows, block)
    cuts = np.cumsum([len(one.own) for one in asked])[:-1]
    for one, their_scores, their_ids in zip(asked, np.split(scores, cuts), np.split(ids, cuts), strict=True):
        one.exact = their_scores, their_ids


def _without_own(own: Ids, answers: Answers, k: int) -> Answers:
    """The best `k` that are not the query's own row."""
    scores, ids = answers
    order = np.argsort(ids == own[:, None], axis=1, kind="stable")[:, :k]
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    mine = ids == own[:, None]
    return np.where(mine, np.float32(-np.inf), scores), np.where(mine, -1, ids)


def _right(one: _Asked, answers: Answers, pairs: _Pairs, k: int) -> tuple[Ids, Ids]:
    """How many of the best `k` each query was given, and how many there are."""
    _, ids = _without_own(one.own, answers, k)
    return indexes.right_answers(pairs.scores(one.name, ids), ids, *_without_own(one.own, one.exact, k), k)


def _recalls(asked: Sequence[_Asked], pairs: _Pairs, seed: int) -> list[MeasuredRecall]:
    measured = []
    for one in asked:
        for k in KS:
            right, wanted = _right(one, one.found[k], pairs, k)
            right, wanted = right[wanted > 0], wanted[wanted > 0]
            if len(wanted):
                recall = float(right.sum() / wanted.sum())
                low, high = _interval(right, wanted, seed)
                measured.append(MeasuredRecall(one.name, k, len(wanted), round(recall, 4), low, high))
    return measured


def _interval(right: Ids, wanted: Ids, seed: int) -> tuple[float, float]:
    """Where the recall lies in 95 of 100 cases, by drawing the queries again (bootstrap).

    Where all queries fare alike that says nothing, and Wilson's interval of so many queries is given.
    """
    n, rng = len(right), np.random.default_rng(seed)
    shares = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(n, size=n)
        shares.append(right[drawn].sum() / wanted[drawn].sum())
    low, high = np.percentile(shares, [2.5, 97.5])
    if low == high:
        share, z2 = float(right.sum() / wanted.sum()), _SIGMAS**2
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = _SIGMAS / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    return round(float(low), 4), round(float(high), 4)


def _claims(reported: Recall, measured: Sequence[MeasuredRecall]) -> Iterable[Claim]:
    """The reported recall beside the measured one of the same queries and k, where there is one."""
    for now in measured:
        if (now.queries, now.k) != (reported.queries, reported.k):
            continue
        deviation = (now.high - now.low) / (2 * _SIGMAS)
        theirs = deviation * math.sqrt(now.n_queries / max(1, reported.n_queries))
        difference, half = now.recall - reported.recall, _SIGMAS * math.hypot(deviation, theirs)
        holds = abs(difference) <= ALLOWED + 1e-9
        by_chance = difference - half <= ALLOWED and difference + half >= -ALLOWED
        low, high = round(difference - half, 4), round(difference + half, 4)
        yield Claim(reported, now.recall, round(difference, 4), low, high, holds or (None if by_chance else False))


# --- parameters


def _vary(index: Index, asked: Sequence[_Asked]) -> list[tuple[Setting, list[Answers]]]:
    """The stored parameters first, then others around them, with the best RECALL_K + 1 that each gives."""
    kind, stored = Kind.parse(index.record.factory), index.record.parameters
    tried = [(index, Setting(stored, {}, math.inf))]
    for name, most in (("nprobe", kind.lists), ("k_factor", _MOST_REFINED if kind.refine else 0)):
        value = stored.get(name, 1)
        others = {min(max(1, round(value * factor)), most) for factor in _FACTORS} - {value, 0}
        tried += [
            (index.retuned(**{name: other}), Setting({**stored, name: other}, {}, math.inf, name))
            for other in sorted(others)
        ]
    for _ in range(_TIMED_ROUNDS):  # in turns, so that a busy moment of the machine does not fall on one setting
        for number, (retuned, setting) in enumerate(tried):
            taken = choose.microseconds(partial(retuned.search, k=RECALL_K), asked[0].vectors)
            tried[number] = (
                retuned,
                replace(setting, p50_ms=min(setting.p50_ms, round(float(np.median(taken)) / 1e3, 4))),
            )
    return [(setting, [retuned.search(one.vectors, RECALL_K + 1) for one in asked]) for retuned, setting in tried]


def _judged(setting: Setting, asked: Sequence[_Asked], answers: Sequence[Answers], pairs: _Pairs) -> Setting:
    recalls = {}
    for one, found in zip(asked, answers, strict=True):
        right, wanted = _right(one, found, pairs, RECALL_K)
        if wanted.any():
            recalls[one.name] = round(float(right.sum() / wanted.sum()), 4)
    return replace(setting, recalls=recalls)


# --- partners: a caption's picture, a picture's caption


def _retrieval(index: Index, table: Table, one: _Asked, pairs: _Pairs, gpu: bool) -> Retrieval | None:
    """How often a query's own row is among the best k; None where the rows have no partner of another kind.

    Rows of the same picture (equal sha256) or vector as the own one count as it. Whatever else scores as high stands
    before it.
    """
    column = index.record.column
    if one.name == "fused":
        return None
    if column == f"{one.name}_embedding":
        column = "text_embedding" if one.name == "image" else "image_embedding"
    partners = _matrix(table, column, one.own)
    kept = np.flatnonzero(partners.any(axis=1))
    if not len(kept):
        return None
    by_index = column == index.record.column
    some = replace(one, own=one.own[kept], vectors=one.vectors[kept])
    if by_index:
        some.exact = one.exact[0][kept], one.exact[1][kept]
    else:
        _search_exactly(table, column, [some], gpu)
    found = {k: (scores[kept], ids[kept]) for k, (scores, ids) in one.found.items()} if by_index else {}
    # Only rows that score as the own one does can have its vector.
    own_scores = np.einsum("qd,qd->q", some.vectors, partners[kept].astype(np.float32))[:, None]
    truly = [some.exact, *((pairs.scores(one.name, ids)[kept], ids[kept]) for _, ids in one.found.values() if by_index)]
    tied = [ids[(np.abs(scores - own_scores) <= SCORE_TOLERANCE) & (ids >= 0)] for scores, ids in truly]
    same = _Same(index, table, column, some.own, [ids for _, ids in truly], tied)
    exact = {k: _share_found(some.exact, same, k) for k in KS}
    indexed = {k: _share_found(answers, same, k) for k, answers in found.items()} if by_index else None
    return Retrieval(one.name, column.removesuffix("_embedding"), len(kept), exact, indexed)


def _share_found(answers: Answers, same: "_Same", k: int) -> float:
    scores, ids = answers
    mine = same(ids)
    best = np.where(mine, scores, -np.inf).max(axis=1, keepdims=True)
    before = ((scores >= best - SCORE_TOLERANCE) & ~mine & (ids >= 0)).sum(axis=1)
    return round(float((mine.any(axis=1) & (before < k)).mean()), 4)


class _Same:
    """Which answers are as good as the query's own row: of the same picture, or the same vector."""

    def __init__(self, index: Index, table: Table, column: str, own: Ids, answers: Sequence[Ids], tied: Sequence[Ids]):
        """`tied`: those of the answers whose vectors are worth a look."""
        self._own = own
        found = np.unique(np.concatenate([own, *(ids.reshape(-1) for ids in answers)]))
        self._ids = found[found >= 0]
        hashes = index.meta(self._ids)["sha256"].combine_chunks().dictionary_encode()
        self._picture = hashes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        self._vector = np.full(len(self._ids), -1, np.int64)  # rows of one vector have one number
        numbers: dict[bytes, int] = {}
        looked_at = np.unique(np.concatenate([own, *tied]))
        for start in range(0, len(looked_at), _AT_ONCE):
            some = looked_at[start : start + _AT_ONCE]
            digests = [hashlib.blake2b(row.tobytes()).digest() for row in _matrix(table, column, some)]
            self._vector[np.searchsorted(self._ids, some)] = [
                numbers.setdefault(each, len(numbers)) for each in digests
            ]

    def __call__(self, ids: Ids) -> Truth:
        """For answers [q, k] to the queries, in their order."""
        own, places = (np.searchsorted(self._ids, np.maximum(of, self._ids[0])) for of in (self._own[:, None], ids))
        picture = (self._picture[places] == self._picture[own]) & (self._picture[own] >= 0)
        same: Truth = (ids >= 0) & (picture | (self._vector[places] == self._vector[own]))
        return same


def _matrix(table: Table, column: str, ids: Ids) -> npt.NDArray[np.float16]:
    """The vectors [n, D] of these rows, as stored."""
    taken: npt.NDArray[np.float16] = tables.to_numpy(table.take(ids.tolist(), [column])[column].combine_chunks())
    return taken


# --- latency


def _latency(index: Index, queries: Floats, concurrent: int) -> Latency:
    """What a query for the best RECALL_K takes, when so many threads ask one at a time; FAISS has one thread for each.

    With more, FAISS's threads would wait for each other on the cores that the askers keep busy.
    """
    share = -(-_TIMED // concurrent)
    together = threading.Barrier(concurrent + 1, timeout=60)

    def ask(number: int) -> list[float]:
        taken: list[float] = []
        mine = [queries[i % len(queries)][None] for i in range(number * share, (number + 1) * share)]
        with vectors.threads(1):
            index.search(mine[0], RECALL_K)
            together.wait()
            deadline = time.perf_counter() + _TIMED_SECONDS
            for query in mine:
                started = time.perf_counter()
                index.search(query, RECALL_K)
                ended = time.perf_counter()
                taken.append(1e3 * (ended - started))
                if ended > deadline:
                    break
        return taken

    with ThreadPoolExecutor(concurrent) as pool:
        running = [pool.submit(ask, number) for number in range(concurrent)]
        together.wait()
        started = time.perf_counter()
        times = np.concatenate([each.result() for each in running])
        seconds = time.perf_counter() - started
    edges = np.geomspace(times.min(), max(times.max(), 1.01 * times.min()), _BINS + 1)
    edges[0], edges[-1] = 0, np.inf  # rounding must not lose the ends
    counts = np.histogram(times, edges)[0].tolist()
    edges[0], edges[-1] = times.min(), times.max()
    p50, p99 = (round(float(value), 4) for value in np.percentile(times, [50, 99]))
    shown = tuple(round(float(edge), 4) for edge in edges)
    mean, rate = round(float(times.mean()), 4), round(len(times) / seconds, 1)
    return Latency(concurrent, 1, len(times), p50, p99, mean, rate, shown, tuple(counts))
