"""A table made anew from a table, row for row: other fused vectors, or captions embedded by another text tower.

Nothing but the stored rows is read: no picture is decoded or embedded.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from fusion_core import table, unit
from fusion_core.opt_out import letters_of
from fusion_core.table import Table
from fusion_core.towers import Towers
from fusion_core.writer import UnitWriter
from schemas.feature_table import ROW_GROUP_ROWS, ManifestRecord, TableSpec, features_schema


@dataclass(frozen=True)
class FuseWork:
    """A unit to fuse: its record in the table that it is read from, and what stands where it is written to."""

    source: ManifestRecord
    work: unit.Work


def fuse_unit(
    item: FuseWork,
    source: Table,
    output: str,
    spec: TableSpec,
    done: Callable[[int], None] = lambda n: None,
    text: Towers | None = None,
) -> ManifestRecord:
    """Writes one unit into the table at `output`, whose fuser lies there, and returns its record.

    Rows, their order and dead letters are those of `source`. `text`: the towers that embed the captions anew; those
    that the unit's earlier part knows keep their vectors. Raises OSError, SchemaMismatch and FuserError.
    """
    clock, started = unit.Clock(), time.perf_counter()
    of_unit = Table(source.place, source.spec, (item.source,))
    known = unit.earlier_vectors(output, spec, item.work.previous).texts if text else {}
    reused = 0 if text else item.source.rows_out
    with UnitWriter(output, spec, item.work.unit, item.work.previous, item.work.stale) as writer:
        for rows in clock.each("read", of_unit.scan(batch_rows=ROW_GROUP_ROWS)):
            if text:
                with clock("embed_text"):
                    rows, n_new = _with_texts(rows, text, known)
                reused += rows.num_rows - n_new
            with clock("fuse"):
                fused = fuse_rows(rows, spec, output)
            with clock("write"):
                writer.write(fused)
            done(rows.num_rows)
        writer.reject(letters_of(of_unit.dead_letters()))
        writer.leave_out_as(item.source)
        with clock("write"):
            return writer.commit(
                rows_reused=reused,
                source_sha256=source_sha256(item.source),
                opt_out_sha256=item.source.opt_out_sha256,
                seconds={**clock.seconds, "unit": time.perf_counter() - started},
                versions=unit.versions(),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )


def fuse_rows(rows: pa.RecordBatch, spec: TableSpec, place: str) -> pa.RecordBatch:
    """Feature rows with the columns that the spec's fuser makes of them, in place of those they had."""
    schema = features_schema(spec)
    image, text = (table.to_numpy(rows[name]) for name in ("image_embedding", "text_embedding"))
    has_image, has_text = (np.asarray(rows[f"has_{side}"].to_numpy(zero_copy_only=False)) for side in ("image", "text"))
    fused = unit.fused(image, text, has_image, has_text, spec, place)
    made = {name: table.to_arrow(matrix, schema.field(name).type) for name, matrix in fused.items()}
    return pa.RecordBatch.from_arrays(
        [made[name] if name in made else rows[name] for name in schema.names], schema=schema
    )


def _with_texts(rows: pa.RecordBatch, text: Towers, known: dict[str, np.ndarray]) -> tuple[pa.RecordBatch, int]:
    """The rows with their captions embedded by `text`, and how many captions were new; `known` learns them."""
    captions = rows["caption"].to_pylist()
    worded = np.flatnonzero([unit.has_words(caption) for caption in captions]).tolist()
    new = list(dict.fromkeys(captions[row] for row in worded if captions[row] not in known))
    embedded = dict(zip(new, text.embed_texts(new, text.batch).astype(np.float16), strict=True)) if new else {}
    image = table.to_numpy(rows["image_embedding"])
    matrix = np.zeros_like(image)
    for row in worded:
        caption = captions[row]
        matrix[row] = known[caption] if caption in known else embedded[caption]
    if len(known) < unit.KNOWN_LIMIT:
        known.update(embedded)
    has_text = np.zeros(rows.num_rows, bool)  # an imported row may have a caption without a vector
    has_text[worded] = True
    both = has_text & rows["has_image"].to_numpy(zero_copy_only=False)
    made = {
        "has_text": pa.array(has_text),
        "text_embedding": table.to_arrow(matrix, rows.schema.field("text_embedding").type),
        "similarity": unit.similarity(image, matrix, both),
    }
    columns = [made.get(name, rows[name]) for name in rows.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=rows.schema), len(new)


def source_sha256(record: ManifestRecord) -> str:
    """What tells whether a unit of the source is still what it was: SHA-256 (hex) over its parts' own."""
    parts = [part.sha256 if part else "" for part in (record.features, record.dead_letters)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
