"""How every JSON record of ours is written, read, versioned and hashed.

The compatibility rule: a record carries `schema_version` "major.minor". A reader of major M reads every M.x: fields it
does not know are ignored, fields that came with a later minor have defaults. Another major is refused.
"""

import hashlib
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from schemas.errors import UserError

VERSION = "1.0"
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for bytes that are none

RecordT = TypeVar("RecordT")


class SchemaMismatch(UserError):
    """A file does not hold the record, version or columns that its reader expects."""


def to_json(record: Any, indent: int = 0) -> bytes:
    """The record as JSON bytes, fields in their declared order."""
    encoded = msgspec.json.encode(record)
    return msgspec.json.format(encoded, indent=indent) if indent else encoded


def from_json(kind: type[RecordT], data: bytes, where: str) -> RecordT:
    """The record in `data`; raises SchemaMismatch naming `where` when it is another version or not such a record."""
    try:
        record: RecordT = _decoder(cast(Any, kind)).decode(data)
    except NOT_JSON as error:
        _check_version(data, where)
        raise SchemaMismatch(f"{where} is not a {kind.__name__} record: {error}") from error
    if not _is_readable(getattr(record, "schema_version", "")):
        _check_version(data, where)
    return record


class OtherVersion(SchemaMismatch):
    """A file was written by a release whose records this one does not read."""


@cache
def _decoder(kind: type[Any]) -> Any:
    return msgspec.json.Decoder(kind)


def _is_readable(version: str) -> bool:
    return version.partition(".")[0] == VERSION.partition(".")[0]


def _check_version(data: bytes, where: str) -> None:
    """Raises SchemaMismatch where the data says that it is of another version."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
    except NOT_JSON:
        return
    if not _is_readable(version):
        raise OtherVersion(
            f"{where} has schema version {version!r}; this release reads {VERSION.partition('.')[0]}.x: "
            "use the release that wrote it, or write it anew"
        )


def fingerprint(record: Any) -> str:
    """SHA-256 (hex) over the record's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(record), order="deterministic")).hexdigest()


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """One line for each leaf in which two records differ, like `tower.precision: 'bf16' here, 'fp32' there`."""
    ours, theirs = msgspec.to_builtins(ours), msgspec.to_builtins(theirs)
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [f"{prefix.rstrip('.')}: {ours!r} here, {theirs!r} there"]
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        lines += differences(ours.get(name), theirs.get(name), f"{prefix}{name}.")
    return lines


class _Versioned(msgspec.Struct):
    schema_version: str
