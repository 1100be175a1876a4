import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from fusion_core import build, files, fusers, index, manifest, merge, vectors
from fusion_core import table as tables
from fusion_core.index import RECORD, BadIndex, Index
from fusion_core.table import Table
from fusion_core.writer import UnitWriter
from schemas import records
from schemas.feature_table import Preprocess, TableSpec, TowerSpec, features_schema
from schemas.index import META, IndexRecord
from schemas.samples import InputIdentity, Unit

DIM = 32


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)


def pairs(rows: int, seed: int = 0, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Image and text vectors of clustered meanings, far apart from each other as those of CLIP towers are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(4, rows // 200), dim))
    meaning = unit_rows(centres[rng.integers(len(centres), size=rows)] + 1.2 * rng.standard_normal((rows, dim)))
    gap_image, gap_text = unit_rows(rng.standard_normal((2, dim)))
    words = unit_rows(meaning + 0.8 * unit_rows(rng.standard_normal((rows, dim))))
    return unit_rows(meaning + 0.9 * gap_image), unit_rows(words + 0.9 * gap_text)


def table_spec(dim: int, fuser: fusers.Fuser | None = None, weights: str = "w") -> TableSpec:
    tower = TowerSpec("m", "", "c", weights, dim, "fp32", Preprocess(32, 32, (0.5,) * 3, (0.5,) * 3))
    return TableSpec(tower, fuser=fuser.spec if fuser else None)


def write_table(
    place: Path,
    image: np.ndarray,
    text: np.ndarray,
    has_image: np.ndarray | None = None,
    has_text: np.ndarray | None = None,
    part_rows: int = 2500,
    spec: TableSpec | None = None,
    fused: np.ndarray | None = None,
) -> Table:
    spec = manifest.claim(str(place), spec or table_spec(image.shape[1]))
    schema = features_schema(spec)
    has = {"has_image": has_image, "has_text": has_text}
    flags = {name: np.ones(len(image), bool) if flag is None else flag for name, flag in has.items()}
    vectors = {"image_embedding": np.where(flags["has_image"][:, None], image, 0)}
    vectors["text_embedding"] = np.where(flags["has_text"][:, None], text, 0)
    vectors |= {} if fused is None else {"fused_embedding": fused}
    for number, start in enumerate(range(0, len(image), part_rows)):
        rows = np.arange(start, min(start + part_rows, len(image)))
        unit = Unit(f"unit-{number:03d}", "tar", f"/data/{number:03d}.tar", InputIdentity(1, 1))
        columns = {field.name: pa.nulls(len(rows), field.type) for field in schema}
        columns |= {
            "key": pa.array([f"key-{row}" for row in rows]),
            "shard": pa.array([unit.shard] * len(rows)),
            "row": pa.array(rows - start),
            "caption": pa.array([f"caption {row}" if row % 3 else None for row in rows]),
        }
        columns |= {name: pa.array(flag[rows]) for name, flag in flags.items()}
        for name, matrix in vectors.items():
            columns[name] = tables.to_arrow(np.ascontiguousarray(matrix[rows], np.float16), schema.field(name).type)
        with UnitWriter(str(place), spec, unit) as writer:
            writer.write(pa.record_batch([columns[name] for name in schema.names], schema=schema))
            writer.commit()
    return Table.open(str(place))


def brute_force(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids by float64 arithmetic over the vectors as stored."""
    scores = queries.astype(np.float32).astype(np.float64) @ vectors.astype(np.float16).astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), ids[order]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, np.ndarray, np.ndarray, np.ndarray]:
    """A table of three parts in which a third of the rows has no image."""
    image, text = pairs(700, seed=3)
    has_image = np.random.default_rng(0).random(700) > 1 / 3
    table = write_table(tmp_path_factory.mktemp("sparse"), image, text, has_image, part_rows=300)
    return table, image, text, has_image


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, np.ndarray, np.ndarray]:
    image, text = pairs(8000)
    return write_table(tmp_path_factory.mktemp("large"), image, text), image, text


@pytest.fixture(scope="module")
def approximate(large: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[IndexRecord, Path]:
    """An inverted-file index of the large table."""
    place = tmp_path_factory.mktemp("approximate")
    return build.build(large[0], str(place), exact_rows=1000, factory="IVF1,SQfp16"), place


@pytest.fixture
def built(sparse: Any, tmp_path: Path) -> Path:
    build.build(sparse[0], str(tmp_path / "index"))
    return tmp_path / "index"


# --- the answers


def test_exact_index_answers_like_brute_force_and_ids_are_table_rows(sparse: Any, built: Path) -> None:
    _, image, text, has_image = sparse
    opened = Index.open(str(built))
    ids = np.flatnonzero(has_image)
    scores, found = opened.search(text[:50].astype(np.float32), 7)
    expected_scores, expected = brute_force(text[:50], image[ids], ids, 7)
    assert scores.dtype == np.float32 and found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert (opened.record.rows_table, opened.record.rows_indexed) == (700, len(ids))
    assert opened.record.vectors.rows == len(ids) and opened.record.meta.rows == 700


def test_meta_rows_are_the_tables_rows_in_the_order_asked_for(
    sparse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_META_BATCH_ROWS", 64)  # many batches; the table's own have 300 rows
    table = sparse[0]
    build.build(table, str(tmp_path))
    wanted = [699, 0, 64, 63, 64, 301]
    rows = Index.open(str(tmp_path)).meta(wanted)
    assert rows.schema == META
    assert rows["id"].to_pylist() == wanted
    expected = table.take(wanted, [name for name in META.names if name != "id"])
    assert rows.drop_columns("id").to_pylist() == expected.to_pylist()
    assert Index.open(str(tmp_path)).meta([]).num_rows == 0
    for outside in ([-1], [700]):
        with pytest.raises(ValueError, match=r"0\.\.699"):
            Index.open(str(tmp_path)).meta(outside)


def test_answers_are_padded_where_the_index_is_smaller_than_k(sparse: Any, built: Path) -> None:
    opened = Index.open(str(built))
    scores, ids = opened.search(sparse[2][:2].astype(np.float32), 1000)
    n = opened.record.rows_indexed
    assert ids.shape == (2, 1000) and set(ids[0, :n]) == set(np.flatnonzero(sparse[3]))
    assert (ids[:, n:] == -1).all() and np.isneginf(scores[:, n:]).all()
    assert opened.search(np.empty((0, DIM), np.float32), 5)[1].shape == (0, 5)


def test_an_index_of_nothing_is_built_and_answers_nothing(tmp_path: Path) -> None:
    image, text = pairs(20)
    table = write_table(tmp_path / "table", image, text, has_image=np.zeros(20, bool))
    record = build.build(table, str(tmp_path / "index"))
    opened = Index.open(str(tmp_path / "index"))
    assert (record.rows_indexed, record.recalls, record.latency_ms) == (0, (), {})
    assert (opened.search(text.astype(np.float32), 3)[1] == -1).all()
    assert opened.meta([19])["key"].to_pylist() == ["key-19"]


def test_an_index_of_one_vector_can_be_read_again(tmp_path: Path) -> None:
    image, text = pairs(1)
    table = write_table(tmp_path / "table", image, text, has_text=np.zeros(1, bool))
    assert build.build(table, str(tmp_path / "index")).recalls == ()  # nothing to find beside itself
    assert Index.open(str(tmp_path / "index")).search(image.astype(np.float32), 2)[1].tolist() == [[0, -1]]


def test_an_index_of_an_empty_table_is_built(tmp_path: Path) -> None:
    manifest.claim(str(tmp_path / "table"), table_spec(DIM))
    build.build(Table.open(str(tmp_path / "table")), str(tmp_path / "index"))
    opened = Index.open(str(tmp_path / "index"))
    assert opened.search(np.ones((1, DIM), np.float32), 2)[1].tolist() == [[-1, -1]]
    assert opened.meta([]).schema == META


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.zeros((1, DIM)), 0, "k must be at least 1"),
        (np.zeros((1, DIM)), -3, "got -3"),
        (np.zeros((1, DIM + 1)), 1, r"\[q, 32\], got \[1, 33\]"),
        (np.zeros(DIM), 1, r"\[q, 32\], got \[32\]"),
        (np.full((1, DIM), np.nan), 1, "NaN"),
    ],
)
def test_impossible_queries_are_refused(built: Path, vectors: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Index.open(str(built)).search(vectors.astype(np.float32), k)


def test_exact_search_equals_brute_force_over_many_blocks(sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_BLOCK_ROWS", 7)
    table, image, text, has_image = sparse
    ids = np.flatnonzero(has_image)
    scores, found = index.exact_search(table, "image_embedding", text[:20].astype(np.float32), 12)
    expected_scores, expected = brute_force(text[:20], image[ids], ids, 12)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


def test_exact_search_pads_and_puts_the_lower_id_first_among_equals(tmp_path: Path) -> None:
    image = np.repeat(unit_rows(np.eye(2, DIM)), [3, 2], axis=0)
    table = write_table(tmp_path, image, image, part_rows=2)
    scores, ids = index.exact_search(table, "image_embedding", np.eye(1, DIM, dtype=np.float32), 7)
    assert ids.tolist() == [[0, 1, 2, 3, 4, -1, -1]]
    assert scores.tolist() == [[1, 1, 1, 0, 0, -np.inf, -np.inf]]


# --- the approximate index, and what is said about it


def true_recall(found: np.ndarray, queries: np.ndarray, vectors: np.ndarray, k: int = 10) -> float:
    _, expected = brute_force(queries, vectors, np.arange(len(vectors)), k)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found, expected, strict=True)]))


def test_the_approximate_index_reaches_the_target_on_every_kind_of_query(large: Any, approximate: Any) -> None:
    _, image, text = large
    record, place = approximate
    opened = Index.open(str(place))
    assert record.factory == "IVF179,SQfp16"  # 39 training points for each cell of the 7,000 that are no queries
    by_text = true_recall(opened.search(text[:1000].astype(np.float32), 10)[1], text[:1000], image)
    assert by_text >= build.TARGET_RECALL - 0.02
    recalls = {found.queries: found for found in record.recalls}
    assert recalls["text"].n_queries == recalls["image"].n_queries == 1000
    assert recalls["text"].recall == pytest.approx(by_text, abs=0.02)
    assert set(record.latency_ms) == {"p50", "p99"} and record.latency_ms["p50"] > 0


def test_half_the_cells_would_miss_the_target_for_texts_though_not_for_images(large: Any, approximate: Any) -> None:
    """What tuning on image queries would have chosen: the harder queries decide."""
    _, image, text = large
    record, place = approximate
    opened, nprobe = Index.open(str(place)), record.parameters["nprobe"]
    assert nprobe > 2
    by_text, by_image = (
        true_recall(opened.search(queries.astype(np.float32), 10, nprobe // 2)[1], queries, image)
        for queries in (text[:500], image[:500])
    )
    assert by_text < build.TARGET_RECALL < by_image


def test_approximate_scores_are_those_of_the_stored_vectors(large: Any, approximate: Any) -> None:
    _, image, text = large
    scores, ids = Index.open(str(approximate[1])).search(text[:100].astype(np.float32), 10)
    stored = image.astype(np.float16).astype(np.float64)
    expected = np.einsum("qd,qkd->qk", text[:100].astype(np.float32).astype(np.float64), stored[ids])
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_more_cells_are_visited_when_the_first_hold_fewer_than_k(large: Any, approximate: Any) -> None:
    opened = Index.open(str(approximate[1]))
    _, ids = opened.search(large[2][:3].astype(np.float32), 8000, nprobe=1)
    assert [len(set(row)) for row in ids] == [8000] * 3
    with pytest.raises(ValueError, match="nprobe"):
        opened.search(large[2][:3].astype(np.float32), 10, nprobe=0)


def test_a_higher_target_visits_more_cells(large: Any, approximate: Any, tmp_path: Path) -> None:
    record = build.build(large[0], str(tmp_path), exact_rows=1000, factory="IVF1,SQfp16", target_recall=1.0)
    assert record.parameters["nprobe"] > approximate[0].parameters["nprobe"]
    assert all(found.recall == 1.0 for found in record.recalls)


def test_an_index_of_texts_is_tuned_with_image_queries_first(large: Any, tmp_path: Path) -> None:
    record = build.build(large[0], str(tmp_path), "text_embedding", exact_rows=1000, factory="IVF1,SQfp16")
    assert [found.queries for found in record.recalls] == ["image", "text"]
    assert min(found.recall for found in record.recalls) >= build.TARGET_RECALL


def test_repeated_vectors_are_no_misses(tmp_path: Path) -> None:
    """Every picture 25 times: which 10 of 25 equals are found is chance, and right."""
    image, text = pairs(200, seed=5)
    image, text = np.repeat(image, 25, axis=0), np.repeat(text, 25, axis=0)
    table = write_table(tmp_path / "table", image, text)
    record = build.build(table, str(tmp_path / "index"), exact_rows=100, factory="IVF1,SQfp16", target_recall=1.0)
    assert [found.recall for found in record.recalls] == [1.0, 1.0]
    assert record.parameters["nprobe"] < 100


def test_recall_counts_by_score_and_ignores_padding() -> None:
    inf = np.inf
    exact_scores = np.array([[0.9, 0.8, 0.8], [0.7, 0.6, -inf]], np.float32)
    exact_ids = np.array([[1, 2, 3], [4, 5, -1]])
    scores = np.array([[0.9, 0.8, 0.5], [0.7, -inf, -inf]], np.float32)
    ids = np.array([[1, 9, 8], [4, -1, -1]])
    assert index.recall(scores, ids, exact_scores, exact_ids, 3) == pytest.approx(3 / 5)
    assert index.recall(exact_scores, exact_ids, exact_scores, exact_ids, 3) == 1
    nothing = np.full((2, 3), -1)
    assert np.isnan(index.recall(scores, ids, exact_scores, nothing, 3))


def test_the_same_table_and_seed_give_the_same_bytes(large: Any, approximate: Any, tmp_path: Path) -> None:
    first, place = approximate
    again = build.build(large[0], str(tmp_path / "again"), exact_rows=1000, factory="IVF1,SQfp16")
    other = build.build(large[0], str(tmp_path / "other"), exact_rows=1000, factory="IVF1,SQfp16", seed=1)
    for part in (first.vectors, first.meta):
        assert (place / part.path).read_bytes() == (tmp_path / "again" / part.path).read_bytes()
    assert (again.parameters, again.recalls) == (first.parameters, first.recalls)
    assert other.vectors.sha256 != first.vectors.sha256 and other.meta == first.meta


def test_many_threads_get_the_answers_of_one(large: Any, approximate: Any) -> None:
    opened, queries = Index.open(str(approximate[1])), large[2][:64].astype(np.float32)

    def ask(query: np.ndarray) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = opened.meta(opened.search(query[None], 5)[1][0]).to_pylist()
        return rows

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, queries)) == [ask(query) for query in queries]


# --- fused columns


def test_rows_without_a_fused_vector_are_not_indexed(tmp_path: Path) -> None:
    image, text = pairs(300)
    fuser = fusers.create("hadamard", {}, DIM)
    has_text = np.arange(300) % 4 > 0
    fused, valid = fuser.fuse(image, text, np.ones(300, bool), has_text)
    table = write_table(tmp_path / "table", image, text, has_text=has_text, spec=table_spec(DIM, fuser), fused=fused)
    record = build.build(table, str(tmp_path / "index"), "fused_embedding")
    assert record.rows_indexed == valid.sum() == 225
    _, ids = Index.open(str(tmp_path / "index")).search(fused[valid].astype(np.float32), 1)
    np.testing.assert_array_equal(ids[:, 0], np.flatnonzero(valid))
    assert [found.queries for found in record.recalls] == ["fused"]  # texts and images live in another space


def test_a_fused_column_in_the_backbones_space_is_measured_with_texts_and_images(tmp_path: Path) -> None:
    image, text = pairs(300)
    fuser = fusers.create("weighted_sum", {}, DIM)
    fused, _ = fuser.fuse(image, text, np.ones(300, bool), np.ones(300, bool))
    table = write_table(tmp_path / "table", image, text, spec=table_spec(DIM, fuser), fused=fused)
    record = build.build(table, str(tmp_path / "index"), "fused_embedding")
    assert [found.queries for found in record.recalls] == ["text", "image"]


# --- what is refused before any work


@pytest.mark.parametrize("value", [np.nan, 2.0, 0.0])
def test_a_vector_that_is_no_unit_vector_is_named(tmp_path: Path, value: float) -> None:
    image, text = pairs(100)
    image[57] *= value
    table = write_table(tmp_path / "table", image, text, part_rows=40)
    with pytest.raises(ValueError, match=r"row 17 of .*001.* image_embedding of length"):
        build.build(table, str(tmp_path / "index"))
    assert not (tmp_path / "index" / "index.json").exists()


def test_impossible_builds_are_refused(sparse: Any, tmp_path: Path) -> None:
    for options, message in (
        ({"column": "caption"}, "'caption'.*image_embedding"),
        ({"column": "fused_embedding"}, "without a fuser"),
        ({"target_recall": 0.0}, "got 0.0"),
        ({"target_recall": float("nan")}, "got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            build.build(sparse[0], str(tmp_path / "index"), **options)
    (tmp_path / "index.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(BadIndex, match="not a IndexRecord"):
        build.build(sparse[0], str(tmp_path))
    assert "somebody" in (tmp_path / "index.json").read_text()


# --- files that are not what index.json says


def never(*_: object) -> None:
    raise AssertionError("FAISS was given a file that had not been checked")


def part_path(place: Path, name: str) -> Path:
    return next(place.glob(f"{name}-*"))


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-100],
    "lengthened": lambda data: data + b"\0",
    "emptied": lambda data: b"",
    "one bit flipped": lambda data: flip(data, len(data) // 2),
    "foreign": lambda data: b"PK\x03\x04" * (len(data) // 4) + b"P" * (len(data) % 4),
}


@pytest.mark.parametrize("part", ["vectors", "meta"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_never_reach_faiss(built: Path, part: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors.faiss, "read_index", never)
    path = part_path(built, part)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(BadIndex, match=f"{part}-.*(bytes|SHA-256).*anew"):
        Index.open(str(built))


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, b"IxPT"), (4, struct.pack("<i", 2**30)), (8, struct.pack("<q", 2**40)), (32, b"\0"), (33, b"\1")],
    ids=["type", "dim", "rows", "trained", "metric"],
)
def test_headers_are_checked_even_where_hashes_are_not(
    built: Path, position: int, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors.faiss, "read_index", never)
    path = part_path(built, "vectors")
    data = path.read_bytes()
    path.write_bytes(data[:position] + value + data[position + len(value) :])
    with pytest.raises(BadIndex, match="begins as"):
        Index.open(str(built), verify=False)


def test_foreign_files_are_refused_even_where_hashes_are_not_checked(
    built: Path, approximate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors.faiss, "read_index", never)
    for place in (built, Path(copy_of(approximate[1], tmp_path / "ivf"))):
        path = part_path(place, "vectors")
        path.write_bytes(b"\0" * path.stat().st_size)
        with pytest.raises(BadIndex, match="begins as"):
            Index.open(str(place), verify=False)


def copy_of(source: Path, target: Path) -> str:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return str(target)


def test_a_file_that_is_missing_is_named(built: Path) -> None:
    part_path(built, "meta").unlink()
    with pytest.raises(BadIndex, match=r"meta-[0-9a-f]{8}\.arrow is missing"):
        Index.open(str(built))
    with pytest.raises(BadIndex, match=r"there is no index at .*fusion index"):
        Index.open(str(built / "nowhere"))


def with_path(record: IndexRecord, path: str) -> IndexRecord:
    return replace(record, vectors=msgspec.structs.replace(record.vectors, path=path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: with_path(r, "../../etc/passwd"), "matching regex.*vectors.path"),
        (lambda r: with_path(r, "passwd"), "none of an index.*passwd"),
        (lambda r: replace(r, factory="IVF16,PQ8"), "IVF16,PQ8"),
        (lambda r: replace(r, metric="l2"), "'l2'"),
        (lambda r: replace(r, rows_indexed=10**6), "1000000 indexed of 700"),
        (lambda r: replace(r, dim=64), "too short|begins as"),
        (lambda r: replace(r, schema_version="2.0"), "schema version '2.0'"),
    ],
)
def test_an_index_json_that_cannot_be_is_refused(
    built: Path, change: Callable[[IndexRecord], IndexRecord], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors.faiss, "read_index", never)
    path = built / "index.json"
    changed = change(records.from_json(IndexRecord, path.read_bytes(), str(path)))
    path.write_bytes(records.to_json(changed))
    with pytest.raises(BadIndex, match=message):
        Index.open(str(built))


# --- rebuilding


def answers(opened: Index, queries: np.ndarray) -> list[list[int]]:
    found: list[list[int]] = opened.search(queries.astype(np.float32), 3)[1].tolist()
    return found


@pytest.mark.parametrize("publication", [0, 1, 2])
def test_a_rebuild_that_dies_leaves_the_old_index_readable(
    sparse: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publication: int
) -> None:
    image, text = pairs(90, seed=9)
    before = answers(Index.open(str(built)), text)
    other = write_table(tmp_path / "other", image, text)
    publish, published = files.PendingFile.publish, []

    def dying(self: files.PendingFile, name: str) -> None:
        if len(published) == publication:
            raise OSError("killed")
        published.append(name)
        publish(self, name)

    monkeypatch.setattr(files.PendingFile, "publish", dying)
    with pytest.raises(OSError, match="killed"):
        build.build(other, str(built))
    opened = Index.open(str(built))
    opened.check_table(sparse[0])
    assert answers(opened, text) == before and len(published) == publication

    monkeypatch.setattr(files.PendingFile, "publish", publish)
    build.build(other, str(built))
    Index.open(str(built)).check_table(other)
    record = Index.open(str(built)).record
    assert {path.name for path in built.iterdir() if path.is_file()} == {part.path for part in record.files} | {RECORD}


def test_an_open_index_survives_being_replaced(large: Any, approximate: Any, tmp_path: Path) -> None:
    place = copy_of(approximate[1], tmp_path / "index")
    image, text = pairs(90, seed=9)
    opened = Index.open(place)
    before = answers(opened, text)
    build.build(write_table(tmp_path / "other", image, text), place)
    assert answers(opened, text) == before
    assert opened.meta([7999])["key"].to_pylist() == ["key-7999"]


def test_a_reader_that_meets_a_rebuild_half_way_reads_again(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = pairs(90, seed=9)
    path = built / "index.json"
    old = records.from_json(IndexRecord, path.read_bytes(), str(path))
    new = build.build(write_table(tmp_path / "other", image, text), str(built))
    read, seen = index.read_record, [old]
    monkeypatch.setattr(index, "read_record", lambda place: seen.pop() if seen else read(place))
    assert Index.open(str(built)).record == new


# --- tables


def test_the_table_that_was_indexed_is_recognised_and_another_is_not(sparse: Any, built: Path, tmp_path: Path) -> None:
    table, image, text, has_image = sparse
    opened = Index.open(str(built))
    opened.check_table(table)
    grown = write_table(tmp_path / "grown", image, text, has_image, part_rows=350)
    with pytest.raises(BadIndex, match=r"3 parts here, 2 there; features/unit-000-.* only here.*anew"):
        opened.check_table(grown)
    spec = table_spec(DIM, weights="others")
    with pytest.raises(BadIndex, match=r"weights_sha256: 'w' here, 'others' there"):
        opened.check_table(write_table(tmp_path / "other", image, text, has_image, part_rows=300, spec=spec))


# --- object stores


@pytest.mark.parametrize("exact_rows", [50_000, 100])
def test_an_index_on_an_object_store_is_written_and_opened(
    sparse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_rows: int
) -> None:
    """A local folder behind a URI: everything goes through pyarrow.fs, nothing through local paths."""
    folder = tmp_path / "bucket" / "index"
    folder.mkdir(parents=True)
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    local = files.resolve
    monkeypatch.setattr(
        files, "resolve", lambda place: (store, place.removeprefix("test://")) if "://" in place else local(place)
    )
    record = build.build(
        sparse[0],
        "test://bucket/index",
        exact_rows=exact_rows,
        factory="IVF1,SQfp16" if exact_rows == 100 else "",
        target_recall=1.0,
    )
    names = {path.name for path in folder.iterdir()}
    assert names == {part.path for part in record.files} | {RECORD}
    opened = Index.open("test://bucket/index")
    queries, ids = sparse[2][:5], np.flatnonzero(sparse[3])
    _, expected = brute_force(queries, sparse[1][ids], ids, 3)
    assert answers(opened, queries) == expected.tolist()
    assert opened.meta([699])["key"].to_pylist() == ["key-699"]

    path = folder / record.vectors.path
    path.write_bytes(flip(path.read_bytes(), 500))
    monkeypatch.setattr(vectors.faiss, "read_index", never)
    with pytest.raises(BadIndex, match=r"test://bucket/index/vectors-.*SHA-256"):
        Index.open("test://bucket/index")


# --- a search among some rows only, and vectors by id


def assert_exact_among(opened: Index, queries: np.ndarray, vectors: np.ndarray, allowed: np.ndarray, k: int) -> None:
    """`allowed`: ids, all of them indexed."""
    scores, ids = opened.search(queries.astype(np.float32), k, allowed=allowed)
    best, expected = brute_force(queries, vectors[allowed], allowed, k)
    wanted = expected.shape[1]
    np.testing.assert_array_equal(ids[:, :wanted], expected)
    np.testing.assert_allclose(scores[:, :wanted], best, atol=1e-5)
    assert (ids[:, wanted:] == -1).all() and (scores[:, wanted:] == -np.inf).all()


@pytest.fixture(scope="module", params=["flat", "inverted file"])
def either(request: pytest.FixtureRequest, large: Any, tmp_path_factory: pytest.TempPathFactory) -> Index:
    place = tmp_path_factory.mktemp("either")
    options = {"exact_rows": 10_000} if request.param == "flat" else {"exact_rows": 1000, "factory": "IVF1,SQfp16"}
    build.build(large[0], str(place), **options)
    return Index.open(str(place))


@pytest.mark.parametrize("share", [0, 1, 2, 9, 60, 61, 62, 63, 64, 500, 4000, 8000])
def test_a_search_among_some_rows_is_exact(large: Any, either: Index, share: int) -> None:
    _, image, text = large
    allowed = np.sort(np.random.default_rng(share).choice(8000, share, replace=False))
    for queries in (text[:20], image[:3]):
        assert_exact_among(either, queries, image, allowed, 12)
    assert_exact_among(either, text[:1], image, allowed, 700)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_a_search_among_many_rows_finds_as_large_a_share_as_one_among_all(
    large: Any, approximate: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(index, "_EXACT_AMONG", 0)  # as if the table were much larger
    _, image, text = large
    opened = Index.open(str(approximate[1]))
    allowed = np.flatnonzero(np.random.default_rng(0).random(8000) < share)
    _, ids = opened.search(text[:500].astype(np.float32), 10, allowed=allowed)
    _, expected = brute_force(text[:500], image[allowed], allowed, 10)
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), expected.tolist(), strict=True)])
    assert found >= 0.95
    assert np.isin(ids, allowed).all()
    everything = opened.search(text[:2].astype(np.float32), len(allowed), nprobe=1, allowed=allowed)[1]
    assert [sorted(row) for row in everything.tolist()] == [allowed.tolist()] * 2


def test_rows_without_a_vector_may_be_allowed_and_are_not_found(sparse: Any, built: Path) -> None:
    _, image, text, has_image = sparse
    opened = Index.open(str(built))
    allowed = np.arange(5, 400)
    _, ids = opened.search(text[:9].astype(np.float32), 400, allowed=allowed)
    there = allowed[has_image[5:400]]
    _, expected = brute_force(text[:9], image[there], there, 400)
    np.testing.assert_array_equal(ids[:, : len(there)], expected)
    assert (ids[:, len(there) :] == -1).all()
    assert (opened.search(text[:1].astype(np.float32), 3, allowed=np.flatnonzero(~has_image))[1] == -1).all()
    assert (opened.search(text[:1].astype(np.float32), 3, allowed=np.array([-1, 700, 10**9]))[1] == -1).all()


@pytest.mark.parametrize("exact_rows", [10_000, 100])
def test_vectors_come_back_by_id_as_the_table_stores_them(sparse: Any, tmp_path: Path, exact_rows: int) -> None:
    table, image, _, has_image = sparse
    build.build(table, str(tmp_path), exact_rows=exact_rows, factory="IVF1,SQfp16" if exact_rows == 100 else "")
    opened = Index.open(str(tmp_path))
    ids = np.random.default_rng(1).permutation(np.flatnonzero(has_image)).repeat(2)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(opened.vectors, [ids] * 4):
            np.testing.assert_array_equal(found, image[ids].astype(np.float16).astype(np.float32))
    assert opened.vectors([]).shape == (0, DIM)
    absent = int(np.flatnonzero(~has_image)[0])
    with pytest.raises(ValueError, match=f"no vector of row {absent}: it has no image_embedding"):
        opened.vectors([int(ids[0]), absent])
    for bad in (-1, 700, 2**62):
        with pytest.raises(ValueError, match=rf"row {bad}: it is none of the table's 0..699"):
            opened.vectors([bad])


def test_a_scan_gives_every_row_in_id_order(sparse: Any, built: Path) -> None:
    rows = pa.Table.from_batches(Index.open(str(built)).scan(["id", "key"]))
    assert rows.to_pydict() == {"id": list(range(700)), "key": [f"key-{row}" for row in range(700)]}
