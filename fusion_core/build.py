"""An index of a feature table, built step by step; each step can be done again, and what is done is not done again.

    plan    sample the table, choose a type, train it once; deal the parts that are new to pieces      (launcher)
    add     one piece: its vectors added to a copy of the trained index, its exact answers kept       (any worker)
    finish  pieces merged into shards, columns written, parameters tuned, index.json written last     (launcher)

A piece is recorded in the index's folder, by the name that the trained index and its parts give it. Memory is that of
a piece, of the sample, or of the packed codes of a shard, never that of the table.
"""

import contextlib
import hashlib
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core import choose, files, fusers, index, vectors
from fusion_core.choose import RECALL_K, Queries
from fusion_core.clock import Clock
from fusion_core.dedup import BadDuplicates, Duplicates
from fusion_core.index import BadIndex, Rows, Shards
from fusion_core.table import Table
from fusion_core.vectors import Floats, Ids, Kind, Parameters, Shard
from schemas import records
from schemas.feature_table import EMBEDDINGS, ManifestRecord, Part, TableSpec
from schemas.index import META, Candidate, IndexRecord, IndexShard, Recall, Training

EXACT_ROWS = 20_000  # up to this many vectors, exact search answers in some milliseconds
TARGET_RECALL = 0.95
NORM_TOLERANCE = 5e-3  # float16 moves a unit vector's length by less than 1e-3

_BLOCK_ROWS = 16_384
_META_BATCH_ROWS = 65_536
_TRAIN_BYTES = 4 << 30
_JUDGED_AT_ONCE = 1024
_LEFT = re.compile(r"(piece|training)-[0-9a-f]{16}\.json")
_GROWTH = 2  # a table that has grown by more than this is trained on anew


@dataclass(frozen=True)
class IndexJob:
    """What decides an index, and where it lies."""

    place: str
    column: str = "image_embedding"
    target_recall: float = TARGET_RECALL
    max_bytes_per_vector: float = 0  # 0: no limit
    max_shard_bytes: int = 4 << 30
    piece_bytes: int = 64 << 20  # of vectors as the table stores them: a worker's memory
    tune_seconds: float = 120
    exact_rows: int = EXACT_ROWS  # up to so many vectors the index is exact, without a choice
    keep: str = ""  # where duplicates of the table lie (dedup.build): the rows that they drop are left out
    kept: str = ""  # the SHA-256 of these, which `plan` looks up
    factory: str = ""  # a type instead of the choice; the number of cells (IVF1) is filled in
    seed: int = 0

    def settings(self, spec: TableSpec) -> str:
        """Fingerprint of what a training depends on, but for the rows."""
        asked = [self.column, self.target_recall, self.max_bytes_per_vector, self.exact_rows, self.factory, self.seed]
        return records.fingerprint([spec.decisive, *asked, *([self.kept] if self.kept else [])])


@dataclass(frozen=True)
class Piece:
    """Some units of the table, to be added to one copy of the trained index."""

    name: str
    records: tuple[ManifestRecord, ...]

    @property
    def rows(self) -> int:
        """With or without a vector."""
        return sum(record.features.rows for record in self.records if record.features)


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    table: Table
    training: Training
    kept: tuple[IndexShard, ...]  # shards that stand as they are
    small: tuple[IndexShard, ...]  # shards that stand, and that pieces are merged with
    pieces: tuple[Piece, ...]
    work: tuple[Piece, ...]  # those of them that are not done


def build(
    table: Table,
    place: str,
    column: str = "image_embedding",
    *,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> IndexRecord:
    """The record of the index of `table`'s `column` that now stands at `place`; `options` are fields of IndexJob.

    The same table and options give the same bytes, whoever adds the pieces.
    """
    job, clock = IndexJob(files.absolute(place), column, **options), Clock(log, "index")
    planned = plan(job, table, clock)
    with clock.stage("add"):
        for piece in planned.work:
            add(job, table.place, table.spec, planned.training, piece)
    return finish(job, planned, clock)


# --- plan


def plan(job: IndexJob, table: Table, clock: Clock) -> Plan:
    """What is to be done for the index to be of `table` as it is now; trains, unless a training stands that fits."""
    before = _check_request(job, table)
    if job.keep:
        job = replace(job, kept=Duplicates.open(job.keep, table).sha256)
    training = _standing_training(job, table, before)
    if training is None:
        with clock.stage("train"):
            training = _train(job, table, clock)
        files.write_bytes(job.place, _training_name(job, table), records.to_json(training, indent=2))
    live = {part.path for part in table.parts}
    known = before.training if before else None
    same = known is not None and (known.trained, known.kept) == (training.trained, training.kept)
    whole = [shard for shard in before.shards if set(shard.parts) <= live] if before and same else []
    done = {path for shard in whole for path in shard.parts}
    todo = [record for record in table.records if record.features and record.features.path not in done]
    # What is new is merged into shards that are small still.
    small = [shard for shard in whole if todo and 2 * shard.size_bytes < job.max_shard_bytes]
    kept = [shard for shard in whole if shard not in small]
    pieces = tuple(_deal(job, table, training, todo))
    work = tuple(piece for piece in pieces if _finished(job, piece.name) is None)
    clock.log(
        f"index: {training.factory}; {len(whole)} shards stand, {len(pieces) - len(work)} pieces are done, "
        f"{len(work)} to do"
    )
    return Plan(table, training, tuple(kept), tuple(small), pieces, work)


def _check_request(job: IndexJob, table: Table) -> IndexRecord | None:
    """The record of the index that stands there, if there is one."""
    _dim(table.spec, job.column)
    if not 0 < job.target_recall <= 1:
        raise ValueError(f"target recall must lie above 0 and not above 1, got {job.target_recall}")
    if not 0 <= job.max_bytes_per_vector < math.inf:
        raise ValueError(f"bytes for a vector must be a number from 0 on, got {job.max_bytes_per_vector}")
    before = None
    if files.stat(files.join(job.place, index.RECORD)):
        before = index.read_record(job.place)  # refuses to replace what is not an index of ours
    with files.PendingFile(job.place):
        pass  # a place that cannot be written to should be known before the work, not after
    if table.spec.fuser and job.column == "fused_embedding":
        fusers.keep(fusers.from_spec(table.spec.fuser, table.place), job.place)  # queries go through it too
    if job.factory:
        Kind.parse(job.factory)
    elif job.max_bytes_per_vector and table.num_rows > job.exact_rows:
        dim = _dim(table.spec, job.column)
        choose.factories(dim, job.max_bytes_per_vector, table.num_rows, _n_lists(table.num_rows, dim))
    return before


def _dim(spec: TableSpec, column: str) -> int:
    if column not in EMBEDDINGS:
        raise ValueError(f"no such vector column: {column!r}; expected one of {', '.join(EMBEDDINGS)}")
    if column != "fused_embedding":
        return spec.tower.embedding_dim
    if spec.fuser is None:
        raise ValueError("the table has no fused_embedding: it was written without a fuser; add one with `fusion fuse`")
    return spec.fuser.out_dim


def _training_name(job: IndexJob, table: Table) -> str:
    return f"training-{job.settings(table.spec)[:16]}.json"


def _standing_training(job: IndexJob, table: Table, before: IndexRecord | None) -> Training | None:
    """The training of the index that stands, or of a run that was cut off, if it was for the same and not outgrown."""
    found = [before.training] if before and before.training else []
    where = files.join(job.place, _training_name(job, table))
    if files.stat(where):
        try:
            found.append(records.from_json(Training, files.read_bytes(where), where))
        except records.SchemaMismatch:
            files.remove(where)
    for training in found:
        parts = [part for part in (training.trained, training.trained_refine, training.queries) if part]
        entries = files.stat_many([files.join(job.place, part.path) for part in parts])
        whole = all(e and e.size_bytes == part.size_bytes for e, part in zip(entries, parts, strict=True))
        grown = table.num_rows > _GROWTH * training.rows_table
        exact_no_more = (
            not Kind.parse(training.factory).lists and table.num_rows > job.exact_rows >= training.rows_table
        )
        fits = training.settings == job.settings(table.spec) and all(
            map(index.OWN_FILE.fullmatch, (p.path for p in parts))
        )
        if whole and fits and not grown and not exact_no_more:
            return training
    return None


def _train(job: IndexJob, table: Table, clock: Clock) -> Training:
    dim, rng = _dim(table.spec, job.column), np.random.default_rng(job.seed)
    queries, drawn = choose.draw_queries(table, job.column, job.seed)
    for asked in queries:
        _check_lengths(asked.vectors, lambda i, a=asked: f"row {a.rows[i]} of {a.parts[i]}", f"{asked.name}_embedding")  # type: ignore[misc]
    if not job.factory and table.num_rows <= job.exact_rows:
        return _publish_training(
            job, table, vectors.train(Kind.parse("Flat"), np.empty((0, dim), np.float32), 0), queries
        )
    most_lists = _n_lists(table.num_rows, dim)
    wanted = max(choose.sample_rows(dim), vectors.TRAIN_PER_LIST * most_lists)
    # Queries are held out, as far as a small table can spare them.
    held_out = drawn if table.num_rows > 4 * len(drawn) else None
    _, sample = choose.draw(table, job.column, wanted, rng, held_out)
    _check_lengths(sample, lambda i: "a sampled row", job.column)
    rows = table.num_rows if len(sample) == wanted else len(sample)
    lists = min(most_lists, max(1, len(sample) // vectors.TRAIN_PER_LIST))
    factory = job.factory
    candidates: tuple[Candidate, ...] = ()
    if len(sample) == 0 or (not factory and rows <= job.exact_rows):
        factory = "Flat"
    elif not factory:
        few = np.sort(rng.permutation(len(sample))[: choose.sample_rows(dim)])
        trial = choose.Trial.of(sample[few].astype(np.float32), queries, rows, _n_lists(len(few), dim), lists, job.seed)
        candidates = choose.choose(trial, job.target_recall, job.max_bytes_per_vector, job.tune_seconds, clock.log)
        factory = next(item.factory for item in candidates if item.chosen)
        del trial
    kind, n_sampled = Kind.parse(factory).with_lists(lists), len(sample)
    in_full = sample.astype(np.float32)
    del sample
    trained = vectors.train(kind, in_full, job.seed)
    return replace(_publish_training(job, table, trained, queries), candidates=candidates, rows_sampled=n_sampled)


def _n_lists(rows: int, dim: int) -> int:
    """About 4 √rows cells, fewer where the training sample cannot fill them."""
    trainable = min(rows, _TRAIN_BYTES // (4 * dim))
    return max(1, min(round(4 * math.sqrt(rows)), trainable // vectors.TRAIN_PER_LIST))


def _publish_training(job: IndexJob, table: Table, trained: Shard, queries: Sequence[Queries]) -> Training:
    held: dict[str, npt.NDArray[Any]] = {}
    for asked in queries:
        held |= {f"{asked.name}_vectors": asked.vectors, f"{asked.name}_rows": asked.rows}
        held[f"{asked.name}_parts"] = asked.parts.astype("S")
    return Training(
        factory=trained.kind.text,
        rows_table=table.num_rows,
        rows_sampled=0,
        settings=job.settings(table.spec),
        trained=_publish_index(job.place, "trained", trained.base),
        trained_refine=_publish_index(job.place, "trained", trained.refine) if trained.refine is not None else None,
        queries=_publish_arrays(job.place, "queries", held, sum(len(asked.vectors) for asked in queries)),
        kept=job.kept,
    )


def _deal(job: IndexJob, table: Table, training: Training, todo: Sequence[ManifestRecord]) -> Iterator[Piece]:
    """Neighbouring units in pieces of at most `piece_bytes`, or of one unit where that is larger."""
    most_rows = max(1, job.piece_bytes // (2 * _dim(table.spec, job.column)))
    group: list[ManifestRecord] = []
    rows = 0
    for record in todo:
        n = record.features.rows if record.features else 0
        if group and rows + n > most_rows:
            yield _piece(training, group)
            group, rows = [], 0
        group.append(record)
        rows += n
    if group:
        yield _piece(training, group)


def _piece(training: Training, group: Sequence[ManifestRecord]) -> Piece:
    parts = [record.features.sha256 for record in group if record.features]
    refine = training.trained_refine.sha256 if training.trained_refine else ""
    key = [
        training.trained.sha256,
        refine,
        training.queries.sha256,
        *parts,
        *([training.kept] if training.kept else []),
    ]
    return Piece(hashlib.sha256("\n".join(key).encode()).hexdigest()[:16], tuple(group))


# --- add


def add(job: IndexJob, table_place: str, spec: TableSpec, training: Training, piece: Piece) -> None:
    """Adds one piece and records it; raises ValueError naming a row whose vector has not unit length."""
    table = Table(table_place, spec, piece.records)
    folder: Any = nullcontext("") if files.is_local(job.place) else tempfile.TemporaryDirectory(prefix="fusion-index-")
    with folder as scratch:
        shard = _read_trained(job.place, training, scratch)
        queries = _read_queries(job, spec, training, scratch)
    kept = _kept(job, table, training)
    k = RECALL_K + 1  # a query's own row does not count
    truths = {asked.name: (np.full((len(asked.vectors), k), -np.inf, np.float32),
                           np.full((len(asked.vectors), k), -1, np.int64)) for asked in queries}  # fmt: skip
    numbers: list[npt.NDArray[np.uint32]] = []
    for rows, block in index.blocks(table, job.column):
        if kept is not None:
            rows, block = rows[kept[rows]], block[kept[rows]]
        _check_lengths(block, lambda i, at=rows: _named_row(table, int(at[i])), job.column)  # type: ignore[misc]
        for asked in queries if len(block) else ():
            scores, places = vectors.exact(asked.vectors, block, k)
            known = truths[asked.name]
            both = np.hstack([known[0], scores]), np.hstack([known[1], places + shard.rows])
            truths[asked.name] = vectors.best(*both, k)
        shard.add(block)
        numbers.append(rows.astype(np.uint32))
    in_table = np.concatenate([*numbers, np.empty(0, np.uint32)])
    arrays = {f"{name}_{what}": found[i] for name, found in truths.items() for i, what in enumerate(("scores", "ids"))}
    done = IndexShard(
        tuple(record.features.path for record in piece.records if record.features),
        piece.rows,
        _publish_index(job.place, "vectors", shard.base),
        _publish_index(job.place, "refine", shard.refine) if shard.refine is not None else None,
        _publish_numbers(job.place, [in_table]) if len(in_table) < piece.rows else None,
        _publish_arrays(job.place, "truth", arrays, shard.rows),
    )
    files.write_bytes(job.place, f"piece-{piece.name}.json", records.to_json(done))


def _kept(job: IndexJob, table: Table, training: Training) -> npt.NDArray[np.bool_] | None:
    """Which rows of some of the table's parts are to be indexed; None where all are."""
    if not training.kept:
        return None
    duplicates = Duplicates.read(job.keep, table)
    if duplicates.sha256 != training.kept:
        raise BadDuplicates(f"{job.keep} was written anew meanwhile: run the same command again")
    return duplicates.kept(table.parts)


def _finished(job: IndexJob, name: str) -> IndexShard | None:
    """The record of a piece that is done and whole."""
    where = files.join(job.place, f"piece-{name}.json")
    if files.stat(where) is None:
        return None
    try:
        done = records.from_json(IndexShard, files.read_bytes(where), where)
    except records.SchemaMismatch:
        return None
    entries = files.stat_many([files.join(job.place, part.path) for part in done.files])
    whole = all(e and e.size_bytes == part.size_bytes for e, part in zip(entries, done.files, strict=True))
    return done if whole and all(index.OWN_FILE.fullmatch(part.path) for part in done.files) else None


def _check_lengths(block: npt.NDArray[Any], name: Callable[[int], str], column: str) -> None:
    for start in range(0, len(block), _BLOCK_ROWS):
        lengths = np.linalg.norm(block[start : start + _BLOCK_ROWS].astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE))  # so written, NaN is bad too
        if len(bad):
            raise ValueError(
                f"{name(start + int(bad[0]))} has a {column} of length {lengths[bad[0]]}; expected 1: embed that shard "
                "again"
            )


def _named_row(table: Table, row: int) -> str:
    found = table.take([row], ["key", "shard", "row"]).to_pylist()[0]
    return f"row {found['row']} of {found['shard']} (key {found['key']!r})"


def _read_trained(place: str, training: Training, scratch: str) -> Shard:
    base, refine = (
        vectors.read(index.checked_file(place, part, True, scratch), writable=True) if part else None
        for part in (training.trained, training.trained_refine)
    )
    return Shard(Kind.parse(training.factory), base, refine)


def _read_queries(job: IndexJob, spec: TableSpec, training: Training, scratch: str) -> list[Queries]:
    with np.load(index.checked_file(job.place, training.queries, True, scratch), allow_pickle=False) as held:
        return [
            Queries(
                name,
                held[f"{name}_vectors"],
                held[f"{name}_parts"].astype(str),
                held[f"{name}_rows"],
            )
            for name in choose.kinds_of_query(spec, job.column)
        ]


# --- finish


def finish(job: IndexJob, planned: Plan, clock: Clock) -> IndexRecord:
    """Merges what was added, measures it, and makes it the index at the job's place.

    Raises BadIndex where a piece is missing.
    """
    table, training, place = planned.table, planned.training, job.place
    before = index.read_record(place) if files.stat(files.join(place, index.RECORD)) else None
    if before and not planned.pieces and planned.kept == before.shards and before.parts == table.parts:
        clock.log(f"index: {place} is of {table.place} as it is now: nothing to do")
        return before
    # What was downloaded is needed until the measurement is over.
    folder: Any = nullcontext("") if files.is_local(place) else tempfile.TemporaryDirectory(prefix="fusion-index-")
    with folder as scratch:
        with clock.stage("merge"):
            merged = [_merge(job, training, group, scratch) for group in _groups(job, planned)]
        shards = (*planned.kept, *merged)
        with clock.stage("columns"):
            meta = _publish_meta(job.place, table)
        with clock.stage("measure"):
            parameters, recalls, latency = _measure(job, planned, shards, scratch)
    log_recalls = ", ".join(f"recall@{r.k} of {r.queries} queries {r.recall:.3f}" for r in recalls)
    clock.log(f"index: {parameters or training.factory}, {log_recalls}")
    missed = [r for r in recalls if r.recall < job.target_recall]
    if missed:
        clock.log(f"index: the target of {job.target_recall} was not reached: allow more bytes, or ask for less recall")
    record = IndexRecord(
        table=table.place,
        table_spec=table.spec,
        parts=tuple(table.parts),
        column=job.column,
        dim=_dim(table.spec, job.column),
        rows_table=table.num_rows,
        rows_indexed=sum(shard.vectors.rows for shard in shards),
        factory=training.factory,
        metric="inner_product",
        parameters=parameters,
        vectors=shards[0].vectors,
        meta=meta,
        recalls=tuple(recalls),
        latency_ms=latency,
        seconds=clock.seconds,
        seed=job.seed,
        shards=shards,
        training=training,
        target_recall=job.target_recall,
        max_bytes_per_vector=job.max_bytes_per_vector,
    )
    files.write_bytes(place, index.RECORD, records.to_json(record, indent=2))
    _remove_replaced(place, before, record)
    return record


def _groups(job: IndexJob, planned: Plan) -> list[list[IndexShard]]:
    """What is to be merged into one shard each, of at most `max_shard_bytes`; there is at least one shard."""
    done = list(planned.small)
    for piece in planned.pieces:
        shard = _finished(job, piece.name)
        if shard is None:
            raise BadIndex(f"{job.place}: the piece {piece.name} is missing: run the same command again")
        done.append(shard)
    if not done and not planned.kept:
        return [[]]
    groups: list[list[IndexShard]] = []
    size = 0
    for shard in done:
        if not groups or size + shard.size_bytes > job.max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.size_bytes
    return groups


def _merge(job: IndexJob, training: Training, group: Sequence[IndexShard], scratch: str) -> IndexShard:
    """One shard of all in the group, in their order, published in the index's folder."""
    if len(group) == 1:
        return group[0]
    trained = _read_trained(job.place, training, scratch)
    rows = sum(shard.rows for shard in group)
    counts = [shard.vectors.rows for shard in group]

    def merged(name: str, parts: Sequence[Part | None], empty: Any) -> Part:
        sources = [vectors.read(_local(job, part, scratch)) for part in parts if part]
        with files.PendingFile(job.place) as pending:
            vectors.merge(empty, sources, pending)
            return _publish(pending, name, "faiss", sum(counts))

    numbers = None
    if any(shard.row_numbers for shard in group):
        firsts = np.cumsum([0, *(shard.rows for shard in group)])
        numbers = _publish_numbers(
            job.place,
            [_numbers(job, shard, scratch) + np.uint32(first) for shard, first in zip(group, firsts, strict=False)],
        )
    return IndexShard(
        tuple(part for shard in group for part in shard.parts),
        rows,
        merged("vectors", [shard.vectors for shard in group], trained.base),
        merged("refine", [shard.refine for shard in group], trained.refine) if trained.refine is not None else None,
        numbers,
        _merge_truths(job, group, counts, scratch) if group else None,
    )


def _local(job: IndexJob, part: Part, scratch: str) -> str:
    return index.checked_file(job.place, part, False, scratch)


def _numbers(job: IndexJob, shard: IndexShard, scratch: str) -> npt.NDArray[np.uint32]:
    if shard.row_numbers is None:
        return np.arange(shard.rows, dtype=np.uint32)
    found: npt.NDArray[np.uint32] = np.load(_local(job, shard.row_numbers, scratch), "r", allow_pickle=False)
    return found


def _read_truth(job: IndexJob, shard: IndexShard, scratch: str) -> dict[str, tuple[Floats, Ids]]:
    """By kind of query: scores and numbers of the best of one shard."""
    if shard.truth is None:
        return {}
    with np.load(_local(job, shard.truth, scratch), allow_pickle=False) as held:
        names = [name.removesuffix("_ids") for name in held.files if name.endswith("_ids")]
        return {name: (held[f"{name}_scores"], held[f"{name}_ids"]) for name in names}


def _merge_truths(job: IndexJob, group: Sequence[IndexShard], counts: Sequence[int], scratch: str) -> Part:
    found = [_read_truth(job, shard, scratch) for shard in group]
    arrays: dict[str, npt.NDArray[Any]] = {}
    firsts = np.cumsum([0, *counts])
    for name in found[0]:
        scores = np.hstack([truth[name][0] for truth in found])
        ids = [np.where(t[name][1] < 0, -1, t[name][1] + first) for t, first in zip(found, firsts, strict=False)]
        arrays[f"{name}_scores"], arrays[f"{name}_ids"] = vectors.best(scores, np.hstack(ids), RECALL_K + 1)
    return _publish_arrays(job.place, "truth", arrays, sum(counts))


# --- measuring


def _measure(
    job: IndexJob, planned: Plan, shards: Sequence[IndexShard], scratch: str
) -> tuple[Parameters, list[Recall], dict[str, float]]:
    """Parameters tuned to the target with all held-out queries, the recall they give, and milliseconds of a query."""
    kind, dim = Kind.parse(planned.training.factory), _dim(planned.table.spec, job.column)
    starts = index.part_starts(planned.table.parts)
    opened = []
    for shard in shards:
        paths = {part.path: _local(job, part, scratch) for part in shard.files}
        opened.append(index.read_shard(kind, dim, shard, paths, starts))
    whole = Shards(dim, opened)
    asked = [
        (queries, *_truth(job, queries, shards, [rows for _, rows in opened], starts, scratch))
        for queries in _read_queries(job, planned.table.spec, planned.training, scratch)
    ]
    asked = [item for item in asked if (item[1][1] >= 0).any()]
    if not asked:
        return {}, [], {}
    k = min(RECALL_K + 1, whole.rows)
    stored = {}
    if not kind.exact_scores:
        for queries, (_, ids), _ in asked:
            stored[queries.name] = whole.reconstruct(ids.reshape(-1)).reshape(*ids.shape, dim)

    def recalls(parameters: Parameters) -> list[float]:
        found = []
        for queries, truth, own in asked:
            scores, ids = _without(own, *whole.search(queries.vectors, k, parameters))
            if not kind.exact_scores:
                scores = _judged(whole, ids, truth[1], stored[queries.name])
            found.append(index.recall(scores, ids, *truth, RECALL_K))
        return found

    def taken(parameters: Parameters) -> npt.NDArray[np.float64]:
        search = lambda query: whole.search(query, min(RECALL_K, whole.rows), parameters)  # noqa: E731
        return choose.microseconds(search, asked[0][0].vectors)

    parameters = choose.tune(kind, recalls, lambda p: float(np.median(taken(p))), job.target_recall)
    measured = [
        Recall(queries.name, RECALL_K, len(queries.vectors), round(value, 4))
        for (queries, *_), value in zip(asked, recalls(parameters), strict=True)
    ]
    times = taken(parameters)
    return parameters, measured, {f"p{q}": round(float(np.percentile(times, q)) / 1e3, 3) for q in (50, 99)}


def _truth(
    job: IndexJob,
    queries: Queries,
    shards: Sequence[IndexShard],
    rows: Sequence[Rows],
    starts: dict[str, tuple[int, int]],
    scratch: str,
) -> tuple[tuple[Floats, Ids], Ids]:
    """The true best RECALL_K over all shards but for the query's own row; and the id of that row, or -2.

    A caption's own picture is its easiest answer, and not one that a user's text has.
    """
    own = np.array(
            [starts[part][0] + row if part in starts else -2
             for part, row in zip(queries.parts.tolist(), queries.rows.tolist(), strict=True)], np.int64,
        )  # fmt: skip
    scores = [np.full((len(own), RECALL_K + 1), -np.inf, np.float32)]
    ids = [np.full((len(own), RECALL_K + 1), -1, np.int64)]
    for shard, places in zip(shards, rows, strict=True):
        found = _read_truth(job, shard, scratch).get(queries.name)
        if found is not None:
            scores.append(found[0])
            ids.append(places.ids(found[1]))
    return _without(own, np.hstack(scores), np.hstack(ids)), own


def _without(own: Ids, scores: Floats, ids: Ids) -> tuple[Floats, Ids]:
    mine = ids == own[:, None]
    return vectors.best(np.where(mine, np.float32(-np.inf), scores), np.where(mine, -1, ids), RECALL_K)


def _judged(whole: Shards, ids: Ids, truth: Ids, stored: Floats) -> Floats:
    """Scores that say only what is right: the true best, and what the index cannot tell from one of them.

    Its own scores are of lossy codes. Of identical vectors the codes are identical, so `stored` (what the index has of
    the true best, [q, k, D]) is found again.
    """
    right = (ids[:, :, None] == truth[:, None, :]).any(axis=2)
    query, place = np.nonzero(~right & (ids >= 0))
    for some in np.array_split(np.arange(len(query)), -(-len(query) // _JUDGED_AT_ONCE) or 1):
        found = whole.reconstruct(ids[query[some], place[some]])
        theirs = stored[query[some]]
        apart = (found**2).sum(1)[:, None] + (theirs**2).sum(2) - 2 * np.einsum("nd,nkd->nk", found, theirs)
        right[query[some], place[some]] = (apart < 1e-6).any(axis=1)
    return np.where(right & (ids >= 0), np.float32(np.inf), np.float32(-np.inf))


# --- files


def _publish(pending: files.PendingFile, name: str, suffix: str, rows: int) -> Part:
    part = Part(f"{name}-{pending.sha256[:8]}.{suffix}", rows, pending.size_bytes, pending.sha256)
    pending.publish(part.path)
    return part


def _publish_index(folder: str, name: str, faiss_index: Any) -> Part:
    with files.PendingFile(folder) as pending:
        vectors.write(faiss_index, pending)
        return _publish(pending, name, "faiss", faiss_index.ntotal)


def _publish_arrays(folder: str, name: str, arrays: dict[str, npt.NDArray[Any]], rows: int) -> Part:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    with files.PendingFile(folder) as pending:
        pending.write(stream.getvalue())
        return _publish(pending, name, "npz", rows)


def _publish_numbers(folder: str, pieces: Sequence[npt.NDArray[np.uint32]]) -> Part:
    rows = sum(map(len, pieces))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<u4", "fortran_order": False, "shape": (rows,)})
    with files.PendingFile(folder) as pending:
        pending.write(head.getvalue())
        for piece in pieces:
            pending.write(np.ascontiguousarray(piece))
        return _publish(pending, "rows", "npy", rows)


def _publish_meta(place: str, table: Table) -> Part:
    with files.PendingFile(place) as pending:
        rows = _write_meta(pending, table)
        if rows != table.num_rows:
            raise ValueError(f"{table.place} gave {rows} rows where its manifest counts {table.num_rows}")
        return _publish(pending, "meta", "arrow", rows)


def _write_meta(pending: files.PendingFile, table: Table) -> int:
    rows = 0
    with pa.ipc.new_file(pa.PythonFile(pending, "w"), META) as writer:
        for batch in _of_equal_size(table.scan([name for name in META.names if name != "id"]), _META_BATCH_ROWS):
            columns = {"id": pa.array(np.arange(rows, rows + batch.num_rows))}
            columns |= {name: batch.column(name) for name in META.names if name != "id"}
            writer.write_batch(pa.record_batch([columns[name] for name in META.names], schema=META))
            rows += batch.num_rows
    return rows


def _of_equal_size(batches: Any, rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows`, but for the last."""
    held: list[pa.RecordBatch] = []
    n_held = 0
    for batch in batches:
        held.append(batch)
        n_held += batch.num_rows
        while n_held >= rows:
            whole = pa.concat_batches(held)
            yield whole.slice(0, rows)
            held, n_held = [whole.slice(rows)], n_held - rows
    if n_held:
        yield pa.concat_batches(held)


def _remove_replaced(place: str, before: IndexRecord | None, now: IndexRecord) -> None:
    """Deletes the files of the replaced index, the work, and files of builds that died a day ago or earlier."""
    current = {part.path for part in now.files}
    replaced = {part.path for part in before.files} if before else set()
    for entry in files.list_files(place):
        if re.fullmatch(r"piece-[0-9a-f]{16}\.json", entry.place.rpartition("/")[2]):
            with contextlib.suppress(records.SchemaMismatch):
                found = records.from_json(IndexShard, files.read_bytes(entry.place), entry.place)
                replaced |= {part.path for part in found.files}
    for entry in files.list_files(place):
        name = entry.place.rpartition("/")[2]
        stale = files.is_old(entry.mtime_ns / 1e9)
        ours = index.OWN_FILE.fullmatch(name) and name not in current
        if _LEFT.fullmatch(name) or (ours and (name in replaced or stale)):
            files.remove(entry.place)
    files.remove_stale_temporaries(place)
