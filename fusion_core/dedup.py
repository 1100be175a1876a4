"""The duplicates of a feature table: found, clustered, and written as columns that stand beside its rows.

Two rows are linked when their images are equal to the byte (exact), their pictures nearly so by perceptual hash (near),
or their vectors by cosine (semantic). Links chain: A like B like C does not make A like C. So a union-find over the
links only tells which rows have to do with each other. Within such a component the best row is kept and takes with it
the rows that are linked to itself; the best of those that are left is kept next, and so on. What is dropped is
therefore always linked to the row that is kept in its place, and no two rows that are kept are linked.
"""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files, neighbours, phash
from fusion_core.clock import Clock
from fusion_core.neighbours import Components, Halves, Ids, Records, Scratch, Words
from fusion_core.table import Table, to_numpy
from schemas import records
from schemas.dedup import CLUSTERS, WHYS, DedupRecord, DedupSpec, Keep, PairsFound
from schemas.errors import UserError
from schemas.feature_table import ManifestRecord, Part

Flags = npt.NDArray[np.bool_]

MEMORY_BYTES = 2 << 30
# Of 64: pictures encoded anew or resized differ in 0 to 4, cut by a hundredth of each side in 0 to 14 (6 in the
# median), different ones in about 30.
NEAR_BITS = 4
MAX_NEAR_BITS = 10

_RECORD = "dedup.json"
_SCAN_ROWS = 16_384
_GREEDY_BLOCK, _GREEDY_TILE = 256, 8192  # rows compared at once
_COSINES = 4096


class BadDuplicates(UserError):
    """Duplicates that cannot be looked for or used: what is wrong, and the remedy."""


# --- the whole ------------------------------------------------------------------------------------------------------


def build(
    table: Table,
    place: str,
    spec: DedupSpec,
    *,
    memory_bytes: int = MEMORY_BYTES,
    workers: int = 1,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
    hashed: Callable[[int], None] = lambda rows: None,
) -> DedupRecord:
    """The record of the table's duplicates that now stand at `place`; what stands there already is not done again.

    Memory is 9 bytes a row, `memory_bytes`, and with a cosine up to 1 GiB to train cells; what does not fit goes to a
    scratch folder below `place`, with a cosine about four times the vectors. `near_bits` reads every picture again:
    `workers` parts at once, `hashed` hears of rows done, and hashes are kept, so that a run that was cut off goes on.
    The same table and spec give the same bytes of the parts. Raises BadDuplicates for what is no option or no place of
    ours, InputError when a shard is not what was embedded, OSError when it is not there.
    """
    place = files.absolute(place)
    _check_spec(spec, table)
    before = _standing(place)
    if before and not _differences(before, table) and before.spec == spec and _is_whole(place, before):
        log(f"dedup: {place} stands already")
        return before
    _remove_stale_scratch(place)
    clock = Clock(log, "dedup")
    hashes = None
    if spec.near_bits is not None:
        with clock.stage("hash"):
            hashes = phash.Hashes(place, table)
            hashes.complete(workers, hashed)
    with _scratch_folder(place) as scratch:
        work = _Work(table, spec, hashes, scratch, memory_bytes, device)
        components = Components(table.num_rows)
        with clock.stage("exact"):
            _join_exact(work, components)
        cells, found = 0, None
        if spec.cosine is not None:
            with clock.stage("semantic"):
                cells, found = _join_semantic(work, components)
        if spec.near_bits is not None:
            with clock.stage("near"):
                _join_near(work, components)
        with clock.stage("cluster"):
            decisions = _settle(work, components)
        del components
        with clock.stage("write"):
            files.remove(files.join(place, _RECORD))  # the parts that it speaks of are about to be replaced
            outputs, dropped = _write(work, place, decisions)
    record = DedupRecord(
        table=table.place,
        table_spec=table.spec,
        parts=table.parts,
        spec=spec,
        outputs=tuple(outputs),
        rows=table.num_rows,
        clusters=table.num_rows - sum(dropped.values()),
        dropped=dropped,
        cells=cells,
        pairs_found=found,
        seconds=clock.seconds,
    )
    files.write_bytes(place, _RECORD, records.to_json(record, indent=2))
    _remove_strangers(place, record)
    return record


@dataclass(frozen=True)
class Duplicates:
    """The duplicates of a table as it is, to read it without them."""

    place: str
    record: DedupRecord
    table: Table

    @classmethod
    def open(cls, place: str, table: Table) -> "Duplicates":
        """The duplicates at `place`; raises BadDuplicates, naming the difference, unless they are of this table."""
        found = cls.read(place, table)
        place, record = found.place, found.record
        if different := _differences(record, table):
            raise BadDuplicates(f"{place} is not of {table.place} as it is now ({different}): run `fusion dedup` again")
        if not _is_whole(place, record):
            raise BadDuplicates(f"{place} lacks parts that its {_RECORD} names: run `fusion dedup` again")
        return found

    @classmethod
    def read(cls, place: str, table: Table) -> "Duplicates":
        """The duplicates at `place`, of a table that `table` is some parts of, unchecked; BadDuplicates if none are."""
        place = files.absolute(place)
        record = _read_record(place)
        if record is None:
            raise BadDuplicates(
                f"{place} has no {_RECORD}: write it with `fusion dedup {table.place} --output {place}`"
            )
        return cls(place, record, table)

    def clusters(self, part: int) -> pa.Table:
        """The columns (CLUSTERS) beside the table's part of that number; BadDuplicates when it is damaged."""
        output = self.record.outputs[part]
        data = files.read_bytes(files.join(self.place, output.path))
        if hashlib.sha256(data).hexdigest() != output.sha256:
            raise BadDuplicates(f"{self.place}: {output.path} is damaged or was replaced: run `fusion dedup` again")
        return pq.read_table(pa.BufferReader(data))

    @property
    def sha256(self) -> str:
        """Of what is kept: other duplicates of the same table have another."""
        return hashlib.sha256("".join(output.sha256 for output in self.record.outputs).encode()).hexdigest()

    def kept(self, parts: Sequence[Part] | None = None) -> Flags:
        """For each row of the table, or of these parts of it, in manifest order, whether it is kept."""
        number = {part.path: i for i, part in enumerate(self.record.parts)}
        wanted = self.record.parts if parts is None else parts
        found = [self.clusters(number[part.path])["kept"].to_numpy() for part in wanted]
        return np.concatenate([*found, np.empty(0, bool)])

    def scan_kept(self, columns: Sequence[str] | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The table's rows that are kept, in manifest order, as record batches of at most `batch_rows` rows."""
        for number, record in enumerate(_with_rows(self.table)):
            kept, first = self.clusters(number)["kept"].combine_chunks(), 0
            for batch in _alone(self.table, record).scan(columns, batch_rows):
                yield batch.filter(kept.slice(first, batch.num_rows))
                first += batch.num_rows


# --- identity and place ---------------------------------------------------------------------------------------------


def _check_spec(spec: DedupSpec, table: Table) -> None:
    if spec.near_bits is not None and not 0 <= spec.near_bits <= MAX_NEAR_BITS:
        raise BadDuplicates(f"near bits are 0 to {MAX_NEAR_BITS} of 64, not {spec.near_bits}: beyond, all is alike")
    if spec.near_bits is not None and table.spec.imported:
        raise BadDuplicates(
            f"near pictures are found by reading them again, and {table.place} was imported without its pictures: "
            "ask for near vectors (--cosine) instead"
        )
    if spec.cosine is not None and not 0 < spec.cosine <= 1:
        raise BadDuplicates(f"a cosine is above 0 and at most 1, e.g. 0.95; not {spec.cosine}")
    if spec.keep not in Keep.__args__:  # type: ignore[attr-defined]
        raise BadDuplicates(f"there is no rule {spec.keep!r} for the best row: similarity, pixels or first")
    if spec.cosine is not None:
        table.check_embedding(spec.column)
    elif spec.column != DedupSpec.column:
        raise BadDuplicates(f"the vectors of {spec.column} are compared by a cosine: give one (--cosine 0.95), too")


def _standing(place: str) -> DedupRecord | None:
    """The record at a place of ours or an empty one; refuses a folder that holds something else."""
    record = _read_record(place)
    if record is None:
        ours = files.join(place, "clusters/"), files.join(place, "hashes/")
        found = (entry.place for entry in files.list_files(place, recursive=True))
        strangers = [name for name in found if not name.startswith(ours)]
        if strangers:
            raise BadDuplicates(f"{place} holds files but no {_RECORD} (e.g. {strangers[0]}): name an empty folder")
    return record


def _read_record(place: str) -> DedupRecord | None:
    where = files.join(place, _RECORD)
    if files.stat(where) is None:
        return None
    return records.from_json(DedupRecord, files.read_bytes(where), where)


def _differences(record: DedupRecord, table: Table) -> str:
    """How the table differs from the one that the record is of; empty when it does not."""
    different = records.differences(record.table_spec.decisive, table.spec.decisive)
    if different:
        return "; ".join(different[:5])
    there, here = ([(part.path, part.sha256) for part in parts] for parts in (record.parts, table.parts))
    if there == here:
        return ""
    new, gone = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    return f"{len(new)} parts are new, {len(gone)} gone, e.g. {(new + gone + here)[0][0]}"


def _is_whole(place: str, record: DedupRecord) -> bool:
    entries = files.list_files(files.join(place, "clusters"))
    lying = {entry.place.rpartition("/")[2]: entry.size_bytes for entry in entries}
    return all(lying.get(_name(part)) == part.size_bytes for part in record.outputs)


def _name(part: Part) -> str:
    return part.path.rpartition("/")[2]


def _with_rows(table: Table) -> Iterable[ManifestRecord]:
    return (record for record in table.records if record.features)


def _alone(table: Table, record: ManifestRecord) -> Table:
    """The table's rows of one part."""
    return Table(table.place, table.spec, (record,))


@contextmanager
def _scratch_folder(place: str) -> Iterator[str]:
    if files.is_local(place):
        Path(place).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dedup-", dir=place if files.is_local(place) else None) as folder:
        yield folder


def _remove_stale_scratch(place: str) -> None:
    """Deletes what runs that were killed more than a day ago left behind."""
    files.remove_stale_temporaries(place)
    for folder in Path(place).glob(".dedup-*") if files.is_local(place) else ():
        with contextlib.suppress(FileNotFoundError):
            if files.is_old(folder.stat().st_mtime):
                shutil.rmtree(folder)


def _remove_strangers(place: str, record: DedupRecord) -> None:
    """Deletes parts beside those of the table: of parts that it does not have any more."""
    current = {_name(part) for part in record.parts}
    for folder in ("clusters", "hashes"):
        for entry in files.list_files(files.join(place, folder)):
            if entry.place.rpartition("/")[2] not in current:
                files.remove(entry.place)


# --- links ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What every stage needs."""

    table: Table
    spec: DedupSpec
    hashes: phash.Hashes | None
    scratch: str  # a local folder
    memory_bytes: int
    device: str


def _join_exact(work: _Work, components: Components) -> None:
    neighbours.join_equal(components, _digest_blocks(work.table), len(components), work.scratch, work.memory_bytes)


def _digest_blocks(table: Table) -> Iterator[tuple[Ids, Words]]:
    first = 0
    for batch in table.scan(["sha256"]):
        digests, present = _digests(batch["sha256"])
        rows = np.flatnonzero(present)
        yield first + rows, digests[rows]
        first += batch.num_rows


def _digests(column: pa.Array) -> tuple[Words, Flags]:
    """SHA-256 digests as uint64 [n, 4], and which are there."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    if not present.any():
        return np.zeros((len(column), 4), np.uint64), present
    words = np.frombuffer(column.buffers()[1], np.uint64, 4 * len(column), 32 * column.offset)
    return words.reshape(-1, 4), present


def _join_semantic(work: _Work, components: Components) -> tuple[int, PairsFound | None]:
    spec = work.spec
    assert spec.cosine is not None

    def blocks() -> Iterator[tuple[Ids, Halves]]:
        for first, vectors, present in work.table.vectors(spec.column, _SCAN_ROWS):
            rows = first + np.flatnonzero(present)
            if spec.column == "image_embedding":  # equal images have equal vectors: one of them is enough
                rows = rows[components.roots(rows) == rows]
            yield rows, vectors[rows - first]

    return neighbours.join_near_vectors(
        components, blocks, len(components), spec.cosine, work.scratch, work.memory_bytes, spec.seed, work.device
    )


def _join_near(work: _Work, components: Components) -> None:
    assert work.hashes is not None and work.spec.near_bits is not None
    blocks = _hash_blocks(work.table, work.hashes)
    neighbours.join_near_bits(components, blocks, len(components), work.spec.near_bits, work.scratch, work.memory_bytes)


def _hash_blocks(table: Table, hashes: phash.Hashes) -> Iterator[tuple[Ids, Words]]:
    first = 0
    for record in _with_rows(table):
        words, present = hashes.of(record)
        rows = np.flatnonzero(present)
        yield first + rows, words[rows]
        first += len(words)


# --- clusters -------------------------------------------------------------------------------------------------------

_DECISION = [("row", "<i8"), ("cluster", "<i8"), ("size", "<i4"), ("why", "i1"), ("cosine", "<f4")]
_KEPT, _EXACT, _NEAR, _SEMANTIC, _NOT = -1, 0, 1, 2, 3  # a row's `why`; _NOT: not linked to the row asked about


def _settle(work: _Work, components: Components) -> Scratch:
    """What becomes of the rows that are linked to others, in buckets of consecutive rows."""
    decided = Scratch(work.scratch, "decided", _DECISION, neighbours.n_buckets(len(components), 25, work.memory_bytes))
    per_bucket = -(-len(components) // decided.buckets)
    for bucket in _members(work, components):
        made = _clustered(_Members(bucket, work.spec, work.device), decided.dtype)
        decided.append(made["row"] // per_bucket, made)
    return decided


def _members(work: _Work, components: Components) -> Scratch:
    """The rows that are linked to others, with what decides their cluster; a component is whole in its bucket."""
    joined = components.is_joined()
    fields: list[Any] = [("root", "<i8"), ("row", "<i8"), ("similarity", "<f4"), ("pixels", "<i8")]
    fields += [("digest", "<u8", (4,)), ("pictured", "?"), ("hash", "<u8"), ("hashed", "?")]
    columns = ["similarity", "width", "height", "sha256"]
    if work.spec.cosine is not None:
        fields.append(("vector", "<f2", (work.table.schema.field(work.spec.column).type.list_size,)))
        columns.append(work.spec.column)
    buckets = neighbours.n_buckets(int(joined.sum()), np.dtype(fields).itemsize, work.memory_bytes)
    members = Scratch(work.scratch, "members", fields, buckets)
    first = 0
    for record in _with_rows(work.table):
        start, (words, hashed) = first, work.hashes.of(record) if work.hashes else (None, None)
        for batch in _alone(work.table, record).scan(columns, _SCAN_ROWS):
            chosen = np.flatnonzero(joined[first : first + batch.num_rows])
            found = np.zeros(len(chosen), members.dtype)
            found["row"] = first + chosen
            found["root"] = components.roots(found["row"])
            found["similarity"] = batch["similarity"].fill_null(-np.inf).to_numpy()[chosen]
            sides = (batch[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height"))
            found["pixels"] = np.multiply(*sides)[chosen]
            digests, pictured = _digests(batch["sha256"])
            found["digest"], found["pictured"] = digests[chosen], pictured[chosen]
            if words is not None and hashed is not None:
                found["hash"], found["hashed"] = words[found["row"] - start], hashed[found["row"] - start]
            if work.spec.cosine is not None:
                found["vector"] = to_numpy(batch[work.spec.column])[chosen]
            members.append(found["root"] % buckets, found)
            first += batch.num_rows
    return members


class _Members:
    """Rows of some whole components. They are named by their places in the bucket; vectors stay in its file."""

    def __init__(self, bucket: Records, spec: DedupSpec, device: str):
        self._bucket, self._spec, self._device = bucket, spec, device
        self.root, self.row = bucket["root"].copy(), bucket["row"].copy()
        self._digest, self._pictured = bucket["digest"].copy(), bucket["pictured"].copy()
        self._hash, self._hashed = bucket["hash"].copy(), bucket["hashed"].copy()

    def __len__(self) -> int:
        return len(self.row)

    def ranked(self) -> Ids:
        """All places, component by component, in each the best row first."""
        similarity, pixels = -self._bucket["similarity"], -self._bucket["pixels"]
        keys = {"similarity": (pixels, similarity), "pixels": (similarity, pixels), "first": ()}[self._spec.keep]
        return np.lexsort((self.row, *keys, self.root))

    def whys(self, left: Ids, right: Ids) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """What links place `left[i]` to `right[i]`, the strictest, and their cosine where that is what does."""
        why, cosine = np.full(len(left), _NOT, np.int8), np.full(len(left), np.nan, np.float32)
        if self._spec.cosine is not None:
            for start in range(0, len(left), _COSINES):
                a, b = left[start : start + _COSINES], right[start : start + _COSINES]
                found = neighbours.cosines(self._bucket["vector"][a], self._bucket["vector"][b])
                near = found >= self._spec.cosine - neighbours.TOLERANCE
                why[start : start + _COSINES][near] = _SEMANTIC
                cosine[start : start + _COSINES] = found
        if self._spec.near_bits is not None:
            why[self._is_near(left, right)] = _NEAR
        why[self._is_equal(left, right)] = _EXACT
        cosine[why != _SEMANTIC] = np.nan
        return why, cosine

    def linked(self, left: Ids, right: Ids) -> Flags:
        """Whether each place of `left` is linked to each of `right`, [n, m]."""
        found = self._is_equal(left[:, None], right[None])
        if self._spec.near_bits is not None:
            found |= self._is_near(left[:, None], right[None])
        if self._spec.cosine is not None:
            vectors = self._bucket["vector"]
            found[neighbours.near_pairs(vectors[left], vectors[right], self._spec.cosine, self._device)] = True
        return found

    def _is_equal(self, left: Ids, right: Ids) -> Flags:
        equal: Flags = self._pictured[left] & self._pictured[right]
        for word in range(4):
            equal &= self._digest[left, word] == self._digest[right, word]
        return equal

    def _is_near(self, left: Ids, right: Ids) -> Flags:
        bits = np.bitwise_count(self._hash[left] ^ self._hash[right])
        near: Flags = (bits <= self._spec.near_bits) & self._hashed[left] & self._hashed[right]
        return near


def _clustered(members: _Members, dtype: np.dtype[Any]) -> Records:
    """The decision about each of the members.

    In most components all rows are linked to the best: they are settled at once. The others one by one.
    """
    ranked = members.ranked()
    starts = np.flatnonzero(np.diff(members.root[ranked], prepend=-1))
    best = np.empty(len(members), np.int64)
    best[ranked] = np.repeat(ranked[starts], np.diff(np.append(starts, len(ranked))))
    places = np.arange(len(members))
    why, cosine = members.whys(places, best)
    owner = np.where((why != _NOT) | (best == places), best, -1)
    left = ranked[owner[ranked] < 0]
    for group in np.split(left, np.flatnonzero(np.diff(members.root[left])) + 1) if len(left) else ():
        owner[group] = _greedy(members, group)
    why[left], cosine[left] = members.whys(left, owner[left])
    why[owner == places] = _KEPT
    decided = np.empty(len(members), dtype)
    decided["row"], decided["why"] = members.row, why
    decided["cosine"] = np.where(owner == places, np.nan, cosine)
    decided["size"] = np.bincount(owner, minlength=len(members))[owner]
    cluster = np.full(len(members), np.iinfo(np.int64).max)
    np.minimum.at(cluster, owner, members.row)
    decided["cluster"] = cluster[owner]
    return decided


def _greedy(members: _Members, ranked: Ids) -> Ids:
    """For each of the places, the best first, the place that is kept for it: the first that it is linked to."""
    owner: Ids = np.full(len(ranked), -1)
    rest = np.arange(len(ranked))
    while len(rest):
        block, rest = rest[:_GREEDY_BLOCK], rest[_GREEDY_BLOCK:]
        linked = members.linked(ranked[block], ranked[block])
        for number, place in enumerate(block.tolist()):
            if owner[place] < 0:
                like = block[linked[number]]
                owner[like[owner[like] < 0]] = place
                owner[place] = place
        kept = block[owner[block] == block]
        for start in range(0, len(rest), _GREEDY_TILE):
            tile = rest[start : start + _GREEDY_TILE]
            linked = members.linked(ranked[kept], ranked[tile])
            owner[tile] = np.where(linked.any(axis=0), kept[linked.argmax(axis=0)], -1)
        rest = rest[owner[rest] < 0]
    chosen: Ids = ranked[owner]
    return chosen


# --- writing --------------------------------------------------------------------------------------------------------


def _write(work: _Work, place: str, decisions: Scratch) -> tuple[list[Part], dict[str, int]]:
    """Publishes one part for each of the table's; returns them and how many rows are dropped, by `why`."""
    buckets = (np.sort(bucket, order="row") for bucket in decisions)
    held, first = np.empty(0, decisions.dtype), 0
    outputs, dropped = [], dict.fromkeys(WHYS, 0)
    for part in work.table.parts:
        while not len(held) or held["row"][-1] < first + part.rows:
            more = next(buckets, None)
            if more is None:
                break
            held = np.concatenate([held, more])
        cut = np.searchsorted(held["row"], first + part.rows)
        rows = _columns(work.table.read_part(part, ["key", "shard", "row"]), first, held[:cut])
        for number, why in enumerate(WHYS):
            dropped[why] += int((held["why"][:cut] == number).sum())
        with files.PendingFile(place) as pending:
            pq.write_table(rows, pending, compression="zstd", use_dictionary=["shard", "why"])
            path = f"clusters/{_name(part)}"
            outputs.append(Part(path, part.rows, pending.size_bytes, pending.sha256))
            pending.publish(path)
        held, first = held[cut:], first + part.rows
    return outputs, dropped


def _columns(rows: pa.Table, first: int, decided: Records) -> pa.Table:
    """The columns beside a part's rows, of which some were decided about; the others are alone."""
    n = len(rows)
    cluster, size = first + np.arange(n), np.ones(n, np.int32)
    why, cosine = np.full(n, _KEPT, np.int8), np.full(n, np.nan, np.float32)
    at = decided["row"] - first
    cluster[at], size[at], why[at], cosine[at] = (decided[name] for name in ("cluster", "size", "why", "cosine"))
    columns = {
        "key": rows["key"],
        "shard": rows["shard"],
        "row": rows["row"],
        "cluster": pa.array(cluster, pa.int64()),
        "cluster_size": pa.array(size, pa.int32()),
        "kept": pa.array(why == _KEPT),
        "why": pa.array(WHYS).take(pa.array(why, mask=why == _KEPT)),
        "cosine": pa.array(cosine, mask=why != _SEMANTIC),
    }
    return pa.table(columns, CLUSTERS)
