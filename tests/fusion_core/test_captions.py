"""Captions by a small CoCa with random weights, against decoding token by token; and pictures that are gone."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.coca_model
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion_core import captions, images, towers
from fusion_core.table import Table
from fusion_core.towers import TowerError, Towers
from tests.corpora import photo, write_scene_table
from tests.fusion_core.test_towers import save_random_model

COCA: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True,
        "attn_pooler_heads": 2, "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2,
    },
    "custom_text": True,
}  # fmt: skip


def save_coca(folder: Path) -> Path:
    """A model folder of a CoCa whose random words depend on the picture: open_clip leaves its last weights unset."""
    place = save_random_model(folder, COCA) / "open_clip_model.safetensors"
    weights = load_file(place)
    for name, values in weights.items():
        if name.startswith("text_decoder.") and values.ndim == 2:
            weights[name] = torch.randn(values.shape, generator=torch.Generator().manual_seed(len(name))) / 3
    save_file(weights, place)
    return folder


@pytest.fixture(scope="module")
def coca(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return towers.load(str(save_coca(tmp_path_factory.mktemp("coca") / "coca")), device="cpu", precision="fp32")


@pytest.fixture
def table(tmp_path: Path) -> Table:
    silent = [(f"silent{i}.jpg", photo(i)) for i in range(5)]
    return write_scene_table(tmp_path, 6, [*silent, ("words.txt", b"words alone")])


def pixels_of(model: Towers, pictures: list[bytes]) -> np.ndarray:
    return np.stack([images.decode(picture, model.spec.preprocess, 10**7).pixels for picture in pictures])


def likeliest(model: Towers, pixels: np.ndarray, max_tokens: int) -> str:
    """The caption of one picture, each token chosen by the whole model's own forward, in order."""
    network, tokenizer = model._model, model._tokenizer.inner
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (model.spec.preprocess.mean, model.spec.preprocess.std)
    )
    picture = ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]
    tokens = [start]
    with torch.inference_mode():
        while len(tokens) <= max_tokens:
            logits = network(picture, torch.tensor([tokens]), output_labels=False)["logits"][0, -1]
            logits[[start, end] if len(tokens) < 5 else [start]] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == end:
                break
    return " ".join(tokenizer.decode([token for token in tokens if token not in (start, end)]).split())


def test_captions_are_the_likeliest_tokens(coca: Towers) -> None:
    pixels = pixels_of(coca, [photo(i) for i in range(5)])
    found = coca.caption_images(pixels, max_tokens=6)
    assert found == [likeliest(coca, one, 6) for one in pixels]
    assert all(found) and len(set(found)) > 1
    assert coca.caption_images(pixels[3:], 6, pad_to=8) == found[3:], "a caption does not depend on its neighbours"
    long = coca.caption_images(pixels, max_tokens=500)
    assert [text.startswith(short) for text, short in zip(long, found, strict=True)] == [True] * 5


@pytest.mark.skipif(
    not open_clip.coca_model._has_transformers, reason="open_clip's own generate needs transformers 4.56"
)
def test_captions_are_those_of_open_clips_generate(coca: Towers) -> None:
    pixels = pixels_of(coca, [photo(i) for i in range(5)])
    own = coca._model.generate(coca._normal(pixels, 1), generation_type="top_k", top_k=1, seq_len=12)
    ends = (coca._tokenizer.inner.sot_token_id, coca._tokenizer.inner.eot_token_id)
    texts = [coca._tokenizer.inner.decode([token for token in row if token not in ends]) for row in own.tolist()]
    assert [" ".join(text.split()) for text in texts] == coca.caption_images(pixels, max_tokens=10)


def test_only_pictures_without_a_caption_get_one(coca: Towers, table: Table, tmp_path: Path) -> None:
    record = captions.write(table, str(tmp_path / "out"), coca, max_tokens=6)
    rows = pq.read_table(tmp_path / "out" / "captions").to_pylist()
    expected = coca.caption_images(pixels_of(coca, [photo(i) for i in range(5)]), 6, coca.batch)
    assert {row["key"]: row["caption_gen"] for row in rows if row["caption_gen"]} == {
        f"silent{i}": text for i, text in enumerate(expected)
    }
    assert record.captioned == 5 and record.errors == {} and record.rows == len(rows) == 12
    for row in rows:
        assert (row["caption_model"] is None) == (row["caption_gen"] is None)
        assert row["error"] is None
        if row["caption_model"]:
            assert coca.spec.weights_sha256[:12] in row["caption_model"] and coca.spec.model in row["caption_model"]
    data = {path.name: path.read_bytes() for path in (tmp_path / "out" / "captions").iterdir()}
    assert captions.write(table, str(tmp_path / "out"), coca, max_tokens=6).outputs == record.outputs
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "captions").iterdir()} == data


def test_pictures_that_are_gone_are_told_and_tried_again(coca: Towers, table: Table, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "more.tar"
    whole = shard.read_bytes()
    row = next(row for row in table.sample(12).to_pylist() if row["key"] == "silent3")
    broken = bytearray(whole)
    broken[row["offset"] : row["offset"] + 64] = bytes(64)
    shard.write_bytes(broken)
    record = captions.write(table, str(tmp_path / "out"), coca, max_tokens=6)
    assert record.captioned == 4 and record.errors == {"ImageGone": 1}
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "out" / "captions").to_pylist()}
    assert rows["silent3"]["caption_gen"] is None and "is another image now" in rows["silent3"]["message"]
    shard.unlink()
    record = captions.write(table, str(tmp_path / "out"), coca, max_tokens=6)
    assert record.captioned == 0 and record.errors == {"MissingFile": 5}
    shard.write_bytes(whole[:-3000])
    assert sum(captions.write(table, str(tmp_path / "out"), coca, max_tokens=6).errors.values()) <= 1
    shard.write_bytes(whole)
    done: list[int] = []
    record = captions.write(table, str(tmp_path / "out"), coca, max_tokens=6, passed=done.append)
    assert record.captioned == 5 and record.errors == {} and sum(done) <= 6, "what stood whole was kept"


def test_a_model_that_writes_no_captions(table: Table, tmp_path: Path) -> None:
    demo = towers.load(towers.DEMO, device="cpu", precision="fp32")
    with pytest.raises(TowerError, match="name a CoCa model"):
        captions.write(table, str(tmp_path / "out"), demo)
    assert not os.path.exists(tmp_path / "out")


def test_coca_embeds_as_any_tower(coca: Towers) -> None:
    pixels = pixels_of(coca, [photo(1), photo(2)])
    found = coca.embed_images(pixels)
    with torch.inference_mode():
        expected = coca._model.encode_image(coca._normal(pixels, 1)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert coca.embed_texts(["a cat", "two dogs"]).shape == (2, 32)
