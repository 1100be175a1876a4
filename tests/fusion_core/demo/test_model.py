"""The shipped small model: it loads as any OpenCLIP directory does, and reads what its card says it reads."""

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from fusion_core.demo.evaluate import BPE_NAME, GATED, MODEL_DIRECTORY, Model, evaluate, table, to_input
from fusion_core.demo.scenes import caption, render, sample_scene

MODEL_NAME = f"local-dir:{MODEL_DIRECTORY}"


@pytest.fixture(scope="module")
def numbers() -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("field", GATED)
def test_zero_shot_reads_the_attribute_of_unseen_pairs(numbers: dict[str, float], field: str) -> None:
    assert numbers[field] >= 0.9


def test_retrieval_among_a_thousand_unseen_scenes(numbers: dict[str, float]) -> None:
    assert numbers["text_to_image_r1"] >= 0.8
    assert numbers["text_to_image_r5"] >= 0.98 and numbers["image_to_text_r5"] >= 0.98


def test_card_tells_the_measured_numbers(numbers: dict[str, float]) -> None:
    card = (MODEL_DIRECTORY / "MODEL_CARD.md").read_text()
    written = dict(re.findall(r"^\| ([a-z0-9 ]+) \| ([0-9.]+)% \|", card, flags=re.MULTILINE))
    measured = dict(re.findall(r"^\| ([a-z0-9 ]+) \| ([0-9.]+)% \|", table(numbers), flags=re.MULTILINE))
    assert written.keys() == measured.keys()
    assert {name: float(value) for name, value in written.items()} == pytest.approx(
        {name: float(value) for name, value in measured.items()}, abs=0.6
    )


def test_directory_is_small_and_free_of_pickle() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIRECTORY.iterdir()}
    assert set(files) == {"open_clip_config.json", "open_clip_model.safetensors", BPE_NAME, "MODEL_CARD.md"}
    assert sum(files.values()) <= 4 * 2**20


def test_open_clip_loads_the_directory_and_its_preprocessing() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL_NAME)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME, bpe_path=str(MODEL_DIRECTORY / BPE_NAME))
    picture = render(sample_scene(np.random.default_rng(0)), np.random.default_rng(0))
    pixels = to_input(torch.from_numpy(np.array(picture))[None])
    assert torch.allclose(preprocess(picture)[None], pixels, atol=1e-6)
    tokens = tokenizer(["a photo of a red star"])
    config = json.loads((MODEL_DIRECTORY / "open_clip_config.json").read_text())["model_cfg"]
    assert tokens.shape == (1, config["text_cfg"]["context_length"])
    assert int(tokens.max()) == config["text_cfg"]["vocab_size"] - 1  # the end of text has the highest number
    with torch.inference_mode():
        assert model.eval().encode_image(pixels).shape == model.encode_text(tokens).shape == (1, config["embed_dim"])


def test_captions_fit_into_the_context() -> None:
    tokenizer = Model(MODEL_DIRECTORY).tokenizer
    rng = np.random.default_rng(1)
    longest = max(len(tokenizer.encode(caption(sample_scene(rng, held_out=None), rng).text)) for _ in range(2000))
    assert longest + 2 <= tokenizer.context_length


def test_unusual_words_still_encode() -> None:
    tokens = Model(MODEL_DIRECTORY).tokenizer(["ein Straßencafé № 7 🌟"])
    assert int((tokens > 0).sum()) > 5


def test_embeddings_do_not_depend_on_the_batch() -> None:
    model = Model(MODEL_DIRECTORY)
    rng = np.random.default_rng(2)
    pictures = [render(sample_scene(rng), rng) for _ in range(5)]
    assert torch.allclose(model.images(pictures), model.images(pictures, batch_rows=2), atol=1e-5)


class _Blind:
    """A stand-in that gives every picture and caption the same embedding."""

    def images(self, pictures: list[object]) -> torch.Tensor:
        return torch.ones(len(pictures), 4)

    texts = images


def test_measures_give_a_blind_model_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fusion_core.demo.evaluate.Model", lambda _: _Blind())
    numbers = evaluate(tmp_path, scenes=120, gallery=20)
    assert numbers["text_to_image_r1"] == numbers["image_to_text_r5"] == numbers["order"] == 0.0
    assert all(numbers[field] < 0.7 for field in GATED)
