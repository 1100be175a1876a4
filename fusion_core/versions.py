"""Versions of an index, side by side: a folder each, and current.json, which says by one replacement what is current.

    INDEX/current.json    INDEX/<version>/index.json, vectors-….faiss, …

Whoever opens INDEX gets the current version (index.Index.open). A new one begins as the current one's files under
other names: hard links locally, copies made by an object store itself; so it costs what is new, and `fusion index`
works on it as on any index. What the pointer does not name is a candidate: of a run that died or was refused. The
next run goes on with it.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from fusion_core import files
from schemas import records
from schemas.index import IndexRecord
from schemas.job import IndexVersion, IndexVersions

POINTER = "current.json"
_RECORD = "index.json"
_GRACE_SECONDS = 3600.0
_VERSION = re.compile(r"\d{8}T\d{9}Z-[0-9a-f]{8}")


def standing(place: str) -> str:
    """Where the index at `place` lies: the current version's folder, or `place` itself where there are no versions."""
    found = read(place)
    return files.join(place, found.current) if found else place


def read(place: str) -> IndexVersions | None:
    """The versions at `place`; None where there are none. Raises SchemaMismatch for a pointer to anywhere else."""
    where = files.join(place, POINTER)
    try:
        found = records.from_json(IndexVersions, files.read_bytes(where), where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not all(_VERSION.fullmatch(name) for name in (found.current, *(version.id for version in found.versions))):
        raise records.SchemaMismatch(f"{where} names a version that is none: {found.current!r}")
    return found


def begin(place: str, version: str) -> str:
    """The folder to build the next version in: the candidate that a run left, or else a new one, `version`, with the
    files of the current one.
    """
    known, left = read(place), candidates(place)
    for older in left[:-1]:
        discard(files.join(place, older))
    target = files.join(place, left[-1] if left else version)
    if known and files.stat(files.join(target, _RECORD)) is None:
        _link(files.join(place, known.current), target)
    return target


def candidates(place: str) -> list[str]:
    """The folders of versions that never became current, oldest first."""
    known = read(place)
    return sorted(_folders(place) - ({item.id for item in known.versions} if known else set()))


def discard(folder: str) -> None:
    """Removes a version's folder, the record first, so that nobody finds half an index."""
    files.remove(files.join(folder, _RECORD))
    files.remove_folder(folder)


def publish(place: str, version: str, run: str, options: tuple[str, ...], keep: int, opt_out_sha256: str = "") -> None:
    """Makes the version current, at once, and removes what is more than `keep` versions ago.

    Not, however, one that was current less than an hour ago: a reader may just have been told of it.
    """
    before, now = read(place), datetime.now(UTC)
    at = now.isoformat(timespec="seconds")
    older: list[IndexVersion] = []
    if before:  # after a roll-back the newest is not the one to go back to
        others = [item for item in before.versions if item.id not in (version, before.current)]
        current = [item for item in before.versions if item.id == before.current != version]
        older = [*(replace(item, replaced_at=at) for item in current), *others]
    new = IndexVersion(version, run, at, options, opt_out_sha256=opt_out_sha256)
    _point(place, version, [new, *older])
    stay = older[: keep - 1] + [
        item for item in older[keep - 1 :] if _seconds_since(item.replaced_at, now) < _GRACE_SECONDS
    ]
    if len(stay) < len(older):
        _point(place, version, [new, *stay])
        for item in older:
            if item not in stay:
                discard(files.join(place, item.id))


def hold_against(place: str, opt_out_sha256: str, has_listed: Callable[[str], bool]) -> bool:
    """Removes the versions that have keys of an opt-out list, at once; the current one stays: whether it has any.

    `has_listed` tells it of a version's folder. It is asked once for each list, of what has none.
    """
    found = read(place)
    if not found:
        return False
    asked = [item for item in found.versions if item.opt_out_sha256 != opt_out_sha256]
    having = {item.id for item in asked if has_listed(files.join(place, item.id))}
    items = [item if item.id in having else replace(item, opt_out_sha256=opt_out_sha256) for item in found.versions]
    stay = [item for item in items if item.id not in having - {found.current}]
    if stay != list(found.versions):
        _point(place, found.current, stay)
    for version in having - {found.current}:
        discard(files.join(place, version))
    return found.current in having


def restate(place: str, options: tuple[str, ...]) -> None:
    """Records that the current version is what these other options would give, too."""
    found = read(place)
    if found:
        items = [replace(item, options=options) if item.id == found.current else item for item in found.versions]
        _point(place, found.current, items)


def roll_back(place: str) -> IndexVersion | None:
    """Makes the version before the current one current, and returns it; None where there is none."""
    found = read(place)
    names = [item.id for item in found.versions] if found else []
    if not found or found.current not in names[:-1]:
        return None
    earlier = found.versions[names.index(found.current) + 1]
    at = datetime.now(UTC).isoformat(timespec="seconds")
    items = [replace(item, replaced_at=at) if item.id == found.current else item for item in found.versions]
    _point(place, earlier.id, items)
    return earlier


def _point(place: str, current: str, items: list[IndexVersion]) -> None:
    files.write_bytes(place, POINTER, records.to_json(IndexVersions(current, tuple(items)), indent=2))


def _seconds_since(at: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(at)).total_seconds() if at else float("inf")


def _folders(place: str) -> set[str]:
    below = len(place.rstrip("/")) + 1
    names = {entry.place[below:].partition("/")[0] for entry in files.list_files(place, recursive=True)}
    return {name for name in names if _VERSION.fullmatch(name)}


def _link(source: str, target: str) -> None:
    """The record comes last; without it what lies there is not an index, and one is built anew."""
    where = files.join(source, _RECORD)
    with suppress(FileNotFoundError):  # of a version that lost its files, or all of its folder
        record = records.from_json(IndexRecord, files.read_bytes(where), where)
        for part in record.files:
            files.link(files.join(source, part.path), files.join(target, part.path))
        files.link(where, files.join(target, _RECORD))
