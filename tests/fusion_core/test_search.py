import csv
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_core import build, fusers, images, manifest, readers, search, shards, towers
from fusion_core import table as tables
from fusion_core.demo import scenes
from fusion_core.index import Index
from fusion_core.search import BadQuery, NoImage, Query, Searcher, WrongSpace, fetch_image
from fusion_core.towers import TowerError, Towers
from fusion_core.writer import UnitWriter
from schemas.feature_table import InputSpec, TableSpec, features_schema
from schemas.index import ANSWER
from schemas.samples import InputIdentity, Sample, Unit

ROWS = 48


@dataclass(frozen=True)
class Pictures:
    """Scenes with their captions, encoded in a tar and embedded; every seventh lacks its image, row 5 its caption."""

    shard: Path
    encoded: list[bytes | None]
    ranges: list[tuple[int, int] | tuple[None, None]]
    captions: list[str | None]
    image: np.ndarray  # float32 [n, D]
    text: np.ndarray

    @property
    def has_image(self) -> np.ndarray:
        return np.array([data is not None for data in self.encoded])

    @property
    def has_text(self) -> np.ndarray:
        return np.array([caption is not None for caption in self.captions])


@pytest.fixture(scope="module")
def demo() -> Towers:
    return towers.load("fusion-demo", device="cpu", precision="fp32")


def embed_image(demo: Towers, data: bytes) -> np.ndarray:
    return demo.embed_images(images.decode(data, demo.spec.preprocess, 10**6).pixels[None])[0]


@pytest.fixture(scope="module")
def pictures(demo: Towers, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    rng = np.random.default_rng(0)
    encoded, captions = [], []
    for row in range(ROWS):
        scene = scenes.sample_scene(rng)
        stream = io.BytesIO()
        scenes.render(scene, rng).save(stream, "PNG")
        encoded.append(None if row % 7 == 6 else stream.getvalue())
        captions.append(None if row == 5 else scenes.caption(scene, rng).text)
    shard = tmp_path_factory.mktemp("shards") / "000.tar"
    image, text = (np.zeros((ROWS, demo.spec.embedding_dim), np.float32) for _ in range(2))
    pixels = [images.decode(data, demo.spec.preprocess, 10**6).pixels for data in encoded if data is not None]
    image[[data is not None for data in encoded]] = demo.embed_images(np.stack(pixels))
    text[[words is not None for words in captions]] = demo.embed_texts([words for words in captions if words])
    return Pictures(shard, encoded, write_tar(shard, encoded), captions, image, text)


def write_tar(path: Path, encoded: list[bytes | None]) -> list[Any]:
    """The byte range of each image."""
    ranges: list[Any] = []
    with tarfile.open(path, "w") as tar:
        for row, data in enumerate(encoded):
            if data is not None:
                member = tarfile.TarInfo(f"{row:03d}.png")
                member.size = len(data)
                ranges.append((tar.offset + 512, len(data)))
                tar.addfile(member, io.BytesIO(data))
            else:
                ranges.append((None, None))
    return ranges


def open_index(
    place: Path,
    pictures: Pictures,
    demo: Towers,
    column: str = "image_embedding",
    fuser: str = "",
    keep: slice = slice(None),
    key: Callable[[int], str] = "{:03d}".format,
) -> Index:
    """An index of the pictures (or of those in `keep`), by way of a real table."""
    made = fusers.parse(fuser, demo.spec.embedding_dim) if fuser else None
    spec = manifest.claim(str(place / "table"), TableSpec(demo.spec, fuser=made.spec if made else None))
    rows = np.arange(ROWS)[keep]
    digests = [None if data is None else hashlib.sha256(data).digest() for data in pictures.encoded]
    columns: dict[str, Any] = {
        "key": [key(row) for row in rows],
        "shard": [str(pictures.shard)] * len(rows),
        "row": rows,
        "offset": [pictures.ranges[row][0] for row in rows],
        "length": [pictures.ranges[row][1] for row in rows],
        "caption": [pictures.captions[row] for row in rows],
        "sha256": [digests[row] for row in rows],
        "has_image": pictures.has_image[rows],
        "has_text": pictures.has_text[rows],
    }
    vectors = {"image_embedding": pictures.image[rows], "text_embedding": pictures.text[rows]}
    if made:
        vectors["fused_embedding"] = made.fuse(*vectors.values(), columns["has_image"], columns["has_text"])[0]
    schema = features_schema(spec)
    arrays = [
        tables.to_arrow(vectors[field.name].astype(np.float16), field.type)
        if field.name in vectors
        else pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    with UnitWriter(
        str(place / "table"), spec, Unit("u", "tar", str(pictures.shard), InputIdentity(1, 1), first_row=int(rows[0]))
    ) as writer:
        writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
        writer.commit()
    build.build(tables.Table.open(str(place / "table")), str(place / "index"), column)
    return Index.open(str(place / "index"))


@pytest.fixture(scope="module")
def by_image(pictures: Pictures, demo: Towers, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return Searcher(open_index(tmp_path_factory.mktemp("by_image"), pictures, demo), demo)


def ranking(query: np.ndarray, vectors: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """The best rows and their scores by float64 arithmetic; rows of zeros are no rows."""
    stored = vectors.astype(np.float16).astype(np.float64)
    scores = np.where(stored.any(axis=1), stored @ query.astype(np.float64), -np.inf)
    order = np.argsort(-scores, kind="stable")[:k]
    return order.tolist(), scores[order]


def assert_answers(found: pa.Table, query: np.ndarray, vectors: np.ndarray) -> None:
    ids, scores = ranking(query, vectors, found.num_rows)
    assert found.schema == ANSWER
    assert found["rank"].to_pylist() == list(range(1, found.num_rows + 1))
    np.testing.assert_allclose(found["score"].to_numpy(), scores, atol=1e-5)
    assert found["id"].to_pylist() == ids


# --- what comes back


def test_a_text_finds_what_exact_arithmetic_finds(by_image: Searcher, pictures: Pictures, demo: Towers) -> None:
    for words in ("a red circle", "two objects on a blue background", str(pictures.captions[0])):
        found = by_image.search(text=words, k=8)
        assert found.num_rows == 8
        assert_answers(found, demo.embed_texts([words])[0], pictures.image)


def test_answers_carry_the_rows_caption_key_and_place(by_image: Searcher, pictures: Pictures) -> None:
    for row in by_image.search(text="a red circle", k=5).to_pylist():
        number = row["id"]
        assert (row["key"], row["caption"]) == (f"{number:03d}", pictures.captions[number])
        assert (row["shard"], row["row"]) == (str(pictures.shard), number)
        assert (row["offset"], row["length"]) == pictures.ranges[number]


def test_an_image_finds_itself_first(by_image: Searcher, pictures: Pictures) -> None:
    for row in (0, 5, 47):
        data = pictures.encoded[row]
        assert data is not None
        first = by_image.search(image=data, k=3).to_pylist()[0]
        assert (first["id"], first["rank"]) == (row, 1)
        assert first["score"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_both_rank_by_the_weighted_sum_of_their_cosines(
    by_image: Searcher, pictures: Pictures, demo: Towers, weight: float
) -> None:
    data, words = pictures.encoded[3], "a green square"
    assert data is not None
    found = by_image.search(words, data, k=10, image_weight=weight)
    mixed = weight * embed_image(demo, data) + (1 - weight) * demo.embed_texts([words])[0]
    assert_answers(found, mixed / np.linalg.norm(mixed), pictures.image)


def test_more_than_there_is_gives_what_there_is(by_image: Searcher, pictures: Pictures) -> None:
    found = by_image.search(text="a red circle", k=10**9)
    assert sorted(found["id"].to_pylist()) == np.flatnonzero(pictures.has_image).tolist()


@pytest.mark.parametrize("how", [{}, {"collapse": 0.9}, {"by_rank": True, "diversity": 0.5}])
def test_numbers_may_be_numpys(by_image: Searcher, how: dict[str, Any]) -> None:
    numpys = by_image.search(id=np.int64(3), k=np.int32(5), **how)
    assert numpys.equals(by_image.search(id=3, k=5, **how)) and numpys.num_rows == 5


def test_an_empty_index_answers_with_no_rows(pictures: Pictures, demo: Towers, tmp_path: Path) -> None:
    found = Searcher(open_index(tmp_path, pictures, demo, keep=slice(6, 7)), demo).search(text="a red circle")
    assert found.schema == ANSWER and found.num_rows == 0


def test_vectors_can_be_asked_without_towers(by_image: Searcher, pictures: Pictures) -> None:
    searcher = Searcher(by_image.index)
    assert_answers(searcher.search(vector=3 * pictures.text[0], k=4), pictures.text[0], pictures.image)
    with pytest.raises(BadQuery, match="no towers"):
        searcher.search(text="a red circle")


# --- vectors, rows, filters


def stored(vectors: np.ndarray) -> np.ndarray:
    """As the table has them, in float64 and of unit length (rows of zeros stay)."""
    rows = vectors.astype(np.float16).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def test_more_like_a_row_is_what_its_vector_finds_without_the_row(by_image: Searcher, pictures: Pictures) -> None:
    for row in (0, 5, 47):
        others = pictures.image.copy()
        others[row] = 0
        for found in (by_image.search(id=row, k=7), by_image.search(key=f"{row:03d}", k=7)):
            assert_answers(found, pictures.image[row].astype(np.float16), others)
    assert by_image.search(id=0, k=1000).num_rows == pictures.has_image.sum() - 1


def test_a_filter_leaves_the_best_of_those_that_pass(by_image: Searcher, pictures: Pictures, demo: Towers) -> None:
    for condition, passes in (
        ("row < 20 and caption is not null", lambda row: row < 20 and row != 5),
        ("key in ('003', '006', '007')", lambda row: row in (3, 6, 7)),
        ("key = 'none'", lambda row: False),
        ("row >= 0", lambda row: True),
    ):
        vectors = pictures.image * np.array([passes(row) for row in range(ROWS)])[:, None]
        found = by_image.search(text="a red circle", k=30, where=condition)
        assert_answers(found, demo.embed_texts(["a red circle"])[0], vectors)
        assert found.num_rows == min(30, vectors.any(axis=1).sum())


def test_the_last_filters_are_remembered_within_bounds(by_image: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = Searcher(by_image.index)
    passes = [0]

    def counted(columns: Any) -> Any:
        passes[0] += 1
        return Index.scan(by_image.index, columns)

    monkeypatch.setattr(by_image.index, "scan", counted)

    def passes_for(*limits: int) -> int:
        before = passes[0]
        for limit in limits:
            assert searcher.search(id=0, where=f"row < {limit}", k=48).num_rows <= limit
        return passes[0] - before

    assert passes_for(1, 2, 3, 3, 2, 1) == 3
    assert passes_for(*range(1, 9), *range(1, 9)) == 5  # eight are kept
    assert passes_for(9, 8, 7, 1) == 2  # of these the last used
    monkeypatch.setattr(search, "_CACHED_IDS", 30)
    assert passes_for(10, 20, 10, 20, 40, 20) == 4  # 40 alone is too many to keep


# --- many at once


def test_queries_together_are_answered_as_alone_each_forward_and_search_once(
    by_image: Searcher, pictures: Pictures, demo: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures.encoded[3]
    queries = [
        Query(text="a red circle", k=5),
        Query(text="a green square", image=image, k=6, image_weight=0.3),
        Query(image=pictures.encoded[0], k=7),
        Query(id=9, k=5),
        Query(key="010", k=5),
        Query(vector=pictures.text[1], k=5),
        Query(text="a red circle", image=image, by_rank=True, k=5),
        Query(text="a red circle", k=5, where="row < 30"),
        Query(text="two objects", k=5, where="row < 30", collapse=0.9, diversity=0.4),
    ]
    alone = [by_image.answer([query])[0] for query in queries]
    calls = {"texts": 0, "images": 0, "search": 0}

    def counted(name: str, method: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return method(*given, **named)

        return call

    monkeypatch.setattr(demo, "embed_texts", counted("texts", demo.embed_texts))
    monkeypatch.setattr(demo, "embed_images", counted("images", demo.embed_images))
    monkeypatch.setattr(by_image.index, "search", counted("search", by_image.index.search))
    together = by_image.answer(queries)
    assert calls == {"texts": 1, "images": 1, "search": 4}  # 8 or 128 rows, among all or those before the thirtieth
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, pa.Table) and isinstance(other, pa.Table)
        assert other.schema == ANSWER
        assert one.drop(["score"]).equals(other.drop(["score"]))
        np.testing.assert_allclose(one["score"].to_numpy(), other["score"].to_numpy(), atol=1e-6)
    assert by_image.answer([]) == []


def test_a_bad_query_does_not_lose_its_neighbours(by_image: Searcher, pictures: Pictures) -> None:
    queries = [
        Query(text="a red circle"),
        Query(text="a red circle", where="widht > 3"),
        Query(image=b"no image"),
        Query(),
        Query(id=6),
        Query(key="none"),
        Query(text="\ud800"),
        Query(image=pictures.encoded[0]),
    ]
    found = by_image.answer(queries)
    assert [isinstance(answer, BadQuery) for answer in found] == [False, *[True] * 6, False]
    assert found[0].equals(by_image.search(text="a red circle"))
    assert found[7]["id"][0].as_py() == 0


def test_towers_are_loaded_by_the_first_query_that_needs_them(by_image: Searcher, demo: Towers) -> None:
    searcher = search.open(by_image.index.place, device="cpu")
    assert searcher.search(id=3, k=2).num_rows == 2
    assert searcher._towers is None
    assert searcher.search(text="a red circle", k=5).equals(by_image.search(text="a red circle", k=5))
    assert searcher._towers is demo  # one copy per process


def test_towers_can_be_loaded_while_the_index_is_opened(by_image: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "_LOADED", {})
    searcher = search.open(by_image.index.place, device="cpu", ahead=True)
    for thread in threading.enumerate():
        if thread.name == "towers":
            thread.join()
    (loaded,) = towers._LOADED.values()
    assert searcher.search(text="a red circle", k=5).equals(by_image.search(text="a red circle", k=5))
    assert searcher._towers is loaded
    with pytest.raises(TowerError, match="device 'tpu' is not"):  # what went wrong there is told here
        search.open(by_image.index.place, device="tpu", ahead=True).search(text="a red circle")


# --- the order of answers


def test_joined_by_rank_is_the_sum_of_reciprocal_ranks(by_image: Searcher, pictures: Pictures, demo: Towers) -> None:
    data, words = pictures.encoded[3], "a green square"
    assert data is not None
    scores = np.zeros(ROWS)
    for query in (demo.embed_texts([words])[0], embed_image(demo, data)):
        ids, _ = ranking(query, pictures.image, int(pictures.has_image.sum()))
        scores[ids] += 1 / (60 + 1 + np.arange(len(ids)))
    expected = np.argsort(-scores, kind="stable")[:12]
    found = by_image.search(words, data, k=12, by_rank=True)
    assert found["id"].to_pylist() == expected.tolist()
    np.testing.assert_allclose(found["score"].to_numpy(), scores[expected], atol=1e-7)
    assert by_image.search(words, k=5, by_rank=True).equals(by_image.search(words, k=5))  # there is but one ranking


def test_joined_by_score_is_the_weighted_sum_of_z_normed_scores(
    by_image: Searcher, pictures: Pictures, demo: Towers
) -> None:
    data, words = pictures.encoded[3], "a green square"
    assert data is not None
    total = np.zeros(ROWS)
    for query, weight in ((demo.embed_texts([words])[0], 0.7), (embed_image(demo, data), 0.3)):
        ids, scores = ranking(query, pictures.image, int(pictures.has_image.sum()))
        total[ids] += weight * (scores - scores.mean()) / scores.std()
    total[~pictures.has_image] = -np.inf
    expected = np.argsort(-total, kind="stable")[:12]
    found = by_image.search(words, data, k=12, by_score=True, image_weight=0.3)
    assert found["id"].to_pylist() == expected.tolist()
    np.testing.assert_allclose(found["score"].to_numpy(), total[expected], atol=1e-4)
    assert by_image.search(words, data, k=5, by_score=True, diversity=0.5).num_rows == 5


def test_collapsed_answers_are_no_closer_to_each_other(by_image: Searcher, pictures: Pictures, demo: Towers) -> None:
    vectors, query = stored(pictures.image), demo.embed_texts(["a red circle"])[0]
    ids, scores = ranking(query, pictures.image, int(pictures.has_image.sum()))
    for above in (0.0, 0.6, 0.9, 1.0):
        kept: list[int] = []
        for row in ids:
            if not kept or (vectors[kept] @ vectors[row]).max() <= above + 1e-9:
                kept.append(row)
        found = by_image.search(text="a red circle", k=9, collapse=above)
        assert found["id"].to_pylist() == kept[:9]
        np.testing.assert_allclose(found["score"].to_numpy(), [scores[ids.index(row)] for row in kept[:9]], atol=1e-5)
        assert found["rank"].to_pylist() == list(range(1, len(kept[:9]) + 1))


def test_copies_of_a_picture_collapse_at_any_cosine(pictures: Pictures, demo: Towers, tmp_path: Path) -> None:
    copies = [data and pictures.encoded[row % 5] if row < 40 else data for row, data in enumerate(pictures.encoded)]
    twins = replace(pictures, encoded=copies)  # the same bytes; the embeddings differ, as by another resizing
    searcher = Searcher(open_index(tmp_path, twins, demo), demo)
    plain = searcher.search(text="a red circle", k=48).to_pylist()
    found = searcher.search(text="a red circle", k=48, collapse=1.0).to_pylist()
    assert len(found) == 5 + sum(data is not None for data in copies[40:])
    first: dict[bytes, int] = {}
    for row in plain:
        first.setdefault(row["sha256"], row["id"])
    assert [row["id"] for row in found] == list(first.values())


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("collapse", [None, 0.9])
def test_diverse_answers_are_those_of_maximal_marginal_relevance(
    by_image: Searcher, pictures: Pictures, demo: Towers, diversity: float, collapse: float | None
) -> None:
    vectors, query = stored(pictures.image), demo.embed_texts(["a red circle"])[0].astype(np.float64)
    ids, scores = ranking(query, pictures.image, int(pictures.has_image.sum()))
    relevance = dict(zip(ids, scores, strict=True))
    if collapse:
        ids = by_image.search(text="a red circle", k=100, collapse=collapse)["id"].to_pylist()
    picked = [ids[0]]
    while len(picked) < min(10, len(ids)):
        value = {
            row: (1 - diversity) * relevance[row] - diversity * (vectors[picked] @ vectors[row]).max()
            for row in ids
            if row not in picked
        }
        picked.append(max(value, key=lambda row: value[row]))
    found = by_image.search(text="a red circle", k=10, diversity=diversity, collapse=collapse)
    assert found["id"].to_pylist() == picked
    np.testing.assert_allclose(found["score"].to_numpy(), [relevance[row] for row in picked], atol=1e-5)


def test_no_diversity_is_the_plain_ranking(by_image: Searcher) -> None:
    assert by_image.search(id=3, k=9, diversity=0).equals(by_image.search(id=3, k=9))


def test_answers_are_rearranged_among_the_best_candidates_only(
    by_image: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_CANDIDATES", 1)
    best = by_image.search(id=3, k=12)["id"].to_pylist()
    assert set(by_image.search(id=3, k=3, diversity=1)["id"].to_pylist()) <= set(best)
    (only,) = by_image.search(id=3, k=12, collapse=0.0)["id"].to_pylist()[:1]
    assert only == best[0]


# --- what is refused


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "a text, an image, or both"),
        ({"text": ""}, "text of a query is empty"),
        ({"text": " \n"}, "text of a query is empty"),
        ({"text": "x", "k": 0}, "k must be at least 1, got 0"),
        ({"text": "x", "k": -1}, "k must be at least 1, got -1"),
        ({"text": "x", "image_weight": float("nan")}, "got nan"),
        ({"text": "x", "image_weight": float("inf")}, "got inf"),
        ({"text": "x", "image_weight": 1.1}, "got 1.1"),
        ({"text": "x", "image_weight": -0.1}, "got -0.1"),
        ({"text": "x", "id": 3}, "not by id and text"),
        ({"vector": np.ones(4), "key": "a"}, "not by key and vector"),
        ({"text": 3}, "text must be text, got 3"),
        ({"image": "a.jpg"}, "image must be bytes"),
        ({"text": "x", "k": 2.5}, "k must be a whole number, got 2.5"),
        ({"text": "x", "k": True}, "k must be a whole number"),
        ({"text": "x", "by_rank": 1}, "by_rank must be true or false"),
        ({"text": "x", "by_rank": True, "by_score": True}, "joined by_rank or by_score, not by both"),
        ({"text": "x", "collapse": 1.5}, "collapse must lie between 0 and 1"),
        ({"text": "x", "collapse": "0.5"}, "collapse must be a number"),
        ({"text": "x", "diversity": float("nan")}, "diversity must lie between 0 and 1"),
        ({"text": "x", "diversity": 0.5, "k": 10**6}, "k must be at most 2,500 with collapse or diversity"),
        ({"text": "x", "where": " "}, "at character 2 of the filter"),
        ({"text": "x", "where": "widht > 3"}, "no column 'widht'.*there are id"),
        ({"id": 6}, "row 6: it has no image_embedding"),
        ({"id": -1}, "no row has the id -1: ids are 0 to 47"),
        ({"id": 10**30}, "no row has the id 10{30}:"),
        ({"key": "nowhere"}, "no row has the key 'nowhere'"),
        ({"vector": np.ones(3)}, r"must have 64 dimensions, as the index has, got \[3\]"),
        ({"vector": np.zeros(64)}, "finite and not all zero"),
        ({"vector": np.full(64, np.nan)}, "finite and not all zero"),
        ({"vector": ["a"] * 64}, "must be numbers"),
        ({"vector": [[1], [1, 2]]}, "must be numbers"),
    ],
)
def test_impossible_queries_are_refused(by_image: Searcher, query: dict[str, Any], message: str) -> None:
    with pytest.raises(BadQuery, match=message):
        by_image.search(**query)


def test_a_key_of_several_rows_is_refused_with_their_ids(pictures: Pictures, demo: Towers, tmp_path: Path) -> None:
    unkeyed = open_index(tmp_path, pictures, demo, key=lambda row: "same" if row % 8 == 1 else f"{row:03d}")
    with pytest.raises(BadQuery, match="several rows have the key 'same': ask by id, one of 1, 9, 17, …"):
        Searcher(unkeyed).search(key="same")
    assert Searcher(unkeyed).search(key="000", k=3).num_rows == 3


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "0 bytes"), (b"no image", "no image"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "PNG")]
)
def test_an_image_that_does_not_decode_is_named_as_such(by_image: Searcher, data: bytes, message: str) -> None:
    with pytest.raises(BadQuery, match=message):
        by_image.search(image=data)


def test_an_image_that_is_too_large_is_not_decoded(
    pictures: Pictures, demo: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_index(tmp_path, pictures, demo)
    limited = replace(opened.record.table_spec, input=InputSpec(max_image_bytes=50))
    monkeypatch.setattr(opened, "record", replace(opened.record, table_spec=limited))
    with pytest.raises(BadQuery, match="at most 50"):
        Searcher(opened, demo).search(image=pictures.encoded[0])


def test_other_towers_are_refused_by_name(by_image: Searcher, demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "spec", replace(demo.spec, weights_sha256="0" * 64))
    with pytest.raises(WrongSpace, match=r"weights_sha256: '[0-9a-f]{64}' here, '0{64}' there.*load fusion-demo"):
        Searcher(by_image.index, demo)


def test_the_same_towers_from_elsewhere_in_another_precision_are_welcome(
    by_image: Searcher, demo: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "spec", replace(demo.spec, model="/elsewhere", precision="bf16"))
    assert Searcher(by_image.index, demo).search(text="a red circle").num_rows == 10


# --- fused indexes


def fused_of(fuser: str, pictures: Pictures, demo: Towers) -> np.ndarray:
    made = fusers.parse(fuser, demo.spec.embedding_dim)
    return made.fuse(pictures.image, pictures.text, pictures.has_image, pictures.has_text)[0]


@pytest.mark.parametrize("fuser", ["weighted_sum:image=0.3,text=0.7", "concat:image=0.3,text=0.7", "hadamard"])
def test_both_pass_the_tables_fuser(fuser: str, pictures: Pictures, demo: Towers, tmp_path: Path) -> None:
    searcher = Searcher(open_index(tmp_path, pictures, demo, "fused_embedding", fuser), demo)
    data, words = pictures.encoded[3], "a green square"
    assert data is not None
    image, text = embed_image(demo, data)[None], demo.embed_texts([words])
    given = np.array([True])
    query, _ = fusers.parse(fuser, demo.spec.embedding_dim).fuse(image, text, given, given)
    assert_answers(searcher.search(words, data, k=6), query[0], fused_of(fuser, pictures, demo))


def test_a_fused_index_in_the_backbones_space_takes_a_text_alone(
    pictures: Pictures, demo: Towers, tmp_path: Path
) -> None:
    searcher = Searcher(open_index(tmp_path, pictures, demo, "fused_embedding", "weighted_sum"), demo)
    vectors = fused_of("weighted_sum", pictures, demo)
    assert_answers(searcher.search("a red circle"), demo.embed_texts(["a red circle"])[0], vectors)
    data = pictures.encoded[0]
    assert data is not None
    assert_answers(searcher.search(image=data), embed_image(demo, data), vectors)


def test_a_text_alone_passes_the_fuser_of_an_index_in_its_own_space(
    pictures: Pictures, demo: Towers, tmp_path: Path
) -> None:
    searcher = Searcher(open_index(tmp_path, pictures, demo, "fused_embedding", "concat"), demo)
    text = demo.embed_texts(["a red circle"])
    expected = np.concatenate([np.zeros_like(text), text], axis=1)[0]
    assert_answers(searcher.search("a red circle"), expected, fused_of("concat", pictures, demo))


def test_a_fuser_that_needs_both_refuses_one(pictures: Pictures, demo: Towers, tmp_path: Path) -> None:
    searcher = Searcher(open_index(tmp_path, pictures, demo, "fused_embedding", "hadamard"), demo)
    for query in ({"text": "a red circle"}, {"image": pictures.encoded[0]}):
        with pytest.raises(BadQuery, match=r"'hadamard'.*give both"):
            searcher.search(**query)  # type: ignore[arg-type]


# --- the original pictures


def test_the_original_picture_of_an_answer_is_read_from_its_tar(by_image: Searcher, pictures: Pictures) -> None:
    for row in by_image.search(text="a red circle", k=ROWS).to_pylist():
        assert fetch_image(row) == pictures.encoded[row["id"]]


def test_a_picture_larger_than_asked_for_is_not_read(by_image: Searcher, pictures: Pictures) -> None:
    row = by_image.index.meta([0]).to_pylist()[0]
    assert pictures.encoded[0] is not None
    size = len(pictures.encoded[0])
    assert len(fetch_image(row, max_bytes=size)) == size
    with pytest.raises(NoImage, match=f"more than the {size - 1:,}"):
        fetch_image(row, max_bytes=size - 1)


def test_a_picture_that_is_not_what_was_embedded_is_not_shown(
    by_image: Searcher, pictures: Pictures, tmp_path: Path
) -> None:
    row = by_image.index.meta([0]).to_pylist()[0]
    write_tar(tmp_path / "000.tar", [data and data[::-1] for data in pictures.encoded])
    with pytest.raises(NoImage, match=r"row 0 of .*another image now"):
        fetch_image({**row, "shard": str(tmp_path / "000.tar")})
    with pytest.raises(NoImage, match=r"row 6 of .* has no image"):
        fetch_image(by_image.index.meta([6]).to_pylist()[0])
    with pytest.raises(FileNotFoundError):
        fetch_image({**row, "shard": str(tmp_path / "gone.tar")})
    with pytest.raises(NoImage, match=r"000\.tar\.gz: unpack it"):
        fetch_image({**row, "shard": "/data/000.tar.gz", "offset": None, "length": None})


def write_shards(pictures: Pictures, folder: Path, layout: str) -> str:
    """The pictures in one of the layouts that are read; the pattern that names them."""
    folder.mkdir()
    if layout == "tar":
        write_tar(folder / "0.tar", pictures.encoded)
        return str(folder / "0.tar")
    if layout in ("parquet", "struct"):
        column = pa.array(pictures.encoded)
        if layout == "struct":
            column = pa.StructArray.from_arrays([column, pa.nulls(ROWS, pa.string())], ["bytes", "path"])
        rows = pa.table({"image": column, "caption": ["words"] * ROWS})
        pq.write_table(rows, folder / "0.parquet", row_group_size=10)
        return str(folder / "0.parquet")
    (folder / "below").mkdir()
    names = [f"below/{row:03d}.{'png' if row % 2 else 'PNG'}" for row in range(ROWS)]
    for name, data in zip(names, pictures.encoded, strict=True):
        if data is not None:
            (folder / name).write_bytes(data)
    if layout == "folder":
        return str(folder)
    with (folder / "0.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "caption"), *((name, "words") for name in names)])
    return str(folder / "0.csv")


def rows_of(pattern: str) -> list[tuple[dict[str, Any], bytes]]:
    """Every picture that the readers find, with the row that the table would have for it."""
    found = []
    for unit in shards.plan([pattern], InputSpec(), unit_rows=20):
        for sample in readers.read(unit, InputSpec()):
            if isinstance(sample, Sample) and sample.image is not None:
                row = {name: getattr(sample, name) for name in ("key", "row", "offset", "length")}
                digest = hashlib.sha256(sample.image).digest()
                found.append(({**row, "shard": unit.shard, "sha256": digest}, sample.image))
    return found


@pytest.mark.parametrize("layout", ["tar", "folder", "parquet", "struct", "listing"])
def test_every_picture_that_was_read_can_be_read_again(pictures: Pictures, tmp_path: Path, layout: str) -> None:
    found = rows_of(write_shards(pictures, tmp_path / "shards", layout))
    assert sorted(image for _, image in found) == sorted(data for data in pictures.encoded if data is not None)
    for row, image in found:
        assert fetch_image(row) == image
    with pytest.raises(NoImage, match="more than the 10"):
        fetch_image(found[0][0], max_bytes=10)
    with pytest.raises(NoImage, match="another image now"):
        fetch_image({**found[0][0], "sha256": found[1][0]["sha256"]})


def test_a_picture_is_read_from_the_column_that_the_job_was_told(pictures: Pictures, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"thumb"] * ROWS, "full": pictures.encoded}), tmp_path / "0.pq")
    data = pictures.encoded[3]
    assert data is not None
    digest = hashlib.sha256(data).digest()
    row = {"key": "0:3", "shard": str(tmp_path / "0.pq"), "row": 3, "offset": None, "length": None, "sha256": digest}
    assert fetch_image(row, spec=InputSpec(image_column="full")) == data
    with pytest.raises(NoImage, match="another image"):
        fetch_image(row)


def test_search_has_no_door_of_its_own_to_faiss() -> None:
    assert not hasattr(search, "faiss")
