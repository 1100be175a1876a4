"""What `fusion run` does: embed, fuse, index and evaluate as one command for schedulers.

    claim the folder → embed → fuse → limits on the rows → index → evaluate → limits on the recall → publish

Each stage is the command of that name in a process of its own: what it holds in memory is gone after it, and a crash of
one is a line of this run's record. Stages do only what is not done, so a run repeated goes on; an index whose table and
options have not changed is not touched at all. Nothing that stands published changes before the last step.
"""

import hashlib
import importlib.metadata
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import alerts, files, lock, manifest, opt_out, versions
from fusion_core.table import Table
from pipelines import job
from schemas import records
from schemas.errors import RunError, TableError, UserError
from schemas.feature_table import ManifestRecord
from schemas.index import IndexRecord
from schemas.index_evaluation import IndexEvaluation
from schemas.job import (
    Baseline,
    IndexState,
    IndexStep,
    JobRun,
    JobSpec,
    Similarities,
    StageRun,
    TableState,
)

DONE, FAILED, ALERT = 0, 1, 4
_BASELINE = "published.json"
_LINES = 40  # of what a stage said that are kept when it failed
_UNITS = pa.schema([("unit", pa.string()), ("parts", pa.string()), ("rows_in", pa.int64()),
                    ("rows_out", pa.int64()), ("rows_dead", pa.int64())])  # fmt: skip
_PACKAGES = ("fusion-features", "apache-beam", "torch", "open_clip_torch", "faiss-gpu", "pyarrow")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it took."""

    exit_code: int
    cpu_seconds: float
    said: tuple[str, ...] = ()  # its last lines


class _Stopped(Exception):
    """The run ends here."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


def run(spec: JobSpec, path: str, data: bytes, command: str, quiet: bool) -> JobRun:
    """The record of one run of the job in the file `path` with the bytes `data`, from that file's folder.

    Raises lock.Locked where another run is at work. An interrupt is recorded and raised again.
    """
    now = datetime.now(UTC)
    own = JobRun(
        id=f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z-{uuid.uuid4().hex[:8]}",
        job=files.absolute(path),
        job_sha256=hashlib.sha256(data).hexdigest(),
        command=command,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=now.isoformat(timespec="seconds"),
        versions=_versions(),
    )
    with lock.held(spec.output, own.id) as hold:
        return _Run(spec, own, hold, quiet).execute()


class _Run:
    """One run while it lasts."""

    def __init__(self, spec: JobSpec, own: JobRun, hold: lock.Hold, quiet: bool):
        self._spec, self._own, self._hold, self._quiet = spec, own, hold, quiet
        self._started = time.monotonic()
        self._state: Any = "unchanged"
        self._opted_out = opt_out.NOTHING  # the list that the table was held against

    def execute(self) -> JobRun:
        """Does it all; the record has the exit code."""
        self._record()
        try:
            message = self._work()
        except _Stopped as stopped:
            return self._end("refused" if stopped.exit_code == ALERT else "failed", stopped.exit_code, str(stopped))
        except KeyboardInterrupt:
            self._end("interrupted", FAILED, "interrupted: what is recorded stays; run the same command again to go on")
            raise
        except (OSError, UserError, RunError) as error:
            return self._end("failed", FAILED, f"{type(error).__name__}: {error}")
        except BaseException as error:
            self._end("failed", FAILED, f"{type(error).__name__}: {error}")
            raise
        return self._end(self._state, DONE, message)

    def _work(self) -> str:
        """Does it all, or stops; returns what there is to say of it."""
        spec, place = self._spec, job.table_place(self._spec.output)
        noise = ["--quiet"] if self._quiet and "--quiet" not in spec.embed else []
        self._stage("embed", ["embed", *spec.embed, f"--output={place}", *noise])
        source = place
        if spec.fuse is not None:
            source = job.fused_place(spec.output)
            noise = ["--quiet"] if self._quiet and "--quiet" not in spec.fuse else []
            self._stage("fuse", ["fuse", place, *spec.fuse, f"--output={source}", *noise])
        published = self._compare(_open(place))
        assert self._own.table and self._own.similarity_new
        self._judge(alerts.of_table(spec.limits, self._own.table, self._own.similarity_new, published))
        standing = _standing(spec, _open(source))  # no table is held in memory while others work
        new = [step for step in spec.indexes if self._index(step, source, step.name in standing)]
        self._judge(alert for step in new for alert in self._recalls(step))
        return self._publish(new)

    # --- stages

    def _stage(self, name: str, argv: Sequence[str]) -> None:
        """Runs a command, and stops where it fails."""
        stage = StageRun(name, "running", f"fusion {files.redacted(' '.join(argv))}")
        self._record(stages=(*self._own.stages, stage))
        began = time.monotonic()
        try:
            ended = apart(argv, self._quiet)
        except KeyboardInterrupt:
            self._amend(replace(stage, state="interrupted", seconds=round(time.monotonic() - began, 3)))
            raise
        said = "\n".join(ended.said) if ended.exit_code else ""
        self._amend(
            replace(
                stage,
                state="failed" if ended.exit_code else "done",
                exit_code=ended.exit_code,
                seconds=round(time.monotonic() - began, 3),
                cpu_seconds=round(ended.cpu_seconds, 3),
                why=files.redacted(said),
            )
        )
        if ended.exit_code:
            code = ended.exit_code if ended.exit_code in (1, 2, 3) else FAILED
            raise _Stopped(code, f"{name} ended with {_how(ended.exit_code)}: {_error(ended.said)}")

    def _skip(self, name: str, why: str) -> None:
        self._record(stages=(*self._own.stages, StageRun(name, "skipped", why=why)))

    def _amend(self, stage: StageRun) -> None:
        self._record(stages=(*self._own.stages[:-1], stage))

    def _index(self, step: IndexStep, source: str, stands: bool) -> bool:
        """Makes a candidate of the index, unless the current version `stands`; whether they differ."""
        root = job.index_place(self._spec.output, step.name)
        known = versions.read(root)
        current = versions.standing(root)
        before = _index_record(current) if known else None
        if before and stands:
            for left in versions.candidates(root):
                versions.discard(files.join(root, left))
            self._skip(f"index {step.name}", "its table and options are what they were")
            self._add_index(step, current, before, "unchanged")
            return False
        place = versions.begin(root, self._own.id)
        try:
            self._stage(f"index {step.name}", ["index", source, *step.options, f"--output={place}"])
        except _Stopped as stopped:
            if stopped.exit_code == 2:  # it cannot be gone on with: the next run begins with the current version
                versions.discard(place)
            raise
        record = _index_record(place)
        if record is None:
            raise _Stopped(FAILED, f"index {step.name} left nothing at {place}: does the storage keep what is written?")
        if before and records.to_json(before) == records.to_json(record):  # other options, the same index
            versions.discard(place)
            versions.restate(root, step.options)
            self._add_index(step, current, before, "unchanged")
            return False
        if self._spec.evaluate is not None and not record.rows_indexed:
            self._skip(f"evaluate {step.name}", "the index has no rows: there is nothing to measure")
        elif self._spec.evaluate is not None:
            self._stage(f"evaluate {step.name}", ["eval", place, f"--table={source}", *self._spec.evaluate])
        self._add_index(step, place, record, "candidate")
        return True

    def _add_index(self, step: IndexStep, place: str, record: IndexRecord, state: Any) -> None:
        found = IndexState(
            step.name,
            place,
            state,
            record.rows_indexed,
            record.size_bytes,
            record.recalls,
            _evaluated(place),
            record.rows_added,
            record.rows_removed,
        )
        self._record(indexes=(*self._own.indexes, found))

    # --- limits

    def _compare(self, embedded: Table) -> tuple[TableState, Similarities] | None:
        """Records the table as it is, and what of it is new since the last published run, whose figures it returns."""
        _write_units(self._spec.output, self._own.id, embedded)
        baseline = _read_baseline(self._spec.output)
        _remove_old_units(self._spec, {self._own.id, *([baseline[0].id] if baseline else [])})
        known = baseline[1] if baseline else {}
        new, gone = [], dict(known)
        for record in embedded.records:
            if gone.pop(record.unit.id, None) != _parts(record):
                new.append(record)
                gone |= {record.unit.id: known[record.unit.id]} if record.unit.id in known else {}
        rows_gone = _rows_of(self._spec.output, baseline[0].id, gone) if baseline and gone else 0
        of_new = alerts.similarities(replace(embedded, records=tuple(new)).scan(["similarity"]))
        before = baseline[0].similarity if baseline else None
        if before and not gone:
            of_all = alerts.joined(before, of_new)
        else:  # what is gone cannot be told from a distribution
            of_all = alerts.similarities(embedded.scan(["similarity"])) if baseline else of_new
        state = TableState(
            units=len(embedded.records),
            rows_in=sum(record.rows_in for record in embedded.records),
            rows_out=embedded.num_rows,
            rows_dead=sum(record.rows_dead for record in embedded.records),
            units_new=len(new),
            rows_in_new=sum(record.rows_in for record in new),
            rows_new=sum(record.rows_out for record in new),
            rows_dead_new=sum(record.rows_dead for record in new),
            rows_gone=rows_gone,
            rows_opted_out=embedded.rows_opted_out,
        )
        self._record(baseline=baseline[0].id if baseline else "", table=state, similarity=of_all, similarity_new=of_new)
        self._opted_out = _opted_out(self._spec, embedded)
        if baseline is None or baseline[0].table is None or baseline[0].similarity is None:
            return None
        return baseline[0].table, baseline[0].similarity

    def _recalls(self, step: IndexStep) -> Iterator[Any]:
        """The alerts on an index that is a candidate."""
        found = next(item for item in self._own.indexes if item.name == step.name)
        root = job.index_place(self._spec.output, step.name)
        current = versions.standing(root)
        before = _index_record(current) if current != root else None
        limits = self._spec.limits
        yield from alerts.of_index(limits, step.name, found.recalls, before.recalls if before else None, "index.json")
        evaluated = _evaluated(current) if before else ()
        yield from alerts.of_index(limits, step.name, found.evaluated, evaluated, "fusion eval")

    def _judge(self, found: Iterable[Any]) -> None:
        judged = tuple(found)
        self._record(alerts=(*self._own.alerts, *judged))
        tripped = [alert for alert in judged if alert.tripped]
        if tripped:
            lines = [
                f"{alert.name}: {alert.of}: {alert.figure:g}{alert.unit and ' '}{alert.unit} ({alert.why}), "
                f"the limit is {alert.limit:g}{alert.unit and ' '}{alert.unit}"
                for alert in tripped
            ]
            raise _Stopped(ALERT, "; ".join(lines) + ". Nothing is published: what stood stands")

    # --- publish

    def _publish(self, steps: Sequence[IndexStep]) -> str:
        output = self._spec.output
        self._hold.check()
        done = []
        for item in self._own.indexes:
            step = next((step for step in steps if step.name == item.name), None)
            if step:
                root = job.index_place(output, step.name)
                versions.publish(
                    root,
                    item.place.rpartition("/")[2],
                    self._own.id,
                    step.options,
                    self._spec.keep,
                    self._opted_out.sha256,
                )
                item, self._state = replace(item, state="published"), "published"
            done.append(item)
        self._record(indexes=tuple(done))
        keys = self._opted_out
        having = [
            place
            for place in (job.index_places(output) if keys.sha256 else ())
            if versions.hold_against(place, keys.sha256, lambda folder: opt_out.is_in_index(folder, keys))
        ]
        files.write_bytes(output, _BASELINE, records.to_json(Baseline(self._own.id)))
        _remove_old_units(self._spec, {self._own.id})
        files.remove_stale_temporaries(output)
        return "; ".join(
            f"{place} has rows of keys that are opted out, and the job file does not name it: delete it"
            for place in having
        )

    # --- the record

    def _record(self, **changes: Any) -> None:
        cpu = _cpu_seconds(resource.RUSAGE_SELF) + sum(stage.cpu_seconds for stage in self._own.stages)
        seconds = round(time.monotonic() - self._started, 3)
        self._own = replace(self._own, seconds=seconds, cpu_seconds=round(cpu, 3))
        self._own = replace(self._own, **changes)
        files.write_bytes(self._spec.output, f"runs/{self._own.id}.json", records.to_json(self._own, indent=2))

    def _end(self, state: Any, exit_code: int, message: str) -> JobRun:
        message = files.redacted(message)
        with suppress(OSError):  # the exit code says it all the same
            self._record(state=state, exit_code=exit_code, message=message, ended_at=_now())
        self._own = replace(self._own, state=state, exit_code=exit_code, message=message)
        return self._own


def _open(place: str) -> Table:
    """The table without what its units cost: half the memory."""
    spec = manifest.read_spec(place)
    if spec is None:
        raise TableError(f"{place} has no table.json any more: does the storage keep what is written?")
    return Table(place, spec, manifest.read(place, brief=True).live)


def _standing(spec: JobSpec, source: Table) -> set[str]:
    """The indexes whose current version is what `fusion index` would make of the table with their options."""
    return {step.name for step in spec.indexes if _stands(job.index_place(spec.output, step.name), step, source)}


def _stands(root: str, step: IndexStep, source: Table) -> bool:
    """Never where --keep is an option: what that names may have changed."""
    known = versions.read(root)
    current = versions.standing(root)
    record = _index_record(current) if known else None
    if known is None or record is None:
        return False
    options = next((item.options for item in known.versions if item.id == known.current), None)
    ours, theirs = ([(part.path, part.sha256) for part in parts] for parts in (record.parts, source.parts))
    lying = files.stat_many([files.join(current, part.path) for part in record.files])
    return (
        options == step.options
        and not any(word.startswith("--keep") for word in step.options)
        and (record.table, record.table_spec.decisive, ours) == (source.place, source.spec.decisive, theirs)
        and all(found and found.size_bytes == part.size_bytes for found, part in zip(lying, record.files, strict=True))
    )


def _index_record(place: str) -> IndexRecord | None:
    where = files.join(place, "index.json")
    try:
        return records.from_json(IndexRecord, files.read_bytes(where), where)
    except (FileNotFoundError, records.SchemaMismatch):
        return None


def _evaluated(place: str) -> tuple[Any, ...]:
    """What `fusion eval` measured of an index, if it was this very one."""
    where = files.join(place, "eval.json")
    try:
        found = records.from_json(IndexEvaluation, files.read_bytes(where), where)
    except (FileNotFoundError, records.SchemaMismatch):
        return ()
    return found.recalls if found.index_sha256 == files.sha256(files.join(place, "index.json")) else ()


# --- what the last published run had --------------------------------------------------------------------------------


def _parts(record: ManifestRecord) -> str:
    """What tells one outcome of a unit from another: parts are named by their content."""
    return " ".join(manifest.part_paths(record))


def _units_place(output: str, run: str) -> str:
    return files.join(output, "runs", f"{run}-units.parquet")


def _read_baseline(output: str) -> tuple[JobRun, dict[str, str]] | None:
    """The last published run and its units' parts; None where there is none, or its record is gone."""
    where = files.join(output, _BASELINE)
    try:
        run_id = records.from_json(Baseline, files.read_bytes(where), where).run
        run = read_run(output, run_id)
        with files.open_input(_units_place(output, run_id)) as stream:
            units = pq.read_table(stream, columns=["unit", "parts"])
    except FileNotFoundError:
        return None
    return run, dict(zip(units["unit"].to_pylist(), units["parts"].to_pylist(), strict=True))


def _opted_out(spec: JobSpec, embedded: Table) -> opt_out.OptOut:
    """The opt-out list that the table was held against; raises InputError where it has changed since."""
    named = [word.partition("=")[2] for word in spec.embed if word.startswith("--opt-out=")]
    place = named[-1] if named else ""
    sha256 = max((record.opt_out_sha256 for record in embedded.records), default="")
    return opt_out.load(files.absolute(place) if place not in ("", opt_out.NO_LIST) else "", sha256)


def _published_runs(spec: JobSpec) -> set[str]:
    """The runs to whose indexes one may roll back, and those of the current ones."""
    found = (versions.read(job.index_place(spec.output, step.name)) for step in spec.indexes)
    return {item.run for known in found if known for item in known.versions}


def _rows_of(output: str, run: str, units: Iterable[str]) -> int:
    """How many rows these units had in an earlier run."""
    wanted = pa.array(list(units), pa.string())
    with files.open_input(_units_place(output, run)) as stream:
        found = pq.read_table(stream, columns=["unit", "rows_out"])
    kept = found.filter(pa.compute.is_in(found["unit"], value_set=wanted))
    return int(pa.compute.sum(kept["rows_out"]).as_py() or 0)


def _write_units(output: str, run: str, embedded: Table) -> None:
    held = embedded.records
    columns = {
        "unit": [record.unit.id for record in held],
        "parts": [_parts(record) for record in held],
        **{name: [getattr(record, name) for record in held] for name in ("rows_in", "rows_out", "rows_dead")},
    }
    with files.PendingFile(output) as pending:
        pq.write_table(pa.table(columns, _UNITS), pending, compression="zstd")
        pending.publish(f"runs/{run}-units.parquet")


def _remove_old_units(spec: JobSpec, runs: set[str]) -> None:
    """Keeps the units of these runs, and of those to whose indexes one may roll back."""
    wanted = {_units_place(spec.output, run) for run in runs | _published_runs(spec)}
    for entry in files.list_files(files.join(spec.output, "runs")):
        if entry.place.endswith("-units.parquet") and entry.place not in wanted:
            files.remove(entry.place)


# --- runs, seen from outside ----------------------------------------------------------------------------------------


def read_run(output: str, run: str) -> JobRun:
    """The record of a run."""
    where = files.join(output, "runs", f"{run}.json")
    return records.from_json(JobRun, files.read_bytes(where), where)


def latest(output: str) -> JobRun | None:
    """The record of the last run of a job that writes to `output`, interrupted if it was killed; None where is none."""
    entries = files.list_files(files.join(output, "runs"))
    names = [entry.place.rpartition("/")[2].removesuffix(".json") for entry in entries if entry.place.endswith(".json")]
    if not names:
        return None
    run = read_run(output, max(names))
    if run.state == "running" and lock.is_over(output, run.id):  # it could not say so itself
        return replace(run, state="interrupted", message="its process is gone: run the same command again to go on")
    return run


def roll_back(spec: JobSpec) -> list[str]:
    """Makes the version before the current one current, of each index that has one; lines that say so."""
    lines = []
    with lock.held(spec.output, f"rollback-{uuid.uuid4().hex[:8]}"):
        for step in spec.indexes:
            root = job.index_place(spec.output, step.name)
            earlier = versions.roll_back(root)
            if earlier is None:
                lines.append(f"{root}: no earlier version is kept")
                continue
            lines.append(f"{root}: current is {earlier.id}, published {earlier.published_at}")
            files.write_bytes(spec.output, _BASELINE, records.to_json(Baseline(earlier.run)))
    return lines


def text(run: JobRun) -> str:
    """The record in lines for a reader."""
    lines = [f"run {run.id}: {run.state}, {run.seconds:,.1f} s, {run.cpu_seconds:,.1f} CPU s"]
    for stage in run.stages:
        took = f", {stage.seconds:,.1f} s, {stage.cpu_seconds:,.1f} CPU s" if stage.command else f": {stage.why}"
        lines.append(f"  {stage.name}: {stage.state}{took}")
    if run.table:
        of = run.table
        left_out = f" + {of.rows_opted_out:,} opted out" if of.rows_opted_out else ""
        lines.append(
            f"  table: {of.rows_in:,} samples = {of.rows_out:,} rows + {of.rows_dead:,} dead letters{left_out}; new: "
            f"{of.rows_new:,} rows, {of.rows_dead_new:,} dead letters; gone: {of.rows_gone:,} rows"
        )
    lines += [f"  index {item.name}: {item.state}, {item.rows_indexed:,} rows, {item.place}" for item in run.indexes]
    for alert in run.alerts:
        verdict = "TRIPPED" if alert.tripped else "not judged" if alert.figure is None else "kept"
        figure = "" if alert.figure is None else f" {alert.figure:g}{alert.unit and ' '}{alert.unit}"
        beyond = alert.figure is not None and alert.figure > alert.limit and not alert.name.startswith("min-")
        why = f" ({alert.why})" if beyond else ""  # what chance explains is kept, beyond the limit or not
        limit = f"{alert.limit:g}{alert.unit and ' '}{alert.unit}"
        lines.append(f"  {alert.name} {limit}: {verdict}:{figure} {alert.of}{why}")
    return "\n".join([*lines, *([f"  {run.message}"] if run.message else [])])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "signal 9, as from a system out of memory"
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _error(said: Sequence[str]) -> str:
    """Of a command's last lines those of its error: it begins with the command's name, and may have several."""
    begins = ("fusion ", "failed: ")
    first = max((i for i, line in enumerate(said) if line.startswith(begins)), default=len(said) - 1)
    return "\n".join(said[max(0, first) :]) or "it said nothing"


# --- a stage in a process of its own --------------------------------------------------------------------------------

_CHILD = "import sys; from pipelines.schedule import stage; stage(sys.argv[1:])"


def apart(argv: Sequence[str], quiet: bool = False) -> Ended:
    """Runs a command in a child process; what it says goes to this one's stderr, or nowhere. It ends with this one."""
    before = _cpu_seconds(resource.RUSAGE_CHILDREN)
    last: deque[str] = deque(maxlen=_LINES)
    path = os.pathsep.join((str(Path(__file__).parents[1]), *filter(None, sys.path)))
    with subprocess.Popen(  # noqa: S603 (our own command line)
        [sys.executable, "-P", "-c", _CHILD, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path},
    ) as child:
        reader = threading.Thread(target=_pass_on, args=(child.stdout, last, quiet), daemon=True)
        reader.start()
        try:
            code = child.wait()
        except KeyboardInterrupt:
            with _patience():
                child.terminate()
                try:
                    child.wait(30)
                except subprocess.TimeoutExpired:
                    child.kill()
            raise
        finally:
            reader.join(5)
    return Ended(code, _cpu_seconds(resource.RUSAGE_CHILDREN) - before, tuple(last))


@contextmanager
def _patience() -> Iterator[None]:
    """A second interrupt does not leave the stage behind."""
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def _pass_on(stream: Any, last: deque[str], quiet: bool) -> None:
    for line in stream:
        said = line.decode("utf-8", "replace")
        if not quiet:
            sys.stderr.write(said)
            sys.stderr.flush()
        if said.strip():
            last.append(said.rstrip())


def stage(argv: Sequence[str]) -> NoReturn:
    """What the child process does: the command, for as long as its parent lives."""
    from pipelines import cli

    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = cli.main(argv)
    if "pipelines.workers" in sys.modules:
        from pipelines import workers

        workers.end()
    sys.exit(code)


def _end_with_parent() -> None:
    """A parent that was killed can tell nobody; its end of the pipe is closed then."""
    while os.read(0, 1):
        pass
    os._exit(1)
