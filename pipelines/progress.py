"""Where a run stands: counted in this process, shown on a terminal or in a log, and recorded in the table."""

import contextlib
import os
import socket
import sys
import threading
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from tqdm import tqdm

from fusion_core import manifest
from pipelines.plan import Plan
from schemas.feature_table import RunRecord

_RECORD_SECONDS = 5.0
_LOG_SECONDS = 10.0
_LOCK = threading.Lock()
_SAMPLES = 0
_FINISHED = (0, 0)  # samples and bytes of whole units
_FAILURES: dict[str, str] = {}


def add_samples(n: int) -> None:
    """Counts samples done by the units of this process."""
    global _SAMPLES
    with _LOCK:
        _SAMPLES += n


def add_unit(samples: int, size_bytes: int) -> None:
    """Counts a finished unit of this process: how much its shard held, and how large it is."""
    global _FINISHED
    with _LOCK:
        _FINISHED = _FINISHED[0] + samples, _FINISHED[1] + size_bytes


def add_failure(unit: str, what: str) -> None:
    """Keeps why a unit of this process failed."""
    with _LOCK:
        _FAILURES[unit] = what


def take_failures() -> dict[str, str]:
    """Why units of this process failed since this was last asked, by unit id."""
    with _LOCK:
        taken = dict(_FAILURES)
        _FAILURES.clear()
    return taken


class Watch:
    """Shows and records a run until its block ends; a bar on a terminal, plain lines in a log."""

    def __init__(self, place: str, command: str, plan: Plan, quiet: bool):
        self._place = place
        self._plan = plan
        self._start, self._start_finished = _SAMPLES, _FINISHED
        units = len(plan.work)
        now = _now()
        self.run = RunRecord(
            id=f"{now.replace(':', '').replace('+0000', 'Z')}-{uuid.uuid4().hex[:8]}",
            command=command,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now,
            updated_at=now,
            units_planned=units + plan.skipped,
            units_skipped=plan.skipped,
            samples_planned=plan.samples,
        )
        self._bar = tqdm(
            total=plan.samples,
            unit=" samples",
            desc=f"{units} unit{'s' * (units != 1)}",
            disable=quiet or not units,
            mininterval=0.5 if sys.stderr.isatty() else _LOG_SECONDS,
            dynamic_ncols=True,
            ascii=None if sys.stderr.isatty() else True,
            file=sys.stderr if sys.stderr.isatty() else _Lines(),
        )
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="fusion-progress", daemon=True)

    def __enter__(self) -> Self:
        manifest.write_run(self._place, self.run)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        if isinstance(error, Exception):
            self.update(state="failed", failures=(*self.run.failures, f"{type(error).__name__}: {error}"))
        elif error is not None:
            self.update(state="interrupted")
        self._record()

    def update(self, **changes: object) -> None:
        """Changes the run's record."""
        with self._lock:
            self.run = replace(self.run, **changes)  # type: ignore[arg-type]

    def _follow(self) -> None:
        recorded = 0.0
        while not self._ended.wait(0.5):
            self._show()
            recorded += 0.5
            if recorded >= _RECORD_SECONDS:
                recorded = 0.0
                self._record()
        self._show()

    def _show(self) -> None:
        samples, size_bytes = (now - then for now, then in zip(_FINISHED, self._start_finished, strict=True))
        if self._plan.samples is None and size_bytes:  # tars do not say how many samples they hold: judge by their size
            self._bar.total = max(self._samples_done, round(samples * self._plan.size_bytes / size_bytes))
        self._bar.update(self._samples_done - self._bar.n)

    @property
    def _samples_done(self) -> int:
        return _SAMPLES - self._start

    def _record(self) -> None:
        self.update(samples_done=self._samples_done, updated_at=_now())
        with contextlib.suppress(OSError):  # a full disk stops units, and they say so
            manifest.write_run(self._place, self.run)


class _Lines:
    """A log in the place of a terminal: what would overwrite a line becomes a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
