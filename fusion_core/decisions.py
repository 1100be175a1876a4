"""Decision-level fusion: several rankings into one, several classifiers' probabilities into one.

A ranking is (scores, ids), best first, of one query; rankings may hold different ids, and padding of -1 is passed over.
Every function gives (scores float32, ids int64), best first, the lower id first among equals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Ranking = tuple[Floats, Ids]

RANK_CONSTANT = 60  # of reciprocal rank fusion, as its authors chose it


def weighted_sum(rankings: Sequence[Ranking], weights: Sequence[float] | None = None) -> Ranking:
    """By the weighted sum of the scores. What a ranking lacks has the lowest score in it: it can be no better there."""
    return _by_score([_whole(ranking) for ranking in rankings], weights)


def z_normed(rankings: Sequence[Ranking], weights: Sequence[float] | None = None) -> Ranking:
    """By the weighted sum of the scores, each ranking's first brought to mean 0 and deviation 1.

    So a modality whose scores are all alike (a gap between the modalities, a wider spread) does not decide by its
    scale. What a ranking lacks has the lowest score in it. An affine change of a ranking's scores changes nothing.
    """
    normed = []
    for scores, ids in map(_whole, rankings):
        spread = scores.std() if len(scores) else 0.0
        centred = scores - scores.mean() if len(scores) else scores
        normed.append((centred / spread if spread > 1e-12 else np.zeros_like(scores), ids))
    return _by_score(normed, weights)


def reciprocal_ranks(rankings: Sequence[Ranking], weights: Sequence[float] | None = None) -> Ranking:
    """By the (weighted) sum of 1 / (60 + rank) over the rankings that have an id."""
    kept = [_whole(ranking)[1] for ranking in rankings]
    ids, place = np.unique(np.concatenate([*kept, np.empty(0, np.int64)]), return_inverse=True)
    parts = [
        weight / (RANK_CONSTANT + 1 + np.arange(len(ranking)))
        for ranking, weight in zip(kept, _checked(weights, len(kept)), strict=True)
    ]
    return _ordered(np.bincount(place, np.concatenate([*parts, np.empty(0)]), len(ids)), ids)


def class_probabilities(probabilities: Sequence[Floats], weights: Sequence[float] | None = None) -> Floats:
    """The weighted mean, float64 [n, C], of several classifiers' probabilities [n, C].

    A row of NaN is a classifier that has nothing to say (its modality is absent): the others decide. Where none has,
    the row is NaN. Raises ValueError for shapes or weights that do not fit.
    """
    stacked = np.stack([np.asarray(item, np.float64) for item in probabilities])
    share = np.array(_checked(weights, len(stacked)))[:, None] * ~np.isnan(stacked).any(axis=2)
    total = share.sum(axis=0)
    mixed = (np.nan_to_num(stacked) * share[:, :, None]).sum(axis=0)
    found: Floats = np.divide(mixed, total[:, None], out=np.full_like(mixed, np.nan), where=total[:, None] > 0)
    return found


def _whole(ranking: Ranking) -> Ranking:
    scores, ids = np.asarray(ranking[0], np.float64), np.asarray(ranking[1], np.int64)
    return scores[ids >= 0], ids[ids >= 0]


def _by_score(rankings: Sequence[Ranking], weights: Sequence[float] | None) -> Ranking:
    ids = np.unique(np.concatenate([*(ids for _, ids in rankings), np.empty(0, np.int64)]))
    total = np.zeros(len(ids))
    for (scores, own), weight in zip(rankings, _checked(weights, len(rankings)), strict=True):
        if len(own):  # an empty ranking says nothing of anyone
            given = np.full(len(ids), scores.min())
            given[np.searchsorted(ids, own)] = scores
            total += weight * given
    return _ordered(total, ids)


def _ordered(scores: Floats, ids: Ids) -> Ranking:
    order = np.argsort(-scores, kind="stable")
    return scores[order].astype(np.float32), ids[order]


def _checked(weights: Sequence[float] | None, n: int) -> list[float]:
    given = [1.0] * n if weights is None else [float(weight) for weight in weights]
    if len(given) != n or not all(0 <= weight < np.inf for weight in given):
        raise ValueError(f"expected {n} weights from 0 on, got {given}")
    return given
