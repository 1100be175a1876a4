"""`fusion dedup` on a table that `fusion embed` wrote."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusion_core import towers
from fusion_core.dedup import Duplicates
from fusion_core.table import Table
from pipelines import cli
from tests.corpora import pairs, photo, write_tar


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 30 pictures; 5 of them once more to the byte, 5 once more as worse JPEGs, and a row of text."""
    folder = tmp_path_factory.mktemp("dedup")
    members = pairs(30)
    copies = [(f"copy{i}.jpg", photo(i)) for i in range(5)]
    worse = [(f"worse{i}.jpg", photo(i, quality=50)) for i in range(10, 15)]
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", [*copies, *worse, ("words.txt", b"nothing to see")])
    options = ["--input", str(folder / "*.tar"), "--output", str(folder / "table"), "--model", towers.DEMO, "--quiet"]
    assert cli.main(["embed", *options]) == 0
    return folder / "table"


def test_duplicates_of_each_kind(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "dedup",
        str(place),
        "--output",
        str(tmp_path / "out"),
        "--near",
        "--cosine",
        "0.9999",
        "--keep",
        "first",
    ]
    assert cli.main(options) == 0
    said = capsys.readouterr()
    assert "31 of 41 rows kept; dropped: 5 exact, 5 near, 0 semantic" in said.out
    assert "near took" in said.err
    opened = Table.open(str(place))
    found = Duplicates.open(str(tmp_path / "out"), opened)
    keys = [key for batch in found.scan_kept(["key"]) for key in batch["key"].to_pylist()]
    assert keys == [f"{i:06d}" for i in range(30)] + ["words"]
    rows = pq.read_table(tmp_path / "out" / "clusters").to_pylist()
    assert {row["key"]: row["cluster"] for row in rows if row["why"] == "near"} == {
        f"worse{i}": i for i in range(10, 15)
    }
    assert cli.main(options) == 0
    assert "stands already" in capsys.readouterr().err


def test_semantic_duplicates_are_within_the_cosine_of_the_row_kept(place: Path, tmp_path: Path) -> None:
    assert cli.main(["dedup", str(place), "--output", str(tmp_path / "out"), "--cosine", "0.97"]) == 0
    record = json.loads((tmp_path / "out" / "dedup.json").read_text())
    exact, semantic = record["dropped"]["exact"], record["dropped"]["semantic"]
    assert exact <= 5, "the copy of a row that is dropped may be joined to the row kept by its vector"
    assert semantic >= 5 and exact + semantic >= 10
    opened = Table.open(str(place))
    matrix = np.concatenate([block for _, block, _ in opened.vectors("image_embedding")]).astype(np.float64)
    parts = [Duplicates.open(str(tmp_path / "out"), opened).clusters(part) for part in range(2)]
    rows = [row for part in parts for row in part.to_pylist()]
    kept = {row["cluster"]: ordinal for ordinal, row in enumerate(rows) if row["kept"]}
    for ordinal, row in enumerate(rows):
        if row["why"] == "semantic":
            a, b = matrix[ordinal], matrix[kept[row["cluster"]]]
            assert row["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
            assert row["cosine"] >= 0.97 - 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cosine", "2"], "at most 1, e.g. 0.95; not 2.0"),
        (["--near-bits", "40"], "0 to 10 of 64, not 40"),
        (["--cosine", "0.9", "--column", "caption"], "no embedding column 'caption'"),
        (["--cosine", "0.9", "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_options_that_cannot_be_meant(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["dedup", str(place), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_places_that_are_no_table_or_not_ours(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dedup", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no feature table" in capsys.readouterr().err
    assert cli.main(["dedup", str(place), "--output", str(place)]) == 2
    assert "name an empty folder" in capsys.readouterr().err
