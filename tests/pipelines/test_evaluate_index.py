"""The command `fusion eval INDEX`."""

import json
import shutil
from pathlib import Path

import pytest

from fusion_core import build, choose, evaluate_index
from pipelines import cli
from schemas import records
from schemas.index_evaluation import IndexEvaluation
from tests.fusion_core.test_index import pairs, write_table


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate_index, "_TIMED", 64)
    monkeypatch.setattr(choose, "_TIMED_QUERIES", 3)
    image, text = pairs(400)
    build.build(write_table(tmp_path / "table", image, text), str(tmp_path / "index"))
    return tmp_path / "index"


def test_the_command_measures_and_writes_record_and_page(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(index), "--queries", "50"]) == 0
    said = capsys.readouterr()
    assert "recall of text queries against exact search: @1 1.0000, @10 1.0000" in said.out
    assert "within 0.01" in said.out and "32 at once" in said.out and "eval: exact took" in said.err
    written = records.from_json(IndexEvaluation, (index / "eval.json").read_bytes(), "eval.json")
    assert written.rows_indexed == 400 and {item.n_queries for item in written.recalls} == {50}
    assert "<svg" in (index / "eval.html").read_text("utf-8")
    assert cli.main(["index", written.table, "--output", str(index)]) == 0  # what was written is not in the way


def test_a_table_that_was_moved_is_named_and_another_place_is_written_to(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(tmp_path / "table", tmp_path / "moved")
    assert cli.main(["eval", str(index)]) == 2
    assert "say where to with --table" in capsys.readouterr().err
    output = tmp_path / "elsewhere"
    command = ["eval", str(index), "--table", str(tmp_path / "moved"), "--output", str(output), "--json"]
    assert cli.main([*command, "--queries", "20", "--device", "cpu", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / "eval.json").read_bytes()) and printed["seed"] == 3
    assert (output / "eval.html").exists() and not (index / "eval.html").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--queries", "0"], "not at least 1"),
        (["--seed", "-1"], "below 0"),
        (["--device", "tpu"], "not auto, cpu or cuda"),
        (["--what"], "no option --what"),
        (["--labels", "x"], "is an index: --labels is for a table"),
    ],
)
def test_wrong_usage_is_told_before_any_work(
    index: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str
) -> None:
    try:
        code = cli.main(["eval", str(index), *asked])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2 and message in capsys.readouterr().err
    assert not (index / "eval.json").exists()


def test_what_is_no_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "no feature table" in capsys.readouterr().err
    (tmp_path / "table.json").write_text("{}")
    assert cli.main(["eval", str(tmp_path), "--queries", "5"]) == 2
    assert "is a table: --queries is for an index" in capsys.readouterr().err
    (tmp_path / "table.json").unlink()
    (tmp_path / "index.json").write_text("{}")
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "not a IndexRecord" in capsys.readouterr().err
