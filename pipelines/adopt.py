"""The importing job: a folder in clip-retrieval's layout in, a feature table out, one triple of files after the other.

A triple that the table records as it is now is passed over: running the same command again resumes, or follows the
folder where it has grown or changed.
"""

from collections.abc import Mapping

from fusion_core import adopt, opt_out, unit
from fusion_core.adopt import Triple
from pipelines import change, progress
from pipelines.plan import Plan
from schemas.feature_table import RunRecord


def run(triples: Mapping[str, Triple], plan: Plan, job: change.Job, command: str, quiet: bool = False) -> RunRecord:
    """Imports the plan's units, which are triples by unit id; the run's state is `failed` when any of them failed."""
    keys = opt_out.load(*job.opt_out)

    def do() -> list[str]:
        failures = []
        for work in plan.work:
            try:
                record = adopt.adopt(triples[work.unit.id], work, job.output, job.spec, progress.add_samples, keys)
            except (OSError, unit.InputChanged) as error:
                failures.append(f"{work.unit.shard}: {type(error).__name__}: {error}")
            else:
                progress.add_unit(record.rows_in, work.unit.identity.size_bytes)
        return failures

    return change.run(job, plan, do, command, quiet)
