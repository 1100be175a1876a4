"""The contract of an evaluation of a feature table: what was asked, and every figure with its n and interval."""

from dataclasses import dataclass, field
from typing import Literal

from schemas.feature_table import TableSpec

Direction = Literal["text to image", "image to text"]


@dataclass(frozen=True)
class EvaluationSpec:
    """What decides the figures, beside the table."""

    labels: str = ""  # of the rows: a column, meta.NAME, or a file
    classes: str = ""  # a file of classes for zero-shot classification
    templates: str = ""  # a file of prompts
    max_rows: int = 20_000
    probe_rows: int = 5_000
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """A mean over `n` (queries, rows), with the 95 % interval that comes from drawing them."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Retrieval:
    """Distinct captions as queries for distinct pictures, or the other way. Ties count against the table.

    `figures` by name: hit@k (a relevant one among the best k: what papers call R@k), recall@k (the share of the
    relevant ones that is), mAP, nDCG@10, MRR. `curve` is [k, hit@k, recall@k].
    """

    direction: Direction
    queries: int
    gallery: int
    several_relevant: int  # queries that have more than one
    median_rank: float  # of the best relevant one
    figures: dict[str, Figure]
    curve: tuple[tuple[int, float, float], ...]
    smallest_difference: float  # of hit@1 that so many queries can tell from chance


@dataclass(frozen=True)
class Histogram:
    """Cosines of matching and of mismatched pairs: counts in equal bins from `low` to `high`."""

    low: float
    high: float
    matching: tuple[int, ...]
    mismatched: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """How images and captions lie in their common space."""

    pairs: int
    alignment: float  # mean squared distance of a pair; 0 is best
    uniformity_image: float  # log mean exp(-2 d²); lower is more evenly spread
    uniformity_text: float
    gap: float  # distance between the two means
    cosine_matching: float
    cosine_mismatched: float | None  # None where all pairs are of one picture or caption, as the last two are
    mmd2: float  # unbiased, RBF kernel of the pooled median distance
    mmd2_chance: float  # what 95 % of random splits of the same vectors stay below
    mmd2_p: float
    coral: float  # |C_image - C_text|² / 4D²
    coral_relative: float | None  # |C_image - C_text| / |C_image|; None where all images have the same vector
    jsd_bits: float | None  # of the two distributions, at least: from how well a linear classifier tells them apart
    told_apart: float | None  # that classifier's accuracy on pairs held out
    histogram: Histogram
    projection_image: tuple[tuple[float, float], ...]  # on the two main axes of both together, pair by pair
    projection_text: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ClassScores:
    """How one class was recognised."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Classification:
    """Predicted against true classes.

    `cells` are those of the confusion matrix that have rows: [true, predicted, rows], the classes as their places in
    `classes`. An evaluation written before 1.1 has the whole matrix instead, `confusion`: [true][predicted].
    """

    figures: dict[str, Figure]
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...] = ()
    cells: tuple[tuple[int, int, int], ...] = ()  # since 1.1


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed. ECE has a floor: `ece_floor` is that of perfect probabilities."""

    name: str
    n: int
    temperature: float
    nll: float
    brier: float
    ece: float
    ece_floor: float
    bins: tuple[tuple[float, float, int], ...]  # mean probability, share that was right, rows


@dataclass(frozen=True)
class ZeroShot:
    """Classification by prompts through the table's own text tower."""

    result: Classification
    templates: tuple[str, ...]
    calibration: tuple[Calibration, ...]


@dataclass(frozen=True)
class Probe:
    """A classifier on frozen features, every row predicted by a fit that saw none of its duplicates."""

    features: str
    classifier: str
    result: Classification
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Difference:
    """Features against the best single modality on the same rows; claimed only where the interval excludes zero."""

    classifier: str
    features: str
    against: str
    figure: str
    value: float
    low: float
    high: float
    claimed: bool


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation of a table (eval.json)."""

    table: str
    table_spec: TableSpec
    table_rows: int
    sampled_rows: int
    pairs: int  # of the sample's rows, those with both modalities
    spec: EvaluationSpec
    retrieval: tuple[Retrieval, ...] = ()
    geometry: Geometry | None = None
    zero_shot: ZeroShot | None = None
    probe_rows: int = 0
    probes: tuple[Probe, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    schema_version: str = "1.1"
