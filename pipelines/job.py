"""Job files of `fusion run`, read and checked before any work.

Sections are commands and keys are their options, so what a job file may say is what the option parser knows. Relative
paths in it are relative to it.
"""

import argparse
import difflib
import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from typing import Any

from fusion_core import files, shards, versions
from pipelines import options
from schemas.errors import UserError
from schemas.feature_table import EMBEDDINGS, InputSpec
from schemas.job import IndexStep, JobSpec, Limits

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,100}")
_TOP = ("output", "embed", "fuse", "index", "evaluate", "alerts", "publish")
_NOT_HERE = {
    ("embed", "output"): "the table lies at OUTPUT/table, OUTPUT being the key `output` at the top",
    ("fuse", "output"): "the fused table lies at OUTPUT/fused, OUTPUT being the key `output` at the top",
    ("index", "output"): "an index lies at OUTPUT/indexes/NAME: give a `name`",
    ("evaluate", "output"): "what was measured lies in the folder of the index",
    ("evaluate", "table"): "the table is the job's own",
    ("embed", "max-dead-letters"): "it is judged before publishing: write it below [alerts]",
    ("embed", "shard-index"): "a job is one launcher",
    ("embed", "num-shards"): "a job is one launcher",
    **{("evaluate", name.lstrip("-")): "for a table, and the indexes are evaluated" for name in options.EVAL_TABLE},
}
_POSITIONAL = ("command", "place", "table")
_TAKES_BEAM = ("embed", "fuse", "index")  # a key `beam`, for the options that are not ours
_FUSERS = ("weighted_sum", "concat", "hadamard")

Parse = Callable[[Sequence[str]], tuple[argparse.Namespace, list[str]]]


class BadJob(UserError):
    """A job file that cannot be run: file, key, value and remedy."""


def table_place(output: str) -> str:
    """Where a job's embeddings lie."""
    return files.join(output, "table")


def fused_place(output: str) -> str:
    """Where a job's table lies that [fuse] writes."""
    return files.join(output, "fused")


def index_place(output: str, name: str) -> str:
    """Where the versions of a job's index lie; this place can be searched and served."""
    return files.join(output, "indexes", name)


def index_places(output: str) -> list[str]:
    """Where the indexes lie that a job has or had."""
    root = files.join(output, "indexes")
    below = len(root) + 1
    names = {entry.place[below:].partition("/")[0] for entry in files.list_files(root, recursive=True)}
    return [files.join(root, name) for name in sorted(names)]


def read(path: str) -> tuple[JobSpec, bytes]:
    """The job that a file describes, and the file's bytes. Raises BadJob; looks no farther than the file."""
    try:
        data = files.read_bytes(path)
        found = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadJob(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise BadJob(f"cannot read the job file {path}: {error}") from error
    _check_top(path, found)
    embed = _words(path, "embed", found["embed"])
    fuse = _words(path, "fuse", found["fuse"]) if "fuse" in found else None
    evaluate = _words(path, "evaluate", found["evaluate"]) if "evaluate" in found else None
    indexes = tuple(_index(path, item) for item in found["index"])
    names = [item.name for item in indexes]
    if again := [name for name in names if names.count(name) > 1]:
        raise BadJob(f"{path}: two [[index]] are named {again[0]!r}: give each a `name` of its own")
    limits = _parse(path, "alerts", found.get("alerts", {}), lambda words: _alerts().parse_known_args(words))
    publish = _parse(path, "publish", found.get("publish", {}), lambda words: _publish().parse_known_args(words))
    spec = JobSpec(
        files.absolute(found["output"]), embed, fuse, indexes, evaluate, Limits(**vars(limits)), publish.keep
    )
    _check_columns(path, spec)
    return spec, data


def _check_top(path: str, found: Mapping[str, Any]) -> None:
    for key in found:
        if key not in _TOP:
            raise BadJob(f"{path}: no key or section {key!r}{_meant(key, _TOP)}; there are {', '.join(_TOP)}")
    if not isinstance(found.get("output"), str) or not found["output"]:
        raise BadJob(f'{path}: output = "…" must say at the top where the job writes: a folder or a URI')
    for key in _TOP[1:]:
        if key != "index" and key in found and not isinstance(found[key], dict):
            raise BadJob(f"{path}: {key} = {_shown(found[key])}: it must be a section, [{key}]")
    if "embed" not in found:
        raise BadJob(f"{path}: there is no section [embed], which says what to read and by which model")
    indexes = found.get("index")
    if not (isinstance(indexes, list) and indexes and all(isinstance(item, dict) for item in indexes)):
        raise BadJob(f"{path}: there must be a section [[index]], with two brackets, for each index that is wanted")


def _index(path: str, section: Mapping[str, Any]) -> IndexStep:
    rest = dict(section)
    name = rest.pop("name", section.get("column", "image_embedding"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadJob(f"{path}: [[index]] name = {_shown(name)}: it becomes a folder: letters, digits, '.', '_' and '-'")
    return IndexStep(name, _words(path, "index", rest))


_COMMANDS = {
    "embed": ["embed", "--output=x"],
    "fuse": ["fuse", "x", "--output=x"],
    "index": ["index", "x", "--output=x"],
    "evaluate": ["eval", "x"],
}


def _words(path: str, name: str, section: Mapping[str, Any]) -> tuple[str, ...]:
    """A section as words of its command's line, checked by that command's own parser."""
    given = dict(section)
    beam = given.pop("beam", []) if name in _TAKES_BEAM else []
    if not (isinstance(beam, list) and all(isinstance(word, str) and word.startswith("--") for word in beam)):
        raise BadJob(
            f'{path}: [{name}] beam = {_shown(beam)}: it must be a list of options like ["--runner=FlinkRunner"]'
        )
    _parse(path, name, given, lambda words: options.build().parse_known_args([*_COMMANDS[name], *words]))
    return (*_as_words(given), *beam)


def _as_words(section: Mapping[str, Any]) -> list[str]:
    words = []
    for key, value in section.items():
        if value is not False:
            words += [f"--{key}" if item is True else f"--{key}={item}" for item in _items(value)]
    return words


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parse(path: str, name: str, section: Mapping[str, Any], parse: Parse) -> argparse.Namespace:
    """What the parser makes of a section's keys. Raises BadJob that names the key, and what would do."""
    where = f"{path}: [[{name}]]" if name == "index" else f"{path}: [{name}]"
    for key, value in section.items():
        if (name, key) in _NOT_HERE:
            raise BadJob(f"{where} {key} = {_shown(value)}: not here: {_NOT_HERE[name, key]}")
        if key == "help":
            raise BadJob(f"{where} has no key 'help'")
        kinds = {type(item) for item in _items(value)}
        if not kinds <= {str, int, float, bool} or (isinstance(value, list) and bool in kinds):
            raise BadJob(f"{where} {key} = {_shown(value)}: it must be a text, a number, true, or a list of texts")
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args, rest = parse(_as_words({key: value is False or value for key, value in section.items()}))
            unknown = [word.partition("=")[0].lstrip("-") for word in rest]
            unknown += [key for key in section if key.replace("-", "_") not in vars(args) or "_" in key]
    except SystemExit:
        message = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        key = message.removeprefix("argument ").partition(":")[0].lstrip("-")
        if key in section and "ignored explicit argument" in message:
            message = f"{key} = {_shown(section[key])}: it must be true or false"
        elif key in section:
            message = f"{key} = {_shown(section[key])}: {message.partition(': ')[2]}"
        raise BadJob(f"{where} {message.replace('--', '')}") from None
    known = [key.replace("_", "-") for key in vars(args) if key not in _POSITIONAL]
    known = [key for key in known if (name, key) not in _NOT_HERE]
    if unknown:
        raise BadJob(f"{where} has no key {unknown[0]!r}{_meant(unknown[0], known)}; there are {', '.join(known)}")
    for key, value in section.items():
        taken = getattr(args, key.replace("-", "_"))
        if isinstance(value, list) and not isinstance(taken, list):
            raise BadJob(f"{where} {key} = {_shown(value)}: one value, not a list")
    return args


def _shown(value: Any) -> str:
    """The value as a TOML file has it, or nearly."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _meant(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _alerts() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusion run", allow_abbrev=False, add_help=False)
    kinds = {"max_dead_letters": options.share, "max_new_dead_letters": options.share, "max_row_drop": options.share}
    for item in fields(Limits):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kinds.get(item.name, _unit), default=None)
    return parser


def _publish() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusion run", allow_abbrev=False, add_help=False)
    parser.add_argument("--keep", type=options.positive, default=JobSpec.keep)
    return parser


def _unit(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _check_columns(path: str, spec: JobSpec) -> None:
    fused = any(word.startswith("--fuser=") for word in spec.embed)
    if spec.fuse is not None:
        fuse = options.build().parse_known_args(["fuse", "x", "--output=x", *spec.fuse])[0]
        fused = bool(fuse.fuser)
        if not (fuse.fuser or fuse.text_model):
            raise BadJob(f"{path}: [fuse] has nothing to do: name a `fuser`, a `text-model` or both")
    for step in spec.indexes:
        column = options.build().parse_known_args(["index", "x", "--output=x", *step.options])[0].column
        if column not in EMBEDDINGS:
            raise BadJob(f"{path}: [[index]] column = {_shown(column)}: it must be one of {', '.join(EMBEDDINGS)}")
        if column == "fused_embedding" and not fused:
            raise BadJob(f"{path}: [[index]] column = {_shown(column)}: add `fuser` to a section [fuse], or to [embed]")


def check_places(path: str, spec: JobSpec) -> None:
    """Raises BadJob where something that the job reads is not there, or a table where it writes. Run in the job file's
    folder.
    """
    if files.stat(files.join(spec.output, "table.json")):
        raise BadJob(
            f"{path}: output = {_shown(spec.output)} is a feature table: name a folder for the job, which holds its "
            "table and its indexes"
        )
    embed = options.build().parse_known_args(["embed", "--output=x", *spec.embed])[0]
    inputs = InputSpec(**{name: getattr(embed, name) for name in InputSpec.__dataclass_fields__})
    try:
        next(iter(shards.plan(embed.input, inputs)))
    except shards.InputError as error:
        raise BadJob(f"{path}: [embed] input = {_shown(embed.input)}: {error}") from error
    for key in ("model", "pretrained"):
        value = getattr(embed, key)
        if value.startswith(("/", "./", "../", "~")) and not os.path.exists(os.path.expanduser(value)):
            raise BadJob(f"{path}: [embed] {key} = {_shown(value)}: there is no such file or folder")
    _check_fuser(path, "embed", embed.fuser)
    if embed.opt_out not in (None, "none") and files.stat(files.absolute(embed.opt_out)) is None:
        raise BadJob(f"{path}: [embed] opt-out = {_shown(embed.opt_out)}: there is no such file")
    if spec.fuse is not None:
        fuse = options.build().parse_known_args(["fuse", "x", "--output=x", *spec.fuse])[0]
        _check_fuser(path, "fuse", fuse.fuser)
    for step in spec.indexes:
        keep = options.build().parse_known_args(["index", "x", "--output=x", *step.options])[0].keep
        if keep and files.stat(files.join(files.absolute(keep), "dedup.json")) is None:
            raise BadJob(
                f"{path}: [[index]] keep = {_shown(keep)}: there are no duplicates: write them with `fusion dedup`"
            )
        versions.read(index_place(spec.output, step.name))  # refuses what another release wrote


def _check_fuser(path: str, section: str, fuser: str) -> None:
    if not fuser or fuser.partition(":")[0] in _FUSERS:
        return
    if files.stat(files.join(files.absolute(fuser), "fuser.json")) is None:
        raise BadJob(
            f"{path}: [{section}] fuser = {_shown(fuser)}: it is none of {', '.join(_FUSERS)}, nor a folder of "
            "`fusion train`"
        )
