"""Queries by text, by image, or by both, answered from an index; and the original picture of an answer."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_core import fields, files, fusers, images, tabular, tars
from fusion_core.index import Index
from fusion_core.towers import Towers
from fusion_core.vectors import Floats
from schemas import records
from schemas.feature_table import InputSpec, TowerSpec
from schemas.index import ANSWER

_PARQUET = (".parquet", ".pq")


class WrongSpace(ValueError):
    """A query that cannot be compared with the index: of other towers, or lacking what the index's fuser needs."""


class NoImage(ValueError):
    """The original picture of a row cannot be had: why, and what would help."""


class Searcher:
    """Answers queries from one index. Without towers it takes vectors only."""

    def __init__(self, index: Index, towers: Towers | None = None):
        """Raises WrongSpace, naming the difference, unless the towers are those of the index's table."""
        self.index = index
        self._towers = towers
        spec = index.record.table_spec
        self._fuser = fusers.from_spec(spec.fuser) if spec.fuser and index.record.column == "fused_embedding" else None
        if towers is not None:
            _check_towers(index, towers.spec)

    def search(
        self, text: str | None = None, image: bytes | None = None, k: int = 10, image_weight: float = 0.5
    ) -> pa.Table:
        """The best `k` rows (schema ANSWER), or as many as there are, for a text, an encoded image, or both.

        Of both, `image_weight` (0 to 1) of the query is the image; on a `fused_embedding` index the table's fuser
        weighs them instead. Raises images.BadImage for an image that does not decode.
        """
        return self.search_vector(self.query(text, image, image_weight), k)

    def search_vector(self, vector: Floats, k: int = 10) -> pa.Table:
        """The best `k` rows (schema ANSWER) for a vector [D] of the index's space."""
        if k <= 0:
            raise ValueError(f"k must be at least 1, got {k}")
        k = min(k, max(1, self.index.record.rows_indexed))
        scores, ids = self.index.search(np.asarray(vector, np.float32)[None], k)
        found = ids[0] >= 0
        rows = self.index.meta(ids[0][found])
        ranks = pa.array(np.arange(1, rows.num_rows + 1), pa.int32())
        return pa.Table.from_arrays([ranks, pa.array(scores[0][found]), *rows.columns], schema=ANSWER)

    def query(self, text: str | None = None, image: bytes | None = None, image_weight: float = 0.5) -> Floats:
        """The unit vector [D] that the index is asked with."""
        if text is None and image is None:
            raise ValueError("a query needs a text, an image, or both")
        if text is not None and not text.strip():
            raise ValueError("the text of a query is empty: leave it out, or say what to look for")
        if not (math.isfinite(image_weight) and 0 <= image_weight <= 1):
            raise ValueError(f"image_weight must lie between 0 and 1, got {image_weight}")
        image_vector = None if image is None else self._embed_image(image)
        text_vector = None if text is None else self._known_towers().embed_texts([text])[0]
        if self._fuser and (self._fuser.spec.space == "own" or (text is not None and image is not None)):
            return self._fuse(self._fuser, image_vector, text_vector)
        if image_vector is None or text_vector is None:
            return image_vector if text_vector is None else text_vector  # type: ignore[return-value]
        return _weigh(image_vector, text_vector, image_weight)

    def _embed_image(self, image: bytes) -> Floats:
        towers, limits = self._known_towers(), self.index.record.table_spec.input
        if len(image) > limits.max_image_bytes:
            raise ValueError(f"the image has {len(image):,} bytes; at most {limits.max_image_bytes:,} are read")
        decoded = images.decode(image, towers.spec.preprocess, limits.max_pixels)
        vector: Floats = towers.embed_images(decoded.pixels[None])[0]
        return vector

    def _known_towers(self) -> Towers:
        if self._towers is None:
            raise ValueError("this searcher has no towers to embed a query with: give it those of the index's table")
        return self._towers

    def _fuse(self, fuser: fusers.Fuser, image: Floats | None, text: Floats | None) -> Floats:
        absent = np.zeros(self.index.record.table_spec.tower.embedding_dim, np.float32)
        slots = [(absent if vector is None else vector)[None] for vector in (image, text)]
        given = [np.array([vector is not None]) for vector in (image, text)]
        fused, valid = fuser.fuse(slots[0], slots[1], given[0], given[1])
        if not valid[0]:
            raise WrongSpace(
                f"{self.index.place} was fused by {fuser.spec.type!r}, which has no vector for this query: "
                "give both a text and an image, or search an index of image_embedding"
            )
        vector: Floats = fused[0]
        return vector


def fetch_image(row: Mapping[str, Any], max_bytes: int = 64 << 20, spec: InputSpec | None = None) -> bytes:
    """The original, encoded picture of a row of META or ANSWER (as a dict), read from its shard.

    From a plain tar only the picture's bytes are read; from Parquet and listings also some rows before it. `spec` says
    which column holds images, where the table's job was told so (`record.table_spec.input`). Raises NoImage, also
    where the shard no longer holds the picture that was embedded, and OSError where it cannot be read.
    """
    if row["sha256"] is None:
        raise NoImage(f"row {row['row']} of {row['shard']} has no image")
    for picture in _pictures(row, max_bytes, spec or InputSpec()):
        if hashlib.sha256(picture).digest() == row["sha256"]:
            return picture
    raise NoImage(
        f"row {row['row']} of {row['shard']} (key {row['key']!r}) is another image now: embed the shard again"
    )


def _pictures(row: Mapping[str, Any], max_bytes: int, spec: InputSpec) -> Iterator[bytes]:
    """What stands where the row's picture should be."""
    shard, offset = row["shard"], row["offset"]
    if offset:
        yield _read_range(shard, offset, row["length"], max_bytes)
    elif offset == 0:  # a file of its own in a folder: in a tar, a header stands before
        suffixes = [form for suffix in tars.IMAGES for form in (suffix, suffix.upper(), suffix.title())]
        entries = files.stat_many([files.join(shard, f"{row['key']}.{suffix}") for suffix in suffixes])
        yield from (_read_range(entry.place, 0, entry.size_bytes, max_bytes) for entry in entries if entry)
    elif tabular.is_text_listing(shard) or shard.lower().endswith(_PARQUET):
        yield from _tabular_pictures(row, max_bytes, spec)
    else:
        raise NoImage(f"single images cannot be read from {shard}: unpack it and embed the plain tar")


def _tabular_pictures(row: Mapping[str, Any], max_bytes: int, spec: InputSpec) -> Iterator[bytes]:
    shard = row["shard"]
    if tabular.is_text_listing(shard):
        columns = tabular.listing_columns(shard, spec)
    else:
        with tabular.Parquet(shard) as parquet:
            columns = fields.find_columns(parquet.schema, spec, shard)
    listing = tabular.Listing(shard, columns)
    for found in listing.rows(row["row"], row["row"] + 1):
        if found.image and found.image.size_bytes is not None:
            _check_size(shard, found.image.size_bytes, max_bytes)
            yield found.image.read()
        elif columns.path and isinstance(path := found.values.get(columns.path), str):
            entry = files.stat(_image_place(listing, path))
            if entry is not None:
                yield _read_range(entry.place, 0, entry.size_bytes, max_bytes)


def _image_place(listing: tabular.Listing, path: str) -> str:
    try:
        return listing.image_place(path)
    except fields.Rejected as error:
        raise NoImage(f"{listing.place}: {error}") from error


def _read_range(place: str, offset: int, length: int, max_bytes: int) -> bytes:
    _check_size(place, length, max_bytes)
    with files.open_input(place) as stream:
        stream.seek(offset)
        return stream.read(length)


def _check_size(place: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise NoImage(f"the image in {place} has {size:,} bytes, more than the {max_bytes:,} asked for")


def _check_towers(index: Index, theirs: TowerSpec) -> None:
    ours, theirs = _decisive(index.record.table_spec.tower), _decisive(theirs)
    if different := records.differences(ours, theirs):
        raise WrongSpace(
            f"the towers are not those of {index.place} ({'; '.join(different)}): "
            f"load {index.record.table_spec.tower.model} {index.record.table_spec.tower.pretrained}".rstrip()
        )


def _decisive(spec: TowerSpec) -> TowerSpec:
    """The spec without what leaves a query comparable: where the towers lay, and in which precision they compute."""
    return replace(spec, model="", pretrained="", precision="fp32")


def _weigh(image: Floats, text: Floats, image_weight: float) -> Floats:
    mixed = image_weight * image + (1 - image_weight) * text
    length = float(np.linalg.norm(mixed))
    if length < 1e-6:
        raise ValueError(f"text and image cancel each other out at image_weight {image_weight}: choose another weight")
    vector: Floats = (mixed / length).astype(np.float32)
    return vector
