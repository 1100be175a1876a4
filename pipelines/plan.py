"""What a run has to do: the units of the input as they are, compared with what the table holds."""

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fusion_core import files, manifest, shards, unit
from fusion_core.manifest import Manifest
from fusion_core.opt_out import NOTHING, OptOut
from pipelines import options
from schemas.errors import TableError
from schemas.feature_table import ManifestRecord, TableSpec
from schemas.samples import Unit

LOG = logging.getLogger("fusion.plan")


@dataclass(frozen=True)
class Plan:
    """What a run has to do on a table: units to run (big ones first), records to take out, units that stand already,
    recorded units that have not been held against the opt-out list, and whether files of the manifest are damaged.
    """

    work: tuple[unit.Work, ...]
    gone: tuple[ManifestRecord, ...]
    skipped: int
    unswept: tuple[ManifestRecord, ...] = ()
    damaged: bool = False

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
    units: Callable[[], Iterable[Unit]],
    output: str,
    spec: TableSpec,
    share: tuple[int, int] = (0, 1),
    redo: Callable[[ManifestRecord], bool] = lambda record: False,
    keys: OptOut | None = None,
    remove_missing: tuple[float, bool] | None = None,
) -> Plan:
    """Compares the units of an input with what the table at `output` holds.

    `units` is called once the manifest is read: the memory that reading it takes is not needed beside a listing.
    `share`: (index, number) of this launcher among several on one table. `redo`: whether a unit is worked
    on again although its record and its input are what they were. `keys`: the opt-out list; a unit is worked on
    again, too, when a key that it left out is not on it. `remove_missing`: have units leave the table whose shard is
    not in the input at all, if that is no more than so many samples, or (…, True) percent of them; None: they stay.

    Raises TableError for more than that, and without a list for a table that was made with one.
    """
    ledger = manifest.read(output, brief=True)
    if keys is None and any(record.opt_out_sha256 for record in ledger.by_unit.values()):
        raise TableError(
            f"{output} was made with an opt-out list: give it again with --opt-out FILE, so that no key comes back "
            "unasked (--opt-out none: leave nothing out any more)"
        )
    keys = keys or NOTHING
    for path in ledger.damaged:
        LOG.warning("%s is damaged: the units it recorded are done again", path)
    lying = manifest.list_parts(output)
    stale = unrecorded(lying, ledger)
    planned: dict[str, str] = {}  # a unit's shard; a million units are looked at one by one, not held
    work, litter, skipped, unswept = [], list[str](), 0, list[ManifestRecord]()
    for item in units():
        if item.id in planned:
            raise shards.InputError(f"{item.shard} and {planned[item.id]} have the same unit id {item.id}: rename one")
        planned[item.id] = item.shard
        if not _is_in(share, item.id):
            continue
        record = ledger.by_unit.get(item.id)
        if record and stands(record, item, spec, lying) and not redo(record) and not _lets_back(keys, record):
            skipped += 1
            litter += stale.get(item.id, ())  # left by a run that died after its record was written
        else:
            work.append(unit.Work(item, record, tuple(stale.get(item.id, ()))))
    gone = _gone(ledger, planned)
    if remove_missing is not None:
        gone += _missing(ledger, planned, output, remove_missing)
    gone = tuple(record for record in gone if _is_in(share, record.unit.id))
    leaving = {item.unit.id for item in work if item.previous} | {record.unit.id for record in gone}
    for record in ledger.by_unit.values():
        if record.unit.id in leaving or not _is_in(share, record.unit.id):
            continue
        if record.removed or (keys.sha256 and record.unit.id not in planned):  # by a run that died while it took out
            litter += stale.get(record.unit.id, ())
        if not record.removed and record.opt_out_sha256 != keys.sha256 and manifest.has_parts(record, lying):
            unswept.append(record)
    for path in litter:
        files.remove(files.join(output, path))
    work.sort(key=lambda work: (-(work.unit.rows or 0), -work.unit.identity.size_bytes, work.unit.id))
    return Plan(tuple(work), gone, skipped, tuple(unswept), bool(ledger.damaged))


def _is_in(share: tuple[int, int], unit_id: str) -> bool:
    return zlib.crc32(unit_id.encode()) % share[1] == share[0]


def _lets_back(keys: OptOut, record: ManifestRecord) -> bool:
    """Whether the list lets a key back in that the unit left out."""
    return bool(record.opted_out) and not keys.holds(manifest.digests_of(record)).all()


def stands(record: ManifestRecord, item: Unit, spec: TableSpec, lying: dict[str, int]) -> bool:
    """Whether a record still speaks of this input, this kind of table, and parts that are there."""
    return (
        not record.removed
        and record.unit.identity == item.identity
        and record.spec_fingerprint == spec.fingerprint
        and manifest.has_parts(record, lying)
    )


def unrecorded(lying: Iterable[str], ledger: Manifest) -> dict[str, list[str]]:
    """The parts that no record names, by the unit that left them."""
    live = (record for record in ledger.by_unit.values() if not record.removed)
    recorded = {path for record in live for path in manifest.part_paths(record)}
    stale: dict[str, list[str]] = {}
    for path in sorted(path for path in lying if path not in recorded):
        stale.setdefault(manifest.unit_of_part(path), []).append(path)
    return stale


def _missing(
    ledger: Manifest, planned: Mapping[str, str], output: str, limit: tuple[float, bool]
) -> tuple[ManifestRecord, ...]:
    """Records of units whose shard is not in the input; raises TableError where they are more than the limit."""
    shards_planned = set(planned.values())
    live = ledger.live
    found = tuple(record for record in live if record.unit.shard not in shards_planned)
    samples, all_samples = (sum(record.rows_in for record in some) for some in (found, live))
    if options.is_more(samples, all_samples, limit):
        value, percent = limit
        raise TableError(
            f"{output}: {samples:,} of its {all_samples:,} samples are of shards that are not in the input (e.g. "
            f"{found[0].unit.shard}): more than --remove-missing {value:g}{'%' * percent} allows. Nothing was done. Is "
            "all of the input there? If they are to leave the table, give a higher limit (--remove-missing 100%)"
        )
    return found


def _gone(ledger: Manifest, planned: Mapping[str, str]) -> tuple[ManifestRecord, ...]:
    """Records of units that their shard, being planned anew, does not have any more."""
    shards_planned = set(planned.values())
    return tuple(
        record for record in ledger.live if record.unit.shard in shards_planned and record.unit.id not in planned
    )
