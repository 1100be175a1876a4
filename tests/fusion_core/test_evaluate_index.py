"""An index measured on its table, against float64 arithmetic over the vectors as stored."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_core import build, choose, evaluate_index, files, fusers, index_page, manifest, vectors
from fusion_core.index import SCORE_TOLERANCE, BadIndex, Index
from fusion_core.table import Table
from schemas import records
from schemas.index import IndexRecord
from schemas.index_evaluation import IndexEvaluation
from tests.fusion_core.test_index import brute_force, pairs, table_spec, unit_rows, write_table

DIM = 32


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few timed queries will do; that the threads ask at once does not depend on how many."""
    monkeypatch.setattr(evaluate_index, "_TIMED", 64)
    monkeypatch.setattr(choose, "_TIMED_QUERIES", 3)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, np.ndarray, np.ndarray]:
    image, text = pairs(3000, seed=1)
    return write_table(tmp_path_factory.mktemp("table"), image, text, part_rows=1000), image, text


@pytest.fixture(scope="module")
def approximate(table: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("index"))
    build.build(table[0], place, exact_rows=100, factory="IVF1,PQ16x4fs,Refine(SQ8)", target_recall=0.9)
    return place


@pytest.fixture(scope="module")
def measured(table: Any, approximate: str) -> IndexEvaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_index, "_TIMED", 64)
        patch.setattr(choose, "_TIMED_QUERIES", 3)
        return evaluate_index.evaluate(Index.open(approximate), table[0], queries=300)


def drawn(table: Table, place: str, column: str, wanted: int, seed: int = 0) -> np.ndarray:
    tuned = evaluate_index._tuned(Index.open(place))
    ids: np.ndarray = choose.draw(table, column, wanted, np.random.default_rng((seed, 1)), tuned)[0]
    return ids


def share(found: IndexEvaluation, queries: str, k: int) -> float:
    return next(item.recall for item in found.recalls if (item.queries, item.k) == (queries, k))


def test_recall_is_that_of_brute_force_without_the_query_itself(
    table: Any, approximate: str, measured: IndexEvaluation
) -> None:
    opened, (_, image, text) = Index.open(approximate), table
    for kind, matrix in (("text", text), ("image", image)):
        own = drawn(table[0], approximate, f"{kind}_embedding", 300)
        queries = matrix[own].astype(np.float16).astype(np.float32)
        every = queries.astype(np.float64) @ image.astype(np.float16).astype(np.float64).T
        for k in (1, 10, 100):
            best, true = brute_force(queries, image, np.arange(3000), k + 1)
            _, given = opened.search(queries, k + 1)
            right = shared = 0
            for query, row in enumerate(own):
                mine = given[query][given[query] != row][:k]
                least = best[query][true[query] != row][:k].min()
                right += (every[query, mine] >= least - SCORE_TOLERANCE).sum()
                shared += len(set(mine) & set(true[query][true[query] != row][:k]))
            assert share(measured, kind, k) == pytest.approx(right / (300 * k), abs=1e-4)
            assert share(measured, kind, k) == pytest.approx(shared / (300 * k), abs=2e-3)
    for item in measured.recalls:
        assert 0 <= item.low <= item.recall <= item.high <= 1 and item.high - item.low < 0.2
    assert 0.5 < share(measured, "text", 10) < 1  # or else nothing was compared


def test_queries_are_rows_that_did_not_tune_the_index(table: Any, approximate: str, measured: IndexEvaluation) -> None:
    tuned = evaluate_index._tuned(Index.open(approximate))
    expected = np.union1d(*(choose.draw_queries(table[0], "image_embedding", 0)[1],) * 2)
    np.testing.assert_array_equal(tuned, expected)
    assert len(tuned) == 1000 and measured.queries_are_new and not measured.notes
    own = drawn(table[0], approximate, "text_embedding", 300)
    assert len(own) == 300 and not np.isin(own, tuned).any()


def test_on_the_rows_that_tuned_it_the_index_has_the_recall_that_it_reports(tmp_path: Path) -> None:
    """Two ways to the same number: of a small table all rows are queries, of the build and of the evaluation."""
    image, text = pairs(700, seed=4)
    image[350:370] = image[:20]  # identical vectors, that neither counts as misses
    table = write_table(tmp_path / "table", image, text, part_rows=300)
    options = {"exact_rows": 100, "factory": "IVF1,SQfp16", "target_recall": 0.8}
    record = build.build(table, str(tmp_path / "index"), **options)
    found = evaluate_index.evaluate(Index.open(str(tmp_path / "index")), table, queries=1000)
    assert found.queries_are_new is False and "too small" in found.notes[-1]
    assert "700 text queries instead of 1,000" in found.notes[0]
    for claim, reported in zip(found.claims, record.recalls, strict=True):
        assert claim.reported == reported and claim.holds and claim.low <= 0 <= claim.high
        assert claim.measured == pytest.approx(reported.recall, abs=2e-4) and claim.measured >= 0.8


def test_an_index_that_visits_one_cell_is_found_out(table: Any, tmp_path: Path) -> None:
    place = tmp_path / "index"
    build.build(table[0], str(place), exact_rows=100, factory="IVF1,SQfp16")
    path = place / "index.json"
    changed = json.loads(path.read_bytes())
    changed["parameters"] = {"nprobe": 1}
    path.write_text(json.dumps(changed))
    found = evaluate_index.evaluate(Index.open(str(place)), table[0], queries=200)
    assert share(found, "text", 10) < 0.5
    assert [claim.holds for claim in found.claims] == [False, False]
    assert found.claims[0].high < -0.3
    (by_text, _) = found.retrievals
    assert by_text.indexed is not None and by_text.indexed[10] < by_text.exact[10] - 0.1
    recalls = [setting.recalls["text"] for setting in found.settings]  # nprobe 1, 2, 4
    assert recalls == sorted(recalls) and recalls[-1] > recalls[0] + 0.1


def test_partners_are_found_as_often_as_by_brute_force(table: Any, approximate: str, measured: IndexEvaluation) -> None:
    _, image, text = table
    assert [(item.queries, item.answers) for item in measured.retrievals] == [("text", "image"), ("image", "text")]
    for item, queries, answers in zip(measured.retrievals, (text, image), (image, text), strict=True):
        own = drawn(table[0], approximate, f"{item.queries}_embedding", 300)
        stored = queries[own].astype(np.float16).astype(np.float64)
        scores = stored @ answers.astype(np.float16).astype(np.float64).T
        ranks = (scores >= scores[np.arange(300), own][:, None] - 1e-5).sum(axis=1)
        assert item.n_queries == 300
        assert item.exact == {k: pytest.approx((ranks <= k).mean(), abs=1e-4) for k in evaluate_index.KS}
    indexed = measured.retrievals[0].indexed
    assert indexed is not None and measured.retrievals[1].indexed is None
    assert all(indexed[k] <= measured.retrievals[0].exact[k] + 0.02 for k in indexed)


def test_the_same_picture_is_a_hit_and_another_that_scores_as_high_stands_before_it(tmp_path: Path) -> None:
    """Rows 0 and 1 are one vector; 2 and 3 are two pictures that the caption cannot tell apart."""
    axes = np.eye(DIM)
    image = np.stack([axes[0], axes[0], unit_rows(axes[None, 1] + axes[2])[0], unit_rows(axes[None, 1] - axes[2])[0]])
    text = np.stack([axes[0], axes[0], axes[1], axes[3]])
    table = write_table(tmp_path / "table", image, text, part_rows=2)
    build.build(table, str(tmp_path / "index"))
    found = evaluate_index.evaluate(Index.open(str(tmp_path / "index")), table)
    (by_text, by_image) = found.retrievals
    # Caption 3 is at a right angle to all: four stand as high as its picture does.
    assert by_text.exact == by_text.indexed
    assert (by_text.exact[1], by_text.exact[2], by_text.exact[5]) == (0.5, 0.75, 1.0)
    assert by_image.exact[1] == 0.75  # picture 3 is nearer to caption 2 than to its own
    assert share(found, "text", 100) == 1.0  # fewer vectors than k


def test_rows_without_a_partner_are_no_queries_of_its_kind(tmp_path: Path) -> None:
    image, text = pairs(400, seed=6)
    has_text = np.arange(400) % 2 == 0
    table = write_table(tmp_path / "table", image, text, has_text=has_text)
    build.build(table, str(tmp_path / "index"))
    found = evaluate_index.evaluate(Index.open(str(tmp_path / "index")), table, queries=400)
    sizes = {(item.queries, item.n_queries) for item in found.recalls}
    assert sizes == {("text", 200), ("image", 400)}
    assert [item.n_queries for item in found.retrievals] == [200, 200]


def test_a_table_of_images_alone_is_measured_with_images_alone(tmp_path: Path) -> None:
    image, text = pairs(150, seed=7)
    table = write_table(tmp_path / "table", image, text, has_text=np.zeros(150, bool))
    build.build(table, str(tmp_path / "index"))
    found = evaluate_index.evaluate(Index.open(str(tmp_path / "index")), table, queries=50)
    assert {item.queries for item in found.recalls} == {"image"} and found.retrievals == ()
    assert "there are no text queries" in found.notes[0]
    assert "Partners" not in index_page.render(found)


def test_an_index_of_texts_is_asked_by_images_and_by_texts(table: Any, tmp_path: Path) -> None:
    build.build(table[0], str(tmp_path), "text_embedding")
    found = evaluate_index.evaluate(Index.open(str(tmp_path)), table[0], queries=100)
    assert {item.recall for item in found.recalls} == {1.0}
    (by_image, by_text) = found.retrievals
    assert (by_image.queries, by_image.answers, by_image.indexed) == ("image", "text", by_image.exact)
    assert (by_text.queries, by_text.answers, by_text.indexed) == ("text", "image", None)


@pytest.mark.parametrize(("kind", "expected"), [("weighted_sum", ["text", "image"]), ("hadamard", ["fused"])])
def test_a_fused_column_is_asked_by_what_its_space_allows(tmp_path: Path, kind: str, expected: list[str]) -> None:
    image, text = pairs(200)
    fuser = fusers.create(kind, {}, DIM)
    fused, _ = fuser.fuse(image, text, np.ones(200, bool), np.ones(200, bool))
    table = write_table(tmp_path / "table", image, text, spec=table_spec(DIM, fuser), fused=fused)
    build.build(table, str(tmp_path / "index"), "fused_embedding")
    found = evaluate_index.evaluate(Index.open(str(tmp_path / "index")), table)
    assert list(dict.fromkeys(item.queries for item in found.recalls)) == expected
    partners = [(item.queries, item.answers) for item in found.retrievals]
    assert partners == ([("text", "fused"), ("image", "fused")] if kind == "weighted_sum" else [])


def test_latency_is_of_as_many_threads_as_said_and_faiss_is_left_as_it_was(table: Any, approximate: str) -> None:
    opened, queries = Index.open(approximate), table[2][:5].astype(np.float32)
    before = vectors.faiss.omp_get_max_threads()
    alone, many = (evaluate_index._latency(opened, queries, n) for n in (1, 32))
    assert vectors.faiss.omp_get_max_threads() == before
    assert (alone.n_queries, many.n_queries, many.concurrent) == (64, 64, 32)
    for found in (alone, many):
        assert sum(found.counts) == 64 and len(found.edges_ms) == len(found.counts) + 1
        assert found.edges_ms[0] <= found.p50_ms <= found.p99_ms <= found.edges_ms[-1]
    assert alone.queries_per_second <= 1100 / alone.mean_ms  # one after the other


def test_a_table_that_grew_is_measured_as_far_as_it_is_indexed(tmp_path: Path) -> None:
    image, text = pairs(600, seed=8)
    place = tmp_path / "table"
    write_table(place, image[:400], text[:400], part_rows=200)
    build.build(Table.open(str(place)), str(tmp_path / "index"))
    write_table(place, image, text, part_rows=200)  # the first two units again, and one more
    table, more = evaluate_index.open_table(Index.open(str(tmp_path / "index")))
    assert (table.num_rows, more) == (400, 200)
    found = evaluate_index.run(str(tmp_path / "index"))
    assert found.rows_since == 200 and "200 rows came" in found.notes[0] and share(found, "text", 10) == 1.0

    gone = Table.open(str(place)).records[0]
    manifest.remove_unit(str(place), gone)
    with pytest.raises(BadIndex, match=r"is not of .*as it is now.*anew"):
        evaluate_index.run(str(tmp_path / "index"))


def test_what_cannot_be_measured_is_said(table: Any, approximate: str, tmp_path: Path) -> None:
    image, text = pairs(20)
    nothing = write_table(tmp_path / "table", image, text, has_image=np.zeros(20, bool))
    build.build(nothing, str(tmp_path / "index"))
    with pytest.raises(BadIndex, match="holds no vectors, as none of the 20 rows has image_embedding"):
        evaluate_index.run(str(tmp_path / "index"))
    with pytest.raises(BadIndex, match=r"weights_sha256|is not of"):
        evaluate_index.run(approximate, str(tmp_path / "table"))
    (tmp_path / "table" / "table.json").unlink()
    with pytest.raises(BadIndex, match="was moved, say where to with --table"):
        evaluate_index.run(str(tmp_path / "index"))
    assert not list(tmp_path.rglob("eval.*"))
    for device, message in (("tpu", "not auto, cpu or cuda"), ("cuda:1", "not auto, cpu or cuda")):
        with pytest.raises(ValueError, match=message):
            vectors.may_use_gpu(device)


def test_queries_that_are_none_are_refused(table: Any, tmp_path: Path) -> None:
    record = build.build(table[0], str(tmp_path))
    assert record.training
    path = tmp_path / record.training.queries.path
    path.write_bytes(b"no archive" + b" " * (path.stat().st_size - 10))
    changed = path.read_bytes()
    with pytest.raises(BadIndex, match="SHA-256"):
        evaluate_index.evaluate(Index.open(str(tmp_path)), table[0])
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace(record.training.queries.sha256, files.sha256(str(path))))
    with pytest.raises(BadIndex, match="holds no queries"):
        evaluate_index.evaluate(Index.open(str(tmp_path)), table[0])
    assert path.read_bytes() == changed


def test_an_index_that_does_not_say_what_tuned_it_is_measured_all_the_same(table: Any, tmp_path: Path) -> None:
    build.build(table[0], str(tmp_path))
    changed = json.loads((tmp_path / "index.json").read_bytes())
    changed["training"] = None
    (tmp_path / "index.json").write_text(json.dumps(changed))
    found = evaluate_index.evaluate(Index.open(str(tmp_path)), table[0], queries=50)
    assert found.queries_are_new is None and "does not record" in found.notes[0]
    assert "It is not known" in index_page.render(found)


def test_the_page_stands_alone_and_shows_what_was_measured(measured: IndexEvaluation) -> None:
    page = index_page.render(measured)
    assert not re.search(r"<script|https?://|src=", page)
    assert page.count('<svg viewBox="0 0 420 230"') == 3
    for figure in (share(measured, "text", 10), share(measured, "image", 100), measured.retrievals[0].exact[10]):
        assert f"{figure:.4f}" in page
    assert all(f"nprobe {setting.parameters['nprobe']}" in page for setting in measured.settings)
    again = records.from_json(IndexEvaluation, records.to_json(measured), "eval.json")
    assert again == measured
    odd = json.loads(records.to_json(measured)) | {"index": "<b>&", "notes": ["<script>alert(1)</script>"]}
    page = index_page.render(records.from_json(IndexEvaluation, json.dumps(odd).encode(), "odd"))
    assert "<script" not in page and "&lt;b&gt;&amp;" in page


def test_plots_have_their_points_inside_and_their_ticks_apart() -> None:
    for points in ([(1, 0.99)], [(0.18, 0.7), (0.27, 1.0)], [(1, 0.0), (100, 1.0)], [(1e-4, 0.5), (4e3, 0.61)]):
        chart = index_page._chart([{"name": "x", "style": "c0", "points": points}], "ms")
        assert chart is not None
        for x, y, *_ in chart["series"][0]["points"]:
            assert index_page._LEFT <= x <= index_page._RIGHT and index_page._TOP <= y <= index_page._BOTTOM
        places = [x for x, _ in chart["x_ticks"]]
        assert 2 <= len(places) <= 8 and min(np.diff(places)) > 15, chart["x_ticks"]
    assert index_page._chart([], "k") is None


def test_the_record_of_an_index_is_not_changed_by_other_parameters(approximate: str) -> None:
    opened = Index.open(approximate)
    before: IndexRecord = opened.record
    other = opened.retuned(nprobe=3)
    assert other.record.parameters == {**before.parameters, "nprobe": 3} and opened.record == before
