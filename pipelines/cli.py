"""The command `fusion`. Each command imports what it needs when it runs, so that `fusion --help` is quick."""

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext, redirect_stdout, suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from pipelines import options
from schemas.errors import RunError, TableError, UserError

if TYPE_CHECKING:
    from fusion_core.opt_out import OptOut
    from fusion_core.table import Table
    from pipelines.change import Job
    from pipelines.plan import Plan
    from pipelines.runner import Knobs
    from schemas.feature_table import ManifestRecord, RunRecord, TableSpec, TowerSpec
    from schemas.job import JobRun

DONE, FAILED, USAGE, TOO_MANY_DEAD, ALERT, LOCKED = 0, 1, 2, 3, 4, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, as the parser's epilog lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = options.build()
    args, rest = parser.parse_known_args(arguments)
    wrong = _stray(rest) if args.command in ("embed", "retry", "verify", "index", "fuse") else next(iter(rest), None)
    if wrong is not None:
        print(f"fusion {args.command}: {_unknown(args, wrong)}; see fusion {args.command} --help", file=sys.stderr)
        return USAGE
    _quieten()
    args.arguments = arguments
    try:
        return _COMMANDS[args.command](args, rest)
    except KeyboardInterrupt:
        _leave("interrupted: what is recorded stays; run the same command again to go on")
    except (UserError, RunError, OSError) as error:
        print(f"fusion {args.command}: {error}{_what_now(error, args)}", file=sys.stderr)
        if isinstance(error, OSError):  # of a file where a folder should be, trying again would not help
            return USAGE if isinstance(error, NotADirectoryError) else FAILED
        return error.exit_code


def _stray(rest: Sequence[str]) -> str | None:
    """The first word among Beam's options that is neither an option nor can be the value of one."""
    pairs = pairwise(("", *rest))
    return next((word for before, word in pairs if word[:1] != "-" and (before[:1] != "-" or "=" in before)), None)


def _unknown(args: argparse.Namespace, word: str) -> str:
    import difflib

    if not word.startswith("-"):
        return f"{word!r} is one argument too many (a name with spaces or * stands in quotes)"
    options = [f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}" for name in vars(args)]
    near = difflib.get_close_matches(word.partition("=")[0], options, n=2)
    return f"no option {word}" + (f": did you mean {' or '.join(near)}?" if near else "")


def _recorded(arguments: Sequence[str]) -> str:
    """The command line as a run's record keeps it: without what is secret in it."""
    from fusion_core import files

    secret, shown = False, []
    for argument in arguments:
        name, given, _ = argument.partition("=")
        is_secret = name.startswith("--") and any(word in name for word in ("secret", "token", "password"))
        shown.append("***" if secret else f"{name}=***" if is_secret and given else files.redacted(argument))
        secret = is_secret and not given
    return " ".join(("fusion", *shown))


def _what_now(error: Exception, args: argparse.Namespace) -> str:
    """The remedy that the system's own words lack; of a full disk also the place, which they often do not name."""
    import errno
    import tempfile

    if isinstance(error, NotADirectoryError):
        return ": a file is where a folder is expected; name another place"
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    place = getattr(args, "output", "")
    where = " or ".join(filter(None, (place, f"the temporary folder {tempfile.gettempdir()}")))
    return f": make room at {where}, and run the same command again"


def _leave(message: str) -> NoReturn:
    """Ends the process at once: worker threads would otherwise finish their units first."""
    print(f"\nfusion: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(FAILED)


def _quieten() -> None:
    """Libraries speak up for errors only; what is ours and worth a warning is said."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("fusion").setLevel(logging.WARNING)
    logging.getLogger("fusion.unit").setLevel(logging.CRITICAL)  # failed units are told at the end
    warnings.filterwarnings("ignore", module="apache_beam|open_clip|timm|torch")
    signal.signal(signal.SIGTERM, signal.default_int_handler)


# --- embed and retry ------------------------------------------------------------------------------------------------


def _embed(args: argparse.Namespace, rest: list[str]) -> int:
    from fusion_core import files, fusers, manifest, shards
    from schemas.feature_table import InputSpec, TableSpec

    if not 0 <= args.shard_index < args.num_shards:
        raise shards.InputError(
            f"--shard-index {args.shard_index} is not one of 0…{args.num_shards - 1} (--num-shards)"
        )
    output = files.absolute(args.output)
    for folder in (files.absolute(pattern) for pattern in args.input):
        if f"{output}/".startswith(f"{folder.rstrip('/')}/") and files.is_folder(folder):
            raise shards.InputError(
                f"--output {output} is in the folder that is read: its files would be taken for shards the next time; "
                f"name a place outside of {folder}, or the shards themselves ('{folder}/*.tar')"
            )
    inputs = InputSpec(**{name: getattr(args, name) for name in InputSpec.__dataclass_fields__})
    next(iter(shards.plan(args.input, inputs)))  # that there is nothing to read is said before the slow imports
    keys = _opt_out(args)

    from fusion_core import towers
    from pipelines import change, plan, runner

    runner.check_beam_options(rest, vars(args))
    existing = manifest.read_spec(output)
    tower = _tower(
        args, args.model, args.pretrained, existing.tower if existing else None, lambda: _prepare(args, rest)
    )
    fuser = fusers.parse(args.fuser, tower.embedding_dim, tower.backbone) if args.fuser else None
    spec = manifest.claim(output, TableSpec(tower, inputs, fuser.spec if fuser else None))
    if fuser:
        fusers.keep(fuser, output)
    share = args.shard_index, args.num_shards
    units = partial(shards.plan, args.input, inputs)
    planned = plan.compare(units, output, spec, share, keys=keys, remove_missing=args.remove_missing)
    return _run(args, rest, change.Job(output, spec, _named(keys), towers.absolute(args.pretrained)), planned)


def _knobs(args: argparse.Namespace, rest: list[str]) -> "Knobs":
    from pipelines import runner

    return runner.Knobs(args.device, args.batch, args.workers or 0, args.quiet, runner.is_local(rest))


def _tower(
    args: argparse.Namespace,
    model: str,
    pretrained: str,
    existing: "TowerSpec | None",
    prepare: Callable[[], None] = lambda: None,
) -> "TowerSpec":
    """The spec of the towers that are asked for; those of a table that stands are not loaded before there is work."""
    from fusion_core import towers

    precision = args.precision
    if existing and precision in ("auto", existing.precision):
        precision = existing.precision  # a scheduled run may land on another machine
        if towers.are_unchanged(existing, model, pretrained):
            return existing
    prepare()
    return towers.load(model, pretrained, args.device, precision).spec


def _opt_out(args: argparse.Namespace) -> "OptOut | None":
    """The list of keys to leave out that is asked for; None where none is named, not even `none`."""
    from fusion_core import files, opt_out

    if args.opt_out is None:
        return None
    return opt_out.load(args.opt_out if args.opt_out == opt_out.NO_LIST else files.absolute(args.opt_out))


def _named(keys: "OptOut | None") -> tuple[str, str]:
    return (keys.place, keys.sha256) if keys else ("", "")


def _prepare(args: argparse.Namespace, rest: list[str]) -> None:
    """Has the workers' imports made beside those of this process."""
    from pipelines import runner, workers

    if runner.is_local(rest) and args.workers != 1 and not args.device.startswith("cuda"):
        workers.prepare()


def _retry(args: argparse.Namespace, rest: list[str]) -> int:
    from fusion_core import table
    from pipelines import runner

    runner.check_beam_options(rest, vars(args))
    feature_table = table.Table.open(args.table)
    spec = feature_table.spec
    _check_of_shards(spec, feature_table.place)
    broken = sorted({record.unit.shard for record in feature_table.records if record.rows_dead})
    if not broken and args.opt_out is None:
        print(f"{feature_table.place}: no dead letters")
        return DONE
    return _again(args, rest, feature_table.place, spec, broken, lambda record: record.rows_dead > 0)


def _again(
    args: argparse.Namespace,
    rest: list[str],
    place: str,
    spec: "TableSpec",
    broken: list[str],
    redo: "Callable[[ManifestRecord], bool]",
) -> int:
    """Runs units of some shards of a table again; returns the exit code. What of the shards is gone is told."""
    from fusion_core import shards, towers
    from pipelines import change, plan

    gone = dict.fromkeys(shards.missing(broken))
    if len(gone) < len(broken):  # if all are, it is said where one looked
        broken = [shard for shard in broken if shard not in gone]
        for shard in gone:
            print(f"{shard} is gone: what is wrong with it stays as it is", file=sys.stderr)
    keys = _opt_out(args)
    units = partial(shards.plan, broken, spec.input) if broken else tuple
    planned = plan.compare(units, place, spec, redo=redo, keys=keys)
    return _run(args, rest, change.Job(place, spec, _named(keys), towers.absolute(args.pretrained)), planned)


def _check_of_shards(spec: "TableSpec", place: str) -> None:
    """Raises TableError for a table that shards and one model alone do not make."""

    if spec.text_tower:
        raise TableError(
            f"{place} was made by `fusion fuse --text-model`: do this to the table that it was made of, then fuse again"
        )
    if spec.imported:
        raise TableError(
            f"{place} was imported, not embedded here: repair the files it came from, delete the parts that are "
            "damaged and run `fusion import` again; it does anew what has changed or is missing"
        )


def _run(args: argparse.Namespace, rest: list[str], job: "Job", planned: "Plan") -> int:
    from fusion_core import report, table, towers
    from pipelines import embed, workers

    knobs = _knobs(args, rest)
    if planned.work:
        _prepare(args, rest)
        if embed.runs_apart(knobs):  # then it is the workers that import open_clip and load the towers
            workers.start(min(knobs.threads, len(planned.work)), job.spec.tower, args.device, job.pretrained)
        else:
            towers.for_spec(job.spec.tower, args.device, args.pretrained)
    run = embed.run(job, planned, knobs, _recorded(args.arguments), rest)
    feature_table = table.Table.open(job.output)
    _summarize(feature_table, run)
    _tell_opt_out(feature_table, job, run)
    if run.state == "failed":
        return _tell_failures(run, len(planned.work) + len(planned.unswept))
    try:
        report.write(feature_table, job.output, "Feature table", run)
    except TableError as error:  # a part that stood already is damaged: what this run was to do is done
        print(f"no report: {error}", file=sys.stderr)
        return FAILED
    return _judge_dead_letters(feature_table, args.max_dead_letters)


def _tell_failures(run: "RunRecord", units: int) -> int:
    for failure in run.failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"{run.units_failed} of {units} units failed; run the same command again to go on", file=sys.stderr)
    return FAILED


def _summarize(feature_table: "Table", run: "RunRecord") -> None:
    from schemas.samples import ERRORS

    rows_in = sum(record.rows_in for record in feature_table.records)
    rows, dead = feature_table.num_rows, sum(feature_table.errors.values())
    left_out = f" + {feature_table.rows_opted_out:,} opted out" if feature_table.rows_opted_out else ""
    print(f"{feature_table.place}: {rows_in:,} samples = {rows:,} rows + {dead:,} dead letters{left_out}")
    for error, count in feature_table.errors.items():
        print(f"  {count:>8,} {error}: {ERRORS.get(error, '')}")
    repeated = sum(record.repeated_keys for record in feature_table.records)
    if repeated:
        print(f"  {repeated:>8,} rows have a key that stands earlier in their shard (kept: not a tar)")
    print(
        f"  this run: {run.units_done:,} units done, {run.units_skipped:,} stood already, {run.units_failed:,} failed"
    )
    if run.units_removed:
        left = f"{run.units_removed:,} units of {run.rows_removed:,} rows"
        print(f"  {left} left the table: they are not in the input any more")


def _tell_opt_out(feature_table: "Table", job: "Job", run: "RunRecord") -> None:
    """What proves that the listed keys are not in the table, and which of them never were in its shards."""
    from fusion_core import manifest, opt_out

    keys = opt_out.load(*job.opt_out)
    if not keys.sha256:
        return
    missing, examples = keys.missing(manifest.digests_left_out(feature_table.records))
    listed = len(keys.digests)
    print(
        f"  opt-out list {keys.sha256[:12]}: {listed - missing:,} of its {listed:,} keys found, "
        f"{feature_table.rows_opted_out:,} samples left out; this run took {run.rows_opted_out:,} out of recorded units"
    )
    if missing:
        print(f"  {missing:,} listed keys were found in no unit of the table, e.g. {', '.join(examples)}")


def _judge_dead_letters(feature_table: "Table", limit: tuple[float, bool] | None) -> int:
    if limit is None:
        return DONE
    found = feature_table.records
    dead, rows_in = sum(record.rows_dead for record in found), sum(record.rows_in for record in found)
    if not options.is_more(dead, rows_in, limit):
        return DONE
    print(f"{dead:,} dead letters of {rows_in:,} samples: more than --max-dead-letters allows", file=sys.stderr)
    return TOO_MANY_DEAD


# --- status and verify ----------------------------------------------------------------------------------------------


def _status(args: argparse.Namespace, _: list[str]) -> int:
    from fusion_core import files, manifest, table
    from pipelines import status
    from schemas.records import SchemaMismatch

    place = files.absolute(args.table)
    if manifest.read_spec(place) is None:
        from pipelines import schedule

        with suppress(SchemaMismatch):  # of a table's runs, whose table.json is gone
            if found := schedule.latest(place):
                return _tell(schedule.text(found), found, args.json)
    feature_table = table.Table.open(args.table)
    described = status.describe(feature_table)
    print(json.dumps(described) if args.json else status.text(described))
    return DONE


def _tell(text: str, record: "JobRun", as_json: bool) -> int:
    from schemas import records

    print(records.to_json(record, indent=2).decode() if as_json else text)
    return DONE


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import files, table, verify
    from pipelines import runner

    runner.check_beam_options(rest, vars(args))
    if args.opt_out is not None and not args.repair:
        print("fusion verify: --opt-out is for --repair: without it nothing is changed", file=sys.stderr)
        return USAGE
    place, code = files.absolute(args.table), None
    with tqdm(unit=" units", disable=args.json or args.quiet or not sys.stderr.isatty()) as bar:
        findings = verify.findings(place, lambda record: bar.update() and None)
        if args.repair and (findings or args.opt_out is not None):
            for finding in findings:
                print(f"to repair: {finding.what}", file=sys.stderr)
            with redirect_stdout(sys.stderr):  # what is asked for is the findings
                code = _repair(args, rest, place, {finding.unit for finding in findings})
            findings = verify.findings(place, lambda record: bar.update() and None)
    if args.json:
        print(json.dumps([{"unit": finding.unit, "what": finding.what} for finding in findings]))
    else:
        for finding in findings:
            print(finding.what if not finding.unit else f"unit {finding.unit}: {finding.what}")
        print(f"{place}: {len(findings)} findings" if findings else f"{place}: whole")
    if code is None and args.max_dead_letters:  # a repair has said it
        code = _judge_dead_letters(table.Table.open(place), args.max_dead_letters)
    return FAILED if findings else code or DONE


def _repair(args: argparse.Namespace, rest: list[str], place: str, units: set[str]) -> int:
    """Runs units again, and whatever else of their shards does not stand; returns the exit code."""
    from fusion_core import manifest

    spec = manifest.read_spec(place)
    assert spec is not None  # the table was just verified
    _check_of_shards(spec, place)
    broken = sorted(set(manifest.shards_of(place, units)))
    return _again(args, rest, place, spec, broken, lambda record: record.unit.id in units)


# --- index and search -----------------------------------------------------------------------------------------------


def _index(args: argparse.Namespace, rest: list[str]) -> int:
    from fusion_core import build, files, report, table, versions

    feature_table = table.Table.open(args.table)
    feature_table.check_embedding(args.column)

    from pipelines import index, runner

    runner.check_beam_options(rest, vars(args))
    place = files.absolute(args.output)
    if versions.read(place):
        print(f"fusion index: {place} has versions: `fusion run` adds to them; name another --output", file=sys.stderr)
        return USAGE
    asked = ("column", "target_recall", "max_bytes_per_vector", "max_shard_bytes", "tune_seconds")
    keep = files.absolute(args.keep) if args.keep else ""
    job = build.IndexJob(place, keep=keep, **{name: getattr(args, name) for name in asked})
    knobs = runner.Knobs(workers=args.workers or 0)
    try:
        record = index.run(job, feature_table, knobs, rest, partial(print, file=sys.stderr))
    except ValueError as error:  # of the request or of the table's vectors
        print(f"fusion index: {error}", file=sys.stderr)
        return USAGE
    report.write(feature_table, place, "Retrieval index", index=record)
    rows, kind = f"{record.rows_indexed:,} of {record.rows_table:,} rows", f"{record.factory} {record.parameters or ''}"
    size = f", {record.size_bytes / record.rows_indexed:.0f} bytes for a vector" if record.rows_indexed else ""
    print(f"{args.output}: {rows}, {kind.rstrip()}{size}")
    if not record.rows_indexed:
        print(f"no row that is kept has a vector in {args.column}: searches will find nothing", file=sys.stderr)
    for found in record.recalls:
        measured = f"{found.recall:.4f} (n={found.n_queries})"
        print(f"  recall@{found.k} of {found.queries} queries against exact search: {measured}")
    return DONE


def _search(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines import search

    return search.run(args)


def _dedup(args: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import dedup, table, towers
    from schemas.dedup import DedupSpec

    feature_table = table.Table.open(args.table)
    bits = dedup.NEAR_BITS if args.near and args.near_bits is None else args.near_bits
    spec = DedupSpec(bits, args.cosine, args.column, args.keep)
    workers = args.workers or len(os.sched_getaffinity(0))
    rows = feature_table.num_rows
    with tqdm(total=rows, unit=" pictures", disable=bits is None or not sys.stderr.isatty()) as bar:
        record = dedup.build(
            feature_table,
            args.output,
            spec,
            memory_bytes=args.memory_bytes,
            workers=workers,
            device=towers.pick_device(args.device) if args.cosine else "cpu",
            log=partial(print, file=sys.stderr),
            hashed=bar.update,
        )
    dropped = ", ".join(f"{count:,} {why}" for why, count in record.dropped.items())
    print(f"{args.output}: {record.clusters:,} of {rows:,} rows kept; dropped: {dropped}")
    if record.pairs_found:
        found, pairs = record.pairs_found.found, record.pairs_found.pairs
        print(
            f"  of {pairs:,} pairs above the cosine, {record.pairs_found.queries:,} rows against all, {found:,} found"
        )
    return DONE


def _label(args: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import labels, table, towers

    feature_table = table.Table.open(args.table)
    classes = labels.read_classes(args.labels, args.templates)
    tower = towers.for_table(feature_table.spec, args.device, args.pretrained)
    with tqdm(total=feature_table.num_rows, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        record = labels.write(
            feature_table,
            args.output,
            classes,
            tower,
            top_k=args.top_k,
            threshold=args.threshold,
            fit=args.fit,
            log=partial(print, file=sys.stderr),
            labelled=bar.update,
        )
    said = ", ".join(f"{count:,} {name}" for name, count in list(record.counts.items())[:8])
    print(f"{args.output}: {sum(record.counts.values()):,} of {record.rows:,} rows labelled: {said}")
    if record.nll:
        print(
            f"  temperature {record.spec.temperature:.3f}: loss on held-out rows {record.nll[0]:.3f} → "
            f"{record.nll[1]:.3f} nats (n={record.fitted_rows // 2:,})"
        )
    return DONE


def _caption(args: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import captions, table, towers

    feature_table = table.Table.open(args.table)
    writer = towers.load(args.model, args.pretrained, args.device, args.precision)
    with tqdm(total=feature_table.num_rows, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        record = captions.write(feature_table, args.output, writer, max_tokens=args.max_tokens, passed=bar.update)
    print(f"{args.output}: {record.captioned:,} captions for the pictures without one, of {record.rows:,} rows")
    for error, count in record.errors.items():
        print(f"  {count:>8,} {error}: no caption; the columns error and message say why")
    return DONE


def _serve(args: argparse.Namespace, _: list[str]) -> int:
    try:
        from pipelines import guard, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("pipelines", "fusion_core", "schemas"):
            raise
        print(f"fusion serve needs {error.name}: pip install 'fusion-features[serve]'", file=sys.stderr)
        return USAGE
    from fusion_core import files, index

    try:
        token = args.token or os.environ.get("FUSION_TOKEN", "")
        listening, hosts = serve.bind(args.host, args.port, token)
        with listening:
            found = index.Index.open(files.absolute(args.index))  # before the seconds that the towers take

            from fusion_core import search, towers

            tower = towers.for_table(found.record.table_spec, args.device, args.pretrained)
            limits = guard.Limits(args.max_k, args.max_body_bytes, args.timeout, args.max_waiting, tower.batch)
            app = serve.build(search.Searcher(found, tower), limits, token, hosts)
            rows = f"{found.record.rows_indexed:,} rows"

            def ready(url: str) -> None:
                print(f"{found.place}: {rows} at {url} (Ctrl-C ends)", flush=True)

            signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a cluster ends one
            serve.server(app, listening, ready, limits).run(sockets=[listening])
    except KeyboardInterrupt:  # how one ends a server
        pass
    return DONE


def _eval(args: argparse.Namespace, _: list[str]) -> int:
    from fusion_core import files, versions

    place = versions.standing(files.absolute(args.place))
    is_index = files.stat(files.join(place, "index.json")) is not None
    asked = {word.partition("=")[0] for word in args.arguments if word.startswith("--")}
    if wrong := sorted(asked & (options.EVAL_TABLE if is_index else options.EVAL_INDEX)):
        kind, other = ("an index", "a table") if is_index else ("a table", "an index")
        print(f"fusion eval: {place} is {kind}: {wrong[0]} is for {other}", file=sys.stderr)
        return USAGE
    if is_index:
        from pipelines import evaluate_index

        return evaluate_index.run(args, place)
    from pipelines import evaluate

    return evaluate.run(args)


# --- fusers ---------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import files, fusers, table, training
    from schemas.fuser import TrainJob

    asked = {name: getattr(args, name) for name in TrainJob.__dataclass_fields__ if name != "kind"}
    job = TrainJob(args.fuser, **asked)
    training.check_job(job)
    output = files.absolute(args.output)
    feature_table, views = table.Table.open(args.table), [table.Table.open(place) for place in args.views]
    training.check_output(output)

    from fusion_core import towers

    device = towers.pick_device(args.device)
    with tqdm(unit=" epochs", disable=args.quiet or not sys.stderr.isatty()) as bar:

        def epoch(number: int, epochs: int, loss: float, score: float) -> None:
            bar.total = epochs
            bar.set_postfix_str(f"loss {loss:.3f}, validation {score:.3f}")
            bar.update(number - bar.n)

        done = training.train(feature_table, job, views, args.triplets, args.labels, device, epoch)
    fusers.save(done.fuser, output)
    print(training.describe(done))
    print(f"{output}: fuser {done.fuser.spec.type}, {done.fuser.spec.fingerprint[:16]}")
    return DONE


def _fuse(args: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import replace

    from fusion_core import files, fusers, manifest, report, table
    from schemas.feature_table import TableSpec

    source, output = table.Table.open(args.table), files.absolute(args.output)
    if output == source.place:
        raise TableError(f"--output {output} is the table that is read: name another place")
    spec = replace(
        source.spec,
        fuser=None,
        fusion_weights=args.weights,
        text_tower=_text_tower(args, source, output),
        schema_version=TableSpec.schema_version,
    )
    fuser = fusers.parse(args.fuser, spec.tower.embedding_dim, spec.backbone) if args.fuser else None
    spec = replace(spec, fuser=fuser.spec if fuser else None)

    from pipelines import fuse, runner

    runner.check_beam_options(rest, vars(args))
    spec = manifest.claim(output, spec)
    if fuser:
        fusers.keep(fuser, output)
    knobs = runner.Knobs(workers=args.workers or 0, quiet=args.quiet)
    job = fuse.FuseJob(source.place, source.spec, output, spec, args.device)
    run = fuse.run(job, source, knobs, _recorded(args.arguments), rest)
    fused = table.Table.open(output)
    _summarize(fused, run)
    if run.state == "failed":
        return _tell_failures(run, run.units_done + run.units_failed)
    if job.text_tower and run.units_done:
        means = [_mean_similarity(one) for one in (source, fused)]
        print(f"  mean similarity of image and caption: {means[0]:.3f} before, {means[1]:.3f} now")
    report.write(fused, output, "Fused table", run)
    return DONE


def _text_tower(args: argparse.Namespace, source: "Table", output: str) -> "TowerSpec | None":
    """The spec of what embedded the captions of the table that is asked for, where it is another than the images'."""
    from fusion_core import manifest

    if not args.text_model:
        if not args.fuser:
            raise TableError("nothing to do: name a --fuser, a --text-model or both")
        return source.spec.text_tower
    existing = manifest.read_spec(output)
    from fusion_core import towers

    try:
        tower = _tower(args, args.text_model, args.text_pretrained, existing.text_tower if existing else None)
    except towers.TowerError as error:  # its words are those of `embed`
        raise towers.TowerError(str(error).replace("--pretrained", "--text-pretrained")) from error
    ours, theirs = source.spec.tower.embedding_dim, tower.embedding_dim
    if ours != theirs:
        raise TableError(
            f"the text tower of {tower.model} gives vectors of {theirs} dimensions, the images of {source.place} have "
            f"{ours}: name one that was trained for their space"
        )
    return tower


def _mean_similarity(feature_table: "Table") -> float:
    """Of up to 1,000 rows that have both modalities."""
    rows = feature_table.sample(1000, columns=["similarity"])["similarity"].drop_null().to_numpy()
    return float(rows.mean()) if len(rows) else float("nan")


def _export(args: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from fusion_core import export, table

    feature_table = table.Table.open(args.table)
    asked = {name: getattr(args, name) for name in ("modality", "images", "rows_per_file")}
    with tqdm(total=feature_table.num_rows, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        record = export.write(feature_table, args.output, args.format, **asked, passed=bar.update)
    print(f"{args.output}: {record.rows:,} of {record.rows_table:,} rows in {record.files:,} files")
    fate = "left out" if args.format == "clip-retrieval" else "without that member"
    for side, count in record.without.items():
        if count and (args.format == "webdataset" or args.modality in ("both", side)):
            print(f"  {count:>8,} rows without {'a picture' if side == 'image' else 'a caption'}: {fate}")
    if record.renamed:
        print(f"  {record.renamed:>8,} samples go by their row's number: their key is no name in a tar, or not alone")
    if args.images:
        print(f"  {record.images:>8,} original pictures")
    for error, count in record.errors.items():
        print(f"  {count:>8,} pictures missing ({error}), e.g. {record.first_error}")
    return DONE


def _import(args: argparse.Namespace, _: list[str]) -> int:
    from fusion_core import adopt, files, manifest, report, table

    triples = adopt.find(files.absolute(args.folder))  # what is wrong there is said before the slow imports
    output = files.absolute(args.output)
    keys = _opt_out(args)
    existing = manifest.read_spec(output)

    from fusion_core import towers
    from pipelines import adopt as importing
    from pipelines import change, plan
    from schemas.feature_table import TableSpec

    if existing and towers.are_unchanged(existing.tower, args.model, args.pretrained):
        tower = existing.tower
    else:  # queries are embedded in what every machine computes
        tower = towers.load(args.model, args.pretrained, args.device, "fp32").spec
    adopt.check_dim(triples, tower)
    spec = TableSpec(tower, imported=adopt.LAYOUT)
    if existing:
        spec = manifest.claim(output, spec)
    named = {triple.unit.id: triple for triple in triples}
    planned = plan.compare(
        lambda: (triple.unit for triple in triples), output, spec, keys=keys, remove_missing=args.remove_missing
    )
    if planned.work:
        some = [named[work.unit.id] for work in planned.work]
        compared = adopt.check_model(some, towers.for_spec(tower, args.device, args.pretrained))
        said = f"{compared} captions, embedded anew, have the vectors that are imported"
        unknown = "no text vectors with captions: whether this model made the vectors cannot be checked"
        print(f"{tower.model}: {said if compared else unknown}", file=sys.stderr)
    job = change.Job(output, manifest.claim(output, spec), _named(keys))
    run = importing.run(named, planned, job, _recorded(args.arguments), args.quiet)
    feature_table = table.Table.open(output)
    _summarize(feature_table, run)
    _tell_opt_out(feature_table, job, run)
    if run.state == "failed":
        return _tell_failures(run, len(planned.work) + len(planned.unswept))
    report.write(feature_table, output, "Imported table", run)
    return DONE


def _run_job(args: argparse.Namespace, _: list[str]) -> int:
    from fusion_core import files
    from pipelines import job, schedule

    path = files.absolute(args.job)
    with chdir(os.path.dirname(path)) if files.is_local(path) and os.path.isfile(path) else nullcontext():
        spec, data = job.read(path)
        if args.rollback:
            print("\n".join(schedule.roll_back(spec)))
            return DONE
        job.check_places(path, spec)
        run = schedule.run(spec, path, data, _recorded(args.arguments), args.quiet)
    if args.json or run.exit_code or not args.quiet:  # cron mails whatever is said
        _tell(schedule.text(run), run, args.json)
    if run.exit_code:
        print(f"fusion run: {run.message}", file=sys.stderr)
    return run.exit_code or DONE


def _demo(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines import demo

    return demo.run(args.output, args.pairs)


_COMMANDS = {
    "demo": _demo,
    "embed": _embed,
    "fuse": _fuse,
    "status": _status,
    "retry": _retry,
    "verify": _verify,
    "index": _index,
    "search": _search,
    "dedup": _dedup,
    "eval": _eval,
    "label": _label,
    "caption": _caption,
    "serve": _serve,
    "export": _export,
    "import": _import,
    "train": _train,
    "run": _run_job,
}

if __name__ == "__main__":
    sys.exit(main())
