"""Rows per second of the training feed beside embedding-reader and a plain pyarrow scan, in turns.

    python -m infra.bench.feed [--quick]

All give batches of 1,024 image embeddings of the same rows (512 float16 numbers), nothing else, from warm files:

fusion                    Table.torch, shuffled at both levels, float16 tensors; in order; and by two loader workers
embedding-reader          its batches are float32, always in order; from `fusion export --format clip-retrieval`, and
                          from the table's own Parquet files
pyarrow                   a scan of the column with pyarrow.dataset, batches left in Arrow

embedding-reader comes from the package index into an environment of its own below --cache, made at the first run. Every
case is a process of its own, which reads everything once before it measures, so that imports do not count. `fusion ÷`
compares the shuffled feed; "in CPU-s" compares rows per CPU-second.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from fusion_core import export
from infra.bench import measure
from infra.bench.vectors import write_table

PACKAGES = ("embedding-reader==1.8.1",)
COLUMN, BATCH_ROWS = "image_embedding", 1024
COLUMNS = ("side", "rows", "rows/s", "rows per CPU-s", "fusion ÷ it", "in CPU-s", "peak MiB")

_MEASURE = """
import json, resource, sys, time
def cpu_seconds():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
def run(passes):
    passes()
    start, cpu = time.perf_counter(), cpu_seconds()
    rows = passes()
    took, busy = time.perf_counter() - start, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "seconds": took, "cpu_seconds": busy, "peak_mib": peak}))
place, column, batch_rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
"""
_OURS = """
from fusion_core.table import Table
feed = Table.open(place).torch([column], shuffle={shuffle}, batch_rows=batch_rows)
run(lambda: sum(len(batch[column]) for batch in feed))
"""
_LOADER = """
from torch.utils.data import DataLoader
from fusion_core.table import Table
loader = DataLoader(Table.open(place).torch([column], batch_rows=batch_rows), batch_size=None, num_workers=2)
run(lambda: sum(len(batch[column]) for batch in loader))
"""
_PYARROW = """
from fusion_core.table import Table
dataset = Table.open(place).dataset()
run(lambda: sum(batch.num_rows for batch in dataset.to_batches(columns=[column], batch_size=batch_rows)))
"""
_READER = """
from embedding_reader import EmbeddingReader
reader = EmbeddingReader(embeddings_folder=place, file_format="{format}", embedding_column=column)
run(lambda: sum(len(found) for found, _ in reader(batch_size=batch_rows, show_progress=False)))
"""


def environment(cache: Path) -> Path:
    """The Python that has embedding-reader."""
    folder = cache / "embedding-reader"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *PACKAGES], check=True)
        (folder / "ready").touch()
    return python


def measured(python: str | Path, code: str, place: Path) -> dict[str, Any]:
    """One case: {rows, seconds, cpu_seconds, peak_mib}."""
    argv = [str(python), "-W", "ignore", "-c", _MEASURE + code, str(place), COLUMN, str(BATCH_ROWS)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """All cases in turns."""
    parser = measure.arguments("feed", __doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=250_000)
    args: argparse.Namespace = parser.parse_args()
    rows = 30_000 if args.quick else args.rows
    theirs = environment(args.cache)
    place = args.cache / f"vectors-{rows}"
    exported = args.cache / f"clip-retrieval-{rows}"
    export.write(write_table(place, rows), str(exported), "clip-retrieval")
    cases = {
        "fusion, shuffled": (sys.executable, _OURS.format(shuffle=True), place),
        "fusion, in order": (sys.executable, _OURS.format(shuffle=False), place),
        "fusion, shuffled, 2 loader workers": (sys.executable, _LOADER, place),
        "embedding-reader, .npy": (theirs, _READER.format(format="npy"), exported / "img_emb"),
        "embedding-reader, Parquet": (theirs, _READER.format(format="parquet"), place / "features"),
        "pyarrow": (sys.executable, _PYARROW, place),
    }
    load = measure.Load()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for turn in range(args.repeats):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            found[name].append(measured(*cases[name]))
    speed = {name: median(run["rows"] / run["seconds"] for run in runs) for name, runs in found.items()}
    cpu = {name: median(run["rows"] / run["cpu_seconds"] for run in runs) for name, runs in found.items()}
    ours = next(iter(cases))
    lines = [
        [
            name, runs[0]["rows"], speed[name], cpu[name], speed[ours] / speed[name], cpu[ours] / cpu[name],
            max(run["peak_mib"] for run in runs),
        ]
        for name, runs in found.items()
    ]  # fmt: skip
    assert {line[1] for line in lines} == {rows}
    measure.tell("feed", args, load, COLUMNS, lines, packages=PACKAGES, runs=found)


if __name__ == "__main__":
    main()
