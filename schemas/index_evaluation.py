"""The contract of an index's evaluation: eval.json in the index's folder."""

from dataclasses import dataclass

from schemas.index import Recall


@dataclass(frozen=True)
class MeasuredRecall:
    """Recall@k against exact search, for one kind of query; `low` and `high` hold it in 95 of 100 such samples."""

    queries: str  # the column they were drawn from, as in Recall; a query never counts its own row
    k: int
    n_queries: int
    recall: float
    low: float
    high: float


@dataclass(frozen=True)
class Claim:
    """What index.json says of the recall, beside what was measured now.

    `low` and `high` hold the difference (measured less reported) in 95 of 100 cases: both numbers are of samples.
    """

    reported: Recall
    measured: float
    difference: float
    low: float
    high: float
    holds: bool | None  # the difference is at most 0.01; None: it is larger, but not by more than chance allows


@dataclass(frozen=True)
class Retrieval:
    """How often a row's own partner is among the best k: a caption's picture, or a picture's caption."""

    queries: str  # the column they were drawn from
    answers: str  # the column searched
    n_queries: int
    exact: dict[int, float]  # R@k by k, by exact search
    indexed: dict[int, float] | None  # the same by the index, where it is of that column


@dataclass(frozen=True)
class Latency:
    """What queries took that were asked one at a time by each of some threads at once."""

    concurrent: int  # threads that ask
    faiss_threads: int  # that FAISS works with for each of them
    n_queries: int
    p50_ms: float
    p99_ms: float
    mean_ms: float  # of many at once, most are answered in their thread's turn and some wait for many turns
    queries_per_second: float
    edges_ms: tuple[float, ...]  # of a histogram, equal steps of the logarithm,
    counts: tuple[int, ...]  # one fewer


@dataclass(frozen=True)
class Setting:
    """Search parameters, the recall@10 they give by kind of query, and the median of one query on one thread."""

    parameters: dict[str, int]
    recalls: dict[str, float]
    p50_ms: float
    varied: str = ""  # the parameter that differs from the stored ones; empty for these


@dataclass(frozen=True)
class IndexEvaluation:
    """An index, measured on its table with rows drawn by chance as queries."""

    index: str
    index_sha256: str  # of index.json: what was measured
    table: str
    rows_table: int  # that the index is of
    rows_indexed: int
    rows_since: int  # in the table, but not in the index: they came later
    column: str
    dim: int
    factory: str
    parameters: dict[str, int]
    target_recall: float
    bytes_files: int  # of everything index.json names
    bytes_vectors: int  # of what a search reads vectors from
    shards: int
    build_seconds: dict[str, float]  # by stage, from index.json
    seed: int
    queries_are_new: bool | None  # none of them tuned the index; None: index.json does not say which did
    notes: tuple[str, ...]  # what a reader of the figures should know
    recalls: tuple[MeasuredRecall, ...]
    claims: tuple[Claim, ...]
    retrievals: tuple[Retrieval, ...]
    latencies: tuple[Latency, ...]
    settings: tuple[Setting, ...]  # parameters varied around the stored ones, which come first
    cores: int
    faiss_version: str
    seconds: dict[str, float]  # of the evaluation, by stage
    evaluated_at: str  # UTC, ISO 8601
    schema_version: str = "1.0"
