"""The benchmarks that need nothing but this repository run, at their small sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCH = ROOT / "infra" / "bench"
COMMANDS = sorted(path.stem for path in BENCH.glob("*.py") if "measure.arguments(" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dedup", "opt_out", "plan", "table"])
def test_a_benchmark_tells_its_figures(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"infra.bench.{name}", "--quick", f"--output={tmp_path}", f"--cache={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["benchmark"] == name and found["quick"] and found["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_explains_itself(name: str) -> None:
    command = [sys.executable, "-m", f"infra.bench.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
