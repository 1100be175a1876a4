"""`fusion eval TABLE`, `fusion label` and `fusion caption` on a table that `fusion embed` wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fusion_core import towers
from fusion_core.demo import shards as demo_shards
from pipelines import cli
from tests.corpora import photo, write_tar
from tests.fusion_core.test_captions import save_coca


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 200 scenes, two of them silent, and lists of shapes."""
    folder = tmp_path_factory.mktemp("evaluate")
    demo_shards.write_shards(folder / "shards", 200, 200, 7, broken=False)
    write_tar(folder / "shards" / "silent.tar", [("a.jpg", photo(1)), ("b.jpg", photo(2))])
    options = ["--input", str(folder / "shards" / "*.tar"), "--output", str(folder / "table"), "--model", towers.DEMO]
    assert cli.main(["embed", *options, "--fuser", "concat", "--quiet"]) == 0
    (folder / "shapes.txt").write_text("circle\nsquare\ntriangle\nstar\nring\ncross\tcross\tplus sign\n")
    (folder / "prompts.txt").write_text("a {}\none {}\n")
    return folder


def test_eval_writes_figures_and_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(folder / "table"), "--labels", "meta.shape", "--classes", str(folder / "shapes.txt")]
    command += ["--templates", str(folder / "prompts.txt"), "--folds", "2"]
    capsys.readouterr()
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for line in (
        "202 of 202 rows, 200 pairs",
        "text to image, ",
        "zero-shot: accuracy",
        "logistic regression on fused_embedding",
    ):
        assert line in said
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["retrieval"][0]["figures"]["hit@10"]["value"] > 0.8
    assert record["zero_shot"]["result"]["figures"]["accuracy"]["value"] > 0.8
    assert "<svg" in (tmp_path / "eval.html").read_text()
    assert cli.main(["eval", str(folder / "table"), "--json", "--max-rows", "50"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "table" / "eval.json").read_text()) and printed["sampled_rows"] == 50
    assert cli.main(["verify", str(folder / "table")]) == 0, "what lies beside is no part of the table"


def test_label_writes_a_column_for_each_class(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "label",
        str(folder / "table"),
        "--labels",
        str(folder / "shapes.txt"),
        "--output",
        str(tmp_path / "out"),
    ]
    capsys.readouterr()
    assert cli.main([*command, "--fit", "meta.shape", "--threshold", "0.1"]) == 0
    said = capsys.readouterr()
    assert "202 of 202 rows labelled" in said.out and "loss on held-out rows" in said.out
    assert "fitted on 200 rows" in said.err
    rows = pq.read_table(tmp_path / "out" / "labels")
    assert rows.num_rows == 202 and "P(plus sign)" not in rows.column_names
    assert 0 <= rows["P(cross)"][0].as_py() <= 1


def test_caption_fills_what_is_silent(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_coca(tmp_path / "models" / "coca")
    command = ["caption", str(folder / "table"), "--model", str(model), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--max-tokens", "5", "--device", "cpu", "--precision", "fp32"]) == 0
    assert "2 captions for the pictures without one, of 202 rows" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "captions")
    assert rows["caption_gen"].null_count == 200
    assert cli.main(["caption", str(folder / "table"), "--model", towers.DEMO, "--output", str(tmp_path / "x")]) == 2
    assert "name a CoCa model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eval", "TABLE", "--classes", "SHAPES"], "add --labels"),
        (["eval", "TABLE", "--templates", "SHAPES"], "prompts for --classes"),
        (["eval", "TABLE", "--labels", "meta.nothing"], "0 classes have 5 different pictures"),
        (["eval", "TABLE", "--labels", "colour"], "is no file"),
        (["eval", "TABLE", "--labels", "meta.shape", "--classes", "nowhere.txt"], "there is no file nowhere.txt"),
        (["eval", "SHAPES"], "no feature table"),
        (["eval", "TABLE", "--labels", "meta.shape", "--folds", "1"], "at least 2 folds"),
        (["label", "TABLE", "--labels", "SHAPES", "--output", "TABLE"], "name an empty folder"),
        (["label", "TABLE", "--labels", "SHAPES", "--output", "OUT", "--threshold", "3"], "cosine, -1 to 1, not 3.0"),
        (["label", "TABLE", "--labels", "SHAPES", "--output", "OUT", "--fit", "key"], "a temperature needs 20"),
        (["caption", "TABLE", "--model", "coca_ViT-B-32", "--output", "OUT"], "needs weights"),
    ],
)
def test_what_cannot_be_meant(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    places = {"TABLE": str(folder / "table"), "SHAPES": str(folder / "shapes.txt"), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(option, option) for option in options]) == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn_eval_says_what_to_install(folder: Path) -> None:
    code = (
        "import sys\nsys.modules['sklearn'] = None\n"
        "from pipelines import cli\n"
        f"sys.exit(cli.main(['eval', {str(folder / 'table')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'fusion-features[eval]'" in done.stderr
