"""Peak memory and rate of `fusion embed` at 1, 4 and 16 times the input, with one worker and with two.

    python -m infra.bench.scale [--quick]

Each job is a process of its own (infra/bench/job.py): its peak memory with its workers', and samples by the seconds of
the job proper, without imports and the loading of the model. Larger inputs have more shards; `one shard` has all of 4
times the input in one.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fusion_core import towers
from infra.bench import job, measure, photos

TIMES = (1, 4, 16)
COLUMNS = ("input", "workers", "samples", "peak MiB", "peak ÷ 1x", "samples/s", "seconds ÷ (n x 1x)", "÷ 1 worker")


def inputs(cache: Path, folder: Path, shards: int, pairs: int, times: int) -> list[str]:
    """Patterns of `times` copies, by hard link, of the same shards."""
    made = photos.write_shards(cache, "small", pairs, shards)
    place = folder / f"{times}x"
    place.mkdir()
    for copy in range(times):
        for path in made:
            os.link(path, place / f"{copy:03d}-{path.name}")
    return [str(place / "*.tar")]


def embed(inputs: Sequence[str], workers: int) -> dict[str, Any]:
    """What the job cost."""
    with tempfile.TemporaryDirectory(prefix="fusion-bench-") as place:
        argv = ["--input", *inputs, "--output", f"{place}/table", "--model", towers.DEMO]
        return job.run(["embed", *argv, "--workers", str(workers), "--device", "cpu", "--quiet"], peak=True)


def main() -> None:
    """Two numbers of workers by four inputs; the rounds go through all of them, so that noise falls on all alike."""
    parser = measure.arguments("scale", __doc__, repeats=1)
    parser.add_argument("--pairs", type=int, default=1536, help="samples of the input at 1x (default: %(default)s)")
    args = parser.parse_args()
    pairs, load = args.pairs // (6 if args.quick else 1), measure.Load()
    with tempfile.TemporaryDirectory(prefix="fusion-bench-", dir=args.cache) as name:
        given = {f"{n}x": (n * pairs, inputs(args.cache, Path(name), 4, pairs, n)) for n in TIMES}
        alone = photos.write_shards(args.cache, "small", 4 * pairs, 1)
        given["4x, one shard"] = 4 * pairs, [str(alone[0])]
        costs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(args.repeats):
            for which, (_, patterns) in given.items():
                for workers in (1, 2):
                    costs.setdefault((which, workers), []).append(embed(patterns, workers))
    peaks = {key: median(cost["peak_bytes"] for cost in found) for key, found in costs.items()}
    times = {key: median(cost["job_seconds"] for cost in found) for key, found in costs.items()}
    rows = []
    for which, workers in costs:
        n, key, once = given[which][0], (which, workers), ("1x", workers)
        growth = [peaks[key] / 2**20, peaks[key] / peaks[once], n / times[key], times[key] / times[once] * pairs / n]
        rows.append([which, workers, n, *growth, times[which, 1] / times[key]])
    measure.tell("scale", args, load, COLUMNS, rows)


if __name__ == "__main__":
    main()
