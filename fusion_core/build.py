"""An index of a feature table, built step by step; each step can be done again, and what is done is not done again.

    plan    sample the table, choose a type, train it once; deal the parts that are new to pieces      (launcher)
    add     one piece: its vectors added to a copy of the trained index, columns and exact answers     (any worker)
    finish  pieces merged into shards, rows that left taken out, measured, index.json written last     (launcher)

As the table changes, a run costs what the difference costs: shards that stand are read where rows have left them or
where they are not much larger than what is new (merge.py), and asked the measuring queries. The index is trained anew,
and then built anew, when the table has outgrown its training, when half of the queries have left with their rows, or
when it has come to miss a target that it reached; `Training.why` says so.

A piece is recorded in the index's folder, by the name that the trained index and its parts give it. Memory is that of
a piece, of the sample, or of the packed codes of a shard, never that of the table.
"""

import contextlib
import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_core import choose, files, fusers, index, merge, vectors
from fusion_core.choose import Queries
from fusion_core.clock import Clock
from fusion_core.dedup import BadDuplicates, Duplicates
from fusion_core.manifest import unit_of_part
from fusion_core.measuring import Measured, measure
from fusion_core.merge import TRUTH_K, Source
from fusion_core.table import Table
from fusion_core.vectors import Kind, Shard
from schemas import records
from schemas.errors import RunError
from schemas.feature_table import EMBEDDINGS, ManifestRecord, Part, TableSpec
from schemas.index import Candidate, IndexRecord, IndexShard, Training

EXACT_ROWS = 20_000  # up to this many vectors, exact search answers in some milliseconds
TARGET_RECALL = 0.95
NORM_TOLERANCE = 5e-3  # float16 moves a unit vector's length by less than 1e-3

_BLOCK_ROWS = 16_384
_TRAIN_BYTES = 4 << 30
_LEFT = re.compile(r"(piece|training)-[0-9a-f]{16}\.json")
_GROWTH = 2  # a table that has grown by more than this is trained on anew
_MOST_CUT = 1 / 3  # of a shard's rows may leave; then the rest is added anew, with exact answers that are complete


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
        return records.fingerprint([spec.fingerprint, *asked, *([self.kept] if self.kept else [])])


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
    before: IndexRecord | None  # the index that stands
    standing: tuple[Source, ...]  # its shards, as far as they are taken over
    pieces: tuple[Piece, ...]
    work: tuple[Piece, ...]  # those of them that are not done

    @property
    def is_done(self) -> bool:
        """Whether the index that stands is of the table as it is."""
        before = self.before
        if before is None or self.pieces or before.parts != tuple(self.table.parts):
            return False
        taken = [source.shard for source in self.standing if source.is_whole]
        return before.training == self.training and taken == [shard for shard in before.shards if shard.rows]


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
    training, why = _standing_training(job, table, before)
    if training is None:
        if why:
            clock.log(f"index: trained anew: {why}")
        with clock.stage("train"):
            training = replace(_train(job, table, clock), why=why)
        files.write_bytes(job.place, _training_name(job, table), records.to_json(training, indent=2))
    standing = tuple(_standing(job, table, before, training)) if before else ()
    done = {path for source in standing for path in source.parts}
    todo = [record for record in table.records if record.features and record.features.path not in done]
    pieces = tuple(_deal(job, table, training, todo))
    work = tuple(piece for piece in pieces if _finished(job, piece.name) is None)
    clock.log(
        f"index: {training.factory}; {len(standing)} shards stand, {len(pieces) - len(work)} pieces are done, "
        f"{len(work)} to do"
    )
    return Plan(table, training, before, standing, pieces, work)


def _standing(job: IndexJob, table: Table, before: IndexRecord, training: Training) -> Iterator[Source]:
    """The shards that are taken over: with the training, and but for few rows of the table as it is."""
    known = before.training
    # An empty Flat index is the same for all columns.
    if known is None or before.column != job.column or _decided_by(known) != _decided_by(training):
        return
    part_rows = {part.path: part.rows for part in (*before.parts, *table.parts)}
    live = {part.path for part in table.parts}
    for shard in before.shards:
        source = Source(shard, part_rows, live)
        cut = shard.rows_cut + shard.rows - source.rows
        few = source.is_whole or (shard.meta and cut <= _MOST_CUT * (cut + source.rows))
        if source.rows and few and _is_whole(job, shard.files):
            yield source


def _decided_by(training: Training) -> tuple[Any, ...]:
    """What shards have in common that can be one index, and be measured as one."""
    return training.trained, training.trained_refine, training.kept, training.drawn


def _is_whole(job: IndexJob, parts: Sequence[Part]) -> bool:
    """Whether these files of the index are ours and lie there in their sizes."""
    if not all(index.OWN_FILE.fullmatch(part.path) for part in parts):
        return False
    entries = files.stat_many([files.join(job.place, part.path) for part in parts])
    return all(e is not None and e.size_bytes == part.size_bytes for e, part in zip(entries, parts, strict=True))


def _check_request(job: IndexJob, table: Table) -> IndexRecord | None:
    """The record of the index that stands there, if there is one."""
    _dim(table.spec, job.column)
    if not 0 < job.target_recall <= 1:
        raise ValueError(f"target recall must lie above 0 and not above 1, got {job.target_recall}")
    if not 0 <= job.max_bytes_per_vector < math.inf:
        raise ValueError(f"bytes for a vector must be a number from 0 on, got {job.max_bytes_per_vector}")
    if files.stat(files.join(job.place, "table.json")):
        raise index.BadIndex(f"{job.place} is a feature table: name another folder for the index")
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


def _standing_training(job: IndexJob, table: Table, before: IndexRecord | None) -> tuple[Training | None, str]:
    """The training of the index that stands, or of a run that was cut off, if it does for this table; else why not."""
    found = [before.training] if before and before.training and not before.outworn else []
    where = files.join(job.place, _training_name(job, table))
    if files.stat(where):
        try:
            found.append(records.from_json(Training, files.read_bytes(where), where))
        except records.SchemaMismatch:
            files.remove(where)
    why = f"it came to miss the target of {job.target_recall}" if before and before.outworn else ""
    for training in found:
        unfit = _unfit(job, table, training)
        if not unfit:
            return _without_gone(job, table, training), ""
        why = why or unfit
    return None, why or ("written by an earlier release" if before else "")


def _unfit(job: IndexJob, table: Table, training: Training) -> str:
    """Why a training does not do for the table; empty where it does."""
    if training.settings != job.settings(table.spec):
        return "another index is asked for"
    if not _is_whole(job, training.files):
        return "its files are not whole"
    rows, then = table.num_rows, training.rows_table
    if rows > _GROWTH * then:
        return f"the table had {then:,} rows then and has {rows:,} now"
    if not Kind.parse(training.factory).lists and rows > job.exact_rows >= then:
        return f"the table has {rows:,} rows now, more than the {job.exact_rows:,} that are searched exactly"
    return ""


def _without_gone(job: IndexJob, table: Table, training: Training) -> Training:
    """The training, its queries without those whose row is not the table's any more: nothing of these is kept.

    Where more than half of them are gone, others are drawn; as their exact answers are not known, all is added anew.
    """
    live = {part.path for part in table.parts}
    with _scratch(job.place) as scratch:
        queries = _read_queries(job, table.spec, training, scratch)
    gone = [np.array([part not in live for part in asked.parts.tolist()], bool) for asked in queries]
    if all((~out).sum() >= len(out) / 2 for out in gone):
        if not any((out & (asked.parts != "")).any() for out, asked in zip(gone, queries, strict=True)):
            return training
        left = [Queries(asked.name, np.where(out[:, None], np.float32(0), asked.vectors),
                        np.where(out, "", asked.parts), asked.rows)
                for asked, out in zip(queries, gone, strict=True)]  # fmt: skip
        return replace(training, queries=_publish_queries(job.place, left))
    drawn = _publish_queries(job.place, choose.draw_queries(table, job.column, job.seed)[0])
    return replace(training, queries=drawn, drawn=drawn.sha256)


def _scratch(place: str) -> Any:
    """A folder for downloads, with a path as its value; the empty one where nothing needs to be."""
    return nullcontext("") if files.is_local(place) else tempfile.TemporaryDirectory(prefix="fusion-index-")


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
    asked = _publish_queries(job.place, queries)
    return Training(
        factory=trained.kind.text,
        rows_table=table.num_rows,
        rows_sampled=0,
        settings=job.settings(table.spec),
        trained=merge.publish_index(job.place, "trained", trained.base),
        trained_refine=merge.publish_index(job.place, "trained", trained.refine)
        if trained.refine is not None
        else None,
        queries=asked,
        drawn=asked.sha256,
        kept=job.kept,
    )


def _publish_queries(place: str, queries: Sequence[Queries]) -> Part:
    held: dict[str, npt.NDArray[Any]] = {}
    for asked in queries:
        held |= {f"{asked.name}_vectors": asked.vectors, f"{asked.name}_rows": asked.rows}
        held[f"{asked.name}_parts"] = asked.parts.astype("S")
    return merge.publish_arrays(place, "queries", held, sum(len(asked.vectors) for asked in queries))


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
        training.settings,
        training.trained.sha256,
        refine,
        training.drawn or training.queries.sha256,
        *parts,
        *([training.kept] if training.kept else []),
    ]
    return Piece(hashlib.sha256("\n".join(key).encode()).hexdigest()[:16], tuple(group))


# --- add


def add(job: IndexJob, table_place: str, spec: TableSpec, training: Training, piece: Piece) -> None:
    """Adds one piece and records it; raises ValueError naming a row whose vector has not unit length."""
    table = Table(table_place, spec, piece.records)
    with _scratch(job.place) as scratch:
        shard = _read_trained(job.place, training, scratch)
        queries = _read_queries(job, spec, training, scratch)
    kept = _kept(job, table, training)
    k = TRUTH_K
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
        merge.publish_index(job.place, "vectors", shard.base),
        merge.publish_index(job.place, "refine", shard.refine) if shard.refine is not None else None,
        merge.publish_numbers(job.place, [in_table]) if len(in_table) < piece.rows else None,
        merge.publish_arrays(job.place, "truth", arrays, shard.rows),
        merge.write_meta(job.place, table),
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
    return done if done.meta and _is_whole(job, done.files) else None  # without columns it is of an earlier release


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
    """Merges what was added, takes out what has left, measures, and makes it the index at the job's place.

    Raises RunError where a piece is missing.
    """
    table, training, place, before = planned.table, planned.training, job.place, planned.before
    if before and planned.is_done:
        clock.log(f"index: {place} is of {table.place} as it is now: nothing to do")
        _remove_replaced(place, before, before)
        return before
    with _scratch(place) as scratch:  # what was downloaded is needed until the measurement is over
        with clock.stage("merge"):
            shards = tuple(_merged(job, planned, scratch))
        with clock.stage("measure"):
            found, known = _measure(job, planned, shards, scratch)
        added, removed = _difference(job, planned, shards, scratch)
    clock.log(f"index: {added:,} vectors are new, {removed:,} have left with their rows")
    recalls = "".join(f", recall@{r.k} of {r.queries} queries {r.recall:.3f}" for r in found.recalls)
    clock.log(f"index: {found.parameters or training.factory}{recalls}")
    missed = not found.reaches(job.target_recall)
    outworn = missed and known is not None and known.reaches(job.target_recall)
    if outworn:
        clock.log(f"index: the target of {job.target_recall} is missed now: the next run trains anew")
    elif missed:
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
        parameters=found.parameters,
        vectors=shards[0].vectors,
        meta=shards[0].meta,  # type: ignore[arg-type]  # each has them
        recalls=found.recalls,
        latency_ms=found.latency_ms,
        seconds=clock.seconds,
        seed=job.seed,
        shards=shards,
        training=training,
        target_recall=job.target_recall,
        max_bytes_per_vector=job.max_bytes_per_vector,
        rows_added=added,
        rows_removed=removed,
        rows_tuned=table.num_rows if found.is_tuned or before is None else before.rows_tuned,
        outworn=outworn,
    )
    files.write_bytes(place, index.RECORD, records.to_json(record, indent=2))
    _remove_replaced(place, before, record)
    return record


def _merged(job: IndexJob, planned: Plan, scratch: str) -> Iterator[IndexShard]:
    """The index's shards."""
    part_rows = {part.path: part.rows for part in planned.table.parts}
    new = []
    for piece in planned.pieces:
        shard = _finished(job, piece.name)
        if shard is None:
            raise RunError(f"{job.place}: the piece {piece.name} is missing: run the same command again")
        new.append(Source(shard, part_rows, part_rows))
    records_of = {record.features.path: record for record in planned.table.records if record.features}
    standing = list(planned.standing)
    for i, source in enumerate(standing):
        if source.shard.meta is None:  # written before 1.2
            its = tuple(records_of[part] for part in source.parts)
            meta = merge.write_meta(job.place, replace(planned.table, records=its))
            standing[i] = Source(replace(source.shard, meta=meta), part_rows, part_rows)
    for group in merge.groups(standing, new, job.max_shard_bytes):
        if len(group) == 1 and group[0].is_whole:
            yield group[0].shard
        else:
            trained = _read_trained(job.place, planned.training, scratch)
            yield merge.merge(job.place, trained, group, scratch)


def _measure(
    job: IndexJob, planned: Plan, shards: Sequence[IndexShard], scratch: str
) -> tuple[Measured, Measured | None]:
    """How well the shards do, and how well the index did that stood, if with the same training."""
    kind, dim = Kind.parse(planned.training.factory), _dim(planned.table.spec, job.column)
    starts, before = index.part_starts(planned.table.parts), planned.before
    opened = []
    for shard in shards:
        searched = [part for part in shard.files if part not in (shard.truth, shard.meta)]
        paths = {part.path: index.checked_file(job.place, part, False, scratch) for part in searched}
        opened.append(index.read_shard(kind, dim, shard, paths, starts))
    known = None
    if before and before.recalls and before.training and before.training.trained == planned.training.trained:
        known = Measured(before.parameters, before.recalls, before.latency_ms, True)
    truths = [merge.read_truth(job.place, shard, scratch) for shard in shards]
    queries = _read_queries(job, planned.table.spec, planned.training, scratch)
    return measure(kind, opened, truths, queries, starts, job.target_recall, known), known


def _difference(job: IndexJob, planned: Plan, shards: Sequence[IndexShard], scratch: str) -> tuple[int, int]:
    """How many vectors units have more, and how many fewer, than in the index that stood."""
    table, before, rows = planned.table, planned.before, sum(shard.vectors.rows for shard in shards)
    if before is None:
        return rows, 0
    known = before.training
    alike = before.column == job.column and before.table_spec.decisive == table.spec.decisive
    if not alike or not known or known.kept != planned.training.kept:
        return rows, before.rows_indexed
    if not all(_is_whole(job, shard.files) for shard in before.shards):
        return rows, before.rows_indexed
    then, now = ({part.path: part.rows for part in parts} for parts in (before.parts, table.parts))
    more: dict[str, int] = {}
    for sign, some, part_rows, others in ((-1, before.shards, then, now), (1, shards, now, then)):
        for shard in some:
            if others.keys() >= set(shard.parts):
                continue
            for part, n in merge.vectors_by_part(job.place, shard, part_rows, scratch):
                if part not in others:
                    more[unit_of_part(part)] = more.get(unit_of_part(part), 0) + sign * n
    return sum(n for n in more.values() if n > 0), -sum(n for n in more.values() if n < 0)


def _remove_replaced(place: str, before: IndexRecord | None, now: IndexRecord) -> None:
    """Deletes the files of the replaced index, the work, and files of builds that died a day ago or earlier."""
    current = {part.path for part in now.files}
    replaced = {part.path for part in before.files} if before else set()
    for entry in files.list_files(place):
        if left := _LEFT.fullmatch(entry.place.rpartition("/")[2]):
            kind: type[IndexShard | Training] = IndexShard if left[1] == "piece" else Training
            with contextlib.suppress(records.SchemaMismatch):
                found = records.from_json(kind, files.read_bytes(entry.place), entry.place)
                replaced |= {part.path for part in found.files}
    for entry in files.list_files(place):
        name = entry.place.rpartition("/")[2]
        stale = files.is_old(entry.mtime_ns / 1e9)
        ours = index.OWN_FILE.fullmatch(name) and name not in current
        if _LEFT.fullmatch(name) or (ours and (name in replaced or stale)):
            files.remove(entry.place)
    files.remove_stale_temporaries(place)
