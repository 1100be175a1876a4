"""The importing job: a folder in clip-retrieval's layout in, a feature table out, one triple of files after the other.

A triple that the table records as it is now is passed over: running the same command again resumes, or follows the
folder where it has grown or changed.
"""

from collections.abc import Sequence

from fusion_core import adopt, files, table, unit
from fusion_core.adopt import Triple
from pipelines import progress
from pipelines.plan import Plan, stands, unrecorded
from schemas.feature_table import RunRecord, TableSpec


def plan(triples: Sequence[Triple], output: str, spec: TableSpec) -> tuple[Plan, list[Triple]]:
    """What there is to do for the table at `output` to hold these triples, and which of them are not in it."""
    manifest, lying = table.read_manifest(output), table.list_parts(output)
    stale = unrecorded(lying, manifest)
    todo, work = [], []
    for triple in triples:
        known = manifest.by_unit.get(triple.unit.id)
        left = tuple(stale.get(triple.unit.id, ()))
        if known is None or not stands(known, triple.unit, spec, lying):
            todo.append(triple)
            work.append(unit.Work(triple.unit, known, left))
        else:
            for path in left:  # of a run that died after its record was written
                files.remove(files.join(output, path))
    return Plan(tuple(work), (), len(triples) - len(todo)), todo


def run(
    todo: Sequence[Triple], planned: Plan, output: str, spec: TableSpec, command: str, quiet: bool = False
) -> RunRecord:
    """Imports the triples into the table at `output`; the run's state is `failed` when any of them failed."""
    watch = progress.Watch(output, command, planned, quiet)
    with watch:
        failures, done = list[str](), 0
        for triple, work in zip(todo, planned.work, strict=True):
            try:
                record = adopt.adopt(triple, output, spec, work.previous, work.stale, progress.add_samples)
            except (OSError, unit.InputChanged) as error:
                failures.append(f"{triple.unit.shard}: {type(error).__name__}: {error}")
            else:
                progress.add_unit(record.rows_in, triple.unit.identity.size_bytes)
                done += 1
            watch.update(units_done=done, units_failed=len(failures), failures=tuple(failures[:100]))
        watch.update(state="failed" if failures else "done")
        files.remove_stale_temporaries(output)
        if todo:
            table.compact(output)
    return watch.run
