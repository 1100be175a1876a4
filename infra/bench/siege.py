"""`fusion serve` under siege: right answers, reasons for refusals, and no growth, while clients do their worst.

    python -m infra.bench.siege [--minutes 10] [--quick]

A real server is asked, as fast as it answers, by clients whose every answer is compared with one that was made alone,
through the library; by clients that send broken, oversized or aborted requests; and by a crowd of slow ones, more than
may wait: heads and bodies a byte a second, connections without a word, readers that do not read. In the end it is
told to stop, in the middle of all this. The exit code is 1 where an answer was wrong, an error came without its
reason, a status was not one that the request may get, memory grew, or the stop was not graceful.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np

from fusion_core import images, index, search, towers
from infra.bench import measure, serve

PRECISION = "fp32"  # bf16 rounds by 1e-3, otherwise in each size of batch
TOLERANCE = 1e-5  # of a score: a batch rounds otherwise than a query alone, and equals may change places
JSON_KIND = "Content-Type: application/json"
FORM_KIND = "Content-Type: multipart/form-data; boundary=cut"
COLUMNS = ("requests", "number", "outcomes")
MAX_BODY_BYTES = 2_000_000
CLOSED = 0  # instead of a status: the server ended the connection without an answer


@dataclass(frozen=True)
class Size:
    """Of a siege."""

    rows: int
    clients: int
    hostile: int
    slow: dict[str, int]
    burst: int
    timeout_seconds: float


FULL = Size(3000, 24, 4, {"slow head": 60, "slow body": 160, "silent": 30, "no reader": 30}, 200, 10)
QUICK = Size(300, 8, 3, {"slow head": 5, "slow body": 140, "silent": 5, "no reader": 5}, 150, 2)


@dataclass(frozen=True)
class Question:
    """A request and what is wrong with an answer to it ("" where nothing is)."""

    kind: str
    request: bytes
    wrong: Callable[[bytes], str]


@dataclass
class Tally:
    """What happened so far."""

    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)  # seconds, RSS, descriptors, threads
    ending: bool = False
    stalls: list[tuple[float, float]] = field(default_factory=list)  # when, and for how long, we ourselves stood still
    after_signal: Counter[str] = field(default_factory=Counter)

    def answered(self, kind: str, status: int, body: bytes, allowed: Sequence[int]) -> None:
        """Counts an outcome, and notes what it should not be."""
        if not self.ending:
            self.outcomes[kind, status] += 1
        stalled = status == CLOSED and self.stalls and time.monotonic() - self.stalls[-1][0] < 15
        if status not in allowed and not (self.ending or stalled):
            self.problems.append(f"{kind}: {status or 'closed'} {body[:200]!r}")
        if status >= 400 and not _has_reason(body):
            self.problems.append(f"{kind}: {status} without a reason: {body[:200]!r}")


def _has_reason(body: bytes) -> bool:
    with suppress(ValueError):
        told = json.loads(body)
        return isinstance(told, dict) and all(told.get(name) for name in ("error", "where", "remedy"))
    return False


# --- what is asked, and what is right


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A request's bytes."""
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, *length, "", ""]).encode() + body


def form(image: bytes | None = None, **fields: str) -> bytes:
    """A multipart body."""
    parts = [f'--cut\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    if image is not None:
        head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n'
        parts.append(head + image + b"\r\n")
    return b"".join(parts) + b"--cut--\r\n"


def compared(expected: Sequence[tuple[int, float]]) -> Callable[[bytes], str]:
    """What is wrong with an answer where ids and scores, the best first, should be these, but for rounding."""
    known = dict(expected)

    def wrong(body: bytes) -> str:
        found = [(row["id"], row["score"]) for row in json.loads(body)["results"]]
        if len(found) != len(expected) or len({id for id, _ in found}) != len(found):
            return f"{len(found)} results, not {len(expected)}"
        for (id, score), (_, right) in zip(found, expected, strict=True):
            if abs(score - right) > TOLERANCE or abs(known.get(id, expected[-1][1]) - score) > TOLERANCE:
                return f"id {id} with {score}: {found} is not {expected}"
        return ""

    return wrong


def same(expected: bytes) -> Callable[[bytes], str]:
    """What is wrong with an answer that should be these bytes."""
    digest = hashlib.sha256(expected).digest()
    return lambda body: "" if hashlib.sha256(body).digest() == digest else f"{len(body)} other bytes"


def questions(place: str) -> list[Question]:
    """Some of every kind, with what the library answers to each alone."""
    searcher = search.Searcher(index.Index.open(place), towers.load(towers.DEMO, device="cpu", precision=PRECISION))
    chance, total = random.Random(1), searcher.index.record.rows_table

    def answer(query: search.Query) -> Callable[[bytes], str]:
        (found,) = searcher.answer([query])
        assert not isinstance(found, search.BadQuery), found
        return compared(list(zip(found["id"].to_pylist(), found["score"].to_pylist(), strict=True)))

    def posted(fields: dict[str, object]) -> bytes:
        return http("POST", "/search", json.dumps(fields).encode(), JSON_KIND)

    asked = [
        Question("text", http("GET", f"/search?k=10&text={quote(text)}"), answer(search.Query(text, k=10)))
        for text in serve.TEXTS
    ]
    for text in chance.sample(serve.TEXTS, 8):
        where = "width >= 64"
        query = search.Query(text, k=20, where=where)
        asked.append(Question("JSON", posted({"text": text, "k": 20, "where": where}), answer(query)))
    for row in searcher.index.meta(chance.sample(range(total), 16)).to_pylist():
        picture, id, text = search.fetch_image(row), row["id"], chance.choice(serve.TEXTS)
        small = images.thumbnail(picture, 64, searcher.index.record.table_spec.input.max_pixels)
        both = form(picture, text=text, k="10", image_weight="0.3")
        asked += [
            Question("image", http("POST", "/search", form(picture, k="10"), FORM_KIND),
                     answer(search.Query(image=picture, k=10))),
            Question("image and text", http("POST", "/search", both, FORM_KIND),
                     answer(search.Query(text, image=picture, k=10, image_weight=0.3))),
            Question("similar", http("GET", f"/similar/{id}?k=10"), answer(search.Query(id=id, k=10))),
            Question("/image", http("GET", f"/image/{id}"), same(picture)),
            Question("/image?size", http("GET", f"/image/{id}?size=64"), same(small)),
        ]  # fmt: skip
    page = Path(serve.__file__).parents[2] / "pipelines" / "web" / "page.html"
    ready = re.compile(rb'^{"ready":true')
    for _ in range(4):
        asked += [
            Question("page", http("GET", "/"), same(page.read_bytes())),
            Question("/health", http("GET", "/health"), lambda body: "" if ready.match(body) else "not ready"),
            Question("/metrics", http("GET", "/metrics"), lambda body: "" if b"fusion_requests" in body else "none"),
        ]
    return asked


# --- clients


@dataclass(frozen=True)
class Siege:
    """One server, what it is asked and what came of it."""

    port: int
    asked: Sequence[Question]
    size: Size
    tally: Tally
    chance: random.Random

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def told(self, request: bytes) -> tuple[int, bytes]:
        """The answer to bytes on a connection of their own; CLOSED where none comes."""
        try:
            async with self.connected() as (reader, writer):
                with suppress(OSError):  # refused while we were still sending
                    writer.write(request)
                    await writer.drain()
                return await answer_of(reader)
        except OSError:
            return CLOSED, b""

    async def client(self) -> None:
        """Asks one question after the other, on connections that stay for some of them."""
        while True:
            try:
                async with self.connected() as (reader, writer):
                    for question in self.chance.choices(self.asked, k=self.chance.randrange(1, 60)):
                        await self.ask(question, reader, writer)
            except OSError:
                if self.tally.ending:
                    self.tally.after_signal["refused"] += 1
                await asyncio.sleep(0.2)

    async def ask(self, question: Question, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question, whose answer is compared."""
        started = time.perf_counter()
        writer.write(question.request)
        status, body = await answer_of(reader)
        self.tally.milliseconds.append(1e3 * (time.perf_counter() - started))
        if self.tally.ending:
            self.tally.after_signal["answered" if status else "closed, unread"] += 1
        if status == CLOSED:
            if not self.tally.ending:
                self.tally.answered(question.kind, CLOSED, b"", [200])
            raise ConnectionResetError("closed")
        self.check(question, status, body)

    def check(self, question: Question, status: int, body: bytes) -> None:
        """Counts an answer that came."""
        self.tally.answered(question.kind, status, body, [200, 503])
        if status == 200 and (wrong := question.wrong(body)):
            self.tally.problems.append(f"{question.kind}: a wrong answer: {wrong[:500]}")

    async def bursts(self) -> None:
        """Now and then more at once than may wait: each gets its answer or a 503."""
        while True:
            await asyncio.sleep(10 * self.chance.random())
            picked = self.chance.choices([one for one in self.asked if one.kind == "text"], k=self.size.burst)
            for question, (status, body) in zip(
                picked, await asyncio.gather(*(self.told(one.request) for one in picked)), strict=True
            ):
                if not self.tally.ending:
                    self.check(Question("a burst of texts", question.request, question.wrong), status, body)

    async def hostile(self) -> None:
        """Sends what nobody should, one after the other."""
        kinds = list(_HOSTILE.items())
        while True:
            kind, (request, allowed) = self.chance.choice(kinds)
            status, body = await self.told(request(self.chance))
            self.tally.answered(kind, status, body, (*allowed, 503))  # 503: in a burst
            await asyncio.sleep(0.2 * self.tally.ending)
            await self.aborted(self.chance.choice(self.asked))
            await self.pipelined()

    async def aborted(self, question: Question) -> None:
        """Goes with a reset: in the middle of the request, or before its answer."""
        with suppress(OSError):
            async with self.connected() as (_, writer):
                whole = self.chance.random() < 0.5
                writer.write(question.request if whole else question.request[: len(question.request) // 2])
                await asyncio.sleep(self.chance.random() / 50)
                found: socket.socket = writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.tally.outcomes["reset before the answer" if whole else "reset in the request", CLOSED] += 1

    async def pipelined(self) -> None:
        """Some questions at once on one connection: their answers come in order."""
        with suppress(OSError):
            async with self.connected() as (reader, writer):
                picked = self.chance.choices(self.asked, k=4)
                writer.write(b"".join(question.request for question in picked))
                for question in picked:
                    status, body = await answer_of(reader)
                    if status == CLOSED and self.tally.ending:
                        return
                    self.check(Question("pipelined", question.request, question.wrong), status, body)

    async def slow(self, kind: str) -> None:
        """One slow client after the other."""
        sent, allowed = _SLOW[kind]
        while True:
            await asyncio.sleep(self.size.timeout_seconds * self.chance.random())
            try:
                async with self.connected() as (reader, writer):
                    status, body = await self.dawdle(kind, sent, reader, writer)
                self.tally.answered(kind, status, body, allowed)
            except OSError:
                self.tally.outcomes[kind, CLOSED] += 1

    async def dawdle(
        self, kind: str, sent: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[int, bytes]:
        """What comes of a request that comes slowly, or of an answer that is not taken."""
        if kind == "no reader":
            found: socket.socket = writer.get_extra_info("socket")
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            picture = next(one for one in self.asked if one.kind == "page")
            writer.write(picture.request * 500)
            await asyncio.sleep(2.5 * self.size.timeout_seconds)
            return CLOSED, b""
        answer = asyncio.create_task(answer_of(reader))
        writer.write(sent)
        while not (await asyncio.wait([answer], timeout=1))[0]:
            with suppress(OSError):
                writer.write(b"x" if kind != "silent" else b"")
        return answer.result()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body; CLOSED where the connection ended before, and an OSError where it ended within."""
    head = b""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        return int(head[9:12]), await reader.readexactly(int(length[1]) if length else 0)
    except asyncio.IncompleteReadError as error:
        if head or error.partial:
            raise ConnectionAbortedError("an answer was cut") from error
    except ConnectionResetError:
        if head:
            raise
    return CLOSED, b""


Made = Callable[[random.Random], bytes]


def _random_json(chance: random.Random) -> bytes:
    body = chance.choice([b"{", b'{"text": "\xff"}', b"[" * 50_000, b"[1]", b'{"text": 3}', b'{"k": 1e3000}', b"\x00"])
    return http("POST", "/search", body, JSON_KIND)


def _random_form(chance: random.Random) -> bytes:
    whole = form(bytes(chance.randbytes(3000)), k="3", text="x")
    cut = whole[: chance.randrange(2, len(whole))]
    body = chance.choice([cut, b"--cut\r\n\r\n", b"--cut--\r\n", b"no form at all", whole.replace(b"cut", b"cat")])
    return http("POST", "/search", body, FORM_KIND)


def _random_picture(chance: random.Random) -> bytes:
    start = chance.choice(
        [b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x00\x01\x00\x00WEBP", b""]
    )
    return http("POST", "/search", form(start + chance.randbytes(chance.randrange(20_000))), FORM_KIND)


def _too_large(_: random.Random) -> bytes:
    return http("POST", "/search", form(bytes(MAX_BODY_BYTES + 1)), FORM_KIND)


def _too_large_in_chunks(_: random.Random) -> bytes:
    chunk, start = b"10000\r\n" + bytes(65536) + b"\r\n", form(b"")[:-11]
    first = f"{len(start):x}\r\n".encode() + start + b"\r\n"
    return http("POST", "/search", b"", FORM_KIND, "Transfer-Encoding: chunked") + first + chunk * 40 + b"0\r\n\r\n"


def _too_large_json(_: random.Random) -> bytes:
    return http("POST", "/search", json.dumps({"text": "x" * (1 << 20)}).encode(), JSON_KIND)


def _broken_chunk(_: random.Random) -> bytes:
    return http("POST", "/search", b"", JSON_KIND, "Transfer-Encoding: chunked") + b"zz\r\nno chunk\r\n"


def _no_http(chance: random.Random) -> bytes:
    return chance.choice(
        [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"hello\r\n\r\n", b"GET /\r\n\r\n", b"\x00" * 100 + b"\n"]
    )


def _wrong_method(chance: random.Random) -> bytes:
    return http(chance.choice(["DELETE", "PUT", "PATCH", "BREW"]), "/search")


def _no_such_path(chance: random.Random) -> bytes:
    return http("GET", chance.choice(["/nowhere", "/image/../../etc/passwd", "/image/99999999", "/page.js/.."]))


_HOSTILE: dict[str, tuple[Made, tuple[int, ...]]] = {
    "invalid JSON": (_random_json, (422,)),
    "a broken form": (_random_form, (400, 422)),
    "a broken picture": (_random_picture, (422,)),
    "a body too large": (_too_large, (413, CLOSED)),  # closed: a reset overtakes what was answered
    "a body too large, in chunks": (_too_large_in_chunks, (413, CLOSED)),
    "JSON too large": (_too_large_json, (413, CLOSED)),
    "a broken chunk": (_broken_chunk, (400,)),
    "no HTTP": (_no_http, (400,)),
    "a head too large": (lambda _: b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, (431, CLOSED)),
    "a wrong method": (_wrong_method, (405,)),
    "no such path": (_no_such_path, (404, 422)),
    "another host": (lambda _: b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,)),
    "an upgrade": (lambda _: http("GET", "/health", b"", "Connection: Upgrade", "Upgrade: websocket"), (200,)),
    "k too large": (lambda _: http("GET", "/search?text=x&k=100000"), (422,)),
}
_SLOW: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "slow head": (b"GET /search?text=a HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", (408, CLOSED)),
    "slow body": (http("POST", "/search", b"", JSON_KIND, "Content-Length: 5000"), (408, 503, CLOSED)),
    "silent": (b"", (CLOSED,)),
    "no reader": (b"", (CLOSED,)),
}


# --- the server, watched


def sample(pid: int) -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of a process."""
    told = dict(re.findall(r"^(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return int(told["VmRSS"]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(told["Threads"])


async def watch(pid: int, tally: Tally) -> None:
    """A sample each second."""
    started = time.monotonic()
    while True:
        with suppress(OSError, KeyError):  # it has ended
            tally.samples.append((time.monotonic() - started, *sample(pid)))
        before = time.monotonic()
        await asyncio.sleep(1)
        if (late := time.monotonic() - before - 1) > 2:
            tally.stalls.append((time.monotonic(), late))


def growth(samples: Sequence[tuple[float, int, int, int]]) -> dict[str, float]:
    """Of resident memory after the first third: MB a minute with its standard error (of the residuals, in blocks of 20
    s, as neighbours resemble each other), and means of the first and last quarter of what is looked at.
    """
    kept = samples[len(samples) // 3 :]
    blocks = [kept[i : i + 20] for i in range(0, len(kept), 20)]
    blocks = [block for block in blocks if len(block) >= 10] if len(blocks) > 3 else [[one] for one in kept]
    at = np.array([statistics.mean(one[0] for one in block) / 60 for block in blocks])
    megabytes = np.array([statistics.mean(one[1] for one in block) / 1e6 for block in blocks])
    slope, start = np.polyfit(at, megabytes, 1)
    left = megabytes - (slope * at + start)
    error = float(np.sqrt(left @ left / max(1, len(at) - 2) / max(1e-9, ((at - at.mean()) ** 2).sum())))
    quarter = max(1, len(kept) // 4)
    first, last = (statistics.mean(one[1] for one in part) / 1e6 for part in (kept[:quarter], kept[-quarter:]))
    return {"mb_per_minute": float(slope), "error": error, "first_quarter_mb": first, "last_quarter_mb": last,
            "peak_mb": max(one[1] for one in samples) / 1e6}  # fmt: skip


async def stop(siege: Siege, server: subprocess.Popen[str]) -> dict[str, object]:
    """Tells the server to end while everybody goes on: what is in progress is answered, what is new is refused."""
    halves = []
    for question in [one for one in siege.asked if one.kind == "image and text"][:8]:
        reader, writer = await asyncio.open_connection("127.0.0.1", siege.port)
        writer.write(question.request[:-100])
        halves.append((question, reader, writer))
    await asyncio.sleep(0.05 * siege.size.timeout_seconds)
    siege.tally.ending = True
    started = time.monotonic()
    server.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.25)
    right = 0
    for question, reader, writer in halves:
        writer.write(question.request[-100:])
        status, body = await answer_of(reader)
        right += status == 200 and not question.wrong(body)
        writer.close()
    is_refused = False
    try:
        await asyncio.open_connection("127.0.0.1", siege.port)
    except OSError:
        is_refused = True
    try:
        await asyncio.to_thread(server.wait, 60)
    except subprocess.TimeoutExpired:
        siege.tally.problems.append("the server did not end within 60 s")
    seconds, limit = time.monotonic() - started, 2 * siege.size.timeout_seconds + 10
    if right < len(halves) or not is_refused or server.returncode or seconds > limit:
        siege.tally.problems.append(
            f"no graceful stop: {right} of {len(halves)} requests in progress answered, new ones "
            f"{'refused' if is_refused else 'taken'}, exit code {server.returncode}, {seconds:.1f} s"
        )
    return {"in_progress_answered": right, "of": len(halves), "exit_code": server.returncode, "seconds": seconds,
            "others": dict(siege.tally.after_signal)}  # fmt: skip


async def besiege(siege: Siege, server: subprocess.Popen[str], seconds: float) -> dict[str, object]:
    """All clients for some time, then the stop."""
    size = siege.size
    works: list[Awaitable[None]] = [watch(server.pid, siege.tally), siege.bursts()]
    works += [siege.client() for _ in range(size.clients)] + [siege.hostile() for _ in range(size.hostile)]
    works += [siege.slow(kind) for kind, number in size.slow.items() for _ in range(number)]
    tasks = [asyncio.ensure_future(work) for work in works]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        siege.tally.problems.append(f"a client gave up: {task.exception()!r}")
    stopped = await stop(siege, server)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return stopped


def run(place: str, size: Size, seconds: float, seed: int) -> tuple[Tally, dict[str, object]]:
    """The siege of a server that is started for it."""
    asked = questions(place)
    command = [
        sys.executable, "-m", "pipelines.cli", "serve", place, "--port", "0", "--device", "cpu",
        "--max-body-bytes", str(MAX_BODY_BYTES), "--timeout", str(size.timeout_seconds),
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            found = re.search(r":(\d+) \(", server.stdout.readline() if server.stdout else "")
            if found is None:
                raise SystemExit("the server did not start")
            siege = Siege(int(found[1]), asked, size, Tally(), random.Random(seed))
            stopped = asyncio.run(besiege(siege, server, seconds))
        finally:
            server.kill()
        log.seek(0)
        said = log.read()
    if "Traceback" in said or len(said) > 10_000:
        siege.tally.problems.append(f"{len(said):,} characters on stderr: {said[:3000]}")
    return siege.tally, stopped | {"stderr_characters": len(said)}


def main() -> int:
    """One siege, told as a table."""
    parser = measure.arguments("siege", __doc__, repeats=1)
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    place = serve.scenes(args.cache / f"siege-{size.rows}", size.rows, PRECISION)
    load = measure.Load()
    tally, stopped = run(place, size, 60 * args.minutes, args.seed)
    memory = growth(tally.samples)
    if memory["mb_per_minute"] > 1 + 3 * memory["error"] and args.minutes >= 5:
        tally.problems.append(f"memory grows: {memory}")
    kinds = sorted({kind for kind, _ in tally.outcomes})
    rows = []
    for kind in kinds:
        found = {status: n for (one, status), n in sorted(tally.outcomes.items()) if one == kind}
        outcomes = ", ".join(f"{n:,} × {status or 'closed'}" for status, n in found.items())
        rows.append([kind, float(sum(found.values())), outcomes])
    _, first, last = [np.array([one[i] for one in tally.samples]) for i in (1, 2, 3)]
    more = {
        "p50_ms": statistics.median(tally.milliseconds), "p99_ms": float(np.percentile(tally.milliseconds, 99)),
        "valid": len(tally.milliseconds), "memory": memory, "stop": stopped,
        "descriptors": {"first": int(first[0]), "peak": int(first.max()), "last": int(first[-1])},
        "threads": {"first": int(last[0]), "peak": int(last.max()), "last": int(last[-1])},
        "stalls_of_the_clients_s": [round(late, 1) for _, late in tally.stalls],
        "problems": tally.problems[:20], "problems_number": len(tally.problems),
    }  # fmt: skip
    measure.tell("siege", args, load, COLUMNS, rows, **more)
    print(json.dumps(more, indent=1))
    return bool(tally.problems)


if __name__ == "__main__":
    sys.exit(main())
