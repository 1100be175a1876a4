"""What an index costs, and what it finds: recall, bytes and latency by type; a build's peak memory and seconds.

    python -m infra.bench.index [--quick] [--rows 250000 1000000] [--bytes 0 140 80] [--peer] [--memory 8GB 200MB 100MB]

The table is synthetic (infra/bench/vectors.py). Each build is a `fusion index` in a process of its own. `anon` is the
peak of its memory without files (RssAnon, looked at 50 times a second), `VmHWM` that with the pages of files that it
maps, which the system takes back at will; both are of all there is, the work is in threads. `limit` is 1.3 x the index
+ 1 GiB. `fresh` is the recall of the open index with new queries of the same world against exact search, `said` what
index.json says: they should be within 0.01.

With `--peer` autofaiss (in an environment of its own below --cache) chooses, trains and tunes an index of the same
vectors by itself for each of the budgets of `--memory`; ours is then built within the bytes for a vector that it came
to. Both are searched on one thread with the same queries, taking turns, at the parameters that each was tuned to and
at others (nprobe or efSearch of theirs; nprobe and refinement of ours). Of each the curve of the highest recall by
latency is taken, straight between its points in recall and log latency: `gain` is our recall less theirs at the latency
of theirs, `faster` their latency by ours at the recall of theirs. An index of autofaiss is kept below --cache (it takes
half an hour); what it cost to build was measured once.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core import index, vectors
from fusion_core.choose import microseconds
from infra.bench import measure
from infra.bench.vectors import World, write_table

PACKAGES = (
    "autofaiss==2.17.0",
    "faiss-cpu==1.8.0",
    "numpy<2",
    "packaging",
    "setuptools<70",
)  # it cannot use newer FAISS
RUNNER = Path(__file__).with_name("autofaiss_runner.py")
QUERIES, K, TIMED = 1000, 10, 300
SLOWEST_US = 30_000  # settings beyond are left out of the curves
COLUMNS = (
    "index", "rows", "bytes/vector", "fresh text", "said text", "fresh image", "said image", "µs text query", "build s",
    "anon MiB", "VmHWM MiB", "limit MiB",
)  # fmt: skip
PEER_COLUMNS = (
    "autofaiss", "rows", "memory", "bytes", "our bytes", "at", "recall", "µs", "our recall", "gain", "our µs", "faster",
    "batch faster", "met",
)  # fmt: skip

_BUILD = """
import json, re, sys, threading, time
start, peak = time.perf_counter(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from pipelines import cli
code = cli.main(sys.argv[1:])
status = open("/proc/self/status").read()
print(json.dumps({"code": code, "seconds": time.perf_counter() - start, "anon_kib": peak[0],
                  "peak_kib": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])}))
"""

Point = tuple[float, float]  # microseconds of a query, recall@10


def environment(cache: Path) -> Path:
    """The Python that has autofaiss."""
    folder = cache / "autofaiss"
    if not (folder / "ready").is_file():
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *PACKAGES], check=True)
        (folder / "ready").touch()
    return folder / "bin" / "python"


def main() -> None:
    """Each size by each limit of bytes, then against each index of autofaiss."""
    parser = measure.arguments("index", __doc__, repeats=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--bytes", type=float, nargs="*", default=[0, 140, 80], help="limits; 0: none")
    parser.add_argument("--peer", action="store_true", help="autofaiss beside it")
    parser.add_argument("--memory", nargs="+", default=["8GB", "200MB", "100MB"], help="what autofaiss may use")
    parser.add_argument("--tune-seconds", type=int, default=120)
    parser.add_argument("--keep", action="store_true", help="our indexes stay below --cache, and are used again")
    args = parser.parse_args()
    load, rows, against, more = measure.Load(), [], [], {}
    for n in [30_000] if args.quick else args.rows:
        case = Case(args, n)
        for limit in args.bytes:
            with case.built(limit) as (opened, row):
                rows.append(row)
                more[f"{n} {limit}"] = choice(opened)
        for memory in (args.memory[:1] if args.quick else args.memory) if args.peer else ():
            place = case.peer(memory)
            limit = (place / "knn.index").stat().st_size / n
            with case.built(limit) as (opened, row):
                found, curves = case.compare(place, memory, limit, opened)
                rows += [row, case.peer_row(place, curves, limit)]
                against += found
                more[f"{n} {memory}"] = choice(opened) | {"curves": curves}
    if against:
        measure.tell("index_peer", args, load, PEER_COLUMNS, against)
    measure.tell("index", args, load, COLUMNS, rows, against=against, tried=more)


def choice(opened: index.Index) -> dict[str, Any]:
    """What was tried for an index, and what it took."""
    record = opened.record
    candidates = record.training.candidates if record.training else ()
    return {
        "factory": record.factory, "parameters": record.parameters, "seconds": record.seconds,
        "candidates": [{name: getattr(item, name) for name in item.__dataclass_fields__} for item in candidates],
    }  # fmt: skip


class Case:
    """A table, queries that it has no part in, and what exact search answers to them."""

    def __init__(self, args: argparse.Namespace, rows: int):
        self.args, self.rows, self.place = args, rows, args.cache / f"vectors-{rows}"
        self.table = write_table(self.place, rows)
        image, text = World().pairs(QUERIES, 10**6)
        self.queries = {"text": text, "image": image}
        known = args.cache / f"truths-{rows}.npz"
        if not known.is_file():
            found = {k: index.exact_search(self.table, "image_embedding", q, K)[1] for k, q in self.queries.items()}
            np.savez(known, **found)  # type: ignore[arg-type]
        with np.load(known) as held:
            self.truths = {name: held[name] for name in self.queries}

    def recall(self, name: str, ids: Any) -> float:
        """The share of the true ids that were found: no two vectors are alike here."""
        return float((ids[:, :, None] == self.truths[name][:, None, :]).any(axis=2).mean())

    # --- ours

    @contextmanager
    def built(self, limit: float) -> Iterator[tuple[index.Index, list[Any]]]:
        """Our index within so many bytes for a vector (0: no limit), and its row of the table."""
        kept = self.args.cache / f"index-{self.rows}-{limit:.0f}"
        folder = kept if self.args.keep else Path(tempfile.mkdtemp(prefix="fusion-bench-", dir=self.args.cache))
        try:
            options = ["--max-bytes-per-vector", str(int(limit))] if limit else []
            cost_file = folder / "cost.json"
            if not cost_file.is_file():
                options += ["--output", str(folder / "index"), "--tune-seconds", str(self.args.tune_seconds)]
                cost = _run(sys.executable, "-c", _BUILD, "index", self.place, *options)
                cost_file.write_text(json.dumps(cost))
            opened = index.Index.open(str(folder / "index"))
            yield opened, self._row(opened, json.loads(cost_file.read_text()))
        finally:
            if not self.args.keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _row(self, opened: index.Index, cost: dict[str, Any]) -> list[Any]:
        record, size = opened.record, opened.record.size_bytes
        said = {item.queries: item.recall for item in record.recalls}
        fresh = {name: self.recall(name, opened.search(asked, K)[1]) for name, asked in self.queries.items()}
        taken = float(np.median(microseconds(lambda query: opened.search(query, K), self.queries["text"])))
        return [
            f"{record.factory} {record.parameters}", self.rows, size / self.rows, fresh["text"], said["text"],
            fresh["image"], said["image"], taken, cost["seconds"], cost["anon_kib"] / 1024, cost["peak_kib"] / 1024,
            1.3 * size / 2**20 + 1024,
        ]  # fmt: skip

    def _sweep(self, opened: index.Index) -> dict[str, dict[str, float]]:
        """Recalls and times by parameters."""
        record, found = opened.record, {}
        kind = vectors.Kind.parse(record.factory)
        nprobes = [1 << i for i in range(3, 11) if 1 << i < kind.lists] if kind.lists else [0]
        for factor in (2, 4, 8, 16) if kind.refine else (0,):
            for nprobe in nprobes:
                parameters = {name: v for name, v in (("nprobe", nprobe), ("k_factor", factor)) if v}
                found[str(parameters)] = self._measured(opened, parameters)
                if found[str(parameters)]["µs"] > SLOWEST_US:
                    break
        return found | {f"own {record.parameters}": self._measured(opened, record.parameters)}

    def _measured(self, opened: index.Index, parameters: dict[str, int]) -> dict[str, float]:
        before, opened.record = opened.record, replace(opened.record, parameters=parameters)
        found = {}
        try:
            with vectors.threads(1):
                for name, asked in self.queries.items():
                    started = time.perf_counter()
                    ids = opened.search(asked, K)[1]
                    found[f"{name} batch µs"] = 1e6 * (time.perf_counter() - started) / len(asked)
                    found[name] = self.recall(name, ids)
                taken = []
                for query in self.queries["text"][:TIMED]:
                    started = time.perf_counter()
                    opened.search(query[None], K)
                    taken.append(1e6 * (time.perf_counter() - started))
        finally:
            opened.record = before
        return found | {"µs": statistics.median(taken)}

    # --- theirs

    def peer(self, memory: str) -> Path:
        """The folder of autofaiss's index."""
        folder, source = (
            self.args.cache / f"autofaiss-{self.rows}-{memory}",
            self.place.with_name(f"peer-vectors-{self.rows}"),
        )
        if not (folder / "cost.json").is_file():
            source.mkdir(exist_ok=True)
            folder.mkdir(exist_ok=True)
            for number, (_, matrix, _) in enumerate(self.table.vectors("image_embedding")):
                np.save(source / f"{number:06d}.npy", matrix.astype(np.float32))
            _run(environment(self.args.cache), RUNNER, "build", source, folder, memory)
            shutil.rmtree(source)
        return folder

    def _peer_sweep(self, folder: Path) -> dict[str, dict[str, float]]:
        with tempfile.TemporaryDirectory() as scratch:
            np.savez(Path(scratch) / "queries.npz", **self.queries)  # type: ignore[arg-type]
            _run(environment(self.args.cache), RUNNER, "search", folder, f"{scratch}/queries.npz", f"{scratch}/out.npz")
            with np.load(Path(scratch) / "out.npz") as out:
                found: dict[str, dict[str, float]] = {}
                for key in out.files:
                    setting, _, what = key.rpartition("|")
                    one = found.setdefault(setting, {})
                    if what in self.queries:
                        one[what] = self.recall(what, out[key])
                    else:
                        one["µs" if what == "single" else f"{what} µs"] = 1e6 * float(out[key])
        return found

    def peer_row(self, folder: Path, curves: dict[str, Any], size: float) -> list[Any]:
        """Its row of the table; it measures itself with other queries than a user's."""
        infos, cost = json.loads((folder / "infos.json").read_text()), json.loads((folder / "cost.json").read_text())
        own = curves["autofaiss"][infos["index_param"]]
        return [
            f"autofaiss: {infos['index_key']} {infos['index_param']}", self.rows, size, own["text"], "", own["image"],
            infos.get("1-recall@20", ""), own["µs"], cost["seconds"], "", cost["peak_kib"] / 1024, "",
        ]  # fmt: skip

    # --- side by side

    def compare(
        self, folder: Path, memory: str, size: float, opened: index.Index
    ) -> tuple[list[list[Any]], dict[str, Any]]:
        """Rows of the second table, and the curves; searched in turns, medians of the times."""
        runs: dict[str, list[dict[str, dict[str, float]]]] = {"autofaiss": [], "fusion": []}
        for turn in range(self.args.repeats):
            for name in ("autofaiss", "fusion")[:: -1 if turn % 2 else 1]:
                runs[name].append(self._peer_sweep(folder) if name == "autofaiss" else self._sweep(opened))
        curves = {
            name: {
                setting: {
                    what: statistics.median(run[setting][what] for run in turns if setting in run) for what in row
                }
                for setting, row in turns[0].items()
            }
            for name, turns in runs.items()
        }
        infos = json.loads((folder / "infos.json").read_text())
        theirs = curves["autofaiss"]
        ours, ours_batch = (curve(curves["fusion"], time) for time in ("µs", "text batch µs"))
        rows = []
        for setting, point in theirs.items():
            gain = recall_at(ours, point["µs"]) - point["text"]
            faster = point["µs"] / us_at(ours, point["text"])
            rows.append([
                infos["index_key"], self.rows, memory, size, opened.record.size_bytes / self.rows,
                ("own: " if setting == infos["index_param"] else "") + setting, point["text"], point["µs"],
                recall_at(ours, point["µs"]), gain, us_at(ours, point["text"]), faster,
                point["text batch µs"] / us_at(ours_batch, point["text"]),
                "yes" if gain >= 0.10 or faster >= 3 else "no",
            ])  # fmt: skip
        return rows, curves


def curve(settings: dict[str, dict[str, float]], time: str) -> list[Point]:
    """The settings that nothing faster beats, by rising time and recall."""
    found: list[Point] = []
    for point in sorted((item[time], item["text"]) for item in settings.values()):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


def recall_at(points: Sequence[Point], us: float) -> float:
    """Of a curve; 0 below its fastest."""
    times, recalls = zip(*points, strict=True)
    return float(np.interp(np.log(us), np.log(times), recalls, left=0))


def us_at(points: Sequence[Point], recall: float) -> float:
    """Of a curve; infinite above its highest recall."""
    times, recalls = zip(*points, strict=True)
    return float(np.exp(np.interp(recall, recalls, np.log(times), right=np.inf)))


def _run(python: str | Path, *argv: object) -> dict[str, Any]:
    done = subprocess.run([str(python), *map(str, argv)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    sys.stderr.write(done.stderr)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


if __name__ == "__main__":
    main()
