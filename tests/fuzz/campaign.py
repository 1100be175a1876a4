"""Damaged files at every door, in a child of its own: no crash, no hang, no other error, memory within limits.

    python -m tests.fuzz.campaign --minutes 10 [--doors tar image …] [--seed 1]
    python -m tests.fuzz.campaign --minutes 10 --doors tar --atheris     # guided by coverage; needs the package atheris

What is found is written to a folder, one file each, and told; the exit code is 1.
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.doors import DOORS, Door, damaged

_SECONDS = 5  # of CPU: other work on the machine must not look like a hang
_BYTES = 1 << 30  # beyond what the child has when it begins


@dataclass(frozen=True)
class Finding:
    """A file that a door did not stand."""

    door: str
    name: str
    data: bytes
    what: str

    @property
    def kind(self) -> str:
        """The same for findings that are probably one: the error's type and where it was raised."""
        lines = self.what.strip().splitlines()
        places = [line.strip() for line in lines if line.strip().startswith("File ")]
        return f"{self.door} {places[-1:]} {lines[-1].partition(':')[0]}"


def hunt(
    name: str, make: Callable[[Path], Door], seed: int, cases: int = 0, seconds: float = 0.0
) -> tuple[int, list[Finding]]:
    """How many files were tried at the door that `make` makes, and the first that it did not stand, if any.

    Stops after so many cases or seconds, whichever is given.
    """
    with tempfile.TemporaryDirectory(prefix="fusion-fuzz-") as folder:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, name, make, seed, cases, seconds, folder))
        child.start()
        theirs.close()
        tried, finding = 0, None
        try:
            while True:
                tried, finding = ours.recv()
        except EOFError:
            child.join()
        if finding is None and child.exitcode:
            finding = _in_hand(name, Path(folder), child.exitcode)
        return tried, [finding] if finding else []


def _child(
    told: Any, name: str, make: Callable[[Path], Door], seed: int, cases: int, seconds: float, folder: str
) -> None:
    faulthandler.enable()
    scratch, hand = Path(folder) / "scratch", Path(folder) / "hand"
    scratch.mkdir()
    door = make(scratch)
    for seed_name, data in door.seeds:  # also what is loaded at the first use
        _try(door, Path(folder) / "seeds", seed_name, data)
    _limit_memory()
    rng, end, tried = random.Random(f"{name} {seed}"), time.monotonic() + seconds, 0
    while tried < cases or time.monotonic() < end:
        seed_name, good = rng.choice(door.seeds)
        data = damaged(good, door.seeds, rng)
        hand.write_bytes(seed_name.encode() + b"\n" + data)
        what = _try(door, scratch, seed_name, data)
        tried += 1
        if what:
            told.send((tried, Finding(name, seed_name, data, what)))
            return
        if tried % 100 == 0:
            told.send((tried, None))
    told.send((tried, None))


def _try(door: Door, scratch: Path, name: str, data: bytes) -> str:
    """What went wrong; empty where nothing did. A hang ends the process."""
    with tempfile.TemporaryDirectory(dir=scratch.parent) as folder:
        if scratch.name == "scratch":
            for path in scratch.iterdir():
                if path.is_file():
                    os.link(path, Path(folder) / path.name)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + _SECONDS + 1, resource.RLIM_INFINITY))
        try:
            door.try_one(Path(folder), name, data)
        except Exception:
            return traceback.format_exc()
    return ""


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_hand(door: str, folder: Path, code: int) -> Finding:
    """What a child that ended was at."""
    name, data = b"", b""
    if (folder / "hand").exists():
        name, _, data = (folder / "hand").read_bytes().partition(b"\n")
    ended = "hung" if code == -signal.SIGXCPU else f"ended with {code}"
    return Finding(door, name.decode(), data, f"its process {ended}")


def main(argv: Sequence[str] | None = None) -> int:
    """Hunts at the doors in turn; returns 1 when any file got through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each door (default: %(default)s)")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where findings go")
    parser.add_argument("--atheris", action="store_true", help="guided by the coverage of our own code; one door")
    args = parser.parse_args(argv)
    if args.atheris:
        return _guided(args.doors[0], args.minutes, args.found)
    found: dict[str, Finding] = {}
    for door in args.doors:
        start, seed, tried, hits = time.monotonic(), args.seed, 0, 0
        while (left := 60 * args.minutes - (time.monotonic() - start)) > 1:
            n, findings = hunt(door, DOORS[door], seed, seconds=left)
            tried, seed = tried + n, seed + 1_000_003  # after a finding with other files
            hits += len(findings)
            found |= {finding.kind: finding for finding in findings}
        print(f"{door}: {tried:,} files, {hits} findings", flush=True)
    for number, finding in enumerate(found.values()):
        args.found.mkdir(exist_ok=True)
        place = args.found / f"{finding.door}-{number}-{Path(finding.name).name}"
        place.write_bytes(finding.data)
        print(f"\n{place}: {finding.what}", flush=True)
    return 1 if found else 0


def _guided(name: str, minutes: float, found: Path) -> int:
    """Runs libFuzzer with our own kinds of damage; it ends the process itself."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["fusion_core", "schemas", "tarfile"], enable_loader_override=False):
        for module in [module for module in sys.modules if module.startswith(("fusion_core", "schemas", "tests.fuzz"))]:
            del sys.modules[module]
        from tests.fuzz.doors import DOORS as INSTRUMENTED
    folder = Path(tempfile.mkdtemp(prefix="fusion-fuzz-"))
    (folder / "scratch").mkdir()
    (folder / "corpus").mkdir()
    found.mkdir(exist_ok=True)
    door = INSTRUMENTED[name](folder / "scratch")
    for number, (_, data) in enumerate(door.seeds):
        (folder / "corpus" / str(number)).write_bytes(bytes([number]) + data)

    def one(data: bytes) -> None:
        if data:
            seed_name = door.seeds[data[0] % len(door.seeds)][0]
            with tempfile.TemporaryDirectory(dir=folder) as place:
                door.try_one(Path(place), seed_name, data[1:])

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = (
            atheris.Mutate(data, max_size)
            if seed % 2
            else data[:1] + damaged(data[1:], door.seeds, random.Random(seed))
        )
        return bytes(changed[:max_size])

    longest = 2 * max(len(data) for _, data in door.seeds)
    options = [f"-max_total_time={int(60 * minutes)}", "-timeout=30", "-rss_limit_mb=6000", f"-max_len={longest}"]
    argv = [sys.argv[0], *options, f"-artifact_prefix={found}/{name}-", str(folder / "corpus")]
    atheris.Setup(argv, one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
