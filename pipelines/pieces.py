"""Pieces of an index, added by Beam's workers.

    Create(pieces) | AddPieces = (Reshuffle | ParDo(AddPiece))

Only the pieces' descriptions cross a shuffle: vectors go from the table's parts into files of the index's folder.
"""

import logging
import os
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from fusion_core import build, vectors
from fusion_core.build import IndexJob, Piece
from pipelines import runner
from pipelines.runner import Knobs
from schemas.feature_table import TableSpec
from schemas.index import Training

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


def add(job: IndexJob, planned: build.Plan, knobs: Knobs, beam_options: Sequence[str]) -> list[str]:
    """Adds the pieces that are to be done; returns why some failed, as far as threads of this process tried them."""
    threads = min(knobs.threads, len(planned.work))
    add = AddPiece(job, planned.table.place, planned.table.spec, planned.training, threads)
    pipeline = beam.Pipeline(options=PipelineOptions([*runner.local_runner(knobs, beam_options), *beam_options]))
    pieces = pipeline | "Pieces" >> beam.Create(planned.work, reshuffle=False)
    pieces | "Deal" >> beam.Reshuffle() | "AddPieces" >> beam.ParDo(add)
    runner.run(pipeline, beam_options)
    return [_FAILURES.pop(piece.name) for piece in planned.work if piece.name in _FAILURES]
