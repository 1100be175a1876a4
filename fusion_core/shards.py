"""Find shards and plan units: patterns in, stable ranges of shards out, with what identifies their input."""

import errno
import fnmatch
import hashlib
import logging
import posixpath
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from braceexpand import braceexpand

from fusion_core import fields, files, tabular, tars
from fusion_core.fields import Columns, Rejected
from fusion_core.fields import InputError as InputError
from fusion_core.files import Entry
from schemas.feature_table import InputSpec
from schemas.samples import InputIdentity, Layout, Unit

LOG = logging.getLogger("fusion.shards")
_TAR = (".tar", ".tar.gz", ".tgz")
_PARQUET = (".parquet", ".pq")
_IMAGE = tuple(f".{extension}" for extension in tars.IMAGES)
_CAPTION = tuple(f".{extension}" for extension in tars.CAPTIONS)
_META = f".{tars.META}"
_SHARD = (*_TAR, *_PARQUET, *tabular.LISTING_SUFFIXES)
_NOT_READ = (".tar.bz2", ".tar.lz4", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".zip", ".7z", ".arrow", ".feather")

_MAX_EXPANSION = 1_000_000
_FOOTERS_AHEAD = 64  # of Parquet files on an object store, where each costs round trips


def plan(patterns: Sequence[str], spec: InputSpec, unit_rows: int = 10_000) -> Iterator[Unit]:
    """The units of all shards that the patterns name, sorted by shard, each shard once.

    A pattern is a file, a folder (searched recursively), a glob or a brace expression, local or a URI. Raises
    InputError at once for a pattern that finds nothing, and while planning for a file without the columns needed.
    """
    if unit_rows < 1:
        raise InputError(f"expected at least 1 row in a unit, not {unit_rows}")
    if isinstance(patterns, str) or not patterns:
        raise InputError(f"expected a list of patterns, not {patterns!r}")
    found = _Found()
    for pattern in patterns:
        try:
            _find(pattern, found)
        except UnicodeDecodeError as error:
            raise InputError(f"{pattern!r}: a file name that is not UTF-8 ({error.object!r}): rename it") from error
        except ValueError as error:  # an unknown scheme, unbalanced braces
            raise (
                error if isinstance(error, InputError) else InputError(f"{files.redacted(pattern)!r}: {error}")
            ) from error
    return _Planner(found, spec, unit_rows).units()


def identity(unit: Unit) -> InputIdentity:
    """What the unit's input is now; raises OSError naming the shard when it is gone.

    A large folder is not listed again each time: there, a file that is new may be seen some seconds late.
    """
    if unit.layout == "folder":
        folder, is_fresh = _folder(unit.shard)
        samples = folder.slice(unit)
        entries = [entry for sample in samples for entry in sample.files]
        return _files_identity(folder.root, entries if is_fresh else _stats([entry.place for entry in entries]))
    entry = files.stat(unit.shard)
    if entry is None:
        raise FileNotFoundError(errno.ENOENT, "the shard is gone", unit.shard)
    if unit.layout != "listing" or not entry.size_bytes:
        return InputIdentity(entry.size_bytes, entry.mtime_ns)
    listing = tabular.Listing(unit.shard, Columns(path=unit.path_column))
    try:
        return _rows_identity(listing, entry, listing.rows(unit.start, unit.stop))[0]
    except (InputError, tabular.Damaged):  # it was neither when it was planned
        return InputIdentity(entry.size_bytes, entry.mtime_ns, "unreadable")


def missing(places: Sequence[str]) -> list[str]:
    """Which of these shards are not there any more."""
    entries = zip(places, files.stat_many(list(places)), strict=True)
    return [place for place, entry in entries if entry is None and not files.is_folder(place)]


# --- patterns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    entry: Entry
    layout: Layout
    is_asked: bool = True  # the pattern means this kind of file


@dataclass
class _Found:
    shards: dict[str, _Shard] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)  # of loose images

    def add(self, entry: Entry, is_asked: bool = True) -> bool:
        """Adds a file if it is a shard; whether it is one."""
        layout = _layout(entry.place)
        if layout:
            is_asked = is_asked or (entry.place in self.shards and self.shards[entry.place].is_asked)
            self.shards[entry.place] = _Shard(entry, layout, is_asked)
        return layout is not None

    def roots(self) -> list[str]:
        """The folders of loose images, without those below another."""
        return [root for root in self.folders if not any(root.startswith(other + "/") for other in self.folders)]


def _layout(place: str) -> Layout | None:
    name = place.lower()
    if name.endswith(_TAR):
        return "tar"
    if name.endswith(_PARQUET):
        return "parquet"
    return "listing" if tabular.is_text_listing(name) else None


def _stem(place: str) -> str:
    """The place without its shard suffix."""
    suffix = max((suffix for suffix in _SHARD if place.lower().endswith(suffix)), key=len, default="")
    return place[: len(place) - len(suffix)]


def _find(pattern: str, found: _Found) -> None:
    if _exists(files.absolute(pattern)):
        names = [pattern]  # even if it looks like a pattern
    else:
        names = _expand(pattern)
        for name in filter(_has_magic, names):
            _find_glob(files.absolute(name), found)
        names = [name for name in names if not _has_magic(name)]
    _find_named(pattern, [files.absolute(name) for name in names], found)


def _expand(pattern: str) -> list[str]:
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)  # looked at first: the library holds each in memory
    names = []
    if all(abs(int(first) - int(last)) <= _MAX_EXPANSION for first, last in ranges):
        names = list(islice(braceexpand(pattern, escape=False), _MAX_EXPANSION + 1))
    if not 0 < len(names) <= _MAX_EXPANSION:
        raise InputError(f"{pattern!r} stands for more than {_MAX_EXPANSION} places: use a glob")
    return names


def _exists(place: str) -> bool:
    try:
        return files.stat(place) is not None or files.is_folder(place)
    except ValueError:  # a URI cannot hold braces
        return False


def _find_named(pattern: str, places: list[str], found: _Found) -> None:
    missing = []
    for place, entry in zip(places, files.stat_many(places), strict=True):
        if entry:
            if not found.add(entry) and not place.endswith("_stats.json"):
                raise _unknown_kind(place)
        elif files.is_folder(place):
            _find_in_folder(place, found)
        else:
            missing.append(place)
    if missing:
        count = f" ({len(missing)} of the {len(places)} places of {pattern!r} are missing)" if len(places) > 1 else ""
        raise InputError(f"no file or folder {missing[0]!r}{count}: {_nearest(missing[0])}")


def _unknown_kind(place: str) -> InputError:
    if place.lower().endswith((*_IMAGE, *_CAPTION)):
        return InputError(f"{place!r} is a loose file: images are read by folder, name {posixpath.dirname(place)!r}")
    return InputError(f"{place!r} is of no kind that is read ({', '.join(_SHARD)}, or a folder): leave it out")


def _find_in_folder(place: str, found: _Found) -> None:
    folder, _ = _folder(place)
    packed = {_stem(entry.place) for entry in folder.entries if _layout(entry.place) == "tar"}
    n_found = 0
    for entry in folder.entries:
        if _layout(entry.place) == "parquet" and _stem(entry.place) in packed:
            continue  # img2dataset's metadata beside its tar
        n_found += found.add(entry, is_asked=False)
    if unread := [entry.place for entry in folder.entries if entry.place.lower().endswith(_NOT_READ)]:
        LOG.warning("%d files of kinds that are not read are passed over, e.g. %s: repack them as .tar, if they are to "
                    "be in", len(unread), unread[0])  # fmt: skip
    if any(sample.images for sample in folder.samples):
        found.folders.add(place)
    elif not n_found:
        held = f"{len(folder.entries)} files of other kinds" if folder.entries else "no files"
        raise InputError(f"folder {place!r} holds no shards ({', '.join(_SHARD)}) and no images: it has {held}")


def _has_magic(name: str) -> bool:
    return any(character in name for character in "*?[")


def _find_glob(pattern: str, found: _Found) -> None:
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if _has_magic(part))
    base, wanted = "/".join(parts[:first]) or "/", parts[first:]
    is_asked = wanted[-1].lower().endswith(_SHARD)
    n_files = n_found = 0
    folders: set[str] = set()
    for entry in files.list_files(base, recursive=len(wanted) > 1 or not is_asked):
        names = entry.place[len(base.rstrip("/")) + 1 :].split("/")
        if _matches(names, wanted):
            n_files += 1
            n_found += found.add(entry, is_asked)
        elif not is_asked:
            depths = (depth for depth in range(1, len(names)) if _matches(names[:depth], wanted))
            folders.update(files.join(base, *names[:depth]) for depth in islice(depths, 1))
    for folder in sorted(folders):
        _find_in_folder(folder, found)
    if not n_found and not folders:
        kinds = (
            f"; the {n_files} files that match are of other kinds (loose images are read by folder)" if n_files else ""
        )
        raise InputError(f"nothing to read matches {pattern!r}{kinds}: {_nearest(base)}")


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(_matches(names[skip:], wanted[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


def _nearest(place: str) -> str:
    """A hint: the nearest folder that exists, and what is in it."""
    folder = place
    while not files.is_folder(folder):
        parent = folder.rpartition("/")[0] or ("/" if files.is_local(folder) else "")
        if parent in (folder, "") or parent.endswith(":/"):
            return "nothing exists on the way there"
        folder = parent
    names = [entry.place.rpartition("/")[2] for entry in files.list_files(folder)]
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"the nearest folder that exists is {folder!r}, with {len(names)} files" + (f" ({listed})" if listed else "")


# --- folders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FolderSample:
    """The files of one stem. An image more than one is a row of its own, since nothing tells which was meant."""

    key: str  # the path below the root, without suffix
    images: tuple[Entry, ...]
    caption: Entry | None
    meta: Entry | None

    @property
    def rows(self) -> int:
        """How many rows the files make."""
        return max(1, len(self.images))

    @property
    def files(self) -> list[Entry]:
        """All its files."""
        return [*self.images, *(entry for entry in (self.caption, self.meta) if entry)]


@dataclass(frozen=True)
class _Folder:
    """A folder's files, as they were when it was listed."""

    root: str
    entries: list[Entry]
    listed_at: float
    seconds: float

    @cached_property
    def samples(self) -> list[FolderSample]:
        """The loose samples, sorted by key. Images at or below a listing are the listing's."""
        listings = {entry.place.rpartition("/")[0] for entry in self.entries if tabular.is_text_listing(entry.place)}
        stems: dict[str, list[Entry]] = {}
        for entry in self.entries:
            name = entry.place.lower()
            if name.endswith((*_IMAGE, *_CAPTION, _META)) and not (listings and _is_below(entry.place, listings)):
                stems.setdefault(posixpath.splitext(entry.place)[0], []).append(entry)
        below = len(self.root.rstrip("/")) + 1
        samples = (_folder_sample(stem[below:], stems[stem]) for stem in sorted(stems))
        return [sample for sample in samples if sample.images or sample.caption]

    @cached_property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [sample.key for sample in self.samples]

    def slice(self, unit: Unit) -> list[FolderSample]:
        """The samples between the unit's first and last name."""
        first, last = (posixpath.splitext(name)[0] for name in (unit.first_name, unit.last_name))
        return self.samples[bisect_left(self.keys, first) : bisect_right(self.keys, last)]


def _is_below(place: str, folders: set[str]) -> bool:
    while place := place.rpartition("/")[0]:
        if place in folders:
            return True
    return False


def _folder_sample(key: str, entries: Iterable[Entry]) -> FolderSample:
    by_suffix = [(posixpath.splitext(entry.place)[1].lower(), entry) for entry in entries]
    images = tuple(entry for suffix, entry in by_suffix if suffix in _IMAGE)
    captions = sorted((_CAPTION.index(suffix), entry.place, entry) for suffix, entry in by_suffix if suffix in _CAPTION)
    meta = next((entry for suffix, entry in by_suffix if suffix == _META), None)
    return FolderSample(key, images, captions[0][2] if captions else None, meta)


_REUSED_SECONDS = 0.5  # a listing that took longer is used again, for ten times as long as it took
_last_folder: _Folder | None = None
_listing = threading.Lock()


def _folder(root: str) -> tuple[_Folder, bool]:
    """The folder's listing, and whether it was made for this call; raises FileNotFoundError when there is no folder."""
    global _last_folder
    with _listing:
        last, now = _last_folder, time.monotonic()
        if last and last.root == root and last.seconds > _REUSED_SECONDS and now - last.listed_at < 10 * last.seconds:
            return last, False
        if not files.is_folder(root):
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", root)
        entries = files.list_files(root, recursive=True)
        _last_folder = _Folder(root, entries, now, time.monotonic() - now)
        return _last_folder, True


def folder_slice(unit: Unit) -> list[FolderSample]:
    """The samples of a folder's unit."""
    return _folder(unit.shard)[0].slice(unit)


# --- units ----------------------------------------------------------------------------------------------------------


@dataclass
class _Planner:
    found: _Found
    spec: InputSpec
    unit_rows: int
    n_passed_over: int = 0

    def units(self) -> Iterator[Unit]:
        """The units of everything found; Parquet footers on an object store are fetched ahead, in parallel."""
        places = deque(sorted([*self.found.shards, *self.found.roots()]))
        pending: deque[Iterator[Unit] | Future[list[Unit]]] = deque()
        is_empty = True
        with ThreadPoolExecutor(16) as pool:
            while places or pending:
                while places and len(pending) < _FOOTERS_AHEAD:
                    place = places.popleft()
                    is_slow = _layout(place) == "parquet" and not files.is_local(place)
                    pending.append(pool.submit(list, self._shard(place)) if is_slow else self._shard(place))
                units = pending.popleft()
                for unit in units.result() if isinstance(units, Future) else units:
                    is_empty = False
                    yield unit
        if is_empty:
            raise InputError(
                f"nothing to read: the {self.n_passed_over} Parquet files found are metadata that stand beside tars or "
                "folders of the same name: name those"
            )

    def _shard(self, place: str) -> Iterator[Unit]:
        shard = self.found.shards.get(place)
        if shard is None:
            return self._folder(place)
        if shard.layout == "tar":
            entry = shard.entry
            return iter([Unit(_unit_id(place), "tar", place, InputIdentity(entry.size_bytes, entry.mtime_ns))])
        return self._parquet(shard) if shard.layout == "parquet" else self._listing(shard.entry, None)

    def _parquet(self, shard: _Shard) -> Iterator[Unit]:
        place, now = shard.entry.place, InputIdentity(shard.entry.size_bytes, shard.entry.mtime_ns)
        try:
            with tabular.Parquet(place) as parquet:
                columns = fields.find_columns(parquet.schema, self.spec, place)
                group_rows = parquet.group_rows
        except tabular.Damaged:  # becomes a dead letter when it is read
            yield Unit(_unit_id(place, 0), "parquet", place, now)
            return
        except InputError:
            if not _is_sidecar(place):
                raise
            self.n_passed_over += 1
            return
        if columns.path:
            if not shard.is_asked:
                self._refuse_overlap(place)
            yield from self._listing(shard.entry, columns)
            return
        first_row = 0
        for start, stop in _group_ranges(group_rows, self.unit_rows):
            rows = sum(group_rows[start:stop])
            yield Unit(_unit_id(place, start), "parquet", place, now, start, stop, first_row, rows)
            first_row += rows

    def _refuse_overlap(self, place: str) -> None:
        """A Parquet listing and loose images below it name the same images twice."""
        folder = place.rpartition("/")[0]
        for root in self.found.roots():
            if f"{root}/".startswith(f"{folder}/") or f"{folder}/".startswith(f"{root}/"):
                raise InputError(
                    f"{place} lists images by path, and {root} holds loose images: name one of the two, the listing "
                    "itself or a folder without it"
                )

    def _listing(self, entry: Entry, columns: Columns | None) -> Iterator[Unit]:
        place = entry.place
        if not entry.size_bytes:  # becomes a dead letter when it is read
            yield Unit(_unit_id(place, 0), "listing", place, InputIdentity(0, entry.mtime_ns))
            return
        columns = columns or tabular.listing_columns(place, self.spec)
        listing, start = tabular.Listing(place, columns), 0
        rows = listing.rows()
        while True:
            now, n_rows = _rows_identity(listing, entry, islice(rows, self.unit_rows))
            if not n_rows and start:
                return
            stop = start + n_rows
            yield Unit(
                _unit_id(place, start), "listing", place, now, start, stop, start, n_rows, path_column=columns.path
            )
            if n_rows < self.unit_rows:
                return
            start = stop

    def _folder(self, root: str) -> Iterator[Unit]:
        below = len(root.rstrip("/")) + 1
        start, samples = 0, iter(_folder(root)[0].samples)
        while chunk := _take_rows(samples, self.unit_rows):
            rows = sum(sample.rows for sample in chunk)
            now = _files_identity(root, [entry for sample in chunk for entry in sample.files])
            first, last = (sample.files[0].place[below:] for sample in (chunk[0], chunk[-1]))
            yield Unit(_unit_id(root, start), "folder", root, now, start, start + rows, start, rows, first, last)
            start += rows


def _take_rows(samples: Iterator[FolderSample], unit_rows: int) -> list[FolderSample]:
    chunk, rows = [], 0
    for sample in samples:
        chunk.append(sample)
        rows += sample.rows
        if rows >= unit_rows:
            break
    return chunk


def _group_ranges(group_rows: Sequence[int], unit_rows: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of row groups, none of more rows than asked unless it is a single group; at least one range."""
    start = rows = 0
    for group, n_rows in enumerate(group_rows):
        if group > start and rows + n_rows > unit_rows:
            yield start, group
            start, rows = group, 0
        rows += n_rows
    yield start, len(group_rows)


def _is_sidecar(place: str) -> bool:
    """Whether a tar or folder of the same name stands beside a Parquet file."""
    stem = _stem(place)
    return any(files.stat(stem + suffix) for suffix in _TAR) or files.is_folder(stem)


def _unit_id(place: str, start: int | None = None) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", _stem(place).rstrip("/").rpartition("/")[2]).lstrip(".")[:60] or "shard"
    digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{stem}-{digest}" + ("" if start is None else f"-{start:08d}")


# --- identity -------------------------------------------------------------------------------------------------------


def _files_identity(root: str, entries: Iterable[Entry | None], seed: bytes = b"") -> InputIdentity:
    """Size, latest mtime and SHA-256 over the names, sizes and mtimes of the files, None being one that is missing."""
    digest, size_bytes, mtime_ns = hashlib.sha256(seed), 0, 0
    below = len(root.rstrip("/")) + 1
    for entry in entries:
        if entry is None:
            digest.update(b"missing\n")
            continue
        line = f"{entry.place[below:]}\0{entry.size_bytes}\0{entry.mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        size_bytes, mtime_ns = size_bytes + entry.size_bytes, max(mtime_ns, entry.mtime_ns)
    return InputIdentity(size_bytes, mtime_ns, digest.hexdigest())


def _rows_identity(listing: tabular.Listing, entry: Entry, rows: Iterable[tabular.Row]) -> tuple[InputIdentity, int]:
    """The identity of some rows of a listing and of the images that they name, and how many rows there are.

    Appending rows to a listing of text leaves the identity of those before as it is.
    """
    is_text = tabular.is_text_listing(entry.place)
    digest = hashlib.sha256(b"" if is_text else f"{entry.size_bytes} {entry.mtime_ns}".encode())
    places, n_rows = [], 0
    for row in rows:
        n_rows += 1
        digest.update(row.text + b"\n")
        path = row.values.get(listing.columns.path)
        if isinstance(path, str) and path:
            try:
                places.append(listing.image_place(path))
            except Rejected:
                continue
    folder = listing.place.rpartition("/")[0]
    return _files_identity(folder, _stats(places), digest.digest()), n_rows


def _stats(places: list[str]) -> list[Entry | None]:
    try:
        return files.stat_many(places)
    except (OSError, ValueError):  # one name that cannot be a file's fails them all
        return [_stat(place) for place in places]


def _stat(place: str) -> Entry | None:
    try:
        return files.stat(place)
    except ValueError:
        return None
    except OSError as error:
        if is_missing(error):
            return None
        raise


def is_missing(error: OSError) -> bool:
    """Whether the error is about this file (it does not exist, or may not be read), not about storage as a whole."""
    return error.errno in _ABOUT_THE_FILE


_ABOUT_THE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EILSEQ,
}
