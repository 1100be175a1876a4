"""What a model reads in scenes of held-out pairs: zero-shot accuracy by attribute, and retrieval among 1,000 scenes."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from fusion_core.demo.scenes import (
    COLOURS,
    NUMBERS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    TONES,
    Scene,
    caption,
    render,
    sample_scene,
)

MODEL_DIRECTORY = Path(__file__).with_name("model")
BPE_NAME = "bpe_3072.txt.gz"
GATED = ("shape", "colour", "size", "count", "position")
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {shape: (f"a {shape}", f"one {shape}") for shape in SHAPES},
    "colour": {c: (f"{'an' if c == 'orange' else 'a'} {c} object", f"one {c} shape") for c in COLOURS},
    "size": {size: (f"a {size} object", f"one {size} shape") for size in SIZES},
    "count": {
        str(n): tuple(f"{word} {noun}{'s' if n > 1 else ''}" for noun in ("object", "shape"))
        for n, word in NUMBERS.items()
    },
    "position": {
        place: tuple(f"{noun} {'in the' if place == 'centre' else at} {place}" for noun in ("an object", "a shape"))
        for place, at in zip(POSITIONS, ("in the", "on the", "on the", "at the", "at the"), strict=True)
    },
    "tone": {tone: (f"an object on a {tone} background", f"objects on a {tone} background") for tone in TONES},
    "pattern": {p: (f"an object on a {p} background", f"objects on a {p} background") for p in PATTERNS},
}


class Model:
    """The two towers of a model directory as functions from pictures and captions to unit vectors, float32."""

    def __init__(self, directory: Path) -> None:
        self.clip = open_clip.create_model(f"local-dir:{directory.resolve()}").eval()
        self.tokenizer = SimpleTokenizer(
            bpe_path=str((directory / BPE_NAME).resolve()), context_length=self.clip.context_length
        )

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image], batch_rows: int = 128) -> torch.Tensor:
        """Embeddings, float32[pictures, dim]."""
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        parts = [
            self.clip.encode_image(to_input(torch.from_numpy(part)), normalize=True)
            for part in np.array_split(pixels, -(-len(pixels) // batch_rows))
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch_rows: int = 256) -> torch.Tensor:
        """Embeddings, float32[texts, dim]."""
        parts = [texts[start : start + batch_rows] for start in range(0, len(texts), batch_rows)]
        return torch.cat([self.clip.encode_text(self.tokenizer(list(part)), normalize=True) for part in parts])


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8[rows, height, width, 3] as the float32[rows, 3, height, width] in -1…1 that the image tower takes."""
    return pixels.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def evaluate(
    directory: Path = MODEL_DIRECTORY, *, scenes: int = 400, gallery: int = 1000, seed: int = 1, held_out: bool = True
) -> dict[str, float]:
    """Accuracies and recalls in 0…1 by name; `scenes` per zero-shot attribute, `gallery` scenes to retrieve from."""
    model = Model(directory)
    rng = np.random.default_rng((seed, 7))
    numbers = zero_shot(model, rng, scenes, held_out)
    numbers["order"] = order_accuracy(model, rng, scenes, held_out)
    return numbers | retrieval(model, rng, gallery, held_out)


def zero_shot(model: Model, rng: np.random.Generator, scenes: int, held_out: bool) -> dict[str, float]:
    """Zero-shot accuracy by attribute: one-object scenes, for counts as many scenes of each count."""
    singles = [sample_scene(rng, held_out=held_out, kind="single") for _ in range(scenes)]
    groups = [sample_scene(rng, held_out=held_out, kind="group") for _ in range(scenes * 3 // 4)]
    single_images, group_images = (model.images([render(s, rng) for s in some]) for some in (singles, groups))
    numbers = {}
    for field, prompts in PROMPTS.items():
        classes = torch.stack([_class_embedding(model, phrases) for phrases in prompts.values()])
        truth, images = singles, single_images
        if field == "count":
            truth, images = groups + singles[: scenes // 4], torch.cat([group_images, single_images[: scenes // 4]])
        guesses = (images @ classes.T).argmax(dim=1).tolist()
        names = list(prompts)
        numbers[field] = float(
            np.mean([names[guess] == str(getattr(s, field)) for guess, s in zip(guesses, truth, strict=True)])
        )
    return numbers


def _class_embedding(model: Model, phrases: Sequence[str]) -> torch.Tensor:
    texts = [template.format(phrase) for template in TEMPLATES for phrase in phrases]
    return torch.nn.functional.normalize(model.texts(texts).mean(dim=0), dim=0)


def order_accuracy(model: Model, rng: np.random.Generator, scenes: int, held_out: bool) -> float:
    """How often the caption of two objects beats the caption in which they have changed places (chance: 0.5)."""
    truth = [sample_scene(rng, held_out=held_out, kind="relation") for _ in range(scenes)]
    wrong = [
        replace(s, shape=s.other_shape, colour=s.other_colour, other_shape=s.shape, other_colour=s.colour)
        for s in truth
    ]
    images = model.images([render(scene, rng) for scene in truth])
    right, swapped = (model.texts([caption(scene, rng).text for scene in some]) for some in (truth, wrong))
    return float(((images * right).sum(dim=1) > (images * swapped).sum(dim=1)).float().mean())


def retrieval(model: Model, rng: np.random.Generator, gallery: int, held_out: bool) -> dict[str, float]:
    """R@1 and R@5 in both directions among scenes of which no two are alike; a tie counts as a loss."""
    scenes = _distinct_scenes(rng, gallery, held_out)
    images = model.images([render(scene, rng) for scene in scenes])
    texts = model.texts([caption(scene, rng).text for scene in scenes])
    numbers = {}
    for name, scores in (("text_to_image", texts @ images.T), ("image_to_text", images @ texts.T)):
        own = scores.diagonal()[:, None]
        ranks = (scores >= own).sum(dim=1)  # the own one is among them, and so are ties
        for k in (1, 5):
            numbers[f"{name}_r{k}"] = float((ranks <= k).float().mean())
    return numbers


def _distinct_scenes(rng: np.random.Generator, count: int, held_out: bool) -> list[Scene]:
    found: dict[Scene, None] = {}
    while len(found) < count:
        found[sample_scene(rng, held_out=held_out)] = None
    return list(found)


def table(numbers: dict[str, float]) -> str:
    """The numbers in per cent, as a Markdown table."""
    rows = [f"| {name.replace('_', ' ')} | {value:.1%} |" for name, value in numbers.items()]
    return "\n".join(["| measure | held-out pairs |", "|---|---|", *rows])


def main() -> None:
    """Print the table of a model directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=MODEL_DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    numbers = evaluate(arguments.directory, seed=arguments.seed)
    show: Callable[[dict[str, float]], str] = json.dumps if arguments.json else table
    print(show(numbers))


if __name__ == "__main__":
    main()
