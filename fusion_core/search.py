"""Queries by text, image, vector or row, answered from an index; and the original picture of an answer."""

import hashlib
import numbers
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusion_core import decisions, fields, files, fusers, images, tabular, tars, towers, versions, where
from fusion_core.index import BadIndex, Index, read_record
from fusion_core.towers import Towers
from fusion_core.vectors import Floats, Ids
from schemas import records
from schemas.errors import UserError
from schemas.feature_table import InputSpec, TowerSpec
from schemas.index import ANSWER, META

OVERSAMPLING, LEAST_CANDIDATES = 4, 100
MAX_K_REARRANGED = 2_500  # of a query that collapses or diversifies: it holds the vectors of its candidates
_CACHED_FILTERS, _CACHED_IDS = 8, 1 << 26  # half a GiB
_PARQUET = (".parquet", ".pq")


class WrongSpace(UserError):
    """A query that cannot be compared with the index: of other towers, or lacking what the index's fuser needs."""


class BadQuery(UserError):
    """A query that cannot be answered: why, and what would help."""


class NoImage(UserError):
    """The original picture of a row cannot be had: why, and what would help."""


@dataclass(frozen=True)
class Query:
    """What to look for: a text, an image or both; or a vector; or a row, by id or key. And how.

    Joining by rank, `collapse` and `diversity` work on the best 4 k rows (at least 100) of each search, so that fewer
    than k answers can come back where most of these collapse.
    """

    text: str | None = None
    image: bytes | None = None  # encoded
    vector: np.ndarray | None = None  # [D], of the index's space
    id: int | None = None  # more like this row, which is not among the answers itself
    key: str | None = None  # the same by key; it must be one row's only
    k: int = 10
    image_weight: float = 0.5  # of text and image together, 0 to 1; on a `fused_embedding` index its fuser weighs
    by_rank: bool = False  # text and image as two searches, joined by reciprocal rank fusion, instead of one vector
    by_score: bool = False  # the same, joined by image_weight of scores that are z-normed for each search
    where: str | None = None  # a condition on META's columns: see fusion_core.where
    collapse: float | None = None  # drops answers whose cosine with a better one is above, and copies (equal sha256)
    diversity: float = 0.0  # 0 (plain ranking) to 1: maximal marginal relevance

    @property
    def rearranges(self) -> bool:
        """Whether answers depend on each other."""
        return self.collapse is not None or self.diversity > 0

    @property
    def candidates(self) -> int:
        """How many rows of each search the answer is chosen from."""
        from_more = self.rearranges or self.by_rank or self.by_score
        k = int(self.k)  # numpy's whole numbers are welcome, and lack some methods of Python's
        return max(LEAST_CANDIDATES, OVERSAMPLING * k) if from_more else k


def open(path: str, device: str = "auto", pretrained: str = "", fuser: str = "", ahead: bool = False) -> "Searcher":
    """A searcher of the index at `path`; its towers are loaded when a text or an image first asks for them.

    `ahead` loads them in a thread, from now on: that takes seconds, in which the index's files are read and checked.
    `pretrained`: where the weights lie now, if they were moved. `fuser`: that is to weigh queries of text and image, as
    for fusers.parse. Raises BadIndex, FuserError and WrongSpace; a query may raise TowerError.
    """
    spec = read_record(versions.standing(files.absolute(path))).table_spec
    weigher = fusers.parse(fuser, spec.tower.embedding_dim, spec.backbone) if fuser else None

    def load() -> Towers:
        return towers.for_table(spec, device, pretrained)

    def load_ahead() -> None:
        with suppress(Exception):  # it is raised again, where the towers are asked for
            load()

    if ahead:
        threading.Thread(target=load_ahead, name="towers").start()
    return Searcher(Index.open(path), load, weigher)


class Searcher:
    """Answers queries from one index, from many threads if need be. Without towers it takes vectors and rows only."""

    def __init__(
        self, index: Index, towers: Towers | Callable[[], Towers] | None = None, fuser: fusers.Fuser | None = None
    ):
        """`towers`, or what loads them at first use. WrongSpace names the difference to those of the index's table.

        `fuser`: for queries of text and image together; its vectors must be comparable with those of the index.
        """
        self.index = index
        self._towers = None if callable(towers) else towers
        self._load = towers if callable(towers) else None
        spec = index.record.table_spec
        self._fuser: fusers.Fuser | None = None
        if spec.fuser and index.record.column == "fused_embedding":
            self._fuser = fusers.from_spec(spec.fuser, index.place)
        if fuser is not None:
            _check_fuser(index, fuser, self._fuser)
            self._fuser = fuser
        self._filters = _Filters(index)
        if self._towers is not None:
            _check_towers(index, self._towers)

    def search(self, text: str | None = None, image: bytes | None = None, **how: Any) -> pa.Table:
        """The answer (schema ANSWER) to one query, given by the fields of Query; raises BadQuery."""
        (found,) = self.answer([Query(text, image, **how)])
        if isinstance(found, BadQuery):
            raise found
        return found

    def answer(self, queries: Sequence[Query]) -> list[pa.Table | BadQuery]:
        """For each query its best rows (schema ANSWER), at most k, or what is wrong with it.

        All texts go through one forward, all images through another, and queries with the same filter (and about the
        same k) through one search. Raises TowerError and BadIndex, which are no query's fault.
        """
        asked = [_Asked(query) for query in queries]
        for step in (self._check, self._filter, self._decode, self._embed, self._find, self._rank):
            step([one for one in asked if one.wrong is None])
        ids = np.concatenate([np.empty(0, np.int64), *(one.ids for one in asked)])
        rows = self.index.meta(ids)
        stops = np.cumsum([len(one.ids) for one in asked])
        return [
            one.wrong or _table(one.scores, rows.slice(stop - len(one.ids), len(one.ids)))
            for one, stop in zip(asked, stops, strict=True)
        ]

    # --- the steps of an answer

    def _check(self, asked: "Sequence[_Asked]") -> None:
        for one in asked:
            with one.judged():
                given = _check(one.query)
                if given <= {"text", "image"} and self._towers is None and self._load is None:
                    raise BadQuery("this searcher has no towers to embed a query with: give it those of the table")

    def _decode(self, asked: "Sequence[_Asked]") -> None:
        limits = self.index.record.table_spec.input
        for one in asked:
            image = one.query.image
            if image is None:
                continue
            with one.judged():
                if len(image) > limits.max_image_bytes:
                    raise BadQuery(f"the image has {len(image):,} bytes; at most {limits.max_image_bytes:,} are read")
                preprocess = self.index.record.table_spec.tower.preprocess
                try:
                    one.pixels = images.decode(image, preprocess, limits.max_pixels).pixels
                except images.BadImage as error:
                    raise BadQuery(f"the image cannot be read: {error}") from error

    def _embed(self, asked: "Sequence[_Asked]") -> None:
        texts = list(dict.fromkeys(one.query.text for one in asked if one.query.text is not None))
        shown = [one for one in asked if one.pixels is not None]
        keys = {one.query.key for one in asked if one.query.key is not None}
        of_text = dict(zip(texts, self._known_towers().embed_texts(texts), strict=True)) if texts else {}
        pixels = [one.pixels for one in shown]
        of_image = self._known_towers().embed_images(np.stack(pixels)) if pixels else ()  # type: ignore[arg-type]
        image_of = {id(one): vector for one, vector in zip(shown, of_image, strict=True)}
        by_key = _ids_by_key(self.index, keys) if keys else {}
        for one in asked:
            query = one.query
            with one.judged():
                if query.vector is not None:
                    one.vectors = [_unit(query.vector, self.index.record.dim)]
                elif query.id is not None or query.key is not None:
                    one.row = _the_row(query, by_key, self.index.record.rows_table)
                    one.vectors = list(self.index.vectors([one.row]))
                else:
                    text = None if query.text is None else of_text[query.text]
                    one.vectors = self._combined(query, image_of.get(id(one)), text)

    def _combined(self, query: Query, image: Floats | None, text: Floats | None) -> list[Floats]:
        """The vector that the index is asked with, or two whose answers are to be joined."""
        both = image is not None and text is not None
        if both and (query.by_rank or query.by_score):
            return [*self._combined(query, image, None), *self._combined(query, None, text)]
        if self._fuser and (self._fuser.spec.space == "own" or both):
            return [self._fuse(self._fuser, image, text)]
        if image is not None and text is not None:
            return [_weigh(image, text, query.image_weight)]
        return [vector for vector in (image, text) if vector is not None]

    def _filter(self, asked: "Sequence[_Asked]") -> None:
        for one in asked:
            with one.judged():
                one.allowed = self._filters.ids(one.query.where) if one.query.where is not None else None

    def _find(self, asked: "Sequence[_Asked]") -> None:
        rows = max(1, self.index.record.rows_indexed)
        groups: dict[tuple[str | None, int], list[_Asked]] = defaultdict(list)
        for one in asked:
            depth = min(rows, one.query.candidates) + (one.row is not None)
            groups[one.query.where, min(rows, 1 << (depth - 1).bit_length())].append(one)
        for (_, depth), group in groups.items():
            vectors = np.stack([vector for one in group for vector in one.vectors])
            found = iter(zip(*self.index.search(vectors, depth, allowed=group[0].allowed), strict=True))
            for one in group:
                for scores, ids in (next(found) for _ in one.vectors):
                    kept = np.flatnonzero((ids >= 0) & (ids != one.row))[: one.query.candidates]
                    one.hits.append((scores[kept], ids[kept]))

    def _rank(self, asked: "Sequence[_Asked]") -> None:
        for one in asked:
            query, (scores, ids) = one.query, one.hits[0]
            relevance = scores
            if len(one.hits) > 1 and query.by_score:
                scores, ids = decisions.z_normed(one.hits, [query.image_weight, 1 - query.image_weight])
                relevance = (scores - scores.min()) / max(1e-6, np.ptp(scores)) if len(scores) else scores
            elif len(one.hits) > 1:
                scores, ids = decisions.reciprocal_ranks(one.hits)
                relevance = scores * ((decisions.RANK_CONSTANT + 1) / len(one.hits))  # as cosines are, 1 at best
            if query.rearranges and len(ids):
                vectors = fusers.normalize(self.index.vectors(ids))
                order = np.arange(len(ids))
                if query.collapse is not None:
                    hashes = self.index.meta(ids)["sha256"].to_pylist()
                    order = _apart(vectors, hashes, query.collapse)
                if query.diversity:
                    order = order[_diverse(vectors[order], relevance[order], query.diversity, query.k)]
                scores, ids = scores[order], ids[order]
            one.scores, one.ids = scores[: query.k], ids[: query.k]

    def _known_towers(self) -> Towers:
        if self._towers is None:
            assert self._load is not None  # _check has seen to it
            found = self._load()
            _check_towers(self.index, found)
            self._towers = found
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


@dataclass
class _Asked:
    """A query on its way to its answer."""

    query: Query
    wrong: BadQuery | None = None
    pixels: np.ndarray | None = None
    vectors: list[Floats] = field(default_factory=list)  # the index is asked with; two that are joined by rank
    row: int | None = None  # that the answers are to be like
    allowed: Ids | None = None
    hits: list[tuple[Floats, Ids]] = field(default_factory=list)  # of each vector, best first
    scores: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))

    @contextmanager
    def judged(self) -> Iterator[None]:
        """What is wrong with the query stops it and no other."""
        try:
            yield
        except BadIndex:
            raise
        except ValueError as error:
            self.wrong = error if isinstance(error, BadQuery) else BadQuery(str(error))


class _Filters:
    """The rows that pass a filter, remembered for the last few."""

    def __init__(self, index: Index):
        self._index = index
        self._known: dict[str, Ids | None] = {}  # the last used last
        self._lock = threading.Lock()

    def ids(self, text: str) -> Ids | None:
        """Ascending ids, or None where every row passes. Raises BadFilter."""
        with self._lock:
            if text in self._known:
                self._known[text] = self._known.pop(text)
                return self._known[text]
        passes = where.parse(text, META)
        kept = [where.ids(passes, batch) for batch in self._index.scan(META.names)]
        found = np.concatenate([np.empty(0, np.int64), *kept])
        ids = found if len(found) < self._index.record.rows_table else None
        with self._lock:
            self._known[text] = ids
            while len(self._known) > _CACHED_FILTERS or sum(map(_size, self._known.values())) > _CACHED_IDS:
                del self._known[next(iter(self._known))]
        return ids


def _size(ids: Ids | None) -> int:
    return 0 if ids is None else len(ids)


# --- what a query says


def _check(query: Query) -> set[str]:
    """Which of its fields say what to look for. Raises BadQuery."""
    given = {name for name in ("text", "image", "vector", "id", "key") if getattr(query, name) is not None}
    if not given:
        raise BadQuery("a query needs a text, an image, or both; else a vector, an id or a key")
    if len(given) > 1 and given != {"text", "image"}:
        raise BadQuery(
            f"a query is by text and image, by vector, by id or by key, not by {' and '.join(sorted(given))}"
        )
    for name, kind in _KINDS.items():
        value = getattr(query, name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise BadQuery(f"{name} must be {_SAID[kind]}, got {value!r:.60}")
    if query.text is not None and not query.text.strip():
        raise BadQuery("the text of a query is empty: leave it out, or say what to look for")
    try:
        ((query.text or "") + (query.key or "")).encode()
    except UnicodeEncodeError:
        raise BadQuery("the query holds half a surrogate pair, which no text has") from None
    if query.k < 1:
        raise BadQuery(f"k must be at least 1, got {query.k}")
    if query.by_rank and query.by_score:
        raise BadQuery("two rankings are joined by_rank or by_score, not by both")
    if query.rearranges and query.k > MAX_K_REARRANGED:
        raise BadQuery(f"k must be at most {MAX_K_REARRANGED:,} with collapse or diversity, got {query.k:,}")
    for name in ("image_weight", "collapse", "diversity"):
        value = getattr(query, name)
        if value is not None and not 0 <= value <= 1:  # so written, NaN is refused too
            raise BadQuery(f"{name} must lie between 0 and 1, got {value}")
    return given


_KINDS: dict[str, Any] = {
    "text": str,
    "image": bytes,
    "id": numbers.Integral,
    "key": str,
    "k": numbers.Integral,
    "image_weight": numbers.Real,
    "by_rank": bool,
    "by_score": bool,
    "where": str,
    "collapse": numbers.Real,
    "diversity": numbers.Real,
}
_SAID = {
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    numbers.Integral: "a whole number",
    numbers.Real: "a number",
}


def _unit(vector: np.ndarray, dim: int) -> Floats:
    try:
        values = np.asarray(vector, np.float64)
    except (TypeError, ValueError):
        raise BadQuery("the vector of a query must be numbers") from None
    if values.shape != (dim,):
        raise BadQuery(f"the vector of a query must have {dim} dimensions, as the index has, got {list(values.shape)}")
    length = np.linalg.norm(values / max(1e-300, np.abs(values).max())) if np.isfinite(values).all() else 0
    if not length:
        raise BadQuery("the vector of a query must be finite and not all zero")
    unit: Floats = (values / np.abs(values).max() / length).astype(np.float32)
    return unit


def _ids_by_key(index: Index, keys: set[str]) -> dict[str, list[int]]:
    """The first few ids of each key, in one pass over the rows."""
    wanted = pa.array(sorted(keys), pa.string())
    found: dict[str, list[int]] = defaultdict(list)
    for batch in index.scan(["id", "key"]):
        for row in batch.filter(pc.is_in(batch["key"], wanted)).to_pylist():
            if len(found[row["key"]]) < 4:
                found[row["key"]].append(row["id"])
    return found


def _the_row(query: Query, by_key: Mapping[str, list[int]], rows: int) -> int:
    if query.id is not None:
        if not 0 <= query.id < rows:
            raise BadQuery(
                f"no row has the id {query.id}: " + (f"ids are 0 to {rows - 1}" if rows else "there are none")
            )
        return int(query.id)
    assert query.key is not None
    ids = by_key.get(query.key, [])
    if not ids:
        raise BadQuery(f"no row has the key {query.key!r}")
    if len(ids) > 1:
        some = ", ".join(map(str, ids[:3])) + (", …" if len(ids) > 3 else "")
        raise BadQuery(f"several rows have the key {query.key!r}: ask by id, one of {some}")
    return ids[0]


def _weigh(image: Floats, text: Floats, image_weight: float) -> Floats:
    mixed = image_weight * image + (1 - image_weight) * text
    length = float(np.linalg.norm(mixed))
    if length < 1e-6:
        raise BadQuery(f"text and image cancel each other out at image_weight {image_weight}: choose another weight")
    vector: Floats = (mixed / length).astype(np.float32)
    return vector


# --- the order of the answers


def _apart(vectors: Floats, hashes: Sequence[bytes | None], above: float) -> Ids:
    """The places of those that are neither a copy of a kept one before them nor closer to one than the cosine."""
    kept = np.empty_like(vectors)
    places: list[int] = []
    seen: set[bytes] = set()
    for place, (vector, digest) in enumerate(zip(vectors, hashes, strict=True)):
        if digest in seen or (places and min(1, (kept[: len(places)] @ vector).max()) > above):
            continue
        kept[len(places)] = vector
        places.append(place)
        if digest is not None:
            seen.add(digest)
    return np.array(places, np.int64)


def _diverse(vectors: Floats, relevance: Floats, diversity: float, k: int) -> Ids:
    """The places of `k` (or all), each the best then by (1 - diversity) relevance - diversity nearest taken cosine."""
    places: list[int] = []
    nearest = np.zeros(len(vectors), np.float32)
    left = np.ones(len(vectors), bool)
    while left.any() and len(places) < k:
        value = np.where(left, (1 - diversity) * relevance - diversity * nearest, -np.inf)
        place = int(value.argmax()) if places else 0
        cosines = vectors @ vectors[place]
        nearest = np.maximum(nearest, cosines) if places else cosines
        left[place] = False
        places.append(place)
    return np.array(places, np.int64)


def _table(scores: Floats, rows: pa.Table) -> pa.Table:
    ranks = np.arange(1, rows.num_rows + 1, dtype=np.int32)
    return pa.Table.from_arrays([pa.array(ranks), pa.array(scores), *rows.columns], schema=ANSWER)


# --- the original pictures


def fetch_image(row: Mapping[str, Any], max_bytes: int = 64 << 20, spec: InputSpec | None = None) -> bytes:
    """The original, encoded picture of a row of META or ANSWER (as a dict), read from its shard.

    From a plain tar only the picture's bytes are read; from Parquet and listings also some rows before it. `spec` says
    which column holds images, where the table's job was told so (`record.table_spec.input`). Raises NoImage, also
    where the shard no longer holds the picture that was embedded, and OSError where it cannot be read.
    """
    if row["sha256"] is None:
        raise NoImage(f"row {row['row']} of {row['shard']} has no image, or was imported without it")
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


def _check_fuser(index: Index, fuser: fusers.Fuser, own: fusers.Fuser | None) -> None:
    if own is not None and own.spec.fingerprint == fuser.spec.fingerprint:
        return
    if fuser.spec.space != "backbone" or (own is not None and own.spec.space != "backbone"):
        raise WrongSpace(
            f"{index.place} holds {index.record.column}"
            + (f" by {own.spec.type!r} (space {own.spec.space!r})" if own else "")
            + f"; vectors by {fuser.spec.type!r} (space {fuser.spec.space!r}) are not comparable with these: "
            "index a table that was fused by the same fuser"
        )


def _check_towers(index: Index, theirs: Towers) -> None:
    spec = index.record.table_spec
    sides = {
        "towers are": (spec.tower, theirs.spec),
        "text tower is": (spec.text_tower or spec.tower, theirs.text_spec),
    }
    for what, (ours, given) in sides.items():
        if different := records.differences(_decisive(ours), _decisive(given)):
            load = f"load {ours.model} {ours.pretrained}".rstrip()
            raise WrongSpace(f"the {what} not that of {index.place} ({'; '.join(different)}): {load}")


def _decisive(spec: TowerSpec) -> TowerSpec:
    """The spec without what leaves a query comparable: where the towers lay, and in which precision they compute."""
    return replace(spec, model="", pretrained="", precision="fp32")
