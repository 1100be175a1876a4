"""What planning costs the launcher: a listing of many shards compared with a manifest of as many records.

    python -m infra.bench.plan [--quick] [--units 1000000]

new       no record stands: every shard becomes a unit to do, and the Beam job is made that does them (`job MB`)
standing  every unit is recorded and its part is there: nothing to do
The shards and parts are empty files: their number costs, not their content. Each case runs in a process of its own.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import manifest, shards
from infra.bench import measure
from infra.bench.table import SPEC, record
from schemas import records
from schemas.feature_table import InputSpec

if TYPE_CHECKING:
    from pipelines.plan import Plan

COLUMNS = ("what", "units", "seconds", "CPU seconds", "peak GiB", "manifest MB", "bytes a unit in it", "job MB")
EACH = 10_000  # files in one folder


def make_shards(folder: Path, units: int) -> None:
    """Empty tars, ten thousand in a folder."""

    def fill(start: int) -> None:
        below = folder / f"{start // EACH:05d}"
        below.mkdir(parents=True)
        for number in range(start, min(start + EACH, units)):
            (below / f"{number:08d}.tar").touch()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(0, units, EACH)))


def make_table(folder: Path, pattern: str) -> float:
    """A table in which all that the pattern names is recorded; returns the size of its manifest in bytes."""
    manifest.claim(str(folder), SPEC)
    (folder / "features").mkdir()
    (folder / "manifest").mkdir()
    path = folder / "manifest" / "snapshot-all.parquet"
    with pq.ParquetWriter(path, manifest._SNAPSHOT, compression="zstd") as writer:
        for batch in _batches(shards.plan([pattern], InputSpec())):
            rows: dict[str, list[Any]] = {"unit": [], "record": []}
            for number, item in batch:
                empty = msgspec.structs.replace(record(number), unit=item)
                assert empty.features is not None
                digest = hashlib.sha256(item.id.encode()).hexdigest()  # as hard to compress as a real one
                name = f"features/{item.id}-{digest[-16:]}.parquet"
                (folder / name).touch()
                part = type(empty.features)(name, 10_000, 0, digest)
                rows["unit"].append(item.id)
                rows["record"].append(records.to_json(msgspec.structs.replace(empty, features=part)))
            writer.write_table(pa.table(rows, manifest._SNAPSHOT))
    return path.stat().st_size


def _batches(units: Iterator[Any]) -> Iterator[list[tuple[int, Any]]]:
    batch = []
    for number, item in enumerate(units):
        batch.append((number, item))
        if len(batch) == EACH:
            yield batch
            batch = []
    yield batch


def child(pattern: str, place: str) -> None:
    """Plans in this process and tells what it cost."""
    from pipelines import plan

    started, cpu = time.perf_counter(), time.process_time()
    planned = plan.compare(lambda: shards.plan([pattern], SPEC.input), place, SPEC)
    job_bytes = _job_bytes(place, planned) if planned.work else 0
    told = {
        "job": job_bytes,
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "work": len(planned.work),
        "skipped": planned.skipped,
    }
    print(json.dumps(told))


def _job_bytes(place: str, planned: "Plan") -> int:
    """Makes the Beam job of what is planned; returns what is sent to a runner."""
    import apache_beam as beam

    from fusion_core import unit
    from pipelines import change, deal, embed, runner

    pipeline = beam.Pipeline()
    run_unit = embed.RunUnit(change.Job(place, SPEC), runner.Knobs(local=False))
    pipeline | deal.Deal(unit.Work, planned.work) | beam.ParDo(run_unit)
    return int(pipeline.to_runner_api().ByteSize())


def measured(pattern: str, place: str) -> dict[str, Any]:
    """What `child` told."""
    command = [sys.executable, "-m", "infra.bench.plan", "--child", pattern, place]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """New and standing."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    parser = measure.arguments("plan", __doc__, repeats=1)
    parser.add_argument("--units", type=int, default=1_000_000, help="how many (default: %(default)s)")
    args: argparse.Namespace = parser.parse_args()
    units = 20_000 if args.quick else args.units
    load, found = measure.Load(), []
    with tempfile.TemporaryDirectory(prefix="fusion-bench-") as name:
        folder = Path(name)
        make_shards(folder / "shards", units)
        pattern = f"{folder}/shards/**/*.tar"
        started = time.perf_counter()
        (folder / "table").mkdir()
        manifest_bytes = make_table(folder / "table", pattern)
        print(f"{units:,} shards and parts made in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        (folder / "empty").mkdir()
        for what, place, expected in (("new", "empty", (units, 0)), ("standing", "table", (0, units))):
            cost = measured(pattern, str(folder / place))
            assert (cost["work"], cost["skipped"]) == expected, cost
            size = manifest_bytes if what == "standing" else 0
            peak = cost["peak"] / 2**30
            row = [what, units, cost["seconds"], cost["cpu"], peak, size / 1e6, size / units, cost["job"] / 1e6]
            found.append(row)
    measure.tell("plan", args, load, COLUMNS, found)


if __name__ == "__main__":
    main()
