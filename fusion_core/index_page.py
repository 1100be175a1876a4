"""The page of an index's evaluation: one HTML file that stands alone, without scripts."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from schemas.index_evaluation import IndexEvaluation, Latency, Setting

_SHOWN = (1, 10, 100)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 410.0, 12.0, 190.0  # of the axes, in a picture of 420 x 230


def render(evaluation: IndexEvaluation) -> str:
    """The page's HTML."""
    source = Path(__file__).with_name("index_page.html").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    total = sum(evaluation.build_seconds.values())
    return template.render(
        it=evaluation,
        shown=_SHOWN,
        kinds=list(dict.fromkeys(item.queries for item in evaluation.recalls)),
        recalls={(item.queries, item.k): item for item in evaluation.recalls},
        recall_chart=_recall_chart(evaluation),
        partner_chart=_partner_chart(evaluation),
        sweep_chart=_sweep_chart(evaluation),
        histograms=[_histogram(latency) for latency in evaluation.latencies],
        stages=[
            (name, spent, spent / (max(evaluation.build_seconds.values()) or 1))
            for name, spent in evaluation.build_seconds.items()
        ],
        build_total=total,
        per_vector=evaluation.bytes_vectors / evaluation.rows_indexed,
        per_vector_files=evaluation.bytes_files / evaluation.rows_indexed,
    )


# --- charts: places in the picture, that the template draws

Points = Sequence[tuple[float, float]]


def _chart(
    series: Sequence[dict[str, Any]], x_label: str, x_ticks: Sequence[float] = (), top: float = 1.0
) -> dict[str, Any] | None:
    """Lines over a logarithmic axis; a series has `name`, `style` and `points`, and may have `marks`."""
    series = [item for item in series if item["points"]]
    if not series:
        return None
    xs = [x for item in series for x, _ in item["points"]]
    ys = [y for item in series for _, y in item["points"]]
    low_x, high_x = min(xs), max(xs)
    if high_x < 1.5 * low_x:
        low_x, high_x = low_x / 1.3, high_x * 1.3
    low_y = _floor(min(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / low_x) / math.log(high_x / low_x)
        return round(_LEFT + right * (_RIGHT - _LEFT), 1), round(
            _BOTTOM - (y - low_y) / (top - low_y) * (_BOTTOM - _TOP), 1
        )

    return {
        "x_label": x_label,
        "x_ticks": [(place(x, low_y)[0], f"{x:g}") for x in x_ticks or _ticks(low_x, high_x)],
        "y_ticks": [(place(low_x, y)[1], f"{y:.3g}") for y in (low_y + i * (top - low_y) / 4 for i in range(5))],
        "series": [
            {**item, "points": [(*place(x, y), x, y) for x, y in item["points"]],
             "marks": [(*place(x, y), label) for x, y, label in item.get("marks", ())]}
            for item in series
        ],
    }  # fmt: skip


def _floor(least: float) -> float:
    """Where an axis that ends at 1 begins, so that its quarters are round numbers."""
    return next(low for low in (0.98, 0.96, 0.9, 0.8, 0.6, 0.2, 0.0) if least >= low)


def _ticks(low: float, high: float) -> list[float]:
    """Some round numbers of the range: of equal steps where it is short, else 1, 2, 5, 10, ..., or fewer of these."""
    if high < 6 * low:
        least = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(least))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        found = [tick for tick in ticks if low <= tick * 1.0001 and tick <= high * 1.0001]
        if len(found) <= 8:
            break
    return found


def _recall_chart(evaluation: IndexEvaluation) -> dict[str, Any] | None:
    series = [
        {"name": f"{name} queries", "style": f"c{number}", "points": [(item.k, item.recall) for item in found]}
        for number, (name, found) in enumerate(
            (n, list(g)) for n, g in groupby(evaluation.recalls, lambda i: i.queries)
        )
    ]
    return _chart(series, "k", sorted({item.k for item in evaluation.recalls}))


def _partner_chart(evaluation: IndexEvaluation) -> dict[str, Any] | None:
    series: list[dict[str, Any]] = []
    for number, item in enumerate(evaluation.retrievals):
        name = f"{item.queries} → {item.answers}"
        series.append({"name": f"{name}, exact", "style": f"c{number}", "points": sorted(item.exact.items())})
        if item.indexed:
            points = sorted(item.indexed.items())
            series.append({"name": f"{name}, index", "style": f"c{number} dashed", "points": points})
    return _chart(series, "k", sorted({k for item in evaluation.retrievals for k in item.exact}))


def _sweep_chart(evaluation: IndexEvaluation) -> dict[str, Any] | None:
    if len(evaluation.settings) < 2:
        return None
    stored, *others = evaluation.settings
    series: list[dict[str, Any]] = []
    for number, kind in enumerate(stored.recalls):
        for parameter in dict.fromkeys(item.varied for item in others):
            found = sorted(
                [stored, *(item for item in others if item.varied == parameter)],
                key=lambda item: _value(item, parameter),
            )
            points = [(max(item.p50_ms, 1e-4), item.recalls[kind]) for item in found if kind in item.recalls]
            marks = [
                (x, y, f"{parameter} {_value(item, parameter)}") for (x, y), item in zip(points, found, strict=True)
            ]
            dashed = " dashed" if parameter != others[0].varied else ""
            series.append(
                {"name": f"{kind}, {parameter} varied", "style": f"c{number}{dashed}", "points": points, "marks": marks}
            )
        series.append(
            {"name": "", "style": f"c{number} stored", "points": [(max(stored.p50_ms, 1e-4), stored.recalls[kind])]}
        )
    return _chart(series, "ms, median of one query on one thread")


def _value(setting: Setting, parameter: str) -> int:
    return setting.parameters.get(parameter, 1)


def _histogram(latency: Latency) -> dict[str, Any]:
    edges, highest = latency.edges_ms, max(latency.counts) or 1
    low, high = math.log(max(edges[0], 1e-6)), math.log(max(edges[-1], 1.01e-6))

    def across(milliseconds: float) -> float:
        return round(100 * (math.log(max(milliseconds, 1e-6)) - low) / max(high - low, 1e-9), 2)

    return {
        "latency": latency,
        "bars": [round(100 * count / highest, 1) for count in latency.counts],
        "ticks": [(across(tick), f"{tick:g}") for tick in _ticks(max(edges[0], 1e-6), edges[-1])],
        "p50": across(latency.p50_ms),
        "p99": across(latency.p99_ms),
    }
