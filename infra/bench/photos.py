"""Synthetic photographs and captions: JPEGs of realistic size and entropy, in WebDataset tars; the seed decides them.

    python -m infra.bench.photos --output DIR [--kind small] [--pairs 1000] [--shards 8]

A photograph is 1/f noise (as the spectrum of natural pictures falls) in brightness and colour, with hard-edged shapes
of other brightness over it. A few base pictures are made; every photograph is a crop of one, mirrored or not, of its
own brightness, so that no two encoded images are alike.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_CONTRAST, _COLOUR, _EDGES = 42.0, 11.0, 12  # grey levels, grey levels, shapes in a base picture
_WORDS = """
a the an of on in with at by near under over beside behind man woman child dog cat horse bird boat car train bicycle
street house window door table chair tree river mountain beach sky cloud snow rain sun night morning evening red blue
green yellow white black brown grey small large old young wooden stone metal glass two three several many standing
sitting walking running holding wearing looking playing riding eating photograph of view vintage poster hat coat shirt
umbrella bridge tower church garden flower grass field road market kitchen plate food fruit bread coffee cup bottle
book phone camera sign wall painting statue museum city village harbour
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Kind:
    """What sort of photograph: its size, and the spectrum and quality that give it a realistic number of bytes."""

    width: int
    height: int
    quality: int
    falloff: float  # the amplitude of a frequency f is f ** -falloff
    bases: int


KINDS = {
    "small": Kind(256, 256, 88, 1.22, 24),  # 25-30 kB: what img2dataset makes
    "medium": Kind(500, 375, 91, 1.0, 24),  # about 110 kB
    "large": Kind(4000, 3000, 87, 1.5, 2),  # 12 megapixels, 1 MB and more
}


def photographs(kind: str, n: int, seed: int = 0) -> Iterator[bytes]:
    """`n` JPEGs (4:2:0) of a kind, no two the same."""
    what, rng = KINDS[kind], np.random.default_rng([seed, len(kind)])
    bases = [_base(what, rng) for _ in range(min(what.bases, n))]
    for i in range(n):
        yield _encode(_variant(bases[i % len(bases)], what, rng), what.quality)


def captions(n: int, seed: int = 0) -> list[str]:
    """`n` captions of 5 to 40 words, half of them of 11 or fewer, as alt texts are."""
    rng = np.random.default_rng([seed, 1])
    lengths = np.clip(rng.lognormal(np.log(11), 0.5, n).round(), 5, 40).astype(int)
    return [" ".join(rng.choice(_WORDS, length)) + f" number {i}" for i, length in enumerate(lengths - 2)]


def write_shards(folder: Path, kind: str, pairs: int, shards: int, seed: int = 0) -> list[Path]:
    """`pairs` photographs with caption and sidecar in `shards` tars; those that stand already are taken as they are."""
    paths = [folder / f"{kind}-{pairs}-{shards}-{seed}" / f"{i:05d}.tar" for i in range(shards)]
    bounds = [pairs * i // shards for i in range(shards + 1)]
    if not all(path.is_file() for path in paths):
        stream = zip(photographs(kind, pairs, seed), captions(pairs, seed), strict=True)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(paths):
            _write_tar(path, [next(stream) for _ in range(bounds[i], bounds[i + 1])], bounds[i], KINDS[kind])
    return paths


def _write_tar(path: Path, pairs: list[tuple[bytes, str]], first: int, kind: Kind) -> None:
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w") as tar:
        for i, (image, caption) in enumerate(pairs, first):
            sidecar = {"url": f"https://pictures.example/{i}.jpg", "width": kind.width, "height": kind.height}
            members = {"jpg": image, "txt": caption.encode(), "json": json.dumps(sidecar).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    unfinished.rename(path)


def _base(kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """A picture a quarter larger than the kind, uint8 [H, W, 3]."""
    height, width = kind.height * 5 // 4, kind.width * 5 // 4
    shapes = np.asarray(_shapes(height, width, rng), np.float32) - 128
    grey = 128 + _CONTRAST * _noise(height, width, kind.falloff, rng) + 0.5 * shapes.mean(axis=2)
    red, blue = (_COLOUR * _noise(height, width, kind.falloff + 0.3, rng) for _ in range(2))
    planes = [grey + red + 0.2 * shapes[..., 0], grey + 0.2 * shapes[..., 1], grey + blue + 0.2 * shapes[..., 2]]
    return np.stack([np.clip(plane, 0, 255).astype(np.uint8) for plane in planes], axis=-1)


def _noise(height: int, width: int, falloff: float, rng: np.random.Generator) -> np.ndarray:
    """1/f noise of variance 1, float32 [height, width]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal(frequency.shape, np.float32) + 1j * rng.standard_normal(frequency.shape, np.float32)
    plane = np.fft.irfft2(spectrum * frequency**-falloff, s=(height, width))
    return (plane / plane.std()).astype(np.float32)


def _shapes(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Hard-edged ellipses and triangles on mid-grey."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for i in range(_EDGES):
        colour = tuple(int(value) for value in rng.integers(48, 208, 3))
        x, y = rng.integers(0, width, 3), rng.integers(0, height, 3)
        if i % 2:
            draw.polygon([(int(a), int(b)) for a, b in zip(x, y, strict=True)], fill=colour)
        else:
            draw.ellipse([int(min(x)), int(min(y)), int(max(x)), int(max(y))], fill=colour)
    return image


def _variant(base: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    top, left = (int(rng.integers(0, base.shape[axis] - size)) for axis, size in ((0, kind.height), (1, kind.width)))
    crop = base[top : top + kind.height, left : left + kind.width]
    if rng.integers(2):
        crop = crop[:, ::-1]
    levels = np.clip(np.arange(256) * rng.uniform(0.9, 1.1) + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    return levels[crop]


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def main() -> None:
    """Writes shards and says what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, default="small")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = write_shards(args.output, args.kind, args.pairs, args.shards, args.seed)
    size_bytes = sum(path.stat().st_size for path in paths)
    print(f"{paths[0].parent}: {args.pairs} pairs, {size_bytes / args.pairs / 1000:.1f} kB each, in {len(paths)} tars")


if __name__ == "__main__":
    main()
