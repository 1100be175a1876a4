"""Decision-level fusion against the formulas, row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core import decisions

Ranking = tuple[np.ndarray, np.ndarray]


def ranking(seed: int, n: int = 8, among: int = 12) -> Ranking:
    """`n` of `among` ids with falling scores, some of them negative."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.normal(size=n))[::-1], rng.permutation(among)[:n]


def expected(totals: dict[int, float]) -> list[int]:
    return sorted(totals, key=lambda id: (-totals[id], id))


def test_a_weighted_sum_gives_what_a_ranking_lacks_its_lowest_score() -> None:
    first, second = (np.array([0.9, 0.5]), np.array([4, 7])), (np.array([0.8, -0.2, -0.4]), np.array([7, 1, 9]))
    scores, ids = decisions.weighted_sum([first, second], [0.5, 0.5])
    totals = {4: 0.45 - 0.2, 7: 0.25 + 0.4, 1: 0.25 - 0.1, 9: 0.25 - 0.2}
    assert ids.tolist() == expected(totals)
    np.testing.assert_allclose(scores, [totals[id] for id in ids.tolist()], atol=1e-6)


def test_reciprocal_ranks_are_the_formula() -> None:
    rankings = [ranking(seed) for seed in range(3)]
    scores, ids = decisions.reciprocal_ranks(rankings, [1, 2, 0.5])
    totals: dict[int, float] = {}
    for (_, found), weight in zip(rankings, (1, 2, 0.5), strict=True):
        for rank, id in enumerate(found.tolist(), 1):
            totals[id] = totals.get(id, 0) + weight / (60 + rank)
    assert ids.tolist() == expected(totals)
    np.testing.assert_allclose(scores, [totals[id] for id in ids.tolist()], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(-20, 20), st.floats(0, 1))
def test_z_norm_does_not_see_scale_and_offset_and_ranks_do_not_see_scores(
    seed: int, scale: float, offset: float, weight: float
) -> None:
    first, second = ranking(seed), ranking(seed + 1)
    changed = (first[0] * scale + offset, first[1])
    plain, other = (decisions.z_normed([one, second], [weight, 1 - weight]) for one in (first, changed))
    np.testing.assert_allclose(np.sort(plain[0]), np.sort(other[0]), atol=1e-4)
    np.testing.assert_allclose(plain[0][np.argsort(plain[1])], other[0][np.argsort(other[1])], atol=1e-4)
    monotone = (np.exp(first[0]), first[1])
    by_rank = [decisions.reciprocal_ranks([one, second])[1].tolist() for one in (first, monotone)]
    assert by_rank[0] == by_rank[1]


def test_equal_scores_go_by_id_and_padding_and_empty_rankings_are_passed_over() -> None:
    padded = (np.array([0.5, 0.5, -np.inf]), np.array([9, 2, -1]))
    empty = (np.empty(0), np.empty(0, np.int64))
    for fuse in (decisions.weighted_sum, decisions.z_normed):
        assert fuse([padded, empty])[1].tolist() == [2, 9]
    assert decisions.reciprocal_ranks([padded, empty])[1].tolist() == [9, 2]
    assert decisions.reciprocal_ranks([empty])[1].tolist() == []
    alone = (np.array([0.3]), np.array([5]))
    assert decisions.z_normed([alone])[1].tolist() == [5]


def test_probabilities_are_averaged_over_those_who_have_something_to_say() -> None:
    first = np.array([[0.8, 0.2], [np.nan, np.nan], [np.nan, np.nan]])
    second = np.array([[0.4, 0.6], [0.1, 0.9], [np.nan, np.nan]])
    found = decisions.class_probabilities([first, second], [3, 1])
    np.testing.assert_allclose(found, [[0.7, 0.3], [0.1, 0.9], [np.nan, np.nan]])


def test_weights_that_do_not_fit_are_refused() -> None:
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="2 weights from 0 on"):
            decisions.weighted_sum([ranking(0), ranking(1)], weights)
