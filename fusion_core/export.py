"""A table's rows in other tools' layouts: WebDataset tars, and clip-retrieval's folders of .npy and Parquet.

Rows are streamed in manifest order; a file becomes visible whole, and its bytes depend on the rows and options alone.
`export.json`, written first and last, keeps a folder from holding two exports.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files, images, search
from fusion_core.table import Table, to_numpy
from schemas import records
from schemas.errors import UserError
from schemas.export import ExportRecord, ExportSpec, Format

Progress = Callable[[int], object]
Outcome = bytes | tuple[str, str] | None  # a picture; why it cannot be had; that the row has none

ROWS_PER_FILE = {"webdataset": 10_000, "clip-retrieval": 1_000_000}

_RECORD = "export.json"
_NEEDED = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}
_FOLDERS = {"image_embedding": "img_emb", "text_embedding": "text_emb"}
_METADATA = {
    "image_path": "key", "caption": "caption", "url": "url", "width": "width", "height": "height",
    "similarity": "similarity", "shard": "shard", "row": "row", "metadata": "meta",
}  # fmt: skip
_NAME = re.compile(r"(?!__)[\w+=@,() -]+(/[\w+=@,() -]+)*")  # of a sample in a tar: its first dot would end it
_LONGEST_NAME = 200
_FETCHERS = 8  # pictures read at once
_BATCH_ROWS = 8192
_BATCH_PICTURES = 128


class BadExport(UserError):
    """An export that cannot be written: why, and the remedy."""


def write(
    table: Table,
    output: str,
    format: Format,
    *,
    modality: str = "both",
    images: bool = False,
    rows_per_file: int = 0,
    passed: Progress = lambda rows: None,
) -> ExportRecord:
    """Exports the table to the folder or URI `output`; does nothing where that export stands already.

    webdataset: 00000.tar, … of samples key.{jpg,txt,json,image_embedding.npy,text_embedding.npy,…}; every row is there,
    without the members that it lacks; original pictures, read from the shards, only with `images`.
    clip-retrieval: img_emb/img_emb_N.npy, text_emb/text_emb_N.npy and metadata/metadata_N.parquet, float16, aligned row
    by row; so rows that lack what `modality` (both, image or text) asks for are left out, and counted.
    Raises BadExport, also for a folder that holds anything else.
    """
    output = files.absolute(output)
    if format != "clip-retrieval" and modality != "both":
        raise BadExport("--modality is for clip-retrieval's layout: a WebDataset sample says itself what it lacks")
    if format != "webdataset" and images:
        raise BadExport("--images is for WebDataset tars: clip-retrieval's layout has no place for pictures")
    parts = records.fingerprint([part.sha256 for part in table.parts])
    spec = ExportSpec(
        format, modality, images, rows_per_file or ROWS_PER_FILE[format], table.spec.fingerprint, parts  # type: ignore[arg-type]
    )  # fmt: skip
    record = ExportRecord(table.place, spec, table.num_rows)
    standing = _claim(output, record)
    if standing:
        return standing
    writer = _write_tars if format == "webdataset" else _write_clip_retrieval
    found = writer(table, output, record, passed)
    entries = _outputs(output)
    found = replace(
        found,
        files=len(entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    files.write_bytes(output, _RECORD, records.to_json(found, indent=2))
    return found


def _claim(output: str, record: ExportRecord) -> ExportRecord | None:
    """The finished export of the same rows that stands there whole, if any; else the folder is now this one's."""
    where, entries = files.join(output, _RECORD), _outputs(output)
    if files.stat(where) is None:
        if entries:
            raise BadExport(f"{output} holds files but no {_RECORD} (e.g. {entries[0].place}): name an empty folder")
    else:
        standing = records.from_json(ExportRecord, files.read_bytes(where), where)
        if standing.spec != record.spec:
            lines = "\n  ".join(records.differences(record.spec, standing.spec))
            raise BadExport(f"{output} holds another export; name an empty folder, or repeat its options:\n  {lines}")
        size = sum(entry.size_bytes for entry in entries)
        if standing.finished_at and (standing.files, standing.size_bytes) == (len(entries), size):
            return standing
    files.remove_stale_temporaries(output)
    files.write_bytes(output, _RECORD, records.to_json(record, indent=2))
    return None


def _outputs(output: str) -> list[files.Entry]:
    record = files.join(output, _RECORD)
    return [entry for entry in files.list_files(output, recursive=True) if entry.place != record]


def _flags(batch: pa.RecordBatch, side: str) -> npt.NDArray[np.bool_]:
    flags: npt.NDArray[np.bool_] = batch[f"has_{side}"].to_numpy(zero_copy_only=False)
    return flags


def _cut(batches: Iterable[pa.RecordBatch], rows_per_file: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches cut where files end: (number of the file, rows of it)."""
    at = 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, rows_per_file - at % rows_per_file)
            yield at // rows_per_file, piece
            at += piece.num_rows
            batch = batch.slice(piece.num_rows)


# --- clip-retrieval -------------------------------------------------------------------------------------------------


def _write_clip_retrieval(table: Table, output: str, record: ExportRecord, passed: Progress) -> ExportRecord:
    needed = _NEEDED[record.spec.modality]
    without, rows = dict.fromkeys(("image", "text"), 0), 0
    for batch in table.scan(["has_image", "has_text"]):
        for side in without:
            without[side] += int((~_flags(batch, side)).sum())
        rows += int(_kept(batch, needed).sum())
    per_file = record.spec.rows_per_file
    count = -(-rows // per_file)
    embeddings = [f"{side}_embedding" for side in needed]

    def kept() -> Iterator[pa.RecordBatch]:
        for batch in table.scan(["has_image", "has_text", *_METADATA.values(), *embeddings], _BATCH_ROWS):
            yield batch.filter(pa.array(_kept(batch, needed)))
            passed(batch.num_rows)

    current, out = -1, None
    try:
        for number, piece in _cut(kept(), per_file):
            if number != current:
                if out:
                    out.publish()
                held = min(per_file, rows - number * per_file)
                current, out = number, _Partition(output, table, embeddings, f"{number:0{len(str(count))}d}", held)
            assert out is not None
            out.write(piece)
        if out:
            out.publish()
    finally:
        if out:
            out.close()
    return replace(record, rows=rows, without=without)


def _kept(batch: pa.RecordBatch, needed: Iterable[str]) -> npt.NDArray[np.bool_]:
    kept: npt.NDArray[np.bool_] = np.logical_and.reduce([_flags(batch, side) for side in needed])
    return kept


class _Partition:
    """The aligned files of one number, being written."""

    def __init__(self, output: str, table: Table, embeddings: Iterable[str], number: str, rows: int):
        self._stack = ExitStack()
        self._vectors = {}
        for column in embeddings:
            name, dim = _FOLDERS[column], table.schema.field(column).type.list_size
            pending = self._stack.enter_context(files.PendingFile(output))
            pending.write(_npy_header((rows, dim)))
            self._vectors[column] = (pending, f"{name}/{name}_{number}.npy")
        self._schema = pa.schema([(name, table.schema.field(column).type) for name, column in _METADATA.items()])
        self._pending = self._stack.enter_context(files.PendingFile(output))
        self._name = f"metadata/metadata_{number}.parquet"
        self._metadata: Any = pq.ParquetWriter(self._pending, self._schema, compression="zstd")

    def write(self, rows: pa.RecordBatch) -> None:
        for column, (pending, _) in self._vectors.items():
            pending.write(to_numpy(rows[column]))
        columns = [rows[column] for column in _METADATA.values()]
        self._metadata.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def publish(self) -> None:
        for pending, name in self._vectors.values():
            pending.publish(name)
        self._metadata.close()
        self._pending.publish(self._name)
        self.close()

    def close(self) -> None:
        self._metadata.is_open = False  # nothing is left to write where it was not published
        self._stack.close()


@cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What stands before float16 values in a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return stream.getvalue()


# --- WebDataset -----------------------------------------------------------------------------------------------------


def _write_tars(table: Table, output: str, record: ExportRecord, passed: Progress) -> ExportRecord:
    spec = record.spec
    digits = max(5, len(str(max(0, table.num_rows - 1) // spec.rows_per_file)))
    batch_rows = _BATCH_PICTURES if spec.images else _BATCH_ROWS
    without, errors, first_error = dict.fromkeys(("image", "text"), 0), Counter[str](), ""
    rows = renamed = pictures = 0
    current, out = -1, None
    with ThreadPoolExecutor(_FETCHERS) as pool:
        try:
            for number, batch in _cut(table.scan(None, batch_rows), spec.rows_per_file):
                if number != current:
                    if out:
                        out.publish()
                    current, out = number, _Tar(output, f"{number:0{digits}d}.tar")
                assert out is not None
                for side in without:
                    without[side] += int((~_flags(batch, side)).sum())
                vectors = {name: to_numpy(batch[name]) for name in table.embedding_columns}
                scalars = batch.drop_columns([n for n in batch.schema.names if n in vectors or n == "fusion_weights"])
                asked = scalars.to_pylist()
                found: Iterable[Outcome] = [None] * len(asked)
                if spec.images:
                    found = pool.map(lambda row: _picture(row, table), asked)
                for index, (row, outcome) in enumerate(zip(asked, found, strict=True)):
                    renamed += out.add(row, {name: vectors[name][index] for name in vectors}, outcome, rows + index)
                    pictures += isinstance(outcome, bytes)
                    if isinstance(outcome, tuple):
                        errors[outcome[0]] += 1
                        first_error = first_error or outcome[1]
                rows += len(asked)
                passed(len(asked))
            if out:
                out.publish()
        finally:
            if out:
                out.close()
    return replace(
        record, rows=rows, without=without, renamed=renamed, images=pictures, errors=dict(errors),
        first_error=first_error,
    )  # fmt: skip


def _picture(row: dict[str, Any], table: Table) -> Outcome:
    """The row's original picture."""
    if row["sha256"] is None:
        return None
    limits = table.spec.input
    try:
        return search.fetch_image(row, limits.max_image_bytes, limits)
    except OSError as error:
        return "MissingFile", f"{row['shard']} cannot be read: {error}"
    except (ValueError, pa.ArrowException) as error:  # another picture is there now, or the shard is damaged
        return "ImageGone", str(error)


class _Tar:
    """A tar being written."""

    def __init__(self, output: str, name: str):
        self._name, self._pending = name, files.PendingFile(output)
        self._tar = tarfile.TarFile(fileobj=self._pending, mode="w", format=tarfile.GNU_FORMAT)  # type: ignore[arg-type]
        self._names: set[str] = set()

    def add(self, row: dict[str, Any], vectors: dict[str, Any], picture: Outcome, id: int) -> bool:
        """One row's members; returns whether it goes by another name than its key."""
        name = row["key"]
        renamed = not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or name in self._names
        if renamed:
            name = f"row-{id:012d}"
            while name in self._names:
                name += "_"
        self._names.add(name)
        if isinstance(picture, bytes):
            self._member(f"{name}.{_suffix(picture)}", picture)
        if row["caption"] is not None:
            self._member(f"{name}.txt", row["caption"].encode())
        self._member(f"{name}.json", _sidecar(row))
        for column, vector in vectors.items():
            if vector.any():
                self._member(f"{name}.{column}.npy", _npy_header(vector.shape) + vector.tobytes())
        return renamed

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def publish(self) -> None:
        self._tar.close()
        self._pending.publish(self._name)
        self.close()

    def close(self) -> None:
        self._pending.__exit__()


def _suffix(picture: bytes) -> str:
    found = images.format_of(picture).lower()
    return {"jpeg": "jpg"}.get(found, found)


def _sidecar(row: dict[str, Any]) -> bytes:
    """The row's scalars as JSON; its own sidecar as an object in `meta`."""
    found = {name: value for name, value in row.items() if name not in ("caption", "offset", "length")}
    found["sha256"] = row["sha256"].hex() if row["sha256"] else None
    with suppress(ValueError, RecursionError):  # else it stays a string
        found["meta"] = json.loads(row["meta"]) if row["meta"] else None
    return json.dumps(found).encode()
