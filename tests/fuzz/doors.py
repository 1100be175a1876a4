"""The doors through which bytes come in that somebody else wrote, each with files to start from.

A door is opened with one damaged file. It may raise the errors that it names and nothing else; what it lets in must
add up.
"""

import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import adopt, build, fields, fusers, images, index, manifest, readers, shards, table, unit, verify
from schemas.errors import TableError
from schemas.feature_table import InputSpec, Preprocess
from schemas.records import SchemaMismatch
from schemas.samples import ERRORS, DeadLetter, Sample
from tests.corpora import (
    SPEC,
    pairs,
    photo,
    toy_unit,
    toy_vectors,
    untrained_fuser,
    write_triple,
    write_unit,
    write_vectors,
)

_SPEC = InputSpec(max_image_bytes=1 << 20, max_pixels=1 << 20)
_SQUARE = Preprocess(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass(frozen=True)
class Door:
    """A reader. `seeds`: names and bytes of good files; `enter(folder, name, data)` reads `data` in place of one."""

    seeds: tuple[tuple[str, bytes], ...] = field(repr=False)
    enter: Callable[[Path, str, bytes], object]
    allowed: tuple[type[Exception], ...] = ()

    def try_one(self, folder: Path, name: str, data: bytes) -> None:
        """Raises whatever the door must not."""
        try:
            self.enter(folder, name, data)
        except self.allowed as error:
            assert not isinstance(error, OSError) or error.errno, "the storage's error, not a parser's"
            assert 0 < len(str(error)) < 2_000, "a message that can be read"


def _read_shard(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    planned = list(shards.plan([str(folder / name)], _SPEC))
    rows: dict[int, Sample | DeadLetter] = {}
    for one in planned:
        for item in readers.read(one, _SPEC):
            assert item.key if isinstance(item, Sample) else item.error in ERRORS, item
            assert isinstance(item, DeadLetter) or item.row not in rows, "a row twice"
            rows[item.row] = item
    assert sorted(rows) == list(range(len(rows))), "every row is a sample or a dead letter"


def _decode(folder: Path, name: str, data: bytes) -> None:
    decoded = images.decode(data, _SQUARE, 1 << 20)
    assert decoded.pixels.shape == (32, 32, 3) and decoded.pixels.dtype == np.uint8
    assert 0 < decoded.width * decoded.height <= 1 << 20
    assert images.thumbnail(data, 64, 1 << 20).startswith(b"\xff\xd8")


def _folder(place: Path) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (str(path.relative_to(place)), path.read_bytes()) for path in sorted(place.rglob("*")) if path.is_file()
    )


def _instead(whole: tuple[tuple[str, bytes], ...], folder: Path, name: str, data: bytes) -> str:
    """A copy of a folder of files, one of them replaced."""
    for path, content in whole:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data if path == name else content)
    return str(folder)


# --- the doors ------------------------------------------------------------------------------------------------------


def tar(scratch: Path) -> Door:
    """Tar shards, plain and compressed, of all header forms."""
    members = [*pairs(3, size=(24, 16)), ("n" * 120 + ".jpg", photo(9, (9, 9))), ("ü/ä.txt", "größe".encode())]
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as out:
            for name, content in members:
                info = tarfile.TarInfo(name[-90:] if form == tarfile.USTAR_FORMAT else name)
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
        seeds.append((f"{form}.tar", stream.getvalue()))
    seeds.append(("packed.tar.gz", gzip.compress(seeds[0][1])))
    return Door(tuple(seeds), _read_shard)


def parquet(scratch: Path) -> Door:
    """Parquet shards, as img2dataset and Hugging Face datasets write them."""
    pictures = [photo(i, (24, 16)) for i in range(6)]
    captions = [f"number {i}" for i in range(6)]
    flat = pa.table({"key": [str(i) for i in range(6)], "jpg": pictures, "caption": captions, "width": list(range(6))})
    nested = pa.table({"image": [{"bytes": one, "path": None} for one in pictures], "text": captions})
    seeds = []
    for name, rows in (("flat", flat), ("nested", nested)):
        for compression in ("none", "zstd"):
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, compression=compression, row_group_size=3)
            seeds.append((f"{name}-{compression}.parquet", sink.getvalue().to_pybytes()))
    return Door(tuple(seeds), _read_shard, (fields.InputError,))


def listing(scratch: Path) -> Door:
    """Listings of paths: CSV, TSV and JSON lines."""
    rows = [(f"{i}.jpg", f'a "quoted", {i}', "ü") for i in range(4)]
    for name, _, _ in rows:
        (scratch / name).write_bytes(photo(1, (9, 9)))
    quoted = [f'{path},"{caption.replace(chr(34), chr(34) * 2)}",{other}' for path, caption, other in rows]
    seeds = (
        ("rows.csv", "\n".join(["path,caption,other", *quoted, ""]).encode()),
        ("rows.tsv", "\n".join(["path\tcaption", *(f"{path}\t{i}" for i, (path, _, _) in enumerate(rows))]).encode()),
        ("rows.jsonl", "\n".join(json.dumps({"path": path, "caption": text}) for path, text, _ in rows).encode()),
    )
    return Door(seeds, _read_shard, (fields.InputError,))


def image(scratch: Path) -> Door:
    """Encoded images of every format that is read."""
    kinds: list[tuple[str, dict[str, object]]] = [
        ("JPEG", {}), ("JPEG", {"mode": "L"}), ("JPEG", {"mode": "CMYK"}), ("JPEG", {"progressive": True}),
        ("PNG", {}), ("PNG", {"mode": "P"}), ("PNG", {"mode": "I;16"}), ("WebP", {}), ("WebP", {"lossless": True}),
        ("GIF", {}), ("BMP", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
    ]  # fmt: skip
    encoded = [photo(i, (40, 30), kind, **options) for i, (kind, options) in enumerate(kinds)]  # type: ignore[arg-type]
    seeds = [(f"{i}.{kind}", data) for i, ((kind, _), data) in enumerate(zip(kinds, encoded, strict=True))]
    return Door(tuple(seeds), _decode, (images.BadImage,))


def feature_table(scratch: Path) -> Door:
    """A feature table: its spec, its records, a snapshot of them, parts and dead letters."""
    place = scratch / "table"
    for number in range(3):
        unit = toy_unit(f"unit-{number:012d}", f"/data/{number}.tar")
        write_unit(place, unit, range(5), dead=[5, 6])
        if number == 1:
            manifest.compact(str(place))
    whole = _folder(place)

    def enter(folder: Path, name: str, data: bytes) -> None:
        copy = _instead(whole, folder, name, data)
        verify.findings(copy)
        opened = table.Table.open(copy)
        assert opened.num_rows == sum(batch.num_rows for batch in opened.scan())
        opened.dead_letters()
        opened.sample(2)

    return Door(whole, enter, (TableError, SchemaMismatch, OSError))


def fuser(scratch: Path) -> Door:
    """A trained fuser."""
    fusers.save(untrained_fuser("combiner"), str(scratch / "fuser"))
    whole = _folder(scratch / "fuser")
    rows = toy_vectors(range(3), 16, "fuzz")

    def enter(folder: Path, name: str, data: bytes) -> None:
        opened = fusers.load(_instead(whole, folder, name, data), 16)
        assert np.isfinite(opened.fuse(rows, rows, np.ones(3, bool), np.ones(3, bool))[0]).all()

    return Door(whole, enter, (fusers.FuserError, SchemaMismatch))


def retrieval_index(scratch: Path) -> Door:
    """An index: its record, vectors, queries and what a result shows."""
    image, text = (toy_vectors(range(600), 16, salt) for salt in ("image", "text"))
    image[::7] = 0
    rows = write_vectors(scratch / "table", image, text, SPEC)
    build.build(rows, str(scratch / "index"))
    whole = _folder(scratch / "index")
    queries = np.asarray(toy_vectors(range(2), 16, "fuzz"), np.float32)

    def enter(folder: Path, name: str, data: bytes) -> None:
        opened = index.Index.open(_instead(whole, folder, name, data))
        scores, ids = opened.search(queries, 3)
        assert scores.shape == ids.shape == (2, 3) and ids.max() < opened.record.rows_table
        opened.meta(ids[0])

    return Door(whole, enter, (index.BadIndex, SchemaMismatch))


def forged_index(scratch: Path) -> Door:
    """The vectors of an index, with a record that calls them right: FAISS itself reads them."""
    image, text = (toy_vectors(range(4_000), 16, salt) for salt in ("image", "text"))
    rows = write_vectors(scratch / "table", image, text, SPEC)
    build.build(rows, str(scratch / "index"), factory="IVF1,PQ8x4fs,Refine(SQ8)")
    whole = _folder(scratch / "index")
    queries = np.asarray(toy_vectors(range(2), 16, "fuzz"), np.float32)

    def enter(folder: Path, name: str, data: bytes) -> None:
        place = Path(_instead(whole, folder, name, data))
        record = json.loads((place / "index.json").read_bytes())
        for holder, key in list(_leaves(record)):
            if key == "path" and holder[key] == name:
                holder |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (place / "index.json").write_text(json.dumps(record))
        index.Index.open(str(place)).search(queries, 3)

    read = [one for one in whole if one[0].startswith(("vectors", "refine", "rows"))]
    return Door(tuple(read), enter, (index.BadIndex, SchemaMismatch))


def embeddings(scratch: Path) -> Door:
    """clip-retrieval's folders of .npy and Parquet."""
    spec = replace(SPEC, imported=adopt.LAYOUT)
    image, text = (toy_vectors(range(9), 16, salt) for salt in ("image", "text"))
    columns = {"image_path": [f"k{i}" for i in range(9)], "caption": ["a"] * 8 + [""], "width": list(range(9))}
    write_triple(scratch / "made", "0", image, text.astype(np.float32), columns)
    whole = _folder(scratch / "made")

    def enter(folder: Path, name: str, data: bytes) -> None:
        (triple,) = adopt.find(_instead(whole, folder / "in", name, data))
        manifest.claim(str(folder / "out"), spec)
        record = adopt.adopt(triple, unit.Work(triple.unit), str(folder / "out"), spec)
        assert record.rows_in == triple.unit.rows == record.rows_out + record.rows_dead

    return Door(whole, enter, (adopt.BadImport,))


DOORS: dict[str, Callable[[Path], Door]] = {
    "tar": tar,
    "parquet": parquet,
    "listing": listing,
    "image": image,
    "embeddings": embeddings,
    "table": feature_table,
    "fuser": fuser,
    "index": retrieval_index,
    "forged index": forged_index,
}

# --- damage ---------------------------------------------------------------------------------------------------------

_ODD_INTS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_ODD_JSON = (None, -1, 0, 1e308, 1 << 70, "", "x" * 300, "../../etc/passwd", "\ud800", [], {}, True, [[]], float("nan"))


def damaged(data: bytes, seeds: Sequence[tuple[str, bytes]], rng: random.Random) -> bytes:
    """A file made of a good one: bytes or numbers changed, pieces cut, repeated or taken from another file; of JSON
    also one value; of a tar also with header checksums made right again."""
    if (lines := _json_lines(data)) and rng.random() < 0.6:
        return b"\n".join(_odd_json(line, rng) if rng.random() < 0.5 else line for line in lines)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 512)), max(1, len(changed) - at))
        how = rng.randrange(6)
        if how == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
            changed[at : at + struct.calcsize(form)] = struct.pack(
                form, rng.choice(_ODD_INTS) & ((1 << 8 * struct.calcsize(form)) - 1)
            )
        elif how == 2:
            del changed[at : at + size]
        elif how == 3:
            changed[at:at] = changed[at : at + size]
        elif how == 4:
            other = rng.choice(seeds)[1]
            start = rng.randrange(len(other) + 1)
            changed[at : at + size] = other[start : start + size]
        else:
            changed[at : at + size] = rng.randbytes(size)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed) + 1) :]
    return _checksummed(changed) if data[257:262] == b"ustar" and rng.random() < 0.7 else bytes(changed)


def _json_lines(data: bytes) -> list[bytes]:
    """The JSON records in a file, one or one a line; nothing where it does not hold such."""
    if data[:1] != b"{":
        return []
    for lines in ([data], data.splitlines()):
        with suppress(ValueError):
            if all(isinstance(json.loads(line), dict) for line in lines):
                return lines
    return []


def _odd_json(data: bytes, rng: random.Random) -> bytes:
    record = json.loads(data)
    if leaves := list(_leaves(record)):
        holder, key = rng.choice(leaves)
        holder[key] = rng.choice(_ODD_JSON)
    return json.dumps(record).encode("utf-8", "surrogatepass")


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _leaves(inner)


def _checksummed(raw: bytearray) -> bytes:
    for start in range(0, len(raw) - 511, 512):
        if raw[start + 257 : start + 262] == b"ustar":
            raw[start + 148 : start + 156] = b" " * 8
            raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    return bytes(raw)
