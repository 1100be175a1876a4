"""What an opt-out list costs: reading it, holding it against recorded units, taking rows out of those that have any.

    python -m infra.bench.opt_out [--quick] [--keys 1000000] [--units 100]

Units have 5,000 rows of two vectors of 512 dimensions in float16, 11 MB; ten keys of every tenth unit are listed.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from fusion_core import manifest, opt_out
from fusion_core.writer import UnitWriter
from infra.bench import measure
from infra.bench.table import SPEC, feature_rows, one_unit

ROWS = 5000
COLUMNS = ("what", "how many", "seconds", "CPU seconds", "ms each", "peak GiB")


def make_table(place: str, units: int) -> None:
    """Units of equal rows but for their keys, which are numbered through."""
    manifest.claim(place, SPEC)
    rows = feature_rows(ROWS)
    for number in range(units):
        keys = pa.array([f"{number * ROWS + row:012d}" for row in range(ROWS)])
        with UnitWriter(place, SPEC, one_unit(number)) as writer:
            for batch in rows.set_column(0, rows.schema.field(0), keys).to_batches():
                writer.write(batch)
            writer.commit()
    manifest.compact(place)


def write_list(path: Path, keys: int, units: int) -> None:
    """Keys that are nowhere, and ten in each of a tenth of the units."""
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(units - units // 10, units):
            stream.writelines(f"{number * ROWS + 7 * row:012d}\n" for row in range(10))
        stream.writelines(f"nowhere/{number:024d}.jpg\n" for number in range(keys - units // 10 * 10))


def child(place: str, path: str) -> None:
    """Reads the list, sweeps the table and tells what it cost."""
    found, clock = [], (time.perf_counter(), time.process_time())

    def lap(what: str, n: int) -> None:
        nonlocal clock
        now = time.perf_counter(), time.process_time()
        seconds, cpu = (b - a for a, b in zip(clock, now, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.append([what, n, seconds, cpu, 1000 * seconds / max(1, n), peak])
        clock = (time.perf_counter(), time.process_time())

    keys = opt_out.load(path)
    lap("keys read", len(keys.digests))
    records = manifest.read(place, brief=True).live
    clean = records[: -len(records) // 10]
    clock = (time.perf_counter(), time.process_time())
    assert len(opt_out.sweep(place, SPEC, clean, keys, 2).clean) == len(clean)
    lap("units without a listed key", len(clean))
    swept = opt_out.sweep(place, SPEC, records[len(clean) :], keys, 2)
    assert swept.rows == 10 * (len(records) - len(clean)) and not swept.failures, swept
    lap("units that lose ten rows", len(records) - len(clean))
    print(json.dumps(found))


def main() -> None:
    """One list, one table, in a process of its own."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    parser = measure.arguments("opt_out", __doc__, repeats=1)
    parser.add_argument("--keys", type=int, default=1_000_000, help="on the list (default: %(default)s)")
    parser.add_argument("--units", type=int, default=100, help="of the table (default: %(default)s)")
    args = parser.parse_args()
    keys, units = (10_000, 20) if args.quick else (args.keys, args.units)
    load = measure.Load()
    with tempfile.TemporaryDirectory(prefix="fusion-bench-") as name:
        make_table(f"{name}/table", units)
        write_list(Path(name) / "list.txt", keys, units)
        command = [sys.executable, "-m", "infra.bench.opt_out", "--child", f"{name}/table", f"{name}/list.txt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        measure.tell("opt_out", args, load, COLUMNS, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
