"""One unit of work, from shard to manifest record: read, decode, embed, fuse, write.

Bytes and pixels never leave this module's loop; memory is bounded by a window of samples, not by the shard.
"""

import hashlib
import importlib.metadata
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TypeVar

import numpy as np
import pyarrow as pa

from fusion_core import files, fusers, images, readers, shards, table
from fusion_core.towers import Towers
from schemas.feature_table import ManifestRecord, Part, TableSpec, features_schema
from schemas.samples import DeadLetter, Sample, Unit

ItemT = TypeVar("ItemT")

_WINDOW_ROWS = 4096  # rows kept waiting, at most, until a forward batch is full


class InputChanged(RuntimeError):
    """A shard changed while it was read."""


@dataclass(frozen=True)
class Work:
    """A unit to run, with what earlier executions of it left: its record, and files that no record names."""

    unit: Unit
    previous: ManifestRecord | None = None
    stale: tuple[str, ...] = ()


def run_unit(
    work: Work,
    output: str,
    spec: TableSpec,
    towers: Towers,
    batch: int = 64,
    done: Callable[[int], None] = lambda n: None,
) -> ManifestRecord:
    """Embeds one unit into the table at `output` and returns its record; `done` hears of finished samples.

    Rows of the unit's earlier part with the same image bytes or the same caption keep their vectors. Raises
    InputChanged when the shard is not what was planned, OSError when it cannot be read or the part not be written.
    """
    clock = Clock()
    started = time.perf_counter()
    check_identity(work.unit)
    known = earlier_vectors(output, spec, work.previous)
    with table.UnitWriter(output, spec, work.unit, work.previous, work.stale) as writer:
        for window in windows(clock.each("read", readers.read(work.unit, spec.input)), batch):
            rows, letters = decode(window, spec, known, clock)
            if rows:
                embedded = embed(rows, towers, known, batch, clock)
                with clock("write"):
                    writer.write(features(work.unit, rows, *embedded, spec, clock))
            writer.reject(letters)
            done(len(window))
        check_identity(work.unit)
        with clock("write"):
            return writer.commit(
                rows_reused=known.rows_reused,
                seconds={**clock.seconds, "unit": time.perf_counter() - started},
                versions=versions(),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )


def check_identity(unit: Unit) -> None:
    """Raises InputChanged unless the unit's input is still what the plan saw."""
    now = shards.identity(unit)
    if now != unit.identity:
        raise InputChanged(f"{unit.shard} changed while the job ran ({unit.identity} -> {now}): run the command again")


# --- windows --------------------------------------------------------------------------------------------------------


def windows(stream: Iterable[Sample | DeadLetter], batch: int) -> Iterator[list[Sample | DeadLetter]]:
    """Consecutive items, cut so that a window fills one forward batch of images, or of captions if these are more."""
    window: list[Sample | DeadLetter] = []
    n_images = n_texts = 0
    for item in stream:
        window.append(item)
        if isinstance(item, Sample):
            n_images += item.image is not None
            n_texts += item.caption is not None
        if max(n_images, n_texts) >= batch or len(window) >= _WINDOW_ROWS:
            yield window
            window, n_images, n_texts = [], 0, 0
    if window:
        yield window


# --- what is known already ------------------------------------------------------------------------------------------


@dataclass
class KnownVectors:
    """Vectors of the unit's earlier part, by the SHA-256 of the image and by the caption."""

    images: dict[bytes, tuple[np.ndarray, int, int]] = field(default_factory=dict)  # vector, width, height
    texts: dict[str, np.ndarray] = field(default_factory=dict)
    rows_reused: int = 0


def earlier_vectors(output: str, spec: TableSpec, previous: ManifestRecord | None) -> KnownVectors:
    """The vectors of the unit's earlier part; none where there is none or it is not what its record says."""
    known = KnownVectors()
    part = previous.features if previous and previous.spec_fingerprint == spec.fingerprint else None
    if part is None or not _is_whole(output, part):
        return known
    rows = table.Table(output, spec, ()).read_part(part)
    image, text = (table.to_numpy(rows[name].combine_chunks()) for name in ("image_embedding", "text_embedding"))
    digests, captions = rows["sha256"].to_pylist(), rows["caption"].to_pylist()
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    for row, (digest, caption, (width, height)) in enumerate(zip(digests, captions, sizes, strict=True)):
        if digest is not None:
            known.images[digest] = (image[row].astype(np.float32), width, height)
        if has_words(caption):
            known.texts[caption] = text[row].astype(np.float32)
    return known


def _is_whole(output: str, part: Part) -> bool:
    place = files.join(output, part.path)
    return files.stat(place) is not None and files.sha256(place) == part.sha256


# --- decode ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """A sample on its way into the table: decoded, or with the vector that is known for its image."""

    sample: Sample
    sha256: bytes | None = None
    width: int | None = None
    height: int | None = None
    pixels: np.ndarray | None = None  # uint8 [H, W, 3]; None where there is no image or its vector is known


def decode(
    window: Sequence[Sample | DeadLetter], spec: TableSpec, known: KnownVectors, clock: "Clock"
) -> tuple[list[Row], list[DeadLetter]]:
    """The window's rows with their pixels, and its dead letters: those that came and those that do not decode."""
    with clock("decode"):
        found = [item if isinstance(item, DeadLetter) else _decode_one(item, spec, known) for item in window]
    return [row for row in found if isinstance(row, Row)], [item for item in found if isinstance(item, DeadLetter)]


def _decode_one(sample: Sample, spec: TableSpec, known: KnownVectors) -> Row | DeadLetter:
    if sample.image is None:
        return Row(sample)
    digest = hashlib.sha256(sample.image).digest()
    if digest in known.images:
        _, width, height = known.images[digest]
        return Row(sample, digest, width, height)
    try:
        decoded = images.decode(sample.image, spec.tower.preprocess, spec.input.max_pixels)
    except images.BadImage as bad:
        return DeadLetter(sample.key, sample.row, "decode", bad.error, str(bad), sample.offset)
    return Row(sample, digest, decoded.width, decoded.height, decoded.pixels)


# --- embed ----------------------------------------------------------------------------------------------------------


def embed(
    rows: Sequence[Row], towers: Towers, known: KnownVectors, batch: int, clock: "Clock"
) -> tuple[np.ndarray, np.ndarray]:
    """Image and text vectors of the rows, float16 [n, D] each, zeros where the modality is absent.

    Every forward has `batch` rows, so that neither a broken neighbour nor a later retry changes a bit of a vector.
    """
    image = np.zeros((len(rows), towers.spec.embedding_dim), np.float16)
    text = np.zeros_like(image)
    to_do_images, to_do_texts = [], []
    for i, row in enumerate(rows):
        if row.pixels is not None:
            to_do_images.append(i)
        elif row.sha256 is not None:
            image[i] = known.images[row.sha256][0]
        if has_words(row.sample.caption):
            if row.sample.caption in known.texts:
                text[i] = known.texts[row.sample.caption]
            else:
                to_do_texts.append(i)
    known.rows_reused += len(rows) - len({*to_do_images, *to_do_texts})
    with clock("embed_image"):
        for some in chunks(to_do_images, batch):
            pixels = np.stack([rows[i].pixels for i in some])  # type: ignore[misc]
            image[some] = towers.embed_images(pixels, pad_to=batch)
    with clock("embed_text"):
        for some in chunks(to_do_texts, batch):
            text[some] = towers.embed_texts([rows[i].sample.caption or "" for i in some], pad_to=batch)
    return image, text


def has_words(caption: str | None) -> bool:
    """Whether there is a caption to embed: an empty one is no text."""
    return caption is not None and not caption.isspace() and caption != ""


def chunks(items: list[ItemT], size: int) -> Iterator[list[ItemT]]:
    """Consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


# --- features -------------------------------------------------------------------------------------------------------


def features(
    unit: Unit, rows: Sequence[Row], image: np.ndarray, text: np.ndarray, spec: TableSpec, clock: "Clock"
) -> pa.RecordBatch:
    """The rows as the table holds them. What is derived is derived from the stored float16 vectors."""
    schema = features_schema(spec)
    samples = [row.sample for row in rows]
    has_image = np.array([row.sha256 is not None for row in rows])
    has_text = np.array([has_words(sample.caption) for sample in samples])
    columns: dict[str, object] = {
        name: [getattr(sample, name) for sample in samples]
        for name in ("key", "row", "offset", "length", "caption", "url", "meta")
    }
    columns |= {name: [getattr(row, name) for row in rows] for name in ("sha256", "width", "height")}
    columns |= {"shard": [unit.shard] * len(rows), "has_image": has_image, "has_text": has_text}
    vectors = {"image_embedding": image, "text_embedding": text}
    with clock("fuse"):
        columns["similarity"] = similarity(image, text, has_image & has_text)
        if spec.fuser:
            fused, _ = fusers.from_spec(spec.fuser).fuse(image, text, has_image, has_text)
            vectors["fused_embedding"] = fused.astype(np.float16)
    columns |= {name: table.to_arrow(matrix, schema.field(name).type) for name, matrix in vectors.items()}
    arrays = [
        value if isinstance(value := columns[item.name], pa.Array) else pa.array(value, item.type) for item in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def similarity(image: np.ndarray, text: np.ndarray, both: np.ndarray) -> pa.Array:
    """Cosine of each row's two vectors, float32 [n]; null where one is absent."""
    cosines = np.einsum("nd,nd->n", fusers.normalize(image), fusers.normalize(text))
    return pa.array(cosines, pa.float32(), mask=~both)


# --- cost -----------------------------------------------------------------------------------------------------------


class Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time spent in the block to the stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def each(self, stage: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The items; the time that each takes to come is added to the stage."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


@cache
def versions() -> dict[str, str]:
    """The versions that made a part."""
    packages = ("fusion-features", "torch", "open_clip_torch", "pyarrow", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
