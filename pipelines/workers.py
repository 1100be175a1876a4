"""Units worked on in processes of their own: on a CPU, threads of one process wait for the interpreter's lock.

A process is started when a unit finds none idle, loads the towers once, and serves one unit after the other until this
process ends. Whatever a decoder does to its process costs one sample: the process notes which image it decodes, and
where it crashed or hung at one, the unit is run again without it.

They are forked from a server that has nothing but imports behind it: neither Beam's threads nor a storage client's are
in it, and what it has imported is shared.
"""

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver
from typing import Any

from fusion_core import opt_out, towers, unit
from schemas.errors import UserError
from schemas.feature_table import ManifestRecord, TableSpec, TowerSpec

_CONTEXT = multiprocessing.get_context("forkserver")
_PAUSES_SECONDS = (1.0, 5.0)  # before a unit is tried again because storage failed
_LASTING = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
)
_READY, _END = "are you ready?", "end"
_STUCK_SECONDS = 120.0  # at one image: the largest that are allowed take some seconds
_CRASHES = 20  # in one unit: more are no accident of single images
_LOCK = threading.Lock()
_IDLE: list["Worker"] = []


@dataclass(frozen=True)
class Order:
    """A unit to run, and into which table."""

    work: unit.Work
    output: str
    spec: TableSpec
    batch: int = 0  # 0: what suits the device and the model
    opt_out: tuple[str, str] = ("", "")  # the place of the list of keys to leave out, and its SHA-256


@dataclass(frozen=True)
class Failure:
    """Why a unit was not done, and where in the code, unless the reason says it all."""

    why: str
    trace: str = ""


class Worker:
    """A process with the towers of one spec on one device."""

    def __init__(self, spec: TowerSpec, device: str, pretrained: str):
        self.towers = (spec, device, pretrained)
        self._start()

    def _start(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._row = _CONTEXT.RawValue("q", unit.NO_ROW)  # whose image is being decoded
        given = (theirs, self._row, *self.towers)
        self._process = _CONTEXT.Process(target=_serve, args=given, name="fusion-worker", daemon=True)
        self._process.start()
        theirs.close()

    def run(self, order: Order, done: Callable[[int], None]) -> ManifestRecord | Failure:
        """The unit's record, or why it failed; `done` hears of finished samples."""
        while True:
            told = 0
            try:
                self._connection.send(order)
                while isinstance(said := self._heard(), int):
                    told += said
                    done(said)
                result: ManifestRecord | Failure = said
                return result
            except (EOFError, ConnectionError):
                self._process.join()
            row, code, work = self._row.value, self._process.exitcode or 0, order.work
            why = "hung" if code == -signal.SIGALRM else _how_ended(code)
            if row == unit.NO_ROW or code in (0, -signal.SIGKILL) or len(work.crashes) == _CRASHES:
                return Failure(f"{work.unit.shard}: its process {why}")
            done(-told)  # those samples are to come again
            order = replace(order, work=replace(work, crashes={**work.crashes, row: why}))
            self._start()

    def _heard(self) -> Any:
        """What the process says next; one that hangs at an image is ended."""
        row, since = unit.NO_ROW, time.monotonic()
        while not self._connection.poll(_STUCK_SECONDS / 10):
            now = self._row.value
            if now != row or now == unit.NO_ROW:
                row, since = now, time.monotonic()
            elif time.monotonic() - since > _STUCK_SECONDS and self._process.pid is not None:
                os.kill(self._process.pid, signal.SIGALRM)
        return self._connection.recv()

    def wait(self) -> None:
        """Returns when the towers are loaded, or raises the UserError for which they cannot be; a process that failed
        otherwise says so at its first unit.
        """
        wrong = None
        with suppress(EOFError, ConnectionError):
            self._connection.send(_READY)
            wrong = self._connection.recv()
        if wrong:
            raise wrong

    @property
    def is_alive(self) -> bool:
        """Whether it can take another unit."""
        return self._process.is_alive()

    def close(self) -> None:
        """Ends the process: by a word, as others forked from this one may hold the connection, too."""
        with suppress(ConnectionError):
            self._connection.send(_END)
        self._process.join()
        self._connection.close()


def start(n: int, spec: TowerSpec, device: str, pretrained: str) -> None:
    """Has `n` workers with these towers ready; raises the UserError for which they cannot be loaded."""
    with ExitStack() as stack:
        for worker in [stack.enter_context(borrowed(spec, device, pretrained)) for _ in range(n)]:
            worker.wait()


@contextmanager
def borrowed(spec: TowerSpec, device: str, pretrained: str) -> Iterator[Worker]:
    """An idle worker with these towers, or a new one; workers with others are ended."""
    wanted = (spec, device, pretrained)
    with _LOCK:
        found = [worker for worker in _IDLE if worker.is_alive and worker.towers == wanted]
        others = [worker for worker in _IDLE if worker not in found]
        _IDLE[:] = found[1:]
    for other in others:
        other.close()
    worker = found[0] if found else Worker(*wanted)
    try:
        yield worker
    finally:
        with _LOCK:
            _IDLE.append(worker)


def prepare() -> None:
    """Starts the server, whose imports take seconds, beside what else there is to do."""
    _CONTEXT.set_forkserver_preload(["open_clip", "pyarrow.parquet"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for the launcher
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end() -> None:
    """Ends all processes and waits for them, so that what they took counts as this one's children's."""
    with _LOCK:
        idle, _IDLE[:] = _IDLE[:], []
    for worker in idle:
        worker.close()
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def attempt(
    order: Order,
    model: towers.Towers,
    done: Callable[[int], None],
    decoding: Callable[[int], None] = lambda row: None,
) -> ManifestRecord | Failure:
    """Runs a unit in this process: its record, or why it failed, tried again while storage may only have stumbled."""
    told = 0

    def count(n: int) -> None:
        nonlocal told
        told += n
        done(n)

    batch = order.batch or model.batch
    for pause in (*_PAUSES_SECONDS, None):
        try:
            keys = opt_out.load(*order.opt_out)
            return unit.run_unit(order.work, order.output, order.spec, model, batch, count, decoding, keys)
        except Exception as error:
            if pause is None or not isinstance(error, OSError) or error.errno in _LASTING:
                trace = "" if isinstance(error, OSError) else traceback.format_exc()
                return Failure(_explain(order.work.unit.shard, error), trace)
        done(-told)  # those samples are to come again
        told = 0
        time.sleep(pause)
    raise AssertionError("the last attempt returns")


def _explain(shard: str, error: Exception) -> str:
    """What failed, where, and what to do."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{shard}: no space left for its part: free some and run the command again"
    return f"{shard}: {type(error).__name__}: {error}"


def _how_ended(code: int) -> str:
    """What became of a process that did not answer any more."""
    if code == -signal.SIGKILL:
        return "was killed, as by a system out of memory: fewer --workers need less"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}; what it wrote to stderr says why"


def _serve(orders: Any, row: Any, spec: TowerSpec, device: str, pretrained: str) -> None:
    """What a worker's process does."""

    def decoding(now: int) -> None:
        row.value = now

    threading.Thread(target=_end_with_launcher, daemon=True).start()
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    towers.one_thread_each()
    try:
        model: towers.Towers | Exception = towers.for_spec(spec, device, pretrained)
    except Exception as error:
        model = error
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        if order == _END:
            return
        if order == _READY:
            orders.send(model if isinstance(model, UserError) else None)
        elif isinstance(model, Exception):
            orders.send(Failure(_explain(order.work.unit.shard, model)))
        else:
            orders.send(attempt(order, model, orders.send, decoding))


def _end_with_launcher() -> None:
    """A launcher that was killed can tell nobody."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os._exit(1)
