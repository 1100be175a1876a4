"""The contract of columns that stand beside a table's rows: labels (labels.json) and captions (captions.json)."""

from dataclasses import dataclass, field

import pyarrow as pa

from schemas import records
from schemas.feature_table import Part, TableSpec

NONE = "none"  # the label of a picture that is like none of the labels
MAX_COLUMNS = 100  # more labels than this have no column P(label) each


@dataclass(frozen=True)
class LabelSpec:
    """What decides a row's labels, beside its image embedding and the table's towers."""

    classes: tuple[tuple[str, tuple[str, ...]], ...]  # each label with the phrases that stand for it
    templates: tuple[str, ...]  # prompts with {} for the phrase
    top_k: int = 5
    threshold: float | None = None  # "none" below this cosine of picture and label
    scale: float = 100.0  # of the cosines before the softmax: the model's own
    temperature: float = 1.0  # they are divided by it; fitted on labelled rows if asked for


@dataclass(frozen=True)
class LabelRecord:
    """The labels of a table's rows (labels.json). Written last.

    `outputs` are row-aligned with `parts`: as many, in the same order, each with the rows of its part in their order.
    """

    table: str  # where the table was
    table_spec: TableSpec
    parts: tuple[Part, ...]  # of the table, in manifest order
    spec: LabelSpec
    outputs: tuple[Part, ...]
    rows: int
    counts: dict[str, int]  # rows by label
    fitted_rows: int = 0  # that the temperature was fitted on
    nll: tuple[float, float] | None = None  # on rows held out of that fit: at temperature 1, and at the fitted one
    seconds: dict[str, float] = field(default_factory=dict)
    schema_version: str = records.VERSION


@dataclass(frozen=True)
class CaptionSpec:
    """What decides a generated caption, beside the picture."""

    model: str
    pretrained: str
    config_sha256: str
    weights_sha256: str
    precision: str
    max_tokens: int = 30


@dataclass(frozen=True)
class CaptionRecord:
    """Generated captions of a table's rows (captions.json), laid out as `LabelRecord` is. Written last."""

    table: str
    table_spec: TableSpec
    parts: tuple[Part, ...]
    spec: CaptionSpec
    outputs: tuple[Part, ...]
    rows: int
    captioned: int
    errors: dict[str, int]  # rows that should have got a caption and did not, by reason
    seconds: dict[str, float] = field(default_factory=dict)
    schema_version: str = records.VERSION


_ROW = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
]


def labels_schema(spec: LabelSpec) -> pa.Schema:
    """The columns beside a table's rows: all but the first three are null where the row has no image.

    `label` is the best one or "none", `probability` its own (null for "none") and `cosine` that of the best;
    `top_labels` and `top_probabilities` hold the best `top_k`, best first; a column `P(label)` for each of at most 100.
    """
    each = [name for name, _ in spec.classes] if len(spec.classes) <= MAX_COLUMNS else []
    return pa.schema(
        [
            *_ROW,
            pa.field("label", pa.string()),
            pa.field("probability", pa.float32()),
            pa.field("cosine", pa.float32()),
            pa.field("top_labels", pa.list_(pa.string())),
            pa.field("top_probabilities", pa.list_(pa.float32())),
            *(pa.field(f"P({name})", pa.float32()) for name in each),
        ]
    )


# `caption_gen` and `caption_model` are null where the row has a caption of its own or no image; `error` and `message`
# say why a row that should have got one has none.
CAPTIONS = pa.schema(
    [
        *_ROW,
        pa.field("caption_gen", pa.string()),
        pa.field("caption_model", pa.string()),
        pa.field("error", pa.string()),
        pa.field("message", pa.string()),
    ]
)
