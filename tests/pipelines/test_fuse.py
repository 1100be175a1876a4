"""Fusing a table through the command line: the same rows with other vectors, resumed, followed, refused; and found."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusion_core import files, fusers, index, manifest, search, table, towers, verify
from fusion_core.search import WrongSpace
from pipelines import cli
from tests.corpora import SPEC, TOWER, photo, toy_unit, untrained_fuser, write_scene_index, write_unit, write_vectors

Fuse = Callable[..., int]
DIM = TOWER.embedding_dim


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Fuses tmp_path/table, of three units, with a combiner in tmp_path/fuser, into tmp_path/fused."""
    place = tmp_path / "table"
    write_unit(place, toy_unit("a-000000000001", "/data/a.tar"), [0, 1, 2, 4], dead=[3])
    write_unit(place, toy_unit("b-000000000002", "/data/b.tar"), [0, 1, 2])
    write_unit(place, toy_unit("c-000000000003", "/data/c.tar", rows=1), [0])
    fusers.save(untrained_fuser("combiner", DIM, backbone=TOWER.backbone), str(tmp_path / "fuser"))

    def run(*options: str, fuser: str = str(tmp_path / "fuser"), output: str = "fused") -> int:
        return cli.main(["fuse", str(place), "--fuser", fuser, "--output", str(tmp_path / output), "--quiet", *options])

    return run


def read(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def parts(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((place / "features").iterdir())}


def vectors(rows: pa.Table, column: str) -> np.ndarray:
    return table.to_numpy(rows[column].combine_chunks())


def test_a_fused_table_is_the_table_and_its_fused_vectors(tmp_path: Path, fuse: Fuse) -> None:
    assert fuse("--weights") == cli.DONE
    whole, fused = read(tmp_path / "table"), read(tmp_path / "fused")
    assert fused.drop(["fused_embedding", "fusion_weights"]).equals(whole)
    assert fused.column_names == [
        *whole.column_names[:14],
        "fused_embedding",
        "fusion_weights",
        *whole.column_names[14:],
    ]
    flags = [whole[name].to_numpy() for name in ("has_image", "has_text")]
    expected, _, weights = untrained_fuser("combiner", DIM, backbone=TOWER.backbone).explain(
        vectors(whole, "image_embedding"), vectors(whole, "text_embedding"), *flags
    )
    np.testing.assert_allclose(vectors(fused, "fused_embedding"), expected, atol=1e-3)
    np.testing.assert_allclose(vectors(fused, "fusion_weights"), weights, atol=1e-3)
    opened = table.Table.open(str(tmp_path / "fused"))
    assert opened.dead_letters().equals(table.Table.open(str(tmp_path / "table")).dead_letters())
    assert verify.findings(opened.place) == [] and cli.main(["verify", opened.place]) == cli.DONE
    (tmp_path / "fused" / "fusers" / opened.spec.fuser.fingerprint[:16] / fusers.TENSORS).write_bytes(b"x")  # type: ignore[union-attr]
    fusers._kept.cache_clear()
    assert len(verify.findings(opened.place)) == 1


def test_formulas_fuse_too_and_a_fused_table_can_be_fused_anew(tmp_path: Path, fuse: Fuse) -> None:
    assert fuse(fuser="weighted_sum:image=1,text=0") == cli.DONE
    fused = read(tmp_path / "fused")
    np.testing.assert_allclose(vectors(fused, "fused_embedding"), vectors(fused, "image_embedding"), atol=1e-3)
    again = ["fuse", str(tmp_path / "fused"), "--fuser", "concat", "--output", str(tmp_path / "more"), "--quiet"]
    assert cli.main(again) == cli.DONE
    assert vectors(read(tmp_path / "more"), "fused_embedding").shape == (8, 2 * DIM)


def test_it_resumes_and_follows_its_source(
    tmp_path: Path, fuse: Fuse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = files.PendingFile.publish

    def full(self: files.PendingFile, name: str) -> None:
        if name.startswith("manifest/b-"):
            raise OSError(28, "No space left on device")
        publish(self, name)

    monkeypatch.setattr(files.PendingFile, "publish", full)
    assert fuse() == cli.FAILED
    assert "b.tar: OSError" in capsys.readouterr().err
    monkeypatch.undo()
    before = parts(tmp_path / "fused")
    assert fuse() == cli.DONE
    assert "1 units done, 2 stood already, 0 failed" in capsys.readouterr().out
    after = parts(tmp_path / "fused")
    assert len(after) == 3 and all(after[name] == time for name, time in before.items() if not name.startswith("b-"))
    assert fuse() == cli.DONE and parts(tmp_path / "fused") == after
    assert "0 units done, 3 stood already" in capsys.readouterr().out

    source = manifest.read(str(tmp_path / "table")).by_unit
    write_unit(
        tmp_path / "table", toy_unit("b-000000000002", "/data/b.tar"), range(5), previous=source["b-000000000002"]
    )
    write_unit(tmp_path / "table", toy_unit("d-000000000004", "/data/d.tar"), range(2))
    manifest.remove_unit(str(tmp_path / "table"), source["a-000000000001"])
    assert fuse() == cli.DONE
    assert "2 units done, 1 stood already" in capsys.readouterr().out
    fused = read(tmp_path / "fused")
    assert fused.drop(["fused_embedding"]).equals(read(tmp_path / "table"))
    assert {name[:2] for name in parts(tmp_path / "fused")} == {"b-", "c-", "d-"}
    assert verify.findings(str(tmp_path / "fused")) == []


def test_what_cannot_be_is_refused_before_work(tmp_path: Path, fuse: Fuse, capsys: pytest.CaptureFixture[str]) -> None:
    fusers.save(untrained_fuser("gate", DIM, backbone="c" * 64), str(tmp_path / "foreign"))
    assert fuse(fuser=str(tmp_path / "foreign")) == cli.USAGE
    assert "other towers" in capsys.readouterr().err
    assert fuse(fuser="gate") == cli.USAGE
    assert "fit one with `fusion train`" in capsys.readouterr().err
    assert fuse(output="table") == cli.USAGE
    assert "is the table that is read" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert fuse() == cli.DONE
    assert fuse("--weights") == cli.USAGE
    assert "fusion_weights: True here" in capsys.readouterr().err
    write_unit(tmp_path / "strange", toy_unit("z-000000000009", "/data/z.tar"), [0],
               spec=table.Table.open(str(tmp_path / "fused")).spec)  # fmt: skip
    assert fuse(output="strange") == cli.USAGE
    assert "holds units that are not of" in capsys.readouterr().err


def test_fusion_train_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 600, DIM))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    write_vectors(tmp_path / "table", *vectors, SPEC)
    train = ["train", str(tmp_path / "table"), "--output", str(tmp_path / "fuser"), "--epochs", "1", "--quiet"]
    assert cli.main(train) == cli.USAGE
    assert "there is nothing to learn from" in capsys.readouterr().err
    assert cli.main([*train, "--views", str(tmp_path / "nowhere")]) == cli.USAGE
    assert cli.main([*train, "--views", str(tmp_path / "table"), "--fuser", "gate"]) == cli.DONE
    said = capsys.readouterr().out
    assert "not promoted" in said and "paired bootstrap" in said and "600 of 600 rows" in said
    record = fusers.load(str(tmp_path / "fuser"), DIM, TOWER.backbone).record
    assert record is not None and record.promoted is False
    assert "retrieval/gate/R@1" in record.metrics and record.trained_on["table"] == str(tmp_path / "table")


@pytest.mark.parametrize("kind", ["combiner", "gmu"])
def test_a_trained_fusers_column_is_indexed_and_found(tmp_path: Path, kind: str) -> None:
    write_scene_index(tmp_path)
    tower = towers.load(towers.DEMO, device="cpu", precision="fp32")
    dim, place = tower.spec.embedding_dim, str(tmp_path / "fused")
    fuser = untrained_fuser(kind, dim, backbone=tower.spec.backbone)
    fusers.save(fuser, str(tmp_path / "fuser"))
    arguments = ["--fuser", str(tmp_path / "fuser"), "--output", place, "--quiet"]
    assert cli.main(["fuse", str(tmp_path / "table"), *arguments]) == cli.DONE
    built = str(tmp_path / "fused-index")
    assert cli.main(["index", place, "--column", "fused_embedding", "--output", built]) == cli.DONE
    stored = vectors(read(Path(place)), "fused_embedding").astype(np.float32)
    text, image = "a large red circle", photo(5)
    (tmp_path / "table").rename(tmp_path / "away")
    (tmp_path / "fused").rename(tmp_path / "away-too")
    (tmp_path / "fuser").rename(tmp_path / "away-as-well")  # the index explains itself
    found = search.Searcher(index.Index.open(built), tower)
    words = tower.embed_texts([text])
    query, _ = fuser.fuse(words, words, np.array([False]), np.array([True]))
    query = query if kind == "gmu" else words
    answers = found.search(text, k=5)
    assert answers["id"].to_pylist() == np.argsort(-(stored @ query[0]), kind="stable")[:5].tolist()
    assert found.search(text, image, k=5).num_rows == 5
    plain = str(tmp_path / "index")
    if kind == "gmu":
        with pytest.raises(WrongSpace, match="not comparable"):
            search.open(plain, fuser=str(tmp_path / "away-as-well"))
    else:
        weighed = search.open(plain, fuser=str(tmp_path / "away-as-well"))
        by_both = weighed.search(text, image, k=5)
        assert by_both.num_rows == 5 and not by_both.equals(search.open(plain).search(text, image, k=5))
