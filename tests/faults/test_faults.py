"""Storage that fails in the middle of a job: the repeated command gives the undisturbed table, whatever it was."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from fusion_core import files, manifest, table, towers, verify
from pipelines import cli
from tests.corpora import pairs, write_tar
from tests.faults import storage

SHARDS, EACH = 4, 6


def arguments(shards: Path, output: Path) -> list[str]:
    return [
        "embed", "--input", str(shards), "--output", str(output), "--model", towers.DEMO, "--device", "cpu",
        "--workers", "1", "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, one with broken samples, and the table that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("faults")
    for i in range(SHARDS):
        members = pairs(EACH, start=i * EACH)
        if i == 1:
            members += [("broken.jpg", b""), ("broken.txt", b"no picture")]
        write_tar(folder / "shards" / f"{i:05d}.tar", members)
    assert cli.main(arguments(folder / "shards", folder / "table")) == 0
    return folder


def assert_whole(place: Path, whole: Path) -> None:
    expected, found = (table.Table.open(str(path)) for path in (whole / "table", place))
    assert pa.Table.from_batches(found.scan()).equals(pa.Table.from_batches(expected.scan()))
    assert found.dead_letters().equals(expected.dead_letters())
    assert verify.findings(str(place)) == []
    lying = sorted(path.name for folder in ("features", "dead_letters") for path in (place / folder).iterdir())
    assert lying == sorted(
        path.name for folder in ("features", "dead_letters") for path in (whole / "table" / folder).iterdir()
    )
    assert not list((place / ".tmp").iterdir())


def disturb(whole: Path, place: Path, fault: storage.Fault, lost: Callable[[str], bool] = lambda name: False) -> int:
    """The exit code of a run on failing storage; whatever a reader finds there then is whole."""
    with storage.failing(fault, lost):
        code = cli.main(arguments(whole / "shards", place))
    if (place / "table.json").exists() and list((place / "features").glob("*")):
        expected = pa.Table.from_batches(table.Table.open(str(whole / "table")).scan())
        by_key = {row["key"]: row for row in expected.select(["key", "row", "shard", "caption"]).to_pylist()}
        for record in manifest.read(str(place)).live:
            if record.features and (place / record.features.path).exists():
                rows = table.Table.open(str(place)).read_part(record.features, ["key", "row", "shard", "caption"])
                assert all(by_key[row["key"]] == row for row in rows.to_pylist())
    return code


def repeat(whole: Path, place: Path) -> None:
    assert cli.main(arguments(whole / "shards", place)) == 0
    assert_whole(place, whole)


FEW = {
    "full disk": lambda seed: storage.from_(3 + seed % 20, "write", errno.ENOSPC),
    "broken read": lambda seed: storage.at(seed % 12, "open", errno.EIO),
    "broken listing": lambda seed: storage.at(seed % 20, "list", errno.EIO),
    "failed rename": lambda seed: storage.at(seed % 12, "publish", errno.EIO),
    "one error in 20": lambda seed: storage.one_in(20, seed),
    "slow": lambda seed: storage.slow(0.002),
}


@pytest.mark.parametrize("kind", FEW)
def test_a_job_on_failing_storage_repeated_gives_the_undisturbed_table(whole: Path, tmp_path: Path, kind: str) -> None:
    code = disturb(whole, tmp_path / "table", FEW[kind](5))
    assert code in ((0,) if kind == "slow" else (0, 1))
    repeat(whole, tmp_path / "table")


@pytest.mark.parametrize("lost", ["table.json", "features/00002", "manifest/00002", "manifest/snapshot"])
def test_a_store_that_loses_a_file_is_found_out(whole: Path, tmp_path: Path, lost: str) -> None:
    code = disturb(whole, tmp_path / "table", storage.never, lambda name: name.startswith(lost))
    assert code == (0 if lost == "manifest/snapshot" else 1)  # the records that it would have replaced are kept
    repeat(whole, tmp_path / "table")


def test_the_order_of_listings_does_not_matter(whole: Path, tmp_path: Path) -> None:
    for seed in range(2):
        with storage.failing(storage.never, shuffled=seed):
            assert cli.main(arguments(whole / "shards", tmp_path / "table")) == 0
            assert_whole(tmp_path / "table", whole)


def test_a_clock_that_jumps_takes_nothing_and_leaves_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, chance, clock, begin = tmp_path / "table", random.Random(3), time.time, files.PendingFile.__init__

    def jumping() -> float:
        return clock() + 24 * 3600 * chance.choice([-3650, -2, 0, 2, 3650])

    def begin_then(self: files.PendingFile, folder: str) -> None:
        with beginning:  # a clock that jumps between a file's making and its locking is beyond us
            begin(self, folder)
        os.utime(self.path, (jumping(),) * 2)

    (place / ".tmp").mkdir(parents=True)
    for days in (-3650, -2, 2, 3650):  # what was killed while the clock was wrong
        (place / ".tmp" / f"{days}").write_bytes(b"half a part")
        os.utime(place / ".tmp" / f"{days}", (clock() + 24 * 3600 * days,) * 2)
    ended, beginning = threading.Event(), threading.Lock()

    def clean() -> None:
        while not ended.wait(0.001):
            with beginning:
                files.remove_stale_temporaries(str(place))

    with monkeypatch.context() as patch:
        patch.setattr(files, "time", SimpleNamespace(time=jumping, monotonic=time.monotonic))
        patch.setattr(files.PendingFile, "__init__", begin_then)
        janitor = threading.Thread(target=clean)
        janitor.start()
        code = cli.main(arguments(whole / "shards", place))
        ended.set()
        janitor.join()
    assert code == 0
    repeat(whole, place)


def harm(place: Path, chance: random.Random) -> Path:
    """Cuts or changes one file that a table is made of."""
    path = chance.choice(
        [path for name in ("features", "dead_letters", "manifest") for path in (place / name).iterdir()]
    )
    data = bytearray(path.read_bytes())
    where = chance.randrange(len(data))
    if chance.random() < 0.5:
        data = data[:where]
    else:
        data[where] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path


def test_what_is_thrown_away_on_a_full_disk_takes_no_more_room(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), files.PendingFile(str(tmp_path)) as pending:
        pending._stream.close()
        pending._stream = open("/dev/full", "wb")  # noqa: SIM115 (closed by the pending file)
        pending.write(b"held in a buffer")
        pending.publish("never")
    assert pending.closed and not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_verify_names_a_damaged_file_and_repairs_it(
    whole: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "table"
    shutil.copytree(whole / "table", place)
    damaged = harm(place, random.Random(seed))
    assert cli.main(["verify", str(place)]) == 1
    assert damaged.name in capsys.readouterr().out
    assert cli.main(["verify", str(place), "--repair", "--workers", "1", "--quiet"]) == 0
    assert f"{place}: whole" in capsys.readouterr().out
    assert_whole(place, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_many_jobs_on_failing_storage(whole: Path, tmp_path: Path, kind: str) -> None:
    for seed in range(5 if kind == "slow" else 30):
        place = tmp_path / f"table-{seed}"
        assert disturb(whole, place, FEW[kind](seed)) in (0, 1), seed
        repeat(whole, place)


@pytest.mark.slow
def test_many_damaged_files_are_repaired(whole: Path, tmp_path: Path) -> None:
    beyond_repair = 0
    for seed in range(40):
        place = tmp_path / f"table-{seed}"
        shutil.copytree(whole / "table", place)
        chance = random.Random(seed)
        for _ in range(chance.randrange(1, 4)):
            harm(place, chance)
        if cli.main(["verify", str(place), "--repair", "--workers", "1", "--quiet"]) == 0:
            assert_whole(place, whole)
        else:  # neither the manifest nor the part could say of which shard it was
            beyond_repair += 1
            repeat(whole, place)
    assert beyond_repair <= 4


@pytest.mark.slow
def test_two_jobs_at_once_write_one_table(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", *arguments(whole / "shards", tmp_path / "table")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert_whole(tmp_path / "table", whole)
