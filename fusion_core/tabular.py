"""Rows of Parquet, CSV, TSV and JSONL files, read forward in small batches; damage costs the rows that it hits."""

import codecs
import csv
import errno
import io
import posixpath
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pat

from fusion_core import fields, files
from fusion_core.fields import Columns, InputError, Rejected, Unreadable
from schemas.errors import UserError
from schemas.feature_table import InputSpec

LISTING_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
_HEADER_ROWS = 100  # a JSONL file's columns are the keys of its first rows
_RECORD_LINES = 1000  # a CSV record that spans more is an open quote
_MARK_ROWS = 1000  # how often a row's byte offset is remembered, for the units that start behind it
_MARKED_FILES = 8

# As long as a caption may be anywhere; Python's own limit is 131,072 characters.
csv.field_size_limit(fields.TEXT_BYTES)

# What pyarrow raises on damaged data. Storage failures are told apart by _Watched.
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, IndexError)


@dataclass(slots=True)
class Row:
    """One row: its values by column, or why it has none. `text` is what stands in a listing that is text."""

    values: Mapping[str, object] = field(default_factory=dict)
    image: "Image | None" = None
    problem: Rejected | None = None
    text: bytes = b""


@dataclass(frozen=True, slots=True)
class Image:
    """The image cell of a Parquet row: its bytes (read on demand), and the path that stands beside them."""

    size_bytes: int | None
    path: str | None
    scalar: Any

    def read(self) -> bytes:
        """The bytes; only where `size_bytes` is not None."""
        return self.scalar.as_py()  # type: ignore[no-any-return]


class Damaged(UserError):
    """A file is not of its format."""


# --- Parquet --------------------------------------------------------------------------------------------------------


class _Watched:
    """A file for pyarrow that remembers a failure of storage, which pyarrow reports like damaged data."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.failure: OSError | None = None
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        return cast(bytes, self._call(self._stream.read, size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return cast(int, self._call(self._stream.seek, offset, whence))

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self.closed = True
        self._stream.close()

    def _call(self, function: Any, *arguments: int) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            self.failure = error
            raise


class Parquet:
    """An open Parquet file; raises OSError when storage fails and Damaged when the footer does not parse."""

    def __init__(self, place: str):
        self.place = place
        self._watched = _Watched(files.open_input(place))
        try:
            source = pa.PythonFile(self._watched, mode="r")
            # Without pre-buffering and with a buffer per column, a row group is read page by page.
            self._file = pq.ParquetFile(
                source, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
            self.schema: pa.Schema = self._file.schema_arrow
            metadata = self._file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            self.group_rows = [group.num_rows for group in groups]
            self._group_bytes = [group.total_byte_size for group in groups]
            fields.describe(self.schema)  # names that are not UTF-8 come out here
        except _DAMAGE as error:
            self.close()
            self._raise_storage_failure()
            raise Damaged(f"{place} is not a readable Parquet file: {_first_line(error)}") from error
        if min(self.group_rows, default=0) < 0:
            self.close()
            raise Damaged(f"{place} is not a readable Parquet file: a row group of {min(self.group_rows)} rows")

    def __enter__(self) -> "Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._watched.close()

    def rows(self, columns: Columns, start: int, stop: int) -> Iterator[Row]:
        """Exactly the rows of the row groups from `start` to `stop`; those that cannot be read have a problem."""
        for group in range(start, stop):
            n_read, message = 0, "the row group ends early"
            try:
                for batch in self._batches(group, columns):
                    rows = list(_batch_rows(batch, columns))[: self.group_rows[group] - n_read]
                    n_read += len(rows)
                    yield from rows
            except _DAMAGE as error:
                self._raise_storage_failure()
                message = _first_line(error)
            problem = Rejected("read", "CorruptShard", f"row group {group}, from its row {n_read}: {message}")
            for _ in range(n_read, self.group_rows[group]):
                yield Row(problem=problem)

    def _batches(self, group: int, columns: Columns) -> Iterator[pa.RecordBatch]:
        row_bytes = max(1, self._group_bytes[group] // max(1, self.group_rows[group]))
        rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        return self._file.iter_batches(rows, [group], columns.names, use_threads=False)  # type: ignore[no-any-return]

    def _raise_storage_failure(self) -> None:
        if self._watched.failure:
            raise self._watched.failure


def _batch_rows(batch: pa.RecordBatch, columns: Columns) -> Iterator[Row]:
    others = [name for name in columns.names if name != columns.image]
    values = [_values(batch.column(name)) for name in others]
    images = _images(batch.column(columns.image)) if columns.image else [None] * batch.num_rows
    for row, image in enumerate(images):
        yield Row({name: column[row] for name, column in zip(others, values, strict=True)}, image)


def _images(array: pa.Array) -> list[Image | None]:
    paths: list[object] = [None] * len(array)
    if pat.is_struct(array.type):
        names = [array.type.field(index).name for index in range(array.type.num_fields)]
        if "path" in names and fields.is_text(array.type.field("path").type):
            paths = _values(pc.struct_field(array, "path"))
        array = pc.struct_field(array, "bytes")
    if pat.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pat.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    sizes = pc.binary_length(array).to_pylist()
    return [
        None if size is None and not path else Image(size, str(path) if path else None, array[row])
        for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
    ]


def _values(array: pa.Array) -> list[object]:
    """The column's values; cells that are none become Unreadable."""
    try:
        if pat.is_timestamp(array.type):  # as text: Python's own type holds neither nanoseconds nor every year
            return [text and text.replace(" ", "T", text[:1] != "<") for text in array.cast(pa.string()).to_pylist()]
        return array.cast(_in_microseconds(array.type), safe=False).to_pylist()  # type: ignore[no-any-return]
    except _DAMAGE:
        return [_value(array, row) for row in range(len(array))]


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """The type without nanoseconds: durations and nested times of these become objects of pandas, which are no JSON."""
    if pat.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pat.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if not pat.is_nested(kind):
        return kind
    inner = [field.with_type(_in_microseconds(field.type)) for field in map(kind.field, range(kind.num_fields))]
    if pat.is_struct(kind):
        return pa.struct(inner)
    if pat.is_list(kind):
        return pa.list_(inner[0])
    if pat.is_large_list(kind):
        return pa.large_list(inner[0])
    return pa.list_(inner[0], kind.list_size) if pat.is_fixed_size_list(kind) else kind


def _value(array: pa.Array, row: int) -> object:
    try:
        return array[row].as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"byte {error.start} is 0x{error.object[error.start]:02x}: {error.reason}")
    except _DAMAGE as error:
        return Unreadable(_first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


# --- listings -------------------------------------------------------------------------------------------------------


def listing_columns(place: str, spec: InputSpec) -> Columns:
    """What the columns of a CSV, TSV or JSONL file mean; raises InputError when none names images."""
    with _Text(place) as text:
        if _is_json(place):
            rows = islice(_json_rows(text), _HEADER_ROWS)
            names = list(dict.fromkeys(fields.clean(name) for row in rows for name in row.values))
        else:
            names = _csv_header(text, place)
    return fields.find_columns(pa.schema([pa.field(name, pa.string()) for name in names]), spec, place)


@dataclass(frozen=True)
class Listing:
    """A file whose rows name image files: CSV, TSV, JSONL or Parquet."""

    place: str
    columns: Columns

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """The rows from `start` to `stop` or the end."""
        return (self._text_rows if is_text_listing(self.place) else self._parquet_rows)(start, stop)

    def _text_rows(self, start: int, stop: int | None) -> Iterator[Row]:
        with _Text(self.place) as text:
            if _is_json(self.place):
                row, rows = text.go_near(start), _json_rows(text)
            else:
                header = _csv_header(text, self.place)
                row, rows = text.go_near(start), _csv_rows(text, header, _delimiter(self.place))
            yield from islice(rows, start - row, None if stop is None else stop - row)

    def _parquet_rows(self, start: int, stop: int | None) -> Iterator[Row]:
        with Parquet(self.place) as parquet:
            first, past = 0, 0
            for group, n_rows in enumerate(parquet.group_rows):
                first, past = past, past + n_rows
                end = past if stop is None else min(stop, past)
                if max(start, first) < end:
                    rows = parquet.rows(self.columns, group, group + 1)
                    yield from islice(rows, max(start, first) - first, end - first)

    def image_place(self, path: str) -> str:
        """Where the image that a row names lies; raises Rejected when that is outside of the listing's folder."""
        folder = self.place.rpartition("/")[0]
        inside = path.removeprefix(folder + "/")
        normal = posixpath.normpath(inside)
        if "://" in inside or normal.startswith("/") or normal.split("/")[0] == "..":
            raise Rejected("read", "PathOutsideRoot", f"{path!r} leads out of the listing's folder {folder}")
        return files.join(folder, normal)


def is_text_listing(place: str) -> bool:
    """Whether the name is that of a CSV, TSV or JSONL file."""
    return posixpath.splitext(place)[1].lower() in LISTING_SUFFIXES


def _is_json(place: str) -> bool:
    return place.lower().endswith((".jsonl", ".ndjson"))


def _delimiter(place: str) -> str:
    return "\t" if place.lower().endswith(".tsv") else ","


_marks: dict[tuple[str, int, int], dict[int, int]] = {}  # row -> its byte offset, by listing and its state


class _Text:
    """The lines of a text file. Lines taken for one record can be given back, up to the first."""

    def __init__(self, place: str):
        entry = files.stat(place)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "no such listing", place)
        self._stream = io.BufferedReader(cast(io.RawIOBase, files.open_input(place)), _BUFFER_BYTES)
        self._marks = _marks.setdefault((place, entry.size_bytes, entry.mtime_ns), {})
        while len(_marks) > _MARKED_FILES:
            _marks.pop(next(iter(_marks)), None)
        self._row = 0
        self._given_back: deque[tuple[int, bytes]] = deque()  # lines with their offsets
        self._offsets: list[int] = []
        self.taken: list[bytes] = []  # the record's lines so far
        if self._stream.read(3) != codecs.BOM_UTF8:
            self._stream.seek(0)

    def __enter__(self) -> "_Text":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def go_near(self, row: int) -> int:
        """Goes to the nearest row at or before `row` whose place is known; returns which."""
        self.begin()
        known = max((mark for mark in list(self._marks) if mark <= row), default=0)  # others may add marks
        if known:
            self._stream.seek(self._marks[known])
            self._given_back.clear()
        self._row = known
        return known

    def begin(self, counted: bool = False) -> None:
        """Begins the next record; `counted` when the last one was a row."""
        self.taken, self._offsets = [], []
        self._row += counted
        if counted and self._row % _MARK_ROWS == 0:
            self._marks[self._row] = self._given_back[0][0] if self._given_back else self._stream.tell()

    def give_back(self) -> None:
        """Keeps only the first line of the record; the others are read again."""
        lines = zip(self._offsets, self.taken, strict=True)
        self._given_back.extendleft(reversed(list(lines)[1:]))
        del self.taken[1:], self._offsets[1:]

    def __iter__(self) -> "_Text":
        return self

    def __next__(self) -> str:
        if len(self.taken) >= _RECORD_LINES or sum(map(len, self.taken)) > fields.TEXT_BYTES:
            raise StopIteration
        offset, line = self._given_back.popleft() if self._given_back else (self._stream.tell(), self._readline())
        if not line:
            raise StopIteration
        self.taken.append(line)
        self._offsets.append(offset)
        return line.decode("utf-8", "surrogateescape")

    def _readline(self) -> bytes:
        """A line, cut behind TEXT_BYTES + 1."""
        line = rest = self._stream.readline(fields.TEXT_BYTES + 1)
        while rest and not rest.endswith(b"\n") and len(line) > fields.TEXT_BYTES:
            rest = self._stream.readline(_BUFFER_BYTES)
        return line


def _json_rows(text: _Text) -> Iterator[Row]:
    while next(text, None) is not None:
        line = text.taken[0]
        is_row = bool(line.strip())
        text.begin(counted=is_row)
        if is_row:
            yield _json_row(line)


def _json_row(line: bytes) -> Row:
    if len(line) > fields.TEXT_BYTES:
        return _long_row(line)
    try:
        return Row(fields.parse_object(line), text=line)
    except Rejected as problem:
        return Row(problem=problem, text=line)


def _long_row(line: bytes) -> Row:
    return Row(problem=Rejected("read", "TooManyBytes", f"a row of more than {fields.TEXT_BYTES} bytes"), text=line)


def _csv_header(text: _Text, place: str) -> list[str]:
    for cells, problem in _csv_records(text, _delimiter(place)):
        if problem or any(not cell.isprintable() for cell in cells):
            raise InputError(f"{place} does not start with a line of column names in UTF-8: {problem or cells}"[:400])
        return [cell.strip() for cell in cells]
    raise InputError(f"{place} is empty: expected a line of column names, such as image_path,caption")


def _csv_rows(text: _Text, header: list[str], delimiter: str) -> Iterator[Row]:
    for cells, problem in _csv_records(text, delimiter):
        if not problem and len(cells) != len(header):
            problem = f"{len(cells)} cells under {len(header)} columns"
        if problem:
            text.give_back()  # a row that spans lines by mistake takes no neighbour with it
        taken = b"".join(text.taken)
        text.begin(counted=True)
        if len(taken) > fields.TEXT_BYTES:
            yield _long_row(taken)
        elif problem:
            yield Row(problem=Rejected("read", "BrokenRow", f"{problem}: {taken[:80]!r}"), text=taken)
        else:
            yield Row({name: cell or None for name, cell in zip(header, cells, strict=True)}, text=taken)


def _csv_records(text: _Text, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """The cells of each record that is not blank, or what is wrong with it; its lines are `text.taken`."""
    while True:
        text.begin()
        problem, cells = "", None
        try:
            cells = next(csv.reader(text, delimiter=delimiter, strict=True), None)
        except csv.Error as error:
            problem = str(error)
        if not text.taken:
            return
        if cells != []:
            yield cells or [], problem
