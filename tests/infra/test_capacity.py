"""The plan on paper agrees with its simulation, and both with what must be."""

import dataclasses

import numpy as np
import pytest

from infra.bench import capacity
from infra.bench.capacity import Assumptions, formula, simulate

USUAL = Assumptions(gpu_rate=2500, core_microseconds=500, cores=8, price=2.0)
CALM = dataclasses.replace(USUAL, spread=0.0, stragglers=0.0, failures=0.0, hours_between_deaths=1e12)


def test_undisturbed_equal_units_take_what_they_must() -> None:
    for units, workers in ((100, 10), (101, 10), (7, 8), (1, 1)):
        seconds, wasted = simulate(CALM, units, workers, shares=False)
        assert seconds == pytest.approx(-(-units // workers) * 4.0) and wasted == 0


def test_the_slower_of_forward_and_cores_counts() -> None:
    assert USUAL.rate == 2500
    assert dataclasses.replace(USUAL, cores=1).rate == 2000


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("units", "workers"), [(10_000, 8), (10_000, 64), (100_000, 128)])
def test_formula_and_simulation_agree(units: int, workers: int, shares: bool) -> None:
    found = [simulate(USUAL, units, workers, shares, seed)[0] for seed in range(3)]
    assert np.mean(found) == pytest.approx(formula(USUAL, units, workers, shares), rel=0.06)


def test_failures_and_deaths_cost_what_is_said() -> None:
    rough = dataclasses.replace(USUAL, failures=0.1, hours_between_deaths=1.0)
    seconds, wasted = simulate(rough, 50_000, 16, shares=False)
    work = 50_000 * rough.unit_seconds
    assert wasted / work == pytest.approx(rough.waste, rel=0.1)
    assert seconds > simulate(USUAL, 50_000, 16, shares=False)[0]


def test_a_line_holds_together() -> None:
    row = dict(zip(capacity.COLUMNS, capacity.line(USUAL, 10**8, 8), strict=True))
    assert row["units"] == 10_000 and row["table TB"] == pytest.approx(0.23)
    assert row["hours"] == pytest.approx(1e8 / 8 / 2500 / 3600, rel=0.1)
    assert row["cost"] == pytest.approx(2 * row["GPU hours"]) and row["GPU hours"] == pytest.approx(8 * row["hours"])
