"""Captioned scenes drawn by rule: every value is known, so what a model reads can be checked attribute by attribute.

A scene is one of three kinds: one object at a position, two to four copies of one object, or two different objects in a
relation. Eight of the 48 shape-colour pairs (`HELD_OUT`) never occur in training.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE_PIXELS = 64
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
COUNTS = (1, 2, 3, 4)
POSITIONS = ("centre", "left", "right", "top", "bottom")
RELATIONS = ("left of", "above")
TONES = ("white", "grey", "black")
PATTERNS = ("plain", "striped", "dotted", "checkered")
HELD_OUT = frozenset(
    {
        ("circle", "red"),
        ("square", "orange"),
        ("triangle", "yellow"),
        ("star", "green"),
        ("ring", "cyan"),
        ("cross", "blue"),
        ("star", "purple"),
        ("square", "pink"),
    }
)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)

RGB = {
    "red": (214, 32, 34),
    "orange": (250, 128, 10),
    "yellow": (246, 222, 32),
    "green": (24, 148, 44),
    "cyan": (30, 208, 216),
    "blue": (32, 60, 216),
    "purple": (124, 30, 164),
    "pink": (250, 132, 186),
}
TONE_LEVELS = {"white": 236, "grey": 128, "black": 22}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "purple": ("purple", "purple", "violet"),
    "circle": ("circle", "circle", "disc"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus sign"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "grey": ("grey", "grey", "gray"),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLACES = {
    "centre": ("in the centre", "in the middle", "in the center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
}
RELATION_WORDS = {"left of": ("left of", "to the left of"), "above": ("above", "over")}
INVERSE_WORDS = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "an image of ", "there is ")

CENTRES = {"centre": (0.5, 0.5), "left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
CELLS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
RADIUS = {"small": (0.125, 0.145), "large": (0.205, 0.235)}
SUPERSAMPLING = 2
PIXEL_NOISE = 3.0


@dataclass(frozen=True)
class Scene:
    """What is drawn; `position` is empty unless one object stands alone, the last three are empty without a second object."""

    shape: str
    colour: str
    size: str
    count: int
    position: str
    tone: str
    pattern: str
    relation: str = ""
    other_shape: str = ""
    other_colour: str = ""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The shape-colour pairs in the scene."""
        first = (self.shape, self.colour)
        return (first, (self.other_shape, self.other_colour)) if self.relation else (first,)


class Caption(NamedTuple):
    """A caption and the fields of its scene that it speaks of."""

    text: str
    fields: frozenset[str]


OBJECT_FIELDS = ("shape", "colour", "size")


def sample_scene(rng: np.random.Generator, *, held_out: bool | None = False, kind: str | None = None) -> Scene:
    """A random scene of training pairs, of held-out pairs only (`held_out=True`) or of any pair (`None`).

    `kind` is "single", "group" or "relation"; random (40, 30, 30 %) when not given.
    """
    kind = kind or ("single", "group", "relation")[int(rng.choice(3, p=(0.4, 0.3, 0.3)))]
    allowed = [pair for pair in PAIRS if held_out is None or (pair in HELD_OUT) == held_out]
    shape, colour = _pick(rng, allowed)
    scene = Scene(
        shape=shape,
        colour=colour,
        size=_pick(rng, SIZES),
        count=_pick(rng, COUNTS[1:]) if kind == "group" else 1,
        position=_pick(rng, POSITIONS) if kind == "single" else "",
        tone=_pick(rng, TONES),
        pattern=_pick(rng, PATTERNS),
    )
    return _with_other(scene, rng, allowed) if kind == "relation" else scene


def _with_other(scene: Scene, rng: np.random.Generator, allowed: Iterable[tuple[str, str]]) -> Scene:
    others = [pair for pair in allowed if pair[0] != scene.shape and pair[1] != scene.colour]
    shape, colour = _pick(rng, others)
    fields = scene.__dict__ | {"relation": _pick(rng, RELATIONS), "other_shape": shape, "other_colour": colour}
    return Scene(**fields)


def _pick[T](rng: np.random.Generator, choices: list[T] | tuple[T, ...]) -> T:
    return choices[int(rng.integers(len(choices)))]
