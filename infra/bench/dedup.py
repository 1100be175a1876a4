"""`fusion dedup` on synthetic tables: rate, peak memory, and the share of duplicates that it finds.

    python -m infra.bench.dedup [--quick] [--rows 100000 400000]

The vectors have 512 dimensions, of which 32 tell pictures apart: topics of very different sizes, and in them pictures
of which every tenth is a duplicate of another at a cosine of 0.95 to 1. Every hundredth row is a copy to the byte.

exact      equal digests alone
semantic   vectors above a cosine of 0.95, too; `found` is the share of pairs that the run itself measured, `planted`
           the share of planted pairs of which one at most is kept
bits       perceptual hashes (random, every tenth a duplicate in 0 to 4 bits) joined, without reading pictures;
           `planted` is the share joined

Each run on a table is a process of its own: its peak is VmHWM, above that of a process which has imported all of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_core import dedup, manifest, neighbours, table
from fusion_core.writer import UnitWriter
from infra.bench import measure
from infra.bench.table import DIM, SPEC, one_unit
from schemas.feature_table import features_schema

COSINE, UNIT_ROWS, MEANING = 0.95, 10_000, 32
COLUMNS = (
    "what",
    "rows",
    "seconds",
    "CPU s",
    "rows / CPU s",
    "peak MiB",
    "above idle MiB",
    "dropped",
    "cells",
    "found",
    "planted",
)


def pictures(rng: np.random.Generator, topics: np.ndarray, lift: np.ndarray, rows: int) -> np.ndarray:
    """Vectors of low intrinsic dimension, float32 [rows, DIM]: few large topics, many small ones."""
    topic = (len(topics) * rng.random(rows) ** 3).astype(int)
    meaning = topics[topic] + 0.7 * rng.standard_normal((rows, MEANING), np.float32)
    return unit_rows(unit_rows(meaning @ lift) + 0.5 * lift[0] / np.linalg.norm(lift[0]))


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def write_table(place: str, rows: int) -> np.ndarray:
    """Writes the table; returns for each row the row that it is a planted duplicate of, or itself."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((2000, MEANING), np.float32)
    lift = rng.standard_normal((MEANING, DIM), np.float32)
    spec, schema = manifest.claim(place, SPEC), features_schema(SPEC)
    original = np.arange(rows)
    text = table.to_arrow(np.zeros((UNIT_ROWS, DIM), np.float16), schema.field("text_embedding").type)
    earlier, earlier_ids = np.empty((0, DIM), np.float32), np.empty(0, np.int64)
    for number, first in enumerate(range(0, rows, UNIT_ROWS)):
        ids = np.arange(first, first + UNIT_ROWS)
        vectors = pictures(rng, topics, lift, UNIT_ROWS)
        digests = np.zeros((UNIT_ROWS, 4), np.uint64)
        digests[:, 0] = ids
        if number:
            copies = rng.choice(UNIT_ROWS, UNIT_ROWS // 10, replace=False)
            chosen = rng.integers(0, len(earlier), len(copies))
            cosine = rng.uniform(COSINE + 0.001, 0.9995, len(copies)).astype(np.float32)[:, None]
            cosine[::10] = 1
            # As hard as can be: what differs is what tells pictures apart, and so what the cells go by.
            noise = rng.standard_normal((len(copies), MEANING), np.float32) @ lift
            noise = unit_rows(noise - (noise * earlier[chosen]).sum(axis=1, keepdims=True) * earlier[chosen])
            vectors[copies] = cosine * earlier[chosen] + np.sqrt(1 - cosine**2) * noise
            original[ids[copies]] = earlier_ids[chosen]
            digests[copies[::10], 0] = earlier_ids[chosen[::10]]
        fresh = original[ids] == ids
        keep = rng.choice(np.flatnonzero(fresh), 1000, replace=False)
        earlier, earlier_ids = np.concatenate([earlier, vectors[keep]]), np.concatenate([earlier_ids, ids[keep]])
        columns: dict[str, Any] = {field.name: pa.nulls(UNIT_ROWS, field.type) for field in schema}
        columns |= {
            "key": pa.array([f"{row:09d}" for row in ids]),
            "shard": pa.array([one_unit(number).shard] * UNIT_ROWS),
            "row": pa.array(ids - first),
            "width": pa.array(np.full(UNIT_ROWS, 256, np.int32)),
            "height": pa.array(np.full(UNIT_ROWS, 256, np.int32)),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), UNIT_ROWS, [None, pa.py_buffer(digests)]),
            "has_image": pa.array(np.ones(UNIT_ROWS, bool)),
            "has_text": pa.array(np.zeros(UNIT_ROWS, bool)),
            "image_embedding": table.to_arrow(vectors.astype(np.float16), schema.field("image_embedding").type),
            "text_embedding": text,
            "similarity": pa.array(rng.random(UNIT_ROWS, np.float32)),
        }
        with UnitWriter(place, spec, one_unit(number)) as writer:
            writer.write(pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema))
            writer.commit()
    return original


def run_alone(place: str, output: str, cosine: float | None) -> dict[str, Any]:
    """One run in a process of its own: seconds, peak and idle memory."""
    code = (
        "import json, re, sys, time\n"
        "import torch\n"
        "from fusion_core import dedup, table\n"
        "from schemas.dedup import DedupSpec\n"
        "def peak():\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "place, output, cosine = json.loads(sys.argv[1])\n"
        "opened, idle = table.Table.open(place), peak()\n"
        "start, cpu = time.perf_counter(), time.process_time()\n"
        "dedup.build(opened, output, DedupSpec(cosine=cosine))\n"
        "spent = {'seconds': time.perf_counter() - start, 'cpu': time.process_time() - cpu}\n"
        "print(json.dumps({**spent, 'peak': peak(), 'idle': idle}))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([place, output, cosine])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def on_a_table(name: str, place: str, folder: Path, original: np.ndarray, cosine: float | None) -> list[Any]:
    """The line about one way of running on one table."""
    output = str(folder / f"{name}-{len(original)}")
    cost = run_alone(place, output, cosine)
    opened = table.Table.open(place)
    duplicates = dedup.Duplicates.open(output, opened)
    record = duplicates.record
    kept = duplicates.kept()
    planted = np.flatnonzero(original != np.arange(len(original)))
    joined = ~(kept[planted] & kept[original[planted]])
    found = record.pairs_found
    share = found.found / found.pairs if found and found.pairs else ""
    rows = len(original)
    memory = [cost["peak"] / 2**20, (cost["peak"] - cost["idle"]) / 2**20]
    dropped = sum(record.dropped.values())
    planted_share = float(joined.mean()) if cosine else ""
    return [
        name,
        rows,
        cost["seconds"],
        cost["cpu"],
        rows / cost["cpu"],
        *memory,
        dropped,
        record.cells,
        share,
        planted_share,
    ]


def bits(rows: int) -> list[Any]:
    """The line about joining hashes."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, rows, dtype=np.uint64)
    copies, originals = rng.permutation(rows)[: rows // 5].reshape(2, -1)
    flips = np.zeros(len(copies), np.uint64)
    for _ in range(4):
        flips |= np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64)
    hashes[copies] = hashes[originals] ^ flips
    components = neighbours.Components(rows)
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="fusion-bench-") as folder:
        neighbours.join_near_bits(components, [(np.arange(rows), hashes)], rows, 4, folder, dedup.MEMORY_BYTES)
    took, spent = time.perf_counter() - start, time.process_time() - cpu
    roots = components.roots(np.arange(rows))
    dropped = int((roots != np.arange(rows)).sum())
    share = float((roots[copies] == roots[originals]).mean())
    return ["bits", rows, took, spent, rows / spent, "", "", dropped, "", "", share]


def main() -> None:
    """Every size, each way."""
    parser = measure.arguments("dedup", __doc__, repeats=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 400_000], help="default: %(default)s")
    args: argparse.Namespace = parser.parse_args()
    load, lines = measure.Load(), []
    for rows in [30_000] if args.quick else args.rows:
        with tempfile.TemporaryDirectory(prefix="fusion-bench-") as name:
            place = str(Path(name) / "table")
            original = write_table(place, rows // UNIT_ROWS * UNIT_ROWS)
            lines.append(on_a_table("exact", place, Path(name), original, None))
            lines.append(on_a_table("semantic", place, Path(name), original, COSINE))
        lines.append(bits(rows))
    measure.tell("dedup", args, load, COLUMNS, lines)


if __name__ == "__main__":
    main()
