"""A table follows its corpus: what a series of changes leaves equals a build from scratch on what is left."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_core import files, images, table, towers
from pipelines import cli
from tests.corpora import pairs, photo, write_tar

Run = Callable[..., int]
EACH = 12


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `fusion embed` on the shards in tmp_path/shards into tmp_path/table."""

    def embed(*options: str, output: str = "table", input: str = "shards") -> int:
        arguments = ["--input", str(tmp_path / input), "--output", str(tmp_path / output), "--model", towers.DEMO]
        return cli.main(["embed", *arguments, "--device", "cpu", "--workers", "1", "--quiet", *options])

    return embed


def shard(folder: Path, number: int) -> Path:
    """A shard of good samples, two that are broken, and a picture that stands there twice."""
    members = pairs(EACH, start=number * EACH)
    members += [(f"broken{number}.jpg", b"GIF89a, cut"), (f"empty{number}.jpg", b"")]
    members += [(f"twice{number}.jpg", photo(number * EACH)), (f"twice{number}.txt", b"again")]
    return write_tar(folder / f"{number:05d}.tar", members)


def write_list(folder: Path, *keys: str) -> str:
    (folder / "list.txt").write_text("".join(f"{key}\n" for key in keys))
    return str(folder / "list.txt")


def read(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def assert_same_tables(found: Path, expected: Path) -> None:
    """To the bit, and with the same files: so nothing of what left lies anywhere."""
    ours, theirs = (table.Table.open(str(place)) for place in (found, expected))
    assert read(found).equals(read(expected))
    assert ours.dead_letters().equals(theirs.dead_letters())
    assert [part.path for part in ours.parts] == [part.path for part in theirs.parts]
    assert set(table.list_parts(str(found))) == set(table.list_parts(str(expected)))
    for ours_, theirs_ in zip(ours.records, theirs.records, strict=True):
        names = ("rows_in", "rows_out", "rows_dead", "rows_opted_out", "opted_out", "opt_out_sha256", "repeated_keys")
        assert [getattr(ours_, name) for name in names] == [getattr(theirs_, name) for name in names]
        assert ours_.rows_in == ours_.rows_out + ours_.rows_dead + ours_.rows_opted_out
    assert table.verify(str(found)) == []


def holding(folder: Path, texts: list[bytes]) -> list[str]:
    """The files below a folder in which one of the texts stands."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(text in path.read_bytes() for text in texts)
    ]


def test_shards_added_and_removed_and_keys_opted_out_equal_a_build_from_scratch(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [shard(tmp_path / "shards", number) for number in range(3)]
    assert run() == cli.DONE
    shard(tmp_path / "shards", 3)
    shards[0].unlink()
    gone = ["000013", "000014", "broken1", "twice1", "000040"]
    keys = write_list(tmp_path, *gone, "no such key", "000001")
    capsys.readouterr()
    assert run("--opt-out", keys, "--remove-missing", "40%") == cli.DONE
    said = capsys.readouterr().out
    assert "45 samples = 35 rows + 5 dead letters + 5 opted out" in said
    assert "1 units done, 2 stood already, 0 failed" in said
    assert "1 units of 13 rows left the table" in said
    assert "5 of its 7 keys found, 5 samples left out; this run took 4 out of recorded units" in said
    assert "2 listed keys were found in no unit of the table, e.g. no such key, 000001" in said
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")
    assert holding(tmp_path / "table" / "features", [b"000013"]) == []
    assert holding(tmp_path / "table", [b"broken1"]) == []

    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "table"), "--json"]) == cli.DONE
    status = json.loads(capsys.readouterr().out)
    assert (status["opted_out"], status["run"]["rows_opted_out"], status["run"]["rows_removed"]) == (5, 4, 13)
    assert status["run"]["opt_out_sha256"] == files.sha256(keys)
    assert "5</b>opted out" in (tmp_path / "table" / "report.html").read_text()


def test_taking_keys_out_needs_no_shard_and_no_model(tmp_path: Path, run: Run) -> None:
    for number in range(2):
        shard(tmp_path / "shards", number)
    assert run() == cli.DONE
    keys = write_list(tmp_path, "000000", "empty1")
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    shard(tmp_path / "shards", 9)  # another shard is all that is left
    shutil.copytree(tmp_path / "shards", tmp_path / "others")
    (tmp_path / "table" / "elsewhere").mkdir()
    script = (
        "import sys; from pipelines import cli, plan; from fusion_core import shards\n"
        "shards.plan = lambda *_: iter(())\n"  # nothing that could be read
        f"code = cli.main(['retry', {str(tmp_path / 'table')!r}, '--opt-out', {keys!r}, '--quiet'])\n"
        "print(code, 'open_clip' in sys.modules)"
    )
    del script
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "table" / "features").iterdir()}
    assert run("--opt-out", keys, output="table") == cli.DONE
    ours, fresh = read(tmp_path / "table"), read(tmp_path / "fresh")
    assert ours.slice(0, fresh.num_rows).equals(fresh) and ours.num_rows == fresh.num_rows + EACH + 1
    stayed = [path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns == time]
    assert len(stayed) == 1  # of the shard that lost but a dead letter
