"""Limits and figures: distributions against numpy, and verdicts at and around the limit."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core import alerts
from schemas.index import Recall
from schemas.job import Alert, Limits, Share, TableState

STATE = TableState(units=2, rows_in=110, rows_out=100, rows_dead=10, units_new=1, rows_in_new=20, rows_new=10,
                   rows_dead_new=10, rows_gone=0)  # fmt: skip


def batches(values: list[float | None], at_once: int = 1000) -> list[pa.RecordBatch]:
    column = pa.array(values, pa.float32())
    return [pa.record_batch([column.slice(i, at_once)], ["similarity"]) for i in range(0, len(values), at_once)]


def drawn(mean: float, rows: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(mean, 0.05, rows).tolist()


def judged(limits: Limits, state: TableState = STATE, new: Sequence[float] = (), before: Sequence[float] | None = None,
           rows_before: int = 100) -> list[Alert]:  # fmt: skip
    published = None
    if before is not None:
        earlier = TableState(1, rows_before, rows_before, 0, 1, rows_before, rows_before, 0, 0)
        published = (earlier, alerts.similarities(batches(list(before))))
    return list(alerts.of_table(limits, state, alerts.similarities(batches(list(new))), published))


COSINES = st.lists(st.none() | st.floats(-1, 1, width=32), max_size=60)


@given(COSINES, COSINES)
def test_the_distribution_of_both_is_that_of_all(one: list[float | None], other: list[float | None]) -> None:
    whole = alerts.similarities(batches(one + other, 7))
    joined = alerts.joined(alerts.similarities(batches(one, 7)), alerts.similarities(batches(other, 7)))
    present = np.array([value for value in one + other if value is not None], np.float64)
    assert whole.rows == joined.rows == len(present) == sum(whole.histogram)
    assert whole.histogram == joined.histogram
    if len(present):
        assert whole.mean == pytest.approx(present.mean(), abs=1e-9)
        assert whole.deviation == pytest.approx(present.std(), abs=1e-6)
        assert (joined.mean, joined.deviation) == pytest.approx((whole.mean, whole.deviation), abs=1e-6)


def test_the_distance_is_the_kolmogorov_smirnov_distance_but_for_its_bins() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.03, 0.2, 1.2):
        one, other = rng.normal(-0.5, 0.1, 3000), rng.normal(-0.5 + shift, 0.15, 500)
        places = np.sort(np.concatenate([one, other]))
        shares = [np.searchsorted(np.sort(values), places, "right") / len(values) for values in (one, other)]
        true = np.abs(shares[0] - shares[1]).max()
        found = alerts.distance(*(alerts.similarities(batches(values.tolist())) for values in (one, other)))
        assert true - 0.06 <= found <= true + 1e-6


@pytest.mark.parametrize(
    ("name", "limit", "figure", "tripped"),
    [
        ("max_dead_letters", (9.0, True), 100 * 10 / 110, True),
        ("max_dead_letters", (9.1, True), 100 * 10 / 110, False),
        ("max_dead_letters", (10.0, False), 10, False),
        ("max_dead_letters", (9.0, False), 10, True),
        ("max_new_dead_letters", (49.0, True), 50, True),
        ("max_new_dead_letters", (50.0, True), 50, False),
    ],
)
def test_dead_letters_are_counted_or_a_share(name: str, limit: Share, figure: float, tripped: bool) -> None:
    (alert,) = judged(Limits(**{name: limit}))  # type: ignore[arg-type]
    assert (alert.tripped, alert.name) == (tripped, name.replace("_", "-"))
    assert alert.figure == pytest.approx(figure, abs=1e-5)


@pytest.mark.parametrize(
    ("before", "figure", "tripped"), [(125, 20, False), (126, 100 * 26 / 126, True), (90, 0, False)]
)
def test_rows_may_drop_by_so_much(before: int, figure: float, tripped: bool) -> None:
    (alert,) = judged(Limits(max_row_drop=(20.0, True)), before=[], rows_before=before)
    assert alert.tripped is tripped and alert.figure == pytest.approx(figure, abs=1e-5)


def test_similarity_trips_for_what_chance_does_not_explain() -> None:
    limits = Limits(max_similarity_shift=0.02, max_similarity_distance=0.1)
    before = drawn(0.3, 5000, 1)
    for mean, rows, expected in ((0.3, 1000, False), (0.25, 1000, True), (0.35, 1000, True), (0.25, 3, False)):
        found = judged(limits, new=drawn(mean, rows, 2), before=before)
        assert [alert.tripped for alert in found] == [expected, expected], (mean, rows, found)
    wide = [*drawn(0.1, 500, 3), *drawn(0.5, 500, 4)]  # the same mean
    assert [alert.tripped for alert in judged(limits, new=wide, before=before)] == [False, True]


def test_similarity_seldom_trips_by_chance() -> None:
    limits = Limits(max_similarity_shift=0.0, max_similarity_distance=0.0)
    before = drawn(0.3, 4000, 5)
    tripped = np.mean(
        [[a.tripped for a in judged(limits, new=drawn(0.3, 50, 10 + i), before=before)] for i in range(200)], 0
    )
    assert (tripped <= 0.03).all()


def test_what_cannot_be_compared_is_said_to_be_unjudged() -> None:
    limits = Limits(max_row_drop=(0.0, True), max_similarity_shift=0.0, max_similarity_distance=0.0)
    for before, new in ((None, drawn(0.3, 9, 1)), ([], drawn(0.3, 9, 1)), (drawn(0.3, 9, 1), [])):
        found = {alert.name: alert for alert in judged(limits, new=new, before=before, rows_before=0)}
        for name in ("max-similarity-shift", "max-similarity-distance"):
            assert found[name].figure is None and not found[name].tripped


def test_recall_is_compared_with_its_own_kind() -> None:
    now = [Recall("text", 10, 500, 0.90), Recall("image", 10, 500, 0.99), Recall("text", 1, 500, 0.1)]
    before = [Recall("text", 10, 500, 0.95)]
    found = list(alerts.of_index(Limits(max_recall_drop=0.04, min_recall=0.9), "pictures", now, before, "index.json"))
    assert [(alert.name, alert.figure, alert.tripped) for alert in found] == [
        ("min-recall", 0.9, False), ("max-recall-drop", 0.05, True),
        ("min-recall", 0.99, False), ("max-recall-drop", None, False),
    ]  # fmt: skip
    assert not any(a.tripped for a in alerts.of_index(Limits(max_recall_drop=0.05), "x", now, before, ""))
    assert [a.tripped for a in alerts.of_index(Limits(min_recall=0.95), "x", now, None, "")] == [True, False]
