"""What a fuser is trained on: examples read from feature tables, files of keys and labels, and how they are split.

Memory is that of the rows that are used (`max_rows`), as float16; tables are read by row groups.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from fusion_core import files
from fusion_core.labels import Truth
from fusion_core.table import Table, to_numpy
from schemas.errors import UserError
from schemas.feature_table import ROW_GROUP_ROWS
from schemas.fuser import TrainJob

Floats = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TRAIN, VALIDATION, TEST = 0, 1, 2

_SHARES = (0.7, 0.8)  # up to which a content's hash is for training, for validation
_SIDES = ("image", "text")


class TrainError(UserError):
    """Nothing can be learned from what was given: why, and what would help."""


@dataclass(frozen=True)
class Examples:
    """What is learned from: for each of m examples two slots, and the row (of n) that they should find or its label."""

    image: Floats  # float16 [m, D]
    text: Floats
    has_image: Bools  # [m]
    has_text: Bools
    row: Ids  # [m], of the whole rows
    targets: Floats  # float16 [n, D]: what is to be found
    has_target: Bools  # [n]
    group: npt.NDArray[np.uint64]  # [n]: of the row's content; rows of one group are copies
    caption: Ids  # [n]: rows of one code have the same caption; -1 without one
    label: Ids  # [n]: -1 without one
    classes: tuple[str, ...] = ()
    contrastive: bool = True
    told: str = ""  # where they come from, in words

    @property
    def dim(self) -> int:
        """D."""
        return int(self.targets.shape[1])

    def split(self, seed: int) -> npt.NDArray[np.int8]:
        """TRAIN, VALIDATION or TEST for each example, [m]: 70, 10 and 20 % of the contents, by their hash."""
        mixed = _mixed(self.group ^ _mixed(np.array([seed], np.uint64)))
        draw = mixed.astype(np.float64) / 2.0**64
        found = np.searchsorted(_SHARES, draw, "right").astype(np.int8)
        return found[self.row]


def gather(table: Table, job: TrainJob, views: Sequence[Table], triplets: str, labels: str) -> Examples:
    """The examples of at most `max_rows` rows of the table, drawn with the job's seed. Raises TrainError."""
    if not views and not triplets and not labels:
        raise TrainError(
            "there is nothing to learn from: a table alone says nothing about how to weigh its modalities. Give "
            "--views (a table of the same keys from degraded images or captions), --triplets or --labels; without, "
            "use weighted_sum"
        )
    if views and triplets:
        raise TrainError("--views and --triplets ask for different things: train with one of them")
    for view in views:
        if view.spec.backbone != table.spec.backbone:
            raise TrainError(f"{view.place} was embedded by other towers than {table.place}: embed it with the same")
    rows = _read(table, sampled(table, job.max_rows, job.seed), job, labels)
    if triplets:
        return _of_triplets(table, rows, triplets, job)
    if not views:
        return replace(rows, told=f"labels: {labels}")
    keys = _keys(table, job)
    found = [_of_view(rows, keys, view) for view in views]
    image, text, has_image, has_text, row = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    told = "views: " + ", ".join(view.place for view in views) + (f"; labels: {labels}" if labels else "")
    return replace(
        rows, image=image, text=text, has_image=has_image, has_text=has_text, row=row, contrastive=True, told=told
    )


def sampled(table: Table, max_rows: int, seed: int) -> Ids:
    """Positions of at most `max_rows` rows, ascending: all, or those of whole row groups drawn with the seed."""
    if table.num_rows <= max_rows:
        return np.arange(table.num_rows)
    rows = np.array([part.rows for part in table.parts], np.int64)
    firsts = np.cumsum(rows) - rows
    groups = -(-rows // ROW_GROUP_ROWS)
    part = np.repeat(np.arange(len(rows)), groups)
    number = np.arange(len(part)) - np.repeat(np.cumsum(groups) - groups, groups)
    starts = firsts[part] + number * ROW_GROUP_ROWS
    sizes = np.minimum(ROW_GROUP_ROWS, rows[part] - number * ROW_GROUP_ROWS)
    order = np.random.default_rng(seed).permutation(len(starts))
    last = int(np.searchsorted(np.cumsum(sizes[order]), max_rows))
    drawn = np.sort(order[: last + 1])
    found: Ids = np.concatenate([np.arange(starts[i], starts[i] + sizes[i]) for i in drawn])
    return found[:max_rows]


def _read(table: Table, positions: Ids, job: TrainJob, labels: str) -> Examples:
    """The rows as they are, each its own example, with labels if there are any."""
    n, dim = len(positions), table.spec.tower.embedding_dim
    image, text = np.zeros((n, dim), np.float16), np.zeros((n, dim), np.float16)
    has_image, has_text = np.zeros(n, bool), np.zeros(n, bool)
    digests = np.zeros((n, 32), np.uint8)
    captions, given = [], []
    truth = Truth(table, labels) if labels else None
    source = truth.columns if truth else []
    columns = ["has_image", "has_text", "sha256", "caption", "image_embedding", "text_embedding"]
    start = 0
    for some in table.pick(positions, list(dict.fromkeys([*columns, *source]))):
        rows = slice(start, start + some.num_rows)
        image[rows], text[rows], has_image[rows], has_text[rows] = _slots(some)
        digests[rows] = picture_digests(some["sha256"], image[rows])
        captions.append(some["caption"])
        given.append(some.select(source))
        start = rows.stop
    caption, group = _contents(
        pa.chunked_array([c for a in captions for c in a.chunks], pa.string()), digests, has_image
    )
    label: Ids = np.full(n, -1, np.int64)
    classes: tuple[str, ...] = ()
    if truth:
        label, classes = _encoded(pa.chunked_array([truth.of(pa.concat_tables(given))], pa.string()))
    target, has_target = (image, has_image) if job.target == "image" else (text, has_text)
    return Examples(
        image, text, has_image, has_text, np.arange(n), target, has_target, group, caption, label, classes, False
    )


def _slots(rows: pa.Table) -> tuple[Floats, Floats, Bools, Bools]:
    whole = rows.combine_chunks()
    vectors = [to_numpy(whole[f"{side}_embedding"].chunk(0)) if whole.num_rows else 0 for side in _SIDES]
    flags = [whole[f"has_{side}"].to_numpy(zero_copy_only=False) if whole.num_rows else False for side in _SIDES]
    return vectors[0], vectors[1], flags[0], flags[1]  # type: ignore[return-value]


def picture_digests(column: pa.ChunkedArray, image: Floats) -> npt.NDArray[np.uint8]:
    """The pictures' hashes [n, 32]; of an imported row, whose picture nobody saw, that of its vector."""
    filled = pc.fill_null(column, bytes(32)).combine_chunks()
    flat = np.frombuffer(filled.buffers()[1], np.uint8).reshape(-1, 32)
    digests = flat[filled.offset : filled.offset + len(filled)].copy()
    for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False) & image.any(axis=1)):
        digests[row] = np.frombuffer(hashlib.sha256(image[row].tobytes()).digest(), np.uint8)
    return digests


def _contents(
    captions: pa.ChunkedArray, digests: npt.NDArray[np.uint8], has_image: Bools
) -> tuple[Ids, npt.NDArray[np.uint64]]:
    """A code for each row's caption, and the hash of its content: of its picture, else of its caption."""
    coded = captions.combine_chunks().dictionary_encode()
    code = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    group = digests[:, :8].copy().view(np.uint64)[:, 0]
    silent = np.flatnonzero(~has_image)
    if len(silent):
        wanted, place = np.unique(code[silent], return_inverse=True)
        words = [coded.dictionary[int(i)].as_py() if i >= 0 else "" for i in wanted]
        hashes = [hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words]
        group[silent] = np.frombuffer(b"".join(hashes), np.uint64)[place]
    return code, group


def _column(table: Table, positions: Ids, name: str) -> pa.Array:
    pieces = [chunk for some in table.pick(positions, [name]) for chunk in some[name].chunks]
    return pa.chunked_array(pieces, table.schema.field(name).type).combine_chunks()


def _keys(table: Table, job: TrainJob) -> pa.Array:
    return _column(table, sampled(table, job.max_rows, job.seed), "key")


def _of_view(rows: Examples, keys: pa.Array, view: Table) -> tuple[Floats, Floats, Bools, Bools, Ids]:
    """The view's rows whose key is one row's of the table only: their slots, and the number of that row."""
    row, position = _places(keys, view)
    if not len(row):
        raise TrainError(f"{view.place} has no key of the table's: views are rows of the same keys")
    image, text = (np.zeros((len(row), rows.dim), np.float16) for _ in _SIDES)
    has_image, has_text = (np.zeros(len(row), bool) for _ in _SIDES)
    start = 0
    columns = ["has_image", "has_text", "image_embedding", "text_embedding"]
    for some in view.pick(position, columns):
        part = slice(start, start + some.num_rows)
        image[part], text[part], has_image[part], has_text[part] = _slots(some)
        start = part.stop
    return image, text, has_image, has_text, row


def _places(keys: pa.Array, table: Table) -> tuple[Ids, Ids]:
    """For each row of the table whose key is among `keys`: which, and its position, ascending by position.

    Keys that stand in either more than once are left out: nobody can say which is meant.
    """
    which, where, first = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for batch in table.scan(["key"]):
        found = pc.index_in(batch["key"], value_set=keys)
        hits = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        which.append(found.drop_null().to_numpy(zero_copy_only=False).astype(np.int64))
        where.append(hits + first)
        first += batch.num_rows
    row, position = np.concatenate(which), np.concatenate(where)
    times_here = np.bincount(keys.dictionary_encode().indices.to_numpy(zero_copy_only=False), minlength=1)
    code = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    once = (times_here[code] == 1)[row] & (np.bincount(row, minlength=len(keys)) == 1)[row]
    return row[once], position[once]


def _of_triplets(table: Table, rows: Examples, place: str, job: TrainJob) -> Examples:
    """Examples whose image and text are those of two rows, and that should find a third."""
    given = _read_file(place, ("query_image_key", "query_text_key", "target_key"), job.max_rows)
    keys = _keys(table, job)
    code = keys.dictionary_encode()
    times = np.bincount(code.indices.to_numpy(zero_copy_only=False), minlength=1)
    once = pa.array(times[code.indices.to_numpy(zero_copy_only=False)] == 1)
    numbers, kept = pa.array(np.arange(len(keys))).filter(once), keys.filter(once)
    if not len(kept):
        raise TrainError(f"{table.place} has no key that is one row's only")

    def row_of(name: str) -> Ids:
        found = pc.take(numbers, pc.index_in(given[name], value_set=kept))
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)

    image, text, target = (row_of(name) for name in ("query_image_key", "query_text_key", "target_key"))
    known = (target >= 0) & ((image >= 0) | (text >= 0))
    if not known.any():
        raise TrainError(f"{place}: none of its keys are keys of {table.place}")
    image, text, target = image[known], text[known], target[known]
    return replace(
        rows,
        image=rows.image[np.maximum(image, 0)],
        text=rows.text[np.maximum(text, 0)],
        has_image=(image >= 0) & rows.has_image[np.maximum(image, 0)],
        has_text=(text >= 0) & rows.has_text[np.maximum(text, 0)],
        row=target,
        contrastive=True,
        told=f"triplets: {place}, {int(known.sum()):,} of {len(known):,} with known keys",
    )


def _encoded(labels: pa.ChunkedArray) -> tuple[Ids, tuple[str, ...]]:
    """The number of each row's class, -1 without one, and the classes' names."""
    classes = sorted(pc.unique(labels.drop_null()).to_pylist())
    if len(classes) < 2:
        raise TrainError(f"labels need two classes at least; found {classes or 'none'}")
    if len(classes) > 10_000:
        raise TrainError(f"{len(classes):,} different labels: are they classes?")
    found = pc.fill_null(pc.index_in(labels, value_set=pa.array(classes)), -1)
    return found.to_numpy().astype(np.int64), tuple(classes)


def _read_file(place: str, columns: Sequence[str], max_rows: int) -> pa.Table:
    """These columns of a CSV, JSONL or Parquet file; columns whose name has `query` in it may be missing."""
    place = files.absolute(place)
    try:
        with files.open_input(place) as stream:
            if place.endswith((".parquet", ".pq")):
                found = pq.read_table(stream)
            elif place.endswith((".jsonl", ".ndjson", ".json")):
                found = pajson.read_json(stream)
            else:
                kinds = pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
                tabs = pacsv.ParseOptions(delimiter="\t" if place.endswith(".tsv") else ",")
                found = pacsv.read_csv(stream, parse_options=tabs, convert_options=kinds)
    except pa.ArrowInvalid as error:
        raise TrainError(f"cannot read {place}: {error}") from error
    if "query_text" in found.column_names and "query_text_key" in columns:
        raise TrainError(
            f"{place}: texts are not embedded here: embed them as rows of the table, and name them by query_text_key"
        )
    missing = [name for name in columns if name not in found.column_names]
    if missing and not (len(missing) == 1 and missing[0].startswith("query_")):
        raise TrainError(f"{place} has no column {missing[0]!r}; it has {', '.join(found.column_names)}")
    for name in missing:
        found = found.append_column(name, pa.nulls(found.num_rows, pa.string()))
    found = found.select(list(columns)).slice(0, max_rows)
    try:
        return found.cast(pa.schema([(name, pa.string()) for name in columns]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TrainError(f"{place}: keys are strings or numbers: {error}") from error


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Well-mixed numbers (splitmix64): neighbours come out unlike each other."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return found
