"""Keys that are to be in no table: read from a list, passed by in new units, and taken out of recorded ones.

A unit's record says which list it was last held against, and the digests of the keys that were left out. So a unit is
looked at again only for another list, and done anew only when a key of its own is on the list no more.
"""

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from typing import TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import fields, files, manifest
from fusion_core.fields import InputError
from fusion_core.table import Table
from fusion_core.writer import LedgerError, UnitWriter
from schemas import records
from schemas.feature_table import KEY_DIGEST_BYTES, ROW_GROUP_ROWS, ManifestRecord, Part, TableSpec, features_schema
from schemas.index import IndexRecord
from schemas.records import SchemaMismatch
from schemas.samples import DEAD_LETTERS, DeadLetter, Sample

NO_LIST = "none"  # in a list's place: nothing is left out any more

_DIGEST = f"S{KEY_DIGEST_BYTES}"
_BATCH_KEYS = 65_536
_UNITS_AT_ONCE = 10_000

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class OptOut:
    """An opt-out list: the digests of its keys, S16 [n], sorted, each once; `sha256` (hex) is that of its file."""

    place: str = ""
    sha256: str = ""
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, _DIGEST), repr=False)

    def holds(self, digests: Sequence[bytes]) -> np.ndarray:
        """Which keys, given by digest, are on the list: bool [n]."""
        if not len(self.digests) or not len(digests):
            return np.zeros(len(digests), bool)
        asked = np.array(digests, _DIGEST)
        at = np.searchsorted(self.digests, asked)
        return np.asarray(self.digests[np.minimum(at, len(self.digests) - 1)] == asked)

    def missing(self, found: np.ndarray, examples: int = 3) -> tuple[int, list[str]]:
        """How many listed keys are not among the digests `found` (S16), and the first of them."""
        absent = OptOut(digests=np.setdiff1d(self.digests, found, assume_unique=True))
        if not len(absent.digests):
            return 0, []
        pairs = (zip(keys, absent.holds(_digests(keys)), strict=True) for keys in _batches(self.place))
        named = (key.decode() for key, is_absent in chain.from_iterable(pairs) if is_absent)
        return len(absent.digests), list(islice(named, examples))


NOTHING = OptOut()


def digest(key: str) -> bytes:
    """What a key is known by where it must not stand itself: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(key.encode()).digest()[:KEY_DIGEST_BYTES]


# --- the list -------------------------------------------------------------------------------------------------------


def load(place: str, sha256: str = "") -> OptOut:
    """The list at a place: one key on each line, or the column `key` of a Parquet, CSV or TSV file.

    An empty place or `none` is no list. Raises InputError for what is no such list or holds no key, and where the
    file's SHA-256 is not the one that is given: a job's workers must have the list of its launcher.
    """
    if place in ("", NO_LIST):
        return NOTHING
    try:
        return _read(place, sha256 or files.sha256(place))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no opt-out list {place!r}: name a file") from error


@lru_cache(maxsize=1)  # a worker asks for each of its units
def _read(place: str, sha256: str) -> OptOut:
    pieces = [np.array(_digests(keys), _DIGEST) for keys in _batches(place)]
    digests = np.concatenate([*pieces, np.empty(0, _DIGEST)])
    pieces.clear()  # of ten million keys each copy has 160 MB
    digests.sort()
    repeated = digests[1:] == digests[:-1]
    digests = np.delete(digests, np.flatnonzero(repeated)) if repeated.any() else digests
    if files.sha256(place) != sha256:
        raise InputError(f"the opt-out list {place} changed while the job ran: run the command again")
    if not len(digests):
        raise InputError(
            f"the opt-out list {place} holds no key: say --opt-out {NO_LIST} if nothing is to be left out any more"
        )
    return OptOut(place, sha256, digests)


def _digests(keys: Iterable[bytes]) -> list[bytes]:
    return [hashlib.sha256(key).digest()[:KEY_DIGEST_BYTES] for key in keys]


def _batches(place: str) -> Iterator[list[bytes]]:
    """The list's keys, as UTF-8, piece by piece."""
    name = place.lower()
    try:
        with files.open_input(place) as stream:
            if name.endswith((".parquet", ".pq")):
                yield from _parquet_keys(stream, place)
            else:
                lines = io.TextIOWrapper(stream, "utf-8-sig", newline="" if name.endswith((".csv", ".tsv")) else None)
                keys = (
                    _column(lines, place, "\t" if name.endswith(".tsv") else ",")
                    if name.endswith((".csv", ".tsv"))
                    else (line.rstrip("\n") for line in lines)
                )
                kept = (key.encode() for key in keys if key)
                while piece := list(islice(kept, _BATCH_KEYS)):
                    yield piece
    except (UnicodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"cannot read the opt-out list {place}: {error}") from error


def _column(lines: io.TextIOWrapper, place: str, delimiter: str) -> Iterator[str]:
    rows = csv.DictReader(lines, delimiter=delimiter)
    if "key" not in (rows.fieldnames or ()):
        raise InputError(f"the opt-out list {place} has no column 'key'; it has {', '.join(rows.fieldnames or ())}")
    return (row["key"] or "" for row in rows)


def _parquet_keys(stream: object, place: str) -> Iterator[list[bytes]]:
    source = pq.ParquetFile(stream)
    if "key" not in source.schema_arrow.names:
        raise InputError(f"the opt-out list {place} has no column 'key'; it has {fields.describe(source.schema_arrow)}")
    for batch in source.iter_batches(_BATCH_KEYS, columns=["key"]):
        yield [key.encode() for key in batch["key"].cast(pa.string()).to_pylist() if key]


# --- recorded units -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """What became of recorded units that were held against a list."""

    clean: dict[str, int]  # the units without a listed key, by the revision that was looked at
    rows: int = 0  # feature rows and dead letters that left the table
    failures: tuple[str, ...] = ()


def sweep(place: str, spec: TableSpec, found: Sequence[ManifestRecord], opt_out: OptOut, threads: int = 8) -> Swept:
    """Takes listed keys out of the recorded units `found` of the table at `place`: no shard is read.

    Only the keys are read of a unit without any that is listed; of another the parts are written anew from what is
    stored, its record is replaced, and the parts that it named before are removed.
    """
    with ThreadPoolExecutor(threads, "fusion-opt-out") as pool:
        looks = dict(
            zip((r.unit.id for r in found), _each(pool, partial(_look, place, spec, opt_out), found), strict=True)
        )
        clean = {record.unit.id: record.revision for record in found if looks[record.unit.id] is False}
        failures = [look for look in looks.values() if isinstance(look, str)]
        held = [unit for unit, look in looks.items() if look is True]
        whole = manifest.read(place).by_unit if held else {}  # with what the units cost, which stays said
        rows = 0
        for outcome in _each(pool, partial(_take_out, place, spec, opt_out), [whole[unit] for unit in held]):
            if isinstance(outcome, str):
                failures.append(outcome)
            else:
                rows += outcome
    return Swept(clean, rows, tuple(failures))


def _each(
    pool: ThreadPoolExecutor, function: Callable[[ManifestRecord], ResultT], found: Sequence[ManifestRecord]
) -> Iterator[ResultT]:
    """The function's results in order; a million at once would wait in 1.7 GB of memory."""
    for start in range(0, len(found), _UNITS_AT_ONCE):
        yield from pool.map(function, found[start : start + _UNITS_AT_ONCE])


def marked(record: ManifestRecord, swept: Swept, opt_out: OptOut) -> ManifestRecord:
    """The record, saying that its unit was held against the list, if it was and is what it was then."""
    if swept.clean.get(record.unit.id) != record.revision or record.removed:
        return record
    return msgspec.structs.replace(record, opt_out_sha256=opt_out.sha256)  # no later revision: its rows are the same


def _explained(function: Callable[..., bool | int]) -> Callable[..., bool | int | str]:
    """The function, which answers with what went wrong in place of raising it."""

    def explained(place: str, spec: TableSpec, opt_out: OptOut, record: ManifestRecord) -> bool | int | str:
        try:
            return function(place, spec, opt_out, record)
        except (OSError, pa.ArrowException, ValueError, LedgerError) as error:
            return f"{record.unit.shard}: not held against the opt-out list: {type(error).__name__}: {error}"

    return explained


@_explained
def _look(place: str, spec: TableSpec, opt_out: OptOut, record: ManifestRecord) -> bool:
    """Whether a unit has a listed key, in its rows or its dead letters."""
    if not len(opt_out.digests):
        return False
    of_unit = Table(place, spec, (record,))
    return any(_listed(batch["key"], opt_out).any() for batch in of_unit.scan(["key"])) or bool(
        _listed(of_unit.dead_letters()["key"], opt_out).any()
    )


@_explained
def _take_out(place: str, spec: TableSpec, opt_out: OptOut, record: ManifestRecord) -> int:
    """Writes a unit anew without the rows and dead letters of listed keys; returns how many they were."""
    if record.removed:  # by another launcher
        return 0
    for part in (record.features, record.dead_letters):
        if part:
            _check_whole(place, part)
    of_unit, schema = Table(place, spec, (record,)), features_schema(spec)
    with UnitWriter(place, spec, record.unit, record) as writer:
        for rows in of_unit.scan(batch_rows=ROW_GROUP_ROWS):
            writer.write(_kept(rows, opt_out, writer).cast(schema))
        for letters in of_unit.dead_letters().to_batches():
            writer.reject(letters_of(_kept(letters, opt_out, writer)))
        writer.leave_out_as(record)
        written = writer.commit(
            opt_out_sha256=opt_out.sha256,
            rows_reused=record.rows_reused,
            source_sha256=record.source_sha256,
            seconds=record.seconds,
            versions=record.versions,
            finished_at=record.finished_at,
        )
    return written.rows_opted_out - record.rows_opted_out


def _check_whole(place: str, part: Part) -> None:
    if files.sha256(files.join(place, part.path)) != part.sha256:
        raise InputError(f"{part.path} is damaged: `fusion verify --repair`, then run the command again")


def _kept(rows: pa.RecordBatch, opt_out: OptOut, writer: UnitWriter) -> pa.RecordBatch:
    listed = _listed(rows["key"], opt_out)
    gone = rows.select(["row", "key"]).filter(pa.array(listed)).to_pydict()
    writer.leave_out(gone["row"], map(digest, gone["key"]))
    return rows.filter(pa.array(~listed))


def _listed(keys: pa.Array | pa.ChunkedArray, opt_out: OptOut) -> np.ndarray:
    return opt_out.holds([digest(key) for key in keys.to_pylist()])


def letters_of(rows: pa.RecordBatch | pa.Table) -> Iterator[DeadLetter]:
    """Dead letters as they were before they were written."""
    for row in rows.select([name for name in DEAD_LETTERS.names if name != "shard"]).to_pylist():
        yield DeadLetter(**row)


# --- new units ------------------------------------------------------------------------------------------------------


def passed_by(window: Sequence[Sample | DeadLetter], opt_out: OptOut, writer: UnitWriter) -> list[Sample | DeadLetter]:
    """The items whose keys are not on the list; the others are left out of what is written."""
    if not len(opt_out.digests):
        return list(window)
    digests = [digest(item.key) for item in window]
    listed = opt_out.holds(digests)
    gone = np.flatnonzero(listed).tolist()
    writer.leave_out((window[at].row for at in gone), (digests[at] for at in gone))
    return [item for item, is_listed in zip(window, listed, strict=True) if not is_listed]


# --- indexes --------------------------------------------------------------------------------------------------------


def is_in_index(folder: str, opt_out: OptOut) -> bool:
    """Whether the index in a folder has rows of listed keys; also where it is damaged, so that nobody can tell."""
    where = files.join(folder, "index.json")
    try:
        record = records.from_json(IndexRecord, files.read_bytes(where), where)
        columns = [record.meta, *(shard.meta for shard in record.shards if shard.meta)]
        return any(_has_listed(files.join(folder, path), opt_out) for path in {part.path for part in columns})
    except FileNotFoundError:
        return True
    except (SchemaMismatch, *records.NOT_JSON, pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the storage failed: Arrow tells damage without a number
            raise
        return True


def _has_listed(place: str, opt_out: OptOut) -> bool:
    with files.open_input(place) as stream:
        names = pa.ipc.open_file(stream).schema.names
        if "key" not in names:  # no index's
            return True
        only_keys = pa.ipc.IpcReadOptions(included_fields=[names.index("key")])
        reader = pa.ipc.open_file(stream, options=only_keys)
        return any(_listed(reader.get_batch(i)["key"], opt_out).any() for i in range(reader.num_record_batches))
