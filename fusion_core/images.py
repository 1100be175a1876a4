"""Encoded image bytes → the pixels a tower wants, within limits; whatever is wrong with the bytes becomes a BadImage.

Except for plain JPEGs, the pixels are bit-equal to those of open_clip's `image_transform(..., is_train=False)` before
ToTensor and Normalize: the same Pillow operations in the same order, with torchvision's and open_clip's arithmetic.

A JPEG in YCbCr or grey without any fault is decoded by libjpeg-turbo, bit-equal to Pillow, and resized by torch in
whole numbers, so that neither threads nor the kind of processor change a bit. How far that is from open_clip in grey
levels:

- Photos: at most 1, below 0.01 in the mean. Noise and cartoon edges: at most 2, up to 0.2 in the mean where a small
  image is enlarged; up to 5 only where "squash" stretches one side tenfold. Embeddings: cosine above 0.9999999.
- Photos of half a megapixel and more whose sides are at least four times their size after resizing are reduced by 2, 4
  or 8 while they are decoded, and stay at least twice that size: at most 5, 0.1 to 0.7 in the mean, with noise of 16
  levels a pixel 7 and 0.9. Embeddings: cosine above 0.99998, with that noise above 0.9999.

Every other JPEG, and every one whose header or data libjpeg-turbo warns of, goes through Pillow, whose verdict counts.

Deliberate differences from open_clip:

- The EXIF orientation is applied first; the rest is open_clip's transform of `ImageOps.exif_transpose(image)`.
- 16-bit grey becomes 8-bit by its high byte (12-bit TIFF: by its high 8 bits); Pillow alone would clip it to white.
- Pixel types without a defined white (32-bit integers, signed 16-bit, floats) are refused.
- An image so narrow that open_clip's "longest" rounds a side to 0 pixels, and fails, keeps 1 pixel there.
- An image so narrow that "shortest" blows its long side up beyond `MAX_RESIZED_PIXELS` is refused, not allocated.
"""

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import STRIPBYTECOUNTS, STRIPOFFSETS, TILEBYTECOUNTS, TILEOFFSETS, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from schemas.errors import UserError

if TYPE_CHECKING:  # schemas.feature_table imports pyarrow, which decoding does not need
    from schemas.feature_table import Preprocess

MAX_RESIZED_PIXELS = 64_000_000  # an image of 1 × 2,000 pixels at 224 would become 224 × 448,000 before its crop


class BadImage(UserError):
    """The bytes give no pixels. `error` is one of schemas.samples.ERRORS; the text says what was found."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(error, message)
        self.error = error

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image as the tower wants it."""

    pixels: npt.NDArray[np.uint8]  # [preprocess.height, preprocess.width, 3], RGB, C-contiguous, writable
    width: int  # of the image as decoded, after its EXIF orientation, before resizing
    height: int


def format_of(image: bytes) -> str:
    """JPEG, PNG, WebP, GIF, BMP or TIFF, told from the first bytes; raises BadImage for all else."""
    return _format(image)[0]


def decode(image: bytes, preprocess: "Preprocess", max_pixels: int) -> Decoded:
    """The first frame of an encoded JPEG, PNG, WebP, GIF, BMP or TIFF, resized and cropped; raises only BadImage.

    More than `max_pixels` pixels in the header are refused before any is decoded. Above twice Pillow's own
    `Image.MAX_IMAGE_PIXELS` some formats are refused whatever `max_pixels` says. Safe in threads.
    """

    def fitted(name: str, opened: ImageFile) -> Decoded:
        header = _pillow_header(opened) if name == "JPEG" else None
        if header and (decoded := _plain_jpeg(image, header, preprocess)):
            return decoded
        upright = _upright(opened)
        return Decoded(np.array(_fit(upright, preprocess).convert("RGB")), *upright.size)

    def bare() -> Decoded | None:
        header = _bare_header(image) if image.startswith(_JPEG) else None
        if header is None:
            return None
        _check_pixels(header.width, header.height, max_pixels, "JPEG of")
        return _plain_jpeg(image, header, preprocess)

    return _read(image, max_pixels, fitted, bare)


def thumbnail(image: bytes, side: int, max_pixels: int) -> bytes:
    """A JPEG of the first frame, upright, at most `side` pixels wide and high, on white where it is transparent.

    It is never enlarged. What may be in `image`, the limit and the errors are those of `decode`.
    """

    def small(_: str, opened: ImageFile) -> bytes:
        opened.draft("RGB", (side, side))  # a JPEG is reduced while it is decoded, never below this size
        upright = _upright(opened)
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        upright.thumbnail((side, side))
        if upright.mode == "RGBA":
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        stream = io.BytesIO()
        upright.convert("RGB").save(stream, "JPEG", quality=85)
        return stream.getvalue()

    return _read(image, max_pixels, small)


def media_type(image: bytes) -> str:
    """The MIME type that the first bytes tell; raises BadImage where `decode` would not read such a file."""
    return f"image/{_format(image)[0].lower()}"


_Result = TypeVar("_Result")


def _read(
    image: bytes,
    max_pixels: int,
    use: Callable[[str, ImageFile], _Result],
    shortcut: Callable[[], _Result | None] = lambda: None,
) -> _Result:
    """What `shortcut` finds, else what `use` makes of the format's name and the opened, not yet decoded file; raises
    only BadImage."""
    name, opener = _format(image)
    opened: ImageFile | None = None
    try:
        if (found := shortcut()) is not None:
            return found
        with _pillow_silenced():
            if name == "GIF":
                _check_pixels(*_gif_frame(image), max_pixels, "GIF frame of")
            opened = opener(io.BytesIO(image))
            _check_pixels(*opened.size, max_pixels, f"{name} of")
            return use(name, opened)
    except BadImage:
        raise
    except Exception as error:  # on damaged bytes Pillow may raise about anything
        raise _judged(error, name, image, opened) from error


# ------------------------------------------------------------------------------------------------ which format is it

_JPEG = b"\xff\xd8\xff"
_READ: tuple[tuple[bytes, str, type[ImageFile]], ...] = (
    (_JPEG, "JPEG", JpegImageFile),  # of an MPO the first frame
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (b"GIF87a", "GIF", GifImageFile),
    (b"GIF89a", "GIF", GifImageFile),
    (b"II*\0", "TIFF", TiffImageFile),
    (b"MM\0*", "TIFF", TiffImageFile),
    (b"II+\0", "TIFF", TiffImageFile),
    (b"MM\0+", "TIFF", TiffImageFile),
)

_NOT_READ: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "PDF"),
    (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "CUR"),
    (b"icns", "ICNS"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"gimp xcf", "XCF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"SIMPLE  =", "FITS"),
    (b"\x8aMNG", "MNG"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"}
_BMP_HEADER_BYTES = {12, 40, 52, 56, 64, 108, 124}


def _format(image: bytes) -> tuple[str, type[ImageFile]]:
    """The format's name and Pillow's reader for it; raises BadImage for every other kind of bytes."""
    if not image:
        raise BadImage("EmptyImage", "0 bytes")
    for magic, name, opener in _READ:
        if image.startswith(magic):
            return name, opener
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "WebP", WebPImageFile
    if image[:2] == b"BM" and int.from_bytes(image[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP", BmpImageFile
    cut_magic = any(magic.startswith(image) for magic, _, _ in _READ)
    if (cut_magic and len(image) > 1) or (image[:4] == b"RIFF" and len(image) < 12):
        raise BadImage("TruncatedImage", f"only {len(image)} bytes: {image.hex(' ')}")
    if name := _other_format(image):
        raise BadImage("UnsupportedImage", f"{name}, {len(image):,} bytes; JPEG, PNG, WebP, GIF, BMP and TIFF are read")
    raise BadImage("NotAnImage", f"{len(image):,} bytes, {_beginning(image)}")


def _other_format(image: bytes) -> str:
    """The name of an image format that is known but not read, or an empty string."""
    if image[4:8] == b"ftyp":
        brand = image[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    if re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml|<!--|<!DOCTYPE svg|<svg)", image[:256]) and b"<svg" in image[:4096]:
        return "SVG"
    if image[128:132] == b"DICM":
        return "DICOM"
    if re.match(rb"P[1-7]\s", image):
        return "PNM"
    return next((name for magic, name in _NOT_READ if image.startswith(magic)), "")


def _beginning(image: bytes) -> str:
    """What the bytes start with: quoted where it is text, in hex where not."""
    try:
        text = image[:64].decode("utf-8", "strict" if len(image) <= 64 else "ignore").strip()
    except UnicodeDecodeError:
        text = ""
    # "ignore" is there for a character cut in two at the end, not for binary data
    if text and text.encode() in image[:64] and all(c.isprintable() or c.isspace() for c in text):
        return f"starts with {' '.join(text.split())[:40]!r}"
    return f"starts with the bytes {image[:12].hex(' ')}"


# ------------------------------------------------------------------------------------------------ what went wrong


def _check_pixels(width: int, height: int, limit: int, what: str) -> None:
    """Raises BadImage where width × height is above the limit."""
    if width * height > limit:
        found = f"{width} × {height} = {width * height:,} pixels"
        raise BadImage("TooManyPixels", f"{what} {found}; the limit is {limit:,}")


_CUT = re.compile("truncated|unexpected end|end of file", re.IGNORECASE)
_UNREADABLE = re.compile("unsupported|cannot handle|not yet supported|unknown (pixel mode|data)", re.IGNORECASE)
_TIFF_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type


def _judged(error: Exception, name: str, image: bytes, opened: ImageFile | None) -> BadImage:
    """The BadImage that says what Pillow's error means for these bytes."""
    size, reason = f"{len(image):,} bytes", " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("TooManyPixels", f"{name} of {size}: {reason}")
    if missing := _missing(name, image):
        return BadImage("TruncatedImage", f"{name} of {size}: {missing}")
    # While it reads a header, Pillow wraps what it meets at the end of the data in a SyntaxError.
    if opened is None and isinstance(error.__cause__ or error, (EOFError, IndexError, struct.error)):
        return BadImage("TruncatedImage", f"{name} of {size}: it ends before its header does")
    kind = "TruncatedImage" if _CUT.search(reason) else "UnsupportedImage" if _UNREADABLE.search(reason) else ""
    return BadImage(kind or "CorruptImage", f"{name} of {size}: {reason}")


def _missing(name: str, image: bytes) -> str:
    """What shows that the end of the file is missing, where Pillow's error does not tell; else an empty string."""
    promised = 0
    if name == "PNG" and b"IEND" not in image:
        return "it has no IEND chunk"
    if name == "WebP":
        promised = int.from_bytes(image[4:8], "little") + 8
    elif name == "TIFF" and image[2:4] in (b"*\0", b"\0*"):
        try:
            promised = _promised_tiff_bytes(image, "<" if image[:1] == b"I" else ">")
        except struct.error:
            return "its directory is cut"
    return f"its header promises {promised:,}" if promised > len(image) else ""


def _promised_tiff_bytes(image: bytes, order: str) -> int:
    """Where the last value, strip or tile of a TIFF's first directory ends; struct.error where the directory is cut."""
    directory: int = struct.unpack_from(f"{order}L", image, 4)[0]
    n_tags: int = struct.unpack_from(f"{order}H", image, directory)[0]
    tags: dict[int, tuple[int, ...]] = {}
    end = directory + 2 + 12 * n_tags
    for place in range(directory + 2, end, 12):
        tag, kind, count, start = struct.unpack_from(f"{order}HHLL", image, place)
        n_bytes = count * _TIFF_VALUE_BYTES.get(kind, 0)
        end = max(end, start + n_bytes if n_bytes > 4 else 0)
        if tag in (STRIPOFFSETS, TILEOFFSETS, STRIPBYTECOUNTS, TILEBYTECOUNTS) and kind in (3, 4):
            values = f"{order}{count}{'H' if kind == 3 else 'L'}"
            tags[tag] = struct.unpack_from(values, image, start if n_bytes > 4 else place + 8)
    starts = tags.get(STRIPOFFSETS) or tags.get(TILEOFFSETS, ())
    lengths = tags.get(STRIPBYTECOUNTS) or tags.get(TILEBYTECOUNTS, ())
    ends = [start + length for start, length in zip(starts, lengths, strict=False)]
    return max(end, *ends, 0)


_PILLOW_WARNS = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)  # as warnings.filterwarnings would make it
_decoding = 0
_decoding_lock = threading.Lock()


@contextmanager
def _pillow_silenced() -> Iterator[None]:
    """Pillow's warnings (damaged EXIF, odd APNG) are ignored while any thread is in here.

    `warnings.catch_warnings` swaps the process's filters and gets them wrong when threads overlap; the first thread in
    adds one filter to the list and the last one out takes it away.
    """
    global _decoding
    filters = cast("list[Any]", warnings.filters)
    with _decoding_lock:
        _decoding += 1
        if _PILLOW_WARNS not in filters:
            filters.insert(0, _PILLOW_WARNS)
    try:
        yield
    finally:
        with _decoding_lock:
            _decoding -= 1
            if not _decoding:
                with suppress(ValueError):  # somebody else's catch_warnings took it away
                    cast("list[Any]", warnings.filters).remove(_PILLOW_WARNS)


# ------------------------------------------------------------------------------------------------ from file to pixels


def _gif_frame(image: bytes) -> tuple[int, int]:
    """(width, height) of a GIF's first frame, or (0, 0): Pillow may already paint one while it opens the file."""
    place = 13 + (3 << (image[10] & 7) + 1 if image[10] & 0x80 else 0)
    while (block := image[place : place + 1]) not in (b",", b";", b""):
        place += 1
        if block == b"!":  # an extension: its label, then pieces with their lengths, up to an empty one
            place += 1
            while image[place]:
                place += image[place] + 1
            place += 1
    frame: tuple[int, int] = struct.unpack_from("<HH", image, place + 5) if block == b"," else (0, 0)
    return frame


_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(opened: ImageFile) -> Image.Image:
    """The decoded image, turned as its EXIF says, in a mode that open_clip's transform can take."""
    opened.load()
    method = _TRANSPOSES.get(_orientation(opened))
    image = _eight_bit(opened)
    return image if method is None else image.transpose(method)


def _orientation(opened: ImageFile) -> int:
    """The EXIF (or XMP) orientation of a loaded image; 1 where there is none, where it is broken, and in a TIFF, which
    Pillow turns while it loads."""
    try:
        orientation = opened.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # broken EXIF does not make the image bad
        return 1
    return orientation if isinstance(orientation, int) else 1


def _eight_bit(opened: ImageFile) -> Image.Image:
    """The image itself, or 16-bit grey by its high byte as mode L."""
    if opened.mode in ("I", "F"):
        kind = "integer" if opened.mode == "I" else "floating-point"
        raise BadImage("UnsupportedImage", f"{opened.format} of {kind} pixels, which have no defined white")
    if not opened.mode.startswith("I;16"):
        return opened
    twelve_bit = isinstance(opened, TiffImageFile) and opened.tag_v2.get(ExifTag.BitsPerSample) == (12,)
    return Image.fromarray((np.asarray(opened) >> (4 if twelve_bit else 8)).astype(np.uint8))


def _fit(image: Image.Image, preprocess: "Preprocess") -> Image.Image:
    """The image, still in its own mode, at the target's size: open_clip's transform up to its RGB conversion."""
    size, interpolation, fill = _plan((image.height, image.width), preprocess)
    resample = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    return _center_crop_or_pad(_resized(image, size, resample), (preprocess.height, preprocess.width), fill)


def _plan(size: tuple[int, int], preprocess: "Preprocess") -> tuple[tuple[int, int], str, int]:
    """The (height, width) that open_clip resizes `size` to before it cuts out or pads the centre, how, and the fill."""
    target, interpolation = (preprocess.height, preprocess.width), preprocess.interpolation
    if preprocess.resize_mode == "squash":
        return target, interpolation, 0
    if preprocess.resize_mode == "longest":
        return _keep_ratio(size, target, max), interpolation, preprocess.fill_color
    if preprocess.height == preprocess.width:
        return _shortest_edge(size, preprocess.height), interpolation, 0
    return _keep_ratio(size, target, min), "bicubic", 0  # here open_clip does not pass its interpolation on


def _shortest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """(height, width) as torchvision's `Resize(edge)` computes it: the long side is cut, not rounded."""
    height, width = size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _keep_ratio(
    size: tuple[int, int], target: tuple[int, int], pick: Callable[[float, float], float]
) -> tuple[int, int]:
    """(height, width) as open_clip's `ResizeKeepRatio` computes it: rounded, half to even."""
    ratio = pick(size[0] / target[0], size[1] / target[1])
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The image at (height, width); itself where it has that size already."""
    height, width = size
    if image.size == (width, height):
        return image
    _check_pixels(width, height, MAX_RESIZED_PIXELS, f"{image.width} × {image.height} pixels would be resized to")
    return image.resize((width, height), resample)


def _center_crop_or_pad(image: Image.Image, target: tuple[int, int], fill: int) -> Image.Image:
    """The image's centre at (height, width), padded with `fill` in every band where it is smaller."""
    height, width = target
    missing_x, missing_y = max(0, width - image.width), max(0, height - image.height)
    if missing_x or missing_y:
        border = missing_x // 2, missing_y // 2, (missing_x + 1) // 2, (missing_y + 1) // 2
        bands = len(image.getbands())
        image = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


# ------------------------------------------------------------------------------------------------ plain JPEG, fast

_REDUCED_FROM_PIXELS = 500_000  # below, reading a reduced image saves little
_DECODED_AS = {"YCbCr": "RGB", "Gray": "GRAY"}


@dataclass(frozen=True, slots=True)
class _Header:
    """What a JPEG says of itself."""

    width: int  # as stored
    height: int
    colours: str  # in the file: YCbCr or Gray
    orientation: int = 1


# Frame, tables, restart interval, scan, JFIF, comment. What may turn or recolour a picture is in other segments.
_BARE_SEGMENTS = frozenset({0xC0, 0xC2, 0xC4, 0xDB, 0xDD, 0xDA, 0xE0, 0xFE})


def _bare_header(image: bytes) -> _Header | None:
    """The header of a JPEG without EXIF, profile or the like, read without Pillow, which takes 20 times as long."""
    place = 2
    while image[place : place + 1] == b"\xff" and image[place + 1 : place + 2] != b"\xda":
        if image[place + 1] not in _BARE_SEGMENTS:
            return None
        place += 2 + int.from_bytes(image[place + 2 : place + 4])
    if image[place : place + 2] != b"\xff\xda":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except (ValueError, KeyError):  # KeyError: a subsampling without a name
        return None
    return _Header(width, height, colours) if colours in _DECODED_AS else None


def _pillow_header(opened: ImageFile) -> _Header | None:
    colours = {"RGB": "YCbCr", "L": "Gray"}.get(opened.mode)
    return _Header(*opened.size, colours, _orientation(opened)) if colours else None


def _plain_jpeg(image: bytes, header: _Header, preprocess: "Preprocess") -> Decoded | None:
    """The decoded image, or None unless it is YCbCr or grey without any fault: what a faulty file is, Pillow says."""
    orientation = header.orientation
    turned = orientation in (5, 6, 7, 8)
    width, height = (header.height, header.width) if turned else (header.width, header.height)
    size, interpolation, fill = _plan((height, width), preprocess)
    # Without AVX2 torch 2.15 resizes to one column wrongly, by up to 137 grey levels.
    if min(size) < 2 or size[0] * size[1] > MAX_RESIZED_PIXELS:
        return None
    reduction = _reduction((height, width), size)
    pixels = _turbo_pixels(image, header, reduction)
    if pixels is None:
        return None
    if reduction == 1:
        # Turned first: torch resizes the rows first, as Pillow does, and cuts what overshoots in between.
        fitted = _torch_resized(_turned(pixels, orientation), (height, width), size, interpolation)
    else:
        # Resized first: mirrored, the incomplete last row and column would come first.
        there = header.height / reduction, header.width / reduction
        fitted = _turned(_torch_resized(pixels, there, size[::-1] if turned else size, interpolation), orientation)
    return Decoded(_centre(fitted, (preprocess.height, preprocess.width), fill), width, height)


def _reduction(size: tuple[int, int], resized: tuple[int, int]) -> int:
    """By how much to reduce an image while decoding it: it stays at least twice as large as it will be."""
    if size[0] * size[1] < _REDUCED_FROM_PIXELS:
        return 1
    return next((by for by in (8, 4, 2) if all(n >= 2 * by * m for n, m in zip(size, resized, strict=True))), 1)


def _turbo_pixels(image: bytes, header: _Header, reduction: int) -> npt.NDArray[np.uint8] | None:
    """Pixels as stored, [ceil(height / reduction), ceil(width / reduction), 3, or 1 of grey]; None where anything is
    odd: libjpeg's warnings count, and so does a header that Pillow reads in another way."""
    rows, columns = (-(-n // reduction) for n in (header.height, header.width))
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if (width, height, colours) != (header.width, header.height, header.colours):
            return None
        pixels = simplejpeg.decode_jpeg(image, _DECODED_AS[colours], min_height=rows, min_width=columns, min_factor=2)
    except (ValueError, KeyError):  # KeyError: a subsampling without a name
        return None
    return pixels if pixels.shape[:2] == (rows, columns) else None


def _torch_resized(
    pixels: npt.NDArray[np.uint8], true_size: tuple[float, float], size: tuple[int, int], interpolation: str
) -> npt.NDArray[np.uint8]:
    """The pixels at (height, width); `true_size` is what their image measures, in pixels.

    A reduced image ends within its last row and column. Stretching these to the edge as if they were whole would move
    the picture: up to 29 grey levels at 3,999 × 3,001 pixels.
    """
    if true_size == size:
        return pixels
    import torch  # seconds, so only where the first JPEG comes

    # Both sizes cannot be named; 1e-9 keeps the product from falling just below the whole number it is cut to.
    scales = [wanted / there * (1 + 1e-9) for wanted, there in zip(size, true_size, strict=True)]
    # Only with the batch's dimension put in front of the bytes as they lie does torch see that they are interleaved,
    # and gives them back so: putting planes together again took longer than resizing.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        planes,
        scale_factor=scales,
        mode="bilinear" if interpolation == "bilinear" else "bicubic",
        antialias=True,
        recompute_scale_factor=False,
    )
    return cast("npt.NDArray[np.uint8]", resized[0].permute(1, 2, 0).numpy())


_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}  # rows, columns


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """The pixels as their EXIF orientation wants them: mirrored, then transposed."""
    if orientation not in _TRANSPOSES:
        return pixels
    rows, columns = _FLIPS.get(orientation, (1, 1))
    # As whole pixels, which numpy moves twice as fast as bytes.
    whole = np.ascontiguousarray(pixels).view(f"V{pixels.shape[2]}")[::rows, ::columns, 0]
    upright = np.ascontiguousarray(whole.T if orientation in (5, 6, 7, 8) else whole)
    return upright.view(np.uint8).reshape(*upright.shape, pixels.shape[2])


def _centre(pixels: npt.NDArray[np.uint8], target: tuple[int, int], fill: int) -> npt.NDArray[np.uint8]:
    """A copy of the pixels' centre at (height, width) in RGB, padded with `fill` as `_center_crop_or_pad` does it."""
    canvas = np.full((*target, 3), fill, np.uint8)
    (to_y, from_y), (to_x, from_x) = map(_overlap, pixels.shape, target)
    canvas[to_y, to_x] = pixels[from_y, from_x]  # grey goes to every channel
    return canvas


def _overlap(there: int, wanted: int) -> tuple[slice, slice]:
    """Where in `wanted` pixels the centre goes, and which of those that are `there` it is."""
    if there < wanted:
        before = (wanted - there) // 2
        return slice(before, before + there), slice(there)
    first = round((there - wanted) / 2)
    return slice(wanted), slice(first, first + wanted)
