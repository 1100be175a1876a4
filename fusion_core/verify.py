"""Whether a feature table is what its manifest says: hashes, counts, alignment, vectors, files that nobody names."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusion_core import files, fusers, manifest
from fusion_core.manifest import list_parts, part_paths, read_spec, unit_of_part
from fusion_core.table import Table
from schemas.errors import TableError
from schemas.feature_table import (
    ManifestRecord,
    Part,
)
from schemas.records import SchemaMismatch


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a table."""

    unit: str
    what: str


def findings(place: str, progress: Callable[[ManifestRecord], None] = lambda record: None) -> list[Finding]:
    """Everything that is wrong with the table: damaged, missing or foreign files, wrong hashes, counts or vectors."""
    place = files.absolute(place)
    spec = read_spec(place)
    if spec is None:
        raise TableError(f"{place} is no feature table: it has no table.json")
    ledger = manifest.read(place)
    found = [Finding("", f"{path}: damaged manifest file") for path in ledger.damaged]
    lying = list_parts(place)
    for record in ledger.live:
        found += [Finding(record.unit.id, what) for what in _verify_unit(Table(place, spec, (record,)), record, lying)]
        progress(record)
    if spec.fuser:
        try:
            fusers.from_spec(spec.fuser, place)
        except (fusers.FuserError, SchemaMismatch, OSError) as error:
            found.append(Finding("", str(error)))
    recorded = {path for record in ledger.live for path in part_paths(record)}
    found += [
        Finding(unit_of_part(path), f"{path}: no record names it (left by a run that was cut off)")
        for path in sorted(lying.keys() - recorded)
    ]
    return found


def _verify_unit(table: Table, record: ManifestRecord, lying: dict[str, int]) -> list[str]:
    if record.spec_fingerprint != table.spec.fingerprint:
        return [f"recorded for another table spec ({record.spec_fingerprint[:12]})"]
    if record.rows_in != record.rows_out + record.rows_dead + record.rows_opted_out:
        left_out = f" and {record.rows_opted_out} left out" if record.rows_opted_out else ""
        return [
            f"{record.rows_in} samples in, but {record.rows_out} rows and {record.rows_dead} dead letters{left_out}"
        ]
    for part in (record.features, record.dead_letters):
        if part and (problem := _verify_file(table.place, part, lying)):
            return [problem]
    counts = [part.rows if part else 0 for part in (record.features, record.dead_letters)]
    if counts != [record.rows_out, record.rows_dead]:
        return [f"parts of {counts} rows, but the record says {[record.rows_out, record.rows_dead]}"]
    return _verify_rows(table, record)


def _verify_file(place: str, part: Part, lying: dict[str, int]) -> str | None:
    if part.path not in lying:
        return f"{part.path}: missing"
    if lying[part.path] != part.size_bytes:
        return f"{part.path}: {lying[part.path]} bytes, recorded {part.size_bytes}"
    if files.sha256(files.join(place, part.path)) != part.sha256:
        return f"{part.path}: content differs from its recorded SHA-256"
    return None


def _verify_rows(table: Table, record: ManifestRecord) -> list[str]:
    """Alignment: each row number of the unit once, vectors of unit length exactly where the flags say so."""
    problems = []
    rows = [batch["row"].to_numpy() for batch in table.scan(["row"])]
    if record.dead_letters:
        rows.append(table.read_part(record.dead_letters, ["row"])["row"].to_numpy())
    numbers = np.concatenate([*rows, np.empty(0, np.int64)])
    first, last = record.unit.first_row, record.unit.first_row + record.rows_in - 1
    is_range = np.isin(numbers, np.arange(first, last + 1)).all() and len(np.unique(numbers)) == len(numbers)
    if not is_range or len(numbers) != record.rows_in - record.rows_opted_out:
        problems.append(f"row numbers are not {first}…{last}, each once")
    for column in table.embedding_columns:
        for start, matrix, present in table.vectors(column):
            norms = np.linalg.norm(matrix.astype(np.float32), axis=1)
            wrong = np.flatnonzero(~(np.abs(norms - present) < 5e-3))
            if len(wrong):
                problems.append(f"{column}: row {start + int(wrong[0])} of the part has length {norms[wrong[0]]:.4f}")
                break
    return problems
