"""`fusion import`: what was exported comes back bit for bit; it resumes, follows its folder, and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_core import adopt, manifest, table, towers, verify
from pipelines import cli
from tests.corpora import photo, write_scene_table, write_triple

SIDES = ("image_embedding", "text_embedding")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> table.Table:
    """Thirty drawn scenes and a picture without a caption, embedded with the demo's model."""
    return write_scene_table(tmp_path_factory.mktemp("import"), 30, [("silent.jpg", photo(2))])


@pytest.fixture(scope="module")
def folder(source: table.Table) -> Path:
    """The scenes in clip-retrieval's layout, in ten files of three rows, 00 to 09."""
    place = Path(source.place).parent / "clip-retrieval"
    options = ["--format", "clip-retrieval", "--output", str(place), "--rows-per-file", "3"]
    assert cli.main(["export", source.place, *options]) == cli.DONE
    return place


def bring(folder: Path, output: Path, model: str = towers.DEMO, *options: str) -> int:
    command = ["import", str(folder), "--output", str(output), "--model", model, "--device", "cpu", "--quiet"]
    return cli.main([*command, *options])


def rows(place: str | Path) -> pa.Table:
    opened = table.Table.open(str(place))
    return pa.Table.from_batches(opened.scan(), opened.schema)


def parts(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((place / "features").iterdir())}


def test_there_and_back_again(
    source: table.Table, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "table"
    assert bring(folder, place) == cli.DONE
    said = capsys.readouterr()
    assert "30 samples = 30 rows + 0 dead letters" in said.out
    assert "fusion-demo: 30 captions, embedded anew, have the vectors that are imported" in said.err
    theirs, ours = rows(source.place), rows(place)
    theirs = theirs.filter(theirs["has_text"])
    for name in ("key", "caption", "url", "width", "height", "has_image", "has_text", "similarity", *SIDES):
        assert ours[name].equals(theirs[name]), name
    meta = [json.loads(text) for text in ours["meta"].to_pylist()]
    assert [(told["shard"], told["row"]) for told in meta] == list(
        zip(theirs["shard"].to_pylist(), theirs["row"].to_pylist(), strict=True)
    )
    for told, theirs_too in zip(meta, theirs["meta"].to_pylist(), strict=True):
        assert json.loads(theirs_too or "{}").items() <= told.items()

    assert cli.main(["verify", str(place)]) == cli.DONE
    capsys.readouterr()
    answers = []
    for name, where in (("theirs", source.place), ("ours", str(place))):
        index = str(tmp_path / f"index-{name}")
        assert cli.main(["index", where, "--output", index, "--workers", "1"]) == cli.DONE
        capsys.readouterr()
        for text in ("a red circle", "two green squares on a white background"):
            search = ["search", index, "--text", text, "--where", "caption is not null", "--json", "--device", "cpu"]
            assert cli.main([*search, "-k", "5"]) == cli.DONE
            found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            answers.append([(hit["rank"], hit["key"], hit["caption"], round(hit["score"], 5)) for hit in found])
    assert answers[:2] == answers[2:] and len(answers[0]) == 5

    again = tmp_path / "again"
    options = ["--format", "clip-retrieval", "--output", str(again), "--rows-per-file", "3"]
    assert cli.main(["export", str(place), *options]) == cli.DONE
    for path in folder.rglob("*.npy"):
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_it_resumes_and_follows_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grown, place = tmp_path / "grown", tmp_path / "table"
    shutil.copytree(folder, grown)
    for name in ("img_emb/img_emb_09.npy", "text_emb/text_emb_09.npy", "metadata/metadata_09.parquet"):
        (grown / name).rename(tmp_path / name.replace("/", "-"))
    write = adopt.adopt

    def fail(triple: adopt.Triple, *arguments: object) -> object:
        if triple.unit.shard.endswith("metadata_03.parquet"):
            raise OSError(28, "No space left on device")
        return write(triple, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adopt, "adopt", fail)
    assert bring(grown, place) == cli.FAILED
    assert (
        "metadata_03.parquet: OSError: [Errno 28]" in (err := capsys.readouterr().err) and "1 of 9 units failed" in err
    )
    monkeypatch.undo()
    before = parts(place)
    assert len(before) == 8
    assert bring(grown, place) == cli.DONE
    assert "1 units done, 8 stood already, 0 failed" in capsys.readouterr().out
    after = parts(place)
    assert before.items() <= after.items() and len(after) == 9
    with monkeypatch.context() as patch:  # nothing is loaded where nothing is to be done
        patch.setattr(towers, "load", None)
        assert bring(grown, place) == cli.DONE
    assert parts(place) == after

    for name in ("img_emb/img_emb_09.npy", "text_emb/text_emb_09.npy", "metadata/metadata_09.parquet"):
        (tmp_path / name.replace("/", "-")).rename(grown / name)
    changed = np.load(grown / "img_emb" / "img_emb_02.npy")
    np.save(grown / "img_emb" / "img_emb_02.npy", changed[::-1])
    lost = next(name for name in after if name.startswith("metadata_5-"))
    (place / "features" / lost).unlink()
    capsys.readouterr()
    assert bring(grown, place) == cli.DONE
    assert "3 units done, 7 stood already" in capsys.readouterr().out
    assert lost in parts(place) and len(parts(place)) == 10
    assert verify.findings(str(place)) == []
    found = rows(place)
    of_two = [name.endswith("metadata_02.parquet") for name in found["shard"].to_pylist()]
    np.testing.assert_array_equal(table.to_numpy(found["image_embedding"].combine_chunks())[of_two], changed[::-1])


def test_listed_keys_and_files_that_are_gone_leave_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, place, fresh = tmp_path / "left", tmp_path / "table", tmp_path / "fresh"
    shutil.copytree(folder, left)
    vectors = np.load(left / "img_emb" / "img_emb_04.npy")
    vectors[1] = np.nan
    np.save(left / "img_emb" / "img_emb_04.npy", vectors)
    assert bring(left, place) == cli.DONE
    keys = rows(place)["key"].to_pylist()
    broken = table.Table.open(str(place)).dead_letters()["key"].to_pylist()
    assert len(keys) == 29 and len(broken) == 1
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([keys[0], keys[10], *broken, "nobody"]))
    for name in ("img_emb/img_emb_09.npy", "text_emb/text_emb_09.npy", "metadata/metadata_09.parquet"):
        (left / name).unlink()
    capsys.readouterr()
    assert bring(left, place, towers.DEMO, "--opt-out", str(listed), "--remove-missing", "5%") == cli.USAGE
    assert "3 of its 30 samples are of shards that are not in the input" in capsys.readouterr().err
    for output in (place, fresh):
        assert bring(left, output, towers.DEMO, "--opt-out", str(listed), "--remove-missing") == cli.DONE
    said = capsys.readouterr().out
    assert "27 samples = 24 rows + 0 dead letters + 3 opted out" in said
    assert "3 of its 4 keys found" in said and "found in no unit of the table, e.g. nobody" in said
    assert rows(place).equals(rows(fresh))
    assert rows(place)["key"].to_pylist() == [key for key in keys[:-3] if key not in (keys[0], keys[10])]
    assert set(manifest.list_parts(str(place))) == set(manifest.list_parts(str(fresh)))
    assert verify.findings(str(place)) == verify.findings(str(fresh)) == []
    assert bring(left, place) == cli.USAGE
    assert "was made with an opt-out list: give it again" in capsys.readouterr().err
    assert bring(left, place, towers.DEMO, "--opt-out", "none") == cli.DONE
    assert rows(place)["key"].to_pylist() == keys[:-3]


def test_the_wrong_model_is_found_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rng = np.random.default_rng(0)
    for path in (other / "text_emb").iterdir():
        matrix = np.load(path).astype(np.float32)
        turned = matrix + rng.normal(size=matrix.shape).astype(np.float32) * 0.05
        np.save(path, (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float16))
    assert bring(other, tmp_path / "table") == cli.USAGE
    assert "fusion-demo did not make these vectors: 30 captions" in capsys.readouterr().err
    shutil.rmtree(other)
    write_triple(other, "0", np.ones((2, 8), np.float16), None, {"image_path": ["a", "b"]})
    assert bring(other, tmp_path / "table") == cli.USAGE
    assert "holds vectors of 8 values, but those of fusion-demo have" in capsys.readouterr().err
    assert bring(tmp_path / "nowhere", tmp_path / "table") == cli.USAGE
    assert bring(folder, tmp_path / "table", "no-such-model") == cli.USAGE
    assert not (tmp_path / "table").exists()
    shutil.copytree(folder, tmp_path / "pictures")
    shutil.rmtree(tmp_path / "pictures" / "text_emb")
    capsys.readouterr()
    assert bring(tmp_path / "pictures", tmp_path / "table") == cli.DONE
    assert "whether this model made the vectors cannot be checked" in capsys.readouterr().err
    assert not any(rows(tmp_path / "table")["has_text"].to_pylist())
    fused = tmp_path / "fused"
    fuse = ["fuse", str(tmp_path / "table"), "--text-model", towers.DEMO, "--output", str(fused), "--device", "cpu"]
    assert cli.main([*fuse, "--quiet"]) == cli.DONE
    assert all(rows(fused)["has_text"].to_pylist()) and rows(fused)["similarity"].null_count == 0
    assert verify.findings(str(fused)) == []


def test_what_needs_the_pictures_is_refused(
    source: table.Table, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "table"
    assert bring(folder, place) == cli.DONE
    before = parts(place)
    shards = str(Path(source.place).parent / "shards")
    embed = ["embed", "--input", shards, "--output", str(place), "--model", towers.DEMO, "--device", "cpu"]
    assert cli.main([*embed, "--precision", "fp32", "--quiet"]) == cli.USAGE
    assert "imported: '' here, 'clip-retrieval' there" in capsys.readouterr().err
    assert bring(folder, Path(source.place)) == cli.USAGE
    assert "imported: 'clip-retrieval' here, '' there" in capsys.readouterr().err
    assert cli.main(["retry", str(place)]) == cli.USAGE
    assert "was imported, not embedded here" in capsys.readouterr().err
    assert cli.main(["dedup", str(place), "--near", "--output", str(tmp_path / "dedup")]) == cli.USAGE
    assert "was imported without its pictures" in capsys.readouterr().err
    assert parts(place) == before
    next((place / "features").iterdir()).write_bytes(b"damaged")
    assert cli.main(["verify", str(place), "--repair"]) == cli.USAGE
    assert "run `fusion import` again" in capsys.readouterr().err
    assert bring(folder, place) == cli.DONE and verify.findings(str(place)) == []
    assert list(parts(place)) == list(before)
