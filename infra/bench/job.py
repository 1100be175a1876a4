"""One `fusion` command in a process of its own, with what it cost as JSON on the last line of its output.

    python -m infra.bench.job [--peak] embed --input … --output … --model …

`job_seconds` is `pipelines.embed.run`: pipeline, units, manifest, compaction. What comes before (imports, planning,
loading the model) and after (the report) is `other_seconds`. `job_cpu_seconds` are those of the job, in all its
processes; `peak_bytes` is the most memory that they had together, what several share counted once.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.bench import measure

_STARTED = time.perf_counter()


def run(argv: Sequence[str], peak: bool = False) -> dict[str, Any]:
    """Runs `fusion argv` in a subprocess; returns {job_seconds, job_cpu_seconds, other_seconds} and, if asked for (it
    costs time), peak_bytes.
    """
    command = [sys.executable, "-W", "ignore", "-m", "infra.bench.job", *(["--peak"] if peak else []), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Peak:
    """The most memory that this process and those below it had together, looked at once a second."""

    def __init__(self) -> None:
        self.size_bytes, self._ended = 0, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(1):
            self.size_bytes = max(self.size_bytes, measure.memory_bytes())

    def end(self) -> int:
        """No more looking; the peak."""
        self._ended.set()
        return self.size_bytes


def main() -> int:
    """Runs the command with a watch around the job itself."""
    from pipelines import cli, embed

    spent = cpu = 0.0
    job, argv = embed.run, sys.argv[1:]
    peak = Peak() if (looks := argv[0] == "--peak") else None

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent, cpu
        start, cpu = time.perf_counter(), measure.cpu_seconds()
        try:
            return job(*args, **kwargs)
        finally:
            spent, cpu = time.perf_counter() - start, measure.cpu_seconds() - cpu

    embed.run = watched
    code = cli.main(argv[looks:])
    whole = time.perf_counter() - _STARTED
    found = {"job_seconds": spent, "job_cpu_seconds": cpu, "other_seconds": whole - spent}
    if peak:
        found["peak_bytes"] = peak.end()
    print(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main())
