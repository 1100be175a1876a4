"""The perceptual hash against its float64 definition, and on photographs that were changed."""

import io

import numpy as np
import pytest
from PIL import Image

from fusion_core import images, phash
from tests.corpora import photo


def distance(a: int | None, b: int | None) -> int:
    assert a is not None and b is not None
    return (a ^ b).bit_count()


def hashed(image: Image.Image, format: str = "PNG", **options: object) -> int | None:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return phash.of_image(stream.getvalue(), 10**8)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.open(io.BytesIO(photo(seed, (400, 300), quality=95))) for seed in range(40)]


def test_bits_are_those_of_the_cosine_transform_in_float64() -> None:
    n = np.arange(32)
    waves = np.array([np.cos(np.pi * u * (2 * n + 1) / 64) for u in range(8)])
    for seed in range(200):
        grey = np.random.default_rng(seed).integers(0, 256, (32, 32))
        lowest = (waves @ grey.astype(np.float64) @ waves.T).reshape(-1)
        above = lowest - np.median(lowest)
        found = np.array([phash.of_grey(grey)], np.uint64).view(np.uint8)[::-1]
        clear = np.abs(above) > 1
        assert clear.mean() > 0.95
        assert (np.unpackbits(found)[clear] == (above > 0)[clear]).all()


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_picture_without_anything_to_see_has_no_hash(level: int) -> None:
    faint = np.full((32, 32), level)
    assert phash.of_grey(faint) is None
    faint[3, 4] ^= 1
    assert phash.of_grey(faint) is None
    assert phash.of_grey(np.tile([level, level ^ 8], (32, 16))) is None, "stripes of one pixel are no low frequency"
    assert phash.of_grey(np.repeat([level, level ^ 8], 16) * np.ones((32, 1), int)) is not None


def test_encoded_anew_or_resized_differs_in_few_bits(photos: list[Image.Image]) -> None:
    for picture in photos:
        original = hashed(picture)
        assert distance(original, hashed(picture, "JPEG", quality=40)) <= 4
        assert distance(original, hashed(picture, "WEBP", quality=60)) <= 4
        assert distance(original, hashed(picture.resize((123, 87)), "JPEG")) <= 4
        assert distance(original, hashed(picture.resize((1600, 1200)), "JPEG")) <= 4
        assert distance(original, hashed(picture.convert("L"), "JPEG")) <= 4
        cut = picture.crop((4, 3, 396, 297))  # a hundredth of each side
        assert distance(original, hashed(cut, "JPEG")) <= 16


def test_different_photographs_differ_in_many_bits(photos: list[Image.Image]) -> None:
    hashes = [hashed(picture) for picture in photos]
    distances = [distance(a, b) for number, a in enumerate(hashes) for b in hashes[:number]]
    assert min(distances) > 10
    assert 24 < np.mean(distances) < 36
    assert distance(hashes[0], hashed(photos[0].crop((100, 100, 300, 200)))) > 10, "a quarter is another picture"


def test_what_is_no_picture_says_so() -> None:
    with pytest.raises(images.BadImage, match="starts with"):
        phash.of_image(b"not a picture", 10**8)
