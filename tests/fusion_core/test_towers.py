"""The towers against open_clip's own preprocess and encode."""

import io
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fusion_core import images, towers
from tests.corpora import photo

VIT: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
CAPTIONS = ["a cat", "two large red stars on a dotted white background " * 9, "", "наивный 猫 🐈", "a photo of a dog"]


def save_random_model(folder: Path, config: dict[str, Any], **preprocess: Any) -> Path:
    """A model folder with random weights, as open_clip's own push-to-hub writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    name = f"random-{folder.parent.name}-{folder.name}"
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "vit", VIT)


def reference(
    model: str, pretrained: str | None, pictures: list[bytes], captions: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What open_clip itself gives in fp32."""
    network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
    network.eval()
    bpe = list(Path(model.removeprefix("local-dir:")).glob("*bpe*.txt.gz")) if model.startswith("local-dir:") else []
    tokenizer = open_clip.get_tokenizer(model, **({"bpe_path": str(bpe[0])} if bpe else {}))
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(picture))) for picture in pictures])
        return (
            network.encode_image(pixels, normalize=True).numpy(),
            network.encode_text(tokenizer(captions), normalize=True).numpy(),
        )


def ours(model: towers.Towers, pictures: list[bytes], captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    pixels = [images.decode(picture, model.spec.preprocess, 10**7).pixels for picture in pictures]
    return model.embed_images(np.stack(pixels)), model.embed_texts(captions)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


PICTURES = [
    photo(i, size, format="PNG") for i, size in enumerate([(300, 200), (64, 64), (31, 90), (500, 40), (128, 128)])
]


@pytest.mark.parametrize("kind", ["vit", "demo"])
def test_fp32_vectors_are_open_clips(kind: str, vit: Path) -> None:
    folder = vit if kind == "vit" else Path(towers.__file__).parent / "demo" / "model"
    model = towers.load(str(folder) if kind == "vit" else towers.DEMO, precision="fp32")
    assert model.device == ("cuda" if torch.cuda.is_available() else "cpu")
    for found, expected in zip(
        ours(model, PICTURES, CAPTIONS), reference(f"local-dir:{folder}", None, PICTURES, CAPTIONS), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert cosines(found, expected).min() >= 0.9999


TEXTS = {
    "clip": ({}, True),
    "custom": ({"custom_text": True}, True),
    "bidirectional": ({"custom_text": True, "text_cfg": {**VIT["text_cfg"], "no_causal_mask": True}}, False),
    "last token": ({"custom_text": True, "text_cfg": {**VIT["text_cfg"], "pool_type": "last"}}, False),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_the_context_is_cut_only_where_that_changes_nothing(kind: str, tmp_path: Path) -> None:
    changes, cuts = TEXTS[kind]
    folder = save_random_model(tmp_path / kind.replace(" ", "-"), {**VIT, **changes})
    model = towers.load(str(folder), precision="fp32")
    texts = [*CAPTIONS, *(" ".join(["word"] * n) for n in range(0, 90, 3)), "!", "!!! !"]
    expected = reference(f"local-dir:{folder}", None, PICTURES[:1], texts)[1]
    for pad_to in (1, 16):
        np.testing.assert_allclose(model.embed_texts(texts, pad_to), expected, atol=2e-6)
    lengths: list[int] = []
    embed_tokens = model._embed_tokens
    model._embed_tokens = lambda tokens, pad_to: (lengths.append(tokens.shape[1]), embed_tokens(tokens, pad_to))[1]  # type: ignore[method-assign]
    model.embed_texts(["a cat", "word " * 20])
    assert lengths == ([8, 24] if cuts else [77])


POOLS = {
    "class token": ({}, True),
    "mean": ({"pool_type": "avg"}, False),
    "attention": ({"attentional_pool": True, "attn_pooler_heads": 2}, False),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", POOLS)
def test_the_last_block_computes_only_what_is_pooled(kind: str, precision: str, tmp_path: Path) -> None:
    changes, early = POOLS[kind]
    config = {**VIT, "vision_cfg": {**VIT["vision_cfg"], **changes}}
    folder = save_random_model(tmp_path / kind.replace(" ", "-"), config)
    model = towers.load(str(folder), precision=precision)
    shapes: list[Any] = []
    *_, mlp = (module for name, module in model._model.visual.transformer.named_modules() if name.endswith("mlp"))
    mlp.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape)))
    found = ours(model, PICTURES, CAPTIONS)[0]
    assert shapes == [(5, 64) if early else (5, 17, 64)]
    expected = reference(f"local-dir:{folder}", None, PICTURES, CAPTIONS)[0]
    assert cosines(found, expected).min() >= (1 - 1e-6 if precision == "fp32" else 0.999)


def test_bf16_vectors_are_close_to_fp32(vit: Path) -> None:
    model = towers.load(str(vit), device="cpu", precision="bf16")
    for found, expected in zip(
        ours(model, PICTURES, CAPTIONS), reference(f"local-dir:{vit}", None, PICTURES, CAPTIONS), strict=True
    ):
        assert cosines(found, expected).min() >= 0.999


ODD: dict[str, dict[str, Any]] = {  # of what open_clip's plain bf16 leaves some in fp32
    "layer scale": {"vision_cfg": {**VIT["vision_cfg"], "ls_init_value": 0.1}},
    "scaled heads": {"vision_cfg": {**VIT["vision_cfg"], "scale_heads": True}},
    "class token": {"custom_text": True, "text_cfg": {**VIT["text_cfg"], "embed_cls": True}},
    "bias": {
        "custom_text": True,
        "text_cfg": {**VIT["text_cfg"], "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_bf16_is_for_every_architecture(kind: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / kind.replace(" ", "-"), {**VIT, **ODD[kind]})
    model = towers.load(str(folder), precision="bf16")
    expected = reference(f"local-dir:{folder}", None, PICTURES, CAPTIONS)
    for a, b in zip(ours(model, PICTURES, CAPTIONS), expected, strict=True):
        assert cosines(a, b).min() >= 0.999


def test_a_model_that_does_not_compute_says_so(tmp_path: Path) -> None:
    config = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "scaled_cosine_attn": True}}  # broken in open_clip 3.3
    folder = save_random_model(tmp_path / "cosine", config)
    with pytest.raises(towers.TowerError, match=r"does not compute in fp32 on cpu: .*3D"):
        towers.load(str(folder), device="cpu", precision="fp32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999), ("fp16", 0.9999)])
def test_a_gpu_gives_the_vectors_of_the_cpu(vit: Path, precision: str, least: float) -> None:
    model = towers.load(str(vit), device="cuda", precision=precision)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    reference = towers.load(str(vit), device="cpu", precision="fp32").embed_images(pixels)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(model.embed_images(pixels, 64))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for vectors in found:
        assert cosines(vectors, reference).min() >= least


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vit_b_32_is_open_clips(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = open_clip.create_model("ViT-B-32").state_dict()
    weights = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, weights)
    model = towers.load("ViT-B-32", str(weights), precision=precision)
    found = ours(model, PICTURES, CAPTIONS)
    expected = reference("ViT-B-32", str(weights), PICTURES, CAPTIONS)
    for a, b in zip(found, expected, strict=True):
        assert cosines(a, b).min() >= (0.9999 if precision == "fp32" else 0.999)


def test_preprocessing_is_the_models_own(tmp_path: Path) -> None:
    config = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "image_size": [48, 64]}}
    folder = save_random_model(
        tmp_path / "odd",
        config,
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        interpolation="bilinear",
        resize_mode="squash",
    )
    model = towers.load(str(folder), precision="fp32")
    assert (model.spec.preprocess.height, model.spec.preprocess.width) == (48, 64)
    assert (model.spec.preprocess.resize_mode, model.spec.preprocess.interpolation) == ("squash", "bilinear")
    found = ours(model, PICTURES, CAPTIONS)
    expected = reference(f"local-dir:{folder}", None, PICTURES, CAPTIONS)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX2" and "AMD" not in str(torch.cpu.get_capabilities()["cpu_name"]),
    reason="to the bit: seen with AVX2, and with AVX512 on AMD; job tests allow a step",
)
@pytest.mark.parametrize("precision", sorted({"fp32", towers.load(towers.DEMO, device="cpu").spec.precision}))
def test_a_rows_vector_does_not_depend_on_its_neighbours(vit: Path, precision: str) -> None:
    towers.one_thread_each()  # as in a job
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 64, 64, 3), dtype=np.uint8)
    texts = [f"caption number {i} " * (1 + i % 5) for i in range(37)]
    for model in (towers.load(name, precision=precision) for name in (str(vit), towers.DEMO)):
        size = model.spec.preprocess.height
        some = (
            pixels[:, :size, :size] if size <= 64 else np.pad(pixels, [(0, 0), (0, size - 64), (0, size - 64), (0, 0)])
        )
        whole, captions = model.embed_images(some, 40), model.embed_texts(texts, 40)
        for rows in ([5], list(range(9)), list(range(36, -1, -1)), [3, 3, 30]):
            np.testing.assert_array_equal(model.embed_images(some[rows], 40), whole[rows])
            np.testing.assert_array_equal(model.embed_texts([texts[i] for i in rows], 40), captions[rows])


def test_threads_share_one_copy_and_agree(vit: Path) -> None:
    expected = towers.load(str(vit)).embed_texts(CAPTIONS)
    found: list[np.ndarray] = []

    def work() -> None:
        model = towers.load(str(vit))
        assert model is towers.load(str(vit))
        found.append(model.embed_texts(CAPTIONS))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for vectors in found:
        np.testing.assert_array_equal(vectors, expected)


def test_a_name_with_a_weights_file_and_a_config_json(vit: Path, tmp_path: Path) -> None:
    config = next(vit.glob("random-*.json"))
    by_json = towers.load(str(config), str(vit / "open_clip_model.safetensors"))
    by_folder = towers.load(str(vit))
    assert by_json.spec.weights_sha256 == by_folder.spec.weights_sha256
    np.testing.assert_array_equal(by_json.embed_texts(CAPTIONS), by_folder.embed_texts(CAPTIONS))
    checkpoint = tmp_path / "epoch.pt"  # as open_clip's training writes them
    state = open_clip.factory.load_state_dict(str(vit / "open_clip_model.safetensors"))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, checkpoint)
    by_checkpoint = towers.load(str(config), str(checkpoint))
    np.testing.assert_array_equal(by_checkpoint.embed_texts(CAPTIONS), by_folder.embed_texts(CAPTIONS))


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_a_checkpoint_that_would_run_code_is_refused(vit: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "proof")}, tmp_path / "evil.pt")
    with pytest.raises(towers.TowerError, match=r"evil\.pt"):
        towers.load(str(next(vit.glob("random-*.json"))), str(tmp_path / "evil.pt"))
    assert not (tmp_path / "proof").exists()


def test_the_same_towers_are_found_again_and_others_refused(vit: Path, tmp_path: Path) -> None:
    spec = towers.load(str(vit)).spec
    assert towers.for_spec(spec) is towers.load(str(vit)) is towers.load(str(vit), precision=spec.precision)
    config = next(vit.glob("random-*.json"))
    weights = tmp_path / "other.safetensors"
    state = open_clip.factory.load_state_dict(str(vit / "open_clip_model.safetensors"))
    save_file({k: v + 1 if k == "logit_scale" else v for k, v in state.items()}, weights)
    spec = towers.load(str(config), str(vit / "open_clip_model.safetensors")).spec
    with pytest.raises(towers.TowerError, match="weights_sha256"):
        towers.for_spec(spec, pretrained=str(weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B32"}, "did you mean .*ViT-B-32"),
        ({"model": "ViT-B-32"}, "ViT-B-32 needs weights; --pretrained is a file or one of"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b"}, "laion2b_s34b_b79k"),
        ({"model": towers.DEMO, "pretrained": "openai"}, "brings its own weights"),
        ({"model": towers.DEMO, "device": "tpu"}, "is not auto, cpu, cuda or cuda:N"),
        ({"model": towers.DEMO, "precision": "int8"}, "is not auto, fp32, bf16 or fp16"),
        ({"model": towers.DEMO, "precision": "fp16", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_wrong_names_say_what_is_possible(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(towers.TowerError, match=message):
        towers.load(**arguments)


def test_folders_that_are_no_models_are_refused(tmp_path: Path, vit: Path) -> None:
    with pytest.raises(towers.TowerError, match=r"no open_clip_config\.json"):
        towers.load(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_bytes((vit / "open_clip_config.json").read_bytes())
    with pytest.raises(towers.TowerError, match="holds no weights"):
        towers.load(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(towers.TowerError, match=r"cannot load .*open_clip_model\.safetensors"):
        towers.load(str(tmp_path))
