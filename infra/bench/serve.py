"""What `fusion serve` adds to the bare text tower and FAISS, and what batching gives under concurrent queries.

    OMP_NUM_THREADS=1 python -m infra.bench.serve [--quick] [--repeats 3]

The server runs in a process of its own, as users start it; the client, on the same cores, keeps one connection open.
`bare` is one process that embeds the text, calls FAISS and reads the rows, without a server. The two take turns; the
overhead is the difference of the medians, and includes what the client itself needs. Without OMP_NUM_THREADS=1 the
threads of torch and FAISS wait for each other wherever other work is on the cores, and hide all else.
"""

import argparse
import http.client
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fusion_core import build, index, manifest, search, shards, table, towers, unit
from fusion_core.demo import shards as demo_shards
from infra.bench import measure
from schemas.feature_table import InputSpec, TableSpec

COLUMNS = ("case", "p50 ms", "p99 ms", "queries/s")
TEXTS = [
    f"{number} {size} {colour} {shape}"
    for number in ("one", "two", "three")
    for size in ("small", "large")
    for colour in ("red", "blue", "green", "pink")
    for shape in ("star", "ring", "square", "cross")
]


def scenes(folder: Path, rows: int, precision: str = "auto") -> str:
    """The place of an index of generated scenes, made once."""
    place = folder / "index"
    if not (place / "index.json").exists():
        demo_shards.write_shards(folder / "shards", rows, 1000, 7, broken=False)
        demo, inputs = towers.load(towers.DEMO, device="cpu", precision=precision), InputSpec()
        spec = manifest.claim(str(folder / "table"), TableSpec(demo.spec, inputs))
        for work in shards.plan([f"{folder}/shards/*.tar"], inputs):
            unit.run_unit(unit.Work(work), str(folder / "table"), spec, demo)
        build.build(table.Table.open(str(folder / "table")), str(place))
    return str(place)


def timed(call: Callable[[str], object], queries: int) -> list[float]:
    """Milliseconds of each of some queries, after one that does not count."""
    found = []
    call(TEXTS[0])
    for _, text in zip(range(queries), cycle(TEXTS), strict=False):
        started = time.perf_counter()
        call(text)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def over_http(host: str) -> Callable[[str], object]:
    """A caller with a connection of its own."""
    connection = http.client.HTTPConnection(host)

    def asked(text: str) -> http.client.HTTPResponse:
        connection.request("GET", f"/search?k=10&text={quote(text)}")
        return connection.getresponse()

    def call(text: str) -> bytes:
        try:
            response = asked(text)
        except http.client.RemoteDisconnected:  # while the other cases had their turn
            response = asked(text)
        body = response.read()
        if response.status != 200:
            raise RuntimeError(body)
        return body

    return call


def at_once(host: str, clients: int, queries: int) -> tuple[list[float], float]:
    """Milliseconds of each query, and queries a second, of some clients that ask at the same time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [one for took in pool.map(lambda _: timed(over_http(host), queries), range(clients)) for one in took]
    return found, len(found) / (time.perf_counter() - started)


def row(case: str, found: list[float], rate: float) -> list[object]:
    """A line of the table."""
    return [case, statistics.median(found), float(np.percentile(found, 99)), rate]


def batch_size(host: str) -> float:
    """The mean number of queries in a batch so far."""
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/metrics")
    told = connection.getresponse().read().decode()
    values = dict(re.findall(r"^fusion_batch_queries_(sum|count) (\S+)", told, re.MULTILINE))
    return float(values["sum"]) / float(values["count"])


def measured(place: str, host: str, args: argparse.Namespace) -> tuple[list[list[object]], dict[str, float]]:
    """The rows of the table, and what else is told."""
    demo = towers.load(towers.DEMO, device="cpu")
    searcher = search.Searcher(index.Index.open(place), demo)
    client = over_http(host)

    def towers_and_faiss(text: str) -> None:
        searcher.index.search(demo.embed_texts([text]), 10)

    def answered(text: str) -> None:
        searcher.answer([search.Query(text=text, k=10)])

    cases = {"bare tower + FAISS": towers_and_faiss, "Searcher.answer": answered, "server, 1 client": client}
    queries, found = (50, 500)[not args.quick], {name: [] for name in cases}  # type: ignore[var-annotated]
    for call in cases.values():
        timed(call, 50)
    for turn in range(args.repeats * 5):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            found[name] += timed(cases[name], queries // 5)
    rows = [row(name, values, 1e3 / statistics.mean(values)) for name, values in found.items()]
    crowd, rate = at_once(host, 32, queries // 5)
    rows.append(row("server, 32 clients", crowd, rate))
    overhead = statistics.median(found["server, 1 client"]) - statistics.median(found["bare tower + FAISS"])
    return rows, {"overhead_ms": overhead, "mean_batch": batch_size(host)}


def main() -> None:
    """One server, asked alone and in a crowd."""
    parser = measure.arguments("serve", __doc__)
    args = parser.parse_args()
    place = scenes(args.cache / ("serve-quick" if args.quick else "serve"), 300 if args.quick else 10_000)
    command = [sys.executable, "-m", "pipelines.cli", "serve", place, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            told = re.search(r"http://(\S+)", line)
            if told is None:
                raise SystemExit("the server did not start")
            load = measure.Load()
            rows, more = measured(place, told[1], args)
        finally:
            server.terminate()
    measure.tell("serve", args, load, COLUMNS, rows, **more)
    print(f"overhead at p50: {more['overhead_ms']:.2f} ms; mean batch over all queries: {more['mean_batch']:.1f}")


if __name__ == "__main__":
    main()
