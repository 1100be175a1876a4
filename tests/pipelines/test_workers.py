"""Worker processes: what becomes of units, processes and launchers that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion_core import manifest, shards, table, towers, unit
from pipelines import cli, workers
from schemas.feature_table import InputSpec, ManifestRecord, TableSpec
from tests.corpora import pairs, write_tar

ROOT = Path(__file__).parents[2]


def command(folder: Path) -> list[str]:
    return ["embed", "--input", f"{folder}/*.tar", "--output", f"{folder}/table", "--model", towers.DEMO, "--quiet"]


def children(pid: int) -> set[int]:
    """Every process below `pid` that is still there."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found |= {int(path.name)} | children(int(path.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def order(folder: Path, name: str, n: int) -> workers.Order:
    shard = write_tar(folder / f"{name}.tar", pairs(n))
    spec = manifest.claim(str(folder / "table"), TableSpec(towers.load(towers.DEMO).spec, InputSpec()))
    (planned,) = shards.plan([str(shard)], spec.input)
    return workers.Order(unit.Work(planned), str(folder / "table"), spec)


def test_a_worker_serves_unit_after_unit_and_tells_of_progress(tmp_path: Path) -> None:
    told: list[int] = []
    orders = [order(tmp_path, "a", 5), order(tmp_path, "b", 70)]
    seen = []
    for each in orders:
        with workers.borrowed(each.spec.tower, "cpu", "") as worker:
            record = worker.run(each, told.append)
            assert isinstance(record, ManifestRecord)
            seen.append((record.rows_out, worker._process.pid))
    assert [rows for rows, _ in seen] == [5, 70] and sum(told) == 75
    assert seen[0][1] == seen[1][1] != os.getpid()
    assert table.Table.open(str(tmp_path / "table")).num_rows == 75


def test_what_happens_to_a_process_costs_its_unit_only(tmp_path: Path) -> None:
    first, second = order(tmp_path, "a", 400), order(tmp_path, "b", 3)
    with workers.borrowed(first.spec.tower, "cpu", "") as worker:
        pid = worker._process.pid
        assert pid is not None
        failure = worker.run(first, lambda n: os.kill(pid, signal.SIGKILL))
    assert isinstance(failure, workers.Failure) and "a.tar: its process was killed" in failure.why
    with workers.borrowed(second.spec.tower, "cpu", "") as worker:
        assert isinstance(worker.run(second, lambda n: None), ManifestRecord)
    assert [record.unit.shard for record in table.Table.open(str(tmp_path / "table")).records] == [
        second.work.unit.shard
    ]
    with workers.borrowed(first.spec.tower, "cpu", "") as worker:
        assert isinstance(worker.run(first, lambda n: None), ManifestRecord)


BROKEN_DECODER = """
import os, signal, time, simplejpeg
decode = simplejpeg.decode_jpeg
def broken(data, *args, **options):
    if b"crash here" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"hang here" in data:
        time.sleep(1000)
    return decode(data, *args, **options)
simplejpeg.decode_jpeg = broken
"""


@pytest.mark.slow
def test_an_image_at_which_its_process_crashes_or_hangs_costs_no_neighbour(tmp_path: Path) -> None:
    members = pairs(40)
    for row, comment in ((7, b"crash here"), (21, b"hang here"), (39, b"crash here")):
        name, image = members[3 * row]
        marked = image[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + image[2:]
        members[3 * row] = (name, marked)
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", pairs(3))
    (tmp_path / "sitecustomize.py").write_text(BROKEN_DECODER)
    code = (
        "import sys; from pipelines import cli, workers; workers._STUCK_SECONDS = 1.0; sys.exit(cli.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, *command(tmp_path), "--workers", "2"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    made = table.Table.open(str(tmp_path / "table"))
    letters = made.dead_letters().to_pylist()
    assert [(letter["row"], letter["error"]) for letter in letters] == [(row, "DecoderCrashed") for row in (7, 21, 39)]
    assert [letter["message"].split("process ")[1] for letter in letters] == [
        "crashed (SIGSEGV)",
        "hung",
        "crashed (SIGSEGV)",
    ]
    assert made.num_rows == 37 + 3
    assert cli.main(["retry", str(tmp_path / "table"), "--quiet"]) == 0, "where the decoder is a sound one"
    assert table.Table.open(str(tmp_path / "table")).num_rows == 43


def test_towers_that_cannot_be_had_are_said(tmp_path: Path) -> None:
    given = order(tmp_path, "a", 1)
    with workers.borrowed(given.spec.tower, "cpu", str(tmp_path / "moved.safetensors")) as worker:
        failure = worker.run(given, lambda n: None)
        with pytest.raises(towers.TowerError):
            worker.wait()
    assert isinstance(failure, workers.Failure) and "a.tar: TowerError" in failure.why


def test_a_retry_with_other_weights_is_refused_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [*pairs(3), ("bad.jpg", b""), ("bad.txt", b"x")])
    assert cli.main([*command(tmp_path), "--workers", "2"]) == 0
    runs = len(list((tmp_path / "table" / "runs").iterdir()))
    retry = ["retry", str(tmp_path / "table"), "--pretrained", str(tmp_path / "no.safetensors"), "--quiet"]
    for workers_ in ("1", "2"):
        assert cli.main([*retry, "--workers", workers_]) == 2
        assert "leave out --pretrained" in capsys.readouterr().err
    assert len(list((tmp_path / "table" / "runs").iterdir())) == runs


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_launcher(tmp_path: Path, how: signal.Signals) -> None:
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", pairs(300, size=(400, 300)))
    argv = [sys.executable, "-m", "pipelines.cli", *command(tmp_path), "--workers", "2"]
    launcher = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "table" / "manifest").glob("*")):
        assert launcher.poll() is None
        time.sleep(0.05)
    below = children(launcher.pid)
    assert len(below) >= 3, "the server and two workers"
    launcher.send_signal(how)
    _, said = launcher.communicate()
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while any(map(is_running, below)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    assert cli.main(command(tmp_path)) == 0
    assert table.Table.open(str(tmp_path / "table")).num_rows == 1800
