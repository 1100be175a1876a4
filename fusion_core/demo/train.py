"""Train the small CLIP of the demo from nothing on scenes drawn while it trains.

Contrastive training alone reads colours and backgrounds and hardly any shapes: the other attributes already tell the
scenes of a batch apart. So linear heads, shared by both towers and thrown away at the end, ask every embedding for
every attribute, and in the second part of training half the batches consist of scenes that differ in one value only.
For a picture of a colour, the shapes held out with it are no classes of the heads, and captions that name such a shape
without a colour are no negatives: a model that still sees shapes badly learns from those that the pair does not exist
(with them, after 585 steps: 57 % zero-shot shape accuracy on trained pairs, 1 % on held-out ones, chance 17 %).
"""

import argparse
import gzip
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from fusion_core.demo.evaluate import BPE_NAME, evaluate, table, to_input
from fusion_core.demo.scenes import (
    COLOURS,
    COUNTS,
    HELD_OUT,
    IMAGE_PIXELS,
    PATTERNS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TONES,
    Scene,
    caption,
    render,
    sample_scene,
    some_fields,
    variant,
)

MERGES = 3072
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": IMAGE_PIXELS, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 256 + 256 + MERGES + 2, "width": 96, "heads": 3, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
LABELS: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "count": COUNTS,
    "position": ("", *POSITIONS),
    "tone": TONES,
    "pattern": PATTERNS,
    "relation": ("", *RELATIONS),
    "other_shape": ("", *SHAPES),
    "other_colour": ("", *COLOURS),
}
UNKNOWN = -100
FIELD_WEIGHTS = {"shape": 3.0, "other_shape": 3.0, "other_colour": 2.0}
BATCH_ROWS = 64
GROUP_ROWS = 4
PARTIAL_SHARE = 0.4
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.06
HEAD_SCALE = 8.0
HEAD_WEIGHT = 3.0
MINIMAL_FROM = 0.4


class Batch(NamedTuple):
    """Rows of training: uint8 pixels, tokens, labels of the image, and the labels that the caption names."""

    pixels: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    named: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> "Batch":
        """The batch of the chosen rows."""
        return Batch(*(column[chosen] for column in self))


# ---------------------------------------------------------------------------------------------------------------- data


class SceneStream(torch.utils.data.IterableDataset[Batch]):
    """Endless blocks of 64 groups of 4 scenes, in which the scenes of a group differ in one or two values."""

    def __init__(self, bpe_path: Path, seed: int) -> None:
        self.bpe_path = bpe_path
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        tokenizer = make_tokenizer(self.bpe_path)
        rng = np.random.default_rng(self.seed)
        while True:
            yield make_block(rng, tokenizer)


def make_block(rng: np.random.Generator, tokenizer: SimpleTokenizer) -> Batch:
    """64 × 4 rows: row 4 i + j is scene j of group i."""
    scenes: list[Scene] = []
    for _ in range(BATCH_ROWS):
        first = sample_scene(rng)
        scenes += [first, *(variant(first, rng) for _ in range(GROUP_ROWS - 1))]
    examples = [_example(scene, rng) for scene in scenes]
    pixels = torch.from_numpy(np.stack([pixels for pixels, *_ in examples]))
    labels, named = (torch.tensor([example[i] for example in examples]) for i in (2, 3))
    return Batch(pixels, tokenizer([text for _, text, *_ in examples]), labels, named)


def _example(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, list[int], list[int]]:
    """Pixels, caption, labels of the image and labels that the caption names."""
    fields = some_fields(scene, rng) if rng.random() < PARTIAL_SHARE else scene.fields
    written = caption(scene, rng, fields)
    return _as_decoded(render(scene, rng)), written.text, scene_labels(scene), named_labels(scene, written.fields)


def _as_decoded(picture: Image.Image) -> np.ndarray:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return np.asarray(Image.open(buffer))


def scene_labels(scene: Scene) -> list[int]:
    """The class of each field of `LABELS`; two different objects count as two."""
    values = {name: getattr(scene, name) for name in LABELS}
    values["count"] = scene.count + bool(scene.relation)
    return [choices.index(values[name]) for name, choices in LABELS.items()]


def named_labels(scene: Scene, fields: frozenset[str]) -> list[int]:
    """The labels that a caption of these fields gives away, `UNKNOWN` for the others."""
    known = set(fields)
    if scene.relation:
        known |= {f"other_{name}" for name in ("shape", "colour") if name in fields}
    return [label if name in known else UNKNOWN for name, label in zip(LABELS, scene_labels(scene), strict=True)]


def batches(stream: Iterator[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Pairs of the same block cut in two ways: rows of different groups, and whole groups."""
    for block in stream:
        rows = torch.arange(BATCH_ROWS * GROUP_ROWS)
        across, within = rows.view(BATCH_ROWS, GROUP_ROWS).T, rows.view(GROUP_ROWS, BATCH_ROWS)
        for mixed, grouped in zip(across, within, strict=True):
            yield block.rows(mixed), block.rows(grouped)


# ---------------------------------------------------------------------------------------------------------------- loss


def fits(named: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool[captions, images]: whether all that a caption names is true of an image (order of objects disregarded)."""
    column = {name: i for i, name in enumerate(LABELS)}

    def agrees(said: str, seen: str, offset: int = 0) -> torch.Tensor:
        claim, truth = named[:, None, column[said]], labels[None, :, column[seen]]
        return (claim == UNKNOWN) | (claim + offset == truth)

    result = torch.ones(len(named), len(labels), dtype=torch.bool)
    for name in ("size", "count", "position", "tone", "pattern", "relation"):
        result &= agrees(name, name)
    straight, crossed = result.clone(), result.clone()
    for name in ("shape", "colour"):
        straight &= agrees(name, name) & agrees(f"other_{name}", f"other_{name}")
        crossed &= agrees(name, f"other_{name}", 1) & agrees(f"other_{name}", name, -1)
    unordered = named[:, None, column["relation"]] == UNKNOWN
    return straight | (crossed & unordered)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, no_negatives: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE; `no_negatives` (bool[captions, images]) are left out, such as captions true of two images."""
    hidden = no_negatives & ~torch.eye(len(images), dtype=torch.bool)
    logits = (scale * texts @ images.T).masked_fill(hidden, -math.inf)
    target = torch.arange(len(images))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def never_trained() -> torch.Tensor:
    """bool[colours, shapes]: the held-out pairs."""
    pairs = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
    for shape, colour in HELD_OUT:
        pairs[COLOURS.index(colour), SHAPES.index(shape)] = True
    return pairs


def held_out_claims(named: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool[captions, images]: whether a caption names a shape that training never shows in a colour of the image."""
    column = {name: i for i, name in enumerate(LABELS)}
    shape = named[:, column["shape"]]
    colours = (labels[:, column["colour"]], labels[:, column["other_colour"]] - 1)
    shown = [never_trained()[colour.clamp(min=0)] & (colour >= 0)[:, None] for colour in colours]  # [images, shapes]
    never = (shown[0] | shown[1])[:, shape.clamp(min=0)].T
    unsaid = (shape != UNKNOWN) & (named[:, column["colour"]] == UNKNOWN)
    return never & unsaid[:, None]


class Heads(nn.Module):
    """Linear readers of every field, the same for image and text embeddings."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.readers = nn.ModuleDict({name: nn.Linear(dim, len(choices)) for name, choices in LABELS.items()})
        self.never = never_trained()

    def loss(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weighted cross-entropy over the fields, the mean over the rows in which a field is known."""
        known = dict(zip(LABELS, labels.T, strict=True))
        total = torch.zeros(())
        for name, reader in self.readers.items():
            logits = reader(embeddings * HEAD_SCALE)
            if name.endswith("shape"):
                logits = self._without_held_out(logits, known[name.replace("shape", "colour")], name == "other_shape")
            losses = functional.cross_entropy(logits, known[name], ignore_index=UNKNOWN, reduction="sum")
            total = total + FIELD_WEIGHTS.get(name, 1.0) * losses / (known[name] != UNKNOWN).sum().clamp(min=1)
        return total / len(LABELS)

    def _without_held_out(self, logits: torch.Tensor, colour: torch.Tensor, other: bool) -> torch.Tensor:
        first = int(other)  # class 0 of the other object is its absence
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        hidden[:, first:] = self.never[(colour - first).clamp(min=0)] & (colour >= first)[:, None]
        return logits.masked_fill(hidden, -math.inf)


# ------------------------------------------------------------------------------------------------------------ training


def train(output: Path, minutes: float, steps: int | None, seed: int) -> int:
    """The number of steps made; leaves the model directory in `output`. With `steps` the minutes are no limit."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    write_bpe(output / BPE_NAME)
    model = open_clip.model.CLIP(
        CONFIG["model_cfg"]["embed_dim"], CONFIG["model_cfg"]["vision_cfg"], CONFIG["model_cfg"]["text_cfg"]
    ).to(memory_format=torch.channels_last)
    heads = Heads(CONFIG["model_cfg"]["embed_dim"])
    optimizer = make_optimizer(model, heads)
    loader = torch.utils.data.DataLoader(SceneStream(output / BPE_NAME, seed), batch_size=None, num_workers=1)
    done = 0
    started = time.monotonic()
    for step, (mixed, grouped) in enumerate(batches(iter(loader))):
        elapsed_seconds = time.monotonic() - started
        progress = step / steps if steps else elapsed_seconds / (minutes * 60)
        if progress >= 1:
            break
        batch = grouped if progress > MINIMAL_FROM and step % 2 else mixed
        set_learning_rate(optimizer, progress)
        losses = train_step(model, heads, optimizer, batch)
        done = step + 1
        if step % 100 == 0:
            print(
                f"step {step} {elapsed_seconds:.0f} s " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()),
                flush=True,
            )
    save_model(model, output)
    return done


def make_optimizer(model: nn.Module, heads: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def set_learning_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Linear warm-up, then a cosine to zero."""
    share = progress / WARM_UP if progress < WARM_UP else (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * max(share, 0.01)


def train_step(model: Any, heads: Heads, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """The losses of one step, by name."""
    pixels = to_input(batch.pixels).contiguous(memory_format=torch.channels_last)
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(batch.tokens, normalize=True)
    hidden = fits(batch.named, batch.labels) | held_out_claims(batch.named, batch.labels)
    contrast = contrastive_loss(images, texts, model.logit_scale.exp(), hidden)
    seen, said = heads.loss(images, batch.labels), heads.loss(texts, batch.named)
    optimizer.zero_grad(set_to_none=True)
    (contrast + HEAD_WEIGHT * (seen + said)).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))
    return {"contrastive": contrast.item(), "image_heads": seen.item(), "text_heads": said.item()}


# --------------------------------------------------------------------------------------------------------------- files


def write_bpe(path: Path) -> None:
    """Write the first merges of CLIP's vocabulary: any text still encodes, into a few more tokens."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    path.write_bytes(gzip.compress("\n".join(lines[: MERGES + 1]).encode(), mtime=0))


def make_tokenizer(bpe_path: Path) -> SimpleTokenizer:
    """The tokenizer of the small vocabulary."""
    return SimpleTokenizer(
        bpe_path=str(bpe_path.resolve()), context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )


def save_model(model: nn.Module, output: Path) -> None:
    """Write weights as float16 and the configuration, in the layout of open_clip's `local-dir:`."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, output / "open_clip_model.safetensors")
    (output / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main() -> None:
    """Train the demo's model and print what it reads in scenes of held-out pairs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory of the model")
    parser.add_argument("--minutes", type=float, default=15, help="how long to train")
    parser.add_argument("--steps", type=int, help="train this many steps instead, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, cpu_started = time.monotonic(), time.process_time()
    steps = train(arguments.output, arguments.minutes, arguments.steps, arguments.seed)
    wall, cpu = (time.monotonic() - started) / 60, (time.process_time() - cpu_started) / 60
    print(f"{steps} steps in {wall:.1f} minutes, {cpu:.1f} CPU minutes of the training process")
    print(table(evaluate(arguments.output)))


if __name__ == "__main__":
    main()
