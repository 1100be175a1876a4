"""Images per second of our decode against open_clip's own transform, alternately, and how far their pixels differ.

    python -m infra.bench.decode [--quick]

Both from bytes in memory to what ViT-B-32 is given (224 px). open_clip's side is its whole `image_transform`, with
ToTensor and Normalize, which ours leaves to the tower's batch. Differences are of grey levels before these two.
"""

import argparse
import io
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

from fusion_core import images
from infra.bench import measure, photos
from schemas.feature_table import InputSpec, Preprocess

PREPROCESS = Preprocess(
    224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", "shortest"
)
SIZES = {"small": (64, 600), "medium": (48, 240), "large": (6, 12)}  # different images, images in one measurement
COLUMNS = ("photographs", "kB", "workers", "open_clip/s", "fusion/s", "fusion ÷ open_clip", "max diff", "mean diff")


def ours(image: bytes) -> np.ndarray:
    """uint8 [224, 224, 3]."""
    return images.decode(image, PREPROCESS, InputSpec().max_pixels).pixels


@cache
def _transform() -> Any:
    import open_clip
    import torch

    torch.set_num_threads(1)
    return open_clip.image_transform(224, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)


def theirs(image: bytes) -> Any:
    """float32 [3, 224, 224], normalised."""
    return _transform()(Image.open(io.BytesIO(image)))


def their_pixels(image: bytes) -> np.ndarray:
    """uint8 [224, 224, 3]: their transform without its last two steps."""
    picture: Any = Image.open(io.BytesIO(image))
    for step in _transform().transforms[:-2]:
        picture = step(picture)
    return np.asarray(picture)


@cache
def _photographs(kind: str, n: int) -> list[bytes]:
    return list(photos.photographs(kind, n))


def work(decode: Callable[[bytes], Any], kind: str, different: int, first: int, n: int) -> None:
    """Decodes `n` photographs, of which `different` are different."""
    for image in itertools.islice(itertools.cycle(_photographs(kind, different)), first, first + n):
        decode(image)


def rate(pool: Executor, workers: int, decode: Callable[[bytes], Any], kind: str, different: int, n: int) -> float:
    """Images per second with the work dealt to a pool's workers."""
    calls = [(decode, kind, different, i, n // workers) for i in range(workers)]
    return n / measure.seconds(lambda: list(pool.map(work, *zip(*calls, strict=True))))


def rows(kind: str, pools: dict[str, tuple[Executor, int]], args: argparse.Namespace) -> list[list[Any]]:
    """The kind's lines of the table."""
    different, n = SIZES[kind]
    n = n // 6 if args.quick else n
    given = _photographs(kind, different)
    apart = np.stack([np.abs(ours(image).astype(int) - their_pixels(image)) for image in given])
    about = [kind, round(sum(map(len, given)) / different / 1000)]
    found: Sequence[list[Any]] = []
    for name, (pool, workers) in pools.items():
        cases = {"open_clip": theirs, "fusion": ours}
        rates = measure.alternately(
            {who: partial(rate, pool, workers, decode, kind, different, n) for who, decode in cases.items()},
            args.repeats,
        )
        line = [*rates.values(), rates["fusion"] / rates["open_clip"], int(apart.max()), float(apart.mean())]
        found = [*found, [*about, name, *line]]
    return list(found)


def main() -> None:
    """Three kinds of photographs by three ways to spread the work."""
    parser = measure.arguments("decode", __doc__, repeats=5)
    parser.add_argument("--kind", nargs="+", choices=photos.KINDS, default=list(photos.KINDS))
    args = parser.parse_args()
    load = measure.Load()
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two, ProcessPoolExecutor(2, spawn) as processes:
        pools: dict[str, tuple[Executor, int]] = {
            "1 thread": (one, 1),
            "2 threads": (two, 2),
            "2 processes": (processes, 2),
        }
        found = [line for kind in args.kind for line in rows(kind, pools, args)]
    measure.tell("decode", args, load, COLUMNS, found)


if __name__ == "__main__":
    main()
