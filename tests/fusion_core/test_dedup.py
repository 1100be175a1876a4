"""The duplicates of small tables against a rule-by-rule walk over all pairs; what stands, resumes and is refused."""

import hashlib
import io
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_core import dedup, files, manifest, neighbours, phash, readers, shards, table
from fusion_core.dedup import BadDuplicates, Duplicates
from fusion_core.table import Table
from fusion_core.writer import UnitWriter
from schemas.dedup import CLUSTERS, DedupSpec
from schemas.errors import TableError
from schemas.feature_table import features_schema
from schemas.samples import Sample
from tests.corpora import SPEC, photo, toy_batch, toy_unit, write_tar

PLENTY, LITTLE = 2 << 30, 1


@dataclass
class Rows:
    """What decides about duplicates; None and NaN where a row lacks it."""

    digests: list[bytes | None]
    vectors: np.ndarray  # float16 [n, 16], zeros where a row has no image
    similarity: list[float | None]
    sides: list[tuple[int, int] | None]


def some_rows(n: int, seed: int, kinds: int = 6) -> Rows:
    """Rows of few kinds: many are equal, others are near, some have no image."""
    rng = np.random.default_rng(seed)
    digests = [(int(kind) + 1).to_bytes(4, "big") * 8 for kind in rng.integers(0, 3 * n, n)]
    vectors = rng.standard_normal((kinds, 16))[rng.integers(0, kinds, n)] + 0.35 * rng.standard_normal((n, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):  # equal images have equal vectors
        vectors[row] = vectors[first.setdefault(digest, row)]
    absent = rng.random(n) < 0.2
    vectors[absent] = 0
    return Rows(
        [None if gone else digest for gone, digest in zip(absent, digests, strict=True)],
        vectors,
        [None if gone else round(float(x), 1) for gone, x in zip(absent, rng.random(n), strict=True)],
        [None if gone else (int(w), int(h)) for gone, (w, h) in zip(absent, rng.integers(1, 4, (n, 2)), strict=True)],
    )


def write(place: Path, rows: Rows, part_rows: int = 17, name: str = "shard") -> Table:
    """A table of these rows in parts of a few."""
    manifest.claim(str(place), SPEC)
    kind = features_schema(SPEC).field("image_embedding").type
    for number, start in enumerate(range(0, len(rows.digests), part_rows)):
        cut = slice(start, start + part_rows)
        digests, sides = rows.digests[cut], rows.sides[cut]
        batch = toy_batch(
            range(len(digests)),
            shard=f"/data/{name}-{number:03d}.tar",
            sha256=digests,
            has_image=[digest is not None for digest in digests],
            width=[side and side[0] for side in sides],
            height=[side and side[1] for side in sides],
            similarity=rows.similarity[cut],
            image_embedding=table.to_arrow(rows.vectors[cut], kind),
        )
        unit = toy_unit(f"{name}-{number:03d}", f"/data/{name}-{number:03d}.tar")
        with UnitWriter(str(place), SPEC, unit) as writer:
            writer.write(batch)
            writer.commit()
    return Table.open(str(place))


def columns(place: Path, opened: Table) -> list[dict[str, object]]:
    found = Duplicates.open(str(place), opened)
    parts = [found.clusters(number) for number in range(len(opened.parts))]
    assert all(part.schema == CLUSTERS for part in parts)
    return list(chain.from_iterable(part.to_pylist() for part in parts))


def expected(rows: Rows, spec: DedupSpec) -> list[tuple[object, ...]]:
    """(cluster, size, kept, why, cosine) of each row, walked pair by pair in float64."""
    n = len(rows.digests)
    exact = rows.vectors.astype(np.float64)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-9)
    cosine = exact @ exact.T

    def why(a: int, b: int) -> str | None:
        if rows.digests[a] is not None and rows.digests[a] == rows.digests[b]:
            return "exact"
        return "semantic" if spec.cosine is not None and cosine[a, b] >= spec.cosine - 1e-6 else None

    def pixels(row: int) -> int:
        side = rows.sides[row]
        return -side[0] * side[1] if side else 0

    def unlike(row: int) -> float:
        value = rows.similarity[row]
        return np.inf if value is None else -float(np.float32(value))

    ranks = {
        "similarity": lambda row: (unlike(row), pixels(row), row),
        "pixels": lambda row: (pixels(row), unlike(row), row),
        "first": lambda row: row,
    }
    owner: dict[int, int] = {}
    for row in sorted(range(n), key=ranks[spec.keep]):
        if row not in owner:
            owner |= {other: row for other in range(n) if other not in owner and why(row, other)} | {row: row}
    clusters = {kept: [row for row in range(n) if owner[row] == kept] for kept in owner.values()}
    return [
        (
            min(clusters[kept]),
            len(clusters[kept]),
            row == kept,
            None if row == kept else why(row, kept),
            cosine[row, kept] if row != kept and why(row, kept) == "semantic" else None,
        )
        for row, kept in sorted(owner.items())
    ]


def check(found: list[dict[str, object]], wanted: list[tuple[object, ...]]) -> None:
    names = ("cluster", "cluster_size", "kept", "why")
    assert [tuple(row[name] for name in names) for row in found] == [row[:4] for row in wanted]
    for row, (*_, cosine) in zip(found, wanted, strict=True):
        assert row["cosine"] == (None if cosine is None else pytest.approx(cosine, abs=1e-6))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 60),
    cosine=st.none() | st.floats(0.5, 0.99),
    keep=st.sampled_from(["similarity", "pixels", "first"]),
    memory_bytes=st.sampled_from([PLENTY, LITTLE]),
    block=st.sampled_from([1, 4, 256]),
)
def test_clusters_are_those_of_the_rule(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n: int,
    cosine: float | None,
    keep: str,
    memory_bytes: int,
    block: int,
) -> None:
    folder = tmp_path_factory.mktemp("case")
    rows, spec = some_rows(n, seed), DedupSpec(cosine=cosine, keep=keep)  # type: ignore[arg-type]
    opened = write(folder / "table", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_GREEDY_BLOCK", block)
        record = dedup.build(opened, str(folder / "out"), spec, memory_bytes=memory_bytes)
    found, wanted = columns(folder / "out", opened), expected(rows, spec)
    check(found, wanted)
    assert record.rows == n and record.clusters == sum(bool(row[2]) for row in wanted)
    assert record.dropped == {why: sum(row[3] == why for row in wanted) for why in ("exact", "near", "semantic")}
    kept = pa.Table.from_batches(Duplicates.open(str(folder / "out"), opened).scan_kept(batch_rows=7), opened.schema)
    assert kept["key"].to_pylist() == [row["key"] for row in found if row["kept"]]


def test_parts_stand_beside_those_of_the_table(tmp_path: Path) -> None:
    opened = write(tmp_path / "table", some_rows(100, 1))
    dedup.build(opened, str(tmp_path / "out"), DedupSpec(cosine=0.9))
    for part in opened.parts:
        ours = pq.read_table(tmp_path / "out" / "clusters" / part.path.rpartition("/")[2])
        assert ours.select(["key", "shard", "row"]).equals(opened.read_part(part, ["key", "shard", "row"]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".tmp") == [
        "clusters",
        "dedup.json",
    ]


def test_memory_and_repetition_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BRUTE_ROWS", 10)
    opened = write(tmp_path / "table", some_rows(300, 2), 50)
    parts = []
    for name, memory_bytes in (("a", PLENTY), ("b", PLENTY), ("c", 1 << 14), ("d", LITTLE)):
        dedup.build(opened, str(tmp_path / name), DedupSpec(cosine=0.8), memory_bytes=memory_bytes)
        parts.append({path.name: path.read_bytes() for path in (tmp_path / name / "clusters").iterdir()})
    assert len(parts[0]) == 6
    assert parts[0] == parts[1] == parts[2] == parts[3]


def test_a_second_run_does_nothing_and_a_changed_table_is_done_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out, spec = tmp_path / "table", str(tmp_path / "out"), DedupSpec()
    rows = some_rows(40, 3)
    opened = write(place, rows)
    first = dedup.build(opened, out, spec)
    written: list[str] = []
    publish = files.PendingFile.publish
    monkeypatch.setattr(files.PendingFile, "publish", lambda self, name: (written.append(name), publish(self, name))[1])
    assert dedup.build(opened, out, spec) == first
    assert not written
    assert dedup.build(opened, out, replace(spec, keep="first")) != first
    assert len(written) == 4
    grown = write(place, some_rows(17, 4), name="another")
    with pytest.raises(BadDuplicates, match="1 parts are new, 0 gone"):
        Duplicates.open(out, grown)
    dedup.build(grown, out, spec)
    assert len(Duplicates.open(out, grown).kept()) == 57
    manifest.remove_unit(str(place), grown.records[0])
    smaller = Table.open(str(place))
    dedup.build(smaller, out, spec)
    assert len(list((tmp_path / "out" / "clusters").iterdir())) == 3
    assert len(Duplicates.open(out, smaller).kept()) == 40


def test_a_run_that_was_cut_off_leaves_nothing_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, out = write(tmp_path / "table", some_rows(60, 5)), str(tmp_path / "out")
    dedup.build(opened, out, DedupSpec())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "clusters").iterdir()}
    publish, published = files.PendingFile.publish, 0

    def full(self: files.PendingFile, name: str) -> None:
        nonlocal published
        published += 1
        if published > 2:
            raise OSError(28, "No space left on device")
        publish(self, name)

    monkeypatch.setattr(files.PendingFile, "publish", full)
    with pytest.raises(OSError, match="No space"):
        dedup.build(opened, out, DedupSpec(keep="first"))
    monkeypatch.undo()
    with pytest.raises(BadDuplicates, match="fusion dedup"):
        Duplicates.open(out, opened)
    assert not list((tmp_path / "out").glob(".dedup-*")) and not list((tmp_path / "out" / ".tmp").iterdir())
    dedup.build(opened, out, DedupSpec())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out" / "clusters").iterdir()}


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    opened = write(tmp_path / "table", some_rows(20, 6))
    out = tmp_path / "out"
    for spec, message in (
        (DedupSpec(near_bits=11), "0 to 10 of 64, not 11"),
        (DedupSpec(near_bits=-1), "not -1"),
        (DedupSpec(cosine=1.5), "not 1.5"),
        (DedupSpec(cosine=0.0), "not 0.0"),
        (DedupSpec(cosine=float("nan")), "not nan"),
        (DedupSpec(column="text_embedding"), "give one"),
        (DedupSpec(keep="best"), "no rule 'best'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadDuplicates, match=message):
            dedup.build(opened, str(out), spec)
    with pytest.raises(TableError, match="no embedding column 'fused_embedding'"):
        dedup.build(opened, str(out), DedupSpec(cosine=0.9, column="fused_embedding"))
    with pytest.raises(BadDuplicates, match="name an empty folder"):
        dedup.build(opened, opened.place, DedupSpec())
    with pytest.raises(BadDuplicates, match="write it with"):
        Duplicates.open(str(out), opened)
    assert not out.exists()


def test_what_is_damaged_or_of_another_table_does_not_open(tmp_path: Path) -> None:
    opened, out = write(tmp_path / "table", some_rows(40, 7)), tmp_path / "out"
    dedup.build(opened, str(out), DedupSpec())
    other = write(tmp_path / "other", some_rows(40, 8))
    with pytest.raises(BadDuplicates, match=r"is not of .*other as it is now"):
        Duplicates.open(str(out), other)
    part = sorted((out / "clusters").iterdir())[1]
    data = part.read_bytes()
    part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(BadDuplicates, match="damaged"):
        Duplicates.open(str(out), opened).kept()
    part.unlink()
    with pytest.raises(BadDuplicates, match="lacks parts"):
        Duplicates.open(str(out), opened)


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures() -> list[tuple[str, bytes]]:
    """Three photographs, each also encoded anew and as a worse JPEG; a copy, a blank page twice, and a row of text."""
    found: list[tuple[str, bytes]] = []
    for seed in range(3):
        found += [
            (f"{seed}a.jpg", photo(seed, (160, 120), quality=90)),
            (f"{seed}b.png", photo(seed, (160, 120), "PNG")),
        ]
        found.append((f"{seed}c.jpg", photo(seed, (160, 120), quality=30)))
    found += [("copy.jpg", photo(0, (160, 120), quality=90)), ("text.txt", b"only words")]
    for size in (50, 60):
        stream = io.BytesIO()
        Image.new("RGB", (size, size), "white").save(stream, "PNG")
        found.append((f"blank{size}.png", stream.getvalue()))
    return found


def picture_table(folder: Path) -> Table:
    """A table over two tars of `pictures`, its rows as a job would write them but for the vectors."""
    members = pictures()
    for number, some in enumerate((members[:6], members[6:])):
        write_tar(folder / "shards" / f"{number}.tar", some)
    place = str(folder / "table")
    manifest.claim(place, SPEC)
    for unit in shards.plan([str(folder / "shards" / "*.tar")], SPEC.input):
        samples = [item for item in readers.read(unit, SPEC.input) if isinstance(item, Sample)]
        digests = [sample.image and hashlib.sha256(sample.image).digest() for sample in samples]
        batch = toy_batch(
            [sample.row for sample in samples],
            shard=unit.shard,
            key=[sample.key for sample in samples],
            sha256=digests,
            has_image=[digest is not None for digest in digests],
        )
        with UnitWriter(place, SPEC, unit) as writer:
            writer.write(batch)
            writer.commit()
    return Table.open(place)


def test_pictures_encoded_anew_are_near_and_blank_pages_are_not(tmp_path: Path) -> None:
    opened, out = picture_table(tmp_path), tmp_path / "out"
    told: list[int] = []
    record = dedup.build(opened, str(out), DedupSpec(near_bits=4, keep="first"), hashed=told.append)
    assert sum(told) == opened.num_rows
    assert record.dropped == {"exact": 1, "near": 6, "semantic": 0}
    found = {str(row["key"]): row for row in columns(out, opened)}
    for seed in range(3):
        assert [found[f"{seed}{kind}"]["why"] for kind in "abc"] == [None, "near", "near"]
        assert len({found[f"{seed}{kind}"]["cluster"] for kind in "abc"}) == 1
    assert found["copy"]["why"] == "exact" and found["copy"]["cluster"] == found["0a"]["cluster"]
    assert found["0a"]["cluster_size"] == 4
    assert all(found[key]["cluster_size"] == 1 for key in ("text", "blank50", "blank60"))


def test_hashes_are_kept_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, out = picture_table(tmp_path), tmp_path / "out"
    hash_image, hashed = phash.of_image, 0

    def counted(image: bytes, max_pixels: int) -> int | None:
        nonlocal hashed
        hashed += 1
        if hashed == 8:
            raise OSError(5, "Input/output error")
        return hash_image(image, max_pixels)

    monkeypatch.setattr(phash, "of_image", counted)
    with pytest.raises(OSError, match="Input/output"):
        dedup.build(opened, str(out), DedupSpec(near_bits=0))
    assert len(list((out / "hashes").iterdir())) == 1, "the first shard is done"
    dedup.build(opened, str(out), DedupSpec(near_bits=0))
    assert hashed == 8 + 6, "only the second one is read again"
    dedup.build(opened, str(out), DedupSpec(near_bits=4))
    assert hashed == 14
    standing = sorted((out / "hashes").iterdir())[0]
    other = pq.read_table(standing).replace_schema_metadata({b"fusion.phash": b"0"})
    pq.write_table(other, standing)
    dedup.build(opened, str(out), DedupSpec(near_bits=3))
    assert hashed == 14 + 6, "hashes of another release are no use"


def test_shards_that_changed_are_not_hashed(tmp_path: Path) -> None:
    opened, out = picture_table(tmp_path), str(tmp_path / "out")
    write_tar(tmp_path / "shards" / "1.tar", pictures()[5:])
    with pytest.raises(shards.InputError, match=r"1.tar is not what was embedded any more"):
        dedup.build(opened, out, DedupSpec(near_bits=4))
    (tmp_path / "shards" / "1.tar").unlink()
    with pytest.raises(OSError, match=r"1.tar"):
        dedup.build(opened, out, DedupSpec(near_bits=4))
    assert dedup.build(opened, out, DedupSpec()).dropped["exact"] == 1, "without pictures the shards are not needed"
