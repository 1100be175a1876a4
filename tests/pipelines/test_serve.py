"""The API of `fusion serve`, asked over real sockets about a real index."""

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fusion_core import search, table
from fusion_core.demo import shards as demo_shards
from fusion_core.search import Query, Searcher
from pipelines import cli, guard, serve
from tests.corpora import HTML_CAPTION, photo, write_scene_index
from tests.pipelines.serving import Answer, Client, open_searcher, serving

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a secret of enough letters"
TEXT = "two large red stars"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_scene_index(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def searcher(place: str) -> Searcher:
    return open_searcher(place)


@pytest.fixture(scope="module")
def client(searcher: Searcher) -> Iterator[Client]:
    with serving(searcher) as client:
        yield client


@pytest.fixture(scope="module")
def rows(searcher: Searcher) -> list[dict[str, Any]]:
    return searcher.index.meta(range(searcher.index.record.rows_table)).to_pylist()


def row_of(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(row for row in rows if row["key"] == key)


def assert_told(answer: Answer, status: int, word: str = "") -> None:
    """A refusal says what, where and what to do, and nothing of our insides."""
    assert answer.status == status, answer.body
    told = answer.json
    assert set(told) == {"error", "where", "remedy"} and all(isinstance(v, str) and v for v in told.values())
    assert word in told["error"]
    assert not re.search(r"Traceback|File \"|\.py", answer.body.decode())


# --- searching


def test_text_gives_what_the_searcher_gives(client: Client, searcher: Searcher) -> None:
    (expected,) = searcher.answer([Query(text=TEXT, k=7)])
    answer = client.get("/search?text=two+large+red+stars&k=7")
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    results = answer.json["results"]
    assert [row["rank"] for row in results] == list(range(1, 8))
    for name in ("id", "key", "caption", "url", "width", "height", "shard", "row"):
        assert [row[name] for row in results] == expected[name].to_pylist()
    np.testing.assert_allclose([row["score"] for row in results], expected["score"].to_numpy(), atol=1e-5)
    assert client.post_json({"text": TEXT, "k": 7}).ids == answer.ids


def test_a_picture_finds_itself_and_a_weight_moves_the_answer(client: Client, rows: list[dict[str, Any]]) -> None:
    row = row_of(rows, "000000003")
    picture = search.fetch_image(row)
    (first,) = client.post_form(picture, k="1").json["results"]
    assert first["id"] == row["id"] and first["score"] > 0.99
    by_weight = [client.post_form(picture, text=TEXT, image_weight=str(w), k="5").ids for w in (0, 0.5, 1)]
    assert by_weight[0] == client.get("/search?text=two+large+red+stars&k=5").ids
    assert by_weight[2] == client.post_form(picture, k="5").ids
    assert by_weight[0] != by_weight[2]


def test_a_vector_and_a_row_find_their_nearest(client: Client, place: str) -> None:
    the_table = table.Table.open(str(Path(place).parent / "table"))
    vectors = np.concatenate([found.astype(np.float64) for _, found, _ in the_table.vectors("image_embedding")])
    scores = vectors @ vectors[5]
    nearest = np.argsort(-scores, kind="stable")
    assert client.post_json({"vector": vectors[5].tolist(), "k": 6}).ids == nearest[:6].tolist()
    similar = client.get("/similar/5?k=5").json["results"]
    assert [row["id"] for row in similar] == [id for id in nearest if id != 5][:5]
    assert [row["rank"] for row in similar] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("factor", [1e-60, 1e60])
def test_a_vectors_length_does_not_matter(client: Client, factor: float) -> None:
    vector = np.random.default_rng(0).normal(size=64)
    assert client.post_json({"vector": (factor * vector).tolist()}).ids == client.post_json({"vector": [*vector]}).ids


def test_a_search_by_row_refuses_what_it_does_not_know(client: Client) -> None:
    assert_told(client.get("/similar/1?k=3&wher=width+%3E+64"), 422, "wher")
    assert_told(client.get("/similar/1?text=x"), 422, "text")
    assert_told(client.get("/similar/1?k=1001"), 422, "at most 1,000")


def test_a_filter_holds_and_a_broken_one_says_so(client: Client) -> None:
    wide = client.get("/search?text=x&k=50&where=width+%3E+64")
    assert {row["width"] for row in wide.json["results"]} == {80, 90}
    assert client.get("/search?text=x&where=width+%3E+100000").json == {"results": []}
    assert_told(client.get("/search?text=x&where=((("), 422)
    assert client.get("/search?text=x&collapse=0.95&diversity=0.4").status == 200


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("", "needs a text"),
        ("text=", "empty"),
        ("text=x&k=0", "greater than or equal to 1"),
        ("text=x&k=1001", "at most 1,000"),
        ("text=x&k=" + "9" * 400, "k"),
        ("text=x&k=ten", "k"),
        ("text=x&kk=3", "kk"),
        ("text=x&image_weight=1.5", "image_weight"),
        ("text=x&image_weight=nan", "image_weight"),
        ("text=x&diversity=-1", "diversity"),
        ("text=" + "x" * 10_001, "10000"),
        ("key=no-such-key", "no-such-key"),
        ("id=-1", "id"),
        ("vector=1", "vector"),
    ],
)
def test_questions_that_cannot_be_answered(client: Client, query: str, word: str) -> None:
    assert_told(client.get(f"/search?{query}"), 422, word)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "no JSON"),
        (b'{"text": "\xff"}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", "no object"),
        (b'{"text": 3}', "text"),
        (b'{"text": "x", "image": "/etc/passwd"}', "image"),
        (b'{"text": "x", "k": 1e3000}', ""),
        (b'{"vector": [1, 2]}', "2"),
        (b'{"vector": [NaN]}', "no JSON"),
        (json.dumps({"vector": [1e38] * 64}).encode(), ""),
        (json.dumps({"vector": [0.0] * 64}).encode(), ""),
        (b"{}", "needs a text"),
    ],
)
def test_bodies_that_are_no_question(client: Client, body: bytes, word: str) -> None:
    answer = client.ask("POST", "/search", body, {"content-type": "application/json"})
    if answer.status == 200:  # a vector's length may be forgiven
        assert b"vector" in body and all(np.isfinite(row["score"]) for row in answer.json["results"])
    else:
        assert_told(answer, 422, word)


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (b"", ""),
        (b"no picture at all", "starts with"),
        (photo(1)[:900], ""),
        (demo_shards._bomb(Image.new("RGB", (1, 1))), "pixels"),
    ],
)
def test_pictures_that_are_none(client: Client, image: bytes, word: str) -> None:
    assert_told(client.post_form(image), 422, word)


def test_forms_and_types_that_are_not_taken(client: Client) -> None:
    assert_told(client.ask("POST", "/search", b"text=x", {"content-type": "application/x-www-form-urlencoded"}), 415)
    assert_told(client.ask("POST", "/search", b"{}"), 415)
    assert_told(client.ask("POST", "/search", b"--cut\r\n", {"content-type": "multipart/form-data"}), 400)
    text_as_image = b'--cut\r\nContent-Disposition: form-data; name="image"\r\n\r\nwords\r\n--cut--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=cut"}
    assert_told(client.ask("POST", "/search", text_as_image, kind), 422, "filename")
    assert_told(client.ask("DELETE", "/search"), 405)
    assert_told(client.get("/nowhere"), 404)


def test_a_head_is_answered_as_a_get_without_its_body(client: Client) -> None:
    for path in ("/", "/health", "/search?text=a+ring&k=3"):
        whole, head = client.get(path), client.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"") and whole.body
        assert head.headers["content-length"] == str(len(whole.body))
    assert client.ask("HEAD", "/nowhere").status == 404


@pytest.mark.parametrize("kind", ["Boundary=cut", 'boundary="cut;here"', 'charset=utf-8; boundary="cut here"'])
def test_a_boundary_may_be_written_in_any_way(client: Client, kind: str) -> None:
    boundary = kind.rpartition("=")[2].strip('"')
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="text"\r\n\r\nx\r\n--{boundary}--\r\n'
    assert client.ask("POST", "/search", body, {"content-type": f"multipart/form-data; {kind}"}).status == 200


# --- pictures


def test_a_picture_is_the_original_and_known_by_its_hash(client: Client, rows: list[dict[str, Any]]) -> None:
    for key, kind in (("000000001", "image/jpeg"), ("odd-clear", "image/png")):
        row = row_of(rows, key)
        answer = client.get(f"/image/{row['id']}")
        with open(row["shard"], "rb") as shard:
            shard.seek(row["offset"])
            assert answer.body == shard.read(row["length"])
        assert answer.headers["content-type"] == kind
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.body).hexdigest()}"'
        again = client.get(f"/image/{row['id']}", **{"if-none-match": answer.headers["etag"]})
        assert again.status == 304 and not again.body
        assert client.get(f"/image/{row['id']}?size=32", **{"if-none-match": answer.headers["etag"]}).status == 200


def test_a_small_copy_keeps_the_shape(client: Client, rows: list[dict[str, Any]]) -> None:
    row = row_of(rows, "odd-clear")
    answer = client.get(f"/image/{row['id']}?size=45")
    small = Image.open(io.BytesIO(answer.body))
    assert answer.headers["content-type"] == "image/jpeg" and small.format == "JPEG" and small.size == (45, 20)
    assert_told(client.get(f"/image/{row['id']}?size=100000"), 422, "size")


def test_pictures_that_are_not_there(client: Client, rows: list[dict[str, Any]]) -> None:
    wordy = row_of(rows, "odd-words")
    assert_told(client.get(f"/image/{wordy['id']}"), 404, "no image")
    assert_told(client.get(f"/image/{len(rows)}"), 404, str(len(rows)))
    assert_told(client.get(f"/similar/{len(rows)}"), 422, str(len(rows)))
    assert_told(client.get(f"/image/{10**30}"), 422)
    assert_told(client.get("/similar/" + "9" * 30), 422)
    results = client.get("/search?text=words+alone&k=50").json["results"]
    assert wordy["id"] not in [row["id"] for row in results] and all(row["image"] for row in results)


def test_a_shard_that_is_gone_is_told_without_its_insides(tmp_path: Path) -> None:
    searcher = open_searcher(write_scene_index(tmp_path, 4))
    with serving(searcher) as client:
        (tmp_path / "shards" / "00000.tar").unlink()
        assert_told(client.get("/image/0"), 502)
        assert client.get("/search?text=x&k=1").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/image/../../../../etc/passwd", "/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/image//etc/passwd", "/image/-1",
        "/image/1.5", "/image/0x1", "/image/1%00", "/image/", "/../pyproject.toml", "/page.js/../serve.py",
        "/page.js%2f..%2fserve.py", "/web/page.js", "//etc/passwd", "/image/1;/etc/passwd",
    ],
)  # fmt: skip
def test_no_path_comes_from_a_request(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status in (404, 422), answer.body[:200]
    assert set(answer.json) == {"error", "where", "remedy"} and b"root:" not in answer.body


# --- limits, batches, faults


class Slow(Searcher):
    """A searcher with something in its way."""

    seconds = 0.0

    def answer(self, queries: Sequence[Query]) -> list[Any]:
        time.sleep(self.seconds)
        if any(query.text == "boom" for query in queries):
            raise RuntimeError("secret insides")
        return super().answer(queries)


@pytest.fixture
def slow(searcher: Searcher) -> Slow:
    return Slow(open_searcher(searcher.index.place).index, searcher._towers)


def test_concurrent_queries_share_forwards_and_get_their_own_answers(slow: Slow, client: Client) -> None:
    slow.seconds = 0.1
    texts = [f"{number} {colour} {shape}" for number in ("one", "two") for colour in ("red", "blue", "green")
             for shape in ("star", "ring", "square", "cross")]  # fmt: skip
    paths = [f"/search?text={text.replace(' ', '+')}&k={k}" for k, text in enumerate(texts, 1)]
    with serving(slow, guard.Limits(batch=16)) as crowded, ThreadPoolExecutor(len(paths)) as pool:
        started = time.perf_counter()
        answers = list(pool.map(crowded.get, paths))
        seconds = time.perf_counter() - started
        metrics = crowded.get("/metrics").body.decode()
    for path, answer in zip(
        paths, answers, strict=True
    ):  # scores: a batch rounds otherwise, and equals may change places
        np.testing.assert_allclose(answer.scores, client.get(path).scores, atol=1e-5)
    calls, queries = (
        float(re.search(rf"^fusion_batch_queries_{what} (\S+)", metrics, re.M)[1]) for what in ("count", "sum")
    )  # type: ignore[index]
    assert queries == len(paths) and 2 <= calls <= 8
    assert seconds < 0.1 * len(paths) / 2


def test_a_request_that_takes_too_long_gets_an_answer(slow: Slow) -> None:
    slow.seconds = 1.0
    with serving(slow, guard.Limits(seconds=0.2)) as client:
        answer = client.get("/search?text=x")
        assert_told(answer, 503, "0.2 seconds")
        assert answer.headers["retry-after"] == "1"
        assert client.get("/health").status == 200  # the event loop is free


def test_a_body_that_comes_too_slowly_is_given_up(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(seconds=0.2)) as client:
        assert_told(answer_on(raw(client, HALF + b"{")), 408, "0.2 seconds")


def raw(client: Client, data: bytes = b"") -> socket.socket:
    """A connection on which some bytes were sent."""
    host, _, port = client.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def answer_on(connection: socket.socket) -> Answer:
    import http.client

    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


HALF = (b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 90000\r\n\r\n")  # fmt: skip


def test_a_head_that_does_not_come_is_not_waited_for(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(seconds=0.3)) as client:
        with raw(client) as silent:
            assert silent.recv(100) == b""
        assert_told(answer_on(raw(client, b"GET /health HTTP/1.1\r\nHost: local")), 408, "0.3 seconds")


def test_clients_that_are_still_sending_keep_nobody_waiting(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(waiting=2)) as client:
        slow = [raw(client, HALF + b"{") for _ in range(6)]
        assert client.get("/search?text=x&k=1").status == 200
        for connection in slow:
            connection.close()


def test_the_longest_waiting_connection_makes_room(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(connections=3, seconds=30)) as client:
        slow = []
        for _ in range(3):
            slow.append(raw(client, HALF))
            time.sleep(0.05)
        assert client.get("/search?text=x&k=1").status == 200
        with suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""
        slow[2].sendall(b'{"text":"x","k":1}'.ljust(90000))
        assert answer_on(slow[2]).status == 200
        slow[0].close()
        slow[1].close()


def test_bodies_that_wait_have_a_limit_together(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(held_bytes=100_000)) as client:
        first = raw(client, HALF + b'{"text":"x","k":1}'.ljust(80_000))
        time.sleep(0.2)
        assert_told(answer_on(raw(client, HALF + b" " * 80_000)), 503, "memory")
        first.sendall(b" " * 10_000)
        assert answer_on(first).status == 200
        assert client.post_json({"text": "x", "k": 1}).status == 200  # both are forgotten


def test_who_does_not_take_the_answers_loses_the_connection(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(seconds=0.3)) as client, raw(client) as deaf:
        asked = 3000
        with suppress(OSError):
            deaf.settimeout(1)
            for _ in range(asked):
                deaf.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(2.5)
        taken = 0
        deaf.settimeout(5)
        with suppress(ConnectionResetError):
            while piece := deaf.recv(1 << 16):
                taken += len(piece)
        assert taken < asked * len(client.get("/page.js").body)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["TLS", "a broken chunk"],
)
def test_what_is_not_http_is_told_so(client: Client, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert_told(answer_on(raw(client, data)), 400, "HTTP")
    assert not caplog.records


def test_a_head_that_is_too_long_is_told_so(client: Client) -> None:
    text = urllib.parse.quote("一" * 9_000)
    assert_told(answer_on(raw(client, f"GET /search?text={text} HTTP/1.1\r\n".encode())), 431, "too long")
    assert client.post_json({"text": "一" * 9_000}).status == 200


def test_a_form_that_was_cut_is_not_half_a_question(client: Client) -> None:
    body = b'--cut\r\nContent-Disposition: form-data; name="text"\r\n\r\nx\r\n--cut\r\nContent-Disposition: form-data'
    kind = {"content-type": "multipart/form-data; boundary=cut"}
    assert_told(client.ask("POST", "/search", body, kind), 400, "last boundary")


def test_who_goes_while_sending_is_no_fault_of_ours(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    raw(client, HALF + b"{").close()
    for _ in range(50):
        told = client.get("/metrics").body.decode()
        if 'status="499"' in told:
            break
        time.sleep(0.05)
    assert 'status="499"' in told and not caplog.records


def test_more_requests_than_may_wait_are_sent_away(slow: Slow) -> None:
    slow.seconds = 0.5
    with serving(slow, guard.Limits(waiting=2)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.get, ["/search?text=x&k=1"] * 8))
        assert client.get("/search?text=x").status == 200
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) == 6
    for answer in refused:
        assert_told(answer, 503)
        assert answer.headers["retry-after"] == "1"


def test_a_query_that_breaks_fails_alone(slow: Slow, caplog: pytest.LogCaptureFixture) -> None:
    slow.seconds = 0.1
    with serving(slow) as client, ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(client.get, [f"/search?text={text}" for text in ("a", "b", "boom", "c", "d")]))
    assert [answer.status for answer in answers] == [200, 200, 500, 200, 200]
    assert_told(answers[2], 500)
    assert b"secret" not in answers[2].body


def test_bodies_that_are_too_large_are_refused_stated_or_not(searcher: Searcher) -> None:
    with serving(searcher, guard.Limits(body_bytes=50_000)) as client:
        assert client.post_form(photo(1)).status == 200
        assert_told(client.post_form(bytes(60_000)), 413, "50,000")
        head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        chunks = (head + bytes(10_000) if i == 0 else bytes(10_000) for i in range(10))
        kind = {"content-type": "multipart/form-data; boundary=cut"}
        assert_told(client.ask("POST", "/search", chunks, kind, encode_chunked=True), 413, "50,000")
    with serving(searcher) as client:
        assert_told(client.post_json({"text": "x" * (1 << 20)}), 413, "JSON")


# --- who may ask


def test_with_a_token_nothing_is_told_without_it(searcher: Searcher) -> None:
    right = {"Authorization": f"Bearer {TOKEN}"}
    with serving(searcher, token=TOKEN) as client:
        for path in ("/search?text=x", "/similar/1", "/image/1", "/metrics", "/openapi.json", "/nowhere"):
            for word in ("", f"Bearer {TOKEN}x", TOKEN, "Bearer \xe9", f"Basic {TOKEN}"):
                given = {"Authorization": word, "Cookie": "fusion_session=x"}
                answer = client.get(path, **given)
                assert_told(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/search?text=x", **right).status == 200
        assert client.get("/health").json == {"ready": True}
        assert client.get("/health", **right).json["rows"] == 43
        assert client.get("/").status == client.get("/page.js").status == 200
        assert client.get("/search?text=x", Host="anything.example", **right).status == 200


def test_a_token_of_any_letters_is_known(searcher: Searcher) -> None:
    token = "déjà vu et encore à"  # its last byte in UTF-8 is a space in Latin-1
    with serving(searcher, token=token) as client:
        assert client.get("/metrics", Authorization=f"Bearer {token}".encode().decode("latin-1")).status == 200


def test_a_login_gives_a_cookie_that_does_not_tell_the_token(searcher: Searcher) -> None:
    kind = {"content-type": "application/json"}
    with serving(searcher, token=TOKEN) as client:
        assert_told(client.ask("POST", "/login", json.dumps({"token": "wrong"}), kind), 401, "wrong")
        assert_told(client.ask("POST", "/login", "{", kind), 422)
        answer = client.ask("POST", "/login", json.dumps({"token": TOKEN}), kind)
        assert answer.status == 204
        cookie, *flags = answer.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict"} <= set(flags) and TOKEN not in cookie
        assert client.get("/image/1", Cookie=f"a=b; {cookie}").status == 200


def test_a_local_server_answers_to_its_own_names_only(client: Client) -> None:
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/health", Host=host).status == 200
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "", "[::2]"):
        assert_told(client.get("/search?text=x", Host=host), 403)


def test_every_answer_is_guarded_and_the_page_stands_alone(client: Client) -> None:
    for path in ("/", "/search?text=x", "/image/1", "/nowhere", "/search?k=0"):
        headers = client.get(path).headers
        assert (
            headers["x-content-type-options"] == "nosniff"
            and "default-src 'none'" in headers["content-security-policy"]
        )
        assert "unsafe" not in headers["content-security-policy"] and "server" not in headers
    page = "".join(client.get(path).body.decode() for path in ("/", "/page.css", "/page.js", "/icon.svg"))
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9.-]+\.[a-z]{2,}", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert_told(client.get("/docs"), 404)  # its scripts would come from elsewhere


def test_the_description_names_every_route_and_what_it_takes(client: Client) -> None:
    described = client.get("/openapi.json").json
    assert set(described["paths"]) == {"/search", "/similar/{id}", "/image/{id}", "/health", "/metrics", "/login"}
    named = {parameter["name"] for parameter in described["paths"]["/search"]["get"]["parameters"]}
    assert named == set(serve.Ask.model_fields)
    bodies = described["paths"]["/search"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data"}


def test_answers_are_as_described(client: Client) -> None:
    described = client.get("/openapi.json").json
    form = {"content-type": "multipart/form-data; boundary=cut"}
    for route, method, path, body, headers in (
        ("/search", "get", "/search?text=x", None, {}),
        ("/search", "get", "/search?k=0", None, {}),
        ("/search", "get", "/search?text=x", None, {"Host": "evil.example"}),
        ("/search", "post", "/search", "{}", {}),
        ("/search", "post", "/search", "--cut", form),
        ("/similar/{id}", "get", "/similar/1", None, {}),
        ("/image/{id}", "get", "/image/9999", None, {}),
        ("/login", "post", "/login", "{}", {}),
    ):
        answer = client.ask(method.upper(), path, body, headers)
        told = described["paths"][route][method]["responses"][str(answer.status)]
        name = told["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert set(answer.json) == set(described["components"]["schemas"][name]["required"])


def test_what_is_served_and_how_it_does_can_be_read(client: Client, place: str) -> None:
    health = client.get("/health").json
    assert health["ready"] and health["index"] == place and health["model"] == "fusion-demo"
    assert (health["rows"], health["rows_table"], health["column"]) == (43, 44, "image_embedding")
    assert health["examples"] and HTML_CAPTION not in health["examples"]
    client.ask("BREW", "/search")
    client.get("/search?text=x&k=0")
    told = client.get("/metrics").body.decode()
    for line in (
        r'fusion_requests_total\{method="GET",route="/search",status="422"\} \d',
        r'fusion_requests_total\{method="other",route="/search",status="405"\} \d',
        r'fusion_request_seconds_count\{route="/image/\{id\}"\} \d',
        r"fusion_batch_queries_sum [1-9]",
        r"fusion_answer_seconds_count [1-9]",
        r"fusion_faiss_seconds_count [1-9]",
    ):
        assert re.search(line, told), line


# --- the command


def test_the_command_serves_until_it_is_interrupted(place: str) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "serve", place, "--port", "0", "--max-k", "5"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(60, process.kill)
        killer.start()
        line = process.stdout.readline() if process.stdout else ""
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url, process.communicate()
        client = Client(url[0])
        assert len(client.get("/search?text=a+star&k=5").ids) == 5
        assert_told(client.get("/search?text=a+star&k=6"), 422, "at most 5")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        killer.cancel()
    assert (process.returncode, out, err) == (0, "", "")


def test_servers_that_cannot_be_started_say_why(
    place: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FUSION_TOKEN", raising=False)
    taken = client.url.rpartition(":")[2]
    for options, word in (
        ([place, "--host", "0.0.0.0"], "FUSION_TOKEN"),
        ([place, "--host", "0.0.0.0", "--token", "short"], "at least 16"),
        ([place, "--port", "0", "--token", f"{TOKEN}\n"], "white space"),
        ([place, "--host", "nowhere.invalid"], "nowhere.invalid"),
        ([place, "--port", taken], "choose another --port"),
        ([place, "--port", "99999"], "99999"),
        ([str(tmp_path), "--port", "0"], str(tmp_path)),
    ):
        assert cli.main(["serve", *options]) == 2, options
        assert word in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "uvicorn", None)
        without.delitem(sys.modules, "pipelines.serve")
        without.delattr("pipelines.serve")
        assert cli.main(["serve", place]) == 2
    assert "fusion-features[serve]" in capsys.readouterr().err


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TOKEN", "short")
    assert os.environ["FUSION_TOKEN"] == "short"
    assert cli.main(["serve", "/nowhere", "--port", "0"]) == 2


def test_small_answers_are_not_held_back(client: Client) -> None:
    import http.client

    connection = http.client.HTTPConnection(client.url.removeprefix("http://"))
    taken = []
    for _ in range(12):
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        taken.append(time.perf_counter() - started)
    connection.close()
    assert min(taken[2:]) < 0.02, "Nagle's algorithm waits 40 ms for every answer on a standing connection"


def test_any_address_is_bound_with_a_token() -> None:
    listening, hosts = serve.bind("0.0.0.0", 0, TOKEN)
    listening.close()
    assert hosts == []
    listening, hosts = serve.bind("localhost", 0, "")
    listening.close()
    assert "localhost" in hosts
