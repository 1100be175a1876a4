"""One run at a time: claims, their deaths, and who takes over."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_core import files, lock
from fusion_core.lock import Locked, Lost
from schemas import records
from schemas.job import Claim


def claims(place: Path) -> list[Path]:
    return sorted((place / "lock").glob("*.json")) if (place / "lock").is_dir() else []


def claimed(place: Path, silent_seconds: float = 0, **fields: object) -> Path:
    """A claim of another run, last written that long ago."""
    claim = Claim("other", "far-away", "far-away boot pid:[1]", 1, "1", "2026-01-01T00:00:00+00:00", held=True)
    files.write_bytes(str(place), "lock/other.json", records.to_json(replace(claim, **fields)))  # type: ignore[arg-type]
    path = place / "lock" / "other.json"
    then = time.time_ns() - int(silent_seconds * 1e9)
    os.utime(path, ns=(then, then))
    return path


def test_one_holds_and_gives_back(tmp_path: Path) -> None:
    with lock.held(str(tmp_path), "first") as hold:
        hold.check()
        said = rf"run first is at work here, since .* by process {os.getpid()} of "
        with pytest.raises(Locked, match=said), lock.held(str(tmp_path), "second"):
            pass
        assert [path.name for path in claims(tmp_path)] == ["first.json"]
    assert claims(tmp_path) == []
    with lock.held(str(tmp_path), "second"):
        pass


@pytest.mark.parametrize(("silent_seconds", "free"), [(lock.STALE_SECONDS + 5, True), (lock.STALE_SECONDS - 60, False)])
def test_a_claim_from_elsewhere_lives_as_long_as_it_is_heard_of(
    tmp_path: Path, silent_seconds: float, free: bool
) -> None:
    path = claimed(tmp_path, silent_seconds)
    if free:
        with lock.held(str(tmp_path), "mine"):
            assert not path.exists()
    else:
        with pytest.raises(Locked, match="far-away"), lock.held(str(tmp_path), "mine"):
            pass
        assert path.exists()


def test_a_claim_of_this_host_lives_as_long_as_its_process(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = lock._machine()
    assert here
    for pid, process in ((ended.pid, "1"), (os.getpid(), "1")):  # gone; and the pid of another that came later
        claimed(tmp_path, machine=here, pid=pid, process=process)
        assert lock.is_over(str(tmp_path), "other")
        with lock.held(str(tmp_path), "mine"):
            assert [path.name for path in claims(tmp_path)] == ["mine.json"]
            assert not lock.is_over(str(tmp_path), "mine")
    claimed(tmp_path)
    assert not lock.is_over(str(tmp_path), "other"), "from here one cannot tell"
    claimed(tmp_path, 10 * lock.STALE_SECONDS, machine=here, pid=os.getpid(), process=lock._process(os.getpid()))
    with pytest.raises(Locked), lock.held(str(tmp_path), "mine"):
        pass


def test_who_was_silent_for_long_finds_out(tmp_path: Path) -> None:
    with lock.held(str(tmp_path), "mine") as hold:
        other = claimed(tmp_path)
        with pytest.raises(Lost, match="publishes nothing"):
            hold.check()
        other.unlink()
        hold.check()
        hold.give_back()
        with pytest.raises(Lost):
            hold.check()
        hold.beat()
        assert claims(tmp_path) == []


def test_the_claim_is_written_anew(tmp_path: Path) -> None:
    with lock.held(str(tmp_path), "mine", beat_seconds=0.02):
        (path,) = claims(tmp_path)
        before, deadline = path.stat().st_mtime_ns, time.monotonic() + 10
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_many_at_once_one_at_a_time_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.random, "uniform", lambda low, high: 0.01 * low)
    start, inside, most, held = threading.Barrier(6), [0], [0], [0]
    guard = threading.Lock()

    def contend(name: str) -> None:
        start.wait()
        for attempt in range(10):
            try:
                with lock.held(str(tmp_path), f"{name}-{attempt}"):
                    with guard:
                        inside[0] += 1
                        most[0], held[0] = max(most[0], inside[0]), held[0] + 1
                    time.sleep(0.002)
                    with guard:
                        inside[0] -= 1
            except Locked:
                continue

    threads = [threading.Thread(target=contend, args=(f"run{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and held[0] > 0
    assert claims(tmp_path) == []
