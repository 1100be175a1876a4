"""clip-retrieval's `clip inference` and `fusion embed` on the same shards, model and weights, side by side, in turns.

    python -m infra.bench.peer [--quick] [--model tiny demo vit]

clip-retrieval comes from the package index into an environment of its own below --cache, made at the first run; it runs
as it is installed, through infra/bench/peer_runner.py, which teaches it to find weights on this disk and takes its
statistics in its own process: the two processes that it starts for them would import torch while it is measured.

Its loop: from its first request for a batch to its last written batch, as its own statistics count (which leaves out
its warm-up). Ours: the whole of pipelines.embed.run (infra/bench/job.py). The rest of each process's life is start-up.
"In CPU-s" compares samples per CPU-second, which count alike when other processes take cores away.
`cosine` is the least between the two sides' vectors of the same pair.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fusion_core import table
from infra.bench import job, measure, models, photos
from infra.bench.models import Model

# clip-retrieval's own dependency `clip` imports pkg_resources.packaging, which newer setuptools do not have.
PACKAGES = ("clip-retrieval==2.45.0", "setuptools<70")
COLUMNS = (
    "model", "side", "samples", "loop samples/s", "per CPU-s", "start-up s", "fusion ÷ it", "in CPU-s",
    "cosine image", "cosine text",
)  # fmt: skip


def environment(cache: Path) -> Path:
    """The Python that has clip-retrieval."""
    folder = cache / "peer"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run(
            ["uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python), *PACKAGES], check=True
        )
        (folder / "ready").touch()
    return python


def theirs(
    python: Path, model: Model, shards: Sequence[Path], output: Path, batch: int, workers: int
) -> dict[str, Any]:
    """One run of `clip inference`: {samples, loop_seconds, loop_cpu_seconds, other_seconds}."""
    folder = shards[0].parent
    pattern = f"{folder}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    weights = model.pretrained or str(models.folder_of(model))
    runner = str(Path(__file__).with_name("peer_runner.py"))
    command = [python, "-P", "-W", "ignore", runner, model.name, weights, pattern, output, str(batch), str(workers)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout[-1000:] + done.stderr[-3000:]
        raise RuntimeError(f"clip inference ended with {done.returncode}:\n{said}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(model: Model, precision: str, shards: Sequence[Path], output: Path) -> dict[str, Any]:
    """One run of `fusion embed`: {samples, loop_seconds, loop_cpu_seconds, other_seconds}."""
    argv = ["embed", "--input", *map(str, shards), "--output", str(output), *model.options, "--precision", precision]
    cost = job.run([*argv, "--device", "cpu", "--quiet"])
    samples = table.Table.open(str(output)).num_rows
    return {
        "samples": samples,
        "loop_seconds": cost["job_seconds"],
        "loop_cpu_seconds": cost["job_cpu_seconds"],
        "other_seconds": cost["other_seconds"],
    }


def cosines(theirs: Path, ours: Path) -> list[float]:
    """The least cosine between the two sides' image vectors, and text vectors, of the same key."""
    rows = table.Table.open(str(ours))
    keys = [key for batch in rows.scan(["key"]) for key in batch["key"].to_pylist()]
    places = {key: i for i, key in enumerate(keys)}
    known = pq.read_table(theirs / "metadata")["image_path"].to_pylist()
    found = []
    for column, name in (("image_embedding", "img_emb"), ("text_embedding", "text_emb")):
        here = np.concatenate([matrix for _, matrix, _ in rows.vectors(column)]).astype(np.float32)
        there = np.load(theirs / name / f"{name}_0.npy").astype(np.float32)
        matched = here[[places[key] for key in known]]
        lengths = np.linalg.norm(matched, axis=1) * np.linalg.norm(there, axis=1)
        found.append(float(((matched * there).sum(axis=1) / lengths).min()))
    return [round(value, 6) for value in found]


def rows(name: str, model: Model, pairs: int, precisions: Sequence[str], args: argparse.Namespace) -> list[list[Any]]:
    """The lines of one model: clip-retrieval as it is by default, as it is best here, and ours by precision."""
    shards = photos.write_shards(args.cache, "small", pairs, 2 if name == "vit" else 4)
    python = environment(args.cache)
    costs: dict[str, list[dict[str, Any]]] = {}
    apart: dict[str, list[float]] = {}
    settings = {"clip-retrieval, batch 64, 2 readers": (64, 2)}
    if name != "vit":  # its warm-up of two batches alone would take minutes with the large one
        settings["clip-retrieval, its defaults"] = (256, 4)
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="fusion-bench-") as folder:
            place = Path(folder)
            for who, (batch, workers) in settings.items():
                found = theirs(python, model, shards, place / who, batch, workers)
                costs.setdefault(who, []).append(found)
            for precision in precisions:
                found = ours(model, precision, shards, place / precision)
                costs.setdefault(f"fusion {precision}", []).append(found)
                apart[f"fusion {precision}"] = cosines(place / next(iter(settings)), place / precision)
    rates = {who: median(cost["samples"] / cost["loop_seconds"] for cost in found) for who, found in costs.items()}
    cpu = {who: median(cost["samples"] / cost["loop_cpu_seconds"] for cost in found) for who, found in costs.items()}
    best, lines = f"fusion {precisions[0]}", []
    for who, found in costs.items():
        start = median(cost["other_seconds"] for cost in found)
        figures = [rates[who], cpu[who], start, rates[best] / rates[who], cpu[best] / cpu[who]]
        lines.append([name, who, found[0]["samples"], *figures, *apart.get(who, ["", ""])])
    return lines


def main() -> None:
    """All models."""
    parser = measure.arguments("peer", __doc__, repeats=2)
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=models.NAMES)
    parser.add_argument("--precision", nargs="+", default=["auto", "fp32"], help="ours; the first is compared with")
    parser.add_argument("--pairs", type=int, help="samples (default: 12288, with vit 1024)")
    args = parser.parse_args()
    environment(args.cache)
    load, found = measure.Load(), []
    for name in args.model:
        model = models.named(name, args.cache)
        pairs = args.pairs or (1024 if name == "vit" else 12288) // (8 if args.quick else 1)
        found += rows(name, model, pairs, args.precision, args)
    measure.tell("peer", args, load, COLUMNS, found, packages=PACKAGES)


if __name__ == "__main__":
    main()
