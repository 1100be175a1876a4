"""Several launchers on one table, storage that stumbles, and what dead launchers leave behind."""

import errno
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_core import files, manifest, shards, table, towers, verify
from pipelines import cli, workers
from schemas.feature_table import InputSpec
from tests.corpora import pairs, write_tar

SHARDS, EACH, LAUNCHERS = 9, 40, 3


def command(folder: Path, output: str, *options: str) -> list[str]:
    return [
        "embed", "--input", f"{folder}/*.tar", "--output", f"{folder}/{output}", "--model", towers.DEMO,
        "--device", "cpu", "--workers", "1", "--quiet", *options,
    ]  # fmt: skip


def share(number: int) -> tuple[str, ...]:
    return "--shard-index", str(number), "--num-shards", str(LAUNCHERS)


def parts(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / "features").iterdir())}


def records(place: Path) -> set[str]:
    return set(manifest.read(str(place)).by_unit) if place.exists() else set()


def test_launchers_at_once_make_one_table_and_a_dead_one_is_made_good(tmp_path: Path) -> None:
    for i in range(SHARDS):
        write_tar(tmp_path / f"{i:05d}.tar", pairs(EACH, start=i * EACH))
    assert cli.main(command(tmp_path, "one")) == 0
    place = tmp_path / "many"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "pyarrow.parquet", "apache_beam"])
    processes = [
        context.Process(target=cli.main, args=(command(tmp_path, "many", *share(i)),)) for i in range(LAUNCHERS)
    ]
    for process in processes:
        process.start()
    theirs, victim = max(((_units_of(tmp_path, i), i) for i in range(LAUNCHERS)), key=lambda item: len(item[0]))
    doomed = processes[victim]
    assert len(theirs) >= SHARDS / LAUNCHERS
    deadline = time.monotonic() + 300
    while not records(place) & theirs:
        assert time.monotonic() < deadline and doomed.is_alive()
        time.sleep(0.002)
    doomed.kill()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [-9 if i == victim else 0 for i in range(LAUNCHERS)]
    whole = records(tmp_path / "one")
    assert whole - theirs <= records(place) < whole
    assert cli.main(command(tmp_path, "many", *share(victim))) == 0
    assert parts(place) == parts(tmp_path / "one")
    assert verify.findings(str(place)) == []
    opened, alone = (table.Table.open(str(folder)) for folder in (place, tmp_path / "one"))
    assert [part.sha256 for part in opened.parts] == [part.sha256 for part in alone.parts]
    assert opened.num_rows == SHARDS * EACH


def _units_of(folder: Path, launcher: int) -> set[str]:
    import zlib

    found = [unit.id for unit in shards.plan([f"{folder}/*.tar"], InputSpec())]
    return {unit for unit in found if zlib.crc32(unit.encode()) % LAUNCHERS == launcher}


def test_a_unit_is_tried_again_when_storage_stumbles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", pairs(5, start=i * 5))
    monkeypatch.setattr(workers, "_PAUSES_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(files, "open_input", _failing(files.open_input, "00001.tar", 2, errno.EIO))
    monkeypatch.setattr(files.PendingFile, "publish", _failing(files.PendingFile.publish, "features/00002", 1, None))
    assert cli.main(command(tmp_path, "table")) == 0
    (run,) = manifest.read_runs(str(tmp_path / "table"))
    assert (run.units_done, run.units_failed, run.samples_done) == (3, 0, 15), "samples of a failed try count once"
    assert verify.findings(str(tmp_path / "table")) == []

    monkeypatch.setattr(files, "open_input", _failing(files.open_input, "00000.tar", 3, errno.EIO))
    assert cli.main(command(tmp_path, "always")) == 1
    assert "1 of 3 units failed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_what_lasts_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_tar(tmp_path / "00000.tar", pairs(5))
    monkeypatch.setattr(files, "open_input", _failing(files.open_input, "00000.tar", 1, number))
    assert cli.main(command(tmp_path, "table")) == 1


def _failing(real: Callable[..., object], name: str, times: int, number: int | None) -> Callable[..., object]:
    """`real`, that fails so many times for what has this name in it; without a number as a store's client does."""
    left = [times]

    def stumble(*arguments: object) -> object:
        if left[0] and any(isinstance(value, str) and name in value for value in arguments):
            left[0] -= 1
            raise OSError(number, os.strerror(number)) if number else OSError("AWS Error SLOW_DOWN")
        return real(*arguments)

    return stumble


def test_the_janitor_spares_what_a_living_launcher_may_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    place, remote = str(tmp_path / "table"), "s3://corpus/table"
    (tmp_path / "tmp" / "fusion-index-of-another").write_bytes(b"not ours to judge")
    for folder in (place, remote):
        with files.PendingFile(folder) as theirs:
            theirs.write(b"half a part")
            theirs.flush()
            scratch = theirs.path.parent
            stale, ahead = (scratch / f"{theirs.path.name[:-4]}{end}" for end in ("aaaa", "bbbb"))
            for path, seconds in ((stale, -25 * 3600), (ahead, 25 * 3600)):
                path.write_bytes(b"left behind")
                os.utime(path, (time.time() + seconds,) * 2)
            for seconds in (-25 * 3600, 25 * 3600):  # the clock has jumped since it was begun
                os.utime(theirs.path, (time.time() + seconds,) * 2)
                assert files.remove_stale_temporaries(folder) == (2 if seconds < 0 else 0)
                assert not stale.exists() and not ahead.exists() and theirs.path.exists()
            fresh = scratch / stale.name
            fresh.write_bytes(b"a moment ago, by somebody whose filesystem has no locks")
            assert files.remove_stale_temporaries(folder) == 0
            fresh.unlink()
        assert not theirs.path.exists()
    assert (tmp_path / "tmp" / "fusion-index-of-another").exists()
