"""`fusion embed` on a real Flink cluster, also one that loses its processes: the table is the local runner's."""

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fusion_core import manifest, table, towers, verify
from fusion_core.demo.shards import write_shards

pytestmark = pytest.mark.flink
ROOT = Path(__file__).parent.parent.parent
SHARDS, EACH = 12, 120


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("flink_cluster", ROOT / "infra/flink/cluster.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flink = _load()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    missing = [tool for tool in ("java", "mvn") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {missing[0]} on this machine")
    found = flink.Cluster(tmp_path_factory.mktemp("flink"), _free_ports(5))
    try:
        flink.fetch(found.jars)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        found.start()
        yield found
    finally:
        found.stop()
    assert found.running() == {} and all(process.returncode is not None for process in found._started)


def _free_ports(n: int) -> int:
    """The first of `n` ports in a row that nobody listens on."""
    for first in range(18200, 30000, n):
        try:
            for port in range(first, first + n):
                with socket.socket() as probe:
                    probe.bind(("localhost", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, and the table that the local runner makes of them."""
    place = tmp_path_factory.mktemp("shards")
    write_shards(place / "shards", SHARDS * EACH, EACH, seed=5)
    done = subprocess.run(command(place, "local"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def command(folder: Path, output: str, beam_options: list[str] | None = None) -> list[str]:
    return [
        sys.executable, "-m", "pipelines.cli", "embed", "--input", f"{folder}/shards", "--output", f"{folder}/{output}",
        "--model", towers.DEMO, "--device", "cpu", "--quiet", *(beam_options or []),
    ]  # fmt: skip


def recorded(place: Path) -> int:
    return len(manifest.read(str(place)).live)


def interrupt(run: "subprocess.Popen[str]", place: Path, what: Callable[[], None]) -> None:
    """Does `what` as soon as some units are recorded, and not the last ones."""
    deadline = time.monotonic() + 1200
    while recorded(place) < 2:
        assert run.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    what()
    assert recorded(place) < SHARDS, "too late to disturb the run"


def assert_same_table(folder: Path, output: str, expected: str = "local") -> None:
    local, found = (table.Table.open(str(folder / name)) for name in (expected, output))
    assert pa.Table.from_batches(found.scan()).equals(pa.Table.from_batches(local.scan()))
    assert found.dead_letters().equals(local.dead_letters())
    assert [part.path for part in found.parts] == [part.path for part in local.parts]
    assert verify.findings(str(folder / output)) == []


def test_the_table_is_the_local_runners(cluster: Any, folder: Path) -> None:
    done = subprocess.run(command(folder, "flink", cluster.beam_options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_table(folder, "flink")
    assert f"{SHARDS} units done" in done.stdout
    (job,) = cluster.jobs()
    assert job["state"] == "FINISHED" and cluster.failures(job["jid"]) == []


def test_an_index_is_built_there_too(cluster: Any, folder: Path) -> None:
    files = []
    for name, options in (("here", []), ("there", cluster.beam_options)):
        index = [sys.executable, "-m", "pipelines.cli", "index", f"{folder}/local", "--output", f"{folder}/{name}"]
        done = subprocess.run([*index, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files.append(sorted(path.name for path in (folder / name).glob("vectors-*")))  # named by their content
    assert files[0] and files[0] == files[1]


def test_a_table_is_fused_there_too(cluster: Any, folder: Path) -> None:
    for name, options in (("fused-here", []), ("fused-there", cluster.beam_options)):
        fuse = [sys.executable, "-m", "pipelines.cli", "fuse", f"{folder}/local", "--output", f"{folder}/{name}"]
        fuser = ["--fuser", "weighted_sum:image=0.3,text=0.7", "--quiet"]
        done = subprocess.run([*fuse, *fuser, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "fused_embedding" in table.Table.open(str(folder / "fused-there")).schema.names
    assert_same_table(folder, "fused-there", "fused-here")


def test_a_killed_task_managers_units_are_done_by_the_other(cluster: Any, folder: Path) -> None:
    run = subprocess.Popen(command(folder, "task", cluster.beam_options), stderr=subprocess.PIPE, text=True)
    interrupt(run, folder / "task", lambda: cluster.kill("taskmanager-1"))
    _, said = run.communicate(timeout=1500)
    assert run.returncode == 0, said
    assert_same_table(folder, "task")
    cluster.start()
    assert "taskmanager-1" in cluster.running()


def test_a_killed_job_manager_fails_the_command_and_repeating_it_completes(cluster: Any, folder: Path) -> None:
    run = subprocess.Popen(command(folder, "job", cluster.beam_options), stderr=subprocess.PIPE, text=True)
    interrupt(run, folder / "job", lambda: cluster.kill("jobmanager"))
    _, said = run.communicate(timeout=1500)
    assert run.returncode == 1, said
    assert "run the same command again" in said and "Traceback" not in said
    before = recorded(folder / "job")
    cluster.start()
    done = subprocess.run(command(folder, "job", cluster.beam_options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{SHARDS - before} units done, {before} stood already" in done.stdout
    assert_same_table(folder, "job")


def test_an_interrupted_command_leaves_whole_units(cluster: Any, folder: Path) -> None:
    run = subprocess.Popen(command(folder, "stopped", cluster.beam_options), stderr=subprocess.PIPE, text=True)
    interrupt(run, folder / "stopped", lambda: run.send_signal(signal.SIGTERM))
    _, said = run.communicate(timeout=1500)
    assert run.returncode == 1 and "interrupted" in said
    deadline = time.monotonic() + 300
    while cluster.jobs()[-1]["state"] in ("RUNNING", "CANCELLING"):  # what is in flight may come to its end
        assert time.monotonic() < deadline
        time.sleep(0.2)
    done = subprocess.run(command(folder, "stopped"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_table(folder, "stopped")


def test_without_a_job_server_the_command_says_so(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", EACH, EACH, seed=5)
    options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{_free_ports(1)}", "--job_server_timeout=2"]
    options += ["--environment_type=EXTERNAL", "--environment_config=localhost:1"]
    done = subprocess.run(command(tmp_path, "none", options), capture_output=True, text=True)
    assert done.returncode == 1
    assert "job endpoint" in done.stderr and "Traceback" not in done.stderr
