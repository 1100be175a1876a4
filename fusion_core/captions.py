"""Captions for the rows that have a picture and no caption, by a CoCa model, as columns beside the table's rows."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files, images, search
from fusion_core.columns import Columns
from fusion_core.table import Table
from fusion_core.towers import Towers
from schemas.columns import CAPTIONS, CaptionRecord, CaptionSpec
from schemas.feature_table import ManifestRecord

_READERS = 8  # pictures fetched at once
_NEEDED = ["key", "shard", "row", "offset", "length", "sha256", "has_image", "has_text"]
Outcome = np.ndarray | tuple[str, str]  # pixels, or error and message


def write(
    table: Table,
    place: str,
    towers: Towers,
    *,
    max_tokens: int = CaptionSpec.max_tokens,
    passed: Callable[[int], None] = lambda rows: None,
) -> CaptionRecord:
    """The record of the captions that now stand at `place`: parts with the schema CAPTIONS, row by row.

    Pictures are read from their shards by byte range. One that cannot be read has its row's `error` and `message` say
    why; a part with such rows is done again by the next run, other parts that stand are kept. `passed` hears of rows
    done. Raises TowerError for a model that writes no captions, BadColumns for a place that is not ours.
    """
    started = time.perf_counter()
    towers.check_captions()
    columns = Columns("captions", CaptionRecord, files.absolute(place))
    columns.standing()
    _remove_unfinished(columns)
    model = towers.spec
    spec = CaptionSpec(
        model.model, model.pretrained, model.config_sha256, model.weights_sha256, model.precision, max_tokens
    )
    name = f"{model.model} {model.pretrained}".strip() + f" @{model.weights_sha256[:12]}"

    with ThreadPoolExecutor(_READERS, "fusion-caption") as pool:

        def columns_of(record: ManifestRecord) -> pa.Table:
            made = _caption_part(table, record, towers, spec, name, pool)
            passed(record.rows_out)
            return made

        parts = columns.write_parts(table, replace(spec, model="", pretrained=""), CAPTIONS, columns_of)
    captioned, errors = 0, Counter[str]()
    for part in parts:
        rows = columns.read_part(part, ["caption_gen", "error"])
        captioned += len(rows) - rows["caption_gen"].null_count
        errors.update(rows["error"].drop_null().to_pylist())
    record = CaptionRecord(
        table=table.place,
        table_spec=table.spec,
        parts=table.parts,
        spec=spec,
        outputs=tuple(parts),
        rows=table.num_rows,
        captioned=captioned,
        errors=dict(errors.most_common()),
        seconds={"caption": round(time.perf_counter() - started, 3)},
    )
    columns.finish(record)
    return record


def _remove_unfinished(columns: Columns[CaptionRecord]) -> None:
    """Deletes parts in which pictures could not be read: they may be there by now."""
    for entry in files.list_files(files.join(columns.place, columns.kind)):
        with files.open_input(entry.place) as stream:
            try:
                found = pq.read_table(stream, columns=["error"])
            except (pa.ArrowException, OSError):
                continue
        if found["error"].null_count < len(found):
            files.remove(entry.place)


def _caption_part(
    table: Table, record: ManifestRecord, towers: Towers, spec: CaptionSpec, name: str, pool: ThreadPoolExecutor
) -> pa.Table:
    assert record.features is not None
    rows = table.read_part(record.features, _NEEDED)
    wanted = np.flatnonzero(rows["has_image"].to_numpy() & ~rows["has_text"].to_numpy())
    texts: list[str | None] = [None] * len(rows)
    reasons: list[tuple[str, str] | tuple[None, None]] = [(None, None)] * len(rows)
    for start in range(0, len(wanted), towers.batch):
        some = wanted[start : start + towers.batch]
        asked = rows.take(pa.array(some)).to_pylist()
        outcomes = dict(zip(some.tolist(), pool.map(lambda row: _pixels(row, table, towers), asked), strict=True))
        pixels = {row: outcome for row, outcome in outcomes.items() if isinstance(outcome, np.ndarray)}
        if pixels:
            said = towers.caption_images(np.stack(list(pixels.values())), spec.max_tokens, towers.batch)
            for row, text in zip(pixels, said, strict=True):
                texts[row] = text
        for row, outcome in outcomes.items():
            if isinstance(outcome, tuple):
                reasons[row] = outcome
    values = {
        "caption_gen": pa.array(texts, pa.string()),
        "caption_model": pa.array([None if text is None else name for text in texts], pa.string()),
        "error": pa.array([error for error, _ in reasons], pa.string()),
        "message": pa.array([message for _, message in reasons], pa.string()),
    }
    return pa.table({**{column: rows[column] for column in ("key", "shard", "row")}, **values}, CAPTIONS)


def _pixels(row: Mapping[str, Any], table: Table, towers: Towers) -> Outcome:
    """The row's picture as the tower wants it, or why it cannot be had."""
    limits = table.spec.input
    try:
        data = search.fetch_image(row, limits.max_image_bytes, limits)
        return images.decode(data, towers.spec.preprocess, limits.max_pixels).pixels
    except images.BadImage as error:
        return error.error, str(error)
    except OSError as error:
        return "MissingFile", f"{row['shard']} cannot be read: {error}"
    except (ValueError, pa.ArrowException) as error:  # another picture is there now, or the shard is damaged
        return "ImageGone", str(error)
