"""Labels: lists of classes and prompts, the truth about rows, and zero-shot probabilities written as columns.

A class's vector is the mean of its prompts' unit vectors, of unit length again. A picture's probabilities are
softmax(scale * cosines / temperature).
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion_core import files, fusers, metrics
from fusion_core.columns import Columns
from fusion_core.metrics import Floats, Ids
from fusion_core.table import Table, to_numpy
from fusion_core.towers import Towers
from schemas.columns import MAX_COLUMNS, NONE, LabelRecord, LabelSpec, labels_schema
from schemas.errors import UserError
from schemas.feature_table import ManifestRecord

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}")
FIT_ROWS = 20_000
_BATCH_ROWS = 8192
_BATCH_CELLS = 1 << 22  # rows x classes that are labelled at once, in float64
_MAX_FILE_BYTES = 64 << 20
_META = "meta."


class BadLabels(UserError):
    """A list of labels, prompts or truths that cannot be used: what is wrong, and the remedy."""


# --- classes and prompts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """Labels, each with the phrases that stand for it in prompts, and the prompts."""

    phrases: dict[str, tuple[str, ...]]
    templates: tuple[str, ...] = TEMPLATES

    @property
    def names(self) -> list[str]:
        """The labels, in the order of the file."""
        return list(self.phrases)

    def prompts(self, name: str) -> list[str]:
        """What is embedded for a label."""
        return [template.replace("{}", phrase) for phrase in self.phrases[name] for template in self.templates]


def read_classes(place: str, templates: str = "") -> Classes:
    """The classes of a file: a label on each line, optionally followed by tabs and the phrases that stand for it.

    `templates`: a file of prompts, each with one {}. Raises BadLabels, OSError.
    """
    phrases: dict[str, tuple[str, ...]] = {}
    for line in _lines(place):
        name, *said = (item.strip() for item in line.split("\t"))
        if name in phrases:
            raise BadLabels(f"{place} has the label {name!r} twice: remove one")
        phrases[name] = tuple(filter(None, said)) or (name,)
    if len(phrases) < 2:
        raise BadLabels(f"{place} has {len(phrases)} labels: probabilities need at least two, one on each line")
    prompts = tuple(_lines(templates)) if templates else TEMPLATES
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise BadLabels(f"{templates}: {prompt!r} needs one {{}} where the label goes")
    if not prompts:
        raise BadLabels(f"{templates} has no prompts: one on each line, like 'a photo of a {{}}'")
    return Classes(phrases, prompts)


def class_vectors(towers: Towers, classes: Classes) -> Floats:
    """The classes' vectors, float32 [C, D], of unit length."""
    texts = [classes.prompts(name) for name in classes.names]
    flat = [text for some in texts for text in some]
    step = towers.batch
    embedded = [towers.embed_texts(flat[start : start + step]) for start in range(0, len(flat), step)]
    stops = np.cumsum([len(some) for some in texts])
    means = [some.mean(axis=0) for some in np.split(np.concatenate(embedded), stops[:-1])]
    return fusers.normalize(np.stack(means))


def _lines(place: str) -> list[str]:
    """The lines of a text file that hold something."""
    entry = files.stat(files.absolute(place))
    if entry is None:
        raise BadLabels(f"there is no file {place}: write one entry on each line")
    if entry.size_bytes > _MAX_FILE_BYTES:
        raise BadLabels(f"{place} has {entry.size_bytes:,} bytes: that is no list of labels")
    try:
        text = files.read_bytes(files.absolute(place)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadLabels(f"{place} is not UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


# --- the truth ------------------------------------------------------------------------------------------------------


class Truth:
    """What is known of rows' classes: from a column of the table, a field of `meta`, or a file by key."""

    def __init__(self, table: Table, source: str):
        """`source`: a column's name, meta.NAME, or a CSV, TSV or Parquet file with columns key and label."""
        self._table, self._source = table, source
        self._file = files.absolute(source) if files.stat(files.absolute(source)) else ""
        self._column = "meta" if source.startswith(_META) else source
        if not self._file and not source.startswith(_META) and source not in _label_columns(table):
            raise BadLabels(
                f"{source!r} is no file, and {table.place} has no such column of labels: it has "
                f"{', '.join(_label_columns(table))} and meta.NAME for a field of the sidecar"
            )

    @property
    def columns(self) -> list[str]:
        """The columns of the table that `of` needs."""
        return ["key"] if self._file else [self._column]

    def of(self, rows: pa.Table) -> list[str | None]:
        """The labels of some rows of the table; None where there is none. Reads a file in pieces."""
        if self._file:
            return _from_file(self._file, rows["key"].combine_chunks())
        values = rows[self._column].to_pylist()
        if self._source.startswith(_META):
            name = self._source.removeprefix(_META)
            values = [_field(value, name) if value else None for value in values]
        return [_as_label(value) for value in values]


def _field(sidecar: str, name: str) -> object:
    """A field of a sidecar; None where it has none, or is no object with fields."""
    found = json.loads(sidecar)
    return found.get(name) if isinstance(found, dict) else None


def _as_label(value: object) -> str | None:
    if value is None or isinstance(value, dict | list) or value != value:  # NaN
        return None
    return str(value).strip() or None


def _label_columns(table: Table) -> list[str]:
    kinds = (pa.types.is_string, pa.types.is_integer, pa.types.is_boolean)
    return [field.name for field in table.schema if field.name != "meta" and any(kind(field.type) for kind in kinds)]


def _from_file(place: str, keys: pa.Array) -> list[str | None]:
    wanted = pc.unique(keys)
    known: dict[str, str | None] = {}
    for batch in _batches(place):
        batch = batch.filter(pc.is_in(batch["key"], wanted))
        for key, label in zip(batch["key"].to_pylist(), batch["label"].to_pylist(), strict=True):
            label = _as_label(label)
            if known.setdefault(key, label) != label:
                raise BadLabels(f"{place} says both {known[key]!r} and {label!r} of the key {key!r}: keep one")
    if not known:
        raise BadLabels(f"{place} has none of the table's keys, such as {wanted[0].as_py() if len(wanted) else ''!r}")
    return [known.get(key) for key in keys.to_pylist()]


def _batches(place: str) -> Iterator[pa.Table]:
    """The columns key and label of a file, as strings, piece by piece."""
    lower = place.lower()
    try:
        with files.open_input(place) as stream:
            if lower.endswith((".parquet", ".pq")):
                source = pq.ParquetFile(stream)
                _check_columns(place, source.schema_arrow.names)
                for batch in source.iter_batches(columns=["key", "label"]):
                    label = batch["label"]
                    if pa.types.is_floating(label.type):  # NaN is how pandas says that there is none
                        label = pc.if_else(pc.is_nan(label), None, label)
                    yield pa.table([batch["key"].cast("string"), label.cast("string")], ["key", "label"])
                return
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
            reader = csv.DictReader(text, delimiter="\t" if lower.endswith(".tsv") else ",")
            _check_columns(place, reader.fieldnames or [])
            yield from _csv_batches(reader)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise BadLabels(f"{place} cannot be read as CSV, TSV or Parquet: {error}") from error


def _csv_batches(reader: "csv.DictReader[str]") -> Iterator[pa.Table]:
    rows: list[dict[str, str]] = []
    for row in reader:
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            yield _as_table(rows)
            rows = []
    yield _as_table(rows)


def _as_table(rows: Sequence[dict[str, str]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in ("key", "label")})


def _check_columns(place: str, names: Sequence[str]) -> None:
    if not {"key", "label"} <= set(names):
        raise BadLabels(f"{place} needs the columns key and label; it has {', '.join(names) or 'none'}")


# --- zero-shot labels as columns ------------------------------------------------------------------------------------


def write(
    table: Table,
    place: str,
    classes: Classes,
    towers: Towers,
    *,
    top_k: int = 5,
    threshold: float | None = None,
    fit: str = "",
    log: Callable[[str], None] = lambda line: None,
    labelled: Callable[[int], None] = lambda rows: None,
) -> LabelRecord:
    """The record of the labels that now stand at `place`: parts with the schema `labels_schema`, row by row.

    `fit` names the truth about some rows (see Truth): the temperature is then fitted on at most 20,000 of them. Parts
    that stand already are not made again; `labelled` hears of rows done. Raises BadLabels, BadColumns, TowerError.
    """
    started = time.perf_counter()
    if threshold is not None and not -1 <= threshold <= 1:
        raise BadLabels(f"a threshold is a cosine, -1 to 1, not {threshold}")
    if threshold is not None and NONE in classes.phrases:
        raise BadLabels(f"with a threshold {NONE!r} says that no label fits: give the label of that name another")
    columns = Columns("labels", LabelRecord, files.absolute(place))
    columns.standing()
    vectors = class_vectors(towers, classes)
    spec = LabelSpec(
        tuple(classes.phrases.items()),
        classes.templates,
        min(top_k, len(classes.names)),
        threshold,
        round(towers.logit_scale, 4),
    )
    fitted, losses = 0, None
    if fit:
        temperature, fitted, losses = _fit(table, Truth(table, fit), classes, vectors, spec.scale)
        spec = replace(spec, temperature=temperature)
        log(f"label: temperature {temperature:.3f}, fitted on {fitted:,} rows")
    schema = labels_schema(spec)
    rows_at_once = max(1, min(_BATCH_ROWS, _BATCH_CELLS // len(vectors)))

    def columns_of(record: ManifestRecord) -> pa.Table:
        one = Table(table.place, table.spec, (record,))
        some = [_label(batch, vectors, spec, schema) for batch in one.scan(_NEEDED, rows_at_once)]
        labelled(record.rows_out)
        return pa.concat_tables(some)

    parts = columns.write_parts(table, spec, schema, columns_of)
    counts: dict[str, int] = {}
    for part in parts:
        for item in pc.drop_null(columns.read_part(part, ["label"])["label"]).value_counts().to_pylist():
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
    record = LabelRecord(
        table=table.place,
        table_spec=table.spec,
        parts=table.parts,
        spec=spec,
        outputs=tuple(parts),
        rows=table.num_rows,
        counts=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        fitted_rows=fitted,
        nll=losses,
        seconds={"label": round(time.perf_counter() - started, 3)},
    )
    columns.finish(record)
    return record


_NEEDED = ["key", "shard", "row", "has_image", "image_embedding"]


def _label(batch: pa.RecordBatch, vectors: Floats, spec: LabelSpec, schema: pa.Schema) -> pa.Table:
    present = batch["has_image"].to_numpy(zero_copy_only=False)
    cosines = fusers.normalize(to_numpy(batch["image_embedding"])) @ vectors.T
    probabilities = metrics.softmax(cosines * (spec.scale / spec.temperature)).astype(np.float32)
    names = np.array([name for name, _ in spec.classes], object)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : spec.top_k]
    best, rows = order[:, 0], np.arange(len(order))
    cosine = cosines[rows, best]
    fits = present if spec.threshold is None else present & (cosine >= spec.threshold)
    absent = ~present
    values: dict[str, Any] = {
        "label": pa.array(np.where(fits, names[best], NONE), pa.string(), mask=absent),
        "probability": pa.array(probabilities[rows, best], mask=~fits),
        "cosine": pa.array(cosine, mask=absent),
        "top_labels": _lists(pa.array(names[order].reshape(-1), pa.string()), absent, spec.top_k),
        "top_probabilities": _lists(
            pa.array(np.take_along_axis(probabilities, order, 1).reshape(-1)), absent, spec.top_k
        ),
    }
    if len(names) <= MAX_COLUMNS:
        values |= {f"P({name})": pa.array(probabilities[:, n], mask=absent) for n, name in enumerate(names)}
    given = {name: batch[name] for name in ("key", "shard", "row")}
    return pa.Table.from_arrays([(given | values)[name] for name in schema.names], schema=schema)


def _lists(values: pa.Array, absent: np.ndarray, width: int) -> pa.Array:
    offsets = pa.array(np.arange(len(absent) + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(absent))


# --- temperature ----------------------------------------------------------------------------------------------------


def _fit(
    table: Table, truth: Truth, classes: Classes, vectors: Floats, scale: float
) -> tuple[float, int, tuple[float, float]]:
    """The temperature, the rows it was fitted on, and the loss at 1 and at it on as many rows held out of the fit."""
    rows = table.sample(FIT_ROWS, 0, list(dict.fromkeys(["has_image", "image_embedding", *truth.columns])))
    numbers, known = class_numbers(truth.of(rows), classes.names)
    known &= rows["has_image"].to_numpy()
    if known.sum() < 20:
        raise BadLabels(
            f"only {int(known.sum())} of {len(rows):,} rows drawn have an image and one of the labels: "
            "a temperature needs 20 or more"
        )
    images = fusers.normalize(to_numpy(rows["image_embedding"].combine_chunks())[known])
    logits, real = zero_shot_logits(images, vectors, scale), numbers[known]
    half = np.random.default_rng(0).permutation(len(real)) % 2 == 0  # by lot: classes may alternate
    trial = metrics.fit_temperature(logits[half], real[half])
    losses = (metrics.nll(logits[~half], real[~half]), metrics.nll(logits[~half], real[~half], trial))
    return round(metrics.fit_temperature(logits, real), 6), int(known.sum()), losses


def class_numbers(labels: Sequence[str | None], names: Sequence[str]) -> tuple[Ids, np.ndarray]:
    """Each label's place among the names, int64 [n], 0 where it is none of them, and bool [n]: whether it is one."""
    places = {name: place for place, name in enumerate(names)}
    known = np.array([label in places for label in labels], bool)
    return np.array([places.get(label or "", 0) for label in labels], np.int64), known


def zero_shot_logits(images: Floats, vectors: Floats, scale: float) -> Floats:
    """The logits, float32 [n, C], of unit image vectors for class vectors."""
    logits: Floats = images @ vectors.T
    logits *= scale
    return logits
