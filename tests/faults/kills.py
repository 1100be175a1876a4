"""Kill anything, lose nothing: `kill -9` at random of the launcher with all its processes, of single workers, and
inside commits, while a reader opens the table every 100 ms.

    python -m tests.faults.kills [--shards 40] [--each 500] [--kills 50] [--seed 1] [--folder DIR]

Told is what was embedded again for each kill, in percent of the corpus. The exit code is 1 where anything was lost,
twice, unreadable, or other than in the undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import manifest, table, towers, verify
from fusion_core.demo.shards import write_shards

ROOT = Path(__file__).parents[2]
PUBLISHED = ("features/", "dead_letters/", "manifest/", "manifest/snapshot", ".tmp/kept", "runs/")
COMMIT = (*(f"{when} {name}" for when in ("before", "after") for name in PUBLISHED), "before remove")


class Reader(threading.Thread):
    """Opens, every 100 ms, whatever a user could open."""

    def __init__(self, place: Path):
        super().__init__(daemon=True)
        self.place, self.ended, self.looks, self.problems = place, threading.Event(), 0, list[str]()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            if not (self.place / "table.json").exists():
                continue
            try:
                for path in self.place.glob("features/*.parquet"):
                    pq.read_table(path, columns=["row", "image_embedding"])
                opened = table.Table.open(str(self.place))
                keys = [
                    (s, r) for b in opened.scan(["shard", "row"]) for s, r in zip(*b.to_pydict().values(), strict=True)
                ]
                if len(set(keys)) != len(keys):
                    self.problems.append("rows twice")
                self.looks += 1
            except Exception as error:
                self.problems.append(repr(error))


@dataclass
class Campaign:
    """One table that is made in spite of all."""

    folder: Path
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def start(self, output: str) -> subprocess.Popen[bytes]:
        """The job, in a process group of its own."""
        self.runs += 1
        command = [
            sys.executable, "-m", "pipelines.cli", "embed", "--input", f"{self.folder}/shards", "--output",
            f"{self.folder}/{output}", "--model", towers.DEMO, "--device", "cpu", "--workers", "2", "--quiet",
        ]  # fmt: skip
        notes = self.folder / f"notes-{output}"
        notes.mkdir(exist_ok=True)
        (notes / "sitecustomize.py").write_text("import tests.faults.kill_points\n")
        environment = os.environ | {"FUSION_KILLS": str(notes), "PYTHONPATH": f"{notes}:{ROOT}"}
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def embedded(self, output: str, tower: str = "images") -> int:
        """How many rows were embedded so far, by whomever."""
        return sum(int(rows) for _, one, rows in self.notes(output) if one == tower)

    def notes(self, output: str) -> list[list[str]]:
        """Process, tower and rows of each forward."""
        with suppress(FileNotFoundError):
            return [line.split() for line in (self.folder / f"notes-{output}/embedded").read_text().splitlines()]
        return []

    def disturb(self, output: str, corpus: int, most: int) -> None:
        """Runs the job until it is done, with at most so many kills; what was recorded is never done again."""
        while True:
            before = recorded(self.folder / output)
            run = self.start(output)
            while run.poll() is None and sum(self.kills.values()) < most:
                self.kill(output, run, corpus)
            code = run.wait()
            end_group(run)
            (self.folder / f"notes-{output}/armed").unlink(missing_ok=True)
            after = recorded(self.folder / output)
            if any(after.get(unit) != record for unit, record in before.items()):
                self.problems.append("what was recorded was done again")
            if code == 0:
                return
            if code not in (1, -signal.SIGKILL):
                self.problems.append(f"exit code {code}")

    def kill(self, output: str, run: subprocess.Popen[bytes], corpus: int) -> None:
        """One kill, after some more rows; none if the job ends before."""
        goal = self.embedded(output) + int(corpus * self.chance.uniform(0, 0.015))
        while run.poll() is None and self.embedded(output) <= goal:
            time.sleep(0.01)
        kind = self.chance.choices(["all", "worker", "commit"], [4, 3, 3])[0]
        if run.poll() is not None:
            return
        if kind == "all":
            end_group(run)
            run.wait()
            self.kills[kind] += 1
        elif kind == "worker":
            pids = {int(pid) for pid, _, _ in self.notes(output)[-20:]}
            alive = sorted(pid for pid in pids if os.path.exists(f"/proc/{pid}") and pid != run.pid)
            if alive:
                os.kill(self.chance.choice(alive), signal.SIGKILL)
                self.kills[kind] += 1
        else:
            self.kill_in_commit(output, run)

    def kill_in_commit(self, output: str, run: subprocess.Popen[bytes]) -> None:
        """Has the next process that comes to a step of a commit end itself there."""
        armed, step = self.folder / f"notes-{output}/armed", self.chance.choice(COMMIT)
        pending = armed.with_suffix(".new")
        pending.write_text(step)
        pending.rename(armed)
        for _ in range(1000):
            if not armed.exists():
                self.kills[step] += 1
                time.sleep(0.2)  # a launcher that has killed itself is told by `poll` only then
                return
            if run.poll() is not None:
                return
            time.sleep(0.02)
        armed.unlink(missing_ok=True)


def end_group(run: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a job."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def recorded(place: Path) -> dict[str, table.ManifestRecord]:
    """The units that stand."""
    if not (place / "table.json").exists():
        return {}
    return {record.unit.id: record for record in manifest.read(str(place)).live}


def differences(place: Path, whole: Path) -> list[str]:
    """What a table has or lacks that the undisturbed one lacks or has."""
    found, expected = table.Table.open(str(place)), table.Table.open(str(whole))
    problems = [f"verify: {problem}" for problem in verify.findings(str(place))]
    if not pa.Table.from_batches(found.scan()).equals(pa.Table.from_batches(expected.scan())):
        problems.append("other rows")
    if not found.dead_letters().equals(expected.dead_letters()):
        problems.append("other dead letters")
    lying = [{str(path.relative_to(one)) for path in one.glob("*/*.parquet")} for one in (place, whole)]
    other = {path for path in lying[0] ^ lying[1] if not path.startswith("manifest/")}
    return [*problems, *(f"{path} is only in one of them" for path in sorted(other))]


def campaign(folder: Path, shards: int, each: int, kills: int, seed: int) -> dict[str, object]:
    """All kills, on as many tables as it takes; what was found."""
    write_shards(folder / "shards", shards * each, each, seed=11)
    self = Campaign(folder, random.Random(seed))
    started = time.monotonic()
    if self.start("whole").wait():
        raise SystemExit(f"the undisturbed run failed: {(folder / 'log').read_text()}")
    undisturbed = time.monotonic() - started
    corpus = {tower: self.embedded("whole", tower) for tower in ("images", "captions")}
    again, looks, tables, left = Counter[str](), 0, 0, 0
    while sum(self.kills.values()) < kills and tables < 5:
        tables += 1
        output = f"killed-{tables}"
        reader = Reader(folder / output)
        reader.start()
        self.disturb(output, corpus["images"], kills)
        reader.ended.set()
        reader.join()
        looks += reader.looks
        self.problems += [*reader.problems[:5], *differences(folder / output, folder / "whole")]
        again.update({tower: self.embedded(output, tower) - rows for tower, rows in corpus.items()})
        left += len(list((folder / output / ".tmp").iterdir()))
    number = sum(self.kills.values())
    return {
        "shards": shards, "samples_each": each, "seed": seed, "corpus": corpus,
        "undisturbed_seconds": round(undisturbed),
        "seconds": round(time.monotonic() - started), "kills": number, "by_kind": dict(self.kills), "runs": self.runs,
        "tables": tables, "reader_looks": looks, "embedded_again": dict(again),
        "percent_redone_per_kill": {
            tower: round(100 * rows / max(1, number) / corpus[tower], 3) for tower, rows in again.items()
        },
        "temporary_files_left": left, "problems": self.problems,
    }  # fmt: skip


def main() -> int:
    """One campaign, told as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--each", type=int, default=500, help="samples of a shard (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        found = campaign(folder, args.shards, args.each, args.kills, args.seed)
    print(json.dumps(found, indent=1))
    return bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
