"""Zero-shot labels against open_clip's own classifier, and the truth about rows from columns and files."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fusion_core import labels, metrics, towers
from fusion_core.columns import BadColumns
from fusion_core.labels import BadLabels, Classes, Truth
from fusion_core.table import Table, to_numpy
from schemas import records
from schemas.columns import LabelRecord, labels_schema
from tests.corpora import SPEC, TOWER, photo, write_scene_table, write_vectors

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
CLASSES = Classes({name: (name,) for name in SHAPES}, ("{}", "a photo of a {}", "one {}"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return write_scene_table(tmp_path_factory.mktemp("labels"), 150, [("a.txt", b"words"), ("b.jpg", photo(1))])


@pytest.fixture(scope="module")
def demo() -> towers.Towers:
    return towers.load(towers.DEMO, device="cpu", precision="fp32")


def oracle(names: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
    """open_clip's own classifier of the demo's model, [C, D]."""
    folder = Path(towers.__file__).parent / "demo" / "model"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(next(folder.glob("*bpe*"))))
    return open_clip.build_zero_shot_classifier(model, tokenizer, names, templates).T.numpy()


def test_labels_are_those_of_open_clips_classifier(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    weights = oracle(SHAPES, CLASSES.templates)
    np.testing.assert_allclose(labels.class_vectors(demo, CLASSES), weights, atol=2e-6)
    record = labels.write(table, str(tmp_path / "out"), CLASSES, demo, top_k=3)
    rows = pa.concat_tables(pq.read_table(tmp_path / "out" / part.path) for part in record.outputs)
    given = pa.concat_tables(table.read_part(part) for part in table.parts)
    for name in ("key", "shard", "row"):
        assert rows[name].equals(given[name]), "row-aligned"
    assert rows.schema.equals(labels_schema(record.spec))
    images = torch.from_numpy(to_numpy(given["image_embedding"].combine_chunks()).astype(np.float32))
    expected = (demo.logit_scale * torch.nn.functional.normalize(images) @ torch.from_numpy(weights).T).softmax(1)
    there = given["has_image"].to_numpy()
    for n, name in enumerate(SHAPES):
        column = rows[f"P({name})"]
        np.testing.assert_allclose(column.filter(given["has_image"]).to_numpy(), expected[there, n], atol=2e-3)
    for row, chances, here in zip(rows.to_pylist(), expected.tolist(), there, strict=True):
        if not here:
            assert all(row[name] is None for name in row if name not in ("key", "shard", "row"))
            continue
        assert row["label"] == row["top_labels"][0] == max(SHAPES, key=lambda name: row[f"P({name})"])
        assert row["probability"] == row["top_probabilities"][0] == row[f"P({row['label']})"]
        assert row["top_probabilities"] == sorted((row[f"P({name})"] for name in SHAPES), reverse=True)[:3]
        assert sum(row[f"P({name})"] for name in SHAPES) == pytest.approx(1, abs=1e-5)
        assert chances[SHAPES.index(row["label"])] == pytest.approx(max(chances), abs=2e-3)
    assert sum(record.counts.values()) == there.sum() == len(rows) - 1
    known = [json.loads(meta)["shape"] if meta else None for meta in given["meta"].to_pylist()]
    right = [said == real for said, real in zip(rows["label"].to_pylist(), known, strict=True) if real]
    assert np.mean(right) > 0.5, "the demo's model reads shapes"


def test_none_below_a_threshold(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    plain = labels.write(table, str(tmp_path / "plain"), CLASSES, demo)
    cosines = pq.read_table(tmp_path / "plain" / "labels")["cosine"].drop_null().to_numpy()
    middle = float(np.median(cosines))
    record = labels.write(table, str(tmp_path / "out"), CLASSES, demo, threshold=middle)
    rows = pq.read_table(tmp_path / "out" / "labels").to_pylist()
    for row in rows:
        if row["cosine"] is not None:
            assert (row["label"] == "none") == (row["cosine"] < np.float32(middle)) == (row["probability"] is None)
    assert record.counts["none"] == (cosines < np.float32(middle)).sum() > 0
    assert "none" not in plain.counts
    with pytest.raises(BadLabels, match="says that no label fits"):
        labels.write(table, str(tmp_path / "x"), Classes({"none": ("none",), "a": ("a",)}), demo, threshold=0.1)


def test_a_fitted_temperature_lowers_the_loss(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    record = labels.write(table, str(tmp_path / "out"), CLASSES, demo, fit="meta.shape")
    assert record.fitted_rows == 150
    given = pa.concat_tables(table.read_part(part) for part in table.parts)
    real, known = labels.class_numbers(Truth(table, "meta.shape").of(given), SHAPES)
    images = to_numpy(given["image_embedding"].combine_chunks())[known].astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    logits = images @ labels.class_vectors(demo, CLASSES).T * demo.logit_scale
    best = min(np.geomspace(0.05, 20, 4000), key=lambda t: metrics.nll(logits, real[known], t))
    assert record.spec.temperature == pytest.approx(best, rel=3e-3)
    rows = pq.read_table(tmp_path / "out" / "labels")
    np.testing.assert_allclose(
        rows["P(ring)"].to_numpy()[known], metrics.softmax(logits / best)[:, SHAPES.index("ring")], atol=2e-3
    )


def test_the_rows_that_judge_the_temperature_are_drawn_by_lot(tmp_path: Path) -> None:
    """Of classes that alternate from row to row, every second row would be of one class."""
    rng = np.random.default_rng(0)
    axes = np.eye(TOWER.embedding_dim, dtype=np.float32)[:2]
    kind = np.arange(400) % 2
    image = axes[kind] + np.where(kind == 0, 0.3, 2.0)[:, None] * rng.normal(size=(400, len(axes[0])))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    found = write_vectors(tmp_path / "t", image, image, SPEC, meta=[json.dumps({"kind": f"c{of}"}) for of in kind])
    held = labels._fit(found, Truth(found, "meta.kind"), Classes({"c0": ("c0",), "c1": ("c1",)}), axes, 10.0)[2][0]
    logits = 10 * image.astype(np.float32) @ axes.T
    assert held == pytest.approx(metrics.nll(logits, kind), rel=0.2)


def test_written_twice_is_the_same_and_what_stands_is_kept(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    place = tmp_path / "out"
    first = labels.write(table, str(place), CLASSES, demo)
    data = {path.name: path.read_bytes() for path in (place / "labels").iterdir()}
    (place / "labels.json").unlink()  # as if the run had been cut off
    gone = place / first.outputs[0].path
    gone.unlink()
    kept = place / first.outputs[1].path
    before = kept.stat().st_mtime_ns
    done: list[int] = []
    again = labels.write(table, str(place), CLASSES, demo, labelled=done.append)
    assert done == [first.outputs[0].rows] and kept.stat().st_mtime_ns == before
    assert {path.name: path.read_bytes() for path in (place / "labels").iterdir()} == data
    assert again.outputs == first.outputs
    assert records.from_json(LabelRecord, (place / "labels.json").read_bytes(), "") == again
    other = labels.write(table, str(place), CLASSES, demo, top_k=2)
    assert all(len(row) == 2 for row in pq.read_table(place / "labels")["top_labels"].drop_null().to_pylist())
    assert {part.sha256 for part in other.outputs}.isdisjoint(part.sha256 for part in first.outputs)


def test_a_place_that_is_not_ours_and_parts_that_left(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadColumns, match="thesis"):
        labels.write(table, str(tmp_path / "mine"), CLASSES, demo)
    labels.write(table, str(tmp_path / "out"), CLASSES, demo)
    smaller = Table(table.place, table.spec, table.records[:1])
    labels.write(smaller, str(tmp_path / "out"), CLASSES, demo)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 1


def test_many_labels_have_no_column_each(table: Table, demo: towers.Towers, tmp_path: Path) -> None:
    many = Classes({f"thing {n}": (f"thing {n}",) for n in range(101)}, ("{}",))
    labels.write(table, str(tmp_path / "out"), many, demo)
    rows = pq.read_table(tmp_path / "out" / "labels")
    assert rows.column_names[-1] == "top_probabilities"
    assert {len(row) for row in rows["top_labels"].drop_null().to_pylist()} == {5}


def test_rows_are_labelled_so_many_at_once_as_the_classes_allow(
    table: Table, demo: towers.Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    label = labels._label
    monkeypatch.setattr(labels, "_label", lambda batch, *more: (sizes.append(len(batch)), label(batch, *more))[1])
    labels.write(table, str(tmp_path / "whole"), CLASSES, demo, threshold=0.2)
    whole = pq.read_table(tmp_path / "whole" / "labels")
    for cells, rows in ((7 * 6 + 5, 7), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(labels, "_BATCH_CELLS", cells)
        labels.write(table, str(tmp_path / str(cells)), CLASSES, demo, threshold=0.2)
        assert max(sizes) == rows and sum(sizes) == table.num_rows
        found = pq.read_table(tmp_path / str(cells) / "labels")
        for name in ("key", "row", "label", "top_labels"):
            assert found[name].equals(whole[name]), name
        for name in ("probability", "cosine", *whole.column_names[-len(SHAPES) :]):  # BLAS adds in another order
            np.testing.assert_allclose(found[name].to_numpy(), whole[name].to_numpy(), rtol=1e-5, atol=1e-9)


def test_classes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\ufeffcircle\tdisc\tround thing\n\n  big square \n{x}\n", "utf-8")
    (tmp_path / "templates.txt").write_text("a {} here\n{}\n")
    found = labels.read_classes(str(tmp_path / "classes.txt"), str(tmp_path / "templates.txt"))
    assert found.names == ["circle", "big square", "{x}"]
    assert found.prompts("circle") == ["a disc here", "disc", "a round thing here", "round thing"]
    assert found.prompts("{x}") == ["a {x} here", "{x}"], "braces in a label are text"


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ("cat\ncat\n", "{}", "'cat' twice"),
        ("cat\n", "{}", "at least two"),
        ("", "{}", "at least two"),
        ("cat\ndog\n", "a photo\n", "'a photo' needs one {}"),
        ("cat\ndog\n", "{} and {}\n", "needs one {}"),
        ("cat\ndog\n", "\n", "has no prompts"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, classes: str, templates: str, message: str) -> None:
    (tmp_path / "classes").write_text(classes)
    (tmp_path / "templates").write_text(templates)
    with pytest.raises(BadLabels, match=message):
        labels.read_classes(str(tmp_path / "classes"), str(tmp_path / "templates"))
    (tmp_path / "latin").write_bytes("café\nthé\n".encode("latin-1"))
    for place, said in (("latin", "is not UTF-8"), ("nowhere", "there is no file")):
        with pytest.raises(BadLabels, match=said):
            labels.read_classes(str(tmp_path / place))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_a_label_that_is_not_a_number_is_none(table: Table, tmp_path: Path, kind: pa.DataType) -> None:
    rows = table.sample(4, 0)
    keys = rows["key"].to_pylist()
    given = pa.array(np.array([2, np.nan, 1, np.nan], kind.to_pandas_dtype()), mask=np.array([0, 0, 0, 1], bool))
    pq.write_table(pa.table({"key": keys, "label": given}), tmp_path / "truth.parquet")
    assert Truth(table, str(tmp_path / "truth.parquet")).of(rows) == ["2", None, "1", None]
    (tmp_path / "truth.csv").write_text("key,label\n" + "".join(f"{key},nan\n" for key in keys))
    assert Truth(table, str(tmp_path / "truth.csv")).of(rows) == ["nan"] * 4, "a word there"
    sidecars = pa.table({"meta": ['{"grade": NaN}', '{"grade": 2}', '{"grade": "nan"}', None]})
    assert Truth(table, "meta.grade").of(sidecars) == [None, "2", "nan", None]


def test_the_truth_from_columns_and_files(table: Table, tmp_path: Path) -> None:
    rows = table.sample(table.num_rows, 0)
    shapes = Truth(table, "meta.shape").of(rows)
    assert set(shapes) == {*SHAPES, None}
    assert Truth(table, "has_text").of(rows).count("False") == 1
    keys = rows["key"].to_pylist()
    listed = pa.table({"label": shapes, "key": keys, "more": range(len(keys))})
    pq.write_table(listed.drop_null(), tmp_path / "truth.parquet")
    (tmp_path / "truth.csv").write_text(
        "key,label\n" + "".join(f'{k},"{s or ""}"\n' for k, s in zip(keys, shapes, strict=True))
    )
    shutil.copy(tmp_path / "truth.csv", tmp_path / "truth")
    for name in ("truth.parquet", "truth.csv", "truth"):
        assert Truth(table, str(tmp_path / name)).of(rows) == shapes
    (tmp_path / "twice.csv").write_text(f"key,label\n{keys[0]},a\n{keys[0]},b\n")
    (tmp_path / "none.csv").write_text("key,label\nx,a\n")
    (tmp_path / "other.csv").write_text("id,class\nx,a\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "short.csv").write_text(f"key,label\n{keys[0]}\n{keys[1]},b\n")
    assert Truth(table, str(tmp_path / "short.csv")).of(rows)[:3] == [None, "b", None]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name, message in (
        ("twice.csv", "both 'a' and 'b'"), ("none.csv", "none of the table's keys"), ("other.csv", "it has id, class"),
        ("bad.parquet", "cannot be read"), ("empty.csv", "it has none"),
    ):  # fmt: skip
        with pytest.raises(BadLabels, match=message):
            Truth(table, str(tmp_path / name)).of(rows)
    for name in ("shape", "meta", "image_embedding", "sha256"):
        with pytest.raises(BadLabels, match="no such column of labels"):
            Truth(table, name)
