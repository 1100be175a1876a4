"""What a run does and gives when the table has changed a little: what a build from scratch gives, at its own cost."""

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core import build, choose, files, index, manifest, merge, vectors
from fusion_core.build import IndexJob
from fusion_core.index import Index
from fusion_core.merge import Source
from fusion_core.table import Table
from fusion_core.writer import UnitWriter
from pipelines import index as job
from pipelines.runner import Knobs
from schemas import records
from schemas.feature_table import Part
from schemas.index import META, IndexRecord, IndexShard
from schemas.samples import DeadLetter
from tests.fusion_core.test_build import TYPES, ask, options, subset
from tests.fusion_core.test_index import brute_force, pairs, write_table

DIM, PART_ROWS, PARTS = 64, 100, 24
FIRST = tuple(number for number in range(PARTS) if number not in (7, 23))  # 7 comes in between, 23 at the end
NOW = tuple(number for number in range(PARTS) if number not in (3, 12))  # 3 and 12 are gone


@pytest.fixture(scope="module", autouse=True)
def few_queries() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "QUERIES", 100)
        with vectors.threads(1):
            yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, np.ndarray, np.ndarray, np.ndarray]:
    image, text = pairs(PARTS * PART_ROWS, dim=DIM)
    has_image = np.random.default_rng(0).random(len(image)) > 0.2
    place = tmp_path_factory.mktemp("world")
    return write_table(place, image, text, has_image, part_rows=PART_ROWS), image, text, has_image


def rows_of(parts: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.arange(n * PART_ROWS, (n + 1) * PART_ROWS) for n in parts])


def asked(factory: str, **more: Any) -> dict[str, Any]:
    return options(factory, target_recall=0.5, **more)


def from_scratch(table: Table, trained_at: Path, place: Path, given: dict[str, Any]) -> IndexRecord:
    """Another build of the table, as it is now, with the training of the index at `trained_at`."""
    training = index.read_record(str(trained_at)).training
    assert training
    place.mkdir()
    for part in (training.trained, training.trained_refine, training.queries):
        if part:
            shutil.copy(trained_at / part.path, place)
    name = build._training_name(IndexJob(str(place), **given), table)
    files.write_bytes(str(place), name, records.to_json(training))
    record = build.build(table, str(place), **given)
    assert record.training == training
    return record


# --- the same as from scratch


@pytest.mark.parametrize("factory", TYPES)
def test_rows_that_left_are_cut_out_as_if_they_had_never_been(world: Any, tmp_path: Path, factory: str) -> None:
    table, cut = world[0], tmp_path / "cut"
    build.build(table, str(cut), **asked(factory))
    now = subset(table, *NOW)
    record = build.build(now, str(cut), **asked(factory))
    whole = from_scratch(now, cut, tmp_path / "whole", asked(factory))
    (mine,), (other,) = record.shards, whole.shards
    assert (mine.parts, mine.rows, mine.row_numbers, mine.refine, mine.meta) == (
        other.parts, other.rows, other.row_numbers, other.refine, other.meta
    )  # fmt: skip
    if "fs" not in factory:  # packed codes: what fills the last block of a cell differs
        assert mine.vectors == other.vectors
    opened = [Index.open(str(place)) for place in (cut, tmp_path / "whole")]
    answers = [ask(one, world[2][:200], nprobe=9, k_factor=4) for one in opened]
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    assert (answers[0][1] == answers[1][1]).mean() > 0.999  # equal scores may change places
    known, complete = (
        merge.read_truth(str(place), shard, "") for place, shard in ((cut, mine), (tmp_path / "whole", other))
    )
    assert record.training
    with np.load(cut / record.training.queries.path) as held:
        for name, (scores, ids) in known.items():
            live = held[f"{name}_parts"] != b""
            said = (ids >= 0) & live[:, None]
            np.testing.assert_array_equal(ids[said], complete[name][1][said])
            np.testing.assert_allclose(scores[said], complete[name][0][said], atol=1e-6)
            assert said[live, :20].mean() > 0.98
    assert mine.rows_cut == 2 * PART_ROWS and other.rows_cut == 0


@pytest.mark.parametrize("factory", TYPES)
def test_a_small_shard_beside_a_large_one_gives_the_answers_of_one(world: Any, tmp_path: Path, factory: str) -> None:
    """Also where few cells are visited, and fewer vectors are in those of the small shard than are asked for."""
    table, grown = world[0], tmp_path / "grown"
    first = build.build(subset(table, *FIRST), str(grown), **asked(factory))
    record = build.build(table, str(grown), **asked(factory))
    assert first.shards[0] in record.shards and len(record.shards) == 2
    whole = from_scratch(table, grown, tmp_path / "whole", asked(factory))
    assert len(whole.shards) == 1
    opened = [Index.open(str(place)) for place in (grown, tmp_path / "whole")]
    answers = [ask(one, world[2][:200], nprobe=3, k_factor=200) for one in opened]
    (scores, ids), (expected_scores, expected) = answers
    if "PQ" in factory and "Refine" not in factory:  # packed codes are scored through tables scaled by shard
        assert (ids == expected).mean() > 0.8
    else:
        np.testing.assert_array_equal(scores, expected_scores)
        assert (ids == expected).mean() > 0.999  # equal scores may change places
    wanted = np.random.default_rng(0).permutation(table.num_rows)
    assert opened[0].meta(wanted).equals(opened[1].meta(wanted))
    scans = [pa.Table.from_batches(one.scan(META.names)) for one in opened]
    assert scans[0].equals(scans[1]) and scans[0]["id"].to_pylist() == list(range(table.num_rows))
    assert scans[0].select(META.names[1:]).equals(pa.Table.from_batches(table.scan(META.names[1:])))


def test_recall_that_is_said_stays_that_of_a_fresh_measurement(world: Any, tmp_path: Path) -> None:
    table, image, _text, has_image = world
    given = asked("SVD16,IVF1,SQ8")
    build.build(subset(table, *FIRST), str(tmp_path), **given)
    record = build.build(subset(table, *NOW), str(tmp_path), **given)  # rows come and go at once
    said = {found.queries: (found.recall, found.n_queries) for found in record.recalls}
    rows = rows_of(NOW)
    there = np.flatnonzero(has_image[rows])
    opened, training = Index.open(str(tmp_path)), record.training
    assert training
    with np.load(tmp_path / training.queries.path) as held:
        for name, (recall, n_queries) in said.items():
            live = held[f"{name}_parts"].astype(str) != ""
            assert n_queries == live.sum() < len(live)
            queries = held[f"{name}_vectors"][live]
            starts = index.part_starts(subset(table, *NOW).parts)
            own = [
                starts[part][0] + row
                for part, row in zip(held[f"{name}_parts"][live].astype(str), held[f"{name}_rows"][live], strict=True)
            ]
            _, truth = brute_force(queries, image[rows][there], there, 11)
            _, found = opened.search(queries, 11)
            others = [
                [set([i for i in ids.tolist() if i != mine][:10]) for ids, mine in zip(answers, own, strict=True)]
                for answers in (truth, found)
            ]
            right = [len(true & answer) for true, answer in zip(*others, strict=True)]
            assert 0.1 < recall < 0.95 and recall == pytest.approx(np.mean(right) / 10, abs=2e-3)


# --- for the difference


def test_a_run_reads_what_is_new_and_leaves_what_stands(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, given = world[0], options("IVF1,SQ8", target_recall=0.9)
    first = build.build(subset(table, *FIRST), str(tmp_path), **given)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    read = set[str]()
    batches = Table._part_batches
    monkeypatch.setattr(
        Table, "_part_batches", lambda self, part, *more: (read.add(part.path), batches(self, part, *more))[1]
    )
    for name in ("train", "tune", "draw_queries"):
        monkeypatch.setattr(vectors if name == "train" else choose, name, lambda *_: pytest.fail("done again"))
    record = build.build(table, str(tmp_path), **given)
    assert read == {table.parts[7].path, table.parts[23].path}
    standing = {part.path for part in first.files} - {first.training.queries.path if first.training else ""}
    assert standing < before.keys() and all((tmp_path / name).stat().st_mtime_ns == before[name] for name in standing)
    assert (record.rows_added, record.rows_removed) == (record.rows_indexed - first.rows_indexed, 0)
    assert (record.parameters, record.rows_tuned) == (first.parameters, first.rows_table)
    assert record.training == first.training and not record.outworn


def test_nothing_of_a_row_that_left_is_left(world: Any, tmp_path: Path) -> None:
    """Its columns are in no file, its vector is found by no search, and it is no measuring query."""
    table, image, _, has_image = world
    given = asked("IVF1,SQfp16")
    build.build(table, str(tmp_path), **given)
    record = build.build(subset(table, *NOW), str(tmp_path), **given)
    gone = np.setdiff1d(np.arange(table.num_rows), rows_of(NOW))
    assert (record.rows_added, record.rows_removed) == (0, has_image[gone].sum())
    opened = Index.open(str(tmp_path))
    kept = set(pa.Table.from_batches(opened.scan(["key"]))["key"].to_pylist())
    assert kept == {f"key-{row}" for row in rows_of(NOW)}
    everything = b"".join(path.read_bytes() for path in tmp_path.glob("meta-*"))
    assert b"key-1250" not in everything and b"key-1350" in everything
    scores, _ = opened.search(image[gone][has_image[gone]].astype(np.float32), 1, nprobe=10**6)
    assert scores.max() < 0.9999
    stored = image.astype(np.float16).astype(np.float32)
    assert record.training
    with np.load(tmp_path / record.training.queries.path) as held:
        asked_for = {row.tobytes() for row in held["image_vectors"]}
    assert not asked_for & {row.tobytes() for row in stored[gone]}
    assert len(asked_for & {row.tobytes() for row in stored}) == next(
        found.n_queries for found in record.recalls if found.queries == "image"
    )


def test_units_that_the_table_removed_or_wrote_smaller_leave_the_index(world: Any, tmp_path: Path) -> None:
    """A real table, changed as `fusion embed` changes it; and the job as the command runs it."""
    shutil.copytree(world[0].place, tmp_path / "table")
    table, index_place, said = Table.open(str(tmp_path / "table")), str(tmp_path / "index"), list[str]()
    asked_for = IndexJob(index_place, **asked("IVF1,SQ8") | {"piece_bytes": 1 << 30})
    first = job.run(asked_for, table, Knobs(workers=1))
    manifest.remove_unit(table.place, table.records[4])
    smaller = table.records[9]
    assert smaller.features
    rows = table.read_part(smaller.features).slice(2).combine_chunks()  # the first two are dead letters now
    with UnitWriter(table.place, table.spec, smaller.unit, smaller) as writer:
        writer.write(rows.to_batches()[0])
        writer.reject(DeadLetter(f"key-{900 + i}", i, "read", "OptedOut", "by its key") for i in (0, 1))
        writer.commit()
    manifest.compact(table.place)
    record = job.run(asked_for, Table.open(table.place), Knobs(workers=1), log=said.append)
    has_image = world[3]
    left = has_image[400:500].sum() + has_image[900:902].sum()
    assert (record.rows_added, record.rows_removed) == (0, left)
    assert f"index: 0 vectors are new, {left} have left with their rows" in said
    assert record.rows_indexed == first.rows_indexed - left == has_image.sum() - left
    opened = Index.open(index_place)
    keys = [key for batch in opened.scan(["key"]) for key in batch["key"].to_pylist()]
    expected = [f"key-{row}" for row in range(table.num_rows) if row // 100 != 4 and row not in (900, 901)]
    assert keys == expected
    kept = np.array([int(key.removeprefix("key-")) for key in keys])
    there = np.flatnonzero(has_image[kept])
    _, found = opened.search(world[2][:50].astype(np.float32), 5, nprobe=10**6)
    _, best = brute_force(world[2][:50], world[1][kept][there], there, 5)
    assert (found == best).mean() > 0.9  # SQ8


def test_a_shard_that_lost_much_is_added_anew_and_all_of_it_leaves(world: Any, tmp_path: Path) -> None:
    table = world[0]
    build.build(subset(table, 0, 1, 2), str(tmp_path), **asked("IVF1,SQ8"))
    record = build.build(subset(table, 2), str(tmp_path), **asked("IVF1,SQ8"))
    assert [shard.rows_cut for shard in record.shards] == [0]
    assert all(found.n_queries for found in record.recalls)  # queries were drawn anew: most had left
    empty = build.build(subset(table), str(tmp_path), **asked("IVF1,SQ8"))
    assert (empty.rows_indexed, empty.rows_removed, empty.recalls) == (0, record.rows_indexed, ())
    assert (Index.open(str(tmp_path)).search(np.eye(1, DIM, dtype=np.float32), 3)[1] == -1).all()
    again = build.build(subset(table, 2), str(tmp_path), **asked("IVF1,SQ8"))
    assert (again.rows_added, again.rows_removed) == (record.rows_indexed, 0)


def test_an_index_that_comes_to_miss_its_target_is_trained_anew_by_the_next_run(tmp_path: Path) -> None:
    """The pictures come to differ in directions that the projection has not seen, and that texts always spoke of."""
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 1100, DIM))
    text[:, :16] = image[:, :16] + 0.3 * text[:, :16]
    image[:600, 16:] = 0
    image, text = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in (image, text))
    table = write_table(tmp_path / "table", image, text, part_rows=100)
    place, given = str(tmp_path / "index"), options("SVD16,IVF1,SQ8", target_recall=0.8)
    first = build.build(subset(table, *range(6)), place, **given)
    second = build.build(table, place, **given)
    assert min(found.recall for found in first.recalls) >= 0.8 and not first.outworn
    assert min(found.recall for found in second.recalls) < 0.8 and second.outworn
    said: list[str] = []
    third = build.build(table, place, log=said.append, **given)
    assert third.training and third.training.why == "it came to miss the target of 0.8"
    assert "index: trained anew: it came to miss the target of 0.8" in said
    assert not third.outworn and build.build(table, place, **given) == third


def test_parameters_are_tuned_again_where_they_do_not_reach_any_more(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options("IVF1,SQfp16", target_recall=0.95)
    first = build.build(subset(world[0], *FIRST), str(tmp_path), **given)
    weak = replace(first, parameters={"nprobe": 1})
    (tmp_path / index.RECORD).write_bytes(records.to_json(weak))
    record = build.build(world[0], str(tmp_path), **given)
    assert record.parameters["nprobe"] > 1 and min(found.recall for found in record.recalls) >= 0.95
    assert record.rows_tuned == record.rows_table > first.rows_tuned


def test_an_index_written_before_columns_lay_with_their_shards_is_read_and_taken_over(
    world: Any, tmp_path: Path
) -> None:
    table = world[0]
    first = build.build(subset(table, *FIRST), str(tmp_path), **asked("IVF1,SQ8"))
    rows = pa.Table.from_batches(Index.open(str(tmp_path)).scan(META.names)).combine_chunks()
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, META) as writer:
        writer.write_table(rows, 700)
    data = stream.getvalue()
    with files.PendingFile(str(tmp_path)) as pending:
        pending.write(data)
        part = merge.publish(pending, "meta", "arrow", rows.num_rows)
    old = records.to_json(
        replace(
            first, meta=part, shards=tuple(replace(shard, meta=None) for shard in first.shards), schema_version="1.1"
        )
    )
    (tmp_path / index.RECORD).write_bytes(old)
    opened = Index.open(str(tmp_path))
    assert opened.meta([2199, 0, 700])["key"].to_pylist() == ["key-2299", "key-0", "key-800"]
    assert pa.Table.from_batches(opened.scan(META.names)).equals(rows)
    record = build.build(table, str(tmp_path), **asked("IVF1,SQ8"))
    assert record.shards[0] == first.shards[0] and len(record.shards) == 2
    assert Index.open(str(tmp_path)).meta(range(table.num_rows))["key"].to_pylist() == [
        f"key-{row}" for row in range(table.num_rows)
    ]


# --- the parts of it


def source(rows: int, name: str) -> Source:
    """A shard of one byte a row."""
    part = Part(f"vectors-{name}.faiss", rows, rows, "")
    return Source(IndexShard((name,), rows, part), {name: rows}, {name})


def test_shards_stay_few_and_bytes_are_seldom_written_again() -> None:
    """A table that grows by a hundredth a thousand times."""
    first, names = 10**6, iter(range(10**6))
    standing, written = [source(first, str(next(names)))], 0
    for _ in range(1000):
        found = merge.groups(standing, [source(first // 100, str(next(names)))], 10**9)
        standing = []
        for group in found:
            size = sum(one.size_bytes for one in group)
            written += size if len(group) > 1 else 0
            standing.append(source(size, str(next(names))))
        assert len(standing) <= 5
    assert written < 12 * sum(one.size_bytes for one in standing)


@given(st.lists(st.integers(1, 100)), st.lists(st.integers(1, 100)), st.integers(1, 150))
def test_each_shard_is_in_one_group_of_at_most_the_size(standing: list[int], new: list[int], most: int) -> None:
    old, added = [[source(size, f"{kind}{i}") for i, size in enumerate(sizes)]
                  for kind, sizes in (("old", standing), ("new", new))]  # fmt: skip
    found = merge.groups(old, added, most)
    assert sorted(one.parts for group in found for one in group) == sorted(one.parts for one in (*old, *added))
    assert all(len(group) <= 1 or sum(one.size_bytes for one in group) <= most for group in found)
    assert new or all(len(group) <= 1 for group in found)


@given(st.data())
def test_answers_are_known_as_far_down_as_all_lists_are(data: st.DataObject) -> None:
    """Against sorting all scores: what is said is right, and as much is said as the lists can tell."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    depth, everything, lists, rows = data.draw(st.integers(1, 6)), [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        n = data.draw(st.integers(0, 12))
        scores, ids = (
            rng.permutation(1000)[:n].astype(np.float32) + 1000 * len(rows) % 7,
            np.arange(n) + 100 * len(rows),
        )
        scores = scores + rng.random(n).astype(np.float32) / 4
        order = np.argsort(-scores)[:depth]
        alive = rng.random(n) < 0.7
        told = [int(i) for i in order if alive[i]]
        known = np.full((2, depth), -1.0)
        known[0, :], known[0, : len(told)], known[1, : len(told)] = -np.inf, scores[told], ids[told]
        lists.append((known[0].astype(np.float32)[None], known[1].astype(np.int64)[None]))
        rows.append(int(alive.sum()))
        everything += [(float(scores[i]), int(ids[i])) for i in range(n) if alive[i]]
    _, found = merge.join_truths(lists, rows)
    said = [int(i) for i in found[0] if i >= 0]
    best = [i for _, i in sorted(everything, reverse=True)]
    assert said == best[: len(said)] and (found[0][len(said) :] == -1).all()
    if all(n <= (pair[1] >= 0).sum() for n, pair in zip(rows, lists, strict=True)):
        assert said == best[: merge.TRUTH_K]
