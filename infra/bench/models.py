"""The models of the benchmarks, and open_clip's own way to them.

vit: ViT-B-32. demo: fusion-demo, a small ResNet whose forward costs about what decoding a photo of 256 px does. tiny:
a ViT so small that decoding and everything around it decide. vit and tiny have random weights: they cost what trained
ones cost.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core import towers

NAMES = ("tiny", "demo", "vit")
VIT = "ViT-B-32"
TINY: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Model:
    """A model as `fusion embed` is asked for it."""

    name: str
    pretrained: str = ""

    @property
    def options(self) -> list[str]:
        """Its command-line options."""
        return ["--model", self.name, *(["--pretrained", self.pretrained] if self.pretrained else [])]


def named(name: str, cache: Path) -> Model:
    """The model by its name here; random weights are written once below `cache`."""
    if name == "demo":
        return Model(towers.DEMO)
    if name == "tiny":
        return Model(str(_random(cache / "tiny", TINY)))
    return Model(VIT, str(_random(cache / VIT) / "open_clip_model.safetensors"))


def _random(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A model folder with random weights; without a config that of one of open_clip's own models."""
    if not (folder / "ready").is_file():
        import open_clip
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        if config:
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
            (folder / f"{folder.name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder / f"{folder.name}.json")
        torch.manual_seed(0)
        tensors = open_clip.create_model(folder.name).state_dict()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "open_clip_model.safetensors"
        )
        (folder / "ready").touch()
    return folder


def folder_of(model: Model) -> Path | None:
    """Where the model's configuration and weights lie; None for one of open_clip's own."""
    if model.name == towers.DEMO:
        return Path(towers.__file__).parent / "demo" / "model"
    return None if model.pretrained else Path(model.name)


def reference(model: Model) -> tuple[Any, Any]:
    """(model, tokenizer) as a user of open_clip gets them: fp32, eager."""
    import open_clip

    folder = folder_of(model)
    name = f"local-dir:{folder}" if folder else model.name
    bpe = next(iter(folder.glob("*bpe*.txt.gz")), None) if folder else None
    network = open_clip.create_model(name, pretrained=model.pretrained or None)
    return network.eval(), open_clip.get_tokenizer(name, **({"bpe_path": str(bpe)} if bpe else {}))
