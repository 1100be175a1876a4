"""What a run's figures are held against before its indexes are published: limits, and the run that was published last.

The figures are of all rows, or of those that the published run did not have: a bad shard among a hundred good ones is
seen in these alone. A shift of similarity trips only beyond what chance explains (3 standard errors; the 1 % point of
the Kolmogorov-Smirnov distance), counting rows as independent draws, which rows of one shard are not quite.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from schemas.index import Recall
from schemas.index_evaluation import MeasuredRecall
from schemas.job import Alert, Limits, Share, Similarities, TableState

BINS = 200
_SIGMAS = 3.0
_KS_CHANCE = 1.63  # times sqrt(1/n + 1/m): exceeded once in 100 times

Figure = Recall | MeasuredRecall


def similarities(batches: Iterable[pa.RecordBatch]) -> Similarities:
    """The distribution of the column `similarity` of record batches; rows without one do not count."""
    rows, total, squares = 0, 0.0, 0.0
    counts = np.zeros(BINS, np.int64)
    for batch in batches:
        values = batch["similarity"].drop_null().to_numpy().astype(np.float64)
        rows += len(values)
        total += float(values.sum())
        squares += float((values**2).sum())
        counts += np.histogram(np.clip(values, -1, 1), BINS, (-1, 1))[0]
    return _of(rows, total, squares, counts)


def joined(one: Similarities, other: Similarities) -> Similarities:
    """The distribution of the rows of both."""
    total = one.rows * one.mean + other.rows * other.mean
    squares = sum(item.rows * (item.deviation**2 + item.mean**2) for item in (one, other))
    return _of(one.rows + other.rows, total, squares, np.add(one.histogram, other.histogram))


def _of(rows: int, total: float, squares: float, counts: Sequence[int] | np.ndarray) -> Similarities:
    mean = total / rows if rows else 0.0
    deviation = math.sqrt(max(0.0, squares / rows - mean**2)) if rows else 0.0
    return Similarities(rows, mean, deviation, tuple(int(count) for count in counts))


def distance(one: Similarities, other: Similarities) -> float:
    """The Kolmogorov-Smirnov distance of two distributions, as far as their bins tell: at most their true one."""
    shares = [np.cumsum(item.histogram) / max(1, item.rows) for item in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def of_table(
    limits: Limits,
    table: TableState,
    new: Similarities,
    published: tuple[TableState, Similarities] | None,
) -> Iterator[Alert]:
    """The limits on a table's rows; `published`: what they are compared with."""
    if limits.max_dead_letters is not None:
        yield _share("max-dead-letters", "the table", limits.max_dead_letters, table.rows_dead, table.rows_in)
    if limits.max_new_dead_letters is not None:
        what = "the new samples"
        yield _share("max-new-dead-letters", what, limits.max_new_dead_letters, table.rows_dead_new, table.rows_in_new)
    if limits.max_row_drop is not None:
        if published is None:
            yield _unjudged("max-row-drop", "rows", *_limit(limits.max_row_drop, "rows"))
        else:
            before = published[0].rows_out
            fewer = max(0, before - table.rows_out)
            yield _share("max-row-drop", "rows", limits.max_row_drop, fewer, before, "rows")
    if limits.max_similarity_shift is not None:
        yield _shift(limits.max_similarity_shift, new, published[1] if published else None)
    if limits.max_similarity_distance is not None:
        yield _apart(limits.max_similarity_distance, new, published[1] if published else None)


def of_index(
    limits: Limits, name: str, now: Sequence[Figure], published: Sequence[Figure] | None, source: str
) -> Iterator[Alert]:
    """The limits on an index's recall; `published`: of the version that is current, by the same `source`."""
    before = {(item.queries, item.k): item.recall for item in published or ()}
    for found in now:
        if found.k != 10:
            continue
        of = f"{name}: recall@{found.k} of {found.queries} queries ({source})"
        if limits.min_recall is not None:
            low = found.recall < limits.min_recall
            yield Alert("min-recall", of, found.recall, limits.min_recall, "", low, f"n={found.n_queries:,}")
        if limits.max_recall_drop is None:
            continue
        known = before.get((found.queries, found.k))
        if known is None:
            yield _unjudged("max-recall-drop", of, limits.max_recall_drop, "")
        else:
            drop = round(max(0.0, known - found.recall), 6)
            why = f"{found.recall:.4f} after {known:.4f}, n={found.n_queries:,}"
            yield Alert("max-recall-drop", of, drop, limits.max_recall_drop, "", drop > limits.max_recall_drop, why)


def _shift(limit: float, new: Similarities, published: Similarities | None) -> Alert:
    of = "mean similarity of the new rows"
    if not published or not published.rows or not new.rows:
        return _unjudged("max-similarity-shift", of, limit, "")
    shift = abs(new.mean - published.mean)
    deviation = max(new.deviation, published.deviation)  # that of a few rows says little
    chance = _SIGMAS * deviation * math.sqrt(1 / new.rows + 1 / published.rows)
    why = f"{new.mean:.4f} of {new.rows:,} rows after {published.mean:.4f}; chance explains {chance:.4f}"
    return Alert("max-similarity-shift", of, round(shift, 6), limit, "", shift - chance > limit, why)


def _apart(limit: float, new: Similarities, published: Similarities | None) -> Alert:
    of = "similarity of the new rows, Kolmogorov-Smirnov"
    if not published or not published.rows or not new.rows:
        return _unjudged("max-similarity-distance", of, limit, "")
    found = distance(new, published)
    chance = _KS_CHANCE * math.sqrt(1 / new.rows + 1 / published.rows)
    why = f"{new.rows:,} rows against {published.rows:,}; chance explains {chance:.4f}"
    return Alert("max-similarity-distance", of, round(found, 6), limit, "", found - chance > limit, why)


def _share(name: str, of: str, limit: Share, count: int, whole: int, unit: str = "samples") -> Alert:
    value, unit = _limit(limit, unit)
    figure = 100 * count / whole if limit[1] and whole else 0.0 if limit[1] else float(count)
    return Alert(name, of, round(figure, 6), value, unit, figure > value, f"{count:,} of {whole:,}")


def _limit(limit: Share, unit: str) -> tuple[float, str]:
    return limit[0], "%" if limit[1] else unit


def _unjudged(name: str, of: str, limit: float, unit: str) -> Alert:
    return Alert(name, of, None, limit, unit, False, "nothing to compare with yet")
