"""Pixels equal to open_clip's, those of plain JPEGs nearly; limits held; one kind of error for all that is wrong."""

import io
import itertools
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fusion_core import images
from fusion_core.images import BadImage, Decoded, decode
from schemas.feature_table import Preprocess
from schemas.samples import ERRORS
from tests.corpora import photo

SQUARE = Preprocess(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)
TARGETS = {
    "shortest": SQUARE,
    "shortest bilinear": replace(SQUARE, interpolation="bilinear"),
    "shortest, not square": replace(SQUARE, width=45, interpolation="bilinear"),
    "longest": replace(SQUARE, resize_mode="longest", fill_color=0),
    "longest bilinear, not square": replace(
        SQUARE, resize_mode="longest", height=41, interpolation="bilinear", fill_color=127
    ),
    "squash": replace(SQUARE, resize_mode="squash", width=45),
    "squash bilinear": replace(SQUARE, resize_mode="squash", interpolation="bilinear"),
}
MAX_PIXELS = 1_000_000
SIZES = ((53, 37), (37, 90), (20, 11), (32, 32), (1, 1), (1, 60), (70, 3))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with large and fine structure in every band, the same each time."""
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int) + rng.integers(-25, 26, (height, width, 4))
    rgba = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if mode == "LA":
        return Image.merge("LA", (rgba.getchannel(0), rgba.getchannel(3)))
    if mode == "CMYK":
        return Image.merge("CMYK", rgba.split())
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(image: Image.Image, kind: str, **options: Any) -> bytes:
    return encoded(image, kind, save_all=True, append_images=[ImageOps.mirror(image)], **options)


def see_through(image: Image.Image, alphas: int | bytes) -> bytes:
    return encoded(image, "PNG", transparency=alphas)


ENCODERS: dict[str, Callable[[int, int], bytes]] = {
    "JPEG": lambda w, h: encoded(picture(w, h), "JPEG", quality=90),
    "JPEG 4:4:4 progressive": lambda w, h: encoded(picture(w, h), "JPEG", progressive=True, subsampling=0),
    "JPEG L": lambda w, h: encoded(picture(w, h, "L"), "JPEG"),
    "JPEG CMYK": lambda w, h: encoded(picture(w, h, "CMYK"), "JPEG"),
    "MPO": lambda w, h: animated(picture(w, h), "MPO"),
    "PNG": lambda w, h: encoded(picture(w, h), "PNG"),
    "PNG RGB, one colour transparent": lambda w, h: encoded(picture(w, h), "PNG", transparency=(1, 2, 3)),
    "PNG RGBA": lambda w, h: encoded(picture(w, h, "RGBA"), "PNG"),
    "PNG L": lambda w, h: encoded(picture(w, h, "L"), "PNG"),
    "PNG L, one grey transparent": lambda w, h: encoded(picture(w, h, "L"), "PNG", transparency=9),
    "PNG LA": lambda w, h: encoded(picture(w, h, "LA"), "PNG"),
    "PNG 1": lambda w, h: encoded(picture(w, h, "1"), "PNG"),
    "PNG P": lambda w, h: encoded(picture(w, h, "P"), "PNG"),
    "PNG P of 4 colours": lambda w, h: encoded(picture(w, h).quantize(4), "PNG", bits=2),
    "PNG P, one entry transparent": lambda w, h: see_through(picture(w, h, "P"), 5),
    "PNG P with alphas": lambda w, h: see_through(picture(w, h).quantize(8), bytes(range(0, 240, 30))),
    "APNG": lambda w, h: animated(picture(w, h), "PNG"),
    "WebP": lambda w, h: encoded(picture(w, h), "WEBP"),
    "WebP lossless RGBA": lambda w, h: encoded(picture(w, h, "RGBA"), "WEBP", lossless=True),
    "WebP animated": lambda w, h: animated(picture(w, h), "WEBP"),
    "GIF": lambda w, h: encoded(picture(w, h, "P"), "GIF"),
    "GIF L": lambda w, h: encoded(picture(w, h, "L"), "GIF"),
    "GIF transparent": lambda w, h: encoded(picture(w, h, "P"), "GIF", transparency=7),
    "GIF animated": lambda w, h: animated(picture(w, h), "GIF", duration=50, disposal=2),
    "BMP": lambda w, h: encoded(picture(w, h), "BMP"),
    "BMP RGBA": lambda w, h: encoded(picture(w, h, "RGBA"), "BMP"),
    "BMP P": lambda w, h: encoded(picture(w, h, "P"), "BMP"),
    "BMP L": lambda w, h: encoded(picture(w, h, "L"), "BMP"),
    "BMP 1": lambda w, h: encoded(picture(w, h, "1"), "BMP"),
    "TIFF": lambda w, h: encoded(picture(w, h), "TIFF"),
    "TIFF RGBA, LZW": lambda w, h: encoded(picture(w, h, "RGBA"), "TIFF", compression="tiff_lzw"),
    "TIFF in JPEG": lambda w, h: encoded(picture(w, h), "TIFF", compression="jpeg"),
    "TIFF L, deflate": lambda w, h: encoded(picture(w, h, "L"), "TIFF", compression="tiff_deflate"),
    "TIFF 1, G4": lambda w, h: encoded(picture(w, h, "1"), "TIFF", compression="group4"),
    "TIFF LA": lambda w, h: encoded(picture(w, h, "LA"), "TIFF"),
    "TIFF P": lambda w, h: encoded(picture(w, h, "P"), "TIFF"),
    "TIFF CMYK": lambda w, h: encoded(picture(w, h, "CMYK"), "TIFF"),
    "TIFF of two pages": lambda w, h: animated(picture(w, h), "TIFF"),
}


PLAIN = ("JPEG", "JPEG 4:4:4 progressive", "JPEG L", "MPO")  # what libjpeg-turbo and torch decode and resize


@cache
def sample(kind: str, width: int, height: int) -> bytes:
    return ENCODERS[kind](width, height)


@cache
def open_clip_transform(preprocess: Preprocess) -> Any:
    """open_clip's inference transform without its last two steps, ToTensor and Normalize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.transform import image_transform
    transform = image_transform(
        (preprocess.height, preprocess.width),
        is_train=False,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
        fill_color=preprocess.fill_color,
    )
    assert [type(step).__name__ for step in transform.transforms[-2:]] == ["MaybeToTensor", "Normalize"]
    transform.transforms = transform.transforms[:-2]
    return transform


def expected(image: bytes, preprocess: Preprocess) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
        return np.asarray(open_clip_transform(preprocess)(upright))


def check_decoded(decoded: Decoded, preprocess: Preprocess) -> None:
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape == (preprocess.height, preprocess.width, 3)
    assert decoded.pixels.flags.c_contiguous and decoded.pixels.flags.writeable


def error_of(image: bytes, max_pixels: int = MAX_PIXELS) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(image, SQUARE, max_pixels)
    assert caught.value.error in ERRORS
    assert 0 < len(str(caught.value)) < 250
    return caught.value


def check_close(found: np.ndarray, wanted: np.ndarray, most: int = 2, mean: float = 0.2, what: str = "") -> None:
    """A plain JPEG: grey levels off at most and in the mean."""
    off = np.abs(found.astype(int) - wanted)
    assert off.max() <= most and off.mean() <= mean, f"{what}: {off.max()} at most, {off.mean()} in the mean"


# ---------------------------------------------------------------------------------------------- equal to open_clip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_pixels_are_those_of_open_clip(kind: str, target: str) -> None:
    preprocess = TARGETS[target]
    for width, height in SIZES:
        image = sample(kind, width, height)
        decoded = decode(image, preprocess, MAX_PIXELS)
        check_decoded(decoded, preprocess)
        assert (decoded.width, decoded.height) == (width, height)
        wanted = expected(image, preprocess)
        if kind in PLAIN:
            check_close(decoded.pixels, wanted, what=f"{width} × {height}")
        else:
            np.testing.assert_array_equal(decoded.pixels, wanted, err_msg=f"{width} × {height}")


sides = st.one_of(st.integers(1, 80), st.integers(1, 700))


preprocesses = st.builds(
    Preprocess,
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    mean=st.just((0.5,) * 3),
    std=st.just((0.5,) * 3),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    fill_color=st.sampled_from([0, 1, 200]),
)


@settings(max_examples=150, deadline=None)
@given(
    width=sides,
    height=sides,
    mode=st.sampled_from(["RGB", "RGBA", "P", "L", "LA", "1"]),
    preprocess=preprocesses,
)
@example(width=700, height=1, mode="RGB", preprocess=SQUARE)
@example(width=1, height=699, mode="RGBA", preprocess=replace(SQUARE, width=33))
@example(width=5, height=64, mode="L", preprocess=replace(SQUARE, resize_mode="longest"))  # 2.5 pixels: to even
@example(width=7, height=64, mode="L", preprocess=replace(SQUARE, resize_mode="longest"))
def test_pixels_are_those_of_open_clip_at_any_size(width: int, height: int, mode: str, preprocess: Preprocess) -> None:
    image = encoded(picture(width, height, mode), "PNG", compress_level=1)
    decoded = decode(image, preprocess, MAX_PIXELS)
    check_decoded(decoded, preprocess)
    ratio = max(height / preprocess.height, width / preprocess.width)
    if preprocess.resize_mode == "longest" and 0 in (round(height / ratio), round(width / ratio)):
        with pytest.raises(ValueError, match="must be > 0"):  # open_clip cannot; we keep one pixel
            expected(image, preprocess)
    else:
        np.testing.assert_array_equal(decoded.pixels, expected(image, preprocess))


def test_the_clip_size_of_a_photo() -> None:
    preprocess = replace(SQUARE, height=224, width=224)
    for kind in ("PNG", "WebP", "GIF animated"):
        image = sample(kind, 500, 375)
        np.testing.assert_array_equal(decode(image, preprocess, MAX_PIXELS).pixels, expected(image, preprocess))
    image = sample("JPEG", 500, 375)
    check_close(decode(image, preprocess, MAX_PIXELS).pixels, expected(image, preprocess), 1, 0.01)


# ---------------------------------------------------------------------------------------------- orientation

BACK = {  # what undoes the turn that an orientation asks for
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def oriented(upright: Image.Image, orientation: int, kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    method = BACK[orientation]
    return encoded(upright.transpose(method) if method is not None else upright, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", BACK)
def test_orientation_is_applied_first(orientation: int) -> None:
    upright = picture(61, 40)
    plain = decode(encoded(upright, "PNG"), SQUARE, MAX_PIXELS)
    lzw = {"compression": "tiff_lzw"}
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", lzw)):
        decoded = decode(oriented(upright, orientation, kind, **options), SQUARE, MAX_PIXELS)
        assert (decoded.width, decoded.height) == (61, 40)
        np.testing.assert_array_equal(decoded.pixels, plain.pixels, err_msg=kind)
    for kind in ("JPEG", "MPO"):
        image = oriented(upright, orientation, kind)
        decoded = decode(image, SQUARE, MAX_PIXELS)
        assert (decoded.width, decoded.height) == (61, 40)
        check_close(decoded.pixels, expected(image, SQUARE), 1, 0.05, kind)


def test_orientation_from_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    decoded = decode(encoded(picture(61, 40), "JPEG", xmp=xmp), SQUARE, MAX_PIXELS)
    assert (decoded.width, decoded.height) == (40, 61)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0not a tiff header at all",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200)),
        b"Exif\0\0II+\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",  # the orientation as text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
    ],
)
def test_broken_exif_does_not_lose_the_image(exif: bytes) -> None:
    # Without a JFIF header Pillow looks for the resolution in the EXIF, so this fails in two places if it fails.
    plain = encoded(picture(50, 40), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    without_jfif = plain[:2] + segment + plain[20:]
    for image in (plain[:20] + segment + plain[20:], without_jfif):
        decoded = decode(image, SQUARE, MAX_PIXELS)
        np.testing.assert_array_equal(decoded.pixels, decode(plain, SQUARE, MAX_PIXELS).pixels)
        assert (decoded.width, decoded.height) == (50, 40)


# ---------------------------------------------------------------------------------------------- plain JPEG, fast

PHOTO_LIMIT = 20_000_000
CLIP = replace(SQUARE, height=224, width=224)


@settings(max_examples=120, deadline=None)
@given(
    width=sides,
    height=sides,
    mode=st.sampled_from(["RGB", "L"]),
    options=st.fixed_dictionaries({"quality": st.sampled_from([75, 98]), "progressive": st.booleans()}),
    subsampling=st.sampled_from([0, 1, 2]),
    orientation=st.sampled_from(list(BACK)),
    preprocess=preprocesses,
)
@example(1, 1, "RGB", {"quality": 90}, 2, 6, SQUARE)
@example(4, 602, "RGB", {"quality": 98}, 2, 5, replace(SQUARE, height=63, width=63, resize_mode="squash"))
@example(1, 31, "RGB", {"quality": 90}, 0, 1, replace(SQUARE, resize_mode="longest"))  # one column wide
def test_jpegs_are_close_to_open_clip_at_any_size(
    width: int,
    height: int,
    mode: str,
    options: dict[str, Any],
    subsampling: int,
    orientation: int,
    preprocess: Preprocess,
) -> None:
    options = options | ({"subsampling": subsampling} if mode == "RGB" else {})
    image = oriented(picture(width, height, mode), orientation, "JPEG", **options)
    decoded = decode(image, preprocess, MAX_PIXELS)
    check_decoded(decoded, preprocess)
    assert (decoded.width, decoded.height) == (width, height)
    ratio = max(height / preprocess.height, width / preprocess.width)
    if preprocess.resize_mode != "longest" or 0 not in (round(height / ratio), round(width / ratio)):
        check_close(decoded.pixels, expected(image, preprocess), 5, 0.5)


@cache
def large(width: int, height: int) -> Image.Image:
    """A photo with the noise of a camera."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-10, 11, (height, width, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


LARGE = [(4000, 3000, (1,)), (3999, 3001, (7,)), *((w, h, tuple(BACK)) for w, h in ((1205, 901), (899, 1799)))]


@pytest.mark.parametrize(("width", "height", "orientations"), LARGE)
def test_large_photos_are_close_to_open_clip(width: int, height: int, orientations: tuple[int, ...]) -> None:
    for orientation in orientations:
        mode = "L" if orientation % 2 else "RGB"
        image = oriented(large(width, height).convert(mode), orientation, "JPEG", progressive=width == 899)
        for preprocess in (CLIP, replace(CLIP, resize_mode="squash", interpolation="bilinear")):
            decoded = decode(image, preprocess, PHOTO_LIMIT)
            assert (decoded.width, decoded.height) == (width, height)
            what = f"{orientation} {preprocess.resize_mode}"
            check_close(decoded.pixels, expected(image, preprocess), 6, 0.8, what)


@given(width=st.integers(1, 9000), height=st.integers(1, 9000), preprocess=preprocesses)
def test_a_reduced_photo_stays_twice_as_large_as_its_target(width: int, height: int, preprocess: Preprocess) -> None:
    size, _, _ = images._plan((height, width), preprocess)
    by = images._reduction((height, width), size)
    assert by in (1, 2, 4, 8)
    assert by == 1 or (width >= 2 * by * size[1] and height >= 2 * by * size[0] and width * height >= 500_000)


def test_a_large_photo_is_never_held_whole() -> None:
    image = photo(0, (3000, 2250))
    decode(sample("JPEG", 20, 11), CLIP, MAX_PIXELS)  # torch is imported
    tracemalloc.start()
    try:
        decode(image, CLIP, PHOTO_LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 3000 * 2250 * 3 / 4  # whole: 20 MB; reduced by 4: 1.3 MB
    finally:
        tracemalloc.stop()


def test_what_passes_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    by_pillow: list[str] = []
    monkeypatch.setattr(images, "_upright", lambda opened: by_pillow.append(opened.mode) or opened)
    for kind in PLAIN:
        decode(sample(kind, 53, 37), SQUARE, MAX_PIXELS)
    assert by_pillow == []
    decode(sample("JPEG CMYK", 53, 37), SQUARE, MAX_PIXELS)
    decode(encoded(picture(53, 37), "JPEG", keep_rgb=True), SQUARE, MAX_PIXELS)
    assert by_pillow == ["CMYK", "RGB"]
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg_header", lambda image: (37, 54, "YCbCr", "420"))
    decode(sample("JPEG", 53, 37), SQUARE, MAX_PIXELS)
    assert by_pillow == ["CMYK", "RGB", "RGB"]


def test_a_jpeg_with_faults_that_pillow_forgives_is_pillows() -> None:
    image = sample("JPEG", 500, 375)
    faulty = image[:5000] + image[5100:]
    with pytest.raises(ValueError, match=r"Corrupt JPEG data|Premature end"):
        images.simplejpeg.decode_jpeg(faulty)
    np.testing.assert_array_equal(decode(faulty, SQUARE, MAX_PIXELS).pixels, expected(faulty, SQUARE))


@pytest.mark.parametrize("kind", ["demo", "vit"])
def test_embeddings_of_jpegs_are_those_of_open_clips_pixels(kind: str, tmp_path: Path) -> None:
    from fusion_core import towers
    from tests.fusion_core.test_towers import VIT, save_random_model

    name = towers.DEMO if kind == "demo" else str(save_random_model(tmp_path / "jpegs", VIT))
    model = towers.load(name, precision="fp32")
    preprocess = model.spec.preprocess
    sizes = [(500, 375), (64, 64), (31, 90), (256, 341), (1601, 1205), (3001, 1999)]
    files = [photo(seed, size, quality=85) for seed, size in enumerate(sizes)]
    found = model.embed_images(np.stack([decode(image, preprocess, PHOTO_LIMIT).pixels for image in files]))
    wanted = model.embed_images(np.stack([expected(image, preprocess) for image in files]))
    cosines = np.einsum("nd,nd->n", found.astype(float), wanted.astype(float))
    cosines /= np.linalg.norm(found.astype(float), axis=1) * np.linalg.norm(wanted.astype(float), axis=1)
    assert cosines[:4].min() >= 0.999999
    assert cosines.min() >= 0.99999


# ---------------------------------------------------------------------------------------------- pixel types


def tiff(width: int, height: int, data: bytes, bits: int, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of one strip, with pixel types that Pillow reads but does not write."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 134), (277, 1), (278, height)]
    entries = [struct.pack(f"{order}HHL", tag, 4, 1) + struct.pack(f"{order}L", value) for tag, value in tags]
    entries.append(struct.pack(f"{order}HHLL", 279, 4, 1, len(data)))
    entries.append(struct.pack(f"{order}HHLHH", 339, 3, 1, sample_format, 0))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}LH", 8, len(entries))
    return (head + b"".join(entries) + bytes(4)).ljust(134, b"\0") + data


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    grey = np.linspace(0, 65535, 40 * 50, dtype=np.uint16).reshape(40, 50)
    high = decode(encoded(Image.fromarray((grey >> 8).astype(np.uint8)), "PNG"), SQUARE, MAX_PIXELS).pixels
    assert high.min() < 20 and high.max() > 235 and len(np.unique(high)) > 100  # no clipping to white
    wide = Image.fromarray(grey)
    assert wide.mode == "I;16"
    files = {
        "PNG": encoded(wide, "PNG"),
        "TIFF": encoded(wide, "TIFF"),
        "TIFF, LZW": encoded(wide, "TIFF", compression="tiff_lzw"),
        "TIFF, big-endian": encoded(Image.frombytes("I;16B", (50, 40), grey.astype(">u2").tobytes()), "TIFF"),
        "TIFF by hand": tiff(50, 40, grey.astype(">u2").tobytes(), 16, order=">"),
    }
    for name, image in files.items():
        np.testing.assert_array_equal(decode(image, SQUARE, MAX_PIXELS).pixels, high, err_msg=name)


def test_sixteen_bit_grey_is_turned_too() -> None:
    grey = Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30)
    plain = decode(encoded(grey, "PNG"), SQUARE, MAX_PIXELS).pixels
    np.testing.assert_array_equal(decode(oriented(grey, 6, "PNG"), SQUARE, MAX_PIXELS).pixels, plain)


def test_twelve_bit_grey_is_not_black() -> None:
    left, right = 0x800, 0xFFF
    data = struct.pack(">L", left << 12 | right)[1:] * (32 * 16)  # two pixels in three bytes
    pixels = decode(tiff(32, 32, data, 12), replace(SQUARE, resize_mode="squash"), MAX_PIXELS).pixels
    assert set(np.unique(pixels[:, ::2])) == {0x80} and set(np.unique(pixels[:, 1::2])) == {0xFF}


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (encoded(Image.new("I", (9, 9), 70000), "TIFF"), "integer pixels"),
        (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "floating-point pixels"),
        (tiff(9, 9, bytes(162), 16, sample_format=2), "integer pixels"),
        (tiff(9, 9, bytes(648), 64, sample_format=3), "unknown pixel mode"),
    ],
)
def test_pixels_without_a_white_are_refused(image: bytes, words: str) -> None:
    error = error_of(image)
    assert error.error == "UnsupportedImage"
    assert words in str(error)


# ---------------------------------------------------------------------------------------------- errors

JPEG = encoded(picture(90, 70), "JPEG")


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        (b"", "EmptyImage", "0 bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "NotAnImage", "starts with '<!DOCTYPE html>"),
        (b"\n\n  <html>\n <head>", "NotAnImage", "starts with '<html> <head>'"),
        (b'{"error": "not found"}', "NotAnImage", '22 bytes, starts with \'{"error"'),
        ("Straße ".encode() * 30, "NotAnImage", "starts with 'Straße Straße"),
        (b"BMW builds cars, not bitmaps", "NotAnImage", "starts with 'BMW builds"),
        (bytes(range(200, 256)), "NotAnImage", "starts with the bytes c8 c9 ca cb"),
        (bytes(5000), "NotAnImage", "5,000 bytes, starts with the bytes 00 00 00"),
        (b"\0\0\0\x18ftypmp42" + bytes(80), "NotAnImage", "bytes 00 00 00 18 66 74 79 70"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "NotAnImage", "starts with"),
        (b"\0\0\0\x1cftypavif" + bytes(80), "UnsupportedImage", "AVIF, 92 bytes"),
        (b"\0\0\0\x18ftypheic" + bytes(80), "UnsupportedImage", "HEIF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "UnsupportedImage", "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg width="9"/>', "UnsupportedImage", "SVG"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "NotAnImage", "starts with '<?xml"),
        (b"%PDF-1.7\n", "UnsupportedImage", "PDF"),
        (b"8BPS\0\x01" + bytes(20), "UnsupportedImage", "PSD"),
        (encoded(picture(16, 16), "ICO"), "UnsupportedImage", "ICO"),
        (encoded(picture(16, 16), "PPM"), "UnsupportedImage", "PNM"),
        (b"\xff\x0a" + bytes(20), "UnsupportedImage", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "UnsupportedImage", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "UnsupportedImage", "JPEG 2000"),
        (b"\xff\xd8", "TruncatedImage", "only 2 bytes: ff d8"),
        (JPEG[:3], "TruncatedImage", "JPEG of 3 bytes"),
        (JPEG[: len(JPEG) // 2], "TruncatedImage", "truncated"),
        (JPEG[:20] + b"\xff\xdb\0\x05\0\0\0" + JPEG[20:], "CorruptImage", "bad quantization table"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "UnsupportedImage", "12-bit"),
    ],
)
def test_errors_say_what_the_bytes_are(image: bytes, kind: str, words: str) -> None:
    error = error_of(image)
    assert (error.error, words in str(error)) == (kind, True), str(error)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_cut_image_is_called_truncated(kind: str) -> None:
    image = sample(kind, 60, 45)
    found = Counter(error_of(image[: int(len(image) * share)]).error for share in (0.05, 0.3, 0.45))
    assert found == {"TruncatedImage": 3}


@pytest.mark.parametrize(
    ("kind", "place"), [("PNG", 20), ("PNG P", 300), ("WebP", 25), ("TIFF", 60), ("GIF", 11), ("TIFF L, deflate", 300)]
)
def test_a_damaged_image_is_not_called_truncated(kind: str, place: int) -> None:
    image = bytearray(sample(kind, 60, 45))
    image[place : place + 9] = b"\xa5" * 9
    try:
        check_decoded(decode(bytes(image), SQUARE, MAX_PIXELS), SQUARE)
    except BadImage as error:
        assert error.error in ("CorruptImage", "TooManyPixels", "UnsupportedImage"), str(error)


def test_a_damaged_header_is_corrupt() -> None:
    image = bytearray(sample("PNG", 60, 45))
    image[29] ^= 0xFF  # a byte of the header's checksum
    error = error_of(bytes(image))
    assert (error.error, "bad header checksum" in str(error)) == ("CorruptImage", True)


def test_a_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("NotAnImage", "no")))
    assert (error.error, str(error)) == ("NotAnImage", "no")


# ---------------------------------------------------------------------------------------------- limits


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def gif_frame(width: int, height: int) -> bytes:
    """A GIF whose screen is small, whose first frame is not, and which asks for a disposal that fills the frame."""
    control = b"\x21\xf9\x04\x08\0\0\0\0"
    screen = struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + bytes(6) + b"\x21\xfe\x03abc\0"
    return b"GIF89a" + screen + control + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\0\0;"


def bombs() -> dict[str, bytes]:
    lossless = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0"
    bmp = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6)
    jpeg = JPEG.replace(struct.pack(">HH", 70, 90), struct.pack(">HH", 65500, 65500))
    return {
        "PNG of 100 megapixels": png_with(width=10_000, height=10_000),
        "PNG of 2^62 pixels": png_with(width=2**31 - 1, height=2**31 - 1),
        "JPEG": jpeg,
        "GIF frame": gif_frame(13_000, 13_000),
        "GIF frame above Pillow's limit": gif_frame(65_000, 65_000),
        "WebP": b"RIFF" + struct.pack("<I", len(lossless) + 4) + b"WEBP" + lossless,
        "BMP": bmp,
        "TIFF": tiff(2**31 - 1, 2**31 - 1, bytes(99), 8),
        "TIFF of 100 megapixels": tiff(10_000, 10_000, bytes(99), 8),
    }


@pytest.mark.parametrize("name", bombs())
def test_too_many_pixels_are_refused(name: str) -> None:
    error = error_of(bombs()[name], max_pixels=64_000_000)
    assert error.error == "TooManyPixels"
    assert "limit is 64,000,000" in str(error)


def test_the_limit_is_inclusive() -> None:
    image = sample("JPEG", 60, 45)
    assert decode(image, SQUARE, 60 * 45).width == 60
    assert str(error_of(image, max_pixels=60 * 45 - 1)) == "JPEG of 60 × 45 = 2,700 pixels; the limit is 2,699"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_narrow_image_is_not_blown_up(kind: str) -> None:
    image = encoded(picture(1, 5000), kind)
    with pytest.raises(BadImage, match="1 × 5000 pixels would be resized to 224 × 1120000") as caught:
        decode(image, replace(SQUARE, height=224, width=224), MAX_PIXELS)
    assert caught.value.error == "TooManyPixels"


def test_text_bombs_are_refused() -> None:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    assert decode(png_with(), SQUARE, MAX_PIXELS).width == 8
    error = error_of(png_with(bomb))
    assert (error.error, "too large" in str(error)) == ("CorruptImage", True)


MEMORY = """
import pickle, resource, sys
from fusion_core.images import BadImage, decode
assert not {"torch", "open_clip", "apache_beam", "pyarrow"} & set(sys.modules), "images.py imports too much"
bombs, preprocess = pickle.load(sys.stdin.buffer)
for name, image in bombs.items():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode(image, preprocess, 64_000_000)
    except BadImage as error:
        print(name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, sep="\\t")
"""


def test_refusing_costs_no_memory_and_the_import_is_light() -> None:
    too_large = bombs() | {"text": png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000))))}
    payload = pickle.dumps((too_large, None))
    ran = subprocess.run([sys.executable, "-c", MEMORY], input=payload, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    megabytes = {name: int(grown) for name, grown in (line.split("\t") for line in ran.stdout.decode().splitlines())}
    assert megabytes.keys() == too_large.keys()
    assert max(megabytes.values()) < 50, megabytes


# ---------------------------------------------------------------------------------------------- warnings and threads


def with_exif_that_warns() -> bytes:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0e\x01\x02\0\xff\xff\0\0\0\x01\0\0"
    return encoded(picture(50, 40), "JPEG", exif=exif)


def test_pillows_warnings_stay_inside() -> None:
    with pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(io.BytesIO(with_exif_that_warns())).getexif()
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        decode(with_exif_that_warns(), SQUARE, MAX_PIXELS)
        decode(sample("PNG P with alphas", 9, 9), SQUARE, MAX_PIXELS)
        warnings.warn("not Pillow's", stacklevel=1)
    assert [str(warning.message) for warning in leaked] == ["not Pillow's"]
    assert warnings.filters == before


def test_the_last_one_out_lets_warnings_through_again() -> None:
    before = list(warnings.filters)
    with images._pillow_silenced():
        with images._pillow_silenced():
            pass
        assert warnings.filters[0] == images._PILLOW_WARNS
    assert warnings.filters == before


def test_threads_get_the_same_pixels_and_leave_the_filters_alone() -> None:
    files = [sample(kind, 70, 50) for kind in ENCODERS] + [with_exif_that_warns()]
    alone = [decode(image, SQUARE, MAX_PIXELS).pixels for image in files]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        rounds = list(pool.map(lambda image: decode(image, SQUARE, MAX_PIXELS).pixels, files * 8))
    for pixels, wanted in zip(rounds, itertools.cycle(alone), strict=False):
        np.testing.assert_array_equal(pixels, wanted)
    assert warnings.filters == before
    assert images._decoding == 0


# ---------------------------------------------------------------------------------------------- damaged bytes


def mutated(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files with bits flipped, bytes replaced, a piece lost, cut short, or joined with another."""
    image = bytearray(rng.choice(files))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(image)) if rng.random() < 0.5 else rng.randrange(min(len(image), 120))
        match rng.randrange(6):
            case 0:
                image[at] ^= 1 << rng.randrange(8)
            case 1:
                image[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
            case 2:
                image[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", rng.randbytes(4)])
            case 3:
                del image[at : at + rng.randrange(1, 60)]
            case 4:
                other = rng.choice(files)
                image[at:] = other[rng.randrange(len(other)) :]
            case 5:
                image = image[: max(at, 1)]
        if not image:
            break
    return bytes(image)


def mutate_and_decode(n_images: int, seed: int) -> Counter[str]:
    """What came of n mutated images; every one gives pixels or a BadImage, within five seconds."""
    rng = random.Random(seed)
    files = [sample(kind, 45, 33) for kind in ENCODERS]
    files += [with_exif_that_warns(), oriented(picture(45, 33), 6, "JPEG"), oriented(picture(45, 33), 8, "WEBP")]
    targets = list(TARGETS.values())
    outcomes: Counter[str] = Counter()
    for _ in range(n_images):
        image, preprocess = mutated(rng, files), rng.choice(targets)
        started = time.monotonic()
        try:
            check_decoded(decode(image, preprocess, MAX_PIXELS), preprocess)
            outcomes["Decoded"] += 1
        except BadImage as error:
            assert error.error in ERRORS and len(str(error)) < 250
            outcomes[error.error] += 1
        assert time.monotonic() - started < 5, f"{image[:40]!r} took too long"
    return outcomes


def test_mutated_images_give_pixels_or_a_bad_image() -> None:
    outcomes = mutate_and_decode(2000, seed=1)
    assert outcomes.total() == 2000
    assert all(outcomes[kind] >= 5 for kind in ("Decoded", "TruncatedImage", "CorruptImage", "NotAnImage")), outcomes


@pytest.mark.slow
def test_many_mutated_images_give_pixels_or_a_bad_image() -> None:
    assert mutate_and_decode(20_000, seed=2).total() == 20_000


def outcome(image: bytes, preprocess: Preprocess) -> tuple[str, str] | np.ndarray:
    try:
        return decode(image, preprocess, MAX_PIXELS).pixels
    except BadImage as error:
        return error.error, str(error)


def compare_with_pillow(n_images: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What came of n mutated JPEGs with the fast path; without it, all of them give the same, to the error's text."""
    rng = random.Random(seed)
    files = [sample(kind, 45, 33) for kind in (*PLAIN, "JPEG CMYK")]
    files += [oriented(picture(45, 33), 6, "JPEG"), encoded(picture(45, 33), "JPEG", restart_marker_blocks=2)]
    cases = [(mutated(rng, files), preprocess) for preprocess in rng.choices(list(TARGETS.values()), k=n_images)]
    by_turbo = [outcome(*case) for case in cases]
    with monkeypatch.context() as patch:
        patch.setattr(images, "_plain_jpeg", lambda *arguments: None)
        by_pillow = [outcome(*case) for case in cases]
    outcomes: Counter[str] = Counter()
    for fast, slow in zip(by_turbo, by_pillow, strict=True):
        if isinstance(fast, np.ndarray) and isinstance(slow, np.ndarray):
            check_close(fast, slow)
            outcomes["same" if np.array_equal(fast, slow) else "close"] += 1
        else:
            assert not isinstance(fast, np.ndarray) and fast == slow
            outcomes[fast[0]] += 1
    return outcomes


def test_mutated_jpegs_come_out_as_with_pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = compare_with_pillow(2000, 3, monkeypatch)
    assert all(outcomes[kind] >= 100 for kind in ("close", "TruncatedImage", "CorruptImage")), outcomes


@pytest.mark.slow
def test_many_mutated_jpegs_come_out_as_with_pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare_with_pillow(20_000, 4, monkeypatch).total() == 20_000


MAGICS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8 ", b"II*\0", b"MM\0+", b"BM"]


@settings(max_examples=200, deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=200))
def test_any_bytes_give_pixels_or_a_bad_image(magic: bytes, rest: bytes) -> None:
    try:
        check_decoded(decode(magic + rest, SQUARE, MAX_PIXELS), SQUARE)
    except BadImage as error:
        assert error.error in ERRORS


# --- for the eye


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_thumbnail_is_the_whole_picture_made_small(kind: str) -> None:
    data = sample(kind, 53, 37)
    with Image.open(io.BytesIO(data)) as opened:
        white = Image.new("RGBA", opened.size, "white")
        expected = (
            Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB").resize((26, 18), reducing_gap=2.0)
        )
    small = Image.open(io.BytesIO(images.thumbnail(data, 26, MAX_PIXELS)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (26, 18))
    difference = np.abs(np.asarray(small).astype(int) - np.asarray(expected))
    assert difference.mean() < 12, "JPEG at quality 85 of noise"
    whole = Image.open(io.BytesIO(images.thumbnail(data, 1000, MAX_PIXELS)))
    assert whole.size == (53, 37), "it is not enlarged"


def test_a_thumbnail_stands_upright_and_keeps_the_limit() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(picture(60, 30), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(images.thumbnail(lying, 20, MAX_PIXELS))).size == (10, 20)
    with pytest.raises(images.BadImage, match="limit is 100"):
        images.thumbnail(lying, 20, 100)
    with pytest.raises(images.BadImage, match="starts with"):
        images.thumbnail(b"no picture", 20, 100)


def test_the_media_type_is_told_by_the_bytes() -> None:
    names = {"MPO": "jpeg", "APNG": "png"}
    for kind in ENCODERS:
        first = kind.split()[0]
        assert images.media_type(sample(kind, 20, 11)) == f"image/{names.get(first, first.lower())}"
    with pytest.raises(images.BadImage):
        images.media_type(b"<svg onload=alert(1)>")
