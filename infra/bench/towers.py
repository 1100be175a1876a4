"""Rates of our towers against open_clip's encode_image and encode_text in fp32, eager, alternately, and their cosines.

    python -m infra.bench.towers [--quick] [--threads 2]

As in the job, each thread computes by itself (one intra-op thread) on batches of its own, so that rows per CPU-second
can be told whatever else runs. Images are ready: uint8 for us, normalised floats for open_clip. Captions are strings on
both sides, so tokenizing counts; ours come 8 batches at once, as a unit brings them, because each length is padded to
whole batches. The cosine is the least, over a batch, between our vectors and open_clip's.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from fusion_core import images, towers
from infra.bench import measure, models, photos
from infra.bench.models import Model
from schemas.feature_table import InputSpec

PRECISIONS = ("fp32", "bf16")
COLUMNS = (
    "model", "tower", "threads", "open_clip fp32/s", "fusion fp32/s", "fusion bf16/s", "fp32 ÷", "bf16 ÷",
    "cosine fp32", "cosine bf16",
)  # fmt: skip


def rate(call: Callable[[], np.ndarray], threads: int, rounds: int) -> float:
    """Rows per CPU-second of `rounds` calls in each of the threads."""

    def timed(_: int) -> tuple[int, float]:
        start = time.thread_time()
        rows = len(call())
        return rows, time.thread_time() - start

    with ThreadPoolExecutor(threads) as pool:
        rows, took = zip(*pool.map(timed, range(threads * rounds)), strict=True)
    return sum(rows) / sum(took)


def reference_calls(model: Model, pixels: np.ndarray, captions: list[str]) -> dict[str, Callable[[], np.ndarray]]:
    """open_clip's own way, by tower."""
    import torch

    network, tokenizer = models.reference(model)
    config = network.visual.preprocess_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    floats = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std

    def encode_image() -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(network.encode_image(floats, normalize=True))

    def encode_text() -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(network.encode_text(tokenizer(captions), normalize=True))

    return {"image": encode_image, "text": encode_text}


def our_calls(tower: towers.Towers, pixels: np.ndarray, captions: list[str]) -> dict[str, Callable[[], np.ndarray]]:
    """Our way, by tower."""
    return {
        "image": partial(tower.embed_images, pixels, pad_to=len(pixels)),
        "text": partial(tower.embed_texts, captions, pad_to=len(pixels)),
    }


def rows(model_name: str, model: Model, batch: int, rounds: int, args: argparse.Namespace) -> list[list[Any]]:
    """Both towers of a model."""
    ours = {name: towers.load(model.name, model.pretrained, "cpu", name) for name in PRECISIONS}
    towers.one_thread_each()
    preprocess = ours["fp32"].spec.preprocess
    given = photos.photographs("small", batch)
    pixels = np.stack([images.decode(image, preprocess, InputSpec().max_pixels).pixels for image in given])
    captions = photos.captions(8 * batch)
    calls = {"open_clip": reference_calls(model, pixels, captions[:batch])}
    calls |= {name: our_calls(tower, pixels, captions) for name, tower in ours.items()}
    found = []
    for side in ("image", "text"):
        vectors = {name: call[side]()[:batch] for name, call in calls.items()}
        cosines = [float((vectors[name] * vectors["open_clip"]).sum(axis=1).min()) for name in PRECISIONS]
        cases = {name: partial(rate, call[side], args.threads, rounds) for name, call in calls.items()}
        rates = measure.alternately(cases, args.repeats)
        ratios = [rates[name] / rates["open_clip"] for name in PRECISIONS]
        found.append([model_name, side, args.threads, *rates.values(), *ratios, *(round(c, 7) for c in cosines)])
    return found


def main() -> None:
    """Every model, two towers."""
    parser = measure.arguments("towers", __doc__)
    parser.add_argument("--threads", type=int, default=measure.CORES)
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=models.NAMES)
    args = parser.parse_args()
    load, found = measure.Load(), []
    for name in args.model:
        batch, rounds = (16, 1) if name == "vit" else (64, 1 if args.quick else 3)
        found += rows(name, models.named(name, args.cache), batch, rounds, args)
    measure.tell("towers", args, load, COLUMNS, found)


if __name__ == "__main__":
    main()
