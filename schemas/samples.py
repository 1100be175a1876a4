"""What travels inside a job: the unit of work, the sample, and the dead letter of a sample that could not be used."""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import pyarrow as pa

Layout = Literal["tar", "parquet", "folder", "listing"]


class InputIdentity(msgspec.Struct, frozen=True, gc=False):
    """What tells whether a unit's input is still what it was when its part was written."""

    size_bytes: int
    mtime_ns: int
    checksum: str = ""  # of the listing's slice, where a unit covers many files


class Unit(msgspec.Struct, frozen=True, gc=False):
    """A stable range of one shard: the atom of work, of commit and of resume.

    `start` and `stop` count row groups in a Parquet shard, rows in a listing, sorted samples in a folder, and are 0 for
    a tar, which is always one unit. `first_row` is the row number, in the shard, of the unit's first sample.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[\w-][\w.-]*$")]  # names files
    layout: Layout
    shard: str
    identity: InputIdentity
    start: int = 0
    stop: int = 0
    first_row: int = 0
    rows: int | None = None  # how many samples, where the shard says so before it is read
    first_name: str = ""  # a folder's slice: its first and last file, by relative path
    last_name: str = ""
    path_column: str = ""  # a listing's column of image paths


@dataclass(frozen=True, slots=True)
class Sample:
    """One image–caption pair as read, still encoded. Either modality may be absent.

    `offset` and `length` give the image's byte range in the shard, where it lies there as plain bytes.
    """

    key: str
    row: int
    image: bytes | None = None
    caption: str | None = None
    url: str | None = None
    meta: str | None = None  # the sidecar JSON, or the other columns as JSON
    offset: int | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A sample that is not in the feature table, and why. Its bytes stay in the shard.

    A dead letter wins over a sample of the same row that was read before it: a key whose members turn out to be
    scattered is known only when its second piece comes.
    """

    key: str
    row: int
    stage: str
    error: str
    message: str
    offset: int | None = None


# The closed list of dead-letter errors: what happened, and what to do.
ERRORS = {
    "EmptySample": "neither an image nor a caption: add one, or remove the sample",
    "CaptionNotUtf8": "the caption is not UTF-8: re-encode it",
    "MetadataNotJson": "the sidecar JSON does not parse: repair or remove it",
    "DuplicateKey": "the key stands earlier in the same shard: rename one of the two",
    "ScatteredKey": "the members of one key are not adjacent: re-pack the shard sorted by name",
    "TruncatedShard": "the shard ends in the middle: copy it again; what stands before the cut is kept",
    "CorruptShard": "the shard cannot be read past this place: copy it again; what stands before is kept",
    "EmptyImage": "zero bytes: fetch the image again",
    "NotAnImage": "the bytes are no image format that we know",
    "UnsupportedImage": "an image format or pixel type that is not read",
    "TruncatedImage": "the image ends early: fetch it again",
    "CorruptImage": "the image's data is damaged: fetch it again",
    "DecoderCrashed": "the decoder crashed or hung at it, which cost its process: fetch the image again, and report it",
    "TooManyPixels": "more pixels than --max-pixels",
    "TooManyBytes": "more bytes than --max-image-bytes (images) or the limit of captions and sidecars",
    "ImageNotEmbedded": "the row names a path but holds no bytes: embed the images, or use a listing",
    "PathOutsideRoot": "the path leads out of the listing's folder: move the image below it",
    "BrokenRow": "the listing's row does not parse, or has another number of cells than there are columns: repair it",
    "BrokenVector": "an imported vector is all zeros or not finite: embed the sample again",
    "MissingFile": "the listed image does not exist or cannot be read",
}

DEAD_LETTERS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)
