"""A cold start of `fusion search`, beside the least that any such command must do.

    python -m infra.bench.search INDEX... [--text "a red circle"] [--repeats 5]

`command` is `fusion search INDEX --text …` in a fresh process; `least` a process that imports torch, open_clip, faiss
and pyarrow and creates the index's model with its weights, and encodes nothing. They take turns, after one round that
brings the files into memory. `÷` should be below 1.5. CPU seconds are of all threads: they tell when the clock cannot,
because others use the machine.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from fusion_core import towers
from fusion_core.index import read_record
from infra.bench import measure

COLUMNS = ("index", "MB", "command s", "least s", "÷", "command CPU s", "least CPU s", "÷ CPU")

_LEAST = """
import sys
import faiss, open_clip, pyarrow, torch
model, weights = sys.argv[1:]
open_clip.create_model(model, pretrained=weights or None, device="cpu", require_pretrained=True)
"""


def main() -> None:
    """One row an index."""
    parser = measure.arguments("search", __doc__, repeats=5)
    parser.add_argument("index", nargs="+")
    parser.add_argument("--text", default="a red circle")
    args = parser.parse_args()
    load, rows = measure.Load(), []
    for place in args.index:
        record = read_record(place)
        tower = record.table_spec.tower
        model = f"local-dir:{towers._DEMO_FOLDER}" if tower.model == towers.DEMO else tower.model
        command = ["-m", "pipelines.cli", "search", place, "--text", args.text, "--device", "cpu"]
        cases = {"command": _process(command), "least": _process(["-c", _LEAST, model, tower.pretrained])}
        clock: dict[str, list[float]] = {name: [] for name in cases}
        cpu: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range((1 if args.quick else args.repeats) + 1):
            for name in list(cases)[:: -1 if turn % 2 else 1]:
                found = cases[name]()
                if turn:
                    clock[name].append(found[0])
                    cpu[name].append(found[1])
        ours, least, cpu_ours, cpu_least = (
            statistics.median(by[name]) for by in (clock, cpu) for name in ("command", "least")
        )
        size = record.size_bytes / 1e6
        rows.append([place, size, ours, least, ours / least, cpu_ours, cpu_least, cpu_ours / cpu_least])
    measure.tell("search", args, load, COLUMNS, rows)


def _process(argv: list[str]) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        before, started = os.times(), time.perf_counter()
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return time.perf_counter() - started, used

    return run


if __name__ == "__main__":
    main()
