"""A real server in a thread, and a client that sends it any bytes."""

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fusion_core import index, search, towers
from pipelines import guard, serve


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def ids(self) -> list[int]:
        return [row["id"] for row in self.json["results"]]

    @property
    def scores(self) -> list[float]:
        return [row["score"] for row in self.json["results"]]


@dataclass(frozen=True)
class Client:
    """Requests to one server."""

    url: str

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **how: Any
    ) -> Answer:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused while we were still sending
                connection.request(method, path, body, dict(headers or {}), **how)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post_json(self, fields: Any, **headers: str) -> Answer:
        return self.ask("POST", "/search", json.dumps(fields), {"content-type": "application/json", **headers})

    def post_form(self, image: bytes | None = None, **fields: str) -> Answer:
        parts = [
            f'--cut\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
        ]
        if image is not None:
            head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="../../x.jpg"\r\n\r\n'
            parts.append(head + image + b"\r\n")
        body = b"".join(parts) + b"--cut--\r\n"
        return self.ask("POST", "/search", body, {"content-type": "multipart/form-data; boundary=cut"})


@contextmanager
def serving(
    searcher: search.Searcher, limits: guard.Limits | None = None, token: str = "", port: int = 0
) -> Iterator[Client]:
    """A server on a loopback port until the block ends."""
    listening, hosts = serve.bind("127.0.0.1", port, token)
    ready = threading.Event()
    urls: list[str] = []

    def tell(url: str) -> None:
        urls.append(url)
        ready.set()

    with listening:
        server = serve.server(serve.build(searcher, limits, token, hosts), listening, tell, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(20)
            yield Client(urls[0])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def open_searcher(place: str) -> search.Searcher:
    """Of an index of the demo's model."""
    return search.Searcher(index.Index.open(place), towers.load(towers.DEMO, device="cpu", precision="fp32"))
