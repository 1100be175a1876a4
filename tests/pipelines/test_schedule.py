"""`fusion run`: what a job does again, what it publishes, and what stands when it is stopped."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusion_core import build, index, lock, versions
from fusion_core.demo.shards import write_shards
from pipelines import cli, schedule
from pipelines.schedule import Ended
from schemas.job import Alert, JobRun, TableState
from tests.corpora import pairs, write_tar

JOB = """
output = "out"
[embed]
input = "shards/*.tar"
model = "fusion-demo"
precision = "fp32"
device = "cpu"
workers = 1
quiet = true
[[index]]
name = "pictures"
workers = 1
"""
ALERTS = """
[alerts]
max-dead-letters = "20%"
max-new-dead-letters = "30%"
max-row-drop = "10%"
max-similarity-shift = 0.05
max-similarity-distance = 0.3
max-recall-drop = 0.02
"""


def inside(argv: Sequence[str], quiet: bool = False) -> Ended:
    """A stage in this process, which has imported what it needs."""
    return Ended(cli.main(argv), 0.0)


class Job:
    """A job file, its shards and its output."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self._capsys = folder, capsys
        self.write(JOB + ALERTS)
        write_shards(folder / "shards", 24, 12, seed=3, broken=False)

    def write(self, text: str) -> None:
        (self.folder / "job.toml").write_text(text)

    def run(self, expected: int = 0, *options: str) -> JobRun:
        self._capsys.readouterr()
        code = cli.main(["run", str(self.folder / "job.toml"), "--json", *options])
        self.said = self._capsys.readouterr()
        assert code == expected, self.said.err
        found = schedule.latest(str(self.folder / "out"))
        assert found and found.exit_code == expected and found.ended_at
        assert json.loads(self.said.out[self.said.out.index("{\n") :])["id"] == found.id
        return found

    @property
    def root(self) -> Path:
        return self.folder / "out" / "indexes" / "pictures"

    @property
    def current(self) -> str:
        found = versions.read(str(self.root))
        assert found
        return found.current

    @property
    def rows(self) -> int:
        return index.Index.open(str(self.root)).record.rows_indexed

    @property
    def claims(self) -> list[Path]:
        return list((self.folder / "out" / "lock").glob("*.json"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    monkeypatch.setattr(schedule, "apart", inside)
    return Job(tmp_path, capsys)


def states(run: JobRun) -> dict[str, str]:
    return {stage.name: stage.state for stage in run.stages}


def test_a_job_does_what_is_new_and_keeps_the_last_indexes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job.run()
    assert (first.state, first.baseline, job.rows) == ("published", "", 24)
    assert states(first) == {"embed": "done", "index pictures": "done"}
    assert first.table and (first.table.rows_in, first.table.rows_new, first.table.rows_gone) == (24, 24, 0)
    assert first.job_sha256 and first.versions["fusion-features"] and first.stages[0].command.startswith("fusion embed")

    second = job.run()
    assert (second.state, second.baseline, job.current) == ("unchanged", first.id, first.id)
    assert states(second) == {"embed": "done", "index pictures": "skipped"}
    assert second.table and (second.table.rows_out, second.table.units_new) == (24, 0)
    assert second.similarity == first.similarity and second.similarity_new and second.similarity_new.rows == 0

    write_shards(job.folder / "more", 12, 12, seed=4, broken=False)[0].rename(job.folder / "shards" / "new.tar")
    third = job.run()
    assert (third.state, third.baseline, job.current, job.rows) == ("published", second.id, third.id, 36)
    assert third.table and (third.table.rows_out, third.table.rows_new, third.table.rows_gone) == (36, 12, 0)
    assert third.similarity and third.similarity.rows == 36
    assert {alert.name for alert in third.alerts if alert.figure is not None} == {
        "max-dead-letters", "max-new-dead-letters", "max-row-drop", "max-similarity-shift", "max-similarity-distance",
        "max-recall-drop",
    }  # fmt: skip
    kept = index.Index.open(str(job.root / first.id))
    assert kept.record.rows_indexed == 24, "the replaced index can still be opened"

    monkeypatch.setattr(versions, "_GRACE_SECONDS", -1.0)
    job.write(JOB + "target-recall = 0.9\n" + ALERTS)
    fourth = job.run()
    assert sorted(path.name for path in job.root.iterdir() if path.name[0] == "2") == [third.id, fourth.id]
    assert fourth.table and fourth.table.units_new == 0

    assert cli.main(["run", str(job.folder / "job.toml"), "--rollback"]) == 0
    assert job.current == third.id and third.id in job._capsys.readouterr().out
    assert cli.main(["status", str(job.folder / "out")]) == 0
    assert fourth.id in job._capsys.readouterr().out
    assert job.claims == []

    assert cli.main(["run", str(job.folder / "job.toml"), "--quiet"]) == 0
    assert "run " not in job._capsys.readouterr().out, "cron mails whatever is said"


def test_a_fused_and_evaluated_job(job: Job) -> None:
    more = '[fuse]\nfuser = "concat"\nworkers = 1\n[[index]]\ncolumn = "fused_embedding"\n[evaluate]\nqueries = 10\n'
    job.write(JOB + more + "[alerts]\nmin-recall = 0.5\nmax-recall-drop = 0.1\n")
    run = job.run()
    assert list(states(run)) == [
        "embed", "fuse", "index pictures", "evaluate pictures", "index fused_embedding", "evaluate fused_embedding",
    ]  # fmt: skip
    assert [item.state for item in run.indexes] == ["published", "published"]
    assert all(item.evaluated for item in run.indexes)
    assert {alert.of.rpartition(" (")[2] for alert in run.alerts if alert.name == "min-recall"} == {
        "index.json)", "fusion eval)",
    }  # fmt: skip
    again = job.run()
    assert again.state == "unchanged" and [item.evaluated for item in again.indexes] == [
        i.evaluated for i in run.indexes
    ]


def add_what_is_odd(job: Job) -> None:
    write_tar(job.folder / "shards" / "odd.tar", pairs(24, size=(64, 64)))  # captions that say nothing
    write_tar(job.folder / "shards" / "broken.tar", [(f"{i}.jpg", b"<html>") for i in range(24)])


def halve(job: Job) -> None:
    write_tar(sorted((job.folder / "shards").iterdir())[0], pairs(2))


@pytest.mark.parametrize(
    ("change", "tripped"),
    [
        (
            add_what_is_odd,
            ["max-dead-letters", "max-new-dead-letters", "max-similarity-shift", "max-similarity-distance"],
        ),
        (halve, ["max-row-drop"]),
    ],
)
def test_a_limit_that_trips_publishes_nothing(job: Job, change: Callable[[Job], None], tripped: list[str]) -> None:
    first = job.run()
    change(job)
    refused = job.run(4)
    assert (refused.state, job.current, refused.baseline, job.rows) == ("refused", first.id, first.id, 24)
    assert {alert.name for alert in refused.alerts if alert.tripped} >= set(tripped)
    assert "index pictures" not in states(refused), "said before an index is built"
    for name in tripped:
        assert name in job.said.err and "what stood stands" in job.said.err
    again = job.run(4)
    assert again.alerts == refused.alerts, "nor does the next run, which finds all embedded"
    held = {path.name for path in (job.folder / "out" / "runs").glob("*-units.parquet")}
    assert held == {f"{run.id}-units.parquet" for run in (first, again)}, "refused runs do not pile up"
    job.write(JOB)
    assert job.run().state == "published"


def test_a_recall_that_is_too_low_leaves_a_candidate(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job.run()
    job.write(JOB + "target-recall = 0.9\n[alerts]\nmin-recall = 1.0\n")
    monkeypatch.setattr(index, "recall", lambda *_: 0.93)
    refused = job.run(4)
    assert (refused.state, job.current) == ("refused", first.id)
    (state,) = refused.indexes
    assert state.state == "candidate" and index.Index.open(state.place).record.rows_indexed == 24
    job.write(JOB + "target-recall = 0.9\n[alerts]\nmin-recall = 0.9\n")
    assert job.run().state == "published" and job.current == refused.id, "the candidate, gone on with"


def test_a_stage_that_fails_ends_the_run_with_its_code(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(JOB)
    first = job.run()
    write_tar(job.folder / "shards" / "new.tar", pairs(2))

    def fail(code: int) -> Any:
        return lambda argv, quiet: (
            inside(argv) if argv[0] == "embed" else Ended(code, 1.0, ("a line", "no space s3://a:b@c"))
        )

    for code, expected in ((2, 2), (-9, 1)):
        monkeypatch.setattr(schedule, "apart", fail(code))
        run = job.run(expected)
        assert (run.state, job.current, run.stages[-1].exit_code) == ("failed", first.id, code)
        assert "a:b" not in run.stages[-1].why + job.said.err and "no space" in run.message
    monkeypatch.setattr(schedule, "apart", inside)
    assert job.run().state == "published"


def test_what_was_added_is_kept_where_storage_failed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(JOB)

    def fail(*_: Any) -> None:
        raise OSError("the storage stumbled")

    with monkeypatch.context() as patch:
        patch.setattr(build, "add", fail)
        job.run(1)
        assert "1 of 1 pieces failed; the first: OSError: the storage stumbled" in job.said.err
    (candidate,) = versions.candidates(str(job.root))
    assert list((job.root / candidate).glob("training-*.json")), "what is done is not done again"
    assert job.run().state == "published" and job.current == candidate


def holding(folder: Path, texts: Sequence[str]) -> list[Path]:
    """The files in which one of the texts stands."""
    lying = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in lying if any(text.encode() in path.read_bytes() for text in texts)]


def test_keys_that_are_opted_out_leave_all_that_stands(job: Job) -> None:
    more = '[[index]]\nname = "captions"\ncolumn = "text_embedding"\nworkers = 1\n'
    job.write(JOB + more)
    first = job.run()
    kept = index.Index.open(str(job.root)).meta([0, 13]).to_pylist()
    assert len(holding(job.root, [row["caption"] for row in kept])) >= 1

    listed = JOB.replace("[embed]", '[embed]\nopt-out = "keys.txt"\nremove-missing = "60%"')
    job.write(listed + more)
    assert cli.main(["run", str(job.folder / "job.toml")]) == 2
    assert 'opt-out = "keys.txt": there is no such file' in job._capsys.readouterr().err
    (job.folder / "keys.txt").write_text(kept[0]["key"] + "\n")
    second = job.run()
    assert (second.state, job.rows) == ("published", 23)
    assert second.table and (second.table.rows_in, second.table.rows_out, second.table.rows_opted_out) == (24, 23, 1)
    assert {(item.rows_added, item.rows_removed) for item in second.indexes} == {(0, 1)}
    assert "24 samples = 23 rows + 0 dead letters + 1 opted out" in schedule.text(second)
    assert holding(job.folder / "out" / "indexes", [kept[0]["caption"]]) == []
    assert not (job.root / first.id).exists(), "nor can one roll back to what has it"
    assert cli.main(["run", str(job.folder / "job.toml"), "--rollback"]) == 0
    assert job._capsys.readouterr().out.count("no earlier version is kept") == 2

    sorted((job.folder / "shards").iterdir())[1].unlink()
    third = job.run()
    assert third.table and (third.table.rows_out, third.table.rows_gone, third.table.rows_opted_out) == (11, 12, 1)
    assert {item.rows_removed for item in third.indexes} == {12}
    assert (job.root / second.id).exists(), "a shard that is gone is no key that opted out"


def test_no_roll_back_leads_to_a_key_that_is_opted_out(job: Job) -> None:
    job.write(JOB)
    first = job.run()
    write_tar(job.folder / "shards" / "new.tar", pairs(2))
    second = job.run()
    row = index.Index.open(str(job.root)).meta([24]).to_pylist()[0]
    assert cli.main(["run", str(job.folder / "job.toml"), "--rollback"]) == 0
    assert job.current == first.id
    (job.folder / "keys.txt").write_text(row["key"] + "\n")
    job.write(JOB.replace("[embed]", '[embed]\nopt-out = "keys.txt"'))
    third = job.run()
    assert (third.state, job.rows) == ("published", 25)
    assert not (job.root / second.id).exists(), "it has the key, though it was not the one that this run replaced"
    assert holding(job.root, [row["caption"]]) == []


def test_nor_to_one_whose_shard_lost_it_at_the_same_time(job: Job) -> None:
    job.write(JOB + '[[index]]\nname = "old"\nworkers = 1\n')
    write_tar(job.folder / "shards" / "new.tar", pairs(2))
    first = job.run()
    row = index.Index.open(str(job.root)).meta([24]).to_pylist()[0]
    write_tar(job.folder / "shards" / "new.tar", pairs(1, start=1))
    (job.folder / "keys.txt").write_text(f"{row['key']}\nof another corpus\n")
    job.write(JOB.replace("[embed]", '[embed]\nopt-out = "keys.txt"'))
    second = job.run()
    assert second.table and (second.table.rows_out, second.table.rows_opted_out) == (25, 0)
    assert holding(job.root, [row["caption"]]) == [] and not (job.root / first.id).exists()
    old = job.root.parent / "old"
    assert f"{old} has rows of keys that are opted out, and the job file does not name it" in second.message
    shutil.rmtree(old)
    assert job.run().message == ""


def test_an_index_without_rows_is_published_and_not_measured(job: Job) -> None:
    job.write(JOB + "[evaluate]\nqueries = 10\n[alerts]\nmin-recall = 0.9\n")
    for path in sorted((job.folder / "shards").iterdir()):
        write_tar(path, [(f"{path.stem}.txt", b"a caption alone")])
    run = job.run()
    assert (run.state, job.rows, states(run)["evaluate pictures"]) == ("published", 0, "skipped")
    assert "nothing to measure" in schedule.text(run)


def test_a_version_that_lost_its_files_is_built_anew(job: Job) -> None:
    job.write(JOB)
    first = job.run()
    shutil.rmtree(job.root / first.id)
    assert (job.run().state, job.rows) == ("published", 24)


def test_the_error_of_a_stage_is_told_whole(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(JOB)
    said = ("the model is loaded", "fusion embed: a table of another job:", "  fuser: None here, 'concat' there")
    monkeypatch.setattr(schedule, "apart", lambda argv, quiet: Ended(2, 0.0, said))
    assert job.run(2).message == "embed ended with exit code 2: " + "\n".join(said[1:])
    monkeypatch.setattr(schedule, "apart", lambda argv, quiet: Ended(1, 0.0, ("failed: 0.tar: why", "1 of 2 failed")))
    assert job.run(1).message.endswith(": failed: 0.tar: why\n1 of 2 failed")
    monkeypatch.setattr(schedule, "apart", lambda argv, quiet: Ended(-9, 0.0))
    assert job.run(1).message == "embed ended with signal 9, as from a system out of memory: it said nothing"


def test_the_lines_of_a_run_add_up_and_say_why_a_figure_beyond_its_limit_is_kept() -> None:
    table = TableState(4, 620, 600, 12, 1, 155, 150, 3, 0, rows_opted_out=8)
    why = "0.5440 of 31 rows after 0.6060; chance explains 0.0213"
    alert = Alert("max-similarity-shift", "mean similarity of the new rows", 0.062, 0.05, "", False, why)
    run = JobRun("x", "job.toml", "", "", "", 1, "", state="published", table=table, alerts=(alert,))
    said = schedule.text(run)
    assert "620 samples = 600 rows + 12 dead letters + 8 opted out; new: 150 rows" in said
    assert f"kept: 0.062 mean similarity of the new rows ({why})" in said
    whole = replace(run, table=replace(table, rows_in=612, rows_opted_out=0), alerts=(replace(alert, figure=0.01),))
    assert "612 samples = 600 rows + 12 dead letters; new" in schedule.text(whole)
    assert why not in schedule.text(whole)


def test_one_run_at_a_time(job: Job) -> None:
    with lock.held(str(job.folder / "out"), "other"):
        assert cli.main(["run", str(job.folder / "job.toml")]) == 5
        assert "run other is at work" in job._capsys.readouterr().err
        assert cli.main(["run", str(job.folder / "job.toml"), "--rollback"]) == 5
    assert schedule.latest(str(job.folder / "out")) is None
    job.run()


def test_a_run_whose_lock_was_taken_over_publishes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent_for_long(argv: Sequence[str], quiet: bool) -> Ended:
        ended = inside(argv)
        for path in job.claims if argv[0] == "index" else ():
            path.unlink()
        return ended

    monkeypatch.setattr(schedule, "apart", silent_for_long)
    assert "another one took over" in job.run(1).message
    assert versions.read(str(job.root)) is None
    monkeypatch.setattr(schedule, "apart", inside)
    assert job.run().state == "published"


def test_an_index_with_versions_is_not_built_over(job: Job) -> None:
    job.run()
    table = str(job.folder / "out" / "table")
    assert cli.main(["index", table, "--output", str(job.root)]) == 2
    assert "has versions" in job._capsys.readouterr().err
    assert cli.main(["eval", str(job.root), "--queries", "5"]) == 0
    assert (job.root / job.current / "eval.json").exists()


# --- in processes of their own --------------------------------------------------------------------------------------


def child(script: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)


KILLED = """
import os, sys
from pipelines import cli, schedule
def stage(argv, quiet):
    code = cli.main(argv)
    if argv[0] == "index":
        os.kill(os.getpid(), 9)
    return schedule.Ended(code, 0.0)
schedule.apart = stage
cli.main(["run", sys.argv[1]])
"""


def test_killed_between_build_and_swap_the_old_index_stands(job: Job) -> None:
    first = job.run()
    write_shards(job.folder / "more", 12, 12, seed=4, broken=False)[0].rename(job.folder / "shards" / "new.tar")
    embed = [f"--{name}" for name in ("model=fusion-demo", "precision=fp32", "device=cpu", "workers=1", "quiet")]
    table = str(job.folder / "out" / "table")
    assert cli.main(["embed", "--input", str(job.folder / "shards" / "*.tar"), "--output", table, *embed]) == 0
    with child(KILLED, str(job.folder / "job.toml")) as killed:
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert (job.current, job.rows, len(job.claims)) == (first.id, 24, 1)
    (candidate,) = versions.candidates(str(job.root))
    assert schedule.read_run(str(job.folder / "out"), candidate).state == "running", "it could not say more"
    done = job.run()
    assert (done.state, job.current, job.rows) == ("published", candidate, 36)
    assert versions.candidates(str(job.root)) == [] == job.claims


SLEEPING = """
import sys
from pipelines import cli, schedule
schedule._CHILD = '''
import os, sys, threading, time
from pipelines.schedule import _end_with_parent
threading.Thread(target=_end_with_parent, daemon=True).start()
print("stage", os.getpid(), flush=True)
time.sleep(120)
'''
sys.exit(cli.main(["run", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_ended_takes_its_stage_along(job: Job, number: signal.Signals) -> None:
    with child(SLEEPING, str(job.folder / "job.toml")) as run:
        assert run.stderr
        said = next(line for line in run.stderr if line.startswith("stage"))
        stage = int(said.split()[1])
        run.send_signal(number)
        run.communicate()
    deadline = time.monotonic() + 20
    while lock._process(stage):
        assert time.monotonic() < deadline, "the stage lives on"
        time.sleep(0.05)
    found = schedule.latest(str(job.folder / "out"))
    assert found
    if number == signal.SIGTERM:
        assert (run.returncode, found.state, found.exit_code) == (1, "interrupted", 1)
        assert found.stages[-1].state == "interrupted" and job.claims == []
    else:
        assert schedule.read_run(str(job.folder / "out"), found.id).state == "running", "it could not say more"
        assert found.state == "interrupted" and "its process is gone" in schedule.text(found) and len(job.claims) == 1
    with lock.held(str(job.folder / "out"), "next"):
        pass


def test_a_stage_runs_apart_and_what_it_took_is_known(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = schedule.apart(["status", str(tmp_path)])
    assert ended.exit_code == 2 and "no feature table" in ended.said[-1] and ended.cpu_seconds > 0.1
    captured = capfd.readouterr()
    assert "no feature table" in captured.err and captured.out == ""
    assert schedule.apart(["status", str(tmp_path)], quiet=True).said == ended.said
    assert capfd.readouterr() == ("", "")
