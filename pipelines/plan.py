"""What a run has to do: the shards as they are, compared with what the table holds."""

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusion_core import files, shards, table, unit
from schemas.feature_table import ManifestRecord, TableSpec
from schemas.samples import Unit

LOG = logging.getLogger("fusion.plan")


@dataclass(frozen=True)
class Plan:
    """What a run has to do on a table: units to run (big ones first), records to take out, units that stand already."""

    work: tuple[unit.Work, ...]
    gone: tuple[ManifestRecord, ...]
    skipped: int

    @property
    def size_bytes(self) -> int:
        """How large the shards of the work are."""
        return sum(work.unit.identity.size_bytes for work in self.work)

    @property
    def samples(self) -> int | None:
        """How many samples the work holds, where all its shards say so beforehand."""
        rows = [work.unit.rows for work in self.work]
        return sum(n for n in rows if n is not None) if all(n is not None for n in rows) else None


def compare(
    inputs: Sequence[str],
    output: str,
    spec: TableSpec,
    share: tuple[int, int] = (0, 1),
    redo: Callable[[ManifestRecord], bool] = lambda record: False,
) -> Plan:
    """Compares the shards that `inputs` name with what the table at `output` holds.

    `share`: (index, number) of this launcher among several on one table. `redo`: whether a unit is worked
    on again although its record and its input are what they were.
    """
    manifest = table.read_manifest(output, brief=True)
    for path in manifest.damaged:
        LOG.warning("%s is damaged: the units it recorded are done again", path)
    lying = table.list_parts(output)
    stale = unrecorded(lying, manifest)
    planned: dict[str, str] = {}  # a unit's shard; a million units are looked at one by one, not held
    work, litter, skipped = [], list[str](), 0
    for item in shards.plan(inputs, spec.input):
        if item.id in planned:
            raise shards.InputError(f"{item.shard} and {planned[item.id]} have the same unit id {item.id}: rename one")
        planned[item.id] = item.shard
        if zlib.crc32(item.id.encode()) % share[1] != share[0]:
            continue
        record = manifest.by_unit.get(item.id)
        if record and _stands(record, item, spec, lying) and not redo(record):
            skipped += 1
            litter += stale.get(item.id, ())  # left by a run that died after its record was written
        else:
            work.append(unit.Work(item, record, tuple(stale.get(item.id, ()))))
    for path in litter:
        files.remove(files.join(output, path))
    work.sort(key=lambda work: (-(work.unit.rows or 0), -work.unit.identity.size_bytes, work.unit.id))
    return Plan(tuple(work), _gone(manifest, planned), skipped)


def _stands(record: ManifestRecord, item: Unit, spec: TableSpec, lying: dict[str, int]) -> bool:
    """Whether a record still speaks of this input, this kind of table, and parts that are there."""
    return (
        not record.removed
        and record.unit.identity == item.identity
        and record.spec_fingerprint == spec.fingerprint
        and table.has_parts(record, lying)
    )


def unrecorded(lying: Iterable[str], manifest: table.Manifest) -> dict[str, list[str]]:
    """The parts that no record names, by the unit that left them."""
    live = (record for record in manifest.by_unit.values() if not record.removed)
    recorded = {path for record in live for path in table.part_paths(record)}
    stale: dict[str, list[str]] = {}
    for path in sorted(path for path in lying if path not in recorded):
        stale.setdefault(table.unit_of_part(path), []).append(path)
    return stale


def _gone(manifest: table.Manifest, planned: Mapping[str, str]) -> tuple[ManifestRecord, ...]:
    """Records of units that their shard, being planned anew, does not have any more."""
    shards_planned = set(planned.values())
    return tuple(
        record for record in manifest.live if record.unit.shard in shards_planned and record.unit.id not in planned
    )
