"""`kill -9` in the middle of the job: nothing lost, nothing twice, nothing unreadable ever visible."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_core import table, towers
from fusion_core.demo.shards import write_shards

SHARDS, EACH = 24, 250


def command(folder: Path, output: str) -> list[str]:
    return [
        sys.executable, "-m", "pipelines.cli", "embed", "--input", f"{folder}/shards", "--output", f"{folder}/{output}",
        "--model", towers.DEMO, "--quiet",
    ]  # fmt: skip


def recorded(place: Path) -> dict[str, table.ManifestRecord]:
    return {record.unit.id: record for record in table.read_manifest(str(place)).live}


class Reader(threading.Thread):
    """Opens, every 100 ms, whatever a user could open."""

    def __init__(self, place: Path):
        super().__init__(daemon=True)
        self.place, self.ended, self.looks, self.problems = place, threading.Event(), 0, list[str]()

    def run(self) -> None:
        while not self.ended.wait(0.1):
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


@pytest.mark.slow
def test_killed_runs_repeated_give_the_undisturbed_table(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", SHARDS * EACH, EACH, seed=11)
    place = tmp_path / "killed"
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    reader = None
    redone = 0
    for kill in range(4):
        before = recorded(place) if place.exists() else {}
        run = subprocess.Popen(command(tmp_path, "killed"))
        while run.poll() is None and len(recorded(place)) < len(before) + 3:
            time.sleep(0.02)
            if reader is None and (place / "table.json").exists():
                reader = Reader(place)
                reader.start()
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05 * kill)
        run.send_signal(signal.SIGKILL)
        run.wait()
        after = recorded(place)
        assert all(after[unit] == record for unit, record in before.items()), "what was recorded was done again"
        redone += len(after) - len(before)
    subprocess.run(command(tmp_path, "killed"), check=True, capture_output=True)
    assert reader is not None
    reader.ended.set()
    reader.join()
    assert reader.problems == []
    assert reader.looks > 10
    assert table.verify(str(place)) == []
    whole, killed = (table.Table.open(str(tmp_path / name)) for name in ("whole", "killed"))
    assert redone < SHARDS
    assert [part.path for part in killed.parts] == [part.path for part in whole.parts]
    assert pa.Table.from_batches(killed.scan()).equals(pa.Table.from_batches(whole.scan()))
    assert killed.dead_letters().equals(whole.dead_letters())
    assert sorted(path.name for path in (place / "features").iterdir()) == sorted(
        part.path.removeprefix("features/") for part in whole.parts
    )
