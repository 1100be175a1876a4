"""The index's contract: index.json and the columns a search result shows."""

from dataclasses import dataclass, field

import pyarrow as pa

from schemas import records
from schemas.feature_table import Part, TableSpec


@dataclass(frozen=True)
class Recall:
    """Recall@k of the index against exact search over the same vectors, for one kind of query."""

    queries: str  # "text" or "image": which column the held-out queries were taken from
    k: int
    n_queries: int
    recall: float


@dataclass(frozen=True)
class IndexRecord:
    """What an index was built from, how, and how well it does (index.json). Written last.

    An id is the row's position in the table's manifest order; rows without the modality are not in the index.
    """

    table: str  # where the table was
    table_spec: TableSpec
    parts: tuple[Part, ...]  # of the table, in manifest order
    column: str
    dim: int
    rows_table: int
    rows_indexed: int
    factory: str  # FAISS factory string
    metric: str  # "inner_product": vectors are unit length, so scores are cosines
    parameters: dict[str, int]  # search-time, such as nprobe
    vectors: Part
    meta: Part
    recalls: tuple[Recall, ...] = ()
    latency_ms: dict[str, float] = field(default_factory=dict)  # "p50", "p99": one query, one thread
    seconds: dict[str, float] = field(default_factory=dict)  # by stage of the build
    schema_version: str = records.VERSION


META = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("similarity", pa.float32()),
    ]
)
