"""A run that changes a table: what leaves it, and around its units what every such run does."""

from collections.abc import Callable
from dataclasses import dataclass

from fusion_core import files, manifest, opt_out
from pipelines import progress
from pipelines.plan import Plan
from schemas.feature_table import RunRecord, TableSpec


@dataclass(frozen=True)
class Job:
    """What decides the rows of the output, and where it lies."""

    output: str
    spec: TableSpec
    opt_out: tuple[str, str] = ("", "")  # the place of the list of keys to leave out, and its SHA-256
    pretrained: str = ""  # where the weights lie now, if not where the spec says


def run(
    job: Job, plan: Plan, do: Callable[[], list[str]], command: str, quiet: bool = False, threads: int = 1
) -> RunRecord:
    """Does what the plan says and returns the run's record; its state is `failed` when any unit failed.

    `do` runs the plan's units and returns what failed. Whatever happens, units that are recorded stay, and the same
    command picks up from there.
    """
    watch = progress.Watch(job.output, command, plan, quiet)
    with watch:
        swept = _sweep(job, plan, threads)
        watch.update(rows_opted_out=swept.rows, opt_out_sha256=job.opt_out[1])
        failures = do() if plan.work else []
        watch.update(
            units_done=len(plan.work) - len(failures),
            units_failed=len(failures) + len(swept.failures),
            failures=(*swept.failures, *failures)[:100],
            state="failed" if failures or swept.failures else "done",
        )
        if watch.run.state == "done":
            for record in plan.gone:
                manifest.remove_unit(job.output, record)
            watch.update(units_removed=len(plan.gone), rows_removed=sum(record.rows_out for record in plan.gone))
        files.remove_stale_temporaries(job.output)
        if plan.work or plan.gone or plan.damaged:  # what is damaged goes, though no unit of the input was in it
            manifest.compact(job.output)
    return watch.run


def _sweep(job: Job, plan: Plan, threads: int) -> opt_out.Swept:
    """Has keys of a list that is new to recorded units leave the table, before anything else is done."""
    if not plan.unswept:
        return opt_out.Swept({})
    keys = opt_out.load(*job.opt_out)
    swept = opt_out.sweep(job.output, job.spec, plan.unswept, keys, threads)
    manifest.compact(job.output, lambda record: opt_out.marked(record, swept, keys))
    return swept
