"""The feature table's contract: its spec (table.json), the Arrow schema of its parts, and its manifest records."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
import pyarrow as pa

from schemas import records
from schemas.fuser import FuserSpec
from schemas.samples import Unit

Precision = Literal["fp32", "bf16", "fp16"]

EMBEDDINGS = ("image_embedding", "text_embedding", "fused_embedding")
WEIGHTS = "fusion_weights"  # (image, text), together 1 where the row has either
ROW_GROUP_ROWS = 8192  # of every row group of a part but its last
KEY_DIGEST_BYTES = 16  # of the SHA-256 of a key on an opt-out list


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the tower's input, in open_clip's own terms: resize, crop, then (x / 255 - mean) / std."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0


@dataclass(frozen=True)
class TowerSpec:
    """Which towers embedded the rows. `model` and `pretrained` say where they were found; the hashes decide."""

    model: str
    pretrained: str
    config_sha256: str
    weights_sha256: str
    embedding_dim: int
    precision: Precision
    preprocess: Preprocess

    @property
    def backbone(self) -> str:
        """SHA-256 (hex) over what makes vectors comparable: not where the towers lay, nor their precision."""
        return records.fingerprint(replace(self, model="", pretrained="", precision="fp32"))


@dataclass(frozen=True)
class InputSpec:
    """What decides, beside the shards themselves, which rows come out of them. Columns not named go by convention."""

    image_column: str = ""
    caption_column: str = ""
    key_column: str = ""
    url_column: str = ""
    max_image_bytes: int = 64 << 20
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class TableSpec:
    """What a feature table holds (table.json). Two tables with one fingerprint hold the same kind of rows.

    A trained fuser lies below the table, at `fusers/<the first 16 digits of its fingerprint>`.
    """

    tower: TowerSpec
    input: InputSpec = InputSpec()
    fuser: FuserSpec | None = None
    fusion_weights: bool = False  # since 1.1: a column says how much each modality weighed in a row
    imported: str = ""  # since 1.1: the layout whose vectors these are; then no row was embedded by us
    text_tower: TowerSpec | None = None  # since 1.1: what embedded the captions, where `tower` did the images only
    schema_version: str = "1.1"

    @property
    def backbone(self) -> str:
        """SHA-256 (hex) over what makes vectors comparable; the tower's own, where one model embedded both sides."""
        if self.text_tower is None or self.text_tower.backbone == self.tower.backbone:
            return self.tower.backbone
        return records.fingerprint([self.tower.backbone, self.text_tower.backbone])

    @property
    def models(self) -> str:
        """The name of the model, or of both, for a reader."""
        return f"{self.tower.model}, captions by {self.text_tower.model}" if self.text_tower else self.tower.model

    @property
    def decisive(self) -> "TableSpec":
        """The spec without what only tells where things were found, or which release wrote it."""
        text = self.text_tower and replace(self.text_tower, model="", pretrained="")
        tower = replace(self.tower, model="", pretrained="")
        return replace(self, tower=tower, text_tower=text, schema_version=records.VERSION)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what decides the rows."""
        decisive: dict[str, object] = msgspec.to_builtins(self.decisive)
        for name in ("fusion_weights", "imported", "text_tower"):
            if not decisive[name]:
                del decisive[name]  # so that tables of 1.0 keep their fingerprint
        return records.fingerprint(decisive)


# A record may come with a table that somebody else made: no path in it leads out of the table's folder.
PathBelow = Annotated[str, msgspec.Meta(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]


class Part(msgspec.Struct, frozen=True, gc=False):
    """One Parquet file of a table, by its path below the table."""

    path: PathBelow
    rows: int
    size_bytes: int
    sha256: str


class ManifestRecord(msgspec.Struct, frozen=True, gc=False):
    """One unit, committed: what was read, what came out, and what it cost. The highest revision of a unit counts.

    This and what it holds are structs that the garbage collector does not look at: a table may have a million.
    """

    unit: Unit
    spec_fingerprint: str
    rows_in: int
    rows_out: int
    rows_dead: int
    features: Part | None = None
    dead_letters: Part | None = None
    revision: int = 0
    removed: bool = False  # the unit is no part of its shard's plan any more; its parts are gone
    repeated_keys: int = 0  # rows whose key stands earlier in the unit (Parquet and listings, where that is legal)
    rows_reused: int = 0  # rows that needed no forward: known from the earlier part, or equal to a row before
    errors: dict[str, int] = {}  # dead letters by error
    seconds: dict[str, float] = {}  # by stage; "unit" is the whole
    versions: dict[str, str] = {}
    finished_at: str = ""  # UTC, ISO 8601
    source_sha256: str = ""  # since 1.1: of the other table's unit that `fusion fuse` made this one from
    rows_opted_out: int = 0  # since 1.1, as what follows: samples left out because of their keys
    opted_out: bytes = b""  # of those keys, the first 16 bytes of the SHA-256 of each, sorted
    opt_out_sha256: str = ""  # of the list of which the unit holds no key; empty: of none
    schema_version: str = "1.1"


@dataclass(frozen=True)
class RunRecord:
    """One execution of a job on a table, as its launcher last saw it (runs/<id>.json)."""

    id: str
    command: str
    host: str
    pid: int
    started_at: str  # UTC, ISO 8601, as are the others
    updated_at: str
    units_planned: int
    units_skipped: int
    units_done: int = 0
    units_failed: int = 0
    units_removed: int = 0  # since 1.1, as the next three
    rows_removed: int = 0  # that the units removed had
    rows_opted_out: int = 0  # that were taken out of recorded units
    opt_out_sha256: str = ""  # of the list that the run was given
    samples_done: int = 0
    samples_planned: int | None = None
    state: Literal["running", "done", "failed", "interrupted"] = "running"
    failures: tuple[str, ...] = ()
    schema_version: str = "1.1"


def features_schema(spec: TableSpec) -> pa.Schema:
    """The Arrow schema of a features part; its metadata repeats the spec, so that a lone part explains itself."""

    def vector(dim: int) -> pa.DataType:
        return pa.list_(pa.field("element", pa.float16(), nullable=False), dim)

    dim = spec.tower.embedding_dim
    fused = [pa.field("fused_embedding", vector(spec.fuser.out_dim), nullable=False)] if spec.fuser else []
    fused += [pa.field(WEIGHTS, vector(2), nullable=False)] if spec.fuser and spec.fusion_weights else []
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shard", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("offset", pa.int64()),
            pa.field("length", pa.int64()),
            pa.field("caption", pa.string()),
            pa.field("url", pa.string()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("sha256", pa.binary(32)),
            pa.field("has_image", pa.bool_(), nullable=False),
            pa.field("has_text", pa.bool_(), nullable=False),
            pa.field("image_embedding", vector(dim), nullable=False),
            pa.field("text_embedding", vector(dim), nullable=False),
            *fused,
            pa.field("similarity", pa.float32()),
            pa.field("meta", pa.string()),
        ],
        metadata={b"fusion.table_spec": records.to_json(spec)},
    )
