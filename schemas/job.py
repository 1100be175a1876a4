"""The contract of `fusion run`: what a job file asks for, who holds a job's folder, the versions of an index that stand
there, and the record of one run (runs/<id>.json).
"""

from dataclasses import dataclass, field
from typing import Literal

from schemas import records
from schemas.index import Recall
from schemas.index_evaluation import MeasuredRecall

Share = tuple[float, bool]  # a number, or a percentage where the second is true


@dataclass(frozen=True)
class Limits:
    """What a run must keep to for its indexes to be published; what is None is measured and not judged.

    New is what the last published run did not have.
    """

    max_dead_letters: Share | None = None  # of the table's samples
    max_new_dead_letters: Share | None = None  # of the new samples
    max_row_drop: Share | None = None  # fewer rows than the last published run had
    max_similarity_shift: float | None = None  # by which the new rows' mean cosine may differ from the published
    max_similarity_distance: float | None = None  # Kolmogorov-Smirnov, 0 to 1, of the same
    max_recall_drop: float | None = None  # below the recall of the index that is published
    min_recall: float | None = None


@dataclass(frozen=True)
class IndexStep:
    """One index of a job: its name below the job's folder, and the options of `fusion index`."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class JobSpec:
    """A job file, checked. Options are those of the commands, as words of their command lines."""

    output: str
    embed: tuple[str, ...]
    fuse: tuple[str, ...] | None
    indexes: tuple[IndexStep, ...]
    evaluate: tuple[str, ...] | None
    limits: Limits = Limits()
    keep: int = 2  # versions of an index that stay, the current one among them


@dataclass(frozen=True)
class Claim:
    """A run's claim on a job's folder (lock/<run>.json), written anew while it lives."""

    run: str
    host: str
    machine: str  # what tells one host, boot and process namespace from another
    pid: int
    process: str  # when that process began, in the kernel's count: pids come again
    claimed_at: str  # UTC, ISO 8601, as are the others
    held: bool = False  # no other claim stood when it was made
    schema_version: str = records.VERSION


@dataclass(frozen=True)
class IndexVersion:
    """A version of an index: the folder `id` beside the pointer, which no run writes into any more."""

    id: str
    run: str  # that published it
    published_at: str
    options: tuple[str, ...] = ()  # of `fusion index`
    replaced_at: str = ""  # when it ceased to be current
    opt_out_sha256: str = ""  # of the opt-out list that it was last held against, and has no key of


@dataclass(frozen=True)
class IndexVersions:
    """Which version of an index is current (current.json); replaced as a whole. A version comes before those that it
    replaced.
    """

    current: str
    versions: tuple[IndexVersion, ...]
    schema_version: str = records.VERSION


@dataclass(frozen=True)
class Baseline:
    """The run that later ones are compared with (published.json): the last whose indexes were published."""

    run: str
    schema_version: str = records.VERSION


@dataclass(frozen=True)
class StageRun:
    """One command of a run, and what it cost. CPU seconds are of its processes; of one that was killed, a part."""

    name: str
    state: Literal["running", "done", "skipped", "failed", "interrupted"]
    command: str = ""
    exit_code: int | None = None
    seconds: float = 0
    cpu_seconds: float = 0
    why: str = ""  # it was skipped; or the last lines that one said which failed


@dataclass(frozen=True)
class TableState:
    """The table after embedding; what is new or gone is so since the baseline, or since ever where there is none.

    A unit that was done anew counts as gone and new.
    """

    units: int
    rows_in: int
    rows_out: int
    rows_dead: int
    units_new: int
    rows_in_new: int
    rows_new: int
    rows_dead_new: int
    rows_gone: int
    rows_opted_out: int = 0  # samples left out because of their keys


@dataclass(frozen=True)
class Similarities:
    """Cosines of image and caption: how many rows have one, and how they are distributed.

    `histogram` counts them in 200 equal bins over [-1, 1].
    """

    rows: int
    mean: float
    deviation: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class IndexState:
    """An index of a run. `recalls` are its own (index.json), `evaluated` those of `fusion eval`, if it ran."""

    name: str
    place: str  # of the version
    state: Literal["unchanged", "candidate", "published"]
    rows_indexed: int
    size_bytes: int
    recalls: tuple[Recall, ...] = ()
    evaluated: tuple[MeasuredRecall, ...] = ()
    rows_added: int = 0  # as index.json has them
    rows_removed: int = 0


@dataclass(frozen=True)
class Alert:
    """A limit and the figure that was held against it. `figure` is None where there was nothing to compare with."""

    name: str
    of: str
    figure: float | None
    limit: float
    unit: str  # "%", or what is counted
    tripped: bool
    why: str


@dataclass(frozen=True)
class JobRun:
    """One run of a job, as it stands (runs/<id>.json): written when it begins, after each stage, and when it ends."""

    id: str
    job: str  # the job file
    job_sha256: str
    command: str
    host: str
    pid: int
    started_at: str
    ended_at: str = ""
    state: Literal["running", "published", "unchanged", "failed", "refused", "interrupted"] = "running"
    exit_code: int | None = None
    message: str = ""
    baseline: str = ""  # the run that it was compared with
    stages: tuple[StageRun, ...] = ()
    table: TableState | None = None
    similarity: Similarities | None = None  # of all rows
    similarity_new: Similarities | None = None
    indexes: tuple[IndexState, ...] = ()
    alerts: tuple[Alert, ...] = ()
    seconds: float = 0
    cpu_seconds: float = 0  # of the stages and of what holds them together
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: str = records.VERSION
