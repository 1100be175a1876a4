"""What a feature table is good for: retrieval, zero-shot classes, probes, and how its two modalities lie in space.

All figures are of a sample that the seed draws; each has its n and an interval, and a difference is claimed only where
its interval excludes zero. Rows of equal pictures are one: they are one item of a gallery, and never on both sides of
a split.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from fusion_core import examples, fusers, labels, metrics
from fusion_core.clock import Clock
from fusion_core.labels import Classes, Truth
from fusion_core.metrics import Doubles, Floats, Ids
from fusion_core.table import Table, to_numpy
from fusion_core.towers import Towers
from schemas.errors import UserError
from schemas.evaluation import (
    Calibration,
    Classification,
    ClassScores,
    Difference,
    EvaluationRecord,
    EvaluationSpec,
    Figure,
    Geometry,
    Histogram,
    Probe,
    Retrieval,
    ZeroShot,
)

Flags = npt.NDArray[np.bool_]

KS = (1, 5, 10)
_CURVE = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_GEOMETRY_PAIRS = 1000  # kernels are quadratic in it
_SHOWN_PAIRS = 300
_BINS = 40
_MOST_CLASSES = 200
_SINGLE = ("image", "text")
_NAMES = ("accuracy", "macro-F1", "macro-recall")


class BadEvaluation(UserError):
    """A table that cannot be evaluated as asked: why, and what would help."""


def evaluate(
    table: Table,
    spec: EvaluationSpec,
    classes: Classes | None = None,
    towers: Callable[[], Towers] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> EvaluationRecord:
    """The figures of a table: of what its rows and the spec allow; `notes` say what was left out.

    `classes` and `towers` (called at most once) are needed for zero-shot classification. Memory is that of the sampled
    rows' vectors, of kernels of 2,000 x 2,000, and of 6 bytes for each labelled row and class of `classes`. Raises
    BadEvaluation, BadLabels, TowerError.
    """
    if spec.folds < 2:
        raise BadEvaluation(f"a cross-validation needs at least 2 folds, not {spec.folds}")
    if spec.seed < 0:
        raise BadEvaluation(f"a seed is a whole number from 0, not {spec.seed}")
    clock = Clock(log, "eval")
    with clock.stage("read"):
        rows = _draw(table, spec)
    notes: list[str] = []
    pairs = np.flatnonzero(rows.has_image & rows.has_text)
    found: dict[str, Any] = {}
    if len(pairs) < 2:
        notes.append(f"{len(pairs)} of the rows have an image and a caption: no retrieval, no geometry")
    else:
        with clock.stage("retrieval"):
            found["retrieval"] = _retrieval(rows, pairs, spec.seed)
        with clock.stage("geometry"):
            found["geometry"] = _geometry(rows, pairs, spec.seed)
    if classes is not None:
        assert towers is not None
        with clock.stage("zero-shot"):
            found["zero_shot"] = _zero_shot(rows, classes, towers(), spec.seed, notes)
    if spec.labels:
        with clock.stage("probes"):
            try:
                found |= _probe(rows, spec, notes, log)
            except BadEvaluation as error:
                if classes is None:  # the labels were asked for nothing else
                    raise
                notes.append(f"no probes: {error}")
    return EvaluationRecord(
        table=table.place,
        table_spec=table.spec,
        table_rows=table.num_rows,
        sampled_rows=len(rows.groups),
        pairs=len(pairs),
        spec=spec,
        notes=tuple(notes),
        seconds=clock.seconds,
        **found,
    )


# --- the sample -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The sampled rows; vectors float32 [n, D] of unit length or zero."""

    image: Floats
    text: Floats
    fused: Floats | None
    has_image: Flags
    has_text: Flags
    groups: Ids  # rows of equal pictures (or, without one, of equal captions) have the same
    captions: Ids  # equal for equal captions
    labels: list[str | None] | None


def _draw(table: Table, spec: EvaluationSpec) -> _Rows:
    truth = Truth(table, spec.labels) if spec.labels else None
    columns = ["key", "shard", "row", "caption", "sha256", "has_image", "has_text", *table.embedding_columns]
    found = table.sample(spec.max_rows, spec.seed, list(dict.fromkeys([*columns, *(truth.columns if truth else ())])))
    if not len(found):
        raise BadEvaluation(f"{table.place} has no rows to evaluate")
    image, text, *fused = (_vectors(table, found, name) for name in table.embedding_columns)
    captions = _numbers(found["caption"])
    digests = examples.picture_digests(found["sha256"], image)  # copies, of imported rows too
    pictures = np.unique(digests, axis=0, return_inverse=True)[1].reshape(-1)
    has_image = found["has_image"].to_numpy()
    return _Rows(
        image,
        text,
        fused[0] if fused else None,
        has_image,
        found["has_text"].to_numpy(),
        np.where(has_image, pictures, -1 - captions),
        captions,
        truth.of(found) if truth else None,
    )


def _vectors(table: Table, rows: pa.Table, column: str) -> Floats:
    matrix = to_numpy(rows[column].combine_chunks())
    broken = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(broken):
        where = rows.select(["shard", "row"]).slice(int(broken[0]), 1).to_pylist()[0]
        raise BadEvaluation(
            f"{table.place}: {column} of row {where['row']} of {where['shard']} is not finite: "
            "see `fusion verify`, and embed the shard again"
        )
    return fusers.normalize(matrix)


def _numbers(column: pa.ChunkedArray) -> Ids:
    """A number for each value of a column; a null is equal to no other row."""
    codes = column.combine_chunks().dictionary_encode().indices
    missing = codes.is_null().to_numpy(zero_copy_only=False)
    numbers: Ids = codes.fill_null(0).to_numpy().astype(np.int64)
    numbers[missing] = len(numbers) + np.arange(missing.sum())
    return numbers


# --- retrieval ------------------------------------------------------------------------------------------------------


def _retrieval(rows: _Rows, pairs: Ids, seed: int) -> tuple[Retrieval, ...]:
    images, image_rows = _distinct(rows.groups[pairs])
    texts, text_rows = _distinct(rows.captions[pairs])
    image, text = rows.image[pairs][image_rows], rows.text[pairs][text_rows]
    return (
        _one_way("text to image", text, image, texts, images, seed),
        _one_way("image to text", image, text, images, texts, seed),
    )


def _distinct(numbers: Ids) -> tuple[Ids, Ids]:
    """Numbers from 0 for the distinct values, and the first row that has each."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return inverse.astype(np.int64), first.astype(np.int64)


def _one_way(direction: Any, queries: Floats, gallery: Floats, query_of: Ids, item_of: Ids, seed: int) -> Retrieval:
    both = np.unique(np.stack([query_of, item_of], axis=1), axis=0)  # the links, by query
    starts = np.searchsorted(both[:, 0], np.arange(len(queries) + 1))
    ranks = metrics.ranks(queries, gallery, starts, both[:, 1])
    values = metrics.per_query(ranks, starts, KS)
    n = len(queries)
    low, high = metrics.bootstrap_means(np.stack(list(values.values()), axis=1), seed)
    figures = {
        name: Figure(float(of.mean()), float(low[i]), float(high[i]), n) for i, (name, of) in enumerate(values.items())
    }
    for k in KS:  # shares of queries: Wilson's interval is right at 0 and 1 as well
        share = figures[f"hit@{k}"].value
        figures[f"hit@{k}"] = Figure(share, *metrics.wilson(share, n), n)
    total = np.diff(starts)
    curve = metrics.per_query(ranks, starts, _CURVE)
    return Retrieval(
        direction,
        queries=n,
        gallery=len(gallery),
        several_relevant=int((total > 1).sum()),
        median_rank=float(np.median(ranks[starts[:-1]])),
        figures=figures,
        curve=tuple((k, float(curve[f"hit@{k}"].mean()), float(curve[f"recall@{k}"].mean())) for k in _CURVE),
        smallest_difference=metrics.smallest_difference(n),
    )


# --- geometry -------------------------------------------------------------------------------------------------------


def _geometry(rows: _Rows, pairs: Ids, seed: int) -> Geometry:
    rng = np.random.default_rng(seed)
    image, text = rows.image[pairs], rows.text[pairs]
    matching = np.einsum("nd,nd->n", image, text)
    other = _mismatched(rows.groups[pairs], rows.captions[pairs], rng)
    mismatched = np.einsum("nd,nd->n", image[other[0]], text[other[1]])
    few = np.sort(rng.permutation(len(pairs))[:_GEOMETRY_PAIRS])
    x, y = image[few], text[few]
    mmd2, chance, p = metrics.mmd2_and_chance(x, y, seed=seed)
    first, second = x.astype(np.float64), y.astype(np.float64)
    accuracy, jsd = _told_apart(x, y, rows.groups[pairs][few], seed)
    relative = metrics.relative_coral(first, second)
    axes = _axes(x, y)
    return Geometry(
        pairs=len(pairs),
        alignment=metrics.alignment(image, text),
        uniformity_image=metrics.uniformity(x),
        uniformity_text=metrics.uniformity(y),
        gap=float(np.linalg.norm(image.mean(axis=0) - text.mean(axis=0))),
        cosine_matching=float(matching.mean()),
        cosine_mismatched=float(mismatched.mean()) if len(mismatched) else None,
        mmd2=mmd2,
        mmd2_chance=chance,
        mmd2_p=p,
        coral=float(metrics.coral(first, second)),
        coral_relative=None if relative is None else float(relative),
        jsd_bits=jsd,
        told_apart=accuracy,
        histogram=_histogram(matching, mismatched),
        projection_image=_points(x[:_SHOWN_PAIRS], axes),
        projection_text=_points(y[:_SHOWN_PAIRS], axes),
    )


def _mismatched(groups: Ids, captions: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Rows for an image and a caption that are not each other's."""
    n = len(groups)
    images, texts = np.tile(np.arange(n), 2), rng.integers(0, n, 2 * n)
    apart = (groups[images] != groups[texts]) & (captions[images] != captions[texts])
    return images[apart], texts[apart]


def _told_apart(x: Floats, y: Floats, groups: Ids, seed: int) -> tuple[float | None, float | None]:
    """How well a linear classifier tells x from y on groups held out: accuracy, and at least how many bits of JSD
    lie between the two distributions for that.
    """
    held = np.isin(groups, np.random.default_rng(seed).permutation(np.unique(groups))[: len(np.unique(groups)) // 2])
    if not (held.any() and (~held).any()):
        return None, None
    data, real = np.concatenate([x, y]), np.repeat([0, 1], len(x))
    test = np.tile(held, 2)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with _unworried():
        model.fit(data[~test], real[~test])
    probabilities = model.predict_proba(data[test])[:, 1]
    loss = metrics.nll(np.log(np.stack([1 - probabilities, probabilities], 1).clip(1e-12)), real[test])
    accuracy = float(((probabilities > 0.5) == real[test]).mean())
    return accuracy, max(0.0, 1 - loss / math.log(2))


def _axes(x: Floats, y: Floats) -> tuple[Doubles, Doubles]:
    """The mean and the two main axes [D, 2] of both together."""
    both = np.concatenate([x, y]).astype(np.float64)
    middle = both.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(both - middle, rowvar=False))
    axes = vectors[:, :-3:-1]
    return middle, axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # the sign is arbitrary: made stable


def _points(x: Floats, axes: tuple[Doubles, Doubles]) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(a), 4), round(float(b), 4)) for a, b in (x - axes[0]) @ axes[1])


def _histogram(matching: Floats, mismatched: Floats) -> Histogram:
    both = np.concatenate([matching, mismatched])
    low, high = float(both.min()), float(both.max())
    high = max(high, low + 1e-3)
    counts = [np.histogram(values, _BINS, (low, high))[0] for values in (matching, mismatched)]
    return Histogram(low, high, *(tuple(map(int, of)) for of in counts))


# --- classification -------------------------------------------------------------------------------------------------


def _zero_shot(rows: _Rows, classes: Classes, towers: Towers, seed: int, notes: list[str]) -> ZeroShot:
    assert rows.labels is not None
    truth, known = labels.class_numbers(rows.labels, classes.names)
    labelled = np.array([label is not None for label in rows.labels]) & rows.has_image
    known &= rows.has_image
    if not known.any():
        some = sorted({label for label in rows.labels if label})[:5]
        raise BadEvaluation(
            f"no row's label is one of the {len(classes.names)} classes: the labels are {', '.join(some) or 'none'}…, "
            f"the classes {', '.join(classes.names[:5])}…"
        )
    if left := int((labelled & ~known).sum()):
        notes.append(f"zero-shot: {left:,} labelled rows are of no class of the list and are left out")
    vectors = labels.class_vectors(towers, classes)
    logits = labels.zero_shot_logits(rows.image[known], vectors, towers.logit_scale)
    truth, groups = truth[known], rows.groups[known]
    result = _classification(classes.names, truth, metrics.predicted(logits, truth), groups, seed)
    if len(classes.names) > 5:
        share = float((metrics.rank_of_truth(logits, truth) <= 5).mean())
        result.figures["top-5"] = Figure(share, *metrics.wilson(share, len(truth)), len(truth))
    half = np.isin(groups, np.unique(groups)[::2])  # pictures are numbered by their hashes, so by lot
    calibration = [_calibration("as the model is", logits, truth, 1.0)]
    if half.any() and (~half).any():
        fitted = metrics.fit_temperature(logits[half], truth[half])
        calibration.append(
            _calibration("temperature fitted on the other half of the rows", logits[~half], truth[~half], fitted)
        )
    return ZeroShot(result, classes.templates, tuple(calibration))


def _classification(names: Sequence[str], truth: Ids, found: Ids, groups: Ids, seed: int) -> Classification:
    counted = metrics.tallies(truth, found, len(names))
    values = metrics.summary(counted).tolist()
    drawn = metrics.bootstrap_summaries(truth, found, len(names), groups, seed)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    figures = {
        name: Figure(value, float(low[i]), float(high[i]), len(truth))
        for i, (name, value) in enumerate(zip(_NAMES, values, strict=True))
    }
    if values[0] in (0.0, 1.0):  # a bootstrap of equal values has no width
        figures["accuracy"] = Figure(values[0], *metrics.wilson(values[0], len(truth)), len(truth))
    rows = np.bincount(truth, minlength=len(names)).tolist()
    scores = np.stack(metrics.class_scores(counted), axis=1).tolist()
    each = (ClassScores(name, n, *of) for name, n, of in zip(names, rows, scores, strict=True))
    cells = tuple(map(tuple, metrics.confusion(truth, found, len(names)).tolist()))
    return Classification(figures, tuple(each), cells=cells)


def _calibration(name: str, logits: Floats | Doubles, truth: Ids, temperature: float) -> Calibration:
    confidence, true, squares = metrics.confidences(logits, truth, temperature)
    right = metrics.predicted(logits, truth) == truth
    rng = np.random.default_rng(0)
    perfect = [  # what a table of such probabilities would show if they were all true
        metrics.expected_calibration_error(confidence, rng.random(len(truth)) < confidence) for _ in range(50)
    ]
    return Calibration(
        name,
        n=len(truth),
        temperature=temperature,
        nll=metrics.nll(logits, truth, temperature),
        brier=float((squares - 2 * true + 1).mean()),
        ece=metrics.expected_calibration_error(confidence, right),
        ece_floor=float(np.mean(perfect)),
        bins=tuple(metrics.reliability(confidence, right)),
    )


# --- probes ---------------------------------------------------------------------------------------------------------


def _classifiers(seed: int) -> dict[str, Callable[[], Any]]:
    return {
        "logistic regression": lambda: make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced")
        ),
        "linear SVM": lambda: make_pipeline(
            StandardScaler(), LinearSVC(class_weight="balanced", random_state=seed, dual=False, C=0.01)
        ),
        "random forest": lambda: RandomForestClassifier(
            100, min_samples_leaf=2, class_weight="balanced", random_state=seed, n_jobs=-1
        ),
    }


def _probe(rows: _Rows, spec: EvaluationSpec, notes: list[str], log: Callable[[str], None]) -> dict[str, Any]:
    chosen, names, truth = _probed(rows, spec, notes)
    groups = rows.groups[chosen]
    features = _features(rows, chosen, notes)
    splitter = StratifiedGroupKFold(spec.folds, shuffle=True, random_state=spec.seed)
    folds = list(splitter.split(np.zeros(len(truth)), truth, groups))
    found: dict[tuple[str, str], Ids] = {}
    chances: dict[str, Doubles] = {}
    for kind, build in {**_classifiers(spec.seed), "most frequent class": DummyClassifier}.items():
        for name, matrix in features.items() if kind != "most frequent class" else [("none", truth[:, None])]:
            probable = kind == "logistic regression"
            guesses, chance = _out_of_fold(build, matrix, truth, folds, len(names) if probable else 0)
            found[kind, name] = guesses
            if probable:
                chances[name] = chance
            log(f"eval: {kind} on {name}: accuracy {(guesses == truth).mean():.3f}")
    if {"image", "text"} <= chances.keys():
        means = (chances["image"] + chances["text"]) / 2
        chances["mean of probabilities"] = means
        found["logistic regression", "mean of probabilities"] = metrics.predicted(means, truth)
    probes = tuple(
        Probe(
            name,
            kind,
            _classification(names, truth, guesses, groups, spec.seed),
            _calibration(f"{kind} on {name}", np.log(chances[name].clip(1e-12)), truth, 1.0)
            if kind == "logistic regression"
            else None,
        )
        for (kind, name), guesses in found.items()
    )
    differences = tuple(_differences(found, truth, groups, len(names), spec.seed))
    return {"probes": probes, "probe_rows": len(truth), "differences": differences}


def _probed(rows: _Rows, spec: EvaluationSpec, notes: list[str]) -> tuple[Ids, list[str], Ids]:
    """The rows that probes see, the classes and each row's class."""
    assert rows.labels is not None
    given = np.array([label is not None for label in rows.labels])
    both = rows.has_image & rows.has_text
    usable = given & (both if (given & both).any() else rows.has_image | rows.has_text)
    chosen = np.flatnonzero(usable)
    if len(chosen) > spec.probe_rows:
        chosen = np.sort(np.random.default_rng(spec.seed).choice(chosen, spec.probe_rows, replace=False))
    values = [str(rows.labels[row]) for row in chosen]
    contents: dict[str, set[int]] = {}
    for label, group in zip(values, rows.groups[chosen].tolist(), strict=True):
        contents.setdefault(label, set()).add(group)
    names = sorted(label for label, groups in contents.items() if len(groups) >= spec.folds)
    if rare := sorted(contents.keys() - set(names)):
        notes.append(
            f"probes: {len(rare)} classes have fewer than {spec.folds} different pictures and are left out: "
            + ", ".join(rare[:10])
            + ("…" if len(rare) > 10 else "")
        )
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise BadEvaluation(
            f"--labels {spec.labels}: {len(names)} classes have {spec.folds} different pictures or more, of "
            f"{int(given.sum()):,} labelled rows in the sample; probes need 2 to {_MOST_CLASSES}"
        )
    truth, kept = labels.class_numbers(values, names)
    return chosen[kept], names, truth[kept]


def _features(rows: _Rows, chosen: Ids, notes: list[str]) -> dict[str, Floats]:
    """The matrices that probes see, by name: of the same rows."""
    features = {}
    if rows.has_image[chosen].any():
        features["image"] = rows.image[chosen]
    if rows.has_text[chosen].any():
        features["text"] = rows.text[chosen]
    if len(features) == 2:
        features["concat"] = np.concatenate([features["image"], features["text"]], axis=1)
        features["sum"] = fusers.normalize(features["image"] + features["text"])
    else:
        notes.append(f"probes: the labelled rows have only one modality: {', '.join(features)}")
    if rows.fused is not None:
        features["fused_embedding"] = rows.fused[chosen]
    return features


def _out_of_fold(
    build: Callable[[], Any], matrix: Any, truth: Ids, folds: Sequence[tuple[Any, Any]], classes: int
) -> tuple[Ids, Doubles]:
    """Each row's class as predicted by a fit without its fold; and the probabilities [n, classes], if asked for."""
    guesses, chances = np.empty(len(truth), np.int64), np.zeros((len(truth), classes))
    for train, test in folds:
        model = build()
        with _unworried():
            model.fit(matrix[train], truth[train])
        if classes:
            chances[np.ix_(test, model.classes_)] = model.predict_proba(matrix[test])
        else:
            guesses[test] = model.predict(matrix[test])
    return (metrics.predicted(chances, truth) if classes else guesses), chances


@contextmanager
def _unworried() -> Iterator[None]:
    """Without the warning that a fit could be a little better yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _differences(
    found: dict[tuple[str, str], Ids], truth: Ids, groups: Ids, classes: int, seed: int
) -> Iterator[Difference]:
    """Each joint feature against the best single modality, by a paired bootstrap over pictures."""
    kinds = dict.fromkeys(kind for kind, name in found if name in _SINGLE)
    for kind in kinds:
        single = [name for name in _SINGLE if (kind, name) in found]
        joint = [name for of, name in found if of == kind and name not in _SINGLE]
        if not joint or len(single) < 2:
            continue
        guesses = {name: found[kind, name] for name in (*single, *joint)}
        values = {name: metrics.summary(metrics.tallies(truth, of, classes)) for name, of in guesses.items()}
        drawn = {name: metrics.bootstrap_summaries(truth, of, classes, groups, seed) for name, of in guesses.items()}
        for name in joint:
            for place in (0, 1):
                best = max(single, key=lambda one, place=place: values[one][place])  # type: ignore[misc]
                low, high = np.percentile(drawn[name][:, place] - drawn[best][:, place], [2.5, 97.5])
                value = float(values[name][place] - values[best][place])
                claimed = bool(low > 0 or high < 0)
                yield Difference(kind, name, best, _NAMES[place], value, float(low), float(high), claimed)
