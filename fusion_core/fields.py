"""Which column or sidecar field means what: image, path, caption, key, url; everything else is `meta`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.types as pat

from schemas.errors import UserError
from schemas.feature_table import InputSpec
from schemas.samples import DeadLetter

TEXT_BYTES = 1 << 20  # a caption, a sidecar or a listing's row is never longer

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "img_bytes", "image_data", "bytes")
PATH_COLUMNS = ("image_path", "filepath", "file_path", "filename", "file_name", "path", "image", "file")
CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "prompt", "description", "alt_text", "TEXT")
KEY_COLUMNS = ("key", "__key__")
URL_COLUMNS = ("url", "URL", "image_url")


class InputError(UserError):
    """The input is not what was asked for, found before work starts: what was expected, the value, the remedy."""


class Rejected(Exception):
    """One sample cannot be used; becomes its dead letter."""

    def __init__(self, stage: str, error: str, message: str):
        super().__init__(message)
        self.stage, self.error, self.message = stage, error, message

    def letter(self, key: str, row: int, offset: int | None = None) -> DeadLetter:
        """The dead letter of the sample that this happened to."""
        return DeadLetter(key, row, self.stage, self.error, self.message, offset)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a cell whose bytes are not a value of the column's type."""

    message: str


@dataclass(frozen=True)
class Columns:
    """The columns of one file by what they mean; `rest` goes into `meta`. Exactly one of `image` and `path` is set."""

    image: str = ""  # holds encoded images
    path: str = ""  # names image files
    caption: str = ""
    key: str = ""
    url: str = ""
    rest: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        return [name for name in (self.image, self.path, self.caption, self.key, self.url, *self.rest) if name]


# --- columns by convention ------------------------------------------------------------------------------------------


def find_columns(schema: pa.Schema, spec: InputSpec, place: str) -> Columns:
    """The columns that `spec` names or convention finds; raises InputError, listing the columns there are."""
    _refuse_repeated(schema, place)
    image = _pick(schema, "image", spec.image_column, IMAGE_COLUMNS, _is_image, place, else_of=is_text)
    path = ""
    if spec.image_column and not _is_image(schema.field(image).type):
        image, path = "", image
    elif not image:
        path = _pick(schema, "image", "", PATH_COLUMNS, is_text, place)
    if not image and not path:
        raise InputError(
            f"{place} has no column of images (expected {', '.join(IMAGE_COLUMNS)}: binary or struct<bytes, path>) "
            f"or of their paths ({', '.join(PATH_COLUMNS)}: string); it has {describe(schema)}: "
            "name the column with --image-column"
        )
    caption = _pick(schema, "caption", spec.caption_column, CAPTION_COLUMNS, _is_caption, place)
    key = _pick(schema, "key", spec.key_column, KEY_COLUMNS, _is_scalar, place)
    url = _pick(schema, "url", spec.url_column, URL_COLUMNS, is_text, place)
    taken = {image, caption, key, url}  # not the path: it stays visible in `meta`
    rest = tuple(field.name for field in schema if field.name not in {*taken, path} and is_jsonable(field.type))
    return Columns(image, path, caption, key, url, rest)


def describe(schema: pa.Schema) -> str:
    """The columns with their types, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "no columns"


def _pick(
    schema: pa.Schema,
    role: str,
    named: str,
    conventional: Sequence[str],
    accepts: Any,
    place: str,
    else_of: Any = None,
) -> str:
    if named:
        if named not in schema.names:
            raise InputError(f"{place} has no column {named!r} (--{role}-column); it has {describe(schema)}")
        kind = schema.field(named).type
        if not accepts(kind) and not (else_of and else_of(kind)):
            raise InputError(f"column {named!r} of {place} is {kind}, which cannot be the {role} (--{role}-column)")
        return named
    for name in conventional:
        if name in schema.names and accepts(schema.field(name).type):
            return name
    folded = {field.name.lower(): field.name for field in reversed(list(schema)) if accepts(field.type)}
    return next((folded[name.lower()] for name in conventional if name.lower() in folded), "")


def _refuse_repeated(schema: pa.Schema, place: str) -> None:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise InputError(f"{place} has more than one column {repeated[0]!r}; it has {describe(schema)}: rename one")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return bool(pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds byte strings of any length."""
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_binary_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    if pat.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and is_bytes(kind.field(index).type)
    return is_bytes(kind)


def _is_caption(kind: pa.DataType) -> bool:
    return is_text(kind) or is_bytes(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_caption(kind) or (is_jsonable(kind) and not pat.is_nested(kind))


def is_jsonable(kind: pa.DataType) -> bool:
    """Whether values of this type can stand in `meta`."""
    if pat.is_dictionary(kind):
        return is_jsonable(kind.value_type)
    if pat.is_nested(kind):
        return not pat.is_union(kind) and all(is_jsonable(kind.field(i).type) for i in range(kind.num_fields))
    return is_text(kind) or bool(
        pat.is_boolean(kind)
        or pat.is_integer(kind)
        or pat.is_floating(kind)
        or pat.is_decimal(kind)
        or pat.is_date(kind)
        or pat.is_time(kind)
        or pat.is_timestamp(kind)
        or pat.is_duration(kind)
    )


# --- one row or sidecar ---------------------------------------------------------------------------------------------


def row_key(values: Mapping[str, object], columns: Columns, default: str) -> str:
    """The row's key as a string, or `default` where the row has none that can be read."""
    value = values.get(columns.key) if columns.key else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return default if value is None or isinstance(value, Unreadable) else clean(str(value))


def row_texts(values: Mapping[str, object], columns: Columns) -> tuple[str | None, str | None, str | None]:
    """The row's caption, url and `meta`; raises Rejected."""
    caption = values.get(columns.caption) if columns.caption else None
    if isinstance(caption, bytes):
        caption = decode_caption(caption)
    _check_text(caption, "caption", "CaptionNotUtf8", f"column {columns.caption!r}")
    url = values.get(columns.url) if columns.url else None
    _check_text(url, "meta", "MetadataNotJson", f"column {columns.url!r}")
    taken = (columns.image, columns.caption, columns.key, columns.url)
    rest = {name: value for name, value in values.items() if name not in taken}
    return caption, url, to_json(rest) if rest else None  # type: ignore[return-value]


def _check_text(value: object, stage: str, error: str, what: str) -> None:
    if value is None:
        return
    if isinstance(value, Unreadable):
        raise Rejected(stage, error, f"{what}: {value.message}")
    if not isinstance(value, str):
        raise Rejected(stage, error, f"{what} holds {str(value)[:80]!r} ({type(value).__name__}), not a string")
    size_bytes = _utf8_bytes(value, stage, error, what)
    if size_bytes > TEXT_BYTES:
        raise Rejected(stage, "TooManyBytes", f"{what} holds {size_bytes} bytes, more than {TEXT_BYTES}")


def _utf8_bytes(value: str, stage: str, error: str, what: str) -> int:
    """The string's length as UTF-8; raises Rejected for lone surrogates."""
    try:
        return len(value.encode())
    except UnicodeEncodeError as problem:
        raise Rejected(stage, error, f"{what} is not UTF-8 at character {problem.start}") from problem


def to_json(values: Mapping[str, object]) -> str:
    """The values as a JSON object, for `meta`; raises Rejected."""
    for name, value in values.items():
        if isinstance(value, Unreadable):
            raise Rejected("meta", "MetadataNotJson", f"column {name!r}: {value.message}")
    try:
        text = msgspec.json.encode(values)  # NaN and infinities become null, dates ISO 8601
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise Rejected("meta", "MetadataNotJson", f"the columns cannot be written as JSON: {error}") from error
    if len(text) > TEXT_BYTES:
        raise Rejected("meta", "TooManyBytes", f"the columns make {len(text)} bytes of JSON, more than {TEXT_BYTES}")
    return text.decode()


def decode_caption(data: bytes) -> str:
    """The caption in a file's bytes, as it stands there; raises Rejected."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        message = f"byte {error.start} of the caption is 0x{data[error.start]:02x}: {error.reason}"
        raise Rejected("caption", "CaptionNotUtf8", message) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; raises Rejected."""
    try:
        parsed = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise Rejected("meta", "MetadataNotJson", f"{error} in {data[:80]!r}") from error
    if not isinstance(parsed, dict):
        message = f"expected a JSON object, found {type(parsed).__name__} {data[:80]!r}"
        raise Rejected("meta", "MetadataNotJson", message)
    return parsed


def sidecar_texts(data: bytes) -> tuple[str | None, str | None, str]:
    """The caption, the url and the whole text of a JSON sidecar; raises Rejected."""
    parsed = parse_object(data)
    caption, url = (value if isinstance(value := parsed.get(name), str) else None for name in ("caption", "url"))
    if caption is not None:
        _utf8_bytes(caption, "caption", "CaptionNotUtf8", "the sidecar's caption")
    if url is not None:
        _utf8_bytes(url, "meta", "MetadataNotJson", "the sidecar's url")
    return caption, url, data.decode()


def clean(name: str) -> str:
    """The name with what UTF-8 cannot hold (bytes of another encoding in a file name, half a surrogate pair from JSON)
    written as escapes.
    """
    for errors in ("strict", "surrogateescape"):
        with suppress(UnicodeEncodeError):
            return name.encode("utf-8", errors).decode("utf-8", "backslashreplace")
    return name.encode("utf-8", "backslashreplace").decode()
