"""`fusion serve`: one index over HTTP, as an API and as a page to search with.

One thread answers: what arrives while it works waits and is answered together, so that the towers see batches. The
event loop itself only parses and writes. Errors are JSON: what is wrong (`error`), where in the request (`where`), and
what to do (`remedy`).
"""

import asyncio
import hmac
import logging
import math
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi import Query as InQuery
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from fusion_core import images
from fusion_core.search import BadQuery, NoImage, Query, Searcher, fetch_image
from pipelines.connection import Connection, Patience
from pipelines.guard import (
    COOKIE,
    Guard,
    Limits,
    Meters,
    Refused,
    is_allowed,
    json_response,
    session_cookie,
    unauthorized,
)
from schemas.errors import UserError
from schemas.index import META

MIN_TOKEN_CHARACTERS = 16
JSON_BYTES = 1 << 20
PICTURE_THREADS = 8
_TAIL_BYTES = 512  # of a form, in which its last boundary stands
_LAST_ID = (1 << 63) - 1
_WEB = Path(__file__).parent / "web"
_PAGE = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_OPEN = {*_PAGE, "/login", "/health"}  # without a token; /health then tells only that we are there
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_SHOWN = ("rank", "score", "id", "key", "caption", "url", "width", "height", "similarity", "shard", "row")

_logger = logging.getLogger("fusion.serve")


class ServeError(UserError):
    """A server that cannot be started: why, and what would help."""


# --- what is asked and answered


class Like(BaseModel):
    """How a search by a row goes: filters and the rest as in `fusion search`."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(default=10, ge=1, description="How many results")
    where: str | None = Field(default=None, max_length=4_096, description="E.g. width >= 512")
    collapse: float | None = Field(
        default=None, gt=0, le=1, description="Leave out what is this similar to a better one"
    )
    diversity: float = Field(default=0.0, ge=0, le=1, description="0: the best; towards 1: the best that differ")


class Ask(Like):
    """A search. At least one of text, id and key; filters and the rest as in `fusion search`."""

    text: str | None = Field(default=None, max_length=10_000, description="What to look for, in words")
    id: int | None = Field(default=None, ge=0, le=_LAST_ID, description="More like the row with this id")
    key: str | None = Field(default=None, max_length=4_096, description="More like the row with this key")
    image_weight: float = Field(default=0.5, ge=0, le=1, description="Of the picture, where there is a text, too")
    by_rank: bool = Field(default=False, description="Fuse the rankings of picture and text instead of their vectors")
    by_score: bool = Field(default=False, description="Fuse their scores, z-normed, by image_weight")


class Posted(Ask):
    """A search whose body may also bring a vector; as multipart/form-data also a file `image`."""

    vector: list[float] | None = Field(default=None, max_length=65_536, description="A vector of the index's space")


class Result(BaseModel):
    """One row that was found."""

    rank: int
    score: float = Field(description="Cosine to the query")
    id: int
    key: str
    caption: str | None
    url: str | None = Field(description="Where the dataset says that the picture came from; not checked")
    width: int | None
    height: int | None
    similarity: float | None = Field(description="Cosine of picture and caption")
    shard: str
    row: int
    image: str | None = Field(description="Where this server has the picture")


class Results(BaseModel):
    """Results, the best first."""

    results: list[Result]


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="What is wrong")
    where: str = Field(description="Where in the request")
    remedy: str = Field(description="What to do")


class Login(BaseModel):
    """What the page's login box sends."""

    token: str = Field(max_length=4_096)


class Batcher:
    """Answers queries in one thread: a batch is whatever came while the last one was being answered."""

    def __init__(self, searcher: Searcher, limit: int, meters: Meters):
        self._searcher = searcher
        self._limit = limit
        self._meters = meters
        self._thread = ThreadPoolExecutor(1, "fusion-answer")
        self._waiting: list[tuple[Query, asyncio.Future[pa.Table | BadQuery]]] = []
        self._working: asyncio.Task[None] | None = None

    async def ask(self, query: Query) -> pa.Table | BadQuery:
        """The answer (schema ANSWER), or why there is none."""
        future: asyncio.Future[pa.Table | BadQuery] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            batch = [(query, future) for query, future in batch if not future.done()]  # done: nobody waits any more
            if not batch:
                continue
            queries = [query for query, _ in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, queries)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception) and not isinstance(answer, BadQuery):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _answer(self, queries: list[Query]) -> list[Any]:
        """An answer, a BadQuery or the exception that answering raised, for each query."""
        self._meters.batches.observe(len(queries))
        try:
            with self._meters.answer.time():
                return list(self._searcher.answer(queries))
        except Exception as error:
            if len(queries) == 1:
                return [error]
        return [answer for query in queries for answer in self._answer([query])]  # one query must not fail the others

    def close(self) -> None:
        """Lets the thread end after the batch it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)


# --- the routes


def build(searcher: Searcher, limits: Limits | None = None, token: str = "", hosts: Sequence[str] = ()) -> ASGIApp:
    """The server of an index: an ASGI application.

    With a `token` every route but the page itself wants it, as `Authorization: Bearer` or as the cookie of POST
    /login. Without one, only requests that name one of `hosts` in their Host header are answered, so that no web page
    can reach a local server under a name of its own.
    """
    limits, meters = limits or Limits(), Meters()
    _time_faiss(searcher, meters)
    app = FastAPI(
        title="Fusion",
        description="Search an index of image-caption pairs by text, by picture, or by both.",
        version="1",
        docs_url=None,  # Swagger's page loads its scripts from a CDN
        redoc_url=None,
        responses=_problems(401, 403, 422, 503),
    )
    _add_errors(app)
    _add_page(app, searcher, limits, meters, token)
    _add_searches(app, Batcher(searcher, limits.batch, meters), limits)
    _add_pictures(app, searcher, ThreadPoolExecutor(PICTURE_THREADS, "fusion-picture"))
    return Guard(app, limits, meters, token, hosts, _OPEN)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of refusals."""
    return {status: {"model": Problem} for status in statuses}


def _time_faiss(searcher: Searcher, meters: Meters) -> None:
    untimed = searcher.index.search

    def search(*args: Any, **kwargs: Any) -> Any:
        with meters.faiss.time():
            return untimed(*args, **kwargs)

    searcher.index.search = search  # type: ignore[method-assign]


def _add_searches(app: FastAPI, batcher: Batcher, limits: Limits) -> None:
    async def answer(ask: Ask, image: bytes | None = None) -> Response:
        if ask.k > limits.k:
            raise Refused(422, f"k is {ask.k:,}; at most {limits.k:,} are answered", "k", "ask for fewer results")
        fields = ask.model_dump()
        if fields.get("vector") is not None:
            fields["vector"] = np.asarray(fields["vector"], np.float64)
        found = await batcher.ask(Query(**fields, image=image))
        if isinstance(found, BadQuery):
            raise Refused(422, str(found), "query", "change the query and ask again")
        return json_response({"results": [_shown(row) for row in found.to_pylist()]})

    @app.get("/search", response_model=Results)
    async def search(ask: Annotated[Ask, InQuery()]) -> Response:
        """Rows found by text, id or key."""
        return await answer(ask)

    @app.post("/search", response_model=Results, openapi_extra=_post_body(), responses=_problems(400, 408, 413, 415))
    async def search_with_body(request: Request) -> Response:
        """Rows found by text, picture, both, vector, id or key. A JSON body, or multipart/form-data with `image`."""
        ask, image = await _read_ask(request)
        return await answer(ask, image)

    @app.get("/similar/{id}", response_model=Results)
    async def similar(id: Annotated[int, InPath(ge=0, le=_LAST_ID)], how: Annotated[Like, InQuery()]) -> Response:
        """Other rows that are like this one."""
        return await answer(Ask(id=id, **how.model_dump()))


_Model = TypeVar("_Model", bound=BaseModel)


async def _read_ask(request: Request) -> tuple[Posted, bytes | None]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _read_json(request, Posted), None
    if kind != "multipart/form-data":
        raise Refused(
            415, f"the body is {kind or 'of no stated type'}", "content-type",
            "send application/json, or multipart/form-data with a file `image`",
        )  # fmt: skip
    image, fields = None, {}
    form = await _read_form(request)
    try:
        for name, value in form.multi_items():
            if not isinstance(value, str):
                image = await _read_upload(name, value)
            elif name == "image":
                raise Refused(
                    422, "`image` came as a field without a filename", name, "send it as a file: -F image=@FILE"
                )
            elif name == "vector":
                fields[name] = _decoded(value.encode(), name)
            else:
                fields[name] = value
    finally:
        await form.close()
    return _validated(Posted, fields), image


async def _read_form(request: Request) -> FormData:
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    tail = b""

    async def watched() -> AsyncGenerator[bytes, None]:
        nonlocal tail
        async for piece in request.stream():
            tail = (tail + piece[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            yield piece

    try:
        parser = MultiPartParser(request.headers, watched(), max_files=1, max_fields=32, max_part_size=JSON_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary is stated
        raise Refused(
            400, f"the form is broken: {error}", "body", "send multipart/form-data as RFC 7578 has it"
        ) from error
    if b"--%b--" % boundary not in tail:  # the parser leaves out a part that was cut
        await form.close()
        raise Refused(400, "the form ends before its last boundary", "body", "send all of it")
    return form


async def _read_upload(name: str, upload: UploadFile) -> bytes:
    if name != "image":
        raise Refused(422, f"a file was sent as {name!r}", name, "send the picture as `image`")
    return await upload.read()


async def _read_json(request: Request, model: type[_Model]) -> _Model:
    body = await request.body()
    if len(body) > JSON_BYTES:
        raise Refused(413, f"the JSON body has {len(body):,} bytes", "body", f"send at most {JSON_BYTES:,}")
    fields = _decoded(body, "body")
    if not isinstance(fields, dict):
        raise Refused(422, "the JSON body is no object", "body", 'send an object like {"text": "a red bicycle"}')
    return _validated(model, fields)


def _decoded(text: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(422, f"{where} is no JSON: {error}", where, "send JSON in UTF-8") from error


def _validated(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error.errors()) from error


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _SHOWN} | {"image": f"/image/{row['id']}" if row["sha256"] else None}


def _post_body() -> dict[str, Any]:
    """The OpenAPI description of POST /search: FastAPI cannot tell that a route takes two kinds of bodies."""
    asked = Posted.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF, BMP or TIFF"}
    with_file = asked | {"properties": {**asked["properties"], "image": picture}}
    content = {"application/json": {"schema": asked}, "multipart/form-data": {"schema": with_file}}
    return {"requestBody": {"required": True, "content": content}}


def _add_pictures(app: FastAPI, searcher: Searcher, threads: Executor) -> None:
    record = searcher.index.record
    limits = record.table_spec.input

    def read(id: int, size: int | None, known: str) -> Response:
        (row,) = searcher.index.meta([id]).to_pylist()
        version = row["sha256"].hex() if row["sha256"] else ""
        headers = {"etag": f'"{version}{f"-{size}" if size else ""}"', "cache-control": "private, no-cache"}
        if version and headers["etag"] in known:
            return Response(status_code=304, headers=headers)
        picture = fetch_image(row, limits.max_image_bytes, limits)
        if size is not None:
            return Response(images.thumbnail(picture, size, limits.max_pixels), 200, headers, "image/jpeg")
        return Response(picture, 200, headers, images.media_type(picture))

    @app.get(
        "/image/{id}", response_class=Response, responses={200: {"content": {"image/*": {}}}, **_problems(404, 502)}
    )
    async def image(
        request: Request,
        id: Annotated[int, InPath(ge=0, le=_LAST_ID)],
        size: Annotated[int | None, InQuery(ge=16, le=1024, description="Longest side of a small JPEG copy")] = None,
    ) -> Response:
        """The original picture of a row, read from its shard; with `size` a small copy of it."""
        if id >= record.rows_table:
            raise Refused(404, f"there is no row {id}", "id", f"ids lie in 0..{record.rows_table - 1}")
        try:
            known = request.headers.get("if-none-match", "")
            return await asyncio.get_running_loop().run_in_executor(threads, read, id, size, known)
        except NoImage as error:
            raise Refused(404, str(error), "id", "choose a row that has a picture") from error
        except images.BadImage as error:
            raise Refused(422, f"row {id}: {error}", "id", "ask for the original, without a size") from error
        except OSError as error:
            _logger.error("image %d: %s", id, error)
            raise Refused(502, f"the shard of row {id} cannot be read", "id", "see the server's log") from error


def _add_page(app: FastAPI, searcher: Searcher, limits: Limits, meters: Meters, token: str) -> None:
    about = _about(searcher, limits)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """What is served. Without the token, where one is needed, only that the server is there."""
        return json_response(about if is_allowed(request.scope, token) else {"ready": True})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(meters.text(), media_type=meters.MEDIA_TYPE)

    @app.post("/login", status_code=204, openapi_extra=_login_body(), responses=_problems(408, 413))
    async def login(request: Request) -> Response:
        """Sets a cookie that stands for the token, so that a page's pictures can be shown. No script can read it."""
        given = await _read_json(request, Login)
        if token and not hmac.compare_digest(given.token.encode(), token.encode()):
            raise unauthorized("the token is wrong")
        response = Response(status_code=204)
        if token:
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, session_cookie(token), httponly=True, samesite="strict", secure=secure)
        return response

    for path, name in _PAGE.items():
        app.add_api_route(path, _static(_WEB / name), include_in_schema=False)


def _login_body() -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": Login.model_json_schema()}}}}


def _static(path: Path) -> Callable[[], Any]:
    content, kind = path.read_bytes(), _TYPES[path.suffix]
    headers = {"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"}

    async def page() -> Response:
        return Response(content, 200, headers, kind)

    return page


def _about(searcher: Searcher, limits: Limits) -> dict[str, Any]:
    index, record = searcher.index, searcher.index.record
    return {
        "ready": True,
        "index": index.place,
        "rows": record.rows_indexed,
        "rows_table": record.rows_table,
        "column": record.column,
        "model": record.table_spec.models,
        "pretrained": record.table_spec.tower.pretrained,
        "dim": record.dim,
        "columns": META.names,
        "limits": {"k": limits.k, "body_bytes": limits.body_bytes, "seconds": limits.seconds},
        "examples": _examples(searcher),
    }


def _examples(searcher: Searcher, wanted: int = 4, looked_at: int = 64) -> list[str]:
    """Some short captions of the index, to try it with."""
    ids = np.unique(np.linspace(0, searcher.index.record.rows_table - 1, looked_at).astype(np.int64))
    captions = searcher.index.meta(ids)["caption"].to_pylist() if searcher.index.record.rows_table else []
    different = dict.fromkeys(" ".join(caption.split()) for caption in captions if caption)
    short = sorted((caption for caption in different if 8 <= len(caption) <= 60), key=len)[: 4 * wanted]
    return short[:: max(1, len(short) // wanted)][:wanted]


# --- errors


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error.response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refusal(error.errors()).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {error.detail}"
        return Refused(error.status_code, what, "request", "see /openapi.json", error.headers).response()

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # for /metrics: nobody hears it

    async def broken(request: Request, _: Exception) -> Response:
        return Refused(500, "the server failed", request.url.path, "see the server's log").response()

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)


def _refusal(errors: Sequence[Any]) -> Refused:
    """What pydantic found first, said our way."""
    first = errors[0]
    where = ".".join(str(step) for step in first["loc"] if step not in ("query", "path", "body")) or "query"
    given = "" if first["type"] == "extra_forbidden" else f", got {str(first['input'])[:60]!r}"
    return Refused(422, f"{where}: {first['msg']}{given}", where, "see /openapi.json for what is taken")


# --- starting


def bind(host: str, port: int, token: str) -> tuple[socket.socket, list[str]]:
    """A bound socket, and the host names to answer to (none means any). Raises ServeError.

    Other than loopback addresses need a token.
    """
    if token and len(token) < MIN_TOKEN_CHARACTERS:
        raise ServeError(
            f"the token has {len(token)} characters; give at least {MIN_TOKEN_CHARACTERS}, e.g. by "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if token != token.strip():
        raise ServeError("the token begins or ends with white space, which no header carries: leave it out")
    if not 0 <= port < 1 << 16:
        raise ServeError(f"--port {port} does not lie in 0..65535")
    try:
        family, _, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ServeError(f"--host {host} --port {port}: {error}") from error
    local = ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not (local or token):
        raise ServeError(
            f"--host {host} can be reached from other machines: set FUSION_TOKEN (or --token) to a secret that "
            "requests must bring, or leave --host at 127.0.0.1"
        )
    # asyncio turns off Nagle's delay, 40 ms an answer, only where the protocol is stated
    found = socket.socket(family, socket.SOCK_STREAM, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise ServeError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from error
    return found, ["localhost", "127.0.0.1", "::1", host] if local else []


def server(
    app: ASGIApp, listening: socket.socket, ready: Callable[[str], None], limits: Limits | None = None
) -> uvicorn.Server:
    """The server of a bound socket, to be `run`; `ready` is told the URL once requests are answered.

    Told to end, it takes no more requests, and answers those in progress in their time.
    """
    limits = limits or Limits()
    host, port = listening.getsockname()[:2]
    patience = Patience(limits.seconds, limits.connections, limits.held_bytes)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    config = uvicorn.Config(
        app,
        http=cast(Any, partial(Connection, patience=patience)),
        log_config=None,
        log_level="error",  # a line for each client that does not speak HTTP would fill the disk
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.seconds),
    )
    return Server(config)
