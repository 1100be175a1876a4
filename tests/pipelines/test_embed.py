"""The embedding job through the command line: resume, increments, refusals, exit codes."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from safetensors.numpy import load_file, save_file

from fusion_core import files, manifest, shards, table, towers, unit, verify
from pipelines import change, cli, deal, embed, plan, runner, workers
from schemas.feature_table import TableSpec
from tests.corpora import assert_same_rows, pairs, photo, write_tar

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `fusion embed` on the shards below tmp_path into tmp_path/table."""

    def embed_shards(*options: str, input: str = "*.tar", output: str = "table") -> int:
        return cli.main(
            [
                "embed",
                "--input",
                str(tmp_path / input),
                "--output",
                str(tmp_path / output),
                "--model",
                towers.DEMO,
                *options,
            ]
        )

    return embed_shards


def corpus(folder: Path, shards: int = 3, each: int = 20) -> list[Path]:
    return [write_tar(folder / f"{i:05d}.tar", pairs(each, start=i * each)) for i in range(shards)]


def read(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def parts(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / "features").iterdir())}


def fails_for(prefix: str) -> Callable[..., None]:
    """A PendingFile.publish that finds the disk full for names that begin so."""
    publish = files.PendingFile.publish

    def full(self: files.PendingFile, name: str, **how: bool) -> None:
        if name.startswith(prefix):
            raise OSError(28, "No space left on device")
        publish(self, name, **how)

    return full


def test_shards_become_a_table_and_a_second_run_does_nothing(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path)
    assert run() == 0
    assert "60 samples = 60 rows + 0 dead letters" in capsys.readouterr().out
    rows = read(tmp_path / "table")
    assert rows["key"].to_pylist() == [f"{i:06d}" for i in range(60)]
    (snapshot,) = (tmp_path / "table" / "manifest").iterdir()
    assert snapshot.name.startswith("snapshot-")
    assert "Feature table" in (tmp_path / "table" / "report.html").read_text()
    before = parts(tmp_path / "table")

    monkeypatch.setattr(embed, "_run_pipeline", lambda *_: pytest.fail("nothing is left to do"))
    assert run() == 0
    assert "0 units done, 3 stood already, 0 failed" in capsys.readouterr().out
    assert parts(tmp_path / "table") == before


def test_a_run_without_work_loads_no_towers_and_still_knows_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path, shards=1, each=4)
    model = shutil.copytree(Path(towers.__file__).parent / "demo" / "model", tmp_path / "model")
    argv = ["embed", "--input", f"{tmp_path}/*.tar", "--output", f"{tmp_path}/table", "--model", str(model), "--quiet"]
    assert cli.main(argv) == 0
    script = f"import sys; from pipelines import cli; code = cli.main({argv}); print(code, 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    weights = model / "open_clip_model.safetensors"
    save_file(
        {name: np.asarray(value + (name == "logit_scale")) for name, value in load_file(weights).items()}, weights
    )
    towers._LOADED.clear()
    assert cli.main(argv) == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_new_changed_and_vanished_parts_are_done_and_nothing_else(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = corpus(tmp_path)
    assert run("--workers", "1") == 0
    before = parts(tmp_path / "table")
    write_tar(tmp_path / "00003.tar", pairs(5, start=900))
    write_tar(shards[1], [*pairs(20, start=20), ("extra.jpg", photo(5))])
    (path,) = (tmp_path / "table" / "features").glob("00002-*")
    path.unlink()
    capsys.readouterr()
    monkeypatch.setattr(towers, "load", lambda *_: pytest.fail("only the workers need the towers"))
    assert run("--workers", "2", "--device", "cpu") == 0
    assert "3 units done, 1 stood already" in capsys.readouterr().out
    after = parts(tmp_path / "table")
    assert len(after) == 4
    assert {name for name in before if name in after} == {name for name in before if not name.startswith("00001-")}
    assert all(after[name] == before[name] for name in before if name in after)
    assert read(tmp_path / "table").num_rows == 66
    assert cli.main(["verify", str(tmp_path / "table")]) == 0


def test_the_table_does_not_depend_on_workers_or_launchers(tmp_path: Path, run: Run) -> None:
    corpus(tmp_path, shards=12, each=5)  # so many that neither launcher is left without any
    assert run("--workers", "1", output="one") == 0
    assert run("--workers", "3", output="three") == 0
    for share in range(2):
        assert run("--shard-index", str(share), "--num-shards", "2", output="launchers") == 0
        found = read(tmp_path / "launchers").num_rows
        assert (found == 60) == (share == 1)
    assert parts(tmp_path / "one") == parts(tmp_path / "three") == parts(tmp_path / "launchers")


def test_a_unit_that_fails_does_not_take_its_neighbours_along(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path)
    real = files.open_input

    def open_input(place: str) -> io.BufferedIOBase:
        if place.endswith("00001.tar"):
            raise OSError(5, "Input/output error", place)
        return real(place)  # type: ignore[return-value]

    monkeypatch.setattr(files, "open_input", open_input)
    monkeypatch.setattr(workers, "_PAUSES_SECONDS", (0.0, 0.0))
    assert run("--workers", "1") == 1
    said = capsys.readouterr()
    assert "00001.tar: OSError: [Errno 5] Input/output error" in said.err
    assert "1 of 3 units failed; run the same command again to go on" in said.err
    assert read(tmp_path / "table").num_rows == 40
    runs = manifest.read_runs(str(tmp_path / "table"))
    assert (runs[-1].state, runs[-1].units_done, runs[-1].units_failed) == ("failed", 2, 1)
    monkeypatch.undo()
    assert run() == 0
    assert read(tmp_path / "table").num_rows == 60


def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path)
    assert run("--quiet") == 0
    before = read(tmp_path / "table")
    write_tar(tmp_path / "00009.tar", pairs(20, start=500))
    monkeypatch.setattr(files.PendingFile, "publish", fails_for("features/00009"))
    assert run("--workers", "1") == 1
    assert "00009.tar: no space left for its part: free some and run the command again" in capsys.readouterr().err
    assert read(tmp_path / "table").equals(before)
    assert not list((tmp_path / "table" / ".tmp").iterdir())


def test_dead_letters_are_judged_by_the_limit(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [*pairs(19), ("bad.jpg", b"<html>not found</html>"), ("bad.txt", b"x")])
    assert run("--max-dead-letters", "1") == 0
    assert "1 NotAnImage" in capsys.readouterr().out
    assert run("--max-dead-letters", "5%") == 0
    assert run("--max-dead-letters", "0") == 3
    assert run("--max-dead-letters", "4.9%") == 3
    assert "1 dead letters of 20 samples: more than --max-dead-letters allows" in capsys.readouterr().err


def test_retry_after_a_repair_touches_only_the_dead_rows(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = dict(pairs(30))
    corpus(tmp_path, shards=1, each=3)
    broken = {**members, "000007.jpg": b"", "000011.txt": b"\xff\xfe", "000020.jpg": members["000020.jpg"][:300]}
    shard = write_tar(tmp_path / "b.tar", broken.items())
    assert run() == 0
    assert table.Table.open(str(tmp_path / "table")).dead_letters()["error"].to_pylist() == [
        "EmptyImage", "CaptionNotUtf8", "TruncatedImage",
    ]  # fmt: skip
    write_tar(shard, {**broken, "000007.jpg": members["000007.jpg"], "000011.txt": members["000011.txt"]}.items())

    model = towers.load(towers.DEMO)
    counts = {"embed_images": 0, "embed_texts": 0}

    def counting(name: str) -> Callable[..., np.ndarray]:
        embed_some = getattr(model, name)

        def count(rows: Sequence[object], *more: Any) -> np.ndarray:
            counts[name] += len(rows)
            return embed_some(rows, *more)

        return count

    for name in counts:
        monkeypatch.setattr(model, name, counting(name))
    capsys.readouterr()
    assert cli.main(["retry", str(tmp_path / "table"), "--workers", "1"]) == 0
    assert "33 samples = 32 rows + 1 dead letters" in capsys.readouterr().out
    assert counts == {"embed_images": 2, "embed_texts": 2}

    write_tar(shard, members.items())
    assert cli.main(["retry", str(tmp_path / "table")]) == 0
    assert run(output="fresh") == 0
    assert_same_rows(read(tmp_path / "table"), read(tmp_path / "fresh"))
    assert cli.main(["retry", str(tmp_path / "table")]) == 0
    assert "no dead letters" in capsys.readouterr().out


def test_what_is_gone_keeps_no_other_shard_from_being_retried_or_repaired(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [*pairs(2), ("bad.jpg", b""), ("bad.txt", b"x")])
    assert run("--workers", "1") == 0
    (tmp_path / "a.tar").unlink()
    write_tar(tmp_path / "b.tar", pairs(3))
    place = str(tmp_path / "table")
    assert cli.main(["retry", place, "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "6 samples = 5 rows + 1 dead letters" in said.out and f"{tmp_path}/a.tar is gone" in said.err
    for part in (tmp_path / "table" / "features").iterdir():
        part.write_bytes(part.read_bytes()[:-1])
    assert cli.main(["verify", place, "--repair", "--workers", "1"]) == 1
    assert f"{place}: 1 findings" in capsys.readouterr().out
    (tmp_path / "b.tar").unlink()
    assert cli.main(["retry", place]) == 2
    assert "no file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["retry"], ["verify", "--repair"]])
def test_a_list_counts_where_there_is_nothing_else_to_do(tmp_path: Path, run: Run, command: list[str]) -> None:
    corpus(tmp_path, shards=1, each=3)
    assert run("--workers", "1") == 0
    (tmp_path / "keys.txt").write_text("000001\n")
    assert cli.main([*command, str(tmp_path / "table"), "--opt-out", str(tmp_path / "keys.txt")]) == 0
    assert read(tmp_path / "table")["key"].to_pylist() == ["000000", "000002"]


def test_a_table_within_the_folder_that_is_read_is_refused(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path, shards=1, each=1)
    assert run(input="") == 2
    assert "is in the folder that is read" in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_what_a_run_left_that_died_while_it_took_a_unit_out_is_repaired(tmp_path: Path, run: Run) -> None:
    first, _ = corpus(tmp_path, shards=2, each=2)
    assert run("--workers", "1") == 0
    place, kept = tmp_path / "table", parts(tmp_path / "table")
    first.unlink()
    assert run("--remove-missing", "50%") == 0
    for name, data in kept.items():
        (place / "features" / name).write_bytes(data)
    assert len(verify.findings(str(place))) == 1
    assert cli.main(["verify", str(place), "--repair"]) == 0
    assert verify.findings(str(place)) == [] and read(place).num_rows == 2


@pytest.mark.parametrize("command", ["embed", "verify"])
def test_a_damaged_record_that_no_shard_makes_anew_goes(tmp_path: Path, run: Run, command: str) -> None:
    corpus(tmp_path, shards=1, each=2)
    assert run("--workers", "1") == 0
    place = tmp_path / "table"
    (place / "manifest" / "gone-0123456789ab.json").write_text('{"unit": ')
    assert cli.main(["verify", str(place)]) == 1
    assert (run() if command == "embed" else cli.main(["verify", str(place), "--repair"])) == 0
    assert verify.findings(str(place)) == [] and read(place).num_rows == 2


def test_a_retry_that_fails_says_so(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", [*pairs(3), ("bad.jpg", b""), ("bad.txt", b"x")])
    assert run() == 0
    monkeypatch.setattr(files.PendingFile, "publish", fails_for("features/"))
    assert cli.main(["retry", str(tmp_path / "table"), "--workers", "1"]) == 1
    assert "1 of 1 units failed" in capsys.readouterr().err
    assert read(tmp_path / "table").num_rows == 3


def test_units_that_a_parquet_file_has_no_more_leave_the_table(tmp_path: Path, run: Run) -> None:
    def write(rows: int) -> None:
        columns = {
            "image": pa.nulls(rows, pa.binary()),
            "caption": [" "] * rows,
        }  # nothing to embed: this is about units
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=5000)

    write(15_000)
    assert run("--quiet", input="a.parquet") == 0
    assert len(table.Table.open(str(tmp_path / "table")).records) == 2
    write(6_000)
    assert run("--quiet", input="a.parquet") == 0
    rows = read(tmp_path / "table")
    assert rows["row"].to_pylist() == list(range(6000))
    assert len(parts(tmp_path / "table")) == 1
    assert cli.main(["verify", str(tmp_path / "table")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fuser", "median"], "no fuser 'median'"),
        (["--shard-index", "2", "--num-shards", "2"], "--shard-index 2 is not one of 0…1"),
        (["--ouptut", "x"], "no option --ouptut, neither of fusion nor of Beam; did you mean"),
        (["--direct_running_mode=multi_processing"], "hangs when a worker is killed"),
        (["--image-column", "x", "--model", "ViT-B32"], "did you mean"),
    ],
)
def test_wrong_options_are_refused_before_work_starts(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    corpus(tmp_path, shards=1, each=1)
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_missing_input_and_another_jobs_table_are_refused(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input="nothing-*.tar") == 2
    assert "nothing-*.tar" in capsys.readouterr().err
    corpus(tmp_path, shards=1, each=2)
    assert run() == 0
    assert run("--fuser", "hadamard", "--max-pixels", "1000000") == 2
    said = capsys.readouterr().err
    assert "is a table of another job" in said and "fuser:" in said
    assert "input.max_pixels: 1000000 here, 64000000 there" in said


def test_parquet_without_images_lists_its_columns(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"title": ["x"], "score": [0.5]}), tmp_path / "a.parquet")
    assert run(input="a.parquet") == 2
    said = capsys.readouterr().err
    assert "title" in said and "score" in said and "--image-column" in said


def test_status_of_a_run_whose_launcher_died(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path, shards=2)
    assert run() == 0
    (record,) = manifest.read_runs(str(tmp_path / "table"))
    manifest.write_run(str(tmp_path / "table"), dataclasses.replace(record, state="running", pid=2**22 + 1))
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "table"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["run"]["state"], found["run"]["units_done"]) == (40, "dead", 2)
    assert found["run"]["seconds_left"] is None, "none for who is gone"
    assert cli.main(["status", str(tmp_path / "table")]) == 0
    assert "its launcher is gone: run the same command again" in capsys.readouterr().out
    (tmp_path / "table" / "table.json").unlink()
    assert cli.main(["status", str(tmp_path / "table")]) == 2
    assert "it has no table.json" in capsys.readouterr().err


def test_beam_metrics_count_what_the_manifest_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*pairs(9), ("bad.jpg", b""), ("bad.txt", b"x")])
    spec = TableSpec(towers.load(towers.DEMO).spec)
    job = change.Job(str(tmp_path / "table"), manifest.claim(str(tmp_path / "table"), spec))
    planned = plan.compare(lambda: shards.plan([str(tmp_path / "a.tar")], spec.input), job.output, spec)
    knobs = runner.Knobs(workers=2)
    pipeline = beam.Pipeline(options=PipelineOptions(runner.local_runner(knobs, [])))
    pipeline | deal.Deal(unit.Work, planned.work) | beam.ParDo(embed.RunUnit(job, knobs))
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace("fusion"))["counters"]
    counts = {item.key.metric.name: item.committed for item in found}
    assert counts == {"rows_in": 10, "rows_out": 9, "rows_dead": 1, "rows_reused": 0, "units_done": 1}


def test_a_run_that_dies_between_part_and_record_is_cleaned_up_by_the_next(tmp_path: Path, run: Run) -> None:
    corpus(tmp_path, shards=2)
    assert run() == 0
    whole = parts(tmp_path / "table")
    place = tmp_path / "table"
    (record,) = [r for r in table.Table.open(str(place)).records if r.unit.id.startswith("00001")]
    manifest.remove_unit(str(place), record)  # as if its record had never been written …
    (place / "features" / f"{record.unit.id}-0123456789abcdef.parquet").write_bytes(b"half a part")  # … but a part had
    assert run() == 0
    assert parts(place) == whole
    assert cli.main(["verify", str(place)]) == 0


def test_touched_but_equal_shards_are_read_again_and_embedded_from_what_is_known(tmp_path: Path, run: Run) -> None:
    (shard,) = corpus(tmp_path, shards=1)
    assert run() == 0
    before = parts(tmp_path / "table")
    os.utime(shard, ns=(5, 5))
    assert run() == 0
    (record,) = table.Table.open(str(tmp_path / "table")).records
    assert (record.rows_reused, record.revision, record.unit.identity.mtime_ns) == (20, 1, 5)
    assert parts(tmp_path / "table") == before


def test_layouts_give_the_same_rows(tmp_path: Path, run: Run) -> None:
    members = dict(pairs(12))
    write_tar(tmp_path / "t.tar", members.items())
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as packed:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in members.items():
        (folder / name).write_bytes(data)
    keys = sorted({name.split(".")[0] for name in members})
    pictures, captions = [members[f"{key}.jpg"] for key in keys], [members[f"{key}.txt"].decode() for key in keys]
    pq.write_table(
        pa.table({"image": [{"bytes": data, "path": None} for data in pictures], "text": captions, "key": keys}),
        tmp_path / "hf.parquet",
    )
    lines = [
        "filepath\tcaption\tkey",
        *(f"folder/{key}.jpg\t{caption}\t{key}" for key, caption in zip(keys, captions, strict=True)),
    ]
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    found = {}
    for i, name in enumerate(["t.tar", "z.tar.gz", "folder", "hf.parquet", "list.tsv"]):
        assert run("--quiet", input=name, output=f"table{i}") == 0
        found[name] = read(tmp_path / f"table{i}").select(
            ["key", "caption", "sha256", "image_embedding", "text_embedding"]
        )
    for name, rows in found.items():
        assert rows.equals(found["t.tar"]), name
