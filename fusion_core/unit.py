"""One unit of work, from shard to manifest record: read, decode, embed, fuse, write.

Bytes and pixels never leave this module's loop; memory is bounded by a window of samples and what is read ahead of it,
not by the shard. Units side by side, each computing in one thread, are how a CPU is kept busy; in front of a GPU,
threads decode ahead of the forward.
"""

import hashlib
import importlib.metadata
import platform
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TypeVar

import numpy as np
import pyarrow as pa

from fusion_core import files, fusers, images, readers, shards, table
from fusion_core.kept import Kept
from fusion_core.opt_out import NOTHING, OptOut, passed_by
from fusion_core.towers import Towers
from fusion_core.writer import UnitWriter
from schemas.feature_table import WEIGHTS, ManifestRecord, Part, TableSpec, features_schema
from schemas.samples import DeadLetter, Sample, Unit

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_WINDOW_ROWS = 1024  # captions are sorted by length within a window
_WINDOW_BYTES = 64 << 20  # of encoded images
_PIECE_ROWS, _PIECE_BYTES, _PIECES_AHEAD = 32, 8 << 20, 8  # read while what came before is worked on
KNOWN_LIMIT = 100_000  # images and captions remembered, so that a huge shard does not fill the memory
_DECODE_THREADS = 8  # ahead of a GPU
NO_ROW = -1  # while no image is being decoded


class InputChanged(RuntimeError):
    """A shard changed while it was read."""


@dataclass(frozen=True)
class Work:
    """A unit to run, with what earlier executions of it left: its record, files that no record names, and the rows
    whose images ended their process, and how.
    """

    unit: Unit
    previous: ManifestRecord | None = None
    stale: tuple[str, ...] = ()
    crashes: Mapping[int, str] = field(default_factory=dict)


def run_unit(
    work: Work,
    output: str,
    spec: TableSpec,
    towers: Towers,
    batch: int = 16,
    done: Callable[[int], None] = lambda n: None,
    decoding: Callable[[int], None] = lambda row: None,
    opt_out: OptOut = NOTHING,
) -> ManifestRecord:
    """Embeds one unit into the table at `output` and returns its record; `done` hears of finished samples, and
    `decoding` of the row whose image is in work (nothing where threads decode ahead of a GPU).

    Samples whose keys are on the opt-out list are left out before they are decoded. Equal images and equal captions are
    embedded once; those of the unit's earlier part keep their vectors. Raises InputChanged when the shard is not what
    was planned, OSError when it cannot be read or the part not be written.
    """
    clock = Clock()
    started = time.perf_counter()
    check_identity(work.unit)
    known = earlier_vectors(output, spec, work.previous)
    known.take_up(Kept(output, spec, work.unit))
    with UnitWriter(output, spec, work.unit, work.previous, work.stale) as writer:
        stream = without_crashes(readers.read(work.unit, spec.input), work.crashes)
        if towers.device != "cpu" or not files.is_local(work.unit.shard):
            stream = ahead(stream)  # beside a local disk, the thread costs a CPU more than it saves
        for found in windows(clock.each("read", stream)):
            window = passed_by(found, opt_out, writer)
            done(len(found) - len(window))
            rows, letters = embed_images(window, spec, towers, known, batch, clock, done, decoding)
            embed_texts(rows, towers, known, batch, clock)
            with clock("fuse"):
                table_rows = features(work.unit, rows, spec, output)
            with clock("write"):
                writer.write(table_rows)
                writer.reject(letters)
        check_identity(work.unit)
        with clock("write"):
            record = writer.commit(
                rows_reused=known.rows_reused,
                opt_out_sha256=opt_out.sha256,
                seconds={**clock.seconds, "unit": time.perf_counter() - started},
                versions=versions(),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            if known.kept:
                known.kept.remove()
    return record


def check_identity(unit: Unit) -> None:
    """Raises InputChanged unless the unit's input is still what the plan saw."""
    now = shards.identity(unit)
    if now != unit.identity:
        raise InputChanged(f"{unit.shard} changed while the job ran ({unit.identity} -> {now}): run the command again")


def ahead(stream: Iterable[Sample | DeadLetter]) -> Iterator[Sample | DeadLetter]:
    """The items in order, read by a thread while earlier ones are worked on, so that nobody waits for storage: at most
    256 of them, or about what holds 64 MiB of encoded images.
    """
    pieces = cut(stream, _PIECE_ROWS, _PIECE_BYTES)
    with ThreadPoolExecutor(1, "fusion-read") as pool:
        coming = deque(pool.submit(next, pieces, None) for _ in range(_PIECES_AHEAD))
        while piece := coming.popleft().result():
            coming.append(pool.submit(next, pieces, None))
            yield from piece


def without_crashes(stream: Iterable[Sample | DeadLetter], crashes: Mapping[int, str]) -> Iterator[Sample | DeadLetter]:
    """The items, with a dead letter in place of each sample whose image ended its process."""
    for item in stream:
        if item.row in crashes and isinstance(item, Sample):
            message = f"while its image was decoded, the process {crashes[item.row]}"
            item = DeadLetter(item.key, item.row, "decode", "DecoderCrashed", message, item.offset)
        yield item


def windows(stream: Iterable[Sample | DeadLetter]) -> Iterator[list[Sample | DeadLetter]]:
    """Consecutive items: at most 1024, or what holds 64 MiB of encoded images."""
    return cut(stream, _WINDOW_ROWS, _WINDOW_BYTES)


def cut(stream: Iterable[Sample | DeadLetter], rows: int, size_bytes: int) -> Iterator[list[Sample | DeadLetter]]:
    """The stream in parts of at most `rows` items, or what holds `size_bytes` of encoded images."""
    part: list[Sample | DeadLetter] = []
    held_bytes = 0
    for item in stream:
        part.append(item)
        held_bytes += len(item.image or b"") if isinstance(item, Sample) else 0
        if len(part) >= rows or held_bytes >= size_bytes:
            yield part
            part, held_bytes = [], 0
    if part:
        yield part


# --- what is known already ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class KnownImage:
    """An image that was seen before: its size as decoded, and its vector, float16 [D], once it is embedded."""

    width: int | None  # None: an imported row's, where it is not told
    height: int | None
    vector: np.ndarray | None = None


@dataclass
class Known:
    """What needs no forward any more: images by SHA-256 and captions, of this unit, of its earlier part, and of an
    attempt that was cut short.
    """

    images: dict[bytes, KnownImage] = field(default_factory=dict)
    texts: dict[str, np.ndarray] = field(default_factory=dict)  # float16 [D]
    rows_reused: int = 0
    kept: Kept | None = None

    def take_up(self, kept: Kept) -> None:
        """Knows what an attempt has left that was cut short, and keeps for the next one what becomes known."""
        self.kept = kept
        for digest, caption, width, height, vector in kept.read():
            if digest is not None and len(self.images) < KNOWN_LIMIT:
                self.images.setdefault(digest, KnownImage(width, height, vector))
            elif caption is not None and len(self.texts) < KNOWN_LIMIT:
                self.texts.setdefault(caption, vector)


def earlier_vectors(output: str, spec: TableSpec, previous: ManifestRecord | None) -> Known:
    """What the unit's earlier part knows; nothing where there is none or it is not what its record says."""
    known = Known()
    part = previous.features if previous and previous.spec_fingerprint == spec.fingerprint else None
    if part is None or not _is_whole(output, part):
        return known
    rows = table.Table(output, spec, ()).read_part(part).slice(0, KNOWN_LIMIT)
    image, text = (table.to_numpy(rows[name].combine_chunks()) for name in ("image_embedding", "text_embedding"))
    digests, captions = rows["sha256"].to_pylist(), rows["caption"].to_pylist()
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    for row, (digest, caption, (width, height)) in enumerate(zip(digests, captions, sizes, strict=True)):
        if digest is not None:
            known.images[digest] = KnownImage(width, height, image[row])
        if has_words(caption):
            known.texts[caption] = text[row]
    return known


def _is_whole(output: str, part: Part) -> bool:
    place = files.join(output, part.path)
    return files.stat(place) is not None and files.sha256(place) == part.sha256


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """A sample on its way into the table."""

    sample: Sample
    sha256: bytes | None = None
    image: KnownImage | None = None
    text: np.ndarray | None = None  # float16 [D]
    pixels: np.ndarray | None = None  # uint8 [H, W, 3], while the image waits for its forward
    is_new: bool = False  # something had to be embedded for it


def embed_images(
    window: Sequence[Sample | DeadLetter],
    spec: TableSpec,
    towers: Towers,
    known: Known,
    batch: int,
    clock: "Clock",
    done: Callable[[int], None],
    decoding: Callable[[int], None] = lambda row: None,
) -> tuple[list[Row], list[DeadLetter]]:
    """The window's rows, their images embedded, and its dead letters: those that came and those that do not decode.

    Every forward has `batch` rows, so that neither a broken neighbour nor a later retry changes a bit of a vector.
    """
    rows, letters, waiting, told = list[Row](), list[DeadLetter](), list[Row](), 0
    for item in clock.each("decode", decode(window, spec, known, towers.device != "cpu", decoding)):
        if isinstance(item, DeadLetter):
            letters.append(item)
            continue
        rows.append(item)
        if item.pixels is not None:
            waiting.append(item)
        if len(waiting) == batch:
            _forward(waiting, towers, known, batch, clock)
            waiting = []
            done(len(rows) + len(letters) - told)
            told = len(rows) + len(letters)
    _forward(waiting, towers, known, batch, clock)
    done(len(window) - told)
    return rows, letters


def decode(
    window: Sequence[Sample | DeadLetter],
    spec: TableSpec,
    known: Known,
    threaded: bool,
    decoding: Callable[[int], None] = lambda row: None,
) -> Iterator[Row | DeadLetter]:
    """The window's items in order, decoded; in threads ahead of the caller where the forward leaves the CPU idle."""

    def decode_one(item: Sample | DeadLetter) -> Row | DeadLetter:
        return item if isinstance(item, DeadLetter) else _decode_one(item, spec, known)

    def decode_told(item: Sample | DeadLetter) -> Row | DeadLetter:
        decoding(item.row)
        decoded = decode_one(item)
        decoding(NO_ROW)
        return decoded

    return in_threads(decode_one, window) if threaded else map(decode_told, window)


def _decode_one(sample: Sample, spec: TableSpec, known: Known) -> Row | DeadLetter:
    if sample.image is None:
        return Row(sample)
    digest = hashlib.sha256(sample.image).digest()
    if digest in known.images:
        return Row(sample, digest, known.images[digest])
    try:
        decoded = images.decode(sample.image, spec.tower.preprocess, spec.input.max_pixels)
    except images.BadImage as bad:
        return DeadLetter(sample.key, sample.row, "decode", bad.error, str(bad), sample.offset)
    image = KnownImage(decoded.width, decoded.height)
    if len(known.images) < KNOWN_LIMIT:
        image = known.images.setdefault(digest, image)
    return Row(sample, digest, image, pixels=decoded.pixels, is_new=True)


def _forward(waiting: Sequence[Row], towers: Towers, known: Known, batch: int, clock: "Clock") -> None:
    if not waiting:
        return
    with clock("embed_image"):
        vectors = towers.embed_images(np.stack([row.pixels for row in waiting if row.pixels is not None]), batch)
    for row, vector in zip(waiting, vectors.astype(np.float16), strict=True):
        assert row.image is not None
        row.image.vector, row.pixels = vector, None
        if known.kept and row.sha256:
            known.kept.image(row.sha256, row.image.width, row.image.height, vector)
    if known.kept:
        known.kept.save()


def in_threads(function: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """The function's results in order, computed by threads that run ahead of the caller."""
    with ThreadPoolExecutor(_DECODE_THREADS, "fusion-decode") as pool:
        yield from pool.map(function, items)


# --- captions -------------------------------------------------------------------------------------------------------


def embed_texts(rows: Sequence[Row], towers: Towers, known: Known, batch: int, clock: "Clock") -> None:
    """Gives the rows with a caption their text vectors."""
    captions = dict.fromkeys(row.sample.caption or "" for row in rows if has_words(row.sample.caption))
    new = [caption for caption in captions if caption not in known.texts]

    def keep(at: np.ndarray, vectors: np.ndarray) -> None:
        if known.kept:
            for i, vector in zip(at, vectors.astype(np.float16), strict=True):
                known.kept.caption(new[i], vector)
            known.kept.save()

    with clock("embed_text"):
        embedded = dict(zip(new, towers.embed_texts(new, batch, keep).astype(np.float16), strict=True)) if new else {}
    first = set(new)
    for row in rows:
        caption = row.sample.caption
        if caption is not None and caption in captions:
            row.text = known.texts[caption] if caption in known.texts else embedded[caption]
            row.is_new |= caption in first
            first.discard(caption)
    if len(known.texts) < KNOWN_LIMIT:
        known.texts.update(embedded)
    known.rows_reused += sum(not row.is_new for row in rows)


def has_words(caption: str | None) -> bool:
    """Whether there is a caption to embed: an empty one is no text."""
    return caption is not None and not caption.isspace() and caption != ""


# --- features -------------------------------------------------------------------------------------------------------


def features(unit: Unit, rows: Sequence[Row], spec: TableSpec, place: str = "") -> pa.RecordBatch:
    """The rows as the table at `place` holds them. What is derived is derived from the stored float16 vectors."""
    schema, dim = features_schema(spec), spec.tower.embedding_dim
    samples = [row.sample for row in rows]
    has_image = np.array([row.image is not None for row in rows], bool)
    has_text = np.array([row.text is not None for row in rows], bool)
    image = _matrix([row.image.vector if row.image else None for row in rows], dim)
    text = _matrix([row.text for row in rows], dim)
    columns: dict[str, object] = {
        name: [getattr(sample, name) for sample in samples]
        for name in ("key", "row", "offset", "length", "caption", "url", "meta")
    }
    columns |= {name: [getattr(row.image, name, None) for row in rows] for name in ("width", "height")}
    columns |= {"shard": [unit.shard] * len(rows), "sha256": [row.sha256 for row in rows]}
    columns |= {"has_image": has_image, "has_text": has_text}
    columns["similarity"] = similarity(image, text, has_image & has_text)
    vectors = {"image_embedding": image, "text_embedding": text}
    vectors |= fused(image, text, has_image, has_text, spec, place)
    columns |= {name: table.to_arrow(matrix, schema.field(name).type) for name, matrix in vectors.items()}
    arrays = [
        value if isinstance(value := columns[item.name], pa.Array) else pa.array(value, item.type) for item in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def fused(
    image: np.ndarray, text: np.ndarray, has_image: np.ndarray, has_text: np.ndarray, spec: TableSpec, place: str
) -> dict[str, np.ndarray]:
    """The columns, float16 [n, …], that the spec's fuser makes of stored vectors [n, D]; none without a fuser."""
    if spec.fuser is None:
        return {}
    vectors, _, weights = fusers.from_spec(spec.fuser, place).explain(image, text, has_image, has_text)
    columns = {"fused_embedding": vectors.astype(np.float16)}
    return columns | ({WEIGHTS: weights.astype(np.float16)} if spec.fusion_weights else {})


def _matrix(vectors: Sequence[np.ndarray | None], dim: int) -> np.ndarray:
    """The vectors as float16 [n, D], zeros where there is none."""
    matrix = np.zeros((len(vectors), dim), np.float16)
    for row, vector in enumerate(vectors):
        if vector is not None:
            matrix[row] = vector
    return matrix


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
    packages = ("fusion-features", "torch", "open_clip_torch", "pyarrow", "pillow", "simplejpeg", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
