"""The index's contract: index.json and the columns a search result shows."""

from dataclasses import dataclass, field

import pyarrow as pa

from schemas.feature_table import Part, TableSpec


@dataclass(frozen=True)
class Recall:
    """Recall@k of the index against exact search over the same vectors, for one kind of query."""

    queries: str  # "text", "image" or "fused": the column the queries were drawn from; a query never counts itself
    k: int
    n_queries: int
    recall: float


@dataclass(frozen=True)
class Candidate:
    """One way to store the vectors, measured on a sample of the table with held-out queries."""

    factory: str
    parameters: dict[str, int]  # tuned on the sample
    recalls: dict[str, float]  # recall@10 by kind of query
    bytes_per_vector: float
    microseconds: float  # median of one query on one thread, over the sample
    expected_microseconds: float  # the same over the whole table, by extrapolation: what candidates are compared by
    chosen: bool = False


@dataclass(frozen=True)
class Training:
    """What was learned once from a sample and is kept while the table grows: the type, its codebooks, its queries."""

    factory: str
    rows_table: int  # of the table then; another training is due when it has more than doubled
    rows_sampled: int
    settings: str  # fingerprint of what was asked for: column, kind of table, target, limit of bytes, seed
    trained: Part  # an empty index (FAISS)
    trained_refine: Part | None
    queries: Part  # held out from training, by kind (npz)
    candidates: tuple[Candidate, ...] = ()
    kept: str = ""  # SHA-256 of the duplicates that said which rows to keep; empty where all are
    why: str = ""  # since 1.2: why the index was trained anew; empty for its first training
    drawn: str = (
        ""  # since 1.2: SHA-256 of the queries as they were drawn; those whose row left are no more in `queries`
    )

    @property
    def files(self) -> tuple[Part, ...]:
        """All there are."""
        return tuple(part for part in (self.trained, self.trained_refine, self.queries) if part)


@dataclass(frozen=True)
class IndexShard:
    """The vectors of some parts of the table, numbered 0, 1, ... in the order of `parts` (their paths) and rows.

    `row_numbers` (uint32, npy) has the row within the concatenated parts for each vector, where rows are left out.
    `truth` (npz) has the exact best of this shard for the training's queries, -1 from where they are not known on.
    `meta` (Arrow, STORED_META) has all rows of the parts.
    """

    parts: tuple[str, ...]
    rows: int  # of the parts, with or without a vector
    vectors: Part
    refine: Part | None = None
    row_numbers: Part | None = None
    truth: Part | None = None
    meta: Part | None = None  # since 1.2; before, one file had the rows of all shards
    rows_cut: int = 0  # since 1.2: rows that were in it and have left the table

    @property
    def files(self) -> tuple[Part, ...]:
        """All there are."""
        return tuple(part for part in (self.vectors, self.refine, self.row_numbers, self.truth, self.meta) if part)

    @property
    def size_bytes(self) -> int:
        """What a search reads from."""
        return sum(part.size_bytes for part in (self.vectors, self.refine, self.row_numbers) if part)


@dataclass(frozen=True)
class IndexRecord:
    """What an index was built from, how, and how well it does (index.json). Written last.

    An id is the row's position in the table's manifest order; rows without the modality are not in the index. All files
    carry their hash in their name (`vectors-<hash>.faiss`, `meta-<hash>.arrow`), so that a rebuild never touches
    a file that the standing index.json names. Columns that results show lie beside the vectors of each shard, for every
    row of its parts; an index written before 1.2 has them in one file with an `id`, in id order, and one written before
    1.1 has no `shards`: its one file of vectors holds the ids themselves.

    `rows_added` and `rows_removed` compare it with the index that stood before: how many vectors units have more, and
    how many fewer; where another column, other rows or another kind of table was asked for, all there are and were.
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
    vectors: Part  # of the first shard
    meta: Part  # of the first shard; before 1.2, of all
    recalls: tuple[Recall, ...] = ()
    latency_ms: dict[str, float] = field(default_factory=dict)  # "p50", "p99": one query, one thread
    seconds: dict[str, float] = field(default_factory=dict)  # by stage of the build
    seed: int = 0  # of the training sample, the clustering and the drawn queries
    shards: tuple[IndexShard, ...] = ()
    training: Training | None = None
    target_recall: float = 0.95
    max_bytes_per_vector: float = 0  # 0: no limit
    rows_added: int = 0  # since 1.2, as are those below
    rows_removed: int = 0
    rows_tuned: int = 0  # of the table when `parameters` were tuned; kept while they reach what was asked for
    outworn: bool = False  # its training reached the target once and does not now: the next build trains anew
    schema_version: str = "1.2"

    @property
    def files(self) -> tuple[Part, ...]:
        """Every file that the index owns."""
        found = [self.vectors, self.meta, *(part for shard in self.shards for part in shard.files)]
        found += self.training.files if self.training else ()
        return tuple(dict.fromkeys(found))

    @property
    def size_bytes(self) -> int:
        """What a search reads vectors from."""
        return sum(shard.size_bytes for shard in self.shards) or self.vectors.size_bytes


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

STORED_META = META.remove(0)  # an id changes when parts come in between: it follows from where a row's part stands

# What a query answers: rows of META in the order of `rank`, which counts from 1: in falling score, but for a query that
# asks for diversity. `score` is the cosine or, where two searches were joined, the sum of their reciprocal ranks
# (by_rank) or of their z-normed scores (by_score).
ANSWER = pa.schema(
    [pa.field("rank", pa.int32(), nullable=False), pa.field("score", pa.float32(), nullable=False), *META]
)
