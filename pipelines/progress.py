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

from fusion_core import table
from schemas.feature_table import RunRecord

_RECORD_SECONDS = 5.0
_LOG_SECONDS = 10.0
_LOCK = threading.Lock()
_SAMPLES = 0
_FAILURES: dict[str, str] = {}


def add_samples(n: int) -> None:
    """Counts samples done by the units of this process."""
    global _SAMPLES
    with _LOCK:
        _SAMPLES += n


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

    def __init__(self, place: str, command: str, units: int, skipped: int, samples: int | None, quiet: bool):
        self._place = place
        self._quiet = quiet
        self._start = _SAMPLES
        now = _now()
        self.run = RunRecord(
            id=f"{now.replace(':', '').replace('+0000', 'Z')}-{uuid.uuid4().hex[:8]}",
            command=command,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now,
            updated_at=now,
            units_planned=units + skipped,
            units_skipped=skipped,
            samples_planned=samples,
        )
        self._bar = tqdm(
            total=samples,
            unit=" samples",
            desc=f"{units} unit{'s' * (units != 1)}",
            disable=quiet,
            mininterval=0.5 if sys.stderr.isatty() else _LOG_SECONDS,
            dynamic_ncols=True,
            ascii=None if sys.stderr.isatty() else True,
            file=sys.stderr if sys.stderr.isatty() else _Lines(),
        )
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="fusion-progress", daemon=True)

    def __enter__(self) -> Self:
        table.write_run(self._place, self.run)
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
            self._bar.update(_SAMPLES - self._start - self._bar.n)
            recorded += 0.5
            if recorded >= _RECORD_SECONDS:
                recorded = 0.0
                self._record()
        self._bar.update(_SAMPLES - self._start - self._bar.n)

    def _record(self) -> None:
        self.update(samples_done=_SAMPLES - self._start, updated_at=_now())
        with contextlib.suppress(OSError):  # a full disk stops units, and they say so
            table.write_run(self._place, self.run)


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
