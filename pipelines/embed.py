"""The embedding job: shards in, feature table out.

    Deal(work) | ParDo(RunUnit)

Each unit is read, decoded, embedded and written by one DoFn call, so that heavy bytes never cross a shuffle and a unit
commits whole or not at all. What to do is the launcher's to plan (plan.py), and it has the last word on success.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from fusion_core import manifest, towers, unit
from pipelines import change, progress, runner, workers
from pipelines.change import Job
from pipelines.deal import Deal
from pipelines.plan import Plan
from pipelines.runner import Knobs
from schemas.feature_table import ManifestRecord, RunRecord

_LOG = logging.getLogger("fusion.unit")
_NAMESPACE = "fusion"


class Outcome(NamedTuple):
    """What became of one unit."""

    unit: str
    rows_in: int
    rows_out: int
    rows_dead: int


def runs_apart(knobs: Knobs) -> bool:
    """Whether units run in processes of their own: several at once, on a CPU, where no cluster has its own."""
    return knobs.local and knobs.threads > 1 and towers.pick_device(knobs.device) == "cpu"


class RunUnit(beam.DoFn):  # type: ignore[misc]
    """Work in, Outcome out; a unit that fails does not take its neighbours along."""

    def __init__(self, job: Job, knobs: Knobs):
        self._job, self._knobs = job, knobs
        self._apart = False
        self._towers: towers.Towers | None = None

    def setup(self) -> None:
        """Takes this process's copy of the towers, unless units run in processes of their own."""
        self._apart = runs_apart(self._knobs)
        if not self._apart:
            towers.one_thread_each()
            self._towers = towers.for_spec(self._job.spec.tower, self._knobs.device, self._job.pretrained)

    def process(self, work: unit.Work) -> Iterator[Outcome]:
        """Runs one unit; not one that is done: a cluster gives a lost worker's units, all of them, to the next."""
        recorded = None
        with suppress(OSError):  # what cannot be read is done again
            recorded = manifest.read_record(self._job.output, work.unit.id)
        if recorded and _done(recorded, work):
            Metrics.counter(_NAMESPACE, "units_done_before").inc()
            yield Outcome(work.unit.id, recorded.rows_in, recorded.rows_out, recorded.rows_dead)
            return
        result = self._run(self._order(work))
        if isinstance(result, workers.Failure):
            _LOG.error("unit %s failed: %s\n%s", work.unit.id, result.why, result.trace)
            progress.add_failure(work.unit.id, result.why)
            Metrics.counter(_NAMESPACE, "units_failed").inc()
        else:
            _count(result)
            progress.add_unit(result.rows_in, work.unit.identity.size_bytes)
            yield Outcome(work.unit.id, result.rows_in, result.rows_out, result.rows_dead)

    def _order(self, work: unit.Work) -> workers.Order:
        return workers.Order(work, self._job.output, self._job.spec, self._knobs.batch, self._job.opt_out)

    def _run(self, order: workers.Order) -> ManifestRecord | workers.Failure:
        if self._towers:
            return workers.attempt(order, self._towers, progress.add_samples)
        with workers.borrowed(self._job.spec.tower, self._knobs.device, self._job.pretrained) as worker:
            return worker.run(order, progress.add_samples)


def _count(record: ManifestRecord) -> None:
    for name in ("rows_in", "rows_out", "rows_dead", "rows_reused"):
        Metrics.counter(_NAMESPACE, name).inc(getattr(record, name))
    Metrics.counter(_NAMESPACE, "units_done").inc()
    Metrics.distribution(_NAMESPACE, "unit_milliseconds").update(int(1000 * record.seconds.get("unit", 0)))


def run(job: Job, plan: Plan, knobs: Knobs, command: str, beam_options: Sequence[str] = ()) -> RunRecord:
    """Does what the plan says and returns the run's record; its state is `failed` when any unit failed."""

    def do() -> list[str]:
        return _run_pipeline(job, plan, knobs, beam_options)

    return change.run(job, plan, do, command, knobs.quiet, knobs.threads)


def _run_pipeline(job: Job, plan: Plan, knobs: Knobs, beam_options: Sequence[str]) -> list[str]:
    """Runs the units on the chosen Beam runner; returns what failed.

    The manifest and the parts that lie there have the last word on what was done, whatever the workers said.
    """
    options = PipelineOptions([*runner.local_runner(knobs, beam_options), *beam_options])
    pipeline = beam.Pipeline(options=options)
    pipeline | "Units" >> Deal(unit.Work, plan.work) | "EmbedUnits" >> beam.ParDo(RunUnit(job, knobs))
    runner.run(pipeline, beam_options)
    told = progress.take_failures()
    ledger, lying = manifest.read(job.output, brief=True), manifest.list_parts(job.output)
    missing, lost = [], []
    for work in plan.work:
        record = ledger.by_unit.get(work.unit.id)
        if record is None or not _done(record, work):
            missing.append(work.unit)
        elif not manifest.has_parts(record, lying):
            lost.append(f"{work.unit.shard}: its part was written and is not there: does the storage keep files?")
    return lost + [told.get(item.id, f"{item.shard}: not finished; the workers' log says why") for item in missing]


def _done(record: ManifestRecord, work: unit.Work) -> bool:
    """Whether a record is of this work, not of an earlier run of the unit."""
    before = work.previous.revision if work.previous else -1
    return record.revision > before and record.unit.identity == work.unit.identity
