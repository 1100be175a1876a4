"""How much trained fusers find that the best modality and the weighted sum do not, on scenes of unseen pairs.

    python -m infra.bench.fusers [--quick] [--draws 0 1 2] [--tuning]

For each draw, `--scenes` scenes are drawn and described, and again, degraded, in three settings; the shipped small
model embeds them; every kind of fuser is trained by `training.train`, as `fusion train` does. Then a gallery of clean
pictures of 1,000 different scenes is searched by the degraded picture and caption of each, drawn anew. No shape-colour
pair of these occurs in training, neither the fuser's nor the model's.

complementary   the picture blurred, of the caption what is left without colour, shape and size
reliability     of each row: a grey, blurred picture and a good caption; as above; a good picture and a caption of
                another scene. Good: hardly blurred; all but the size
missing         as complementary, with a quarter of the pictures missing, and of the captions of other rows

`sum` is that with equal weights, `tuned sum` that of the best weight on validation rows. `over the sum` and `over
single` are differences of R@1 in points, with the 95 % interval of a paired bootstrap over the queries of all draws.
`whole` is what the fused query could reach were nothing degraded: the clean picture, drawn anew.

What is to be chosen is chosen with `--tuning`, never by the figures: other unseen pairs, which the model has seen.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageFilter

from fusion_core import examples, fusers, judging, manifest, towers, training
from fusion_core.demo import scenes
from fusion_core.demo.scenes import COLOURS, HELD_OUT, PAIRS, SHAPES, Scene
from fusion_core.table import Table
from infra.bench import measure
from infra.bench.vectors import write_unit
from schemas.feature_table import TableSpec
from schemas.fuser import TrainJob

Floats = npt.NDArray[Any]
View = Callable[[Scene, Scene, np.random.Generator], tuple[Image.Image, str]]  # of a scene, beside another

GALLERY = 1000
BLUR_PIXELS, SLIGHT_BLUR_PIXELS, NOISE = 6.0, 1.5, 10.0
MISSING = 0.25
SIDES = ("image", "text")
LEFT_OUT = frozenset({"colour", "shape", "size"})
TUNING_PAIRS = frozenset(zip(SHAPES, (COLOURS[i] for i in (3, 5, 7, 1, 0, 6)), strict=True))
COLUMNS = ("setting", "system", "R@1", "by draw", "R@5", "R@10", "over the sum", "over single", "s", "epochs")


# --- scenes and what is left of them


def some_scenes(
    rng: np.random.Generator, count: int, allowed: frozenset[tuple[str, str]], distinct: bool
) -> list[Scene]:
    """Scenes of these pairs only, in the usual shares of kinds."""
    found: list[Scene] = []
    seen: set[Scene] = set()
    while len(found) < count:
        kind = scenes.KINDS[int(rng.choice(len(scenes.KINDS), p=scenes.KIND_SHARES))]
        scene = scenes.sample_scene(rng, held_out=None, kind=kind)
        while not allowed.issuperset(scene.pairs):
            scene = scenes.sample_scene(rng, held_out=None, kind=kind)
        if not (distinct and scene in seen):
            seen.add(scene)
            found.append(scene)
    return found


def whole(scene: Scene, _: Scene, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """As it is."""
    return scenes.render(scene, rng), scenes.caption(scene, rng).text


def complementary(scene: Scene, _: Scene, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Colours, places and the background's tone in the picture, what else there is in the caption."""
    picture = scenes.render(scene, rng).filter(ImageFilter.GaussianBlur(BLUR_PIXELS))
    return picture, scenes.caption(scene, rng, scene.fields - LEFT_OUT).text


def reliability(scene: Scene, other: Scene, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """One of the two is good, or neither; which is seen from the picture."""
    case = int(rng.integers(3))
    if case == 0:
        grey = scenes.render(scene, rng).convert("L").convert("RGB").filter(ImageFilter.GaussianBlur(BLUR_PIXELS))
        levels = np.asarray(grey, np.float32) + NOISE * rng.standard_normal((*grey.size, 3), np.float32)
        picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
        return picture, scenes.caption(scene, rng, scene.fields - {"size"}).text
    if case == 1:
        return complementary(scene, other, rng)
    picture = scenes.render(scene, rng).filter(ImageFilter.GaussianBlur(SLIGHT_BLUR_PIXELS))
    return picture, scenes.caption(other, rng).text


VIEWS: dict[str, View] = {
    "whole": whole,
    "complementary": complementary,
    "reliability": reliability,
}
SETTINGS = ("complementary", "reliability", "missing")


# --- tables


def write_views(place: Path, found: Sequence[Scene], view: View, model: towers.Towers, seed: Sequence[int]) -> Table:
    """The scenes' pictures and captions, as this view gives them, embedded; a table that stands is taken as it is."""
    if not (place / "manifest").is_dir():
        rng = np.random.default_rng(seed)
        views = [view(scene, found[int(rng.integers(len(found)))], rng) for scene in found]
        pixels = np.stack([np.asarray(picture) for picture, _ in views])
        image = np.concatenate([model.embed_images(pixels[row : row + 256]) for row in range(0, len(pixels), 256)])
        captions = [words for _, words in views]
        write_table(place, image, model.embed_texts(captions), captions, TableSpec(model.spec))
    return Table.open(str(place))


def write_missing(place: Path, views: Table, seed: Sequence[int]) -> Table:
    """The views, a quarter of them without a picture, another quarter without a caption."""
    if not (place / "manifest").is_dir():
        rng = np.random.default_rng(seed)
        share = rng.random(views.num_rows)
        lost = np.stack([share < MISSING, share > 1 - MISSING], axis=1)
        columns = [np.concatenate([some for _, some, _ in views.vectors(f"{side}_embedding")]) for side in SIDES]
        image, text = (np.where(lost[:, [i]], 0, vectors) for i, vectors in enumerate(columns))
        write_table(place, image, text, [""] * len(image), views.spec)
    return Table.open(str(place))


def write_table(place: Path, image: Floats, text: Floats, captions: Sequence[str], spec: TableSpec) -> None:
    """A table of these vectors; every picture is another."""
    columns = {
        "caption": pa.array(captions, pa.string()),
        "sha256": pa.array([hashlib.sha256(vector.tobytes()).digest() for vector in image], pa.binary(32)),
    }
    keys = [f"{row:06d}" for row in range(len(image))]
    write_unit(place, manifest.claim(str(place), spec), 0, keys, image, text, **columns)


class World:
    """The tables of a draw: of the rows that fusers are trained on, and of those that they are judged by."""

    def __init__(self, cache: Path, draw: int, count: int, tuning: bool):
        model = towers.load(towers.DEMO, device="cpu", precision="fp32")
        unseen = TUNING_PAIRS if tuning else HELD_OUT
        allowed = frozenset(PAIRS) - HELD_OUT - unseen
        rng = np.random.default_rng((draw, tuning, count))
        drawn = {
            "train": some_scenes(rng, count, allowed, distinct=False),
            "test": some_scenes(rng, GALLERY, unseen, distinct=True),
        }
        home = cache / "fusers" / f"{'tuning-' if tuning else ''}{draw}-{count}"
        self._tables = {}
        for part, found in drawn.items():
            for number, (name, view) in enumerate([*VIEWS.items(), ("again", whole)][: 3 + (part == "test")]):
                seed = (draw, number, part == "test", tuning)
                self._tables[part, name] = write_views(home / f"{part}-{name}", found, view, model, seed)
            seed = (draw, 99, part == "test", tuning)
            views = self._tables[part, "complementary"]
            self._tables[part, "missing"] = write_missing(home / f"{part}-missing", views, seed)

    def train(self, kind: str, setting: str, job: TrainJob) -> training.Trained:
        """A fuser of this kind, as `fusion train` gives it."""
        return training.train(self._tables["train", "whole"], job, [self._tables["train", setting]])

    def judged(self, setting: str, job: TrainJob) -> examples.Examples:
        """What is asked of the gallery."""
        return examples.gather(self._tables["test", "whole"], job, [self._tables["test", setting]], "", "")


# --- judging


def judge(world: World, setting: str, job: TrainJob, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The ranks of every system's queries, by system, with what training a fuser took."""
    found: dict[str, dict[str, Any]] = {}
    asked = world.judged(setting, job)
    rows = np.arange(len(asked.row))
    single, tuned = "", ""
    for kind in kinds:
        start = time.process_time()
        done = world.train(kind, setting, replace(job, kind=kind))
        took = time.process_time() - start
        single, tuned = done.reports[0].best_single, done.reports[0].tuned_sum
        ranks = judging.retrieved(asked, rows, done.fuser, job.target)
        found[kind] = {"ranks": ranks, "seconds": took, "epochs": done.epochs}
    weight = float(tuned.rpartition(" ")[2])
    sums = {"sum": 0.5, "tuned sum": weight}
    found |= {
        name: {"ranks": judging.retrieved(asked, rows, judging.weighted_sum(w, asked.dim), job.target)}
        for name, w in sums.items()
    }
    found["best single"] = {"ranks": judging.retrieved(asked, rows, single.partition(" ")[0], job.target)}
    again = world.judged("again", job)
    found["whole"] = {"ranks": judging.retrieved(again, np.arange(len(again.row)), "image", job.target)}
    order = ["best single", "sum", "tuned sum", *kinds, "whole"]
    return {name: found[name] for name in order}


def lines_of(setting: str, draws: Sequence[dict[str, dict[str, Any]]], kinds: Sequence[str]) -> list[list[Any]]:
    """The table's lines of a setting."""
    lines = []
    hits = {name: [draw[name]["ranks"] <= 1 for draw in draws] for name in draws[0]}
    for name in draws[0]:
        ranks = np.concatenate([draw[name]["ranks"] for draw in draws])
        recalls = [f"{100 * float((ranks <= k).mean()):.1f}" for k in (1, 5, 10)]
        each = " ".join(f"{100 * float(hit.mean()):.1f}" for hit in hits[name])
        gaps = ["", ""]
        if name in kinds:
            gaps = [points(hits[name], hits[other]) for other in ("tuned sum", "best single")]
        costs = ["", ""]
        if name in kinds:
            costs = [f"{np.mean([draw[name][what] for draw in draws]):.1f}" for what in ("seconds", "epochs")]
        lines.append([setting, name, recalls[0], each, *recalls[1:], *gaps, *costs])
    return lines


def points(ours: Sequence[npt.NDArray[np.bool_]], theirs: Sequence[npt.NDArray[np.bool_]]) -> str:
    """The difference of R@1 over the queries of all draws, in points."""
    gains = np.concatenate(ours).astype(np.float64) - np.concatenate(theirs)
    mean, low, high = (100 * value for value in judging.bootstrap(gains, np.arange(len(gains)), 0))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    """All settings, all draws."""
    parser = measure.arguments("fusers", __doc__, repeats=1)
    parser.add_argument("--scenes", type=int, default=7200, help="of which 70 %% are trained on (default: %(default)s)")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(fusers.TRAINED))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--tuning", action="store_true", help="other unseen pairs, and other draws")
    args: argparse.Namespace = parser.parse_args()
    count, draws = (1200, args.draws[:1]) if args.quick else (args.scenes, args.draws)
    load = measure.Load()
    worlds = [World(args.cache, draw, count, args.tuning) for draw in draws]
    lines, found = [], {}
    for setting in args.settings:
        judged = [
            judge(world, setting, TrainJob(seed=draw), args.kinds) for draw, world in zip(draws, worlds, strict=True)
        ]
        lines += lines_of(setting, judged, args.kinds)
        found[setting] = [{name: float((one["ranks"] <= 1).mean()) for name, one in draw.items()} for draw in judged]
    measure.tell("fusers", args, load, COLUMNS, lines, recall_at_1=found)


if __name__ == "__main__":
    main()
