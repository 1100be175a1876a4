"""An evaluation as one HTML page that stands alone, without scripts; its plots are SVG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from schemas.evaluation import Calibration, Classification, EvaluationRecord, Geometry, Probe, Retrieval

_WIDTH, _HEIGHT = 320, 200  # of a plot's inside
_MOST_CLASSES_DRAWN = 30
_LINES = 60  # pairs joined in the projection: more hide the points
_HEADLINE = "macro-F1"


def render(record: EvaluationRecord) -> bytes:
    """The page, as UTF-8."""
    source = Path(__file__).with_name("evaluation.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = _figure
    page = environment.from_string(source).render(
        record=record,
        width=_WIDTH,
        height=_HEIGHT,
        curves=_curves(record.retrieval),
        ticks=[{"x": _log_x(k), "k": k} for k in (1, 3, 10, 30, 100)],
        histogram=_histogram(record.geometry) if record.geometry else None,
        projection=_projection(record.geometry) if record.geometry else None,
        zero_shot=_classification(record.zero_shot.result) if record.zero_shot else None,
        reliability=[_reliability(of) for of in record.zero_shot.calibration] if record.zero_shot else [],
        probes=_probes(record.probes),
        best=_best(record.probes),
    )
    return page.encode()


def _figure(figure: Any, percent: bool = True) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    return f"{figure.value * scale:.{digits}f} [{figure.low * scale:.{digits}f}, {figure.high * scale:.{digits}f}]"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _log_x(k: float) -> float:
    return _WIDTH * math.log10(k) / 2


def _curves(found: Sequence[Retrieval]) -> list[dict[str, Any]]:
    """Lines of hit@k and recall@k over k, from 1 to 100 by its logarithm."""
    curves = []
    for number, one in enumerate(found):
        for place, name, dash in ((1, "hit@k", ""), (2, "recall@k", "5 4")):
            points = [(_log_x(at[0]), _HEIGHT * (1 - at[place])) for at in one.curve]
            if place == 2 and not one.several_relevant:
                continue  # the same line
            colour = "var(--second)" if number else "var(--bar)"
            curves.append({"name": f"{one.direction}, {name}", "points": _path(points), "dash": dash, "colour": colour})
    return curves


def _histogram(geometry: Geometry) -> dict[str, Any]:
    found = geometry.histogram
    bars: dict[str, Any] = {"low": found.low, "high": found.high}
    for name, counts in (("matching", found.matching), ("mismatched", found.mismatched)):
        share = [count / max(1, sum(counts)) for count in counts]
        bars[name] = share
    top = max(*bars["matching"], *bars["mismatched"], 1e-9)
    step = _WIDTH / len(found.matching)
    for name in ("matching", "mismatched"):
        bars[name] = [
            {"x": round(i * step, 1), "y": round(_HEIGHT * (1 - of / top), 1), "height": round(_HEIGHT * of / top, 1)}
            for i, of in enumerate(bars[name])
        ]
    return bars | {"step": round(step, 1)}


def _projection(geometry: Geometry) -> dict[str, Any]:
    both = (*geometry.projection_image, *geometry.projection_text)
    lows, highs = ([of(point[axis] for point in both) for axis in (0, 1)] for of in (min, max))

    def placed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        spans = [max(high - low, 1e-6) for low, high in zip(lows, highs, strict=True)]
        return [
            (round(_WIDTH * (x - lows[0]) / spans[0], 1), round(_HEIGHT * (1 - (y - lows[1]) / spans[1]), 1))
            for x, y in points
        ]

    image, text = placed(geometry.projection_image), placed(geometry.projection_text)
    return {"image": image, "text": text, "lines": list(zip(image, text, strict=True))[:_LINES]}


def _classification(found: Classification) -> dict[str, Any]:
    names = [one.label for one in found.classes]
    wrong = [(count, names[true], names[said]) for true, said, count in found.cells if true != said]
    drawn: list[dict[str, Any]] = []
    side = 0.0
    if len(names) <= _MOST_CLASSES_DRAWN:
        side = min(44.0, 420 / len(names))
        counts = {(true, said): count for true, said, count in found.cells}
        for true, one in enumerate(found.classes):
            for said in range(len(names)):
                count = counts.get((true, said), 0)
                share = count / max(1, one.rows)
                drawn.append({"x": said * side, "y": true * side, "share": round(share, 3), "count": count})
    return {
        "names": names,
        "cells": drawn,
        "side": side,
        "margin": min(150, 8 + 7 * max(map(len, names))),
        "wrong": sorted(wrong, reverse=True)[:10],
        "classes": found.classes,
    }


def _reliability(found: Calibration) -> dict[str, Any]:
    points = [(_HEIGHT * mean, _HEIGHT * (1 - share)) for mean, share, _ in found.bins]
    return {"of": found, "points": [(round(x, 1), round(y, 1)) for x, y in points], "line": _path(points)}


def _probes(found: Sequence[Probe]) -> list[dict[str, Any]]:
    """The probes classifier by classifier, each with its bar."""
    kinds = list(dict.fromkeys(one.classifier for one in found))
    ordered = sorted(found, key=lambda one: kinds.index(one.classifier))
    return [{"of": one, "bar": round(100 * one.result.figures[_HEADLINE].value, 1)} for one in ordered]


def _best(found: Sequence[Probe]) -> dict[str, Any] | None:
    if not found:
        return None
    best = max(found, key=lambda one: one.result.figures[_HEADLINE].value)
    return {"of": best, "drawn": _classification(best.result)}
