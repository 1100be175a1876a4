"""The commands beside `embed`, and the whole way as the demo shows it."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from fusion_core import fusers, report, table, towers
from fusion_core.demo import shards as demo_shards
from pipelines import cli, options
from tests.corpora import photo

PAIRS = 800


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fusion demo` leaves behind, and what it said in `said.txt`."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    said = io.StringIO()
    with redirect_stdout(said):
        assert cli.main(["demo", "--output", str(folder), "--pairs", str(PAIRS)]) == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def test_the_demo_writes_into_no_table(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(demo.rglob("*"))
    for name in ("table", "index"):
        assert cli.main(["demo", "--output", str(demo / name)]) == 2
        assert "name a folder of its own" in capsys.readouterr().err
    assert sorted(demo.rglob("*")) == before


def test_the_demo_ends_with_a_report_that_shows_the_whole_way(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    opened = table.Table.open(str(demo / "table"))
    assert opened.num_rows == PAIRS + len(demo_shards.UNUSUAL)
    assert len(opened.dead_letters()) == len(demo_shards.BROKEN)
    for shown in (
        "Throughput by stage",
        "recall@10",
        "Dead letters",
        "header_only_jpeg",
        "Similarity of image and caption",
    ):
        assert shown in page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) >= 4 * 6
    assert not re.search(r'(src|href)="(?!data:)', page), "the page stands alone"


def test_the_demo_shows_what_trained_fusers_bring(demo: Path) -> None:
    page, said = (demo / "report.html").read_text(), (demo / "said.txt").read_text()
    assert report.FUSERS_TITLE in page and report.FUSERS_TITLE in said
    assert {table.Table.open(str(demo / f"views-table-{i}")).num_rows for i in (1, 2)} == {PAIRS}
    lines = said[said.index(report.FUSERS_TITLE) :].splitlines()
    dim = table.Table.open(str(demo / "table")).spec.tower.embedding_dim
    for kind in ("combiner", "attention"):
        record = fusers.load(str(demo / "fusers" / kind), dim).record
        assert record is not None
        (line,) = [line for line in lines if line.startswith(kind)]
        found = f"{100 * record.metrics[f'retrieval/{kind}/R@1']:.1f}"
        assert line.split()[1] == found and f">{found}<" in page
        assert f"  {'' if record.promoted else 'not '}promoted: " in line
        for against in re.findall(r"over ([^;]+)", line):
            low = 100 * record.metrics[f"retrieval/R@1 minus {against}/low"]
            assert f"[{low:+.1f}, " in line and f"{against}: " in page


def test_search_by_text_finds_what_was_asked_for(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", str(demo / "index"), "--text", "three large green circles", "-k", "5", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert sum("green" in hit["caption"] for hit in hits) >= 3
    for hit in hits:
        data = Path(hit["shard"]).read_bytes()[hit["offset"] : hit["offset"] + hit["length"]]
        assert data[:2] in (b"\xff\xd8", b"\x89P", b"GI")


def test_search_by_a_rows_own_picture_finds_the_row(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = table.Table.open(str(demo / "table")).sample(1, seed=5).to_pylist()[0]
    query = tmp_path / "query.jpg"
    query.write_bytes(Path(row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]])
    assert cli.main(["search", str(demo / "index"), "--image", str(query), "-k", "1"]) == 0
    said = capsys.readouterr().out
    assert row["key"] in said and f"{row['offset']}+{row['length']}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a text, an image, or both"),
        (["--text", " "], "text of a query is empty"),
        (["--text", "x", "--image", "/nowhere.jpg"], "/nowhere.jpg"),
        (["--text", "x", "--by-rank"], "give both --text and --image"),
        (["--image", __file__], "starts with"),
        (["--text", "x", "--image", "PHOTO", "--image-weight", "7"], "between 0 and 1"),
    ],
)
def test_queries_that_cannot_be_answered_say_why(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo(1))
    options = [option.replace("PHOTO", str(tmp_path / "photo.jpg")) for option in options]
    assert cli.main(["search", str(demo / "index"), *options]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_table_or_index_is_refused(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["verify"], ["retry"], ["index", "--output", str(tmp_path / "i")]):
        assert cli.main([*command, str(tmp_path)]) == 2
        assert "no feature table" in capsys.readouterr().err
    assert cli.main(["search", str(tmp_path), "--text", "x"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert cli.main(["index", str(demo / "table"), "--output", str(tmp_path / "i"), "--column", "caption"]) == 2
    assert "image_embedding" in capsys.readouterr().err


def test_an_index_does_not_go_among_a_tables_files(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(demo / "table")
    before = sorted((demo / "table").rglob("*"))
    assert cli.main(["index", place, "--output", place]) == 2
    assert "is a feature table" in capsys.readouterr().err
    assert sorted((demo / "table").rglob("*")) == before
    assert cli.main(["search", place, "--text", "x"]) == 2
    assert f"`fusion index {place} --output INDEX`" in capsys.readouterr().err


def test_what_is_found_stays_on_one_line_and_commands_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.jpg").write_bytes(photo(1))
    (shards / "a.txt").write_text("two\nlines \x1b[31mred\u202e")
    place, index = str(tmp_path / "table"), str(tmp_path / "index")
    asked = ["--input", str(shards), "--model", towers.DEMO, "--workers", "1", "--quiet"]
    assert cli.main(["embed", *asked, "--output", place]) == 0
    assert cli.main(["index", place, "--output", index]) == 0
    said = capsys.readouterr()
    assert "1 of 1 rows, Flat, " in said.out
    assert cli.main(["search", index, "--text", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "two lines  [31mred " in lines[1] and lines[1].isprintable()
    assert cli.main(["search", index, "--text", "x", "--where", "width > 9999"]) == 0
    assert capsys.readouterr() == ("", "fusion search: no row was found\n")

    pictures = str(tmp_path / "pictures")
    (shards / "a.txt").unlink()
    assert cli.main(["embed", *asked, "--output", pictures]) == 0
    capsys.readouterr()
    assert cli.main(["index", pictures, "--column", "text_embedding", "--output", str(tmp_path / "none")]) == 0
    said = capsys.readouterr()
    assert "0 of 1 rows, Flat\n" in said.out and "no row that is kept has a vector in text_embedding" in said.err


def test_verify_says_what_is_wrong(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    place = shutil.copytree(demo / "table", tmp_path / "table")
    assert cli.main(["verify", str(place)]) == 0
    assert "whole" in capsys.readouterr().out
    part = next((place / "features").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    assert cli.main(["verify", str(place), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert part.name in finding["what"]


def test_verify_judges_dead_letters_as_the_jobs_do(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(demo / "table"), "--max-dead-letters", "50%"]) == 0
    assert cli.main(["verify", str(demo / "table"), "--max-dead-letters", "0"]) == 3
    assert "more than --max-dead-letters allows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "x", "--txt", "y"], "no option --txt: did you mean --text?"),
        (["search", "x", "--text", "y", "--k", "3"], "no option --k: did you mean -k"),
        (["status", "x", "y"], "'y' is one argument too many"),
        (["export", "TABLE", "--format", "webdataset", "--output", __file__], "a file is where a folder is expected"),
        (["search", __file__, "--text", "x"], "a file is where a folder is expected"),
        (["verify", "TABLE", "TABLE"], "is one argument too many"),
        (["retry", "TABLE", "--runner=FnApiRunner", "again"], "'again' is one argument too many"),
        (["verify", "TABLE", "--repiar"], "no option --repiar, neither of fusion nor of Beam; did you mean --repair"),
        (["verify", "TABLE", "--opt-out", "none"], "--opt-out is for --repair"),
        (["status", ""], "the name of a place is empty"),
        (["status", "caf\udce9"], "a name that is not UTF-8"),
        (["embed", "--input", "", "--output", "x", "--model", "x"], "the name of a place is empty"),
        (["embed", "--input", __file__, "--output", "", "--model", "x"], "the name of a place is empty"),
        (["fuse", "TABLE", "--output", "x", "--text-model", "ViT-B-32"], "; --text-pretrained is a file or one of"),
    ],
)
def test_a_slip_is_named(demo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main([str(demo / "table") if word == "TABLE" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["embed"],
        ["embed", "--model", towers.DEMO],
        ["fly"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_share_that_is_just_reached_is_kept() -> None:
    for percent in range(101):
        limit = options.share(f"{percent}%")
        for whole in (50, 100, 180):
            counts = [count for count in range(whole + 1) if options.is_more(count, whole, limit)]
            assert counts == [count for count in range(whole + 1) if 100 * count > percent * whole]
    assert not options.is_more(0, 0, options.share("0%")) and options.is_more(4, 9, options.share("3"))
