"""Figures against pytrec_eval, scikit-learn and loops in float64; ties and NaN against what is measured."""

import math
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from fusion_core import fusers, metrics


def world(seed: int, queries: int, gallery: int, most: int) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Random unit vectors, and for each query 1 to `most` relevant items."""
    rng = np.random.default_rng(seed)
    x, y = (fusers.normalize(rng.normal(size=(n, 6))) for n in (queries, gallery))
    relevant = [rng.choice(gallery, rng.integers(1, most + 1), replace=False) for _ in range(queries)]
    starts = np.concatenate([[0], np.cumsum([len(some) for some in relevant])])
    return x, y, starts, np.concatenate(relevant)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 300),
    gallery=st.integers(12, 60),
    most=st.sampled_from([1, 3, 9]),
)
def test_retrieval_is_pytrec_evals(seed: int, queries: int, gallery: int, most: int) -> None:
    x, y, starts, relevant = world(seed, queries, gallery, most)
    found = metrics.per_query(metrics.ranks(x, y, starts, relevant), starts)
    truth = {f"q{i}": {f"d{j}": 1 for j in relevant[starts[i] : starts[i + 1]]} for i in range(queries)}
    run = {f"q{i}": {f"d{j}": float(score) for j, score in enumerate(row)} for i, row in enumerate(x @ y.T)}
    names = {"map", "recip_rank", "ndcg_cut_10", "success_1,5,10", "recall_1,5,10"}
    oracle = pytrec_eval.RelevanceEvaluator(truth, {name.replace("_1,5", ".1,5") for name in names}).evaluate(run)
    theirs = {"mAP": "map", "MRR": "recip_rank", "nDCG@10": "ndcg_cut_10"}
    theirs |= {f"hit@{k}": f"success_{k}" for k in (1, 5, 10)} | {f"recall@{k}": f"recall_{k}" for k in (1, 5, 10)}
    for ours, name in theirs.items():
        expected = [oracle[f"q{i}"][name] for i in range(queries)]
        np.testing.assert_allclose(found[ours], expected, atol=1e-9, err_msg=ours)


def rank_by_loop(scores: list[float], relevant: set[int]) -> list[int]:
    """Ranks of the relevant, where every doubt is against them."""
    known = [(-math.inf if i in relevant else math.inf) if math.isnan(s) else s for i, s in enumerate(scores)]
    order = sorted(range(len(scores)), key=lambda i: (-known[i], i in relevant))
    order = [i for i in order if not (i in relevant and math.isnan(scores[i]))] + [
        i for i in order if i in relevant and math.isnan(scores[i])
    ]
    return [rank for rank, i in enumerate(order, 1) if i in relevant]


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=12),
    data=st.data(),
)
def test_ties_and_nan_are_against_us(scores: list[float], data: st.DataObject) -> None:
    relevant = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    items = np.array(sorted(relevant))
    found = metrics.ranks(np.ones((1, 1), np.float32), np.float32(scores)[:, None], np.array([0, len(items)]), items)
    assert found.tolist() == rank_by_loop(scores, relevant)


def test_absent_vectors_are_no_hits() -> None:
    zeros = np.zeros((50, 4), np.float32)
    found = metrics.ranks(zeros, zeros, np.arange(51), np.arange(50))
    assert found.tolist() == [50] * 50


def test_negative_scores_rank_as_any_others() -> None:
    scores = np.float32([0.9, 0.5, 0.1, -0.2, -0.3])[:, None]  # torchmetrics 1.9 says 1.0
    starts, relevant = np.array([0, 2]), np.array([0, 3])
    found = metrics.per_query(metrics.ranks(np.ones((1, 1), np.float32), scores, starts, relevant), starts)
    assert found["mAP"][0] == 0.75


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 200), classes=st.integers(2, 7))
def test_class_figures_are_scikit_learns(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, classes, (2, n))
    accuracy, f1, recall = metrics.summary(metrics.tallies(truth, guess, classes))
    matrix = confusion_matrix(truth, guess, labels=range(classes))
    cells = [[true, said, matrix[true, said]] for true, said in np.argwhere(matrix)]
    assert metrics.confusion(truth, guess, classes).tolist() == cells
    there = np.unique(truth)
    assert accuracy == pytest.approx(accuracy_score(truth, guess))
    assert f1 == pytest.approx(f1_score(truth, guess, labels=there, average="macro", zero_division=0))
    assert recall == pytest.approx(
        precision_recall_fscore_support(truth, guess, labels=there, zero_division=0)[1].mean()
    )
    if set(guess) <= set(there) and len(there) > 1:
        assert recall == pytest.approx(balanced_accuracy_score(truth, guess))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), classes=st.integers(1, 9))
def test_the_class_that_is_said(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(-2, 3, (n, classes)).astype(np.float32), rng.integers(0, classes, n)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    said, rank = metrics.predicted(scores, truth), metrics.rank_of_truth(scores, truth)
    for row, real, one, place in zip(scores, truth, said, rank, strict=True):
        others = np.delete(row, real)
        ahead = sum(np.isnan(row[real]) or np.isnan(other) or other >= row[real] for other in others)
        assert place == 1 + ahead
        assert (one == real) == (ahead == 0)
        if ahead:
            best = np.where(np.isnan(others), np.inf, others).max()
            assert (np.isnan(row[one]) and best == np.inf) or row[one] == best


@pytest.mark.parametrize("cells", [1, 14, 100])
def test_figures_of_scores_do_not_depend_on_how_many_rows_are_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch, cells: int
) -> None:
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(0, 3, (40, 7)).astype(np.float32), rng.integers(0, 7, 40)

    def figures() -> list[bytes]:
        found = (
            metrics.predicted(logits, truth), metrics.rank_of_truth(logits, truth),
            metrics.nll(logits, truth, 2.0), metrics.fit_temperature(logits, truth),
            *metrics.confidences(logits, truth, 2.0),
        )  # fmt: skip
        return [np.asarray(one).tobytes() for one in found]

    whole = figures()
    best, true, squares = metrics.confidences(logits, truth, 2.0)
    expected = metrics.softmax(logits.astype(np.float64) / 2.0)
    np.testing.assert_array_equal(best, expected.max(axis=1))
    np.testing.assert_array_equal(true, expected[np.arange(40), truth])
    np.testing.assert_allclose(squares, (expected**2).sum(axis=1), rtol=1e-12)
    monkeypatch.setattr(metrics, "_CELLS", cells)
    assert figures() == whole


def test_temperature_and_loss() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4000, 6))
    truth = np.array([rng.choice(6, p=row) for row in metrics.softmax(logits)])
    assert metrics.nll(logits, truth) == pytest.approx(log_loss(truth, metrics.softmax(logits)))
    found = metrics.fit_temperature(4.0 * logits, truth)
    assert found == pytest.approx(4.0, rel=0.06), "the logits were made four times too sure"
    grid = [(metrics.nll(4.0 * logits, truth, t), t) for t in np.linspace(1, 8, 1401)]
    assert found == pytest.approx(min(grid)[1], abs=0.006)


def test_calibration_error_of_what_is_known() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.2, 1, 20_000)
    true = rng.random(20_000) < confidence
    assert metrics.expected_calibration_error(confidence, true) < 0.015
    right = rng.random(20_000) < confidence - 0.1
    assert metrics.expected_calibration_error(confidence, right) == pytest.approx(0.1, abs=0.015)
    bins = metrics.reliability(confidence, right)
    assert len(bins) == 15 and sum(n for _, _, n in bins) == 20_000
    assert max(n for _, _, n in bins) - min(n for _, _, n in bins) <= 1


def test_wilson_is_the_textbooks() -> None:
    assert metrics.wilson(0.0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert metrics.wilson(0.7, 1000) == (pytest.approx(0.6709, abs=1e-4), pytest.approx(0.7276, abs=1e-4))
    assert metrics.smallest_difference(1000) == pytest.approx(0.028, abs=1e-3)


def test_bootstrap_of_a_mean_is_its_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, (400, 1))
    low, high = metrics.bootstrap_means(values, resamples=2000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low[0], high[0]) == (
        pytest.approx(values.mean() - half, abs=0.03),
        pytest.approx(values.mean() + half, abs=0.03),
    )


def test_rows_are_drawn_by_whole_groups() -> None:
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(100), 5)  # five copies of each of 100 rows
    truth = np.repeat(rng.integers(0, 3, 100), 5)
    guess = np.where(np.repeat(rng.random(100), 5) < 0.7, truth, 0)
    drawn = metrics.bootstrap_summaries(truth, guess, 3, groups)
    once = metrics.bootstrap_summaries(truth[::5], guess[::5], 3, groups[::5])
    np.testing.assert_allclose(drawn, once, atol=1e-12)
    share = (truth == guess).mean()
    assert drawn[:, 0].std() == pytest.approx(math.sqrt(share * (1 - share) / 100), rel=0.1)


def mmd2_by_loop(x: np.ndarray, y: np.ndarray, squared_width: float) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * squared_width))

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_is_the_double_loops_and_knows_chance() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(0.8, 1, size=(25, 5)).astype(np.float32)
    pooled = np.concatenate([x, y]).astype(np.float64)
    squares = [((a - b) ** 2).sum() for i, a in enumerate(pooled) for b in pooled[:i]]
    value, chance, p = metrics.mmd2_and_chance(x, y)
    assert value == metrics.mmd2(x, y)
    assert value == pytest.approx(mmd2_by_loop(x.astype(float), y.astype(float), float(np.median(squares))), abs=1e-12)
    assert value > chance and p < 0.02
    same, chance, p = metrics.mmd2_and_chance(
        rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(200, 5)).astype(np.float32)
    )
    assert abs(same) < 0.01 and p > 0.01


def test_coral_alignment_uniformity() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 4)).astype(np.float32), rng.normal(0, 2, size=(50, 4)).astype(np.float32)
    assert metrics.coral(x, x) == metrics.relative_coral(x, x) == 0
    assert metrics.relative_coral(np.ones((40, 4)), y) is None, "there is nothing that it could be relative to"
    loss = metrics.coral(x, y)
    for measure in (metrics.coral, metrics.relative_coral):
        assert measure(x, y + np.float32(3)) == pytest.approx(measure(x, y), rel=1e-5), "means do not matter"
    difference = np.cov(x.T.astype(float)) - np.cov(y.T.astype(float))
    assert loss == pytest.approx((difference**2).sum() / (4 * 16))
    norm = np.linalg.norm(np.cov(x.T.astype(float)))
    assert metrics.relative_coral(x, y) == pytest.approx(np.linalg.norm(difference) / norm)
    assert metrics.alignment(x, y[:40]) == pytest.approx(
        np.mean([((a - b) ** 2).sum() for a, b in zip(x, y, strict=False)])
    )
    pairs = [math.exp(-2 * float(((a - b) ** 2).sum())) for i, a in enumerate(x) for b in x[:i]]
    assert metrics.uniformity(x) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
