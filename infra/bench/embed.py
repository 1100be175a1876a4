"""The real embedding job against the bare limits of its decoder and its towers, alternately in one process.

    python -m infra.bench.embed [--quick] [--model demo vit] [--precision fp32 bf16]

The job is `fusion embed` whole, run in this process through pipelines.cli after one unmeasured run, so that imports and
the loading of the model are excluded and everything else (planning, Beam, Parquet, manifest, compaction, report) is in.
Bare, with the same decode function, the same towers, batch and number of threads, no Beam, Arrow or table:

    decode    the images' bytes, in memory, to pixels
    forward   ready pixels and ready captions through both towers
    loop      decode, then forward, batch after batch in each thread: the most that cores doing both can give

`÷ lower` is the job's rate by the lower of decode and forward: the target where a device does the forward. On a CPU the
same cores do both, so `÷ loop` tells what the job itself costs. `fixed s` is the job over one sample a thread.
"""

import argparse
import contextlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core import images, readers, shards, towers
from infra.bench import measure, models, photos
from infra.bench.models import Model
from pipelines import cli
from schemas.feature_table import InputSpec

BATCH = 64
COLUMNS = (
    "model", "precision", "samples", "job/s", "decode/s", "forward/s", "loop/s", "÷ lower", "÷ loop", "fixed s",
)  # fmt: skip


@dataclass
class Samples:
    """What the bare loops work on, in memory."""

    images: list[bytes]
    captions: list[str]  # by length: the towers' best case
    pixels: np.ndarray


def load(paths: Sequence[Path], tower: towers.Towers, n_captions: int) -> Samples:
    """The shards' content, of its captions (by length) every so many, decoded only as far as one batch."""
    units = shards.plan([str(path) for path in paths], InputSpec())
    found: list[Any] = [sample for unit in units for sample in readers.read(unit, InputSpec())]
    first = np.stack([decode_one(tower, sample.image) for sample in found[:BATCH]])
    captions = sorted((sample.caption for sample in found), key=len)
    return Samples([sample.image for sample in found], captions[:: len(found) // n_captions], first)


def decode_one(tower: towers.Towers, image: bytes) -> np.ndarray:
    """The job's decode function."""
    return images.decode(image, tower.spec.preprocess, InputSpec().max_pixels).pixels


def decode(tower: towers.Towers, batch: slice, samples: Samples) -> None:
    """Bytes to pixels."""
    for image in samples.images[batch]:
        decode_one(tower, image)


def forward(tower: towers.Towers, batch: slice, samples: Samples) -> None:
    """Both towers."""
    captions = samples.captions[batch]
    tower.embed_images(samples.pixels[: len(captions)], pad_to=BATCH)
    tower.embed_texts(captions, pad_to=BATCH)


def loop(tower: towers.Towers, batch: slice, samples: Samples) -> None:
    """Decode and forward."""
    pixels = np.stack([decode_one(tower, image) for image in samples.images[batch]])
    tower.embed_images(pixels, pad_to=BATCH)
    tower.embed_texts(samples.captions[batch], pad_to=BATCH)


def bare(work: Callable[[towers.Towers, slice, Samples], None], tower: towers.Towers, samples: Samples, n: int) -> float:
    """Samples per second of `work` over the first `n` samples, batches dealt to as many threads as the job has."""
    batches = [slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
    with ThreadPoolExecutor(measure.CORES) as pool:
        return n / measure.seconds(lambda: list(pool.map(partial(work, tower, samples=samples), batches)))


def job(paths: Sequence[Path], model: Model, precision: str, samples: int, batch: int = BATCH) -> float:
    """Samples per second of `fusion embed` into a new table."""
    place = tempfile.mkdtemp(prefix="fusion-bench-")
    argv = ["embed", "--input", *map(str, paths), "--output", f"{place}/table", *model.options]
    argv += ["--precision", precision, "--batch", str(batch), "--device", "cpu", "--quiet"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            took = measure.seconds(lambda: _must(cli.main(argv)))
    finally:
        shutil.rmtree(place)
    return samples / took


def _must(code: int) -> None:
    if code:
        raise RuntimeError(f"fusion embed ended with {code}")


def row(model: Model, precision: str, pairs: int, args: argparse.Namespace) -> list[Any]:
    """One line of the table."""
    tower = towers.load(model.name, model.pretrained, "cpu", precision)
    towers.one_thread_each()
    paths = photos.write_shards(args.cache, "small", pairs, 2 * measure.CORES)
    tiny = photos.write_shards(args.cache, "small", measure.CORES, measure.CORES)
    few = pairs // 2 if model.pretrained else pairs  # of a rate that is as good over half of them
    samples = load(paths, tower, few)
    job(tiny, model, precision, measure.CORES, 1)
    found = measure.alternately(
        {
            "job": partial(job, paths, model, precision, pairs),
            "decode": partial(bare, decode, tower, samples, pairs),
            "forward": partial(bare, forward, tower, samples, few),
            "loop": partial(bare, loop, tower, samples, few),
            "fixed": lambda: 1 / job(tiny, model, precision, 1, 1),
        },
        args.repeats,
        warm=False,
    )
    rates = [found[name] for name in ("job", "decode", "forward", "loop")]
    ratios = [found["job"] / min(found["decode"], found["forward"]), found["job"] / found["loop"]]
    return [model.name, precision, pairs, *rates, *ratios, found["fixed"]]


def main() -> None:
    """One row for each model and precision."""
    parser = measure.arguments("embed", __doc__)
    parser.add_argument("--model", nargs="+", choices=("demo", "vit"), default=["demo", "vit"])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--pairs", type=int, help="samples (default: 8000 with demo, 256 with vit)")
    args = parser.parse_args()
    known = {"demo": (models.demo, 8000), "vit": (lambda: models.vit(args.cache), 256)}
    load, rows = measure.Load(), []
    for name, precision in itertools.product(args.model, args.precision):
        make, pairs = known[name]
        rows.append(row(make(), precision, args.pairs or (pairs // (8 if name == "demo" else 1) if args.quick else pairs), args))
    measure.tell("embed", args, load, COLUMNS, rows)


if __name__ == "__main__":
    main()
