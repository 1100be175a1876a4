"""The indexing job: feature table in, retrieval index out.

    plan | Create(pieces) | AddPieces = (Reshuffle | ParDo(AddPiece)) | finish

Only the pieces' descriptions cross a shuffle: vectors go from the table's parts into files of the index's work folder.
What to do is the launcher's to plan, and it merges and measures (fusion_core/build.py). Pieces that are recorded are
not done again: the same command goes on where a run was cut off, or adds what is new.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from fusion_core import build, files, vectors
from fusion_core.build import IndexJob, Piece
from fusion_core.clock import Clock
from fusion_core.index import BadIndex, Index
from fusion_core.table import Table
from pipelines import runner
from pipelines.runner import Knobs
from schemas.feature_table import TableSpec
from schemas.index import IndexRecord, Training

_LOG = logging.getLogger("fusion.index")
_NAMESPACE = "fusion"


class AddPiece(beam.DoFn):  # type: ignore[misc]
    """Piece in, its name out; a piece that fails does not take its neighbours along."""

    def __init__(self, job: IndexJob, table: str, spec: TableSpec, training: Training, threads: int):
        self._job, self._table, self._spec, self._training, self._threads = job, table, spec, training, threads

    def process(self, piece: Piece) -> Iterator[tuple[str, str]]:
        """Adds one piece; yields its name and what went wrong, if anything did."""
        try:
            with vectors.threads(max(1, len(os.sched_getaffinity(0)) // self._threads)):
                build.add(self._job, self._table, self._spec, self._training, piece)
        except Exception as error:
            _LOG.error("piece %s failed", piece.name, exc_info=not isinstance(error, (OSError, ValueError)))
            _FAILURES[piece.name] = f"{type(error).__name__}: {error}"
            Metrics.counter(_NAMESPACE, "pieces_failed").inc()
            yield piece.name, _FAILURES[piece.name]
        else:
            Metrics.counter(_NAMESPACE, "rows_indexed").inc(piece.rows)
            yield piece.name, ""


_FAILURES: dict[str, str] = {}  # of this process: what the launcher can say of pieces that its own threads worked on


def run(
    job: IndexJob,
    table: Table,
    knobs: Knobs,
    beam_options: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> IndexRecord:
    """The record of the index of `table` that now stands at the job's place.

    Raises BadIndex, naming why, where pieces are missing at the end: the same command goes on from what is done.
    """
    clock = Clock(log, "index")
    planned = build.plan(job, table, clock)
    if planned.work:
        with clock.stage("add"):
            _add(job, planned, knobs, beam_options)
    failed = [_FAILURES.pop(piece.name) for piece in planned.work if piece.name in _FAILURES]
    if failed:
        raise BadIndex(f"{len(failed)} of {len(planned.work)} pieces failed; the first: {failed[0]}")
    record = build.finish(job, planned, clock)
    if files.is_local(job.place):  # what was written can be opened, and is of this table
        Index.open(job.place, verify=False).check_table(table)
    return record


def _add(job: IndexJob, planned: build.Plan, knobs: Knobs, beam_options: Sequence[str]) -> None:
    threads = min(knobs.threads, len(planned.work))
    add = AddPiece(job, planned.table.place, planned.table.spec, planned.training, threads)
    pipeline = beam.Pipeline(options=PipelineOptions([*runner.local_runner(knobs, beam_options), *beam_options]))
    pieces = pipeline | "Pieces" >> beam.Create(planned.work, reshuffle=False)
    pieces | "Deal" >> beam.Reshuffle() | "AddPieces" >> beam.ParDo(add)
    runner.run(pipeline, beam_options)
