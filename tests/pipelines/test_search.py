"""`fusion search`, as its users type it."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_core import files
from fusion_core.index import Index
from fusion_core.search import Query
from pipelines import cli, options
from tests.corpora import pairs, write_tar

ROOT = Path(__file__).parents[2]
PAIRS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard, its table and its index; keys are 000000, 000001, … and a/b."""
    folder = tmp_path_factory.mktemp("search")
    members = pairs(PAIRS) + [(name.replace("000030", "a/b"), data) for name, data in pairs(1, start=30)]
    write_tar(folder / "shard.tar", members)
    embed = ["embed", "--input", str(folder / "shard.tar"), "--output", str(folder / "table"), "--model", "fusion-demo"]
    assert cli.main([*embed, "--quiet"]) == 0
    assert cli.main(["index", str(folder / "table"), "--output", str(folder / "index")]) == 0
    return folder


@pytest.fixture
def search(place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, list[Any], str]:
        capsys.readouterr()
        code = cli.main(["search", str(place / "index"), "--json", *arguments])
        said = capsys.readouterr()
        return code, [json.loads(line) for line in said.out.splitlines()], said.err

    return run


def test_defaults_are_those_of_a_query() -> None:
    args = options.build().parse_args(["search", "x"])
    for name in (
        "text",
        "image",
        "id",
        "key",
        "k",
        "image_weight",
        "by_rank",
        "by_score",
        "where",
        "collapse",
        "diversity",
    ):
        assert getattr(args, name) == getattr(Query(), name), name


def test_a_key_and_an_id_ask_for_more_like_a_row(search: Any) -> None:
    code, by_key, _ = search("--key", "000007", "-k", "4")
    assert code == 0 and len(by_key) == 4
    assert "000007" not in [row["key"] for row in by_key]
    assert search("--id", "7", "-k", "4")[1] == by_key


def test_where_collapse_and_diversity_reach_the_search(search: Any) -> None:
    _, rows, _ = search("--text", "a picture", "--where", "row >= 10 and key like '00001%'", "-k", "30")
    assert sorted(row["row"] for row in rows) == list(range(10, 20))
    (row,) = search("--text", "a picture", "--collapse", "0")[1][:1]
    assert row["rank"] == 1
    plain, diverse = (search("--id", "3", "-k", "8", "--diversity", share)[1] for share in ("0", "1"))
    assert [row["id"] for row in plain] != [row["id"] for row in diverse]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "nowhere"], "no row has the key 'nowhere'"),
        (["--text", "x", "--where", "widht > 3"], "no column 'widht'"),
        (["--text", "x", "--id", "3"], "not by id and text"),
        (["--text", "x", "--diversity", "2"], "diversity must lie between 0 and 1"),
        (["--image", "https://pictures.example/1.jpg"], "add --allow-url"),
        (["--image", "HTTP://pictures.example/1.jpg"], "add --allow-url"),
        (["--image", "ftp://pictures.example/1.jpg", "--allow-url"], "cannot read the image ftp:"),
        (["--image", "/dev/zero"], "at most 67,108,864 are read"),
        (["--queries", "FILE", "--text", "x"], "leave out --text"),
        (["--queries", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_impossible_searches_say_why(search: Any, arguments: list[str], message: str) -> None:
    code, rows, said = search(*arguments)
    assert (code, rows) == (2, [])
    assert message in said


def test_a_file_of_queries_is_answered_line_by_line(search: Any, place: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(pairs(1, start=4)[0][1])
    vector = Index.open(str(place / "index")).vectors([5])[0].tolist()
    lines: list[Any] = [
        "a picture of number 3",
        "",
        {"image": str(tmp_path / "picture.jpg"), "k": 1},
        {"vector": vector, "k": 1},
        {"text": "x", "where": "row < 2", "k": 5},
        {"key": "000009", "diversity": 0.3, "collapse": 0.99},
        {"text": "x", "kk": 3},
        {"text": "x", "k": "3"},
        {"image": "https://pictures.example/1.jpg"},
        {"id": 3, "k": 0},
        {"text": "a picture", "image": str(tmp_path / "picture.jpg"), "by_rank": True, "where": None},
        "{no object",
    ]
    asked = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode() + b"\n\xff\xfe\n"
    (tmp_path / "queries").write_bytes(asked)
    code, rows, said = search("--queries", str(tmp_path / "queries"), "-k", "3")
    assert code == 1 and "6 of 12 queries could not be answered" in said
    of: dict[int, list[Any]] = {number: [row for row in rows if row["query"] == number] for number in range(1, 14)}
    assert [len(of[number]) for number in of] == [3, 0, 1, 1, 2, 3, 1, 1, 1, 1, 3, 1, 1]
    alone = search("--text", "a picture of number 3", "-k", "3")[1]
    assert list(of[1][0]) == ["query", *alone[0]]
    # in bf16 a text's vector depends a little on how many are embedded with it
    assert [row["score"] for row in of[1]] == pytest.approx([row["score"] for row in alone], abs=0.01)
    assert (of[3][0]["key"], of[4][0]["id"]) == ("000004", 5)
    for number, message in ((7, "kk"), (8, "k"), (9, "--allow-url"), (10, "at least 1"), (12, "JSON"), (13, "utf-8")):
        assert list(of[number][0]) == ["query", "error"] and message in of[number][0]["error"]


def test_a_file_of_queries_may_begin_with_a_byte_order_mark(search: Any, tmp_path: Path) -> None:
    (tmp_path / "queries").write_text('{"id": 3}\n', "utf-8-sig")
    code, rows, _ = search("--queries", str(tmp_path / "queries"), "-k", "1")
    assert (code, rows[0]) == (0, {"query": 1, **search("--id", "3", "-k", "1")[1][0]})


def test_more_queries_than_go_together_keep_their_order(search: Any, tmp_path: Path) -> None:
    (tmp_path / "queries").write_text("".join(f'{{"id": {number % PAIRS}}}\n' for number in range(150)))
    code, rows, _ = search("--queries", str(tmp_path / "queries"), "-k", "1")
    assert code == 0 and [row["query"] for row in rows] == list(range(1, 151))
    assert rows[40]["id"] == rows[40 + 2 * PAIRS]["id"] == search("--id", "10", "-k", "1")[1][0]["id"]


def test_pictures_are_saved_as_they_are_in_their_shards(search: Any, place: Path, tmp_path: Path) -> None:
    code, rows, said = search("--text", "x", "-k", "31", "--save-images", str(tmp_path / "found"))
    assert code == 0 and "31 of 31 pictures" in said
    names = {f"{row['rank']:02d}-{row['key'].replace('/', '_')}.jpeg": row for row in rows}
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == sorted(names)
    tar = (place / "shard.tar").read_bytes()
    for name, row in names.items():
        assert (tmp_path / "found" / name).read_bytes() == tar[row["offset"] : row["offset"] + row["length"]]
    moved = place / "shard.tar"
    moved.rename(place / "away.tar")
    try:
        code, _, said = search("--id", "1", "-k", "2", "--save-images", str(tmp_path / "none"))
    finally:
        (place / "away.tar").rename(moved)
    assert code == 0 and said.count("no picture: ") == 2 and "0 of 2 pictures" in said


class _Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        picture = pairs(1, start=4)[0][1]
        redirections = {"/moved": "/picture.jpg", "/ftp": "ftp://127.0.0.1/x", "/file": "file:///etc/hostname"}
        if self.path in redirections:
            self.send_response(302)
            self.send_header("Location", redirections[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path == "/picture.jpg" else 404)
        self.end_headers()
        self.wfile.write(picture)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_fetched_by_leave(search: Any, web: str) -> None:
    for path in ("/picture.jpg", "/moved"):
        code, rows, _ = search("--image", web + path, "--allow-url", "-k", "1")
        assert (code, rows[0]["key"]) == (0, "000004")
    for path, message in (("/gone", "404"), ("/ftp", "ftp"), ("/file", "file")):
        code, rows, said = search("--image", web + path, "--allow-url")
        assert (code, rows) == (1, [])
        assert "cannot fetch" in said and message in said


def test_what_a_url_gives_is_bounded_in_size_and_time(web: str) -> None:
    size = len(pairs(1, start=4)[0][1])
    assert len(files.fetch_url(f"{web}/picture.jpg", size)) == size
    with pytest.raises(OSError, match=f"more than the {size - 1:,} bytes"):
        files.fetch_url(f"{web}/picture.jpg", size - 1)
    with pytest.raises(OSError, match=r"takes longer|timed out|in progress"):
        files.fetch_url(f"{web}/picture.jpg", size, timeout_seconds=1e-9)
    for url in ("file:///etc/hostname", "data:,x", "http://", "http://[x", "http://a:b/", "no url", "http://a\n/"):
        with pytest.raises(OSError, match="cannot fetch"):
            files.fetch_url(url, size)


def test_more_like_a_row_imports_no_model(place: Path) -> None:
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"assert main(['search', {str(place / 'index')!r}, '--key', '000003', '-k', '1']) == 0\n"
        "print(sorted({'torch', 'torchvision', 'open_clip', 'apache_beam', 'urllib.request'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert np.char.find(done.stdout, "a picture of number") >= 0
