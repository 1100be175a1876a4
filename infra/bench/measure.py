"""How every benchmark here measures: alternately, repeated, medians; and how it tells what it found.

Only ratios within one run mean anything. `others` in the output is the number of cores that other processes kept busy
meanwhile: where it is not near 0, run it again.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0))


def arguments(name: str, description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder for {name}.json (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fusion-bench", help="inputs, weights")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds (default: %(default)s)")
    return parser


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternately(cases: Mapping[str, Callable[[], float]], repeats: int, warm: bool = True) -> dict[str, float]:
    """The median of what each case returns; the cases take turns, every other round backwards, after one unmeasured."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    if warm:
        for case in cases.values():
            case()
    for turn in range(repeats):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            found[name].append(cases[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def family() -> list[int]:
    """This process and all that live below it."""
    below: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            below.setdefault(int(_stat(int(path.name))[1]), []).append(int(path.name))
    found = [os.getpid()]
    for pid in found:
        found += below.get(pid, [])
    return found


def cpu_seconds() -> float:
    """Of this process, of all that live below it, and of those that ended there."""
    ticks = 0
    for pid in family():
        with contextlib.suppress(OSError):
            ticks += sum(map(int, _stat(pid)[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes() -> int:
    """Of this process and all that live below it now; what several share counts once (PSS)."""
    kibibytes = 0
    for pid in family():
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            kibibytes += int(found[1]) if found else 0
    return kibibytes * 1024


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the process's state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Load:
    """How many cores other processes kept busy since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        """Cores, as a mean over the time."""
        busy, ours, clock = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, round((busy - ours) / clock, 2))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return busy, cpu_seconds(), time.perf_counter()


def tell(
    name: str, args: argparse.Namespace, load: Load, columns: Sequence[str], rows: Sequence[Sequence[Any]], **more: Any
) -> None:
    """Prints the table and writes <output>/<name>.json."""
    others = load.others()
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *texts]) for i in range(len(columns))]
    for row in [list(columns), ["-" * width for width in widths], *texts]:
        right = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("| " + " | ".join([row[0].ljust(widths[0]), *right]) + " |")
    print(f"({CORES} cores, others busy: {others:.2f} of them)", flush=True)
    found = {
        "benchmark": name,
        "command": " ".join(["python -m infra.bench." + name, *sys.argv[1:]]),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": args.quick,
        "repeats": args.repeats,
        "cores": CORES,
        "others": others,
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": {item: metadata.version(item) for item in ("torch", "open_clip_torch", "pyarrow", "pillow")},
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        **more,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
