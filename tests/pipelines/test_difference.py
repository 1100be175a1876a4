"""A table follows its corpus: what a series of changes leaves equals a build from scratch on what is left."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.numpy import load_file, save_file

from fusion_core import files, index, manifest, opt_out, search, table, towers, verify
from pipelines import cli
from tests.corpora import assert_same_rows, pairs, photo, write_tar
from tests.fusion_core.test_towers import VIT, save_random_model

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


COUNTS = ("rows_in", "rows_out", "rows_dead", "rows_opted_out", "opted_out", "repeated_keys")


def assert_same_tables(found: Path, expected: Path, counts: tuple[str, ...] = (*COUNTS, "opt_out_sha256")) -> None:
    """To the bit, and with the same files: so nothing of what left lies anywhere."""
    ours, theirs = (table.Table.open(str(place)) for place in (found, expected))
    assert read(found).equals(read(expected))
    assert ours.dead_letters().equals(theirs.dead_letters())
    assert [part.path for part in ours.parts] == [part.path for part in theirs.parts]
    assert set(manifest.list_parts(str(found))) == set(manifest.list_parts(str(expected)))
    for ours_, theirs_ in zip(ours.records, theirs.records, strict=True):
        assert [getattr(ours_, name) for name in counts] == [getattr(theirs_, name) for name in counts]
        assert ours_.rows_in == ours_.rows_out + ours_.rows_dead + ours_.rows_opted_out
    assert verify.findings(str(found)) == []


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


def test_taking_keys_out_reads_no_shard_and_loads_no_towers(tmp_path: Path, run: Run) -> None:
    for number in range(3):
        shard(tmp_path / "shards", number)
    assert run() == cli.DONE
    keys = write_list(tmp_path, "000000", "empty1")
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    for number in range(2):
        (tmp_path / "shards" / f"{number:05d}.tar").unlink()  # what is done to these units cannot come from the shards
    command = ["embed", "--input", f"{tmp_path}/shards", "--output", f"{tmp_path}/table", "--model", towers.DEMO]
    script = (
        "import sys; from pipelines import cli\n"
        f"code = cli.main({[*command, '--opt-out', keys, '--quiet']!r})\n"
        "print(code, 'open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")


def test_a_list_is_held_against_each_unit_once(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        shard(tmp_path / "shards", number)
    assert run("--opt-out", write_list(tmp_path, "000001")) == cli.DONE
    looked = list[str]()
    look = opt_out._look
    monkeypatch.setattr(opt_out, "_look", lambda *given: looked.append(given[-1].unit.shard) or look(*given))
    assert run("--opt-out", write_list(tmp_path, "000001")) == cli.DONE
    assert looked == []
    shard(tmp_path / "shards", 2)
    assert run("--opt-out", write_list(tmp_path, "000001", "000013")) == cli.DONE
    assert len(looked) == 2
    assert run("--opt-out", write_list(tmp_path, "000001", "000013")) == cli.DONE
    assert len(looked) == 2
    assert read(tmp_path / "table")["key"].to_pylist()[:2] == ["000000", "000002"]

    units = {record.unit.shard[-9:]: record.revision for record in table.Table.open(str(tmp_path / "table")).records}
    shutil.copytree(tmp_path / "table", tmp_path / "copy")
    capsys.readouterr()
    assert run("--opt-out", write_list(tmp_path, "000013", "000025")) == cli.DONE  # one comes back, one goes
    assert "1 units done, 2 stood already" in capsys.readouterr().out
    now = {record.unit.shard[-9:]: record.revision for record in table.Table.open(str(tmp_path / "table")).records}
    assert {name: now[name] - units[name] for name in now} == {"00000.tar": 1, "00001.tar": 0, "00002.tar": 1}
    assert run("--opt-out", str(tmp_path / "list.txt"), output="fresh") == cli.DONE
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")

    capsys.readouterr()
    assert run(output="copy") == cli.USAGE
    assert cli.main(["retry", str(tmp_path / "copy"), "--quiet"]) == cli.USAGE
    assert capsys.readouterr().err.count("was made with an opt-out list: give it again with --opt-out FILE") == 2
    assert run("--opt-out", "none", output="copy") == cli.DONE
    assert run(output="copy") == cli.DONE
    assert run(output="whole") == cli.DONE
    assert_same_tables(tmp_path / "copy", tmp_path / "whole")


def test_retry_and_repair_keep_to_the_list(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = [shard(tmp_path / "shards", 0)]
    keys = write_list(tmp_path, "000003", "broken0")
    assert run("--opt-out", keys) == cli.DONE
    write_tar(path, [("empty0.jpg", photo(77)), ("broken0.jpg", photo(78)), *pairs(EACH)])
    options = ["--opt-out", keys, "--workers", "1", "--quiet"]
    assert cli.main(["retry", str(tmp_path / "table"), *options]) == cli.DONE
    assert "14 samples = 12 rows + 0 dead letters + 2 opted out" in capsys.readouterr().out
    next((tmp_path / "table" / "features").iterdir()).unlink()
    assert cli.main(["verify", str(tmp_path / "table"), "--repair", *options]) == cli.DONE
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")


def test_a_unit_that_cannot_be_searched_for_listed_keys_fails_the_run(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [shard(tmp_path / "shards", number) for number in range(2)]
    assert run() == cli.DONE
    (part,) = (tmp_path / "table" / "features").glob("00000-*")
    data = part.read_bytes()
    part.write_bytes(data[:-8] + bytes(8))
    shards[0].unlink()  # so that it cannot be done anew either
    keys = write_list(tmp_path, "000001", "000013")
    assert run("--opt-out", keys) == cli.FAILED
    said = capsys.readouterr().err
    assert "00000.tar: not held against the opt-out list" in said and "1 of 2 units failed" in said
    assert manifest.read_runs(str(tmp_path / "table"))[-1].state == "failed"
    part.write_bytes(data)
    assert run("--opt-out", keys) == cli.DONE
    assert {"000001", "000013"}.isdisjoint(read(tmp_path / "table")["key"].to_pylist())


def test_shards_that_are_gone_leave_only_when_told_and_not_by_accident(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [shard(tmp_path / "shards", number) for number in range(3)]
    assert run() == cli.DONE
    whole = read(tmp_path / "table")
    shards[1].unlink()
    assert run() == cli.DONE
    assert read(tmp_path / "table").equals(whole)
    for limit in ([], ["33%"], ["14"]):
        capsys.readouterr()
        assert run("--remove-missing", *limit) == cli.USAGE
        assert "15 of its 45 samples are of shards that are not in the input" in capsys.readouterr().err
    (tmp_path / "shards").rename(tmp_path / "away")
    (tmp_path / "shards").mkdir()
    assert run("--remove-missing", "100%") == cli.USAGE  # a store that lists nothing
    assert "holds no shards" in capsys.readouterr().err
    (tmp_path / "shards").rmdir()
    (tmp_path / "away").rename(tmp_path / "shards")
    assert read(tmp_path / "table").equals(whole)
    assert run("--remove-missing", "15") == cli.DONE
    assert "1 units of 13 rows left the table" in capsys.readouterr().out
    assert run(output="fresh") == cli.DONE
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")
    shard(tmp_path / "shards", 1)
    assert run("--remove-missing") == cli.DONE
    assert_same_rows(read(tmp_path / "table"), whole)


def test_launchers_side_by_side_take_out_their_shares(tmp_path: Path, run: Run) -> None:
    shards = [shard(tmp_path / "shards", number) for number in range(4)]
    assert run() == cli.DONE
    shards[2].unlink()
    keys = write_list(tmp_path, "000001", "000014", "000037")
    for launcher in range(2):
        share = ["--shard-index", str(launcher), "--num-shards", "2"]
        assert run("--opt-out", keys, "--remove-missing", "25%", *share) == cli.DONE
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    assert_same_tables(tmp_path / "table", tmp_path / "fresh")


def test_killed_while_keys_are_taken_out_and_repeated_gives_the_same_table(tmp_path: Path, run: Run) -> None:
    for number in range(3):
        shard(tmp_path / "shards", number)
    assert run() == cli.DONE
    keys = write_list(tmp_path, "000000", "000013", "000025", "empty2")
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    command = ["embed", "--input", f"{tmp_path}/shards", "--model", towers.DEMO, "--opt-out", keys, "--quiet"]
    script = (
        "import os, sys; from fusion_core import files, report; from pipelines import cli, embed\n"
        "left, publish, remove = 0, files.PendingFile.publish, files.remove\n"
        "def step(act, *given):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), 9)\n"
        "    act(*given)\n"
        "files.PendingFile.publish = lambda *given: step(publish, *given)\n"
        "files.remove = lambda *given: step(remove, *given)\n"
        "for place in sys.argv[1:]:\n"
        "    left, child = int(place.rpartition('-')[2]), os.fork()\n"
        f"    if not child: os._exit(cli.main({command!r} + ['--workers', '1', '--output', place]))\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)"
    )
    places = [tmp_path / f"killed-{steps}" for steps in (3, 5, 8, 12)]
    for place in places:
        shutil.copytree(tmp_path / "table", place)
    arguments = [sys.executable, "-c", script, *map(str, places)]
    killed = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    assert [line for line in killed.stdout.split() if line.startswith("-")] == ["-9"] * len(places)
    half = 0
    for place in places:
        keyed = read(place)["key"].to_pylist()
        assert len(set(keyed)) == len(keyed) and set(read(tmp_path / "fresh")["key"].to_pylist()) <= set(keyed)
        half += 0 < table.Table.open(str(place)).rows_opted_out < 4
        assert run("--opt-out", keys, output=place.name) == cli.DONE
        assert_same_tables(place, tmp_path / "fresh")
    assert half  # one was killed between two units


def test_what_is_made_of_the_table_follows_when_it_is_made_again(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        shard(tmp_path / "shards", number)
    (tmp_path / "classes.txt").write_text("a circle\na square\n")

    def derive(source: str, name: str) -> None:
        place = str(tmp_path / source)
        made = {kind: str(tmp_path / f"{name}-{kind}") for kind in ("fused", "labels", "index")}
        assert cli.main(["fuse", place, "--fuser", "concat", "--output", made["fused"], "--quiet"]) == cli.DONE
        labels = ["--labels", str(tmp_path / "classes.txt"), "--device", "cpu"]
        assert cli.main(["label", place, "--output", made["labels"], *labels]) == cli.DONE
        assert cli.main(["index", place, "--output", made["index"], "--tune-seconds", "5"]) == cli.DONE

    assert run() == cli.DONE
    derive("table", "ours")
    words = [b"picture of number 13", b"https://pictures.example/13.jpg"]
    assert holding(tmp_path / "ours-index", words)
    keys = write_list(tmp_path, "000013", "broken1")
    assert run("--opt-out", keys) == cli.DONE
    derive("table", "ours")
    assert run("--opt-out", keys, output="fresh") == cli.DONE
    derive("fresh", "fresh")
    assert_same_tables(tmp_path / "ours-fused", tmp_path / "fresh-fused", COUNTS)
    assert holding(tmp_path / "ours-index", words) == []
    ours, fresh = (index.Index.open(str(tmp_path / f"{name}-index")).record for name in ("ours", "fresh"))
    assert (ours.rows_table, ours.rows_indexed) == (fresh.rows_table, fresh.rows_indexed) == (25, 25)
    parts = {path.name for path in (tmp_path / "ours-labels" / "labels").iterdir()}
    assert parts == {part.path.removeprefix("features/") for part in table.Table.open(str(tmp_path / "table")).parts}


def tuned(folder: Path, seed: int, sides: str) -> str:
    """A copy of the demo's model whose text tower (or all of it) has other weights."""
    model = shutil.copytree(Path(towers.__file__).parent / "demo" / "model", folder)
    chance, weights = np.random.default_rng(seed), model / "open_clip_model.safetensors"
    state = load_file(weights)
    for name, value in state.items():
        if value.ndim == 2 and (sides == "both" or not name.startswith("visual.")):
            state[name] = value + chance.normal(0, 0.2 * value.std(), value.shape).astype(value.dtype)
    save_file(state, weights)
    return str(model)


def test_another_text_tower_embeds_captions_from_the_table_alone(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        shard(tmp_path / "shards", number)
    write_tar(
        tmp_path / "shards" / "odd.tar", [("mute.jpg", photo(5)), ("dark.txt", b"words alone"), ("blank.txt", b" ")]
    )
    model = tuned(tmp_path / "tuned", 1, "text")
    assert run() == cli.DONE
    embed = ["embed", "--input", f"{tmp_path}/shards", "--output", f"{tmp_path}/oracle", "--model", model, "--quiet"]
    assert cli.main([*embed, "--device", "cpu", "--workers", "1"]) == cli.DONE
    oracle = read(tmp_path / "oracle")  # the tuned model has the old image tower: the same table by another way
    (tmp_path / "shards").rename(tmp_path / "away")
    place = str(tmp_path / "made")
    command = ["fuse", str(tmp_path / "table"), "--text-model", model, "--output", place, "--device", "cpu", "--quiet"]
    capsys.readouterr()
    assert cli.main([*command, "--fuser", "weighted_sum:image=0.5,text=0.5"]) == cli.DONE
    said = capsys.readouterr().out
    assert "3 units done" in said and "mean similarity of image and caption" in said
    made = read(tmp_path / "made")
    assert made.drop(["fused_embedding"]).equals(oracle)
    assert not made["text_embedding"].equals(read(tmp_path / "table")["text_embedding"])
    fused = table.to_numpy(made["fused_embedding"].combine_chunks())
    sides = [table.to_numpy(made[f"{side}_embedding"].combine_chunks()) for side in ("image", "text")]
    summed = np.add(*(side.astype(np.float64) for side in sides))
    norms = np.linalg.norm(summed, axis=1, keepdims=True)  # 0 where a sample has neither
    np.testing.assert_allclose(fused, summed / np.maximum(norms, 1e-9), atol=1e-3)
    assert verify.findings(place) == []
    spec = table.Table.open(place).spec
    assert spec.text_tower and (spec.tower.model, spec.text_tower.model) == (towers.DEMO, model)
    assert spec.backbone not in (spec.tower.backbone, spec.text_tower.backbone)

    # It follows its source, embedding what is new alone.
    asked = list[str]()
    embed_texts = towers.Towers.embed_texts
    monkeypatch.setattr(
        towers.Towers,
        "embed_texts",
        lambda self, texts, pad_to=1: asked.extend(texts) or embed_texts(self, texts, pad_to),
    )
    (tmp_path / "away").rename(tmp_path / "shards")
    assert run("--opt-out", write_list(tmp_path, "000003")) == cli.DONE
    assert cli.main([*command, "--fuser", "weighted_sum:image=0.5,text=0.5"]) == cli.DONE
    assert asked == []
    assert read(tmp_path / "made").equals(made.filter(pc.not_equal(made["key"], "000003")))
    assert cli.main([*command]) == cli.USAGE  # the table there has a fuser
    assert cli.main(["retry", place, "--quiet"]) == cli.USAGE
    assert "was made by `fusion fuse --text-model`" in capsys.readouterr().err
    monkeypatch.undo()

    # Queries of either side meet the vectors of their own tower.
    (tmp_path / "shards").rename(tmp_path / "away")
    for column in ("image_embedding", "text_embedding"):
        built = str(tmp_path / column)
        assert cli.main(["index", place, "--column", column, "--output", built, "--tune-seconds", "5"]) == cli.DONE
        stored = table.to_numpy(read(tmp_path / "made")[column].combine_chunks()).astype(np.float32)
        searcher = search.open(built, "cpu")
        words = towers.load(model, device="cpu").embed_texts(["a picture of number 7"])[0]
        best = searcher.search("a picture of number 7", k=3)
        present = stored.any(axis=1)
        scores = np.where(present, stored @ words, -2)
        np.testing.assert_allclose(best["score"].to_numpy(), np.sort(scores)[::-1][:3], atol=2e-3)
        shown = searcher.search(image=photo(7), k=1)
        if column == "image_embedding":
            assert shown["key"].to_pylist() == ["000007"] and shown["score"][0].as_py() > 0.999
        for one in (model, towers.DEMO):
            with pytest.raises(search.WrongSpace, match=r"towers are not|text tower is not"):
                search.Searcher(index.Index.open(built), towers.load(one, device="cpu"))


def test_a_text_tower_of_another_size_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path / "shards", 0)
    assert run() == cli.DONE
    other = str(save_random_model(tmp_path / "models" / "vit", VIT))
    fuse = ["fuse", str(tmp_path / "table"), "--output", str(tmp_path / "made"), "--device", "cpu", "--quiet"]
    assert cli.main([*fuse, "--text-model", other]) == cli.USAGE
    assert "gives vectors of 48 dimensions, the images of" in capsys.readouterr().err
    assert cli.main(fuse) == cli.USAGE
    assert "name a --fuser, a --text-model or both" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
