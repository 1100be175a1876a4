"""One client's connection to `fusion serve`: how long it may take, and how much of the server it may hold.

uvicorn gives a client all the time in the world for a request's head, for the rest of a body that was refused, and for
taking its answer. Here each of them has its time, the number of open connections has a limit, and whoever has made the
server wait longest goes first.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

LINGER_SECONDS = 2.0  # for what is still sent of a refused body: who sends all of it before reading sees the answer
_LEAST_RATE = 4096  # bytes a second: who takes less of an answer is not reading


@dataclass(frozen=True)
class Patience:
    """What clients may ask of the server's."""

    seconds: float  # for a head, for a request with its answer, and without progress in taking that
    connections: int
    unread_bytes: int  # of answers that were written and not taken, of all connections


class Connection(H11Protocol):
    """uvicorn's connection with limits; what it refuses by itself is refused in JSON."""

    def __init__(self, *args: Any, patience: Patience, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._since = time.monotonic()  # when it began to wait for its client
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Makes room where there is none: the longest waiting goes, or where none waits for its client, this one."""
        super().connection_made(transport)
        self._give(self._patience.seconds)
        if len(self.connections) <= self._patience.connections:
            return
        others = [one for one in self._others() if one is not self and not one.transport.is_closing()]
        if len(others) < self._patience.connections:
            return
        if waiting := [one for one in others if one._waits]:
            min(waiting, key=lambda one: one._since).transport.abort()
        else:
            self.refuse(503, f"{self._patience.connections} connections are open", "server", "try again in a second")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets what it still had to do."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The first byte of a request starts its time."""
        if self._timer is None:
            self._since = time.monotonic()
            self._give(self._patience.seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        """A head that is whole gives the body and the answer their time; the application ends it before we do."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._since = time.monotonic()
            self._give(self._patience.seconds + LINGER_SECONDS)

    def on_response_complete(self) -> None:
        """What the client has still to send or to take has its time, too."""
        before = self.cycle
        super().on_response_complete()
        if self.cycle is not before:  # the next request had come already
            return
        self._since = time.monotonic()
        self._unread = self.transport.get_write_buffer_size()
        if self._unread:
            self._give(self._patience.seconds)
            self._forget_unread()
        elif self.conn.their_state is h11.SEND_BODY:
            self._give(LINGER_SECONDS)
        else:
            self._stop()  # uvicorn's time between two requests begins

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP, or its head is longer than is read."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way, or given
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if (
            getattr(sys.exception(), "error_status_hint", 0) == 431
        ):  # uvicorn calls this where it has caught h11's error
            self.refuse(
                431, "the request's head is too long", "request", "send long texts in the body of a POST /search"
            )
            return
        self.refuse(400, f"{msg.rstrip('.')}: it is no HTTP/1.1", "request", "send requests by an HTTP library")

    def refuse(self, status: int, error: str, where: str, remedy: str) -> None:
        """Tells a client that has sent no whole request what is wrong, and ends the connection."""
        body = msgspec.json.encode({"error": error, "where": where, "remedy": remedy})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        answer = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
        self._give(LINGER_SECONDS)

    @property
    def _waits(self) -> bool:
        """Whether it is the client's turn to send or to take."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _others(self) -> Sequence["Connection"]:
        return [one for one in self.connections if isinstance(one, Connection)]

    def _give(self, seconds: float) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self._overdue)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        left = self.transport.get_write_buffer_size()
        if left and self._unread - left >= _LEAST_RATE * self._patience.seconds:
            self._unread = left
            self._give(self._patience.seconds)
        elif self.cycle is not None and not (self.cycle.response_complete or self.transport.is_closing()):
            self._give(LINGER_SECONDS)  # the application ends it in its time, which a busy machine may stretch
        elif (
            self.conn.our_state is h11.IDLE
            and self.conn.their_state is h11.IDLE
            and self.conn.trailing_data[0]
            and not (left or self.transport.is_closing())
        ):
            what = f"the request's head did not come within {self._patience.seconds:g} seconds"
            self.refuse(408, what, "request", "send it faster")
        else:
            self.transport.abort()

    def _forget_unread(self) -> None:
        unread = sorted((one for one in self._others() if one._unread), key=lambda one: one._since)
        sizes = [one.transport.get_write_buffer_size() for one in unread]
        excess = sum(sizes) - self._patience.unread_bytes
        for one, size in zip(unread, sizes, strict=True):
            if excess <= 0:
                return
            one.transport.abort()
            excess -= size
