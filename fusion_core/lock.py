"""One run at a time in a folder, over processes, machines and object stores.

A run writes a claim under a name of its own, then lists the folder: if it finds another living claim it takes its own
back. Of two claims, one was listed after the other was written, so never do both go on; that takes a storage that lists
what was written (POSIX, NFS by its close-to-open rule, S3, GCS), and no exclusive creation, which stores do not share.

A claim lives while its process does, where that can be looked up: on the same host, boot and process namespace. From
elsewhere it lives while it is written anew: every 20 s, and it is dead after 300 s without. Times are compared as the
storage gives them, so clocks need not agree. Who comes to life again after that finds its claim gone (`check`).

Tables and indexes bear several writers without it; the lock saves their work twice done, and keeps publishing in order.
"""

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fusion_core import files
from schemas import records
from schemas.errors import RunError
from schemas.job import Claim

BEAT_SECONDS, STALE_SECONDS = 20.0, 300.0
_FOLDER = "lock"
_TRIES = 6


class Locked(RunError):
    """Another run is at work: which, and where."""

    exit_code = 5


class Lost(RunError):
    """The claim was taken from this run, which must not publish any more."""


class Hold:
    """A claim that `held` gave."""

    def __init__(self, place: str, claim: Claim, stale_seconds: float):
        self._place, self._claim, self._stale_seconds = place, claim, stale_seconds

    @property
    def _where(self) -> str:
        return files.join(self._place, _FOLDER, f"{self._claim.run}.json")

    def take(self) -> None:
        """Makes the claim; raises Locked where another one stands."""
        for _ in range(_TRIES):
            self._write()
            others = self._others()
            if not others:
                self._claim = replace(self._claim, held=True)
                self._write()
                return
            self.give_back()
            holder = next((other for other in others if other.held), None)
            if holder:
                raise Locked(_said(self._place, holder))
            time.sleep(random.uniform(0.1, 0.6))  # both asked at once
        raise Locked(_said(self._place, others[0]))

    def check(self) -> None:
        """Raises Lost unless the claim is the only one."""
        if files.stat(self._where) is None or any(other.held for other in self._others()):
            raise Lost(
                f"{self._place}: this run was silent for so long that another one took over: it publishes nothing"
            )

    def beat(self) -> None:
        """Shows that the claim lives; one that was taken away stays away."""
        if files.stat(self._where) is not None:
            self._write()

    def give_back(self) -> None:
        """Ends the claim."""
        files.remove(self._where)

    def _write(self) -> None:
        files.write_bytes(self._place, f"{_FOLDER}/{self._claim.run}.json", records.to_json(self._claim))

    def _others(self) -> list[Claim]:
        """The living claims of others; those of the dead are removed: their names never come again."""
        entries = files.list_files(files.join(self._place, _FOLDER))
        now = max((entry.mtime_ns for entry in entries), default=0)  # ours was just written
        living = []
        for entry in entries:
            if entry.place == self._where:
                continue
            silent_seconds = (now - entry.mtime_ns) / 1e9
            try:
                claim = records.from_json(Claim, files.read_bytes(entry.place), entry.place)
            except FileNotFoundError:
                continue  # given back meanwhile
            except records.SchemaMismatch:
                claim = Claim(entry.place, "?", "", 0, "", "", held=True)  # of another release
            if _lives(claim, silent_seconds, self._stale_seconds):
                living.append(claim)
            else:
                files.remove(entry.place)
        return living


@contextmanager
def held(
    place: str, run: str, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS
) -> Iterator[Hold]:
    """Holds the folder `place` for `run`, a name that no other run has; raises Locked where another run holds it."""
    pid = os.getpid()
    claim = Claim(
        run, socket.gethostname(), _machine(), pid, _process(pid), datetime.now(UTC).isoformat("T", "seconds")
    )
    hold, ended = Hold(place, claim, stale_seconds), threading.Event()

    def beat() -> None:
        while not ended.wait(beat_seconds):
            with suppress(OSError):  # storage that stumbles: the next one may come through
                hold.beat()

    hold.take()
    thread = threading.Thread(target=beat, name="fusion-lock", daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # it dies by itself
            hold.give_back()


def is_over(place: str, run: str) -> bool:
    """Whether `run` does certainly not hold the folder `place` any more: it has no claim, or its process is gone."""
    where = files.join(place, _FOLDER, f"{run}.json")
    try:
        claim = records.from_json(Claim, files.read_bytes(where), where)
    except FileNotFoundError:
        return True
    except records.SchemaMismatch:
        return False  # of another release
    return bool(claim.machine) and claim.machine == _machine() and _process(claim.pid) != claim.process


def _lives(claim: Claim, silent_seconds: float, stale_seconds: float) -> bool:
    if claim.machine and claim.machine == _machine():
        return _process(claim.pid) == claim.process
    return silent_seconds < stale_seconds


def _machine() -> str:
    """This host, its boot and our namespace of process ids; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> str:
    """When the process began; empty where there is none (any more)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _said(place: str, claim: Claim) -> str:
    return (
        f"{place}: run {claim.run} is at work here, since {claim.claimed_at}, by process {claim.pid} of {claim.host}; "
        f"if that is gone, it is taken over {STALE_SECONDS:.0f} s after it was last heard of"
    )
