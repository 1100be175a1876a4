"""Writing, scanning and opening the feature table against raw pyarrow, alternately.

    python -m infra.bench.table [--quick]

write   rows through writer.UnitWriter in batches of 64, hashed, synced and recorded, against pq.write_table of the same
        rows with the same settings, bare and with what the table adds to it: fsync and SHA-256
scan    an embedding column into numpy: Table.vectors (with the column of flags) against pq.read_table of the column
open    Table.open of many units: synthetic records, written by manifest.write_record and compacted
"""

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import manifest, table, unit
from fusion_core.writer import UnitWriter
from infra.bench import measure, photos
from schemas.feature_table import (
    ROW_GROUP_ROWS,
    ManifestRecord,
    Part,
    Preprocess,
    TableSpec,
    TowerSpec,
    features_schema,
)
from schemas.samples import InputIdentity, Unit

DIM, BATCH = 512, 64
SPEC = TableSpec(TowerSpec("bench", "", "c" * 64, "w" * 64, DIM, "fp32", Preprocess(224, 224, (0.5,) * 3, (0.5,) * 3)))
COLUMNS = ("what", "rows or units", "fusion", "raw pyarrow", "fusion ÷ raw", "raw + fsync + SHA-256", "unit")


def one_unit(number: int) -> Unit:
    """The unit of a tar that nothing lies behind."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    shard = f"/data/photographs/train/{number:06d}.tar"
    identity = InputIdentity(300_000_000 + number, 1_790_000_000_000_000_000 + number)
    return Unit(f"{number:06d}-{digest[:12]}", "tar", shard, identity)


def feature_rows(n: int) -> pa.Table:
    """Rows as a job writes them, with random unit vectors."""
    rng = np.random.default_rng(0)
    schema = features_schema(SPEC)
    vectors = [rng.standard_normal((n, DIM), np.float32) for _ in range(2)]
    halves = [(matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16) for matrix in vectors]
    captions = photos.captions(n)
    columns: dict[str, Any] = {
        "key": [f"{i:09d}" for i in range(n)],
        "shard": ["/data/photographs/train/000000.tar"] * n,
        "row": np.arange(n),
        "offset": np.arange(n) * 30_000,
        "length": rng.integers(20_000, 30_000, n),
        "caption": captions,
        "url": [f"https://pictures.example/{i}.jpg" for i in range(n)],
        "width": np.full(n, 256, np.int32),
        "height": np.full(n, 256, np.int32),
        "sha256": [hashlib.sha256(text.encode()).digest() for text in captions],
        "has_image": np.ones(n, bool),
        "has_text": np.ones(n, bool),
        "similarity": rng.random(n, np.float32),
        "meta": ['{"width": 256, "height": 256}'] * n,
    }
    for name, matrix in zip(("image_embedding", "text_embedding"), halves, strict=True):
        columns[name] = table.to_arrow(matrix, schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


# --- write ----------------------------------------------------------------------------------------------------------


def write_ours(rows: pa.Table, folder: Path) -> float:
    """Rows per second into one unit's part, with its record."""
    place = str(Path(tempfile.mkdtemp(dir=folder)))
    batches = rows.to_batches(BATCH)

    def write() -> None:
        with UnitWriter(place, SPEC, one_unit(0)) as writer:
            for batch in batches:
                writer.write(batch)
            writer.commit()

    took = measure.seconds(write)
    shutil.rmtree(place)
    return rows.num_rows / took


def write_raw(rows: pa.Table, folder: Path, durable: bool) -> float:
    """Rows per second with pq.write_table."""
    path = folder / "raw.parquet"
    vectors = ("image_embedding.list.element", "text_embedding.list.element")
    scalars = [name for name in rows.schema.names if not name.endswith("_embedding")]

    def write() -> None:
        pq.write_table(
            rows,
            path,
            row_group_size=ROW_GROUP_ROWS,
            compression={**dict.fromkeys(scalars, "ZSTD"), **dict.fromkeys(vectors, "NONE")},
            use_dictionary=["shard", "caption", "url"],
            write_statistics=scalars,
        )
        if durable:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                hashlib.file_digest(stream, "sha256")

    return rows.num_rows / measure.seconds(write)


def write(rows: pa.Table, folder: Path, repeats: int) -> list[Any]:
    """The table's line about writing."""
    found = measure.alternately(
        {
            "fusion": partial(write_ours, rows, folder),
            "raw": partial(write_raw, rows, folder, False),
            "durable": partial(write_raw, rows, folder, True),
        },
        repeats,
    )
    ratio = found["fusion"] / found["raw"]
    return ["write", rows.num_rows, found["fusion"], found["raw"], ratio, found["durable"], "rows/s"]


# --- scan -----------------------------------------------------------------------------------------------------------


def scan_ours(place: Path) -> float:
    """Rows per second out of an open table."""
    opened = table.Table.open(str(place))
    return opened.num_rows / measure.seconds(lambda: [matrix for _, matrix, _ in opened.vectors("image_embedding")])


def scan_raw(place: Path, rows: int) -> float:
    """Rows per second out of the same files."""
    paths = sorted(place.glob("features/*.parquet"))

    def read() -> list[np.ndarray]:
        columns = (pq.read_table(path, columns=["image_embedding"])["image_embedding"] for path in paths)
        return [chunk.flatten().to_numpy().reshape(-1, DIM) for column in columns for chunk in column.chunks]

    return rows / measure.seconds(read)


def scan(rows: pa.Table, units: int, folder: Path, repeats: int) -> list[Any]:
    """The table's line about scanning."""
    place = folder / "table"
    manifest.claim(str(place), SPEC)
    for number in range(units):
        with UnitWriter(str(place), SPEC, one_unit(number)) as writer:
            writer.write(rows.combine_chunks().to_batches()[0])
            writer.commit()
    found = measure.alternately(
        {"fusion": partial(scan_ours, place), "raw": partial(scan_raw, place, units * rows.num_rows)}, repeats
    )
    return ["scan", units * rows.num_rows, *found.values(), found["fusion"] / found["raw"], "", "rows/s"]


# --- open -----------------------------------------------------------------------------------------------------------


def record(number: int) -> ManifestRecord:
    """A unit's record, as large as a real one."""
    part = Part(f"features/{number:06d}-{'a' * 12}-{'b' * 16}.parquet", 10_000, 21_000_000, "d" * 64)
    stages = ("read", "decode", "embed_image", "embed_text", "fuse", "write", "unit")
    return ManifestRecord(
        unit=one_unit(number),
        spec_fingerprint=SPEC.fingerprint,
        rows_in=10_000,
        rows_out=10_000,
        rows_dead=0,
        features=part,
        seconds=dict.fromkeys(stages, 1.0 + number / 7),
        versions=unit.versions(),
        finished_at="2026-11-21T00:00:00+00:00",
    )


def open_many(sizes: Sequence[int], folder: Path, repeats: int) -> list[list[Any]]:
    """The table's lines about opening; records come on top of those of the size before."""
    place, found, written = str(folder / "many"), [], 0
    manifest.claim(place, SPEC)
    for units in sizes:
        with ThreadPoolExecutor(16) as pool:  # each record is synced to the disk: wait for many at once
            list(pool.map(lambda number: manifest.write_record(place, record(number)), range(written, units)))
        written = units
        compacting = measure.seconds(lambda: manifest.compact(place))
        took = measure.alternately({"open": lambda: measure.seconds(lambda: table.Table.open(place))}, repeats)["open"]
        found.append(["open", units, took, "", "", "", f"s (compacting {compacting:.1f} s)"])
    return found


def main() -> None:
    """Write, scan, open."""
    parser = measure.arguments("table", __doc__, repeats=5)
    args: argparse.Namespace = parser.parse_args()
    load = measure.Load()
    n, units, sizes = (2_000, 2, (500, 2_000)) if args.quick else (10_000, 10, (20_000, 100_000))
    with tempfile.TemporaryDirectory(prefix="fusion-bench-") as name:
        folder, rows = Path(name), feature_rows(n)
        found = [write(rows, folder, args.repeats), scan(rows, units, folder, args.repeats)]
        found += open_many(sizes, folder, args.repeats)
    measure.tell("table", args, load, COLUMNS, found)


if __name__ == "__main__":
    main()
