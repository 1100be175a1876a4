"""What `fusion status` says of a table: from its manifest and its runs alone, so from anywhere."""

import os
import socket
from datetime import UTC, datetime
from typing import Any

from fusion_core import manifest, table
from schemas.feature_table import RunRecord

_SILENT_SECONDS = 60.0


def describe(feature_table: table.Table) -> dict[str, Any]:
    """The table's totals and its latest run, as JSON-able values."""
    records = feature_table.records
    runs = manifest.read_runs(feature_table.place)
    return {
        "table": feature_table.place,
        "model": feature_table.spec.models,
        "units": len(records),
        "samples": sum(record.rows_in for record in records),
        "rows": feature_table.num_rows,
        "dead_letters": feature_table.errors,
        "opted_out": feature_table.rows_opted_out,
        "repeated_keys": sum(record.repeated_keys for record in records),
        "seconds": {stage: round(spent, 3) for stage, spent in sorted(feature_table.seconds.items())},
        "run": _describe_run(runs[-1], records) if runs else None,
    }


def _describe_run(run: RunRecord, records: tuple[Any, ...]) -> dict[str, Any]:
    state = "dead" if _is_dead(run) else run.state
    now = datetime.now(UTC) if state == "running" else datetime.fromisoformat(run.updated_at)
    elapsed = max((now - datetime.fromisoformat(run.started_at)).total_seconds(), 1.0)
    ended = run.state in ("done", "failed")
    done = run.units_done if ended else sum(record.finished_at >= run.started_at for record in records)
    rate = run.samples_done / elapsed
    left = None
    if state == "running" and run.samples_planned and rate:
        left = round((run.samples_planned - run.samples_done) / rate)
    elif state == "running" and done:
        left = round((run.units_planned - run.units_skipped - done) * elapsed / done)
    return {
        "state": state,
        "started_at": run.started_at,
        "updated_at": run.updated_at,
        "units_planned": run.units_planned,
        "units_skipped": run.units_skipped,
        "units_done": done,
        "units_failed": run.units_failed,
        "samples_done": run.samples_done,
        "samples_per_second": round(rate, 1),
        "seconds_left": left,
        "units_removed": run.units_removed,
        "rows_removed": run.rows_removed,
        "rows_opted_out": run.rows_opted_out,
        "opt_out_sha256": run.opt_out_sha256,
        "failures": list(run.failures),
    }


def _is_dead(run: RunRecord) -> bool:
    """Whether a run that says it is running cannot be: its process is gone, or it has been silent for long."""
    if run.state != "running":
        return False
    if run.host == socket.gethostname():
        try:
            os.kill(run.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return (datetime.now(UTC) - datetime.fromisoformat(run.updated_at)).total_seconds() > _SILENT_SECONDS


def text(found: dict[str, Any]) -> str:
    """The description in lines for a reader."""
    dead = sum(found["dead_letters"].values())
    lines = [
        f"{found['table']} ({found['model']})",
        f"  {found['units']:,} units: {found['samples']:,} samples = {found['rows']:,} rows + {dead:,} dead letters"
        + (f" + {found['opted_out']:,} opted out" if found["opted_out"] else ""),
        *(f"    {count:,} {error}" for error, count in found["dead_letters"].items()),
    ]
    if found["repeated_keys"]:
        lines.append(f"  {found['repeated_keys']:,} rows have a key that stands earlier in their shard")
    run = found["run"]
    if run:
        units = f"{run['units_done']:,} of {run['units_planned'] - run['units_skipped']:,} units"
        lines.append(
            f"  last run: {run['state']}, {units} ({run['units_skipped']:,} stood already), "
            f"{run['samples_done']:,} samples, {run['samples_per_second']:,} samples/s"
            + (f", about {run['seconds_left']:,} s left" if run["seconds_left"] is not None else "")
        )
        if run["state"] == "dead":
            lines.append("  its launcher is gone: run the same command again, it goes on from here")
        lines += [f"  failed: {failure}" for failure in run["failures"]]
    total = sum(spent for stage, spent in found["seconds"].items() if stage != "unit")
    if total:
        shares = ", ".join(
            f"{stage} {spent / total:.0%}" for stage, spent in found["seconds"].items() if stage != "unit"
        )
        lines.append(f"  time: {shares}")
    return "\n".join(lines)
