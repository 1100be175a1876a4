"""The fusing job: a feature table and a fuser or a text tower in, a feature table out that has their vectors.

    Deal(work) | ParDo(FuseUnit)

Units and rows are those of the source. A unit is done again when its part at the source is another one, and taken out
when it is gone there: running the same command again resumes, or follows the source.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from fusion_core import files, fuse, manifest, towers, unit
from fusion_core.fuse import FuseWork
from fusion_core.table import Table
from pipelines import change, progress, runner
from pipelines.deal import Deal
from pipelines.plan import Plan, unrecorded
from pipelines.runner import Knobs
from schemas.errors import TableError
from schemas.feature_table import ManifestRecord, RunRecord, TableSpec, TowerSpec

_LOG = logging.getLogger("fusion.unit")
_NAMESPACE = "fusion"


@dataclass(frozen=True)
class FuseJob:
    """What decides the rows of the output, and where it lies."""

    source: str
    source_spec: TableSpec
    output: str
    spec: TableSpec
    device: str = "auto"  # of the text tower, where the captions are embedded anew

    @property
    def text_tower(self) -> TowerSpec | None:
        """What embeds the captions anew; None where their vectors stay."""
        return self.spec.text_tower if self.spec.text_tower != self.source_spec.text_tower else None


class FuseUnit(beam.DoFn):  # type: ignore[misc]
    """Work in, unit ids out; a unit that fails does not take its neighbours along."""

    def __init__(self, job: FuseJob):
        self._job = job
        self._text: towers.Towers | None = None

    def setup(self) -> None:
        """Units are fused side by side, each in one thread: rounding does not depend on how many there are."""
        towers.one_thread_each()
        if spec := self._job.text_tower:
            self._text = towers.for_spec(spec, self._job.device)

    def process(self, item: FuseWork) -> Iterator[str]:
        """Fuses one unit."""
        source = Table(self._job.source, self._job.source_spec, ())
        try:
            record = fuse.fuse_unit(item, source, self._job.output, self._job.spec, progress.add_samples, self._text)
        except Exception as error:
            _LOG.error("unit %s failed", item.work.unit.id, exc_info=not isinstance(error, (OSError, ValueError)))
            progress.add_failure(item.work.unit.id, f"{item.work.unit.shard}: {type(error).__name__}: {error}")
            Metrics.counter(_NAMESPACE, "units_failed").inc()
        else:
            progress.add_unit(record.rows_out, item.work.unit.identity.size_bytes)
            Metrics.counter(_NAMESPACE, "units_done").inc()
            Metrics.counter(_NAMESPACE, "rows_fused").inc(record.rows_out)
            yield item.work.unit.id


def plan(source: Table, output: str, spec: TableSpec) -> tuple[Plan, list[FuseWork]]:
    """What is to be done for the table at `output` to be `source`, fused. Raises TableError where it holds others."""
    ledger = manifest.read(output)
    lying = manifest.list_parts(output)
    theirs = {record.unit.id: record for record in source.records}
    strangers = [r.unit.id for r in ledger.live if r.unit.id not in theirs and not r.source_sha256]
    if strangers:
        raise TableError(
            f"{output} holds units that are not of {source.place} (e.g. {strangers[0]}): fuse into a table of its own"
        )
    stale = unrecorded(lying, ledger)
    items = []
    for record in source.records:
        known = ledger.by_unit.get(record.unit.id)
        left = tuple(stale.get(record.unit.id, ()))
        if known is None or not _stands(known, record, spec, lying):
            items.append(FuseWork(record, unit.Work(record.unit, known, left)))
        else:
            for path in left:  # of a run that died after its record was written
                files.remove(files.join(output, path))
    items.sort(key=lambda item: (-item.source.rows_out, item.work.unit.id))
    gone = tuple(record for record in ledger.live if record.unit.id not in theirs)
    work = tuple(item.work for item in items)
    planned = Plan(work, gone, len(theirs) - len(items), damaged=bool(ledger.damaged))
    return planned, items


def _stands(known: ManifestRecord, record: ManifestRecord, spec: TableSpec, lying: dict[str, int]) -> bool:
    return (
        not known.removed
        and known.source_sha256 == fuse.source_sha256(record)
        and known.spec_fingerprint == spec.fingerprint
        and manifest.has_parts(known, lying)
    )


def run(job: FuseJob, source: Table, knobs: Knobs, command: str, beam_options: Sequence[str] = ()) -> RunRecord:
    """Makes the table at the job's output be the source, fused; the run's state is `failed` when any unit failed."""
    planned, items = plan(source, job.output, job.spec)
    if items and job.text_tower:
        towers.for_spec(job.text_tower, job.device)  # what is wrong with it is said before work starts

    def do() -> list[str]:
        return _run_pipeline(job, items, knobs, beam_options)

    return change.run(change.Job(job.output, job.spec), planned, do, command, knobs.quiet)


def _run_pipeline(job: FuseJob, items: Sequence[FuseWork], knobs: Knobs, beam_options: Sequence[str]) -> list[str]:
    """Runs the units on the chosen Beam runner; returns what failed, by the manifest."""
    pipeline = beam.Pipeline(options=PipelineOptions([*runner.local_runner(knobs, beam_options), *beam_options]))
    pipeline | "Units" >> Deal(FuseWork, items) | "FuseUnits" >> beam.ParDo(FuseUnit(job))
    runner.run(pipeline, beam_options)
    told = progress.take_failures()
    standing = manifest.read(job.output).by_unit
    lying = manifest.list_parts(job.output)
    missing = [
        item.work.unit
        for item in items
        if item.work.unit.id not in standing or not _stands(standing[item.work.unit.id], item.source, job.spec, lying)
    ]
    return [told.get(item.id, f"{item.shard}: not finished; the workers' log says why") for item in missing]
