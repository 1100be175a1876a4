"""WebDataset tars -> samples: runs of adjacent members of one key, read forward, one sample in memory at a time.

Where a sample has two images (`jpg` and `png`) or two captions (`txt` and `caption`), the first in member order counts.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fusion_core import fields, files
from fusion_core.fields import Rejected
from schemas.feature_table import InputSpec
from schemas.samples import DeadLetter, Sample, Unit

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTIONS = ("txt", "caption")
META = "json"
_BITS = {extension: 1 << bit for bit, extension in enumerate((*IMAGES, *CAPTIONS, META))}

_OF_NO_INTEREST = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}

_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20  # long names and PAX records; a longer one is damage
_ZERO_TAIL_BYTES = 1 << 20  # tars are padded to 10 KiB, or little more; a file of zeros was never filled


def read_tar(unit: Unit, spec: InputSpec) -> Iterator[Sample | DeadLetter]:
    """The samples and dead letters of a tar, in member order; raises OSError when storage fails."""
    with closing(_Source(files.open_input(unit.shard))) as source:
        yield from _Reader(source, spec, unit.first_row).read()


class _Cut(Exception):
    """The shard cannot be read past `offset`."""

    def __init__(self, error: str, offset: int, message: str):
        super().__init__(message)
        self.error, self.offset, self.message = error, offset, message


# --- bytes and members ----------------------------------------------------------------------------------------------


class _Source:
    """The tar's bytes after decompression, read forward; a file object for tarfile, which reads headers from it."""

    def __init__(self, stream: BinaryIO):
        self._buffered = buffered = io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER_BYTES)
        self.is_gzip = buffered.read(2) == b"\x1f\x8b"
        self._size = None if self.is_gzip else buffered.seek(0, io.SEEK_END)
        buffered.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=buffered) if self.is_gzip else buffered
        self._position = 0
        self._ahead = b""  # read, but given back
        self.ended = False  # a read came short

    def close(self) -> None:
        """Closes the file."""
        self._buffered.close()

    def tell(self) -> int:
        """How many bytes stand before the next one."""
        return self._position

    def read(self, size: int) -> bytes:
        """A header's bytes, fewer at the end of the file."""
        if size > _HEADER_BYTES:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self._read(size)

    def unread(self, data: bytes) -> None:
        """Gives back what was read last."""
        self._ahead = data + self._ahead
        self._position -= len(data)

    def read_data(self, offset: int, size: int) -> bytes:
        """All of a member's data; raises _Cut when the file ends within."""
        self.skip_to(offset)
        self._require(offset + size)
        data = self._read(size)
        if len(data) < size:
            raise self._truncated(offset, f"{len(data)} of {size} bytes of a member")
        return data

    def skip_to(self, offset: int) -> None:
        """Goes forward to `offset`; raises _Cut when the file ends before."""
        if offset < self._position:
            raise _Cut("CorruptShard", self._position, f"a header points back to byte {offset}")
        self._require(offset)
        if self._size is not None and offset != self._position:
            self._stream.seek(offset)
            self._position, self._ahead = offset, b""
        while self._position < offset:
            if not self._read(min(offset - self._position, _BUFFER_BYTES)):
                raise self._truncated(self._position, f"expected data up to byte {offset}")

    def expect_end(self) -> None:
        """Reads past the end-of-archive marker; raises _Cut when more than padding follows."""
        marker = self._position
        while chunk := self._read(_BUFFER_BYTES):
            if chunk.strip(b"\0"):
                offset = self._position - len(chunk.lstrip(b"\0"))
                message = f"data at byte {offset}, after the end of the archive: damage, or two tars in a row"
                raise _Cut("CorruptShard", offset, message)
        if self._position - marker > _ZERO_TAIL_BYTES:
            message = f"nothing but zeros in the last {self._position - marker} bytes: a copy that was not completed"
            raise _Cut("TruncatedShard", marker, message)

    def _require(self, end: int) -> None:
        if self._size is not None and end > self._size:
            raise self._truncated(self._position, f"expected data up to byte {end}")

    def _truncated(self, offset: int, found: str) -> _Cut:
        end = self._position if self._size is None else self._size
        return _Cut("TruncatedShard", offset, f"the file ends at byte {end}: {found}")

    def _read(self, size: int) -> bytes:
        given, self._ahead = self._ahead[:size], self._ahead[size:]
        try:
            data = given + cast(bytes, self._stream.read(size - len(given))) if len(given) < size else given
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            kind = "TruncatedShard" if isinstance(error, EOFError) else "CorruptShard"
            raise _Cut(kind, self._position, f"gzip stream, unpacked byte {self._position}: {error}") from error
        self._position += len(data)
        self.ended = len(data) < size
        return data


def _members(source: _Source) -> Iterator[tarfile.TarInfo]:
    """The tar's members up to its end-of-archive marker; raises _Cut where there is none.

    TarFile.next() keeps every member and takes a damaged header or the file's end for the archive's, so headers are
    read one by one.
    """
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(tarfile.BLOCKSIZE)), encoding="utf-8")
    archive.fileobj, archive.offset = cast(BinaryIO, source), 0
    while True:
        start = archive.offset
        source.skip_to(start)
        if plain := _plain_member(source):
            archive.offset = plain.offset_data + -(-plain.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            yield plain
            continue
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            source.expect_end()
            return
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:
            raise _bad_header(source, start, error) from error
        if member.size < 0 or archive.offset <= start:
            raise _Cut("CorruptShard", start, f"the header at byte {start} says {member.size} bytes of data")
        yield member


def _plain_member(source: _Source) -> tarfile.TarInfo | None:
    """The next member, where it is a plain file with an ASCII name, or None, with nothing read: tarfile takes three
    times as long, more than a small image's decoding costs, for headers that are nearly all like this.
    """
    start, read = source.tell(), source.read(tarfile.BLOCKSIZE)
    size = _plain_size(read, b"x")  # before each member by webdataset's writer, to say when it was made
    if size is not None and 0 < size <= tarfile.BLOCKSIZE:
        read += source.read(tarfile.BLOCKSIZE)
        if _says_nothing(read[-tarfile.BLOCKSIZE :][:size]):
            read += source.read(tarfile.BLOCKSIZE)
    header = read[-tarfile.BLOCKSIZE :]
    name, size = header[:100].rstrip(b"\0"), _plain_size(header, b"0\0")
    if size is None or not name.isascii() or b"\0" in name or name.endswith(b"/") or header[345:500].strip(b"\0"):
        source.unread(read)
        return None
    member = tarfile.TarInfo(name.decode())
    member.size, member.offset, member.offset_data = size, start, source.tell()
    return member


def _plain_size(header: bytes, kinds: bytes) -> int | None:
    """The size in a whole header of one of these kinds; None for any other header."""
    if len(header) < tarfile.BLOCKSIZE or header[156] not in kinds or header[257:262] != b"ustar":
        return None
    size, checksum = (header[at].strip(b" \0") for at in (slice(124, 136), slice(148, 156)))
    if not (size.isdigit() and checksum.isdigit()) or b"8" in (digits := size + checksum) or b"9" in digits:
        return None
    # Adler-32's lower half is 1 + the sum of the bytes, modulo 65521.
    found = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    return int(size, 8) if found == (int(checksum, 8) + 1) % 65521 else None


def _says_nothing(records: bytes) -> bool:
    """Whether PAX records hold nothing but times and owners."""
    while records:
        length, _, rest = records.partition(b" ")
        if not (length.isdigit() and len(length) < 4 and 0 < int(length) <= len(records)):
            return False
        if rest.partition(b"=")[0] not in _OF_NO_INTEREST:
            return False
        records = records[int(length) :]
    return True


def _bad_header(source: _Source, start: int, error: Exception) -> _Cut:
    if source.ended:
        found = "no end-of-archive marker" if source.tell() == start else "in a header"
        return _Cut("TruncatedShard", start, f"the file ends at byte {source.tell()}: {found}")
    what = "no tar: " if start == 0 else ""
    return _Cut("CorruptShard", start, f"{what}the header at byte {start} is damaged: {error}")


def _sparse_data(member: tarfile.TarInfo, source: _Source) -> bytes:
    """The data of a file that tar stored without its runs of zeros."""
    data, offset = bytearray(member.size), member.offset_data
    extents = cast("list[tuple[int, int]]", member.sparse)
    for start, size in extents:
        if min(start, size) < 0 or start + size > member.size:
            raise _Cut("CorruptShard", member.offset, f"the sparse map of {member.name!r} points outside of the file")
        data[start : start + size] = source.read_data(offset, size)
        offset += size
    return bytes(data)


def _split(name: str) -> tuple[str, str]:
    """The member's key and extension; the extension is empty for what is no part of a sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if not stem or extension not in _BITS:
        return "", ""
    if any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in folder.split("/")):
        return "", ""
    return fields.clean(folder + slash + stem), extension


# --- samples --------------------------------------------------------------------------------------------------------


class _Piece:
    """The adjacent members of one key."""

    def __init__(self, key: str, offset: int):
        self.key, self.offset = key, offset
        self.extensions = 0  # as bits
        self.whole = True
        self.image: bytes | None = None
        self.range: tuple[int, int] | None = None  # of the image's data in the shard
        self.caption: bytes | None = None
        self.meta: bytes | None = None
        self.problem: Rejected | None = None

    def take(self, member: tarfile.TarInfo, extension: str, source: _Source, spec: InputSpec) -> None:
        """Reads one member; raises _Cut when the shard ends within."""
        self.extensions |= _BITS[extension]
        self.whole = False
        if extension == META:
            self.meta = self._data(member, source, fields.TEXT_BYTES, "meta")
        elif extension in CAPTIONS and self.caption is None:
            self.caption = self._data(member, source, fields.TEXT_BYTES, "caption")
        elif extension in IMAGES and self.image is None:
            self.range = None if member.issparse() else (member.offset_data, member.size)
            self.image = self._data(member, source, spec.max_image_bytes, "read")
        else:
            source.skip_to(member.offset_data + (0 if member.issparse() else member.size))
        self.whole = True

    def _data(self, member: tarfile.TarInfo, source: _Source, limit: int, stage: str) -> bytes:
        if member.size > limit:
            if not member.issparse():  # whose size is not what stands in the shard
                source.skip_to(member.offset_data + member.size)
            message = f"{member.name!r} holds {member.size} bytes, more than {limit}"
            self.problem = self.problem or Rejected(stage, "TooManyBytes", message)
            return b""
        return _sparse_data(member, source) if member.issparse() else source.read_data(member.offset_data, member.size)

    def texts(self) -> tuple[str | None, str | None, str | None]:
        """Caption, url and sidecar; raises Rejected."""
        caption = None if self.caption is None else fields.decode_caption(self.caption)
        if self.meta is None:
            return caption, None, None
        named, url, meta = fields.sidecar_texts(self.meta)
        return (named if caption is None else caption), url, meta

    def outcome(self, row: int, is_gzip: bool) -> Sample | DeadLetter:
        """The sample, or why it is none."""
        try:
            if self.problem:
                raise self.problem
            caption, url, meta = self.texts()
            if self.image is None and caption is None:
                raise Rejected("read", "EmptySample", f"key {self.key!r} has neither an image nor a caption")
        except Rejected as problem:
            return problem.letter(self.key, row, self.offset)
        offset, length = (None, None) if is_gzip or self.range is None else self.range
        return Sample(self.key, row, self.image, caption, url, meta, offset, length)

    @property
    def is_pair(self) -> bool:
        """Whether both modalities were read whole, so that a cut behind them can have taken nothing needed."""
        if not self.whole or self.image is None:
            return False
        try:
            return self.caption is not None or self.texts()[0] is not None
        except Rejected:
            return False


@dataclass(slots=True)
class _Seen:
    row: int
    extensions: int
    dead: bool


class _Reader:
    """One pass over a tar. Keeps, of what went by, one small record for each key."""

    def __init__(self, source: _Source, spec: InputSpec, first_row: int):
        self._source, self._spec, self._row = source, spec, first_row
        self._seen: dict[str, _Seen] = {}
        self._piece: _Piece | None = None

    def read(self) -> Iterator[Sample | DeadLetter]:
        """The samples; a shard that cannot be read to its end gives one dead letter for the rest of it."""
        try:
            for member in _members(self._source):
                if member.isreg():
                    yield from self._take(member)
            yield from self._finish()
        except _Cut as cut:
            yield from self._cut(cut)

    def _take(self, member: tarfile.TarInfo) -> Iterator[Sample | DeadLetter]:
        key, extension = _split(member.name)
        if not extension:
            return
        if self._piece and (self._piece.key != key or self._piece.extensions & _BITS[extension]):
            yield from self._finish()
        if self._piece is None:
            self._piece = _Piece(key, member.offset)
        self._piece.take(member, extension, self._source, self._spec)

    def _finish(self) -> Iterator[Sample | DeadLetter]:
        piece, self._piece = self._piece, None
        if piece is None:
            return
        seen = self._seen.get(piece.key)
        if seen is None:
            outcome = piece.outcome(self._next_row(), self._source.is_gzip)
            self._seen[piece.key] = _Seen(outcome.row, piece.extensions, isinstance(outcome, DeadLetter))
            yield outcome
        elif seen.extensions & piece.extensions:
            message = f"key {piece.key!r} at byte {piece.offset} stands earlier in the shard, as row {seen.row}"
            yield DeadLetter(piece.key, self._next_row(), "read", "DuplicateKey", message, piece.offset)
        else:
            yield from self._retract(piece, seen)

    def _retract(self, piece: _Piece, seen: _Seen) -> Iterator[DeadLetter]:
        seen.extensions |= piece.extensions
        if not seen.dead:
            seen.dead = True
            message = f"more members of key {piece.key!r} at byte {piece.offset}, with other keys between"
            yield DeadLetter(piece.key, seen.row, "read", "ScatteredKey", message, piece.offset)

    def _cut(self, cut: _Cut) -> Iterator[Sample | DeadLetter]:
        piece = self._piece
        if piece and piece.is_pair:
            yield from self._finish()
        elif piece and (seen := self._seen.get(piece.key)) and not seen.extensions & piece.extensions:
            yield from self._retract(piece, seen)
        key = self._piece.key if self._piece else ""
        yield DeadLetter(key, self._next_row(), "read", cut.error, cut.message, cut.offset)

    def _next_row(self) -> int:
        self._row += 1
        return self._row - 1
