"""Judges a trained fuser on held-out rows, beside the best single modality and the best weighted sum of both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusion_core import decisions, fusers, metrics
from fusion_core.examples import TEST, VALIDATION, Bools, Examples, Floats, Ids
from schemas.fuser import TrainJob

_COMPARED_ROWS = 1_000  # at most, of each modality, whose distances are reported: every row is compared with every row
_JUDGED_AT_ONCE = 1_024  # whose scores for all that they may find are in memory
_RESAMPLES = 2_000
_KS = (1, 5, 10)
_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
_ONE_THREAD_DIM = 256
SIDES = ("image", "text")


@dataclass(frozen=True)
class Report:
    """How a fuser does on held-out rows, beside what it must beat."""

    task: str  # "retrieval" or "labels"
    n: int
    figures: dict[str, dict[str, float]]  # by system, by measure
    best_single: str
    tuned_sum: str
    differences: dict[str, tuple[float, float, float]]  # of the measure, fuser minus each: mean and 95 % interval
    distances: dict[str, float]  # between the modalities: CORAL, MMD², the JSD of what they find

    @property
    def measure(self) -> str:
        """What is compared."""
        return "R@1" if self.task == "retrieval" else "accuracy"

    @property
    def promoted(self) -> bool:
        """Whether the fuser beats the best single modality and the tuned sum for certain."""
        return all(low > 0 for _, low, _ in self.differences.values())


@contextmanager
def few_threads(dim: int) -> Iterator[None]:
    """One thread for small products, which are slower in many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if dim <= _ONE_THREAD_DIM else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ranks(queries: Floats, gallery: Floats, own: Ids) -> Ids:
    """The rank, from 1, of gallery row `own[i]` for query i by inner product; ties count against it.

    A query that is all zero or not finite finds nothing: it ranks last.
    """
    found = np.full(len(queries), len(gallery), np.int64)
    for start in range(0, len(queries), _JUDGED_AT_ONCE):
        some = slice(start, start + _JUDGED_AT_ONCE)
        block = queries[some].astype(np.float32)
        valid = np.isfinite(block).all(axis=1) & block.any(axis=1)
        scores = block @ gallery.astype(np.float32).T
        found[some] = np.where(valid, _ranks(scores, own[some]), len(gallery))
    return found


def _ranks(scores: Floats, own: Ids) -> Ids:
    """The rank of column `own[i]` in row i of the scores."""
    found: Ids = (~(scores < scores[np.arange(len(scores)), own][:, None])).sum(axis=1)
    return found


def contents(examples: Examples, rows: Ids) -> tuple[Ids, Ids]:
    """The rows to be found by these examples, one for each content, and which of them is each example's."""
    own = examples.row[rows]
    _, first, place = np.unique(examples.group[own], return_index=True, return_inverse=True)
    return own[first], place.astype(np.int64)


def retrieved(examples: Examples, rows: Ids, system: fusers.Fuser | str, target: str) -> Ids:
    """The rank, from 1, of what each of these examples is to find, among what all of them are to find.

    `system`: a fuser, or the side that asks alone; `target`: the column that is searched, "image" or "text".
    """
    gallery, own = contents(examples, rows)
    targets = fusers.normalize(examples.targets[gallery])
    if isinstance(system, str):
        return ranks(_alone(examples, rows, system), targets, own)
    if system.spec.space == "own":
        there = np.ones(len(gallery), bool)
        flags = (there, ~there) if target == "image" else (~there, there)
        targets, _ = system.fuse(targets, targets, *flags)
    return ranks(_fused(examples, rows, system), targets, own)


def _alone(examples: Examples, rows: Ids, side: str) -> Floats:
    """The unit vectors of a modality, zeros where it is absent."""
    has = getattr(examples, f"has_{side}")[rows]
    return np.where(has[:, None], fusers.normalize(getattr(examples, side)[rows]), 0)


def ranks_of_sums(examples: Examples, rows: Ids) -> dict[float, Ids]:
    """What `retrieved` gives for each weighted sum: their scores are those of the modalities, weighted and summed, but
    for the length of the sum, which changes no rank. So the products with the gallery are computed once for all.
    """
    gallery, own = contents(examples, rows)
    targets = fusers.normalize(examples.targets[gallery])
    found = {weight: np.empty(len(rows), np.int64) for weight in _WEIGHTS}
    for start in range(0, len(rows), _JUDGED_AT_ONCE):
        some = slice(start, start + _JUDGED_AT_ONCE)
        image, text = (_alone(examples, rows[some], side) @ targets.T for side in SIDES)
        for weight in _WEIGHTS:
            scores = np.float32(weight) * image + np.float32(1 - weight) * text
            found[weight][some] = _ranks(scores, own[some])
    return found


def judge_retrieval(examples: Examples, validation: Ids, test: Ids, fuser: fusers.Fuser, job: TrainJob) -> Report:
    """Each system's queries against the same gallery of whole rows, one for each content."""

    def found(rows: Ids, system: fusers.Fuser | str) -> Ids:
        return retrieved(examples, rows, system, job.target)

    of_sums = ranks_of_sums(examples, validation)
    tuned = max(_WEIGHTS, key=lambda weight: (1 / of_sums[weight]).mean())
    single = max(SIDES, key=lambda side: (1 / found(validation, side)).mean())
    sum_name = f"weighted sum, image {tuned:g}"
    by_system = {f"{side} only": found(test, side) for side in SIDES}
    by_system |= {sum_name: found(test, weighted_sum(tuned, examples.dim)), job.kind: found(test, fuser)}
    figures = {
        name: {**{f"R@{k}": float((place <= k).mean()) for k in _KS}, "MRR": float((1 / place).mean())}
        for name, place in by_system.items()
    }
    group = examples.group[examples.row[test]]
    hits = {name: (place <= 1).astype(np.float64) for name, place in by_system.items()}
    best = f"{single} only"
    gaps = {name: bootstrap(hits[job.kind] - hits[name], group, job.seed) for name in dict.fromkeys((best, sum_name))}
    return Report("retrieval", len(test), figures, best, sum_name, gaps, distances(examples, test, fuser))


def judge_labels(examples: Examples, chosen: Sequence[Ids], fuser: fusers.Fuser, job: TrainJob) -> Report:
    """A linear probe on each system's vectors, fitted on the training rows; and both modalities' probes averaged."""
    labels = [examples.label[examples.row[rows]] for rows in chosen]

    def probed(features: Callable[[Ids], Floats]) -> list[Floats]:
        """Probabilities of validation and test rows; NaN where a row has no vector."""
        given = [features(rows) for rows in chosen]
        there: list[Any] = [some.any(axis=1) for some in given]
        if not there[0].any():  # a modality that no row has: nothing is told
            return [np.full((len(rows), len(examples.classes)), np.nan) for rows in chosen[1:]]
        found = _probe(given[0][there[0]], labels[0][there[0]], given[1:], len(examples.classes), job)
        return [np.where(there[i + 1][:, None], part, np.nan) for i, part in enumerate(found)]

    def accuracy(probabilities: Floats, part: int) -> Floats:
        guess: Ids = np.nan_to_num(probabilities, nan=-1).argmax(axis=1)
        right: Bools = (guess == labels[part]) & ~np.isnan(probabilities).any(axis=1)
        return right.astype(np.float64)

    singles = {side: probed(partial(_alone, examples, side=side)) for side in SIDES}
    halves = [weighted_sum(w, examples.dim) for w in (0.25, 0.5, 0.75)]
    sums = {half.spec.params["image"]: probed(partial(_fused, examples, system=half)) for half in halves}
    sums |= {1.0: singles["image"], 0.0: singles["text"]}
    tuned = max(sums, key=lambda weight: accuracy(sums[weight][0], VALIDATION).mean())
    mixes = {
        w: [decisions.class_probabilities([singles["image"][i], singles["text"][i]], [w, 1 - w]) for i in (0, 1)]
        for w in (0.25, 0.5, 0.75)
    }
    mixed = max(mixes, key=lambda weight: accuracy(mixes[weight][0], VALIDATION).mean())
    single = max(SIDES, key=lambda side: accuracy(singles[side][0], VALIDATION).mean())
    sum_name, best = f"weighted sum, image {tuned:g}", f"{single} only"
    concat = fusers.create("concat", {}, examples.dim)
    by_system = {f"{side} only": singles[side][1] for side in SIDES} | {
        f"probabilities, image {mixed:g}": mixes[mixed][1],
        sum_name: sums[tuned][1],
        "concat": probed(lambda rows: _fused(examples, rows, concat))[1],
        job.kind: probed(lambda rows: _fused(examples, rows, fuser))[1],
    }
    right = {name: accuracy(found, TEST) for name, found in by_system.items()}
    figures = {
        name: {"accuracy": float(right[name].mean()), "macro recall": _macro_recall(right[name], labels[TEST])}
        for name in by_system
    }
    group = examples.group[examples.row[chosen[TEST]]]
    gaps = {name: bootstrap(right[job.kind] - right[name], group, job.seed) for name in dict.fromkeys((best, sum_name))}
    return Report("labels", len(chosen[TEST]), figures, best, sum_name, gaps, distances(examples, chosen[TEST], fuser))


def bootstrap(differences: Floats, group: Any, seed: int) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences, by drawing whole groups (a content and its copies) anew."""
    _, place = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(place, differences), np.bincount(place)
    rng = np.random.default_rng(seed)
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean(differences)), float(low), float(high)


def distances(examples: Examples, rows: Ids, fuser: fusers.Fuser) -> dict[str, float]:
    """How far apart the modalities are, as they come and as the fuser gives each alone, on rows that have both."""
    import torch

    from fusion_core import losses

    both = rows[examples.has_image[rows] & examples.has_text[rows]][:_COMPARED_ROWS]
    if len(both) < 2:
        return {}
    there = np.ones(len(both), bool)
    image, text = examples.image[both], examples.text[both]
    pairs = {
        "columns": (fusers.normalize(image), fusers.normalize(text)),
        "fused": (fuser.fuse(image, text, there, ~there)[0], fuser.fuse(image, text, ~there, there)[0]),
    }
    found: dict[str, float] = {}
    for name, arrays in pairs.items():
        x, y = (array.astype(np.float64) for array in arrays)
        measured = {"CORAL": metrics.coral(x, y), "relative CORAL": metrics.relative_coral(x, y)}
        tensors = torch.from_numpy(x), torch.from_numpy(y)
        measured |= {"MMD²": metrics.mmd2(x, y), "neighbours' JSD": losses.neighbour_jsd(*tensors, torch.cat(tensors))}
        told = {measure: value for measure, value in measured.items() if value is not None}
        found |= {f"{measure} of {name}": float(f"{float(value):.4g}") for measure, value in told.items()}
    return found


def _fused(examples: Examples, rows: Ids, system: fusers.Fuser) -> Floats:
    slots = (examples.image[rows], examples.text[rows], examples.has_image[rows], examples.has_text[rows])
    return system.fuse(*slots)[0]


def weighted_sum(weight: float, dim: int) -> fusers.Fuser:
    """The fuser of this share of the image."""
    return fusers.create("weighted_sum", {"image": weight, "text": 1 - weight}, dim)


def _probe(features: Floats, labels: Ids, others: Sequence[Floats], classes: int, job: TrainJob) -> list[Floats]:
    """The probabilities [n, C] that a logistic regression on features and labels gives to other features."""
    import torch

    with few_threads(features.shape[1]):
        scale = features.shape[1] ** 0.5
        x, y = torch.from_numpy(features * np.float32(scale)), torch.from_numpy(labels)
        weight = torch.zeros(features.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        share = np.maximum(np.bincount(labels, minlength=classes), 1) / len(labels)
        balance = torch.tensor(1 / (share * classes), dtype=torch.float32) if job.class_weights else None
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def cost() -> Any:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weight + bias, y, balance)
            loss = loss + weight.square().sum() / (2 * len(labels))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(cost)  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            return [
                (torch.from_numpy(other * np.float32(scale)) @ weight + bias).softmax(dim=1).numpy() for other in others
            ]


def _macro_recall(right: Floats, labels: Ids) -> float:
    counts = np.bincount(labels)
    return float((np.bincount(labels, right)[counts > 0] / counts[counts > 0]).mean())
