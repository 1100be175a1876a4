"""The indexing job on Beam's FnApiRunner, and the command over it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_core import build
from fusion_core.index import Index
from fusion_core.table import Table
from pipelines import cli
from pipelines import index as job
from pipelines.runner import Knobs
from schemas.errors import RunError
from tests.fusion_core.test_index import pairs, write_table

DIM = 32


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    image, text = pairs(3000, dim=DIM)
    return write_table(tmp_path_factory.mktemp("table"), image, text, part_rows=250)


def options(**more: Any) -> dict[str, Any]:
    return {"factory": "IVF1,SQ8", "exact_rows": 100, "piece_bytes": 2 * DIM * 600, **more}


def test_the_job_gives_the_bytes_that_building_in_this_process_gives(table: Table, tmp_path: Path) -> None:
    here = build.build(table, str(tmp_path / "here"), **options())
    there = job.run(build.IndexJob(str(tmp_path / "there"), **options()), table, Knobs(workers=2))
    assert (there.shards, there.meta, there.training) == (here.shards, here.meta, here.training)
    assert set(there.seconds) == {"train", "add", "merge", "measure"}


def test_pieces_that_failed_are_told_and_the_others_are_not_done_again(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = build.IndexJob(str(tmp_path), **options())
    add, done = build.add, list[str]()

    def failing(*args: Any) -> None:
        if args[-1].records[0].unit.id == "unit-004":
            raise OSError("the disk is gone")
        add(*args)
        done.append(args[-1].name)

    with monkeypatch.context() as patch:
        patch.setattr(build, "add", failing)
        with pytest.raises(RunError, match=r"1 of 6 pieces failed; the first: OSError: the disk is gone"):
            job.run(asked, table, Knobs(workers=2))
    assert len(set(done)) == 5
    monkeypatch.setattr(build, "add", lambda *args: (done.append(args[-1].name), add(*args))[1])
    job.run(asked, table, Knobs(workers=2))
    assert len(done) == len(set(done)) == 6
    assert Index.open(str(tmp_path)).search(np.eye(1, DIM, dtype=np.float32), 3)[1].min() >= 0


def test_the_command_builds_reports_and_has_nothing_to_do_the_second_time(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", table.place, "--output", str(tmp_path), "--target-recall", "0.9", "--tune-seconds", "5"]
    assert cli.main([*command, "--workers", "2"]) == 0
    first = capsys.readouterr()
    assert "3,000 of 3,000 rows" in first.out and "recall@10 of text queries" in first.out
    opened = Index.open(str(tmp_path))
    opened.check_table(table)
    assert opened.record.factory == "Flat"  # few rows: no choice
    written = (tmp_path / "index.json").read_bytes()
    assert cli.main(command) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (tmp_path / "index.json").read_bytes() == written


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--target-recall", "1.5"], "not above 0 and at most 1"),
        (["--max-bytes-per-vector", "0"], "not at least 1"),
        (["--colum", "x"], "did you mean --column"),
        (["--column", "caption"], "no embedding column 'caption'"),
    ],
)
def test_wrong_usage_is_told_before_any_work(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str
) -> None:
    try:
        code = cli.main(["index", table.place, "--output", str(tmp_path / "index"), *asked])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
