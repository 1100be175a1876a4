"""Write WebDataset shards of captioned scenes, with broken and unusual samples among them."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from fusion_core.demo.scenes import HELD_OUT, Scene, caption, render, sample_scene

Members = dict[str, bytes]

BROKEN = (
    "truncated_jpeg",  # the second half of the image is missing
    "empty_image",  # zero bytes
    "html_as_jpeg",  # an error page saved as a picture
    "zeros_as_webp",  # a hole of the file system
    "header_only_jpeg",  # 20 bytes
    "bomb_png",  # declares 100,000 x 100,000 pixels
    "latin1_caption",  # not UTF-8
    "broken_json",  # the sidecar ends in the middle
    "json_only",  # neither image nor caption
    "repeated_key",  # a whole sample under a key that the shard has already used
)
"""Samples that cannot become a feature row: a run over shards with `broken=True` has this many dead letters."""

UNUSUAL = (
    "grey_png",
    "cmyk_jpeg",
    "rgba_png",
    "animated_gif",
    "grey16_png",
    "rotated_jpeg",
    "image_only",
    "caption_only",
)
"""Samples that look odd and are fine: each becomes a feature row, the last two with one modality."""

JPEG_QUALITY = 90
BLUR_PIXELS = 6.0  # of a scene of 64: of the shapes nearly nothing is left, of the colours much
ORIENTATION_TAG = 0x0112


def write_shards(directory: Path, pairs: int, per_shard: int, seed: int, broken: bool = True) -> list[Path]:
    """The paths of the tar shards written, with `pairs` good samples of which each full shard holds `per_shard`.

    With `broken` the samples of `BROKEN` and `UNUSUAL` come on top, spread over the shards. The same arguments give the
    same bytes; sample i does not depend on `per_shard`.
    """
    if pairs < 1 or per_shard < 1:
        raise ValueError(f"pairs and per_shard must be at least 1, not {pairs} and {per_shard}")
    directory.mkdir(parents=True, exist_ok=True)
    starts = range(0, pairs, per_shard)
    specials = (*BROKEN, *UNUSUAL) if broken else ()
    paths = []
    for shard, start in enumerate(starts):
        path = directory / f"{shard:05d}.tar"
        samples = [(f"{i:09d}", _good_sample(f"{i:09d}", seed, i)) for i in range(start, min(start + per_shard, pairs))]
        _insert(samples, specials[shard :: len(starts)], seed)
        _write_tar(path, samples)
        paths.append(path)
    return paths


def write_views(
    directory: Path,
    pairs: int,
    per_shard: int,
    seed: int,
    blurred: float = 0.5,
    colourless: float = 0.5,
    drawing: int = 1,
) -> list[Path]:
    """The paths of shards with degraded views of the good samples that `write_shards` writes, under the same keys.

    Every scene is drawn and described anew; a share `blurred` of the pictures shows no shapes and patterns any more,
    but much of the colours, and a share `colourless` of the captions does not name colours. Another `drawing` draws and
    describes the same scenes differently.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, start in enumerate(range(0, pairs, per_shard)):
        paths.append(directory / f"{shard:05d}.tar")
        numbers = range(start, min(start + per_shard, pairs))
        _write_tar(
            paths[-1], [(f"{i:09d}", _view(f"{i:09d}", (seed, i, drawing), blurred, colourless)) for i in numbers]
        )
    return paths


def _view(key: str, seed: tuple[int, int, int], blurred: float, colourless: float) -> Members:
    scene = sample_scene(np.random.default_rng(seed[:2]), held_out=None)
    rng = np.random.default_rng(seed)
    image = render(scene, rng)
    if rng.random() < blurred:
        image = image.filter(ImageFilter.GaussianBlur(BLUR_PIXELS))
    named = scene.fields - ({"colour"} if rng.random() < colourless else set())
    return _members(key, scene, _jpeg(image), caption(scene, rng, named).text)


def _insert(samples: list[tuple[str, Members]], kinds: tuple[str, ...], seed: int) -> None:
    """Put the special samples between the good ones, evenly; a repeated key goes to the end."""
    good_rows = len(samples)
    for i, kind in reversed(list(enumerate(kinds))):
        place = (i + 1) * good_rows // (len(kinds) + 1)
        if kind == "repeated_key":
            samples.append((samples[0][0], _special_sample(kind, samples[0][0], seed)))
        else:
            samples.insert(place, (kind, _special_sample(kind, kind, seed)))


def _write_tar(path: Path, samples: list[tuple[str, Members]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _good_sample(key: str, seed: int, number: int) -> Members:
    rng = np.random.default_rng((seed, number))
    scene = sample_scene(rng, held_out=None)
    return _members(key, scene, _jpeg(render(scene, rng)), caption(scene, rng).text)


def _members(key: str, scene: Scene, image: bytes, text: str) -> Members:
    return {"jpg": image, "txt": text.encode(), "json": _sidecar(key, scene)}


def _sidecar(key: str, scene: Scene) -> bytes:
    held_out = any(pair in HELD_OUT for pair in scene.pairs)
    record = {"key": key, "url": f"https://scenes.example/{key}.jpg", "held_out": held_out, **asdict(scene)}
    return json.dumps(record).encode()


def _jpeg(image: Image.Image, **options: object) -> bytes:
    return _encoded(image, "JPEG", quality=JPEG_QUALITY, **options)


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------- specials


def _special_sample(kind: str, key: str, seed: int) -> Members:
    """The members of one broken or unusual sample, by suffix."""
    rng = np.random.default_rng((seed, zlib.crc32(kind.encode())))
    scene = sample_scene(rng, held_out=None, kind="single")
    image = render(scene, rng)
    named = scene.fields - {"colour"} if kind.startswith("grey") else scene.fields
    members = _members(key, scene, _jpeg(image), caption(scene, rng, named).text)
    return _CHANGES[kind](members, image)


def _replace_image(suffix: str, encode: Callable[[Image.Image], bytes]) -> Callable[[Members, Image.Image], Members]:
    def change(members: Members, image: Image.Image) -> Members:
        return {suffix: encode(image), "txt": members["txt"], "json": members["json"]}

    return change


def _truncated(image: Image.Image) -> bytes:
    content = _jpeg(image)
    return content[: len(content) // 2]


def _bomb(_: Image.Image) -> bytes:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1024))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, content) for name, content in chunks)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _rotated(image: Image.Image) -> bytes:
    """A portrait stored lying on its side, whose EXIF orientation turns it upright again."""
    rows = np.pad(np.asarray(image), ((image.height // 4,) * 2, (0, 0), (0, 0)), mode="reflect")
    portrait = Image.fromarray(rows)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6  # to be turned by 90 degrees clockwise
    return _jpeg(portrait.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _animated(image: Image.Image) -> bytes:
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _encoded(image, "GIF", save_all=True, append_images=[mirrored], duration=200, loop=0)


def _grey16(image: Image.Image) -> bytes:
    levels = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return _encoded(Image.fromarray(levels), "PNG")


def _translucent(image: Image.Image) -> bytes:
    picture = image.convert("RGBA")
    picture.putalpha(230)
    return _encoded(picture, "PNG")


_CHANGES: dict[str, Callable[[Members, Image.Image], Members]] = {
    "truncated_jpeg": _replace_image("jpg", _truncated),
    "empty_image": _replace_image("jpg", lambda _: b""),
    "html_as_jpeg": _replace_image("jpg", lambda _: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"),
    "zeros_as_webp": _replace_image("webp", lambda _: bytes(512)),
    "header_only_jpeg": _replace_image("jpg", lambda image: _jpeg(image)[:20]),
    "bomb_png": _replace_image("png", _bomb),
    "latin1_caption": lambda members, _: members | {"txt": "un café, une étoile à gauche".encode("latin-1")},
    "broken_json": lambda members, _: members | {"json": members["json"][:25]},
    "json_only": lambda members, _: {"json": members["json"]},
    "repeated_key": lambda members, _: members,
    "grey_png": _replace_image("png", lambda image: _encoded(image.convert("L"), "PNG")),
    "cmyk_jpeg": _replace_image("jpg", lambda image: _jpeg(image.convert("CMYK"))),
    "rgba_png": _replace_image("png", _translucent),
    "animated_gif": _replace_image("gif", _animated),
    "grey16_png": _replace_image("png", _grey16),
    "rotated_jpeg": _replace_image("jpg", _rotated),
    "image_only": lambda members, _: {"jpg": members["jpg"], "json": members["json"]},
    "caption_only": lambda members, _: {"txt": members["txt"], "json": members["json"]},
}
