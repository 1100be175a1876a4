"""The two models of the benchmarks, and open_clip's own way to them: ViT-B-32 with random weights, and fusion-demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core import towers

VIT = "ViT-B-32"


@dataclass(frozen=True)
class Model:
    """A model as `fusion embed` is asked for it."""

    name: str
    pretrained: str = ""

    @property
    def options(self) -> list[str]:
        """Its command-line options."""
        return ["--model", self.name, *(["--pretrained", self.pretrained] if self.pretrained else [])]


def demo() -> Model:
    """The very small tower."""
    return Model(towers.DEMO)


def vit(cache: Path) -> Model:
    """ViT-B-32; its random weights, written once below `cache`, cost what trained ones cost."""
    weights = cache / f"{VIT}-random.safetensors"
    if not weights.is_file():
        import open_clip
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        tensors = open_clip.create_model(VIT).state_dict()
        cache.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights.with_suffix(".part"))
        weights.with_suffix(".part").rename(weights)
    return Model(VIT, str(weights))


def demo_folder() -> Path:
    """Where fusion-demo's configuration and weights lie."""
    return Path(towers.__file__).parent / "demo" / "model"


def reference(model: Model) -> tuple[Any, Any]:
    """(model, tokenizer) as a user of open_clip gets them: fp32, eager."""
    import open_clip

    name, extra = model.name, {}
    if name == towers.DEMO:
        name, extra = f"local-dir:{demo_folder()}", {"bpe_path": str(next(demo_folder().glob("*bpe*.txt.gz")))}
    network = open_clip.create_model(name, pretrained=model.pretrained or None)
    return network.eval(), open_clip.get_tokenizer(name, **extra)
