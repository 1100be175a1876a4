"""The duplicates' contract: dedup.json and the columns that stand beside a table's rows."""

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from schemas import records
from schemas.feature_table import Part, TableSpec

Keep = Literal["similarity", "pixels", "first"]


@dataclass(frozen=True)
class DedupSpec:
    """What decides which rows are duplicates of which. Rows of equal image bytes (`sha256`) always are.

    `keep` orders the rows, the best first: by "similarity" of image and caption (then pixels), by "pixels", width x
    height (then similarity), or as they stand in the table ("first"); what is equal is ordered by its place in the
    table, and what is unknown comes last.
    """

    near_bits: int | None = None  # perceptual hashes that differ in at most so many of 64 bits are duplicates too
    cosine: float | None = None  # vectors of at least this cosine are duplicates too
    column: str = "image_embedding"  # of the vectors
    keep: Keep = "similarity"
    seed: int = 0  # of the k-means cells that neighbours are looked for in


@dataclass(frozen=True)
class PairsFound:
    """How many of the pairs above the cosine, of rows drawn by chance with any other row, met in a cell."""

    queries: int
    pairs: int
    found: int


@dataclass(frozen=True)
class DedupRecord:
    """Which rows of a table are duplicates (dedup.json). Written last.

    `outputs` are row-aligned with `parts`: as many, in the same order, each with the rows of its part in their order.
    """

    table: str  # where the table was
    table_spec: TableSpec
    parts: tuple[Part, ...]  # of the table, in manifest order
    spec: DedupSpec
    outputs: tuple[Part, ...]
    rows: int
    clusters: int  # rows that are kept: each cluster keeps one
    dropped: dict[str, int]  # by `why`
    cells: int = 0  # that neighbours were looked for in; in 1 all pairs are compared
    pairs_found: PairsFound | None = None  # where there is more than one cell
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    schema_version: str = records.VERSION


# A row's cluster is named after its first row in the table's manifest order (an ordinal); a row without duplicates is
# its own. One row of each cluster is kept; `why` says what joins a dropped row to it, the strictest that does.
CLUSTERS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),
        pa.field("cluster_size", pa.int32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("why", pa.string()),  # "exact", "near" or "semantic"; null where the row is kept
        pa.field("cosine", pa.float32()),  # to the kept row; null unless `why` is "semantic"
    ]
)

WHYS = ("exact", "near", "semantic")

# The perceptual hash of each row's picture; null where there is no picture or nothing to see in it.
HASHES = pa.schema(
    [pa.field("row", pa.int64(), nullable=False), pa.field("hash", pa.uint64())],
    metadata={b"fusion.phash": b"1"},  # another way of hashing has another number
)
