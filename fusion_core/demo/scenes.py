"""Captioned scenes drawn by rule: every value is known, so what a model reads can be checked attribute by attribute.

A scene is one of three kinds: one object at a position, two to four copies of one object, or two different objects in a
relation. Eight of the 48 shape-colour pairs (`HELD_OUT`) never occur in training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

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
ALLOWED = {
    False: [pair for pair in PAIRS if pair not in HELD_OUT],
    True: sorted(HELD_OUT),
    None: list(PAIRS),
}
KINDS = ("single", "group", "relation")
KIND_SHARES = (0.4, 0.3, 0.3)

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
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "an image of ")

CENTRES = {"centre": (0.5, 0.5), "left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
CELLS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
RADIUS = {"small": (0.125, 0.145), "large": (0.205, 0.235)}
SUPERSAMPLING = 2
PIXEL_NOISE = 3.0


FIELDS = frozenset({"shape", "colour", "size", "count", "position", "tone", "pattern", "relation"})
VALUES: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "count": COUNTS[1:],
    "position": POSITIONS,
    "tone": TONES,
    "pattern": PATTERNS,
    "relation": RELATIONS,
}
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Scene:
    """What is drawn; `position` is empty unless one object stands alone, the last three unless there are two."""

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

    @property
    def fields(self) -> frozenset[str]:
        """The fields that a full caption of this scene speaks of."""
        absent = {name for name in ("position", "relation") if not getattr(self, name)}
        return FIELDS - absent


class Caption(NamedTuple):
    """A caption and the fields of its scene that it speaks of."""

    text: str
    fields: frozenset[str]


# ---------------------------------------------------------------------------------------------------------- sampling


def sample_scene(rng: np.random.Generator, *, held_out: bool | None = False, kind: str | None = None) -> Scene:
    """A random scene of training pairs, of held-out pairs only (`held_out=True`) or of any pair (`None`).

    `kind` is "single", "group" (two to four copies) or "relation" (two objects); 40, 30 and 30 % when not given.
    """
    kind = kind or KINDS[int(rng.choice(len(KINDS), p=KIND_SHARES))]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    allowed = ALLOWED[held_out]
    shape, colour = _pick(rng, allowed)
    values: dict[str, Any] = {
        "shape": shape,
        "colour": colour,
        "size": _pick(rng, SIZES),
        "count": _pick(rng, COUNTS[1:]) if kind == "group" else 1,
        "position": _pick(rng, POSITIONS) if kind == "single" else "",
        "tone": _pick(rng, TONES),
        "pattern": _pick(rng, PATTERNS),
    }
    if kind == "relation":
        other = _pick(rng, [pair for pair in allowed if pair[0] != shape and pair[1] != colour])
        values |= {"relation": _pick(rng, RELATIONS), "other_shape": other[0], "other_colour": other[1]}
    return Scene(**values)


def variant(scene: Scene, rng: np.random.Generator) -> Scene:
    """A training scene of the same kind that differs in one value, or in which two objects have changed places."""
    names = sorted(scene.fields - (set() if scene.count > 1 else {"count"}))
    if scene.relation:
        names += ["other_shape", "other_colour", "places"]
    while True:
        changed = _changed(scene, _pick(rng, names), rng)
        distinct = changed.shape != changed.other_shape and changed.colour != changed.other_colour
        if distinct and not HELD_OUT.intersection(changed.pairs):
            return changed


def _changed(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    if name == "places":
        return replace(
            scene,
            shape=scene.other_shape,
            colour=scene.other_colour,
            other_shape=scene.shape,
            other_colour=scene.colour,
        )
    choices = [value for value in VALUES[name.removeprefix("other_")] if value != getattr(scene, name)]
    return replace(scene, **{name: _pick(rng, choices)})


def _pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]


# ---------------------------------------------------------------------------------------------------------- captions


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Four captions in different words: two that name everything, then two that leave some of it out."""
    partial = [some_fields(scene, rng) for _ in range(2)]
    return [caption(scene, rng, fields).text for fields in (scene.fields, scene.fields, *partial)]


def some_fields(scene: Scene, rng: np.random.Generator) -> frozenset[str]:
    """A random, never empty choice of the fields that a caption of this scene may speak of."""
    names = sorted(scene.fields)
    share = rng.uniform(0.1, 0.9)
    chosen = frozenset(name for name in names if rng.random() < share)
    return chosen or frozenset({_pick(rng, names)})


def caption(scene: Scene, rng: np.random.Generator, fields: frozenset[str] | None = None) -> Caption:
    """A caption that names the given fields (all when not given) in random words, with the fields it really names."""
    fields = scene.fields if fields is None else fields & scene.fields
    subject = _two_objects(scene, rng, fields) if scene.relation else _one_kind(scene, rng, fields)
    background = _background(scene, rng, fields)
    place = _pick(rng, PLACES[scene.position]) if "position" in fields else ""
    text = _sentence(rng, subject, place, background)
    named = fields | {"count"} if scene.count == 1 else fields
    return Caption(text, named)


def _sentence(rng: np.random.Generator, subject: str, place: str, background: str) -> str:
    draw = rng.random()
    if background and draw < 0.2:
        return f"{_article(background)} background with {' '.join(filter(None, (subject, place)))}"
    if place and draw < 0.35:
        lead = f"{place}, {subject}"
    else:
        lead = _pick(rng, PREFIXES) + " ".join(filter(None, (subject, place)))
    if not background:
        return lead
    if draw > 0.85:
        return f"{lead}, {background} background"
    return f"{lead} {'on' if draw < 0.6 else 'against'} {_article(background)} background"


def _background(scene: Scene, rng: np.random.Generator, fields: frozenset[str]) -> str:
    words = [_word(rng, getattr(scene, name)) for name in ("pattern", "tone") if name in fields]
    return " ".join(words)


def _one_kind(scene: Scene, rng: np.random.Generator, fields: frozenset[str]) -> str:
    if scene.count == 1:
        phrase = _noun_phrase(scene.shape, scene.colour, scene.size, rng, fields)
        return f"one {phrase}" if rng.random() < 0.25 else _article(phrase)
    phrase = _noun_phrase(scene.shape, scene.colour, scene.size, rng, fields, plural=True)
    return f"{NUMBERS[scene.count]} {phrase}" if "count" in fields else phrase


def _two_objects(scene: Scene, rng: np.random.Generator, fields: frozenset[str]) -> str:
    if not fields & {"shape", "colour", "relation"}:
        return f"two {_noun_phrase('', '', scene.size, rng, fields, plural=True)}"
    size = _word(rng, scene.size)
    first = _article(_noun_phrase(scene.shape, scene.colour, size, rng, fields))
    second = _article(_noun_phrase(scene.other_shape, scene.other_colour, size, rng, fields))
    swapped = rng.random() < 0.5
    if swapped:
        first, second = second, first
    if "relation" not in fields:
        return f"{first} and {second}"
    words = INVERSE_WORDS if swapped else RELATION_WORDS
    return f"{first} {_pick(rng, words[scene.relation])} {second}"


def _noun_phrase(
    shape: str, colour: str, size: str, rng: np.random.Generator, fields: frozenset[str], plural: bool = False
) -> str:
    noun = _word(rng, shape) if "shape" in fields else _pick(rng, ("object", "shape"))
    if plural:
        noun += "es" if noun.endswith("s") else "s"
    adjectives = [_word(rng, value) for name, value in (("size", size), ("colour", colour)) if name in fields]
    return " ".join((*adjectives, noun))


def _word(rng: np.random.Generator, value: str) -> str:
    return _pick(rng, SYNONYMS.get(value, (value,)))


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# ----------------------------------------------------------------------------------------------------------- drawing


def render(scene: Scene, rng: np.random.Generator, pixels: int = IMAGE_PIXELS) -> Image.Image:
    """The scene as a square RGB picture of `pixels` a side; places, angles, shades and noise are random."""
    side = pixels * SUPERSAMPLING
    image = Image.new("RGB", (side, side), _shade(rng, (TONE_LEVELS[scene.tone],) * 3, 6))
    canvas = ImageDraw.Draw(image)
    _draw_pattern(canvas, scene, rng, side)
    kinds = [(scene.shape, scene.colour)] * scene.count + list(scene.pairs[1:])
    for (shape, colour), centre in zip(kinds, _centres(scene, rng), strict=True):
        radius = rng.uniform(*RADIUS[scene.size]) * side
        ink = _shade(rng, RGB[colour], 12)
        _draw_shape(canvas, shape, (centre[0] * side, centre[1] * side), radius, ink, rng.uniform(-0.2, 0.2))
    drawn = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    noisy = drawn + rng.standard_normal(drawn.shape, dtype=np.float32) * PIXEL_NOISE
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _shade(rng: np.random.Generator, colour: tuple[int, int, int], spread: int) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(level + rng.integers(-spread, spread + 1), 0, 255)) for level in colour)
    return red, green, blue


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    if scene.relation:
        spots = [(0.25, 0.5), (0.75, 0.5)] if scene.relation == "left of" else [(0.5, 0.25), (0.5, 0.75)]
    elif scene.count == 1:
        spots = [CENTRES[scene.position]]
    else:
        spots = [CELLS[int(cell)] for cell in rng.permutation(len(CELLS))[: scene.count]]
    slack = 0.235 - RADIUS[scene.size][1] + 0.01
    return [(x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack)) for x, y in spots]


def _draw_pattern(canvas: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator, side: int) -> None:
    level = TONE_LEVELS[scene.tone]
    ink = _shade(rng, (level + (-44 if level > 100 else 44),) * 3, 6)
    step = side / 8 * rng.uniform(0.9, 1.1)
    starts_x = np.arange(-step * rng.random(), side, step)
    starts_y = np.arange(-step * rng.random(), side, step)
    if scene.pattern == "striped":
        for y in starts_y:
            canvas.rectangle((0, y, side, y + step * 0.45), fill=ink)
    elif scene.pattern == "dotted":
        for x, y in ((x, y) for x in starts_x for y in starts_y):
            canvas.ellipse((x, y, x + step * 0.5, y + step * 0.5), fill=ink)
    elif scene.pattern == "checkered":
        for i, x in enumerate(starts_x):
            for y in starts_y[i % 2 :: 2]:
                canvas.rectangle((x, y, x + step, y + step), fill=ink)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    ink: tuple[int, int, int],
    angle: float,
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=ink)
    elif shape == "ring":
        canvas.ellipse(box, outline=ink, width=max(2, round(radius * 0.36)))
    else:
        canvas.polygon(_corners(OUTLINES[shape], centre, radius, angle), fill=ink)


def _corners(
    outline: Sequence[tuple[float, float]], centre: tuple[float, float], radius: float, angle: float
) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in outline]


def _regular(corners: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return [(math.cos(t) * radii[i % len(radii)], math.sin(t) * radii[i % len(radii)]) for i, t in enumerate(turns)]


_ARM = 0.32
_REACH = 0.98
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": _regular(3, (1.08,)),
    "star": _regular(10, (1.08, 0.44)),
    "cross": [
        (-_ARM, -_REACH), (_ARM, -_REACH), (_ARM, -_ARM), (_REACH, -_ARM), (_REACH, _ARM), (_ARM, _ARM),
        (_ARM, _REACH), (-_ARM, _REACH), (-_ARM, _ARM), (-_REACH, _ARM), (-_REACH, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
