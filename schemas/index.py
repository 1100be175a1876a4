"""The index's contract: index.json and the columns a search result shows."""

from dataclasses import dataclass, field

import pyarrow as pa

from schemas import records
from schemas.feature_table import Part, TableSpec


@dataclass(frozen=True)
class Recall:
    """Recall@k of the index against exact search over the same vectors, for one kind of query."""

    queries: str  # "text", "image" or "fused": the column the queries were drawn from; a query never counts itself
    k: int
    n_queries: int
    recall: float


@dataclass(frozen=True)
class IndexRecord:
    """What an index was built from, how, and how well it does (index.json). Written last.

    An id is the row's position in the table's manifest order; rows without the modality are not in the index. The two
    parts carry their hash in their name (`vectors-<hash>.faiss`, `meta-<hash>.arrow`), so that a rebuild never touches
    a file that the standing index.json names. The meta part has one row for every row of the table, in equal record
    batches but for the last, so that row `id` is found by division.
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
    seed: int = 0  # of the training sample, the clustering and the drawn queries
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
        pa.field("sha256", pa.binary(32)),
        pa.field("similarity", pa.float32()),
    ]
)

# What a query answers: rows of META in the order of `rank`, which counts from 1: in falling score, but for a query that
# asks for diversity. `score` is the cosine, or the sum of reciprocal ranks where two searches were joined by rank.
ANSWER = pa.schema(
    [pa.field("rank", pa.int32(), nullable=False), pa.field("score", pa.float32(), nullable=False), *META]
)
