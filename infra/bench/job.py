"""One `fusion` command in a process of its own, with what it cost as JSON on the last line of its output.

    python -m infra.bench.job embed --input … --output … --model …

`job_seconds` is `pipelines.embed.run`: pipeline, units, manifest, compaction. What comes before (imports, planning,
loading the model) and after (the report) is `other_seconds`. `peak_bytes` is the process's VmHWM. `job_cpu_seconds`
are those of the job, on all cores.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Runs `fusion argv` in a subprocess; returns {job_seconds, job_cpu_seconds, other_seconds, peak_bytes}."""
    command = [sys.executable, "-W", "ignore", "-m", "infra.bench.job", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> int:
    """Runs the command with a watch around the job itself."""
    from pipelines import cli, embed

    spent = cpu = 0.0
    job = embed.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent, cpu
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return job(*args, **kwargs)
        finally:
            spent, cpu = time.perf_counter() - start, time.process_time() - cpu

    embed.run = watched
    code = cli.main(sys.argv[1:])
    whole = time.perf_counter() - _STARTED
    found = {"job_seconds": spent, "job_cpu_seconds": cpu, "other_seconds": whole - spent, "peak_bytes": peak_bytes()}
    print(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main())
