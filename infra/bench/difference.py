"""What a run costs after 1 % of new shards, beside the first run: CPU seconds of `fusion embed` and `fusion index`.

    python -m infra.bench.difference [--quick] [--shards 50 200] [--rows 100000 400000]

A corpus of `--shards` tars of 250 photographs (copies of the same 25, by hard link) is embedded and indexed; then 1 %
of shards are added and both commands repeated, then repeated with nothing to do. For `--rows` the tables are written
directly (infra/bench/vectors.py: 512 dimensions, units of 1,000 rows), so that the index is looked at where embedding
would take days. Each command is a process of its own; counted is the CPU time, user and system, of all that it starts.

`÷ first` is what the 1 % cost by what all cost the first time, `nothing` a run with nothing to do. A second run has a
part that does not grow (imports, the model, a pipeline) and one that does: with two sizes the latter is seen apart,
`further` = second run's increase ÷ first run's increase. From that and the rest follows at how many samples a second
run costs `--share` of the first (`reached at`; inf: never).
"""

import ctypes
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from infra.bench import measure, models, photos
from infra.bench.vectors import write_table

SAMPLES, DISTINCT, UNIT_ROWS, DIM = 250, 25, 1000, 512
COLUMNS = ("what", "samples", "first", "second", "nothing", "÷ first", "further", "reached at")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: what a command leaves behind is waited for, and so counted, here

Costs = dict[str, list[float]]  # of the first run, of that with 1 % more, of that with nothing to do


def cpu_seconds(argv: Sequence[str], told: Path) -> float:
    """What `fusion argv` took, in all its processes; its output goes to the end of `told`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with told.open("a") as log:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "pipelines.cli", *argv],
            check=True, cwd=Path(__file__).parents[2], stdout=log, stderr=log,
        )  # fmt: skip
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def of_shards(n: int, cache: Path, folder: Path, model: models.Model, tune_seconds: int) -> Costs:
    """Both commands over `n` shards, over 1 % more, and again."""
    made = photos.write_shards(cache, "small", SAMPLES * DISTINCT, DISTINCT)
    place, told = folder / "shards", folder / "told"
    place.mkdir()
    found: Costs = {"embed": [], "index": []}
    for total in (n, n + max(1, n // 100), n + max(1, n // 100)):
        for number in range(len(list(place.iterdir())), total):
            os.link(made[number % DISTINCT], place / f"{number:06d}.tar")
        table = str(folder / "table")
        embed = ["embed", "--input", f"{place}/*.tar", "--output", table, *model.options, "--device", "cpu", "--quiet"]
        found["embed"].append(cpu_seconds(embed, told))
        found["index"].append(_index(table, folder, tune_seconds, told))
    found["both"] = [sum(costs) for costs in zip(found["embed"], found["index"], strict=True)]
    return found


def of_rows(n: int, cache: Path, folder: Path, tune_seconds: int) -> Costs:
    """The index of `n` rows, of 1 % more, and again."""
    kept, table = cache / f"difference-{DIM}-{n}", folder / "table"
    write_table(kept, n, DIM, UNIT_ROWS)
    shutil.copytree(kept, table, copy_function=os.link)
    found: Costs = {"index of a given table": []}
    for total in (n, n + n // 100, n + n // 100):
        write_table(table, total, DIM, UNIT_ROWS)
        found["index of a given table"].append(_index(str(table), folder, tune_seconds, folder / "told"))
    return found


def _index(table: str, folder: Path, tune_seconds: int, told: Path) -> float:
    argv = ["index", table, "--output", str(folder / "index"), "--tune-seconds", str(tune_seconds)]
    return cpu_seconds(argv, told)


def compare(found: Sequence[tuple[int, Costs]], share: float) -> list[list[object]]:
    """The table's rows, of sizes that rise."""
    rows: list[list[object]] = []
    for i, (samples, costs) in enumerate(found):
        for what, (first, second, nothing) in costs.items():
            row: list[object] = [what, samples, first, second, nothing, second / first, "", ""]
            if i and what in found[i - 1][1]:
                smaller, (first_before, second_before, _) = found[i - 1][0], found[i - 1][1][what]
                further = (second - second_before) / (first - first_before)
                rate = (first - first_before) / (samples - smaller)  # of the first run, for one sample more
                rest = second - further * first  # grows with nothing
                reached = rest / ((share - further) * rate) if further < share else math.inf
                row[-2:] = [further, max(reached, 0.0)]
            rows.append(row)
    return rows


def main() -> None:
    """Each size of each kind of corpus."""
    parser = measure.arguments("difference", __doc__, repeats=1)
    parser.add_argument("--shards", type=int, nargs="*", default=[50, 200])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 400_000])
    parser.add_argument("--model", choices=models.NAMES, default="demo")
    parser.add_argument("--tune-seconds", type=int, default=120)
    parser.add_argument("--share", type=float, default=0.03, help="that a second run may cost (default: %(default)s)")
    parser.add_argument("--told", type=Path, help="keep what the commands said in this folder")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    load, rows = measure.Load(), []
    for sizes, of in ((args.shards, "shards"), (args.rows, "rows")):
        found: list[tuple[int, Costs]] = []
        for n in sorted(sizes)[: 1 if args.quick else None]:
            with tempfile.TemporaryDirectory(prefix="difference-", dir=args.cache) as name:
                folder = Path(name)
                if of == "shards":
                    costs = of_shards(n, args.cache, folder, models.named(args.model, args.cache), args.tune_seconds)
                else:
                    costs = of_rows(n, args.cache, folder, args.tune_seconds)
                if args.told:
                    args.told.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / "told", args.told / f"{of}-{n}.txt")
            found.append((n * SAMPLES if of == "shards" else n, costs))
        rows += compare(found, args.share)
    measure.tell("difference", args, load, COLUMNS, rows)


if __name__ == "__main__":
    main()
