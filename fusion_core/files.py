"""The one door to storage: local paths and object-store URIs, through pyarrow.fs.

A place is a string: a local path or a URI (`s3://bucket/dir`, `gs://…`), whose path is the object's key as it is:
nothing in it is escaped and it has no options. Credentials, region and endpoint come from the environment or from the
store's own configuration files (for S3 `AWS_ENDPOINT_URL`, `AWS_PROFILE`, …), never from a place, because places are
recorded. Files become visible whole or not at all: locally by a temporary name, fsync and rename; on an object store
because a PUT is atomic.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.fs as pafs

from schemas.errors import UserError

TEMPORARY = ".tmp"  # below a table or index; never looked into by a reader
_STALE_SECONDS = 24 * 3600
_UPLOAD = "fusion-upload-"  # begins the name of what waits on this machine to be sent to a store
_BLOCK_BYTES = 8 << 20  # of what goes over a network: each block costs a round trip

# A user with a password, whatever stands in it; but not a port, or an @ in a path.
_CREDENTIALS = re.compile(
    r"(?<![\w+.-])([\w+.-]+://)"
    r"(?:(?<=s3://)(?:[^\s/:@]*:\S*|[^\s/@]+)|(?<!s3://)[^\s/:@]*:(?!\d+(?:[/\s]|$))\S*)@"
)
_SECRET_OPTION = re.compile(r"(?i)([?&][\w-]*(?:secret|password|token|key|signature|sig|credential)[\w-]*=)[^\s&]+")


class BadPlace(UserError):
    """A place that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
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
    """The place in the one form that is stored: an absolute path, or the URI as it is. Raises BadPlace."""
    if not place:  # of a variable that is not set; the folder one happens to be in is not meant
        raise BadPlace("the name of a place is empty: name a file, a folder or a URI")
    _check_no_credentials(place)
    if place.startswith("file://"):
        place = place[len("file://") :]
    return os.path.abspath(os.path.expanduser(place)) if is_local(place) else place.rstrip("/")


def redacted(text: str) -> str:
    """The text with the credentials in its URIs replaced by `***`."""
    return _SECRET_OPTION.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


def _check_no_credentials(place: str) -> None:
    if not is_local(place) and redacted(place) != place:
        raise BadPlace(
            f"{redacted(place)}: a place is recorded and shown, so it must not hold credentials: set them in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, …)"
        )


def resolve(place: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a place and the path in it.

    Raises BadPlace for a scheme unknown to pyarrow, and for a URI that holds credentials.
    """
    if is_local(place):
        return _LOCAL, place
    _check_no_credentials(place)
    scheme, _, rest = place.partition("://")
    store, _, path = rest.partition("/")
    filesystem, root = _store(f"{scheme}://{store}/")
    return filesystem, f"{root.rstrip('/')}/{path}" if path else root


_LOCAL = pafs.LocalFileSystem()


@lru_cache(maxsize=64)  # a new client costs connections, and a look-up of its bucket's region
def _store(root: str) -> tuple[Any, str]:
    try:
        if root.startswith(
            "s3://"
        ):  # without it the object is begun before its size is known: 3 requests in place of 1
            return cast(tuple[Any, str], pafs.FileSystem.from_uri(f"{root}?allow_delayed_open=true"))
        return cast(tuple[Any, str], pafs.FileSystem.from_uri(root))
    except Exception as error:
        raise BadPlace(f"cannot use {root!r}: {error}") from error


def stat(place: str) -> Entry | None:
    """The file at a place, or None when there is none."""
    filesystem, path = resolve(place)
    info = filesystem.get_file_info(path)
    return _entry(place, info) if info.type == pafs.FileType.File else None


def stat_many(places: list[str]) -> list[Entry | None]:
    """`stat` of many places on one filesystem, in their order."""
    if not places:
        return []
    filesystem = resolve(places[0])[0]
    infos = filesystem.get_file_info([resolve(place)[1] for place in places])
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
    entries.sort(key=lambda entry: entry.place)
    return entries


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
        request = web.Request(url, headers={"User-Agent": "fusion"})  # noqa: S310 (the opener knows http alone)
        with opener.open(request, timeout=timeout_seconds) as response:
            while block := response.read1(64 << 10):
                data += block
                if len(data) > max_bytes:
                    raise OSError(f"it has more than the {max_bytes:,} bytes that are read")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {timeout_seconds:g} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot fetch {redacted(url)}: {error}") from error
    return bytes(data)


def sha256(place: str) -> str:
    """SHA-256 (hex) of the file's bytes."""
    digest = hashlib.sha256()
    with open_input(place) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


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


def remove_folder(folder: str) -> None:
    """Deletes a folder with all that is in it; one that is gone already is no error."""
    filesystem, path = resolve(folder)
    with suppress(FileNotFoundError):
        filesystem.delete_dir(path)


def link(source: str, target: str) -> None:
    """Makes the file `source` be at `target`, too, on the same storage: at once and without its bytes where it can.

    Neither may be written into after that, only replaced.
    """
    if is_local(source):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(FileExistsError):
                os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            folder, _, name = target.rpartition("/")
            with PendingFile(folder) as pending:
                with open(source, "rb") as stream:
                    shutil.copyfileobj(stream, cast(Any, pending), _BLOCK_BYTES)
                pending.publish(name)
        return
    filesystem, path = resolve(source)
    copy = resolve(target)[1]
    try:
        filesystem.copy_file(path, copy)
    except FileNotFoundError:
        raise
    except OSError:  # stores copy no more than 5 GB themselves
        with filesystem.open_input_file(path) as stream, filesystem.open_output_stream(copy) as sink:
            shutil.copyfileobj(stream, sink, _BLOCK_BYTES)


class PendingFile:
    """A file being written below `folder`, invisible until published. Knows its size and SHA-256. Locked while it is
    written, so that nobody takes it for one that was left behind.

    Leaving the `with` block without `publish` discards it.
    """

    def __init__(self, folder: str):
        self._folder = folder
        name = f"{os.getpid()}-{uuid.uuid4().hex}"
        if is_local(folder):
            scratch = Path(folder) / TEMPORARY
            scratch.mkdir(parents=True, exist_ok=True)
            self.path = scratch / name
        else:
            self.path = Path(tempfile.gettempdir()) / f"{_UPLOAD}{name}"
        self._stream = open(self.path, "xb")  # noqa: SIM115 (closed by close)
        self._lock = _locked(os.dup(self._stream.fileno()))
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> "PendingFile":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk what is buffered cannot go anywhere, and must not keep what is there
            self.close()
        self.path.unlink(missing_ok=True)
        self._unlock()

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

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def publish(self, name: str, durably: bool = True) -> None:
        """Makes the file visible as `folder/name`, replacing what is there; `durably`: also after a loss of power."""
        if not durably:
            self.close()
        elif not self.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.close()
        else:
            _sync(self.path)
        if not is_local(self._folder):
            _upload(self.path, join(self._folder, name))
            self._unlock()
            return
        target = Path(self._folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        self._unlock()
        if durably:
            _sync(target.parent)


def remove_stale_temporaries(folder: str) -> int:
    """Deletes temporary files for `folder` that no living job owns any more; returns how many. Those are a day old,
    or a day ahead of the clock, and not locked: a clock that jumps takes nobody's file, and leaves none for ever.

    On an object store what is unfinished is invisible; what waited here to be sent there is looked through instead.
    """
    removed = 0
    for path in _temporaries(folder):
        try:
            if is_old(path.stat().st_mtime) and not _is_locked(path):
                path.unlink()
                removed += 1
        except (FileNotFoundError, PermissionError):  # another launcher was quicker, or it is another user's
            continue
    return removed


def is_old(mtime: float) -> bool:
    """Whether something was made a day ago or earlier, as far as the clock can tell: not if it has jumped."""
    return abs(time.time() - mtime) > _STALE_SECONDS


def _locked(descriptor: int) -> int:
    """The descriptor, its file locked, where the filesystem has locks; a process that ends gives it back."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)  # NFS locks exclusively what is open for writing
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here: the age decides
        return False
    finally:
        os.close(descriptor)
    return False


def _temporaries(folder: str) -> Iterator[Path]:
    if not is_local(folder):
        return Path(tempfile.gettempdir()).glob(f"{_UPLOAD}*")
    scratch = Path(folder) / TEMPORARY
    return scratch.iterdir() if scratch.is_dir() else iter(())


def _upload(path: Path, place: str) -> None:
    filesystem, target = resolve(place)
    with open(path, "rb") as source, filesystem.open_output_stream(target) as sink:
        shutil.copyfileobj(source, sink, _BLOCK_BYTES)


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
