"""The run report: one HTML page that stands alone, without scripts."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageOps

from fusion_core import files, training
from fusion_core.table import Table
from schemas.feature_table import RunRecord
from schemas.fuser import FuserRecord
from schemas.index import IndexRecord
from schemas.samples import ERRORS

FUSERS_TITLE = "What trained fusers bring"

_MAX_LETTERS = 100
_MAX_PARTS = 50  # parts looked into for the histogram and the dead letters: the report's cost stays bounded
_BINS = 60


def write(
    table: Table,
    place: str,
    title: str,
    run: RunRecord | None = None,
    index: IndexRecord | None = None,
    searches: Sequence[Mapping[str, Any]] = (),
    fusers: Sequence[FuserRecord] = (),
) -> None:
    """Writes the report of a table, and of a run, an index, searches and fusers where given, as `place/report.html`.

    A search is a mapping with `title`, optionally `query_image` (a data URI), and `hits`: rows of a search result with
    a `picture` (a data URI or None). Fusers are trained ones, for retrieval, all with the same rows and views.
    """
    page = _template().render(
        title=title,
        table=_describe_table(table),
        run=_describe_run(run) if run else None,
        index=_describe_index(index) if index else None,
        searches=searches,
        fusers_title=FUSERS_TITLE,
        fusers=training.compare(fusers) if fusers else None,
        stages=_stages(table),
        errors=_errors(table),
        letters=_letters(table),
        histogram=_histogram(table),
    )
    files.write_bytes(place, "report.html", page.encode())


def picture(data: bytes, pixels: int = 224) -> str:
    """A small copy of an image as a data URI."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image.thumbnail((pixels, pixels))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _template() -> jinja2.Template:
    source = Path(__file__).with_name("report.html").read_text("utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)


def _describe_table(table: Table) -> dict[str, Any]:
    tower, fuser = table.spec.tower, table.spec.fuser
    return {
        "place": table.place,
        "model": table.spec.models,
        "precision": tower.precision,
        "dim": tower.embedding_dim,
        "fuser": fuser.type if fuser else "",
        "samples": sum(record.rows_in for record in table.records),
        "rows": table.num_rows,
        "dead": sum(record.rows_dead for record in table.records),
        "opted_out": table.rows_opted_out,
        "units": len(table.records),
    }


def _describe_run(run: RunRecord) -> dict[str, Any]:
    start, end = datetime.fromisoformat(run.started_at), datetime.fromisoformat(run.updated_at)
    seconds = max((end - start).total_seconds(), 1.0)
    return {
        "rate": run.samples_done / seconds,
        "elapsed": f"{seconds / 3600:.1f} h" if seconds > 7200 else f"{seconds:.0f} s",
        "state": run.state,
        "units_done": run.units_done,
        "units_skipped": run.units_skipped,
    }


def _describe_index(index: IndexRecord) -> dict[str, Any]:
    return {
        "factory": index.factory,
        "column": index.column,
        "rows_indexed": index.rows_indexed,
        "rows_table": index.rows_table,
        "bytes": index.size_bytes,
        "shards": max(1, len(index.shards)),
        "parameters": index.parameters,
        "target": index.target_recall,
        "recalls": index.recalls,
        "latency_ms": index.latency_ms,
        "candidates": _describe_candidates(index),
    }


def _describe_candidates(index: IndexRecord) -> list[dict[str, Any]]:
    """What was tried, with places in a plot of 100 × 100: log microseconds to the right, recall upwards."""
    tried = index.training.candidates if index.training else ()
    if not tried:
        return []
    times = np.log10([max(item.expected_microseconds, 1) for item in tried])
    least = [min(item.recalls.values(), default=0.0) for item in tried]
    sizes = np.sqrt([item.bytes_per_vector for item in tried])
    low = min(*least, index.target_recall) - 0.02
    span = max(times.max() - times.min(), 0.3)
    return [
        {
            "factory": item.factory,
            "parameters": ", ".join(f"{name} {value}" for name, value in item.parameters.items()),
            "recalls": item.recalls,
            "bytes": item.bytes_per_vector,
            "microseconds": item.microseconds,
            "expected": item.expected_microseconds,
            "chosen": item.chosen,
            "low": low,
            "x": 8 + 84 * float(x - times.min()) / span,
            "y": 92 - 84 * (recall - low) / (1.0 - low),
            "radius": 1 + 3 * float(size / sizes.max()),
            "target_y": 92 - 84 * (index.target_recall - low) / (1.0 - low),
        }
        for item, x, recall, size in zip(tried, times, least, sizes, strict=True)
    ]


def _stages(table: Table) -> list[dict[str, Any]]:
    seconds = table.seconds
    seconds.pop("unit", None)
    total = sum(seconds.values()) or 1.0
    samples = sum(record.rows_in for record in table.records)
    return [
        {"name": stage, "seconds": spent, "rate": samples / spent if spent else 0.0, "share": spent / total}
        for stage, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _errors(table: Table) -> list[dict[str, Any]]:
    return [{"name": error, "count": count, "meaning": ERRORS.get(error, "")} for error, count in table.errors.items()]


def _letters(table: Table) -> list[dict[str, Any]]:
    letters: list[dict[str, Any]] = []
    for record in table.records:
        if record.dead_letters and len(letters) < _MAX_LETTERS:
            letters += table.read_part(record.dead_letters).slice(0, _MAX_LETTERS - len(letters)).to_pylist()
    return letters


def _histogram(table: Table) -> dict[str, Any] | None:
    parts = table.parts[:: max(1, len(table.parts) // _MAX_PARTS)]
    found = [pc.drop_null(table.read_part(part, ["similarity"])["similarity"]).to_numpy() for part in parts]
    values = np.concatenate([*found, np.empty(0, np.float32)])
    if not len(values):
        return None
    counts, edges = np.histogram(values, bins=_BINS)
    return {
        "bars": (counts / counts.max()).tolist(),
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "n": len(values),
        "mean": float(values.mean()),
    }
