"""The figures of an evaluation as functions of arrays. Ties and NaN count against what is measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

RESAMPLES = 2000
_BLOCK = 256  # queries compared with the gallery at once
_DRAWS = 100  # of a bootstrap at once
_CELLS = 1 << 22  # of scores [n, C] worked on at once, in float64: there may be many classes


# --- retrieval ------------------------------------------------------------------------------------------------------


def ranks(queries: Floats, gallery: Floats, starts: Ids, relevant: Ids) -> Ids:
    """The ranks, from 1, of each query's relevant items, ascending within the query; int64, aligned with `relevant`.

    `queries` float [n, D], `gallery` float [m, D], scored by inner product; `relevant[starts[i]:starts[i + 1]]` are
    the items relevant to query i. An item of equal or unknown score that is not relevant stands before a relevant one.
    """
    found = np.empty(len(relevant), np.int64)
    for first in range(0, len(queries), _BLOCK):
        scores = queries[first : first + _BLOCK].astype(np.float32) @ gallery.T.astype(np.float32)
        for query, row in enumerate(scores, first):
            mine = slice(starts[query], starts[query + 1])
            wanted = row[relevant[mine]]
            wanted = np.sort(np.where(np.isnan(wanted), -np.inf, wanted))[::-1]
            row[np.isnan(row)] = np.inf
            row[relevant[mine]] = -np.inf
            before = _at_least(row, wanted) - np.where(np.isneginf(wanted), len(wanted), 0)
            found[mine] = before + 1 + np.arange(len(wanted))
    return found


def _at_least(row: Floats, values: Floats) -> Ids:
    """How many of the row are at least each of the values."""
    if len(values) <= 4:
        return np.array([(row >= value).sum() for value in values], np.int64)
    return len(row) - np.searchsorted(np.sort(row), values, side="left")


def per_query(found: Ids, starts: Ids, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Doubles]:
    """hit@k, recall@k, mAP, nDCG@10 and MRR of each query, float64 [n], of the ranks of its relevant items.

    Every query must have a relevant item.
    """
    owner, total = np.repeat(np.arange(len(starts) - 1), np.diff(starts)), np.diff(starts)
    nth = np.arange(len(found)) - starts[owner] + 1
    best = found[starts[:-1]]

    def summed(values: Doubles) -> Doubles:
        return np.asarray(np.bincount(owner, values, len(total)), np.float64)

    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(10) + 2))])[np.minimum(total, 10)]
    values: dict[str, Doubles] = {f"hit@{k}": (best <= k).astype(np.float64) for k in ks}
    values |= {f"recall@{k}": summed((found <= k).astype(np.float64)) / total for k in ks}
    values["mAP"] = summed(nth / found) / total
    values["nDCG@10"] = summed(np.where(found <= 10, 1 / np.log2(found + 1), 0)) / ideal
    values["MRR"] = 1 / best.astype(np.float64)
    return values


# --- intervals ------------------------------------------------------------------------------------------------------


def bootstrap_means(values: Doubles, seed: int = 0, resamples: int = RESAMPLES) -> tuple[Doubles, Doubles]:
    """The 95 % intervals, low [m] and high [m], of the means of `values` [n, m] over rows."""
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    for number in range(resamples):
        means[number] = np.bincount(rng.integers(0, n, n), minlength=n) @ values / n
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent trials."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def smallest_difference(n: int, disagree: float = 0.1) -> float:
    """The difference of two shares on the same n queries that is found in 80 % of the cases (two-sided 5 %), where
    the two systems disagree on a share `disagree` of the queries.
    """
    return float(np.sqrt(7.85 * disagree / n))


# --- classification -------------------------------------------------------------------------------------------------


def predicted(scores: Floats | Doubles, truth: Ids) -> Ids:
    """The class of the best score [n, C] of each row; among equals, or where the truth's is NaN, one that is wrong."""
    if scores.shape[1] == 1:
        return np.zeros(len(truth), np.int64)

    def of(scores: Doubles, truth: Ids) -> Ids:
        rows = np.arange(len(truth))
        true = scores[rows, truth]
        others = np.where(np.isnan(scores), np.inf, scores)
        others[rows, truth] = -np.inf
        best: Ids = others.argmax(axis=1)
        wins = true > others[rows, best]  # not where it is NaN
        return np.where(wins, truth, best)

    return np.asarray(_by_rows(of, scores, truth), np.int64)


def rank_of_truth(scores: Floats | Doubles, truth: Ids) -> Ids:
    """The rank, from 1, of the true class among the scores [n, C]."""

    def of(scores: Doubles, truth: Ids) -> Ids:
        rows = np.arange(len(truth))
        others = np.where(np.isnan(scores), np.inf, scores)
        true = np.where(np.isnan(scores[rows, truth]), -np.inf, scores[rows, truth])
        others[rows, truth] = np.nan
        return np.asarray(1 + (others >= true[:, None]).sum(axis=1), np.int64)

    return np.asarray(_by_rows(of, scores, truth), np.int64)


def _by_rows(of: Callable[[Doubles, Ids], Any], scores: Floats | Doubles, truth: Ids) -> Any:
    """What `of` finds for rows of scores [n, C] and true classes [n], some rows at a time."""
    step = max(1, _CELLS // scores.shape[1])
    pieces = (slice(first, first + step) for first in range(0, max(1, len(truth)), step))
    return np.concatenate([of(scores[piece].astype(np.float64), truth[piece]) for piece in pieces])


def confusion(truth: Ids, found: Ids, classes: int) -> Ids:
    """The cells of the confusion matrix that have rows, in its order: [m, 3] of true class, predicted class, rows."""
    cells, rows = np.unique(truth * classes + found, return_counts=True)
    return np.stack([cells // classes, cells % classes, rows], axis=1)


def tallies(truth: Ids, found: Ids, classes: int) -> Doubles:
    """Of each class: rows that are right, that are of it, that are said to be of it; [3, C]."""
    return np.bincount(_tallied(truth, found, classes)[0], minlength=3 * classes).reshape(3, -1).astype(np.float64)


def _tallied(truth: Ids, found: Ids, classes: int) -> tuple[Ids, Ids]:
    """Where in a tally [3 * C] rows count, and which row does there."""
    right = np.flatnonzero(truth == found)
    rows = np.arange(len(truth))
    return np.concatenate([truth[right], classes + truth, 2 * classes + found]), np.concatenate([right, rows, rows])


def class_scores(counted: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Precision, recall and F1 of each class, [..., C], of summed tallies [..., 3, C]; 0 where undefined."""
    right, real, said = (counted[..., place, :] for place in range(3))

    def over(below: Doubles) -> Doubles:
        return np.divide(right, below, out=np.zeros_like(right), where=below > 0)

    return over(said), over(real), 2 * over(real + said)


def summary(counted: Doubles) -> Doubles:
    """Accuracy, macro-F1 and macro-recall (balanced accuracy), [..., 3], over the classes that occur."""
    _, recall, f1 = class_scores(counted)
    right, real = counted[..., 0, :], counted[..., 1, :]
    there = np.maximum((real > 0).sum(axis=-1), 1)
    macro = ((of * (real > 0)).sum(axis=-1) / there for of in (f1, recall))
    return np.stack([right.sum(axis=-1) / np.maximum(real.sum(axis=-1), 1), *macro], axis=-1)


def bootstrap_summaries(
    truth: Ids, found: Ids, classes: int, groups: Ids, seed: int = 0, resamples: int = RESAMPLES
) -> Doubles:
    """The summaries [resamples, 3] of rows whose groups are drawn with replacement.

    One seed draws the same groups: what was measured on the same rows can be compared draw by draw.
    """
    names, group = np.unique(groups, return_inverse=True)
    n = len(names)
    places, rows = _tallied(truth, found, classes)
    owner = group[rows]
    rng = np.random.default_rng(seed)
    drawn = []
    for first in range(0, resamples, _DRAWS):
        counted = np.empty((min(_DRAWS, resamples - first), 3 * classes))
        for one in counted:
            times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
            one[:] = np.bincount(places, times[owner], 3 * classes)
        drawn.append(summary(counted.reshape(-1, 3, classes)))
    return np.concatenate(drawn)


# --- calibration ----------------------------------------------------------------------------------------------------


def reliability(confidence: Doubles, right: npt.NDArray[np.bool_], bins: int = 15) -> list[tuple[float, float, int]]:
    """Mean confidence, share right and number of rows in bins of equal mass, by rising confidence."""
    order = np.argsort(confidence, kind="stable")
    pieces = [piece for piece in np.array_split(order, bins) if len(piece)]
    return [(float(confidence[piece].mean()), float(right[piece].mean()), len(piece)) for piece in pieces]


def expected_calibration_error(confidence: Doubles, right: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """The mean difference, over bins of equal mass, of confidence and share right. It is biased upwards."""
    found = reliability(confidence, right, bins)
    return sum(abs(mean - share) * n for mean, share, n in found) / len(confidence)


def softmax(logits: Floats | Doubles) -> Doubles:
    """Probabilities, float64 [n, C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def nll(logits: Floats | Doubles, truth: Ids, temperature: float = 1.0) -> float:
    """The mean negative log probability (nats) of the true class under softmax(logits / temperature)."""

    def of(logits: Doubles, truth: Ids) -> Doubles:
        scaled = logits / temperature
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return np.asarray(total - scaled[np.arange(len(truth)), truth])

    return float(_by_rows(of, logits, truth).mean())


def confidences(logits: Floats | Doubles, truth: Ids, temperature: float = 1.0) -> tuple[Doubles, Doubles, Doubles]:
    """Of softmax(logits / temperature): each row's best probability, its true class's, and the sum of the squares."""

    def of(logits: Doubles, truth: Ids) -> Doubles:
        found = softmax(logits / temperature)
        true = found[np.arange(len(truth)), truth]
        return np.stack([found.max(axis=1), true, np.einsum("nc,nc->n", found, found)], axis=1)

    best, true, squares = _by_rows(of, logits, truth).T
    return best, true, squares


def fit_temperature(logits: Floats | Doubles, truth: Ids) -> float:
    """The temperature, 0.01 to 100, of the least `nll`: which is convex in its inverse, so it is bisected."""
    true = logits[np.arange(len(truth)), truth].astype(np.float64)
    low, high = np.log(0.01), np.log(100.0)  # of the inverse
    for _ in range(60):
        inverse = np.exp((low + high) / 2)

        def expected(logits: Doubles, truth: Ids, inverse: float = inverse) -> Doubles:
            return np.asarray((softmax(logits * inverse) * logits).sum(axis=1))

        below = _by_rows(expected, logits, truth).mean() < true.mean()
        low, high = ((low + high) / 2, high) if below else (low, (low + high) / 2)
    return float(np.exp(-(low + high) / 2))


# --- two sets of vectors --------------------------------------------------------------------------------------------


def alignment(x: Floats, y: Floats) -> float:
    """The mean squared distance of pairs."""
    return float(((x.astype(np.float64) - y) ** 2).sum(axis=1).mean())


def uniformity(x: Floats) -> float:
    """log mean exp(-2 |a - b|²) over all pairs of rows of x."""
    squares = _squares(x, x)[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-2 * squares).mean()))


def coral(x: Any, y: Any) -> Any:
    """|C_x - C_y|² / 4D², as CORAL's loss, of the covariances (Frobenius norms). 0 for translated copies.

    This, `relative_coral` and `unbiased_mmd2` take arrays of numpy and of torch, and can be differentiated there.
    """
    return ((_covariance(x) - _covariance(y)) ** 2).sum() / (4 * x.shape[1] ** 2)


def relative_coral(x: Any, y: Any) -> Any:
    """|C_x - C_y| / |C_x|: the same in readable size; of unit vectors CORAL itself is some 1e-7.

    None where all rows of x are equal: C_x is 0.
    """
    first = _covariance(x)
    size = (first**2).sum()
    return (((first - _covariance(y)) ** 2).sum() / size) ** 0.5 if size > 0 else None


def _covariance(x: Any) -> Any:
    centred = x - x.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)


def mmd2(x: Floats | Doubles, y: Floats | Doubles) -> float:
    """The unbiased squared maximum mean discrepancy under a Gaussian kernel as wide as the pooled median distance.

    About 0, below it too, for two samples of one distribution. Needs two rows of each.
    """
    return float(unbiased_mmd2(_kernel(x, y), _firsts(x, y)))


def mmd2_and_chance(
    x: Floats | Doubles, y: Floats | Doubles, permutations: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """`mmd2`; the 95th percentile of random splits of the same vectors; the share of these that are as far apart."""
    kernel, ours = _kernel(x, y), _firsts(x, y)
    value = float(unbiased_mmd2(kernel, ours))
    rng = np.random.default_rng(seed)
    chance = np.array([unbiased_mmd2(kernel, rng.permutation(ours)) for _ in range(permutations)])
    return value, float(np.percentile(chance, 95)), float((1 + (chance >= value).sum()) / (1 + permutations))


def unbiased_mmd2(kernel: Any, first: Any) -> Any:
    """MMD² of a kernel matrix [n, n] with a diagonal of zeros; `first` [n]: 1 for rows of one set, else 0."""
    second = 1 - first
    n, m = first.sum(), second.sum()
    to_first, to_second = kernel @ first, kernel @ second
    within = first @ to_first / (n * (n - 1)) + second @ to_second / (m * (m - 1))
    return within - 2 * (first @ to_second) / (n * m)


def _kernel(x: Floats | Doubles, y: Floats | Doubles) -> Doubles:
    pooled = np.concatenate([x, y]).astype(np.float64)
    squares = _squares(pooled, pooled)
    median = float(np.median(squares[np.triu_indices(len(pooled), 1)]))
    kernel: Doubles = np.exp(-squares / max(2 * median, 1e-300))
    np.fill_diagonal(kernel, 0)
    return kernel


def _firsts(x: Floats | Doubles, y: Floats | Doubles) -> Doubles:
    return np.repeat([1.0, 0.0], [len(x), len(y)])


def _squares(x: Floats | Doubles, y: Floats | Doubles) -> Doubles:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.asarray(np.maximum(squares, 0), np.float64)
