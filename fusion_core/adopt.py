"""Embeddings that clip-retrieval made, as a feature table: its folders img_emb, text_emb and metadata.

The files of one number are a unit of the table: the metadata file is the shard, a row's number is that in the file.
Rows are read forward in batches and nothing is unpickled. Pictures are not seen: their hash and their place are null.
"""

import re
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, repeat
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from fusion_core import fields, files, tabular, unit
from fusion_core.fields import Columns, Rejected
from fusion_core.opt_out import NOTHING, OptOut, passed_by
from fusion_core.tabular import Row
from fusion_core.towers import Towers
from fusion_core.writer import UnitWriter
from schemas import records
from schemas.errors import UserError
from schemas.feature_table import ManifestRecord, TableSpec, TowerSpec
from schemas.samples import DeadLetter, InputIdentity, Sample, Unit

LAYOUT = "clip-retrieval"  # TableSpec.imported of these tables

_FOLDERS = {"metadata": ".parquet", "img_emb": ".npy", "text_emb": ".npy"}
_KEYS = ("image_path", "key", "__key__")
_BATCH_ROWS = 4096
_OPENED_AT_ONCE = 8  # files, to see what they hold
_MAX_SIDE = 2**31 - 1
_UNIT_LENGTH = 1e-3  # how far from 1 rounding to float16 takes a unit vector at most
_CHECKED_CAPTIONS = 32
_SAME_COSINE = 0.99  # fp16 on a GPU and fp32 here agree to 0.9999; another activation function gives 0.95 or less

# What numpy raises on a damaged header, which it parses as Python.
_NO_HEADER = (
    ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, OverflowError, RecursionError, MemoryError
)  # fmt: skip


class BadImport(UserError):
    """A folder that cannot be imported: what is wrong, where, and the remedy."""


@dataclass(frozen=True)
class Npy:
    """A matrix [rows, dim] of floats in a .npy file."""

    place: str
    kind: str  # numpy's name of the type, such as <f2
    rows: int
    dim: int
    first_byte: int  # behind the header


@dataclass(frozen=True)
class Triple:
    """The files of one number, whose rows belong together; either matrix may be absent, but not both."""

    unit: Unit
    image: Npy | None
    text: Npy | None

    @property
    def matrices(self) -> list[Npy]:
        """Those there are."""
        return [npy for npy in (self.image, self.text) if npy]


# --- what is there --------------------------------------------------------------------------------------------------


def find(folder: str) -> list[Triple]:
    """The triples of a folder or URI, by number: metadata/metadata_N.parquet, img_emb/img_emb_N.npy and
    text_emb/text_emb_N.npy, N with or without leading zeros.

    Raises BadImport unless each number has all its files and these have equally many rows.
    """
    found = {name: _numbered(folder, name) for name in _FOLDERS}
    sides = [name for name in ("img_emb", "text_emb") if found[name]]
    if not found["metadata"] or not sides:
        raise BadImport(
            f"{folder} is not in clip-retrieval's layout: expected metadata/metadata_N.parquet and "
            "img_emb/img_emb_N.npy or text_emb/text_emb_N.npy"
        )
    for side in sides:
        for number in sorted(found["metadata"].keys() ^ found[side].keys()):
            there, gone = ("metadata", side) if number in found["metadata"] else (side, "metadata")
            raise BadImport(
                f"{found[there][number].place} stands alone: there is no {gone}/{gone}_{number}{_FOLDERS[gone]}"
            )
    numbers = sorted(found["metadata"])
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return list(
            pool.map(lambda number: _open({name: found[name].get(number) for name in _FOLDERS}, number), numbers)
        )


def check_dim(triples: Sequence[Triple], tower: TowerSpec) -> None:
    """Raises BadImport unless the vectors have the model's dimension."""
    for npy in (npy for triple in triples for npy in triple.matrices):
        if npy.dim != tower.embedding_dim:
            raise BadImport(
                f"{npy.place} holds vectors of {npy.dim} values, but those of {tower.model} have "
                f"{tower.embedding_dim}: name the model that made them"
            )


def check_model(triples: Sequence[Triple], towers: Towers) -> int:
    """Embeds some captions and raises BadImport unless that gives the text vectors that stand there.

    Returns how many captions were compared: 0 where there are no text vectors with captions, so that nothing is known.
    """
    captions: dict[str, np.ndarray] = {}
    for triple in (triple for triple in triples if triple.text):
        for rows, _ in _read(triple):
            captions |= {row.sample.caption: row.text for row in rows if row.sample.caption and row.text is not None}
            break
        if len(captions) >= _CHECKED_CAPTIONS:
            break
    if not captions:
        return 0
    some = list(captions)[:: max(1, len(captions) // _CHECKED_CAPTIONS)][:_CHECKED_CAPTIONS]
    cosine = np.einsum("nd,nd->n", towers.embed_texts(some), np.stack([captions[caption] for caption in some]))
    if not np.median(cosine) >= _SAME_COSINE:
        weights = f" with the weights {towers.spec.pretrained}" if towers.spec.pretrained else ""
        raise BadImport(
            f"{towers.spec.model}{weights} did not make these vectors: {len(some)} captions, embedded anew, have a "
            f"median cosine of {np.median(cosine):.3f} with those in text_emb, where at least {_SAME_COSINE} is "
            "expected: name the model that did (clip-retrieval's ViT-B/32 is --model ViT-B-32-quickgelu --pretrained "
            "openai, its open_clip:NAME/TAG is --model NAME --pretrained TAG)"
        )
    return len(some)


def _numbered(folder: str, name: str) -> dict[int, files.Entry]:
    suffix, found = _FOLDERS[name], dict[int, files.Entry]()
    for entry in files.list_files(files.join(folder, name)):
        if not entry.place.endswith(suffix):
            continue
        match = re.fullmatch(rf"{name}_(\d+){re.escape(suffix)}", entry.place.rpartition("/")[2], re.ASCII)
        if not match:
            raise BadImport(f"{entry.place} has no number: expected {name}_N{suffix}; rename it or take it away")
        number = int(match[1])
        if number in found:
            raise BadImport(f"{found[number].place} and {entry.place} have the same number: take one of them away")
        found[number] = entry
    return found


def _open(entries: dict[str, files.Entry | None], number: int) -> Triple:
    metadata = entries["metadata"]
    assert metadata is not None
    try:
        with tabular.Parquet(metadata.place) as parquet:
            rows, groups = sum(parquet.group_rows), len(parquet.group_rows)
            _columns(parquet.schema, metadata.place)
    except tabular.Damaged as error:
        raise BadImport(f"{error}: copy it again") from error
    image, text = (_header(entry) if (entry := entries[side]) else None for side in ("img_emb", "text_emb"))
    for npy in (image, text):
        if npy and npy.rows != rows:
            raise BadImport(
                f"{npy.place} has {npy.rows:,} rows, but {metadata.place} has {rows:,}: it is not known which vector "
                "belongs to which row, so none is imported; write the files of this number anew"
            )
    there = [entry for entry in entries.values() if entry]
    id = f"metadata_{number}-{records.fingerprint(metadata.place)[:12]}"
    return Triple(Unit(id, "parquet", metadata.place, _identity(there), stop=groups, rows=rows), image, text)


def _header(entry: files.Entry) -> Npy:
    form = np.lib.format
    read: dict[tuple[int, int], Any] = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    with files.open_input(entry.place) as stream:
        try:
            shape, is_fortran, kind = read[form.read_magic(stream)](stream)
        except _NO_HEADER as error:
            raise BadImport(f"{entry.place} is not a readable .npy file: {error}: copy it again") from error
        first = stream.tell()
    if kind.kind != "f" or kind.itemsize > 8 or len(shape) != 2 or is_fortran or shape[1] < 1:
        order = " in Fortran order" if is_fortran else ""
        raise BadImport(
            f"{entry.place} holds {kind} of shape {shape}{order}: expected float16 or float32 [rows, dimension] in C "
            "order"
        )
    promised = first + shape[0] * shape[1] * kind.itemsize
    if entry.size_bytes != promised:
        raise BadImport(
            f"{entry.place} has {entry.size_bytes:,} bytes, but its header promises {promised:,}: copy it again"
        )
    return Npy(entry.place, kind.str, shape[0], shape[1], first)


def _identity(entries: Sequence[files.Entry]) -> InputIdentity:
    told = [[entry.place, entry.size_bytes, entry.mtime_ns] for entry in entries]
    size_bytes, mtime_ns = sum(entry.size_bytes for entry in entries), max(entry.mtime_ns for entry in entries)
    return InputIdentity(size_bytes, mtime_ns, records.fingerprint(told))


# --- one unit -------------------------------------------------------------------------------------------------------


def adopt(
    triple: Triple,
    work: unit.Work,
    output: str,
    spec: TableSpec,
    done: Callable[[int], None] = lambda rows: None,
    opt_out: OptOut = NOTHING,
) -> ManifestRecord:
    """Writes one triple's rows, but for keys on the opt-out list, into the table at `output` and returns the unit's
    record; `done` hears of rows.

    A vector of unit length in float16 is taken bit for bit; others are brought to length 1. A row with a vector of
    zeros, or one that is not finite, becomes a dead letter. As in every table, an empty caption is no text: its vector
    is not kept. `similarity` is computed anew. Columns without a place of their own go into `meta`, and so do the
    fields of a JSON object in a column `metadata`.
    Raises unit.InputChanged when the files are not what was found, and OSError.
    """
    clock, started = unit.Clock(), time.perf_counter()
    _check_identity(triple)
    with UnitWriter(output, spec, triple.unit, work.previous, work.stale) as writer:
        for rows, letters in clock.each("read", _read(triple)):
            found: list[Sample | DeadLetter] = [*(row.sample for row in rows), *letters]
            kept = {item.row for item in passed_by(found, opt_out, writer)}
            with clock("write"):
                writer.write(unit.features(triple.unit, [row for row in rows if row.sample.row in kept], spec))
                writer.reject(letter for letter in letters if letter.row in kept)
            done(len(found))
        _check_identity(triple)
        with clock("write"):
            return writer.commit(
                opt_out_sha256=opt_out.sha256,
                seconds={**clock.seconds, "unit": time.perf_counter() - started},
                versions=unit.versions(),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )


def _check_identity(triple: Triple) -> None:
    entries = files.stat_many([triple.unit.shard, *(npy.place for npy in triple.matrices)])
    if None in entries or _identity([entry for entry in entries if entry]) != triple.unit.identity:
        raise unit.InputChanged(f"{triple.unit.shard} or its .npy files changed meanwhile: run the command again")


def _read(triple: Triple) -> Iterator[tuple[list[unit.Row], list[DeadLetter]]]:
    """The triple's rows in batches: those that can be used and those that cannot."""
    with ExitStack() as stack:
        parquet = stack.enter_context(tabular.Parquet(triple.unit.shard))
        columns = _columns(parquet.schema, triple.unit.shard)
        told = parquet.rows(columns, 0, triple.unit.stop)
        image, text = (_vectors(npy, stack) if npy else None for npy in (triple.image, triple.text))
        for start in range(0, triple.unit.rows or 0, _BATCH_ROWS):
            rows, letters = list[unit.Row](), list[DeadLetter]()
            pictured, worded = (next(side) if side else repeat(None) for side in (image, text))
            batch = zip(islice(told, _BATCH_ROWS), pictured, worded)  # noqa: B905 (two may be endless)
            for row, (item, *vectors) in enumerate(batch, start):
                key = fields.row_key(item.values, columns, f"{triple.unit.id.rpartition('-')[0]}-{row}")
                try:
                    rows.append(_row(triple, item, columns, key, row, *vectors))
                except Rejected as rejected:
                    letters.append(rejected.letter(key, row))
            yield rows, letters


def _vectors(npy: Npy, stack: ExitStack) -> Iterator[np.ndarray]:
    """The matrix in batches, float16 [n, D], unit length; zeros for what cannot be brought to it."""
    kind = np.dtype(npy.kind)
    stream = stack.enter_context(files.open_input(npy.place))
    stream.seek(npy.first_byte)
    for start in range(0, npy.rows, _BATCH_ROWS):
        n = min(_BATCH_ROWS, npy.rows - start)
        data = stream.read(n * npy.dim * kind.itemsize)
        if len(data) < n * npy.dim * kind.itemsize:
            raise unit.InputChanged(f"{npy.place} became shorter meanwhile: run the command again")
        yield unit_length(np.frombuffer(data, kind).reshape(n, npy.dim))


def unit_length(matrix: np.ndarray) -> np.ndarray:
    """The rows of floats [n, D] as float16 of length 1; zeros for rows that are zero or not finite.

    Rows of float16 whose length is 1 up to rounding stay as they are, to the bit.
    """
    found, wanting = np.empty(matrix.shape, np.float16), np.ones(len(matrix), bool)
    with np.errstate(invalid="ignore"):  # a NaN that signals, as damaged files hold
        if matrix.dtype.itemsize == 2:
            found[:] = given = matrix.astype(np.float32)
            wanting = ~(np.abs(np.sqrt(np.einsum("nd,nd->n", given, given)) - 1) < _UNIT_LENGTH)
        if wanting.any():
            found[wanting] = _brought_to_it(matrix[wanting].astype(np.float64))
    return found


def _brought_to_it(exact: np.ndarray) -> np.ndarray:
    exact[~np.isfinite(exact).all(axis=1)] = 0
    exact /= np.maximum(np.abs(exact).max(axis=1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
    lengths = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    return (exact / np.where(lengths > 0, lengths, 1)[:, None]).astype(np.float16)


def _row(
    triple: Triple, item: Row, columns: Columns, key: str, row: int, image: np.ndarray | None, text: np.ndarray | None
) -> unit.Row:
    if item.problem:
        raise item.problem
    values = {name: item.values[name] for name in columns.rest}
    width, height = (_side(values, name) for name in ("width", "height"))
    texts = {name: item.values.get(name) for name in (columns.caption, columns.url)}
    caption, url, _ = fields.row_texts(texts, columns)
    values = _unfolded(values)
    meta = fields.to_json(values) if values else None
    if columns.caption and not unit.has_words(caption):
        text = None
    for npy, vector in ((triple.image, image), (triple.text, text)):
        if npy and vector is not None and not vector.any():
            raise Rejected("vector", "BrokenVector", f"row {row} of {npy.place} is all zeros or not finite")
    if image is None and text is None:
        raise Rejected("vector", "EmptySample", "there are no image vectors, and the row has no caption")
    picture = None if image is None else unit.KnownImage(width, height, image)
    return unit.Row(Sample(key, row, None, caption, url, meta), None, picture, text)


def _side(values: dict[str, object], name: str) -> int | None:
    """The picture's width or height, taken out of the values where it is one."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 1 <= value <= _MAX_SIDE or value != int(value):
        return None
    del values[name]
    return int(value)


def _unfolded(values: dict[str, object]) -> dict[str, object]:
    """The values, a JSON object in `metadata` replaced by its fields, which win over columns of the same name."""
    told = values.get("metadata")
    if told is None:
        inner: dict[str, object] = {}
    elif isinstance(told, str):
        try:
            inner = msgspec.json.decode(told, type=dict[str, object])
        except (ValueError, RecursionError):
            return values
    else:
        return values
    return {name: value for name, value in values.items() if name != "metadata"} | inner


def _columns(schema: pa.Schema, place: str) -> Columns:
    if len(set(schema.names)) < len(schema.names):
        raise BadImport(f"{place} has two columns of one name; it has {fields.describe(schema)}: rename one")
    known = [item.name for item in schema if _is_readable(item.type) and not item.name.startswith("__index_")]
    key = next((name for name in _KEYS if name in known), "")
    caption, url = (name if name in known else "" for name in ("caption", "url"))
    return Columns(caption=caption, key=key, url=url, rest=tuple(n for n in known if n not in (key, caption, url)))


def _is_readable(kind: pa.DataType) -> bool:  # pandas writes a column without any value as one of nulls
    return fields.is_jsonable(kind) or bool(pa.types.is_null(kind))
