"""Units in, samples out: every row once, in order, and damage costs only what it hits."""

import datetime
import decimal
import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_core import files, readers, shards, tars
from schemas.feature_table import InputSpec
from schemas.samples import ERRORS, DeadLetter, Sample

SPEC = InputSpec()
Member = tuple[str, bytes]
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_tar(path: Path, members: Iterable[Member], mode: str = "w", **options: object) -> Path:
    with tarfile.open(path, mode, **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(path: Path, spec: InputSpec = SPEC, rows: int = 10_000) -> list[Sample | DeadLetter]:
    return [item for unit in shards.plan([str(path)], spec, rows) for item in readers.read(unit, spec)]


def read_tar(path: Path, *members: Member) -> list[Sample | DeadLetter]:
    return read(write_tar(path / "a.tar", members))


def errors(items: Iterable[Sample | DeadLetter]) -> list[str]:
    return [item.error if isinstance(item, DeadLetter) else "" for item in items]


def settle(items: Iterable[Sample | DeadLetter], first_row: int = 0) -> dict[int, Sample | DeadLetter]:
    """What counts for each row; fails unless every row comes once, in order, but for samples that are retracted."""
    settled: dict[int, Sample | DeadLetter] = {}
    for item in items:
        if item.row in settled:
            assert isinstance(settled[item.row], Sample) and isinstance(item, DeadLetter), item
        else:
            assert item.row == first_row + len(settled), item
        if isinstance(item, DeadLetter):
            assert item.error in ERRORS and item.stage in ("read", "caption", "meta") and item.message, item
        settled[item.row] = item
    return settled


# --- tar: what a sample is ------------------------------------------------------------------------------------------


def test_members_of_one_key_make_a_sample(tmp_path: Path) -> None:
    meta = b'{"caption": "from json", "url": "http://x", "n": NaN, "big": 1e400}'
    first, second, third = read_tar(
        tmp_path,
        ("d/a.1/x.json", meta),
        ("d/a.1/x.JPG", b"image" * 200),
        ("d/a.1/x.txt", "  größer\n".encode()),
        ("y.caption", b""),
        ("z.json", meta),
        ("z.webp", b""),
    )
    assert first == Sample("d/a.1/x", 0, b"image" * 200, "  größer\n", "http://x", meta.decode(), 1536, 1000)
    assert second == Sample("y", 1, None, "")
    assert third == Sample("z", 2, b"", "from json", "http://x", meta.decode(), 5632, 0)


def test_offset_and_length_give_the_image_in_the_shard(tmp_path: Path) -> None:
    members = [(f"{n}.{e}", f"{e}{n}".encode() * n * 99) for n in range(1, 6) for e in ("txt", "png")]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", members, format=form)
        raw = path.read_bytes()
        for item in read(path):
            assert isinstance(item, Sample) and item.offset and item.length
            assert raw[item.offset : item.offset + item.length] == item.image


def test_what_is_no_part_of_a_sample_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
            ("x.jpg", tarfile.REGTYPE),
            ("x.npy", tarfile.REGTYPE),
            ("x.seg.png", tarfile.REGTYPE),
            (".y.jpg", tarfile.REGTYPE),
            ("__MACOSX/x.jpg", tarfile.REGTYPE),
            ("./__MACOSX/._x.jpg", tarfile.REGTYPE),
            (".cache/x.jpg", tarfile.REGTYPE),
            ("readme", tarfile.REGTYPE),
            ("x.txt", tarfile.REGTYPE),
            ("./.././/etc/passwd.jpg", tarfile.REGTYPE),
            ("/abs.jpg", tarfile.REGTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x.jpg"
            archive.addfile(member)
    assert [(item.key, errors([item])) for item in read(path)] == [
        ("x", [""]),
        ("./.././/etc/passwd", [""]),
        ("/abs", [""]),
    ]


def test_the_first_of_two_images_or_captions_counts(tmp_path: Path) -> None:
    (item,) = read_tar(tmp_path, ("a.png", b"p"), ("a.caption", b"c"), ("a.jpg", b"j"), ("a.txt", b"t"))
    assert isinstance(item, Sample) and (item.image, item.caption) == (b"p", "c")


@pytest.mark.parametrize(
    ("members", "error", "stage"),
    [
        ([("a.json", b"{}")], "EmptySample", "read"),
        ([("a.jpg", b"1"), ("a.txt", b"\xffoo")], "CaptionNotUtf8", "caption"),
        ([("a.jpg", b"1"), ("a.json", b'{"caption": "\\ud800"}')], "CaptionNotUtf8", "caption"),
        ([("a.jpg", b"1"), ("a.json", b'{"url": "\\udfff"}')], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b"{")], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b"[]")], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b"")], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b'{"a": "\xff"}')], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b'{"a": ' + b"[" * 100_000)], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1"), ("a.json", b'{"a": ' + b"1" * 9999 + b"}")], "MetadataNotJson", "meta"),
        ([("a.jpg", b"1" * 2001)], "TooManyBytes", "read"),
        ([("a.jpg", b"1"), ("a.txt", b"1" * (2**20 + 1))], "TooManyBytes", "caption"),
        ([("a.jpg", b"1"), ("a.json", b" " * (2**20 + 1))], "TooManyBytes", "meta"),
    ],
)
def test_a_bad_sample_is_one_dead_letter(tmp_path: Path, members: list[Member], error: str, stage: str) -> None:
    for mode in ("w", "w:gz"):
        path = write_tar(tmp_path / "a.tar", [("0.jpg", b"2" * 2000), *members, ("b.txt", b"good")], mode)
        before, item, after = read(path, InputSpec(max_image_bytes=2000))
        assert isinstance(before, Sample) and isinstance(after, Sample) and after.row == 2
        assert isinstance(item, DeadLetter)
        assert (item.key, item.row, item.error, item.stage, item.offset) == ("a", 1, error, stage, 2560)


def test_duplicates_and_scattered_keys(tmp_path: Path) -> None:
    items = read_tar(
        tmp_path,
        *[("a.jpg", b"1"), ("a.txt", b"1"), ("a.jpg", b"2"), ("a.txt", b"2")],  # twice in a row: a duplicate
        *[("b.jpg", b"1"), ("c.jpg", b"1"), ("b.txt", b"1")],  # b in two pieces
        *[("a.txt", b"3")],  # again, elsewhere
        *[("b.json", b"{}")],  # a third piece of what is dead already
        *[("d.json", b"{}"), ("c.jpg", b"2"), ("d.jpg", b"2"), ("b.txt", b"2")],
    )
    assert [(item.key, item.row, *errors([item])) for item in items] == [
        ("a", 0, ""),
        ("a", 1, "DuplicateKey"),
        ("b", 2, ""),
        ("c", 3, ""),
        ("b", 2, "ScatteredKey"),
        ("a", 4, "DuplicateKey"),
        ("d", 5, "EmptySample"),
        ("c", 6, "DuplicateKey"),
        ("b", 7, "DuplicateKey"),
    ]
    assert settle(items)[0] == Sample("a", 0, b"1", "1", offset=512, length=1)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    names = ["d" * 90 + "/" + "ü" * 300, "x" * 101, "日本/語"]
    path = write_tar(tmp_path / "a.tar", [(f"{name}.jpg", name.encode()) for name in names], format=form)
    assert [(item.key, item.image) for item in read(path) if isinstance(item, Sample)] == [
        (name, name.encode()) for name in names
    ]


def test_a_name_that_is_not_utf8_still_makes_a_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("é.jpg", b"1")], encoding="latin-1", format=tarfile.GNU_FORMAT)
    assert [item.key for item in read(path)] == ["\\xe9"]


def test_a_sparse_member_is_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    with (tmp_path / "a.jpg").open("r+b") as stream:
        stream.seek(1 << 20)
        stream.write(b"end")
    made = subprocess.run(["tar", "--sparse", "-cf", "a.tar", "a.jpg"], cwd=tmp_path, capture_output=True)
    if made.returncode or (tmp_path / "a.tar").stat().st_size > 1 << 20:
        pytest.skip("no tar here that writes sparse members")
    (item,) = read(tmp_path / "a.tar")
    assert isinstance(item, Sample) and item.image == (tmp_path / "a.jpg").read_bytes()
    assert item.offset is None


def test_webdatasets_own_writers(tmp_path: Path) -> None:
    expected = [(f"{n:04d}", b"\xff\xd8%d" % n, f"caption {n}") for n in range(25)]
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=10, verbose=0) as writer:
        for key, image, caption in expected:
            writer.write({"__key__": key, "jpg": image, "txt": caption, "json": {"caption": "other", "key": key}})
    items = [item for item in read(tmp_path) if isinstance(item, Sample)]
    assert [(item.key, item.image, item.caption) for item in items] == expected
    assert [json.loads(item.meta or "")["key"] for item in items] == [key for key, _, _ in expected]
    assert [item.row for item in items] == [*range(10), *range(10), *range(5)]
    with webdataset.TarWriter(f"{tmp_path}/z.tar.gz") as writer:
        writer.write({"__key__": "a/b", "png": b"1", "cls": 3})
    assert read(tmp_path / "z.tar.gz") == [Sample("a/b", 0, b"1")]


def test_gzip_is_known_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"2")]
    assert read(write_tar(tmp_path / "a.tar", members, "w:gz")) == [Sample("a", 0, b"1", "2")]
    (plain,) = read(write_tar(tmp_path / "b.tgz", members))
    assert isinstance(plain, Sample) and plain.offset == 512


# --- tar: damage ----------------------------------------------------------------------------------------------------

PAIRS = [(f"{n}.{suffix}", f"{n}{suffix}".encode() * 150) for n in range(4) for suffix in ("jpg", "txt")]
LONE = [*PAIRS[:4], ("i.jpg", b"1" * 600), ("t.txt", b"2" * 600), ("long" * 40 + ".jpg", b"3"), *PAIRS[4:]]


@pytest.mark.parametrize("members", [PAIRS, LONE], ids=["pairs", "lone"])
def test_a_cut_anywhere_keeps_what_was_complete(tmp_path: Path, members: list[Member]) -> None:
    path = write_tar(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT)
    whole, raw = read(path), path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [member.offset_data + member.size for member in archive]
        end = archive.offset + tarfile.BLOCKSIZE  # of the zero block that ends it, at least
    last = {
        item.key: max(e for e, m in zip(ends, members, strict=True) if tars._split(m[0])[0] == item.key)
        for item in whole
    }
    for cut in sorted({*range(0, end, 61), *(e + d for e in [*ends, end] for d in (-513, -512, -1, 0, 1, 511, 512))}):
        path.write_bytes(raw[:cut])
        *kept, letter = read(path)
        settle([*kept, letter])
        if cut >= end:
            assert [*kept, letter] == whole
            continue
        assert isinstance(letter, DeadLetter) and letter.error == "TruncatedShard"
        assert kept == whole[: len(kept)]
        assert letter.offset is not None and letter.offset <= cut and str(cut) in letter.message
        lost = [item for item in whole[len(kept) :] if isinstance(item, Sample) and last[item.key] <= cut]
        assert len(lost) <= 1 and all(item.image is None or item.caption is None for item in lost)  # it may lack a part
        in_progress = next((item.key for item in lost), "")
        assert letter.key in (in_progress, *(item.key for item in whole[len(kept) : len(kept) + 1]), "")


def test_a_cut_gzip_keeps_what_was_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    images = [random.Random(n).randbytes(3000) for n in range(9)]  # do not shrink: a cut is where it seems to be
    write_tar(path, [item for n in range(9) for item in ((f"{n}.jpg", images[n]), (f"{n}.txt", b"c"))], "w:gz")
    whole, raw = read(path), path.read_bytes()
    kept_by_cut = []
    for cut in range(0, len(raw), 499):
        path.write_bytes(raw[:cut])
        *kept, letter = read(path)
        assert kept == whole[: len(kept)] and errors([letter]) == ["TruncatedShard"]
        kept_by_cut.append(len(kept))
    assert kept_by_cut == sorted(kept_by_cut) and kept_by_cut[len(kept_by_cut) // 2] in (3, 4) and kept_by_cut[-1] >= 8


def test_a_damaged_gzip_is_said(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [("a.jpg", b"1" * 9000), ("a.txt", b"2")], "w:gz")
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1  # the checksum
    path.write_bytes(raw)
    assert errors(read(path)) == ["", "CorruptShard"]
    path.write_bytes(gzip.compress(b"not a tar" * 100))
    assert errors(read(path)) == ["CorruptShard"]


def test_shards_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for data, error, offset in [
        (b"", "TruncatedShard", 0),
        (b"x", "TruncatedShard", 0),
        (b"\xff\xd8 an image" * 100, "CorruptShard", 0),
        (b"\x1f\x8b", "TruncatedShard", 0),
        (b"\x1f\x8bnonsense" * 9, "CorruptShard", 0),
    ]:
        path.write_bytes(data)
        (letter,) = read(path)
        assert isinstance(letter, DeadLetter) and (letter.error, letter.offset, letter.row) == (error, offset, 0), data
    path.write_bytes(bytes(1024))
    assert read(path) == []


def test_a_damaged_header_ends_the_shard_there(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmembers()[4].offset
    raw[header + 5] ^= 0xFF
    path.write_bytes(raw)
    *kept, letter = read(path)
    assert [item.key for item in kept] == ["0", "1"]
    assert isinstance(letter, DeadLetter) and (letter.error, letter.offset, letter.row) == ("CorruptShard", header, 2)


def test_nothing_hides_behind_the_end_marker(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS[:2])
    raw = path.read_bytes()
    path.write_bytes(raw + raw)
    *kept, letter = read(path)
    assert len(kept) == 1 and isinstance(letter, DeadLetter)
    assert (letter.error, letter.offset) == ("CorruptShard", len(raw))
    path.write_bytes(raw + bytes(2 << 20))  # as a download leaves it that reserved its space
    assert errors(read(path)) == ["", "TruncatedShard"]


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\xff" * 11 + b"\x00"])
def test_a_header_that_lies_about_the_size_allocates_nothing(tmp_path: Path, size: bytes) -> None:
    for name in (b"b.jpg", b"././@LongLink"):
        path = write_tar(tmp_path / "a.tar", [*PAIRS[:2], ("b.jpg", b"1")])
        raw = bytearray(path.read_bytes())
        start = raw.index(b"b.jpg")
        raw[start : start + 100] = name.ljust(100, b"\0")
        raw[start + 124 : start + 136] = size
        raw[start + 156] = ord("L") if b"Long" in name else ord("0")
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
        path.write_bytes(raw)
        spec = InputSpec(max_image_bytes=1 << 40)
        (unit,) = shards.plan([str(path)], spec)
        tracemalloc.start()
        items = list(readers.read(unit, spec))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert errors(items)[0] == "" and errors(items)[1] in ("TruncatedShard", "CorruptShard")
        assert len(items) == 2 and peak < 8 << 20


# --- tar: properties ------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "c/a", "d"])
EXTENSIONS = st.sampled_from(["jpg", "png", "txt", "caption", "json", "npy"])
MEMBERS = st.lists(st.tuples(KEYS, EXTENSIONS, st.sampled_from([b"", b"{}", b"x", b"\xff" * 700])), max_size=14)


def expected_rows(members: list[tuple[str, str, bytes]]) -> list[tuple[str, bool]]:
    """The key of each row, and whether it is retracted or a repetition, straight from the rules."""
    runs: list[tuple[str, set[str]]] = []
    for key, extension, _ in members:
        if extension == "npy":
            continue
        if not runs or runs[-1][0] != key or extension in runs[-1][1]:
            runs.append((key, set()))
        runs[-1][1].add(extension)
    rows: list[tuple[str, bool]] = []
    first: dict[str, tuple[int, set[str]]] = {}
    for key, extensions in runs:
        if key not in first:
            first[key] = (len(rows), extensions)
            rows.append((key, False))
        elif first[key][1] & extensions:
            rows.append((key, True))
        else:
            rows[first[key][0]] = (key, True)
            first[key][1].update(extensions)
    return rows


@FEW
@given(members=MEMBERS, mode=st.sampled_from(["w", "w:gz"]))
def test_any_order_of_members_follows_the_rules(
    tmp_path: Path, members: list[tuple[str, str, bytes]], mode: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{key}.{ext}", data) for key, ext, data in members], mode)
    settled = list(settle(read(path)).values())
    rows = expected_rows(members)
    assert [item.key for item in settled] == [key for key, _ in rows]
    for item, (_, is_dead) in zip(settled, rows, strict=True):
        assert not is_dead or isinstance(item, DeadLetter)
        assert is_dead or errors([item])[0] not in ("DuplicateKey", "ScatteredKey")


@FEW
@given(seed=st.integers(0, 2**32), mode=st.sampled_from(["w", "w:gz"]), form=st.integers(1, 2), n=st.integers(1, 9))
def test_damaged_tars_never_raise(tmp_path: Path, seed: int, mode: str, form: int, n: int) -> None:
    path = write_tar(tmp_path / "a.tar", LONE, mode, format=form)
    path.write_bytes(damaged(path.read_bytes(), seed, n))
    settle(read(path))


NAMES = st.one_of(
    st.sampled_from(["a.jpg", "d/a.jpg", "folder/", "ü.jpg", "n" * 100 + ".jpg", "f" * 99 + "/" + "n" * 60 + ".jpg"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CONTTYPE])
MADE = st.sampled_from(
    [0, 1_700_000_000, 1_700_000_000.25]
)  # a fraction makes a PAX header, as webdataset's writer does
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(FEW, max_examples=200)
@given(
    files_=st.lists(st.tuples(NAMES, KINDS, MADE, st.integers(0, 1500)), max_size=6), form=FORMS,
    seed=st.integers(0, 2**32), changed=st.sampled_from([0, 0, 1, 3]),
)  # fmt: skip
def test_plain_headers_are_read_as_tarfile_reads_them(
    tmp_path: Path, files_: list[tuple[str, bytes, float, int]], form: int, seed: int, changed: int
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for name, kind, made, size in files_:
            member = tarfile.TarInfo(name)
            member.type, member.mtime, member.size = kind, made, size if kind in tarfile.REGULAR_TYPES else 0  # type: ignore[assignment]
            with suppress(ValueError):  # names that USTAR cannot hold
                archive.addfile(member, io.BytesIO(bytes(size)))
    path.write_bytes(damaged(path.read_bytes(), seed, changed) if changed else path.read_bytes())

    def members() -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        with closing(tars._Source(files.open_input(str(path)))) as source:
            try:
                found += [(m.name, m.size, m.offset, m.offset_data, m.isreg()) for m in tars._members(source)]
            except tars._Cut as cut:
                found.append((cut.error, cut.offset, cut.message))
        return found

    fast = members()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars, "_plain_member", lambda source: None)
        assert fast == members()


def damaged(raw: bytes, seed: int, n: int) -> bytes:
    """The bytes with `n` of them changed, sometimes cut or with a piece moved."""
    rng, data = random.Random(seed), bytearray(raw)
    for _ in range(n):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        start = rng.randrange(len(data))
        del data[start : start + rng.choice([1, 512, len(data)])]
    return bytes(data)


# --- Parquet --------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_types(tmp_path: Path, kind: pa.DataType, text: pa.DataType) -> None:
    images = pa.array([b"1", None, b""], pa.binary()).cast(pa.binary())
    captions = pa.array(["ä", "", None], pa.string()).cast(pa.binary() if text == pa.binary() else pa.string())
    table = {"jpg": _as(images, kind), "TXT": _as(captions, text)}
    assert read(write_parquet(tmp_path / "a.parquet", table)) == [
        Sample("a:0", 0, b"1", "ä"),
        Sample("a:1", 1, None, ""),
        Sample("a:2", 2, b"", None),
    ]


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return array.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else array.cast(kind)


def test_parquet_columns_by_convention_and_by_name(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        {"image": [b"1"], "pixels": [b"2"], "text": ["t"], "alt": ["a"], "key": [7], "id": ["i"], "URL": ["u"]},
    )
    rest = {"alt": "a", "id": "i"}
    (item,) = read(path)
    assert item == Sample("7", 0, b"1", "t", "u", json.dumps(rest, separators=(",", ":")))
    spec = InputSpec(image_column="pixels", caption_column="alt", key_column="id", url_column="text")
    (item,) = read(path, spec)
    assert isinstance(item, Sample) and (item.image, item.caption, item.key, item.url) == (b"2", "a", "i", "t")
    assert json.loads(item.meta or "") == {"key": 7, "URL": "u"}


def test_parquet_meta_holds_the_other_columns_as_json(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
    others = {
        "i": pa.array([2**40]),
        "f": pa.array([float("nan")]),
        "inf": pa.array([float("inf")]),
        "b": pa.array([True]),
        "none": pa.array([None], pa.string()),
        "ts": pa.array([when]),
        "tz": pa.array([when], pa.timestamp("ms", "UTC")),
        "ns": pa.array([1709209815123456789], pa.timestamp("ns")),
        "far": pa.array([2**50], pa.timestamp("ms")),
        "took": pa.array([1_500_000_001], pa.duration("ns")),
        "times": pa.array([[1709209815123456789]], pa.list_(pa.timestamp("ns"))),
        "day": pa.array([when.date()]),
        "dec": pa.array([decimal.Decimal("1.50")]),
        "list": pa.array([[1, None]]),
        "struct": pa.array([{"a": [{"b": "ü"}], "n": float("nan")}]),
        "dict": pa.array(["x"]).dictionary_encode(),
        "raw": pa.array([b"\xff"]),
        "raws": pa.array([[b"\xff"]]),
    }
    (item,) = read(write_parquet(tmp_path / "a.parquet", {"image": [b"1"], **others}))
    assert isinstance(item, Sample)
    meta = json.loads(item.meta or "")
    assert "1125899906842624" in meta.pop("far")  # a year that no calendar here holds
    assert meta == {
        "i": 2**40,
        "f": None,
        "inf": None,
        "b": True,
        "none": None,
        "ts": "2024-02-29T12:30:15.123456",
        "tz": "2024-02-29T12:30:15.123Z",
        "ns": "2024-02-29T12:30:15.123456789",
        "took": "PT1.5S",
        "times": ["2024-02-29T12:30:15.123456"],
        "day": "2024-02-29",
        "dec": "1.50",
        "list": [1, None],
        "struct": {"a": [{"b": "ü"}], "n": None},
        "dict": "x",
    }


def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff", None, b"good", b"good", b"x" * (2**20 + 1)]).view(pa.string())
    other = pa.array([b"good", b"good", b"good", b"\xff", b"good", b"good"]).view(pa.string())
    columns = {"image": [b"1", b"1", None, b"1", b"1" * 9, b"1"], "caption": bad, "other": other}
    items = read(write_parquet(tmp_path / "a.parquet", columns), InputSpec(max_image_bytes=8))
    assert errors(items) == ["", "CaptionNotUtf8", "EmptySample", "MetadataNotJson", "TooManyBytes", "TooManyBytes"]
    assert list(settle(items)) == list(range(6))
    assert "0xff" in getattr(items[1], "message", "") and "'other'" in getattr(items[3], "message", "")


def test_repeated_keys_are_legal_in_parquet(tmp_path: Path) -> None:
    items = read(write_parquet(tmp_path / "a.parquet", {"image": [b"1", b"2"], "key": ["k", "k"]}))
    assert [(item.key, item.row, *errors([item])) for item in items] == [("k", 0, ""), ("k", 1, "")]


def test_hugging_face_datasets_as_it_writes_them(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    rows = {"image": pictures, "text": [f"t{n}" for n in range(5)], "label": [0, 1, 0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"), batch_size=2)
    items = [item for item in read(tmp_path / "a.parquet", rows=2) if isinstance(item, Sample)]
    assert [(item.key, item.caption, item.meta) for item in items] == [
        (f"a:{n}", f"t{n}", f'{{"label":{n % 2}}}') for n in range(5)
    ]
    assert [Image.open(io.BytesIO(item.image or b"")).getpixel((0, 0)) for item in items] == [
        (n, 0, 0) for n in range(5)
    ]


def test_an_image_that_is_only_a_path_is_said(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "a.jpg"}, {"bytes": b"1", "path": "b.jpg"}, None, {"bytes": None, "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "caption": ["a", "b", "c", None]}
    items = read(write_parquet(tmp_path / "a.parquet", columns))
    assert errors(items) == ["ImageNotEmbedded", "", "", "EmptySample"]
    assert "a.jpg" in getattr(items[0], "message", "")


def test_damage_in_one_row_group_leaves_the_others(tmp_path: Path) -> None:
    images = [random.Random(n).randbytes(500) for n in range(40)]
    path = write_parquet(
        tmp_path / "a.parquet",
        {"image": images},
        row_group_size=10,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    raw = bytearray(path.read_bytes())
    raw[raw.find(images[15])] ^= 1
    units = list(shards.plan([str(path)], SPEC, 20))
    path.write_bytes(raw)
    items = [item for unit in units for item in readers.read(unit, SPEC)]
    assert list(settle(items)) == list(range(40))
    assert errors(items) == [""] * 10 + ["CorruptShard"] * 10 + [""] * 20
    assert "row group 1" in getattr(items[10], "message", "")


def test_a_footer_that_does_not_parse(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [b"1"] * 3})
    units = list(shards.plan([str(path)], SPEC))
    path.write_bytes(path.read_bytes()[:-9])
    assert errors(readers.read(units[0], SPEC)) == ["CorruptShard"] * 3  # it was planned with three rows
    (unit,) = shards.plan([str(path)], SPEC)
    (letter,) = readers.read(unit, SPEC)
    assert isinstance(letter, DeadLetter) and letter.error == "CorruptShard" and str(path) in letter.message
    write_parquet(path, {"image": [b"1"] * 3})  # and when it is whole by the time it is read
    assert errors(readers.read(unit, SPEC)) == [""] * 3


def test_storage_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() < 100_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

    images = [random.Random(n).randbytes(9000) for n in range(20)]
    write_parquet(tmp_path / "a.parquet", {"image": images}, use_dictionary=False)
    write_tar(tmp_path / "b.tar", PAIRS)
    units = list(shards.plan([str(tmp_path / "*")], SPEC))
    monkeypatch.setattr(files, "open_input", lambda place: Failing(Path(place).read_bytes()))
    for unit in units:
        with pytest.raises(OSError, match="Input/output error"):
            list(readers.read(unit, SPEC))


@FEW
@given(seed=st.integers(0, 2**32), n=st.integers(1, 9))
def test_damaged_parquet_never_raises(tmp_path: Path, seed: int, n: int) -> None:
    columns = {
        "image": [b"%d" % row * 30 for row in range(30)],
        "text": [f"ü{row}" for row in range(30)],
        "n": [*range(30)],
    }
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=seed % 2 == 0)
    units = list(shards.plan([str(path)], SPEC, 10))
    path.write_bytes(damaged(path.read_bytes(), seed, n))
    for unit in units:
        assert list(settle(readers.read(unit, SPEC), unit.first_row)) == list(
            range(unit.first_row, unit.first_row + 10)
        )


# --- folders and listings -------------------------------------------------------------------------------------------


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_a_folder(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "b/1.JPG": b"image",
            "b/1.txt": b" a caption ",
            "b/1.json": b'{"caption": "other", "url": "u"}',
            "b/2.png": b"",
            "a.b.webp": b"3",
            "a.b.caption": b"dotted",
            "a-b.webp": b"4",
            "only.txt": b"text only",
            "only.json": b'{"n": 1}',
            "alone.json": b"{}",
            "notes.md": b"",
            ".hidden.jpg": b"",
            "z.jpg": b"1",
            "z.jpeg": b"2",
            "y.jpg": b"x" * 100,
            "x.jpg": b"",
            "x.txt": b"\xff",
        },
    )
    items = read(tmp_path, InputSpec(max_image_bytes=99))
    assert items[:6] == [
        Sample("a-b", 0, b"4", None, None, None, 0, 1),
        Sample("a.b", 1, b"3", "dotted", None, None, 0, 1),
        Sample("b/1", 2, b"image", " a caption ", "u", '{"caption": "other", "url": "u"}', 0, 5),
        Sample("b/2", 3, b"", None, None, None, 0, 0),
        Sample("only", 4, None, "text only", None, '{"n": 1}'),
        items[5],
    ]
    assert [(item.key, *errors([item])) for item in items[5:]] == [
        ("x", "CaptionNotUtf8"),
        ("y", "TooManyBytes"),
        ("z", ""),
        ("z", "DuplicateKey"),
    ]
    assert list(settle(items)) == list(range(9))


def test_an_image_that_vanished_is_a_dead_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    open_input = files.open_input

    def refuse(place: str) -> object:
        return open_input(place if place.endswith("b.jpg") else place + ".gone")

    monkeypatch.setattr(files, "open_input", refuse)
    assert errors(read(tmp_path)) == ["MissingFile", ""]


ROWS = [
    {"file_name": "i/0.jpg", "text": 'a "quoted", one\nin two lines', "url": "u", "n": "1"},
    {"file_name": "./i/../i/1.jpg", "text": "ü", "url": None, "n": None},
    {"file_name": None, "text": "text only", "url": None, "n": None},
    {"file_name": None, "text": None, "url": None, "n": "3"},
    {"file_name": "../i/0.jpg", "text": "x", "url": None, "n": None},
    {"file_name": "i/../../x.jpg", "text": "x", "url": None, "n": None},
    {"file_name": "/etc/passwd", "text": "x", "url": None, "n": None},
    {"file_name": "s3://bucket/x.jpg", "text": "x", "url": None, "n": None},
    {"file_name": "i/none.jpg", "text": "x", "url": None, "n": None},
    {"file_name": "i", "text": "x", "url": None, "n": None},
    {"file_name": "i/0.jpg/x", "text": "x", "url": None, "n": None},
    {"file_name": "x" * 5000, "text": "x", "url": None, "n": None},
    {"file_name": "i/big.jpg", "text": "x", "url": None, "n": None},
]
ROWS_ERRORS = ["", "", "", "EmptySample", *["PathOutsideRoot"] * 4, *["MissingFile"] * 4, "TooManyBytes"]


def write_listing(path: Path, rows: list[dict[str, str | None]]) -> Path:
    write_files(path.parent, {"i/0.jpg": b"0", "i/1.jpg": b"1", "i/big.jpg": b"x" * 100})
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_listing(tmp_path: Path, suffix: str) -> None:
    items = read(write_listing(tmp_path / f"a.{suffix}", ROWS), InputSpec(max_image_bytes=99), rows=5)
    assert errors(items) == ROWS_ERRORS
    assert list(settle(items)) == list(range(len(ROWS)))
    assert items[:2] == [
        Sample("a:0", 0, b"0", ROWS[0]["text"], "u", '{"file_name":"i/0.jpg","n":"1"}'),
        Sample("a:1", 1, b"1", "ü", None, '{"file_name":"./i/../i/1.jpg","n":null}'),
    ]
    assert all(item.key == f"a:{row}" for row, item in enumerate(items))


def test_an_absolute_path_inside_the_folder_is_fine(tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [{"path": f"{tmp_path}/i/0.jpg", "key": "k"}]
    (item,) = read(write_listing(tmp_path / "a.csv", rows))
    assert isinstance(item, Sample) and (item.image, item.key) == (b"0", "k")


def test_spaces_around_the_names_of_columns_do_not_count(tmp_path: Path) -> None:
    write_listing(tmp_path / "a.csv", ROWS)
    (tmp_path / "a.csv").write_text("path, caption\ni/0.jpg, first\n")
    (item,) = read(tmp_path / "a.csv")
    assert isinstance(item, Sample) and (item.image, item.caption, item.meta) == (b"0", " first", '{"path":"i/0.jpg"}')


def test_a_broken_csv_row_takes_no_neighbour_with_it(tmp_path: Path) -> None:
    write_listing(tmp_path / "a.csv", ROWS)
    lines = [
        b"path,caption",
        b"i/0.jpg,first",
        b'i/0.jpg,"never closed',
        b"i/1.jpg,second",
        b"i/1.jpg,one,cell too many",
        b"too few",
        b"",
        b"i/0.jpg,\xff",
        b'i/0.jpg,"closed" twice',
        b"i/0.jpg," + b"x" * (2 << 20),
        b'i/1.jpg,"a\r\nb"',
        b'i/1.jpg,"open at the end',
    ]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(lines))
    items = read(tmp_path / "a.csv", rows=3)
    assert errors(items) == [
        *["", "BrokenRow", "", "BrokenRow", "BrokenRow", "CaptionNotUtf8", "BrokenRow"],
        *["TooManyBytes", "", "BrokenRow"],
    ]
    assert [item.caption for item in items if isinstance(item, Sample)] == ["first", "second", "a\r\nb"]
    assert list(settle(items)) == list(range(10))


def test_a_broken_json_line_takes_no_neighbour_with_it(tmp_path: Path) -> None:
    write_listing(tmp_path / "a.jsonl", ROWS)
    lines = [
        b'{"path": "i/0.jpg", "caption": "first", "n": NaN}',
        b"{broken",
        b"",
        b"[1]",
        b'{"path": "i/0.jpg", "caption": "\\ud800"}',
        b'{"path": 3, "caption": "x"}',
        b'{"path": "i/0.jpg", "caption": 3}',
        b'{"path": "i/0.jpg", "caption": "' + b"x" * (2 << 20) + b'"}',
        b'{"path": "i/1.jpg", "caption": "last", "late": {"a": [1]}}',
        b'{"path": "i/1.jpg", "cap',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read(tmp_path / "a.jsonl", rows=2)
    assert errors(items) == [
        *["", "MetadataNotJson", "MetadataNotJson", "CaptionNotUtf8", "MissingFile", "CaptionNotUtf8"],
        *["TooManyBytes", "", "MetadataNotJson"],
    ]
    assert [json.loads(item.meta or "") for item in items if isinstance(item, Sample)] == [
        {"path": "i/0.jpg", "n": None},
        {"path": "i/1.jpg", "late": {"a": [1]}},
    ]


def test_half_a_surrogate_pair_costs_no_neighbour(tmp_path: Path) -> None:
    write_listing(tmp_path / "a.jsonl", ROWS)
    lines = [
        b'{"path": "i/0.jpg", "key": "\\ud800x"}',
        b'{"path": "i/0.jpg", "key": "\\udce9"}',
        b'{"path": "i/0.jpg", "\\ud800": 1, "key": "c"}',
        b'{"path": "i/0.jpg", "key": "d"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read(tmp_path / "a.jsonl")
    assert errors(items) == ["", "", "MetadataNotJson", ""]
    assert [item.key for item in items] == ["\\ud800x", "\\xe9", "c", "d"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_caption_in_a_listing_may_be_as_long_as_in_a_tar(tmp_path: Path, suffix: str) -> None:
    caption = "long " * 100_000
    items = read(write_listing(tmp_path / f"a.{suffix}", [{"path": "i/0.jpg", "caption": caption}]))
    assert [item.caption for item in items if isinstance(item, Sample)] == [caption]


@FEW
@given(seed=st.integers(0, 2**32), n=st.integers(1, 5), suffix=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_damaged_listings_never_raise(tmp_path: Path, seed: int, n: int, suffix: str) -> None:
    path = write_listing(tmp_path / f"a.{suffix}", ROWS)
    units = list(shards.plan([str(path)], SPEC, 5))
    path.write_bytes(damaged(path.read_bytes(), seed, n))
    for unit in units:
        settle(readers.read(unit, SPEC), unit.first_row)
        shards.identity(unit)
    try:
        settle(read(path))
    except shards.InputError as error:
        assert str(path) in str(error)


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from fusion_core import readers, shards
from schemas.feature_table import InputSpec

def peak():  # not ru_maxrss, which a process takes over from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

spec = InputSpec(max_image_bytes=1 << 20)
units = list(shards.plan([sys.argv[1]], spec))
before = peak()
print(sum(1 for unit in units for item in readers.read(unit, spec)), peak() - before)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def growth(path: Path) -> tuple[int, float]:
    """How many rows a fresh process read, and by how many MiB it grew."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    rows, mib = done.stdout.split()
    return int(rows), float(mib)


@needs_proc
def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    image = random.Random(0).randbytes(100_000)
    # Small pages: a page is read whole, and pyarrow's own default is 1,024 images to a page.
    write_parquet(tmp_path / "a.parquet", {"image": [image] * 2500}, use_dictionary=False, write_batch_size=16)
    rows, mib = growth(tmp_path / "a.parquet")
    assert rows == 2500 and mib < 120


@needs_proc
def test_a_large_tar_is_not_held_in_memory(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(200_000)

    def members() -> Iterator[Member]:
        yield "big.jpg", data * 400
        yield from ((f"{n}.jpg", data) for n in range(500))

    write_tar(tmp_path / "a.tar", members())
    rows, mib = growth(tmp_path / "a.tar")
    assert rows == 501 and mib < 20
