"""clip-retrieval's layout read as a table: every row once, aligned, of unit length, or a dead letter that says why."""

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fusion_core import adopt, examples, manifest, table, unit, verify
from fusion_core.adopt import BadImport, find, unit_length
from schemas.feature_table import ManifestRecord, TableSpec
from schemas.fuser import TrainJob
from tests.corpora import SPEC, TOWER, write_triple

DIM = TOWER.embedding_dim
IMPORTED = TableSpec(TOWER, imported=adopt.LAYOUT)


def vectors(n: int, seed: int, kind: str = "<f2", length: float = 1.0) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(n, DIM))
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True) * length).astype(kind)


def adopted(folder: Path, place: Path) -> table.Table:
    manifest.claim(str(place), IMPORTED)
    for triple in find(str(folder)):
        adopt.adopt(triple, unit.Work(triple.unit), str(place), IMPORTED)
    return table.Table.open(str(place))


def rows_of(opened: table.Table) -> pa.Table:
    return pa.Table.from_batches(opened.scan(), opened.schema)


def matrix_of(rows: pa.Table, side: str) -> np.ndarray:
    return table.to_numpy(rows[f"{side}_embedding"].combine_chunks())


def save(matrix: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, matrix)
    return stream.getvalue()


# --- rows


@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_row_is_aligned_and_accounted_for(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH_ROWS", 3)
    draw, folder = data.draw, tmp_path_factory.mktemp("layout")
    sides = draw(st.sampled_from([("img",), ("text",), ("img", "text")]))
    digits = draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True))
    expected: dict[tuple[str, int], tuple[dict[str, np.ndarray], str | None]] = {}
    dead = dict[tuple[str, int], str]()
    for number in numbers:
        n = draw(st.integers(0, 8))
        captions = draw(st.lists(st.sampled_from(["a dog", "ein Hund", "", " ", None]), min_size=n, max_size=n))
        given_to = {}
        for side in sides:
            kind = draw(st.sampled_from(["<f2", "<f4", "<f8", ">f4"]))
            matrix = vectors(n, draw(st.integers(0, 99)), kind, draw(st.sampled_from([1.0, 3.5, 1e-3])))
            for row in draw(st.sets(st.integers(0, n - 1), max_size=2)) if n else ():
                matrix[row, : draw(st.sampled_from([1, DIM]))] = draw(st.sampled_from([0, np.nan, np.inf]))
            given_to[side] = matrix
        name = f"{number:0{digits}d}"
        write_triple(folder, name, given_to.get("img"), given_to.get("text"), {
            "image_path": pd.Series([f"{number}/{row}" for row in range(n)], dtype=object),
            "caption": pd.Series(captions, dtype=object),
        })  # fmt: skip
        shard = str(folder / "metadata" / f"metadata_{name}.parquet")
        for row, caption in enumerate(captions):
            mine = {side: matrix[row].astype(np.float64) for side, matrix in given_to.items()}
            if not (caption or "").strip():
                mine.pop("text", None)
            if all(np.isfinite(vector).all() and vector.any() for vector in mine.values()) and mine:
                expected[shard, row] = mine, caption
            else:
                dead[shard, row] = "BrokenVector" if mine else "EmptySample"

    assert [triple.unit.rows is not None for triple in find(str(folder))] == [True] * len(numbers)
    opened = adopted(folder, folder / "table")
    rows = rows_of(opened)
    found = list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True))
    assert sorted(found) == sorted(expected) and found == sorted(found)
    letters = opened.dead_letters().to_pylist()
    assert {(letter["shard"], letter["row"]): letter["error"] for letter in letters} == dead
    for place, shard_row in enumerate(found):
        mine, caption = expected[shard_row]
        assert rows["caption"][place].as_py() == caption
        assert rows["key"][place].as_py() == f"{int(Path(shard_row[0]).stem[9:])}/{shard_row[1]}"
        for side, column in (("img", "image"), ("text", "text")):
            assert rows[f"has_{column}"][place].as_py() == (side in mine)
            stored = matrix_of(rows, column)[place].astype(np.float64)
            exact = mine[side] / np.linalg.norm(mine[side]) if side in mine else np.zeros(DIM)
            np.testing.assert_allclose(stored, exact, rtol=2e-3, atol=1e-6)
    assert verify.findings(opened.place) == []


def test_numbers_are_numbers_and_their_files_belong_together(tmp_path: Path) -> None:
    for number, padded in ((10, "10"), (9, "9"), (2, "2")):
        write_triple(tmp_path, padded, vectors(number, number), None, {"image_path": [f"p{number}"] * number})
    (tmp_path / "img_emb" / "img_emb_9.npy").rename(tmp_path / "img_emb" / "img_emb_009.npy")
    assert [triple.unit.rows for triple in find(str(tmp_path))] == [2, 9, 10]
    for triple in find(str(tmp_path)):
        assert triple.image is not None and triple.image.rows == triple.unit.rows and triple.text is None


def test_float16_of_unit_length_stays_as_it_is_and_all_else_is_brought_to_it() -> None:
    unit_half = vectors(500, 1)
    np.testing.assert_array_equal(unit_length(unit_half), unit_half)
    for kind, length in (("<f2", 30.0), ("<f4", 1.0), (">f8", 1e-200), ("<f8", 1e200), ("<f4", 1e-30), ("<f4", 1e30)):
        given = vectors(50, 2, kind, length).astype(np.longdouble)
        exact = given / np.sqrt((given**2).sum(axis=1, keepdims=True))
        found = unit_length(vectors(50, 2, kind, length))
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, exact.astype(np.float64).astype(np.float16))
    odd = vectors(5, 3, "<f4")
    odd[1], odd[2, 0], odd[3, 5], odd[4, 7] = 0, np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(unit_length(odd).any(axis=1), [True, False, False, False, False])


def test_what_the_metadata_tells_is_kept(tmp_path: Path) -> None:
    columns = {
        "image_path": ["a.jpg", None, "c.jpg"],
        "caption": ["one", "two", "three"],
        "url": ["https://x.example/1", None, None],
        "key": ["k0", "k1", "k2"],
        "width": [640.0, np.nan, 0.5],
        "height": [480, 481, 482],
        "similarity": [0.3, np.nan, 0.1],
        "sha256": ["00" * 32] * 3,
        "metadata": ['{"note": "naïve", "caption": "theirs", "n": [1]}', "no json", None],
    }
    write_triple(tmp_path, "0", vectors(3, 1), vectors(3, 2), columns)
    rows = rows_of(adopted(tmp_path, tmp_path / "table"))
    assert rows["key"].to_pylist() == ["a.jpg", "metadata_0-1", "c.jpg"]
    assert rows["url"].to_pylist() == ["https://x.example/1", None, None]
    assert rows["width"].to_pylist() == [640, None, None] and rows["height"].to_pylist() == [480, 481, 482]
    meta = [json.loads(text) for text in rows["meta"].to_pylist()]
    common = {"sha256": "00" * 32}
    assert meta == [
        {"key": "k0", "similarity": 0.3, "note": "naïve", "caption": "theirs", "n": [1], **common},
        {"key": "k1", "similarity": None, "width": None, "metadata": "no json", **common},
        {"key": "k2", "similarity": 0.1, "width": 0.5, **common},
    ]
    for name in ("sha256", "offset", "length"):  # of a picture that nobody saw
        assert rows[name].null_count == 3
    cosines = np.einsum("nd,nd->n", *(matrix_of(rows, side).astype(np.float64) for side in ("image", "text")))
    np.testing.assert_allclose(rows["similarity"].to_numpy(), cosines, atol=1e-3)


def test_rows_need_neither_names_nor_captions(tmp_path: Path) -> None:
    write_triple(tmp_path, "3", vectors(2, 1), vectors(2, 2), {"other": [1, 2]})
    rows = rows_of(adopted(tmp_path, tmp_path / "table"))
    assert rows["key"].to_pylist() == ["metadata_3-0", "metadata_3-1"]
    assert rows["has_text"].to_pylist() == [True, True] and rows["caption"].null_count == 2


def test_pictures_nobody_saw_are_told_apart_by_their_vectors(tmp_path: Path) -> None:
    image = vectors(6, 1)
    image[4] = image[1]
    write_triple(tmp_path, "0", image, vectors(6, 2), {"caption": [f"caption {row}" for row in range(6)]})
    opened = adopted(tmp_path, tmp_path / "table")
    read = examples._read(opened, np.arange(6), TrainJob("combiner"), "")
    assert len(set(read.group.tolist())) == 5 and read.group[1] == read.group[4]


# --- what is refused


def _remove(folder: Path) -> None:
    (folder / "text_emb" / "text_emb_1.npy").unlink()


def _lonely(folder: Path) -> None:
    (folder / "metadata" / "metadata_1.parquet").unlink()


def _double(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_01.npy", vectors(4, 1))


def _unnumbered(folder: Path) -> None:
    np.save(folder / "img_emb" / "all.npy", vectors(4, 1))


def _content(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "img_emb" / "img_emb_1.npy").write_bytes(data)

    return write


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def _metadata(folder: Path) -> None:
    (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1 and then nothing")


def _twice(folder: Path) -> None:
    again = pa.table([pa.array(["x"] * 4)] * 2, names=["caption", "caption"])
    pq.write_table(again, folder / "metadata" / "metadata_1.parquet")


GOOD = save(vectors(4, 1))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (_remove, r"metadata_1\.parquet stands alone: there is no text_emb/text_emb_1\.npy"),
        (_lonely, r"img_emb_1\.npy stands alone: there is no metadata/metadata_1\.parquet"),
        (_double, r"img_emb_01\.npy and .*img_emb_1\.npy have the same number"),
        (_unnumbered, r"all\.npy has no number: expected img_emb_N\.npy"),
        (_content(save(vectors(5, 1))), r"img_emb_1\.npy has 5 rows, but .*metadata_1\.parquet has 4: it is not known"),
        (_content(GOOD[:-1]), r"img_emb_1\.npy has 255 bytes, but its header promises 256"),
        (_content(GOOD + b"x"), "has 257 bytes, but its header promises 256"),
        (_content(GOOD[:20]), "is not a readable .npy file"),
        (_content(b""), "is not a readable .npy file"),
        (_content(b"PK\3\4" + GOOD), "is not a readable .npy file"),
        (_content(pickle.dumps(_Bomb())), "is not a readable .npy file"),
        (_content(save(np.array([[_Bomb()]] * 4))), "expected float16 or float32"),
        (_content(save(np.zeros((4, DIM), np.int64))), r"holds int64 of shape \(4, 16\): expected float16"),
        (_content(save(np.zeros(4, np.float32))), r"holds float32 of shape \(4,\)"),
        (_content(save(np.zeros((4, 0), np.float32))), r"holds float32 of shape \(4, 0\)"),
        (_content(save(np.asfortranarray(vectors(4, 1)))), "in Fortran order: expected"),
        (_metadata, r"metadata_1\.parquet is not a readable Parquet file.*copy it again"),
        (_twice, r"metadata_1\.parquet has two columns of one name"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_add_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in ("0", "1"):
        write_triple(tmp_path, number, vectors(4, 1), vectors(4, 2), {"caption": ["x"] * 4})
    assert len(find(str(tmp_path))) == 2
    breaks(tmp_path)
    with pytest.raises(BadImport, match=message):
        find(str(tmp_path))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("there", [[], ["metadata"], ["img_emb", "text_emb"]])
def test_another_layout_is_named(tmp_path: Path, there: Sequence[str]) -> None:
    write_triple(tmp_path / "whole", "0", vectors(4, 1), vectors(4, 2), {"caption": ["x"] * 4})
    for name in there:
        (tmp_path / "whole" / name).rename(tmp_path / name)
    with pytest.raises(BadImport, match="is not in clip-retrieval's layout: expected metadata/"):
        find(str(tmp_path))


@settings(max_examples=80, deadline=None)
@given(at=st.integers(0, 127), value=st.integers(0, 255), rest=st.binary(max_size=4))
def test_no_header_breaks_the_reader(
    at: int, value: int, rest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "headers"
    write_triple(folder, "0", vectors(4, 1), None, {"image_path": list("abcd")})
    damaged = bytearray(GOOD)
    damaged[at : at + 1 + len(rest)] = bytes([value]) + rest
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(damaged)
    try:
        (triple,) = find(str(folder))
    except BadImport as error:
        assert "img_emb_0.npy" in str(error)
    else:
        assert triple.image is not None and triple.image.rows == 4


def test_vectors_of_another_dimension_are_refused(tmp_path: Path) -> None:
    write_triple(tmp_path, "0", vectors(4, 1)[:, :8], None, {"image_path": list("abcd")})
    with pytest.raises(BadImport, match=r"img_emb_0\.npy holds vectors of 8 values, but those of toy have 16"):
        adopt.check_dim(find(str(tmp_path)), TOWER)


@pytest.mark.parametrize("change", ["truncated", "touched", "gone"])
def test_files_that_change_meanwhile_leave_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(adopt, "_BATCH_ROWS", 100)
    write_triple(tmp_path, "0", vectors(6_000, 1), None, {"caption": ["x"] * 6_000})
    (triple,) = find(str(tmp_path))
    matrix = tmp_path / "img_emb" / "img_emb_0.npy"

    def interfere(rows: int) -> None:
        if change == "truncated":
            matrix.write_bytes(matrix.read_bytes()[:20_000])
        elif change == "gone":
            matrix.unlink(missing_ok=True)
        else:
            matrix.touch()

    manifest.claim(str(tmp_path / "table"), IMPORTED)
    with pytest.raises(unit.InputChanged, match="meanwhile: run the command again"):
        adopt.adopt(triple, unit.Work(triple.unit), str(tmp_path / "table"), IMPORTED, done=interfere)
    assert manifest.read(str(tmp_path / "table")).by_unit == {}
    assert not list((tmp_path / "table").rglob("features/*"))


def test_damaged_metadata_costs_its_own_rows(tmp_path: Path) -> None:
    write_triple(tmp_path, "0", vectors(40, 1), None, {"x": [1]})
    rows = pa.table({"image_path": [f"picture-{row:02d}" for row in range(40)]})
    place = tmp_path / "metadata" / "metadata_0.parquet"
    pq.write_table(rows, place, row_group_size=20, compression="none", use_dictionary=False, write_page_checksum=True)
    data = place.read_bytes()
    place.write_bytes(data.replace(b"picture-25", b"picture-XX"))
    opened = adopted(tmp_path, tmp_path / "table")
    assert rows_of(opened)["key"].to_pylist() == [f"picture-{row:02d}" for row in range(20)]
    np.testing.assert_array_equal(matrix_of(rows_of(opened), "image"), vectors(40, 1)[:20])
    record: ManifestRecord = opened.records[0]
    assert record.errors == {"CorruptShard": 20} and record.rows_in == 40


def test_the_spec_of_other_tables_is_what_it_was() -> None:
    assert "imported" not in str(SPEC.fingerprint) and TableSpec(TOWER, SPEC.input).fingerprint == SPEC.fingerprint
    assert IMPORTED.fingerprint != SPEC.fingerprint


def test_a_nan_that_signals_is_a_broken_vector_like_any() -> None:
    for kind, bits in (("<f2", b"\x01\x7d"), ("<f4", b"\x01\x00\xa0\x7f")):
        matrix = vectors(3, 1, kind)
        raw = bytearray(matrix.tobytes())
        at = (1 * DIM + 2) * matrix.itemsize
        raw[at : at + matrix.itemsize] = bits  # an assignment would have made it quiet
        found = unit_length(np.frombuffer(bytes(raw), kind).reshape(3, DIM))
        assert not found[1].any() and found[0].any() and found[2].any()
