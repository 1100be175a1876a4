"""The indexing job: feature table in, retrieval index out.

    plan | AddPieces | finish

What to do is the launcher's to plan, and it merges and measures (fusion_core/build.py); pieces are spread by Beam
(pieces.py), but for a single one, which costs less than Beam's imports. Pieces that are recorded are not done again:
the same command goes on where a run was cut off, or adds what is new.
"""

from collections.abc import Callable, Sequence

from fusion_core import build, files
from fusion_core.build import IndexJob
from fusion_core.clock import Clock
from fusion_core.index import Index
from fusion_core.table import Table
from pipelines.runner import Knobs
from schemas.errors import RunError
from schemas.index import IndexRecord


def run(
    job: IndexJob,
    table: Table,
    knobs: Knobs,
    beam_options: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> IndexRecord:
    """The record of the index of `table` that now stands at the job's place.

    Raises RunError, naming why, where pieces are missing at the end: the same command goes on from what is done.
    """
    clock = Clock(log, "index")
    planned = build.plan(job, table, clock)
    if planned.work:
        with clock.stage("add"):
            failed = _add(job, planned, knobs, beam_options)
        if failed:
            raise RunError(f"{len(failed)} of {len(planned.work)} pieces failed; the first: {failed[0]}")
    record = build.finish(job, planned, clock)
    if files.is_local(job.place):  # what was written can be opened, and is of this table
        Index.open(job.place, verify=False).check_table(table)
    return record


def _add(job: IndexJob, planned: build.Plan, knobs: Knobs, beam_options: Sequence[str]) -> list[str]:
    """Why pieces failed."""
    if len(planned.work) > 1 or beam_options:
        from pipelines import pieces

        return pieces.add(job, planned, knobs, beam_options)
    try:
        build.add(job, planned.table.place, planned.table.spec, planned.training, planned.work[0])
    except (OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []
