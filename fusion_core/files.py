"""The one door to storage: local paths and object-store URIs, through pyarrow.fs.

A place is a string: a local path or a URI (`s3://bucket/dir`, `gs://…`). Files become visible whole or not at all:
locally by a temporary name, fsync and rename; on an object store because a PUT is atomic.
"""

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.fs as pafs

TEMPORARY = ".tmp"  # below a table or index; never looked into by a reader
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it."""

    place: str
    size_bytes: int
    mtime_ns: int


def is_local(place: str) -> bool:
    """Whether the place is a path of this machine."""
    return "://" not in place


def join(place: str, *names: str) -> str:
    """The place below `place`."""
    return "/".join([place.rstrip("/") or "/", *names]) if names else place


def absolute(place: str) -> str:
    """The place in the one form that is stored: an absolute path, or the URI as it is."""
    if place.startswith("file://"):
        place = place[len("file://") :]
    return os.path.abspath(os.path.expanduser(place)) if is_local(place) else place.rstrip("/")


def resolve(place: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a place and the path in it; raises ValueError for a scheme unknown to pyarrow."""
    if is_local(place):
        return pafs.LocalFileSystem(), place
    try:
        filesystem, path = pafs.FileSystem.from_uri(place)
    except Exception as error:
        raise ValueError(f"cannot use {place!r}: {error}") from error
    return filesystem, path


def stat(place: str) -> Entry | None:
    """The file at a place, or None when there is none."""
    filesystem, path = resolve(place)
    info = filesystem.get_file_info(path)
    return _entry(place, info) if info.type == pafs.FileType.File else None


def stat_many(places: list[str]) -> list[Entry | None]:
    """`stat` of many places on one filesystem, in their order."""
    if not places:
        return []
    filesystem, path = resolve(places[0])
    scheme = places[0].removesuffix(path)  # resolving a URI makes a new client, so it is done once
    infos = filesystem.get_file_info(
        [place.removeprefix(scheme) if place.startswith(scheme) else resolve(place)[1] for place in places]
    )
    return [
        _entry(place, info) if info.type == pafs.FileType.File else None
        for place, info in zip(places, infos, strict=True)
    ]


def is_folder(place: str) -> bool:
    """Whether the place is an existing folder."""
    filesystem, path = resolve(place)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)


def list_files(folder: str, recursive: bool = False) -> list[Entry]:
    """The files of a folder sorted by place; an absent folder has none. Hidden names (leading dot) are passed over."""
    filesystem, root = resolve(folder)
    selector = pafs.FileSelector(root, recursive=recursive, allow_not_found=True)
    below = len(root.rstrip("/")) + 1
    entries = [
        _entry(join(folder, info.path[below:]), info)
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File and not _hidden(info.path[below:])
    ]
    return sorted(entries, key=lambda entry: entry.place)


def open_input(place: str) -> BinaryIO:
    """The file opened for reading, seekable; raises OSError naming the place."""
    if is_local(place):
        return open(place, "rb")
    filesystem, path = resolve(place)
    return cast(BinaryIO, filesystem.open_input_file(path))


def read_bytes(place: str) -> bytes:
    """The file's bytes."""
    with open_input(place) as stream:
        return stream.read()


def fetch_url(url: str, max_bytes: int, timeout_seconds: float = 20) -> bytes:
    """What an http or https URL gives, redirected or not. Raises OSError, also for more than `max_bytes`."""
    import http.client
    import urllib.request as web

    opener = web.OpenerDirector()  # the usual one would follow a redirection to ftp, and read file:// and data: URLs
    for handler in (web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.UnknownHandler,
                    web.HTTPRedirectHandler, web.HTTPErrorProcessor, web.HTTPDefaultErrorHandler):  # fmt: skip
        opener.add_handler(handler())
    deadline = time.monotonic() + timeout_seconds
    data = bytearray()
    try:
        with opener.open(web.Request(url, headers={"User-Agent": "fusion"}), timeout=timeout_seconds) as response:
            while block := response.read1(64 << 10):
                data += block
                if len(data) > max_bytes:
                    raise OSError(f"it has more than the {max_bytes:,} bytes that are read")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {timeout_seconds:g} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot fetch {url}: {error}") from error
    return bytes(data)


def sha256(place: str) -> str:
    """SHA-256 (hex) of the file's bytes."""
    with open_input(place) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def write_bytes(folder: str, name: str, data: bytes) -> None:
    """Publishes `data` as `folder/name`, replacing what is there."""
    with PendingFile(folder) as pending:
        pending.write(data)
        pending.publish(name)


def remove(place: str) -> None:
    """Deletes a file; one that is gone already is no error."""
    filesystem, path = resolve(place)
    try:
        filesystem.delete_file(path)
    except FileNotFoundError:
        return
    except OSError:
        if stat(place) is not None:
            raise


class PendingFile:
    """A file being written below `folder`, invisible until published. Knows its size and SHA-256.

    Leaving the `with` block without `publish` discards it.
    """

    def __init__(self, folder: str):
        self._folder = folder
        if is_local(folder):
            scratch = Path(folder) / TEMPORARY
            scratch.mkdir(parents=True, exist_ok=True)
        else:
            scratch = Path(tempfile.gettempdir())
        self.path = scratch / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._stream = open(self.path, "xb")  # noqa: SIM115 (closed by close)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> "PendingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what was written so far."""
        return self._hash.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether writing has ended."""
        return self._stream.closed

    def write(self, data: Any) -> int:
        """Appends `data` (bytes or a buffer)."""
        self._hash.update(data)
        self.size_bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def tell(self) -> int:
        """The number of bytes written."""
        return self.size_bytes

    def flush(self) -> None:
        """Hands what is buffered to the operating system."""
        self._stream.flush()

    def close(self) -> None:
        """Ends writing."""
        self._stream.close()

    def publish(self, name: str) -> None:
        """Makes the file visible as `folder/name`, durably, replacing what is there."""
        if not self.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.close()
        else:
            _sync(self.path)
        if not is_local(self._folder):
            _upload(self.path, join(self._folder, name))
            return
        target = Path(self._folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        _sync(target.parent)


def remove_stale_temporaries(folder: str) -> int:
    """Deletes temporary files below `folder` that no living job can own any more (a day old); returns how many."""
    if not is_local(folder):
        return 0
    removed = 0
    for path in _temporaries(Path(folder)):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue
    return removed


def _temporaries(folder: Path) -> Iterator[Path]:
    scratch = folder / TEMPORARY
    return scratch.iterdir() if scratch.is_dir() else iter(())


def _upload(path: Path, place: str) -> None:
    filesystem, target = resolve(place)
    with open(path, "rb") as source, filesystem.open_output_stream(target) as sink:
        shutil.copyfileobj(source, sink, 8 << 20)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(place: str, info: Any) -> Entry:
    return Entry(place, int(info.size or 0), int(info.mtime_ns or 0))


def _hidden(relative: str) -> bool:
    return any(name.startswith(".") for name in relative.split("/"))
