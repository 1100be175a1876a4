"""What an index costs: recall, bytes and latency by type, and a build's peak memory and seconds by stage.

    python -m infra.bench.index [--quick] [--rows 100000 250000] [--bytes 0 700 140] [--peer]

The table is synthetic (infra/bench/vectors.py). Each build is a `fusion index` in a process of its own: `peak` is its
VmHWM, which counts mapped pages of files too, `limit` is 1.3 x the index + 1 GiB. `fresh` is the recall of the open
index with new queries of the same world against exact search: what the index says of itself should be within 0.01.
`--peer` also lets autofaiss (in an environment of its own below --cache) build an index of the same vectors within the
same bytes, tuned its own way, and searches it with the same queries on one thread.
"""

import argparse
import json
import subprocess
import sys
import tempfile
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
QUERIES = 1000
COLUMNS = (
    "index", "rows", "bytes/vector", "text recall", "image recall", "µs text query", "said text", "build s", "peak MiB",
    "limit MiB",
)  # fmt: skip

_BUILD = """
import json, re, sys, time
start = time.perf_counter()
from pipelines import cli
code = cli.main(sys.argv[1:])
status = open("/proc/self/status").read()
print(json.dumps({"code": code, "seconds": time.perf_counter() - start,
                  "peak_kib": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])}))
"""

_PEER = """
import json, re, sys, time
import faiss, numpy as np
from autofaiss import build_index
folder, limit, queries = sys.argv[1:4]
start = time.perf_counter()
built, _ = build_index(f"{folder}/vectors", index_path=f"{folder}/knn.index", index_infos_path=f"{folder}/infos.json",
                       max_index_memory_usage=limit, current_memory_available="8GB", metric_type="ip", verbose=40)
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
asked, out = np.load(queries), {}
for name in asked.files:
    out[name] = built.search(asked[name], 10)[1]
faiss.omp_set_num_threads(1)
taken = []
for query in asked["text"][:200]:
    began = time.perf_counter(); built.search(query[None], 10); taken.append(1e6 * (time.perf_counter() - began))
np.savez(f"{folder}/found.npz", **out)
print(json.dumps({"seconds": seconds, "peak_kib": peak, "us": float(np.median(taken)),
                  "key": json.load(open(f"{folder}/infos.json"))["index_key"],
                  "param": json.load(open(f"{folder}/infos.json"))["index_param"]}))
"""


def _run(python: str | Path, code: str, *argv: object) -> dict[str, Any]:
    done = subprocess.run([str(python), "-c", code, *map(str, argv)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    sys.stderr.write(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    """Each size by each limit of bytes."""
    parser = measure.arguments("index", __doc__, repeats=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 250_000])
    parser.add_argument("--bytes", type=int, nargs="+", default=[0, 700, 140, 80], help="limits; 0: none")
    parser.add_argument("--peer", action="store_true", help="autofaiss beside it")
    parser.add_argument("--tune-seconds", type=int, default=120)
    args = parser.parse_args()
    load, rows, tried = measure.Load(), [], {}
    for n in [30_000] if args.quick else args.rows:
        place = args.cache / f"vectors-{n}"
        table = write_table(place, n)
        text, image = World().pairs(QUERIES, 10**6)[::-1]
        asked = {"text": text, "image": image}
        truths = {name: index.exact_search(table, "image_embedding", q, 10) for name, q in asked.items()}
        for limit in args.bytes:
            with tempfile.TemporaryDirectory(prefix="fusion-bench-", dir=args.cache) as name:
                rows.append(_ours(place, Path(name) / "index", n, limit, asked, truths, tried, args))
                if args.peer:
                    rows.append(_theirs(args, table, Path(name), n, rows[-1][2], asked, truths))
    measure.tell("index", args, load, COLUMNS, rows, tried=tried)


def _ours(
    place: Path, output: Path, n: int, limit: int, asked: dict[str, Any], truths: dict[str, Any],
    tried: dict[str, Any], args: argparse.Namespace,
) -> list[Any]:  # fmt: skip
    options = ["--max-bytes-per-vector", limit] if limit else []
    cost = _run(
        sys.executable, _BUILD, "index", place, "--output", output, "--tune-seconds", args.tune_seconds, *options
    )
    opened = index.Index.open(str(output))
    record = opened.record
    recalls = {
        name: index.recall(*opened.search(queries, 10), *truths[name], 10)
        if vectors.Kind.parse(record.factory).exact_scores
        else _by_id(opened.search(queries, 10)[1], truths[name][1])
        for name, queries in asked.items()
    }
    taken = float(np.median(microseconds(lambda query: opened.search(query, 10), asked["text"])))
    tried[f"{n} {limit}"] = {
        "factory": record.factory, "parameters": record.parameters, "seconds": record.seconds,
        "candidates": [
            {name: getattr(item, name) for name in item.__dataclass_fields__}
            for item in (record.training.candidates if record.training else ())
        ],
    }  # fmt: skip
    said = {item.queries: item.recall for item in record.recalls}
    size = record.size_bytes
    return [
        f"{record.factory} {record.parameters}", n, size / n, recalls["text"], recalls["image"], taken, said["text"],
        cost["seconds"], cost["peak_kib"] / 1024, 1.3 * size / 2**20 + 1024,
    ]  # fmt: skip


def _theirs(
    args: argparse.Namespace, table: Any, folder: Path, n: int, bytes_per_vector: float, asked: dict[str, Any],
    truths: dict[str, Any],
) -> list[Any]:  # fmt: skip
    python = environment(args.cache)
    (folder / "vectors").mkdir()
    for number, (_, matrix, _) in enumerate(table.vectors("image_embedding")):
        np.save(folder / "vectors" / f"{number:06d}.npy", matrix.astype(np.float32))
    np.savez(folder / "queries.npz", **asked)
    cost = _run(python, _PEER, folder, f"{bytes_per_vector * n / 1e6:.1f}MB", folder / "queries.npz")
    found = np.load(folder / "found.npz")
    recalls = {name: _by_id(found[name], truths[name][1]) for name in asked}
    size = (folder / "knn.index").stat().st_size / n
    return [
        f"autofaiss: {cost['key']} {cost['param']}", n, size, recalls["text"], recalls["image"], cost["us"], "",
        cost["seconds"], cost["peak_kib"] / 1024, "",
    ]  # fmt: skip


def _by_id(found: Any, truth: Any) -> float:
    return float((found[:, :, None] == truth[:, None, :]).any(axis=2).mean())


if __name__ == "__main__":
    main()
