"""One unit, from shard to record: what open_clip would give, in order, and nothing lost."""

import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_core import fusers, kept, manifest, shards, table, towers, unit, verify
from fusion_core.demo import shards as demo_shards
from schemas.feature_table import InputSpec, ManifestRecord, TableSpec
from schemas.samples import DeadLetter, Sample
from tests.corpora import assert_same_rows, pairs, photo, write_tar

MODEL = towers.load(towers.DEMO, precision="fp32")
towers.one_thread_each()  # as in a job
SPEC = TableSpec(MODEL.spec, InputSpec(), fusers.parse("concat", MODEL.spec.embedding_dim).spec)


def embed(shard: Path, place: Path, previous: ManifestRecord | None = None, spec: TableSpec = SPEC) -> ManifestRecord:
    manifest.claim(str(place), spec)
    (planned,) = shards.plan([str(shard)], spec.input)
    return unit.run_unit(unit.Work(planned, previous), str(place), spec, MODEL)


def rows_of(place: Path) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(str(place)).scan())


def test_rows_are_what_open_clip_gives_in_input_order(tmp_path: Path) -> None:
    members = pairs(75, size=(140, 90))
    record = embed(write_tar(tmp_path / "a.tar", members), tmp_path / "table")
    rows = rows_of(tmp_path / "table")
    assert (record.rows_in, record.rows_out, record.rows_dead) == (75, 75, 0)
    assert rows["key"].to_pylist() == [f"{i:06d}" for i in range(75)]
    assert rows["caption"].to_pylist() == [f"a picture of number {i}" for i in range(75)]
    assert rows["url"][3].as_py() == "https://pictures.example/3.jpg"
    assert rows["meta"][3].as_py() == dict(members)["000003.json"].decode()
    assert set(rows["width"].to_pylist()) == {140} and set(rows["height"].to_pylist()) == {90}

    folder = Path(towers.__file__).parent / "demo" / "model"
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(next(folder.glob("*bpe*"))))
    pictures = [data for name, data in members if name.endswith("jpg")]
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(data))) for data in pictures])
        image = network.encode_image(pixels, normalize=True).double().numpy()
        text = network.encode_text(tokenizer(rows["caption"].to_pylist()), normalize=True).double().numpy()
    ours = {name: table.to_numpy(rows[name].combine_chunks()).astype(np.float64) for name in table.EMBEDDINGS}
    for name, expected in (("image_embedding", image), ("text_embedding", text)):
        norms = np.linalg.norm(ours[name], axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3)
        assert (np.einsum("nd,nd->n", ours[name], expected) / norms).min() >= 0.9999
    np.testing.assert_allclose(rows["similarity"].to_numpy(), np.einsum("nd,nd->n", image, text), atol=2e-3)
    both = np.concatenate([image, text], axis=1) / np.sqrt(2)
    assert np.einsum("nd,nd->n", ours["fused_embedding"], both).min() >= 0.9999


def test_the_byte_range_finds_the_picture_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(5))
    embed(shard, tmp_path / "table")
    data = shard.read_bytes()
    for row in rows_of(tmp_path / "table").select(["row", "offset", "length"]).to_pylist():
        assert data[row["offset"] : row["offset"] + row["length"]] == photo(row["row"])


def test_rows_may_lack_a_modality(tmp_path: Path) -> None:
    members = [
        ("both.jpg", photo(1)), ("both.txt", b"a thing"),
        ("image.png", photo(2, format="PNG")),
        ("text.txt", b"words alone"),
        ("blank.jpg", photo(3)), ("blank.txt", b" \n"),
    ]  # fmt: skip
    embed(write_tar(tmp_path / "a.tar", members), tmp_path / "table")
    rows = rows_of(tmp_path / "table")
    assert rows["has_image"].to_pylist() == [True, True, False, True]
    assert rows["has_text"].to_pylist() == [True, False, True, False]
    assert rows["caption"].to_pylist() == ["a thing", None, "words alone", " \n"]
    assert [value is None for value in rows["similarity"].to_pylist()] == [False, True, True, True]
    assert [value is None for value in rows["sha256"].to_pylist()] == [False, False, True, False]
    for name, flag in (("image_embedding", "has_image"), ("text_embedding", "has_text")):
        filled = table.to_numpy(rows[name].combine_chunks()).any(axis=1)
        assert filled.tolist() == rows[flag].to_pylist()
    assert verify.findings(str(tmp_path / "table")) == []


def test_broken_samples_cost_their_neighbours_nothing(tmp_path: Path) -> None:
    clean, broken = (
        demo_shards.write_shards(tmp_path / name, 500, 500, seed=3, broken=name == "broken")[0]
        for name in ("clean", "broken")
    )
    embed(clean, tmp_path / "clean_table")
    record = embed(broken, tmp_path / "broken_table")
    assert record.rows_dead == len(demo_shards.BROKEN)
    assert record.rows_in == 500 + len(demo_shards.BROKEN) + len(demo_shards.UNUSUAL)
    expected, found = rows_of(tmp_path / "clean_table"), rows_of(tmp_path / "broken_table")
    good = found.filter(pa.compute.is_in(found["key"], value_set=expected["key"].combine_chunks()))
    same = ["key", "caption", "url", "sha256", "width", "height", "similarity", "meta", *table.EMBEDDINGS]
    assert_same_rows(good.select(same), expected.select(same))
    errors = table.Table.open(str(tmp_path / "broken_table")).dead_letters()
    assert dict(zip(errors["key"].to_pylist(), errors["error"].to_pylist(), strict=True)) == {
        "truncated_jpeg": "TruncatedImage", "empty_image": "EmptyImage", "html_as_jpeg": "NotAnImage",
        "zeros_as_webp": "NotAnImage", "header_only_jpeg": "TruncatedImage", "bomb_png": "TooManyPixels",
        "latin1_caption": "CaptionNotUtf8", "broken_json": "MetadataNotJson", "json_only": "EmptySample",
        "000000000": "DuplicateKey",
    }  # fmt: skip


def test_a_changed_shard_embeds_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(40))
    first = embed(shard, tmp_path / "table")
    write_tar(shard, [*pairs(10), ("new.jpg", photo(99)), ("new.txt", b"a new one"), *pairs(30, start=10)])
    seen: list[int] = []
    encode = MODEL.embed_images
    monkeypatch.setattr(
        MODEL, "embed_images", lambda pixels, pad_to: (seen.append(len(pixels)), encode(pixels, pad_to))[1]
    )
    second = embed(shard, tmp_path / "table", first)
    assert (sum(seen), second.rows_reused, second.rows_out, second.revision) == (1, 40, 41, 1)
    embed(shard, tmp_path / "fresh")
    assert_same_rows(rows_of(tmp_path / "table"), rows_of(tmp_path / "fresh"))


def test_a_damaged_earlier_part_is_not_believed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(10))
    first = embed(shard, tmp_path / "table")
    assert first.features
    part = tmp_path / "table" / first.features.path
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    second = embed(shard, tmp_path / "table", first)
    assert (second.rows_reused, second.features) == (0, first.features)
    assert verify.findings(str(tmp_path / "table")) == []


class Killed(BaseException):
    """Where a kill would have come."""


@pytest.mark.parametrize("tower", ["embed_images", "_embed_tokens"])
def test_what_was_embedded_before_a_kill_is_not_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0)
    monkeypatch.setattr(kept, "_SAVE_SHARE", 0)
    forward, seen = getattr(MODEL, tower), list[int]()

    def counted(rows: Any, pad_to: int) -> Any:
        if sum(seen) >= 48 and attempt == 0:
            raise Killed
        seen.append(len(rows))
        return forward(rows, pad_to)

    monkeypatch.setattr(MODEL, tower, counted)
    members = pairs(90)
    shard, place = write_tar(tmp_path / "a.tar", members), tmp_path / "table"
    attempt = 0
    with pytest.raises(Killed):
        embed(shard, place)
    lying = sorted((place / ".tmp").iterdir())
    assert len(lying) >= 3 and all(path.name.startswith("kept-") for path in lying)
    lying[0].write_bytes(lying[0].read_bytes()[:-1])  # torn: not used
    assert table.Table.open(str(place)).records == ()
    attempt = 1
    embed(shard, place)
    torn = sum(seen) - 90  # of captions none, where it held images
    assert (0 < torn <= 16) if tower == "embed_images" else (0 <= torn <= 16)
    assert not list((place / ".tmp").iterdir())
    embed(shard, tmp_path / "whole")
    assert (place / "features").exists()
    assert [path.name for path in (place / "features").iterdir()] == [
        path.name for path in (tmp_path / "whole" / "features").iterdir()
    ]


def test_a_shard_that_changes_under_the_job_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(10))
    encode = MODEL.embed_texts
    monkeypatch.setattr(
        MODEL, "embed_texts", lambda texts, pad_to, done: (os.utime(shard, ns=(1, 1)), encode(texts, pad_to))[1]
    )
    with pytest.raises(unit.InputChanged, match=r"a\.tar changed while the job ran"):
        embed(shard, tmp_path / "table")
    assert table.Table.open(str(tmp_path / "table")).records == ()


def test_repeated_keys_of_a_parquet_shard_are_kept_and_counted(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    columns = {"key": ["a", "b", "a", "a"], "image": [photo(i) for i in range(4)], "caption": list("wxyz")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    record = embed(tmp_path / "a.parquet", tmp_path / "table")
    assert (record.rows_out, record.repeated_keys) == (4, 2)


def test_the_batch_size_does_not_change_the_rows(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(50))
    (planned,) = shards.plan([str(shard)], SPEC.input)
    for batch in (7, 64):
        place = str(tmp_path / str(batch))
        manifest.claim(place, SPEC)
        unit.run_unit(unit.Work(planned), place, SPEC, MODEL, batch)
    assert_same_rows(rows_of(tmp_path / "7"), rows_of(tmp_path / "64"))


items = st.builds(
    lambda row, image, caption, dead: DeadLetter(str(row), row, "read", "EmptySample", "")
    if dead
    else Sample(str(row), row, b"x" if image else None, "y" if caption else None),
    st.integers(0, 9), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(items, max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_windows_cut_the_stream_without_changing_it(
    stream: list[Sample | DeadLetter], rows: int, size_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "_WINDOW_ROWS", rows)
        patch.setattr(unit, "_WINDOW_BYTES", size_bytes)
        found = list(unit.windows(stream))
    assert [item for window in found for item in window] == stream
    for window in found:
        assert 1 <= len(window) <= rows
        assert sum(len(item.image or b"") for item in window[:-1] if isinstance(item, Sample)) < size_bytes


@settings(max_examples=50, deadline=None)
@given(st.lists(items, max_size=60), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_what_is_read_ahead_comes_in_order(
    stream: list[Sample | DeadLetter], rows: int, size_bytes: int, pieces: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "_PIECE_ROWS", rows)
        patch.setattr(unit, "_PIECE_BYTES", size_bytes)
        patch.setattr(unit, "_PIECES_AHEAD", pieces)
        assert list(unit.ahead(stream)) == stream


def test_reading_ahead_keeps_its_bounds_and_passes_errors_on() -> None:
    read = []

    def endless() -> Iterator[Sample]:
        for row in range(100_000):
            if row == 2000:
                raise OSError("the disk is gone")
            read.append(row)
            yield Sample(str(row), row, b"x", None)

    stream = unit.ahead(endless())
    for row in range(1000):
        assert next(stream).row == row
        assert len(read) <= row + 1 + 9 * 32  # the piece at work and eight ahead
    with pytest.raises(OSError, match="the disk is gone"):
        list(stream)
    assert len(read) == 2000
    large = unit.ahead(Sample(str(row), row, bytes(1 << 20), None) for row in range(400) if not read.append(row))
    read.clear()
    next(large)
    time.sleep(0.2)
    large.close()
    assert len(read) <= 9 * 8 + 1  # of 1 MiB: 8 MiB a piece


def test_equal_images_and_captions_are_embedded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"embed_images": 0, "embed_texts": 0}
    for name in counts:
        encode = getattr(MODEL, name)

        def count(rows: Sequence[object], *more: Any, name: str = name, encode: Any = encode) -> np.ndarray:
            counts[name] += len(rows)
            return encode(rows, *more)

        monkeypatch.setattr(MODEL, name, count)
    monkeypatch.setattr(unit, "_WINDOW_ROWS", 16)
    members = []
    for i in range(50):
        members += [(f"{i:03d}.jpg", photo(i % 7)), (f"{i:03d}.txt", f"caption {i % 5}".encode())]
    record = embed(write_tar(tmp_path / "a.tar", members), tmp_path / "table")
    assert counts == {"embed_images": 7, "embed_texts": 5}
    assert (record.rows_out, record.rows_reused) == (50, 43)
    rows = rows_of(tmp_path / "table")
    vectors = table.to_numpy(rows["image_embedding"].combine_chunks())
    np.testing.assert_array_equal(vectors[:7], vectors[7:14])
    assert verify.findings(str(tmp_path / "table")) == []


def test_decoding_ahead_in_threads_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = demo_shards.write_shards(tmp_path, 200, 200, seed=5)
    embed(shard, tmp_path / "table")
    monkeypatch.setattr(unit, "map", lambda function, items: unit.in_threads(function, items), raising=False)
    embed(shard, tmp_path / "ahead")
    assert rows_of(tmp_path / "table").equals(rows_of(tmp_path / "ahead"))
    dead = [table.Table.open(str(tmp_path / name)).dead_letters() for name in ("table", "ahead")]
    assert dead[0].equals(dead[1]) and dead[0].num_rows == len(demo_shards.BROKEN)


def test_the_record_says_what_it_cost_and_what_made_it(tmp_path: Path) -> None:
    record = embed(write_tar(tmp_path / "a.tar", pairs(3)), tmp_path / "table")
    assert {"read", "decode", "embed_image", "embed_text", "fuse", "write", "unit"} == record.seconds.keys()
    assert sum(spent for stage, spent in record.seconds.items() if stage != "unit") <= record.seconds["unit"] * 1.2
    assert torch.__version__.startswith(record.versions["torch"])
    assert record == table.Table.open(str(tmp_path / "table")).records[0]
