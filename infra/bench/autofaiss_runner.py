"""Lets an installed autofaiss build an index, or searches one; called by index.py with the Python that has it.

    autofaiss_runner.py build VECTORS FOLDER MEMORY      as it does by itself; writes FOLDER/knn.index, cost.json
    autofaiss_runner.py search FOLDER QUERIES OUTPUT     one thread; at its own parameters and at others

QUERIES is an .npz with `text` and `image`; OUTPUT one with the ids found, and the times, by parameters.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

TIMED, K = 300, 10


def build(vectors: str, folder: str, memory: str) -> None:
    """All of autofaiss's own choices: type, training, parameters (10 ms for a query, its default)."""
    from autofaiss import build_index

    started = time.perf_counter()
    build_index(
        vectors,
        index_path=f"{folder}/knn.index",
        index_infos_path=f"{folder}/infos.json",
        max_index_memory_usage=memory,
        current_memory_available="10GB" if memory == "8GB" else "4GB",  # for the work; no less than the index
        metric_type="ip",
        verbose=40,
    )
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    cost = {"seconds": time.perf_counter() - started, "peak_kib": int(found[1]) if found else 0}
    Path(folder, "cost.json").write_text(json.dumps(cost))


def search(folder: str, queries: str, output: str) -> None:
    """Ids of all queries in one batch, and the times of single ones, at each setting."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    index, asked = faiss.read_index(f"{folder}/knn.index"), np.load(queries)
    infos = json.loads(Path(folder, "infos.json").read_text())
    found: dict[str, Any] = {}
    for setting in dict.fromkeys([infos["index_param"], *settings(infos["index_key"])]):
        faiss.ParameterSpace().set_index_parameters(index, setting)
        for name in asked.files:
            started = time.perf_counter()
            found[f"{setting}|{name}"] = index.search(asked[name], K)[1]
            found[f"{setting}|{name} batch"] = (time.perf_counter() - started) / len(asked[name])
        taken = []
        for query in asked["text"][:TIMED]:
            started = time.perf_counter()
            index.search(query[None], K)
            taken.append(time.perf_counter() - started)
        found[f"{setting}|single"] = np.median(taken)
    np.savez(output, **found)


def settings(key: str) -> list[str]:
    """What autofaiss itself would vary, written as it writes it."""
    if key.startswith("HNSW"):
        return [f"efSearch={n}" for n in (16, 32, 64, 96, 128, 256, 512, 1024, 2048)]
    tail = ",ht=2048" if "PQ" in key else ""
    graph = "_HNSW" in key
    return [
        f"nprobe={n}" + (f",efSearch={2 * n}" if graph else "") + tail
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    ]


if __name__ == "__main__":
    {"build": build, "search": search}[sys.argv[1]](*sys.argv[2:])
