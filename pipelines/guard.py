"""What stands before the routes of `fusion serve`: limits, tokens, host names, headers, meters, and how it refuses."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import msgspec
import prometheus_client as prometheus
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "fusion_session"
_UNCOUNTED = {"/health", "/metrics"}  # answered however many requests wait
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "cache-control": "no-store",
}
_ENCODED_HEADERS = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    k: int = 1_000
    body_bytes: int = 20_000_000
    seconds: float = 10.0  # for a request's head, and for its body and answer
    waiting: int = 128  # requests that have come whole and are not answered
    batch: int = 64  # queries answered at once
    connections: int = 512
    held_bytes: int = 256 << 20  # of all bodies that are there and not answered; also of answers that nobody takes


class Refused(Exception):
    """A request that gets an error: what, where in the request, and what to do."""

    def __init__(self, status: int, error: str, where: str, remedy: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": error, "where": where, "remedy": remedy}

    def response(self) -> Response:
        """The answer that tells it."""
        return json_response(self.body, self.status, self.headers)


class Meters:
    """What /metrics tells, of one server."""

    MEDIA_TYPE = prometheus.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

        def histogram(name: str, what: str, labels: Sequence[str], buckets: Sequence[float]) -> prometheus.Histogram:
            return prometheus.Histogram(name, what, labels, buckets=buckets, registry=self.registry)

        self.requests = prometheus.Counter(
            "fusion_requests", "Requests", ("method", "route", "status"), registry=self.registry
        )
        self.in_progress = prometheus.Gauge("fusion_requests_in_progress", "Now", registry=self.registry)
        self.seconds = histogram("fusion_request_seconds", "From request to answer", ("route",), seconds)
        self.batches = histogram("fusion_batch_queries", "Queries answered at once", (), [1 << i for i in range(9)])
        self.answer = histogram("fusion_answer_seconds", "One batch: towers, FAISS and rows", (), seconds)
        self.faiss = histogram("fusion_faiss_seconds", "One call of FAISS", (), seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return prometheus.generate_latest(self.registry)


def unauthorized(what: str) -> Refused:
    """The refusal of a request without the token."""
    remedy = "send `Authorization: Bearer TOKEN` with the token that the server was started with"
    return Refused(401, what, "authorization", remedy, {"www-authenticate": "Bearer"})


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


class Guard:
    """Lets a request through to the routes, or refuses it; adds headers, counts and measures. Nothing escapes it."""

    def __init__(
        self, app: ASGIApp, limits: Limits, meters: Meters, token: str, hosts: Sequence[str], open_paths: Set[str]
    ):
        self._app, self._limits, self._meters, self._token, self._open = app, limits, meters, token, open_paths
        self._hosts = {_host(host) for host in hosts}
        self._answering = 0  # requests that have come whole
        self._held_bytes = 0  # of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # what probes send: as GET, but that the connection leaves the body out
            scope = {**scope, "method": "GET"}
        started, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in _ENCODED_HEADERS if header[0] not in given),
                ]
            await send(message)

        self._meters.in_progress.inc()
        arriving = Arriving(receive)
        try:
            async with asyncio.timeout(self._limits.seconds):
                self._check(scope)
                if not _has_body(scope):
                    self._take(scope, arriving)
                await self._app(scope, self._limited(scope, arriving), send_guarded)
        except (Refused, TimeoutError, asyncio.CancelledError) as error:
            if not status:
                await self._refused(error, arriving).response()(scope, receive, send_guarded)
        finally:
            self._answering -= arriving.is_whole
            self._held_bytes -= arriving.size_bytes
            self._meters.in_progress.dec()
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"  # any word may stand there
            self._meters.requests.labels(method, route, status).inc()
            self._meters.seconds.labels(route).observe(time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        self._check_waiting(path)
        if self._hosts and not self._token and (name := _host(_header(scope, b"host"))) not in self._hosts:
            raise Refused(
                403, f"this server is not {name[:100]!r}", "host",
                f"ask for http://{min(self._hosts)}, or start the server with a token",
            )  # fmt: skip
        if path not in self._open and not is_allowed(scope, self._token):
            raise unauthorized("this server wants a token")
        stated = _header(scope, b"content-length")
        if stated.isdigit() and int(stated) > self._limits.body_bytes:
            raise self._too_large()

    def _check_waiting(self, path: str) -> None:
        if self._answering >= self._limits.waiting and path not in _UNCOUNTED:
            raise _busy(f"{self._limits.waiting} requests are being answered")

    def _take(self, scope: Scope, arriving: "Arriving") -> None:
        """A request has come whole: it is the server's turn. A client that is still sending keeps nobody waiting."""
        self._check_waiting(scope["path"])
        self._answering += 1
        arriving.is_whole = True

    def _limited(self, scope: Scope, arriving: "Arriving") -> Receive:
        async def receive_limited() -> Message:
            message = await arriving.receive()
            size = len(message.get("body", b""))
            arriving.size_bytes += size
            self._held_bytes += size
            if arriving.size_bytes > self._limits.body_bytes:
                raise self._too_large()
            if self._held_bytes > self._limits.held_bytes:
                raise _busy("the requests in progress fill the memory that there is for them")
            if message["type"] == "http.request" and not message.get("more_body") and not arriving.is_whole:
                self._take(scope, arriving)
            return message

        return receive_limited

    def _refused(self, error: BaseException, arriving: "Arriving") -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, asyncio.CancelledError):  # what the server does with what outlasts its last seconds
            return Refused(503, "the server ends", "server", "ask its successor", {"retry-after": "1"})
        if not arriving.is_whole:
            what = f"the body did not come within {self._limits.seconds:g} seconds"
            return Refused(408, what, "body", "send it faster, or start the server with a larger --timeout")
        what = f"no answer within {self._limits.seconds:g} seconds"
        return Refused(503, what, "server", "try again, or ask for less", {"retry-after": "1"})

    def _too_large(self) -> Refused:
        remedy = "send a smaller picture, or start the server with a larger --max-body-bytes"
        return Refused(413, f"the body has more than {self._limits.body_bytes:,} bytes", "body", remedy)


@dataclass
class Arriving:
    """What has come of one request's body."""

    receive: Receive
    size_bytes: int = 0
    is_whole: bool = False


def _busy(what: str) -> Refused:
    return Refused(503, what, "server", "try again in a second", {"retry-after": "1"})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _has_body(scope: Scope) -> bool:
    return _header(scope, b"content-length") not in ("", "0") or _header(scope, b"transfer-encoding") != ""


def _host(name: str) -> str:
    """A Host header, or an address, without its port."""
    name = name.strip().lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return f"[{name}]" if name.count(":") > 1 else name.partition(":")[0]


def is_allowed(scope: Scope, token: str) -> bool:
    """Whether a request brings the token, or the cookie that stands for it."""
    if not token:
        return True
    kind, _, given = _header(scope, b"authorization").partition(" ")
    if kind.lower() == "bearer" and hmac.compare_digest(given.strip(" ").encode("latin-1"), token.encode()):
        return True
    session = session_cookie(token)
    cookies = (pair.strip().partition("=") for pair in _header(scope, b"cookie").split(";"))
    return any(name == COOKIE and hmac.compare_digest(value.encode(), session.encode()) for name, _, value in cookies)


def session_cookie(token: str) -> str:
    """The cookie's value: it stands for the token and does not tell it."""
    return hmac.new(token.encode(), b"fusion serve", hashlib.sha256).hexdigest()
