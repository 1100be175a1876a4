"""The evaluation of tables in which it is known what must come out."""

import dataclasses
import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score

from fusion_core import evaluate, evaluation_page, labels, manifest, table, towers
from fusion_core.evaluate import BadEvaluation
from fusion_core.labels import Classes
from fusion_core.table import Table, to_arrow
from fusion_core.writer import UnitWriter
from schemas import records
from schemas.evaluation import Classification, EvaluationRecord, EvaluationSpec, ZeroShot
from schemas.feature_table import features_schema
from tests.corpora import SPEC, toy_batch, toy_unit, write_scene_table

DIM = SPEC.tower.embedding_dim


def vectors(matrix: np.ndarray) -> pa.Array:
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    return to_arrow(unit.astype(np.float16), features_schema(SPEC).field("image_embedding").type)


def write(place: Path, image: np.ndarray, text: np.ndarray, **columns: Any) -> Table:
    """A table of rows with those vectors, a picture and a caption of their own."""
    n = len(image)
    given: dict[str, Any] = {
        "sha256": [i.to_bytes(32, "big") for i in range(n)],
        "caption": [f"caption {i}" for i in range(n)],
    }
    manifest.claim(str(place), SPEC)
    batch = toy_batch(range(n), image_embedding=vectors(image), text_embedding=vectors(text), **(given | columns))
    with UnitWriter(str(place), SPEC, toy_unit()) as out:
        out.write(batch)
        out.commit()
    return Table.open(str(place))


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, DIM))


def by_name(record: EvaluationRecord) -> dict[tuple[str, str], Any]:
    return {(probe.features, probe.classifier): probe.result for probe in record.probes}


def test_pairs_that_are_equal_are_found_and_those_of_chance_are_not(tmp_path: Path) -> None:
    image = noise(300)
    record = evaluate.evaluate(write(tmp_path / "a", image, image), EvaluationSpec())
    for way in record.retrieval:
        assert way.queries == way.gallery == 300 and way.median_rank == 1 and way.several_relevant == 0
        assert way.figures["hit@1"].value == way.figures["mAP"].value == 1.0
        assert 0.98 < way.figures["hit@1"].low < 1, "300 queries do not prove all"
    assert record.geometry is not None
    assert record.geometry.alignment == pytest.approx(0, abs=1e-5) and record.geometry.gap < 1e-3
    assert record.geometry.mmd2 < record.geometry.mmd2_chance
    assert record.geometry.jsd_bits is not None and record.geometry.jsd_bits < 0.05
    assert record.geometry.coral_relative == 0 and record.geometry.cosine_matching == pytest.approx(1, abs=1e-3)
    assert sum(record.geometry.histogram.matching) == 300
    chance = evaluate.evaluate(write(tmp_path / "b", image, noise(300, 1) + 0.5), EvaluationSpec())
    assert chance.retrieval[0].figures["hit@1"].high < 0.03
    assert chance.geometry is not None
    assert chance.geometry.mmd2 > chance.geometry.mmd2_chance and chance.geometry.mmd2_p < 0.02
    assert chance.geometry.jsd_bits is not None and chance.geometry.told_apart is not None
    assert chance.geometry.gap > 0.4 and chance.geometry.told_apart > 0.7 and chance.geometry.jsd_bits > 0.2


def test_equal_pictures_and_captions_are_one_item_with_several_answers(tmp_path: Path) -> None:
    """Two captions; the first is of three pictures, one of them twice, the second of one."""
    e = np.eye(DIM)
    image = np.stack([e[0], e[0], e[0] + e[1], -e[0], e[2]])
    text = np.stack([e[0], e[0], e[0], e[0], e[2]])
    pictures = [i.to_bytes(32, "big") for i in (0, 0, 1, 2, 3)]
    found = write(tmp_path / "t", image, text, sha256=pictures, caption=["a", "a", "a", "a", "b"])
    to_image, to_text = evaluate.evaluate(found, EvaluationSpec()).retrieval
    assert (to_image.queries, to_image.gallery, to_text.queries, to_text.gallery) == (2, 4, 4, 2)
    assert to_image.several_relevant == 1
    assert to_image.figures["hit@1"].value == 1
    assert to_image.figures["recall@1"].value == pytest.approx((1 / 3 + 1) / 2)
    assert to_image.figures["mAP"].value == pytest.approx(((1 + 1 + 3 / 4) / 3 + 1) / 2)
    assert to_text.figures["hit@1"].value == 0.75, "the picture that points away is nearer to the other caption"


def test_duplicates_never_straddle_the_folds(tmp_path: Path) -> None:
    """Classes drawn by lot, every row eight times: only what saw a row's copy could know its class."""
    rng = np.random.default_rng(0)
    n, copies = 60, 8
    image = np.repeat(noise(n), copies, axis=0)
    lot = np.repeat(rng.integers(0, 2, n), copies)
    sha = [(i // copies).to_bytes(32, "big") for i in range(n * copies)]
    meta = [json.dumps({"lot": f"c{of}"}) for of in lot]
    record = evaluate.evaluate(
        write(tmp_path / "t", image, noise(n * copies, 1), sha256=sha, meta=meta),
        EvaluationSpec(labels="meta.lot", folds=3),
    )
    for kind in ("random forest", "logistic regression"):
        accuracy = by_name(record)["image", kind].figures["accuracy"]
        assert accuracy.value < 0.7 and accuracy.n == n * copies
        assert accuracy.high - accuracy.low > 0.15, "60 pictures, not 480, tell"


def test_copies_of_imported_pictures_are_known_by_their_vector(tmp_path: Path) -> None:
    """As `fusion import` writes it: nobody saw the pictures, so there is no hash of them."""
    rng = np.random.default_rng(0)
    n, captions = 60, 5
    image = np.repeat(noise(n), captions, axis=0)
    lot = np.repeat(rng.integers(0, 2, n), captions)
    found = write(
        tmp_path / "t",
        image,
        image,
        sha256=[None] * (n * captions),
        meta=[json.dumps({"lot": f"c{of}"}) for of in lot],
    )
    record = evaluate.evaluate(found, EvaluationSpec(labels="meta.lot", folds=3))
    to_image, to_text = record.retrieval
    assert to_image.gallery == to_text.queries == n and to_text.several_relevant == n
    assert to_image.figures["hit@1"].value == 1, "copies are no rivals of each other"
    assert by_name(record)["image", "random forest"].figures["accuracy"].value < 0.7


def test_pictures_that_all_look_alike(tmp_path: Path) -> None:
    found = write(tmp_path / "t", np.ones((30, DIM)), noise(30))
    record = evaluate.evaluate(found, EvaluationSpec())
    assert record.geometry is not None and record.geometry.coral_relative is None
    assert records.from_json(EvaluationRecord, records.to_json(record), "") == record
    assert '<td>CORAL</td><td class="n">–</td>' in evaluation_page.render(record).decode()


def test_labels_that_end_with_a_nul_are_classes_of_their_own(tmp_path: Path) -> None:
    names = ["a", "a\0", "ü"]
    meta = [json.dumps({"kind": names[row % 3]}) for row in range(60)]
    found = write(tmp_path / "t", np.eye(DIM)[np.arange(60) % 3] + 0.1 * noise(60), noise(60), meta=meta)
    record = evaluate.evaluate(found, EvaluationSpec(labels="meta.kind", folds=2))
    result = by_name(record)["image", "logistic regression"]
    assert [(of.label, of.rows) for of in result.classes] == [(name, 20) for name in names]
    assert result.figures["accuracy"].value > 0.9


def halves(n: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors of which the image tells one half of a row's class, and the caption the other."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2, (2, n))
    image, text = noise(n, 4), noise(n, 5)
    image[:, 0] += 6 * (2 * bits[0] - 1)
    text[:, 1] += 6 * (2 * bits[1] - 1)
    return image, text, [json.dumps({"kind": f"{a}{b}"}) for a, b in bits.T]


def test_joint_features_are_called_better_only_where_they_are(tmp_path: Path) -> None:
    image, text, meta = halves(400)
    spec = EvaluationSpec(labels="meta.kind", folds=3)
    record = evaluate.evaluate(write(tmp_path / "a", image, text, meta=meta), spec)
    found = by_name(record)
    assert found["image", "logistic regression"].figures["accuracy"].value < 0.65
    assert found["concat", "logistic regression"].figures["accuracy"].value > 0.9
    assert found["none", "most frequent class"].figures["macro-recall"].value == pytest.approx(0.25, abs=0.02)
    assert {(one.features, one.classifier) for one in record.differences if one.claimed and one.value > 0} >= {
        (features, kind) for features in ("concat", "sum") for kind in ("logistic regression", "linear SVM")
    }
    for probe in record.probes:
        for name, figure in probe.result.figures.items():
            assert figure.low <= figure.value <= figure.high, (probe.features, probe.classifier, name)
        assert sum(rows for _, _, rows in probe.result.cells) == 400
    useless = evaluate.evaluate(write(tmp_path / "b", image, noise(400, 9), meta=meta), spec)
    assert not [one for one in useless.differences if one.features == "concat" and one.claimed and one.value > 0]


def test_the_sample_is_bounded_and_the_seed_decides(tmp_path: Path) -> None:
    image, text, meta = halves(150)
    found = write(tmp_path / "t", image, image + text, meta=meta)
    spec = EvaluationSpec(labels="meta.kind", max_rows=80, probe_rows=60, folds=2)

    def figures(spec: EvaluationSpec) -> dict[str, Any]:
        built = json.loads(records.to_json(evaluate.evaluate(found, spec)))
        return {name: value for name, value in built.items() if name not in ("seconds", "spec")}

    first = figures(spec)
    assert first["sampled_rows"] == 80 and first["table_rows"] == 150 and first["probe_rows"] == 60
    assert figures(spec) == first
    again = figures(EvaluationSpec(max_rows=80, seed=1))
    assert again["sampled_rows"] == 80 and again["retrieval"] != first["retrieval"]


def test_what_cannot_be_evaluated_is_said(tmp_path: Path) -> None:
    image, text, meta = halves(40)
    meta[0] = json.dumps({"kind": "rare"})
    found = write(tmp_path / "a", image, text, meta=meta)
    record = evaluate.evaluate(found, EvaluationSpec(labels="meta.kind", folds=2))
    assert any("1 classes have fewer than 2 different pictures" in note and "rare" in note for note in record.notes)
    with pytest.raises(BadEvaluation, match="0 classes have 5"):
        evaluate.evaluate(found, EvaluationSpec(labels="meta.nothing"))
    image[7] = np.nan
    with pytest.raises(BadEvaluation, match=r"image_embedding of row 7 .* is not finite"):
        evaluate.evaluate(write(tmp_path / "b", image, text), EvaluationSpec())
    silent = write(
        tmp_path / "c", noise(30), np.zeros((30, DIM)), has_text=[False] * 30, caption=[None] * 30, meta=meta[:30]
    )
    record = evaluate.evaluate(silent, EvaluationSpec(labels="meta.kind", folds=2))
    assert record.retrieval == () and record.geometry is None and record.pairs == 0
    assert {probe.features for probe in record.probes} == {"image", "none"}
    assert any("no retrieval" in note for note in record.notes)
    alone = evaluate.evaluate(write(tmp_path / "d", noise(2), noise(2), caption=["a", "a"]), EvaluationSpec())
    assert alone.geometry is not None and alone.geometry.cosine_mismatched is None
    assert records.from_json(EvaluationRecord, records.to_json(alone), "") == alone
    assert b"Where images and captions lie" in evaluation_page.render(alone)
    empty = Table(found.place, found.spec, ())
    with pytest.raises(BadEvaluation, match="a seed is a whole number from 0, not -1"):
        evaluate.evaluate(found, EvaluationSpec(seed=-1))
    with pytest.raises(BadEvaluation, match="no rows"):
        evaluate.evaluate(empty, EvaluationSpec())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return write_scene_table(tmp_path_factory.mktemp("scenes"), 250)


def test_zero_shot_classes_of_scenes(scenes: Table) -> None:
    names = ("circle", "square", "triangle", "star", "ring", "<cross>")
    classes = Classes({name: (name.strip("<>"),) for name in names}, ("a {}", "one {}"))
    demo = towers.load(towers.DEMO, device="cpu", precision="fp32")
    rows = scenes.sample(250)
    truth = [json.loads(meta)["shape"].replace("cross", "<cross>") for meta in rows["meta"].to_pylist()]
    listed = Path(scenes.place).parent / "truth.csv"
    listed.write_text(
        "key,label\n" + "".join(f"{key},{of}\n" for key, of in zip(rows["key"].to_pylist(), truth, strict=True))
    )
    spec = EvaluationSpec(labels=str(listed), classes="c", folds=3)
    record = evaluate.evaluate(scenes, spec, classes, lambda: demo)
    assert record.zero_shot is not None
    image = table.to_numpy(rows["image_embedding"].combine_chunks()).astype(np.float32)
    said = np.array(names)[(image @ labels.class_vectors(demo, classes).T).argmax(axis=1)]
    figures = record.zero_shot.result.figures
    assert figures["accuracy"].value == pytest.approx(accuracy_score(truth, said))
    assert figures["macro-F1"].value == pytest.approx(f1_score(truth, said, average="macro"))
    assert figures["top-5"].value >= figures["accuracy"].value > 0.5
    plain, fitted = record.zero_shot.calibration
    assert plain.temperature == 1 and fitted.n < plain.n == 250 and 0 < fitted.ece_floor < 0.2
    check_page(record)

    with pytest.raises(BadEvaluation, match="probes need 2 to 200"):
        evaluate.evaluate(scenes, EvaluationSpec(labels=str(listed), folds=200))
    with_note = evaluate.evaluate(scenes, dataclasses.replace(spec, folds=200), classes, lambda: demo)
    assert with_note.zero_shot == record.zero_shot and with_note.probes == ()
    assert any(note.startswith("no probes: ") and "probes need 2 to 200" in note for note in with_note.notes)


def check_page(record: EvaluationRecord) -> None:
    assert records.from_json(EvaluationRecord, records.to_json(record), "") == record
    page = evaluation_page.render(record).decode()
    for shown in (
        "Retrieval",
        "Where images and captions lie",
        "Zero-shot classes",
        "Probes",
        "&lt;cross&gt;",
        "confusion",
    ):
        assert shown in page
    assert "<cross>" not in page and "nan" not in page.lower().replace("cyan", "")
    assert not re.search(r'(src|href)="', page), "the page stands alone"
    assert len(re.findall("<svg", page)) >= 6
    assert all(math.isfinite(float(value)) for value in re.findall(r'(?:x|y|cx|cy|width|height)="([-\d.]+)"', page))


def test_what_many_classes_take_grows_with_the_rows_and_not_with_the_square_of_the_classes(scenes: Table) -> None:
    names = [f"thing <{number}>" for number in range(2000)]
    truth = np.append(np.arange(60) * 30, 30)
    found = np.where(truth % 20 < 10, truth, truth + 1)
    tracemalloc.start()
    result = evaluate._classification(names, truth, found, np.arange(61), 0)
    size = len(records.to_json(result, indent=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.cells[:3] == ((0, 0, 1), (30, 31, 2), (60, 60, 1)) and len(result.cells) == 60
    assert result.confusion == () and size < 1e6 and peak < 30e6, "a matrix has 4 million cells"
    page = evaluation_page.render(
        dataclasses.replace(
            evaluate.evaluate(scenes, EvaluationSpec(max_rows=20)), zero_shot=ZeroShot(result, ("{}",), ())
        )
    ).decode()
    assert "Confused most: thing &lt;30&gt; as thing &lt;31&gt; (2), thing" in page
    assert "<summary>All 2,000 classes</summary>" in page and 'aria-label="confusion matrix"' not in page


def test_an_evaluation_of_version_1_0_is_read() -> None:
    figures = {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}}
    one = {"label": "a", "rows": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    written = json.dumps({"figures": figures, "classes": [one, one], "confusion": [[1, 1], [1, 1]]}).encode()
    read = records.from_json(Classification, written, "eval.json")
    assert read.confusion == ((1, 1), (1, 1)) and read.cells == ()


def test_classes_that_no_label_is_of(scenes: Table) -> None:
    classes = Classes({"cat": ("cat",), "dog": ("dog",)})
    demo = towers.load(towers.DEMO, device="cpu", precision="fp32")
    with pytest.raises(BadEvaluation, match="no row's label is one of the 2 classes: the labels are circle"):
        evaluate.evaluate(scenes, EvaluationSpec(labels="meta.shape", classes="c"), classes, lambda: demo)
