"""Trains a fuser on the frozen columns of a feature table, and tells whether it is worth having.

What there is to learn from: degraded views (a table of the same keys, whose rows should find the whole ones), triplets
(an image and a text that ask for a third row), or labels. Rows are split by the content of their pictures, so that
copies never straddle; everything that is reported is of rows that were not trained on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import numpy as np

from fusion_core import files, fusers, metrics
from fusion_core.examples import TEST, TRAIN, VALIDATION, Bools, Examples, Floats, Ids, TrainError, gather
from fusion_core.judging import SIDES, Report, contents, few_threads, judge_labels, judge_retrieval, ranks
from fusion_core.table import Table
from schemas import records
from schemas.fuser import FuserRecord, TrainJob

LEAST_CONTENTS = 50  # for each of training, validation and test

# Of a training that is not told how many: 10,000 rows have 500 steps in 25 epochs; a million would have 34,000, of
# which the first thousands bring what there is to learn.
_EPOCHS, _STEPS, _MOST_STEPS = 25, 500, 5_000
_JUDGED_ROWS = 10_000  # at most, of validation and of test: every query is compared with every row
_PROBED_ROWS = 50_000  # at most, that a linear probe is fitted to
_WATCHED_ROWS = 2_000  # at most, after each epoch


@dataclass(frozen=True)
class Trained:
    """A fuser and how it came about."""

    fuser: fusers.Fuser
    reports: tuple[Report, ...]
    rows: dict[str, int]  # "table", "used", "train", "validation", "test"
    epochs: int

    @property
    def promoted(self) -> bool:
        """Whether it is on every task."""
        return all(report.promoted for report in self.reports)


def train(
    table: Table,
    job: TrainJob,
    views: Sequence[Table] = (),
    triplets: str = "",
    labels: str = "",
    device: str = "cpu",
    epoch: Callable[[int, int, float, float], None] = lambda n, of, loss, score: None,
) -> Trained:
    """Trains a fuser of `table`'s embeddings and judges it on held-out rows; `epoch` hears of each epoch's end.

    `views`: tables whose rows are degraded forms of the rows of the same key. `triplets`: a file of keys. `labels`: a
    column (`meta.NAME` for a field of the sidecar), or a file of key and label. Raises TrainError.
    """
    check_job(job)
    examples = gather(table, job, views, triplets, labels)
    parts = examples.split(job.seed)
    usable = examples.has_image | examples.has_text
    usable &= examples.has_target[examples.row] if examples.contrastive else examples.label[examples.row] >= 0
    chosen = [np.flatnonzero((parts == part) & usable) for part in (TRAIN, VALIDATION, TEST)]
    counts = dict(zip(("train", "validation", "test"), map(len, chosen), strict=True))
    _check_enough(examples, dict(zip(counts, chosen, strict=True)), "rows")
    labelled = [rows[examples.label[examples.row[rows]] >= 0] for rows in chosen]
    if examples.classes:
        _check_enough(examples, dict(zip(counts, labelled, strict=True)), "rows with a label")
    net, epochs = fit(examples, chosen[TRAIN], chosen[VALIDATION], job, device, epoch)
    fuser = fusers.trained(job.kind, examples.dim, _params(job, examples.dim), net, table.spec.backbone)
    judged = [_some(rows, _JUDGED_ROWS, job.seed) for rows in chosen]
    reports = []
    if examples.contrastive:
        reports.append(judge_retrieval(examples, judged[VALIDATION], judged[TEST], fuser, job))
    if examples.classes:
        most = (_PROBED_ROWS, _JUDGED_ROWS, _JUDGED_ROWS)
        some = [_some(rows, n, job.seed) for rows, n in zip(labelled, most, strict=True)]
        reports.append(judge_labels(examples, some, fuser, job))
    used = {"table": table.num_rows, "used": len(examples.targets), **counts}
    done = Trained(fuser, tuple(reports), used, epochs)
    told = {
        "table": table.place,
        "table_fingerprint": table.spec.fingerprint,
        "parts": records.fingerprint([part.sha256 for part in table.parts]),
        "supervision": examples.told,
        "rows": msgspec.json.encode(used).decode(),
        "split": f"by content hash, 70/10/20 %, seed {job.seed}",
        "objective": msgspec.json.encode(asdict(job)).decode(),
        "epochs": str(epochs),
    }
    named = fusers.with_record(fuser, trained_on=told, metrics=_metrics(reports), promoted=done.promoted)
    return replace(done, fuser=named)


def _metrics(reports: Sequence[Report]) -> dict[str, float]:
    """The reports' numbers by path, as a fuser's record holds them."""
    found: dict[str, float] = {}
    for report in reports:
        for system, named in report.figures.items():
            found |= {f"{report.task}/{system}/{name}": round(value, 6) for name, value in named.items()}
        for against, values in report.differences.items():
            path = f"{report.task}/{report.measure} minus {against}"
            found |= {f"{path}/{name}": round(v, 6) for name, v in zip(("mean", "low", "high"), values, strict=True)}
        found |= {f"{report.task}/distance/{name}": value for name, value in report.distances.items()}
    return found


@dataclass(frozen=True)
class System:
    """A row of a comparison."""

    name: str
    figures: list[float]  # by measure
    differences: dict[str, str]  # of R@1, by what is beaten or not: points with their interval
    verdict: str  # "promoted", "not promoted"; empty of what is not trained


@dataclass(frozen=True)
class Comparison:
    """Fusers beside each other and what they must beat, on the same held-out rows."""

    n: int
    measures: list[str]
    systems: list[System]


def compare(records: Sequence[FuserRecord]) -> Comparison:
    """What the records of fusers tell of retrieval that were trained with the same rows, views and seed.

    Raises ValueError where they were not, or not for retrieval.
    """
    told = [{name: record.trained_on.get(name, "") for name in ("parts", "supervision", "rows")} for record in records]
    if not records or any(one != told[0] for one in told) or not told[0]["rows"]:
        raise ValueError(f"expected fusers that were trained with the same rows, not {told}")
    figures: dict[str, dict[str, float]] = {}
    gaps: dict[str, dict[str, dict[str, float]]] = {}
    verdicts = {}
    for record in records:
        verdicts[record.spec.type] = "promoted" if record.promoted else "not promoted"
        for path, value in record.metrics.items():
            task, system, measure = path.split("/")
            if task != "retrieval" or system == "distance":
                continue
            measured, minus, against = system.partition(" minus ")
            if minus and measured == "R@1":
                gaps.setdefault(record.spec.type, {}).setdefault(against, {})[measure] = value
            else:
                figures.setdefault(system, {})[measure] = value
    if not figures:
        raise ValueError("expected fusers that were trained for retrieval")
    measures = list(next(iter(figures.values())))
    systems = [
        System(
            name,
            [named[measure] for measure in measures],
            {against: _points(*gap.values()) for against, gap in gaps.get(name, {}).items()},
            verdicts.get(name, ""),
        )
        for name, named in sorted(figures.items(), key=lambda item: item[0] in verdicts)
    ]
    return Comparison(msgspec.json.decode(told[0]["rows"])["test"], measures, systems)


def describe_together(records: Sequence[FuserRecord]) -> str:
    """`compare` as a table of text."""
    found = compare(records)
    width = max(len(system.name) for system in found.systems)
    lines = [f"{f'n={found.n:,}':<{width}}" + "".join(f"{name:>8}" for name in found.measures)]
    for system in found.systems:
        gaps = "; ".join(f"{gap} over {against}" for against, gap in system.differences.items())
        figures = "".join(f"{100 * value:>8.1f}" for value in system.figures)
        lines.append(f"{system.name:<{width}}{figures}" + (f"  {system.verdict}: {gaps}" if gaps else ""))
    lines.append("in per cent; differences of R@1 in points with the 95 % interval of a paired bootstrap")
    return "\n".join(lines)


def _points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def check_job(job: TrainJob) -> None:
    """Raises TrainError for a job that cannot be done."""
    if job.kind not in fusers.TRAINED:
        raise TrainError(f"no trained fuser {job.kind!r}; there are {', '.join(fusers.TRAINED)}")
    for name, known in (("target", SIDES), ("loss", ("info_nce", "siglip"))):
        if getattr(job, name) not in known:
            raise TrainError(f"{name} must be one of {', '.join(known)}, not {getattr(job, name)!r}")
    for name in ("label_weight", "coral", "mmd", "jsd", "logit_adjustment", "weight_decay"):
        if not 0 <= getattr(job, name) < math.inf:
            raise TrainError(f"{name} must be a number from 0 on, not {getattr(job, name)}")
    if job.modality_dropout is not None and not 0 <= job.modality_dropout < 1:
        raise TrainError(f"modality_dropout must lie from 0 to below 1, not {job.modality_dropout}")
    if job.seed < 0:
        raise TrainError(f"seed must be a number from 0 on, not {job.seed}")
    for name, least in (("epochs", 0), ("patience", 0), ("max_rows", 1)):
        if getattr(job, name) < least:
            raise TrainError(f"{name} must be at least {least}, not {getattr(job, name)}")
    if job.batch_rows < 2 or not 0 < job.learning_rate < math.inf:
        raise TrainError(f"expected 2 rows in a batch and a learning rate above 0, not {job}")


def _check_enough(examples: Examples, chosen: dict[str, Ids], of: str) -> None:
    """Raises TrainError where a part has too little in it: copies of a picture tell no more than one of them."""
    contents = {part: len(np.unique(examples.group[examples.row[rows]])) for part, rows in chosen.items()}
    if min(contents.values()) < LEAST_CONTENTS:
        found = ", ".join(f"{count:,} in {part}" for part, count in contents.items())
        raise TrainError(
            f"{of}, copies of a picture counted once: {found}: at least {LEAST_CONTENTS} of each are needed: add more, "
            "of different content"
        )


def check_output(place: str) -> None:
    """Raises TrainError where a fuser's folder would get among other files, OSError where none can be written."""
    strangers = [entry.place for entry in files.list_files(place)]
    if strangers and files.stat(files.join(place, fusers.RECORD)) is None:
        raise TrainError(f"{place} holds files but no {fusers.RECORD} (e.g. {strangers[0]}): name an empty folder")
    with files.PendingFile(place):  # discarded: it tells before the training what would be told after it
        pass


def _some(rows: Ids, most: int, seed: int) -> Ids:
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _params(job: TrainJob, dim: int) -> dict[str, float]:
    from fusion_core import fuser_nets

    params = fuser_nets.defaults(job.kind, dim)
    if wrong := fuser_nets.wrong_params(job.kind, dim, params):
        raise TrainError(f"a fuser {job.kind} has {wrong}")
    return params


def fit(
    examples: Examples,
    train_rows: Ids,
    watched_rows: Ids,
    job: TrainJob,
    device: str,
    epoch: Callable[[int, int, float, float], None],
) -> tuple[Any, int]:
    """The network (on the CPU) of the best epoch by validation, and how many epochs there were."""
    import torch

    from fusion_core import fuser_nets

    with torch.random.fork_rng([] if device == "cpu" else None), few_threads(examples.dim):
        torch.manual_seed(job.seed)
        net = fuser_nets.build(job.kind, examples.dim, _params(job, examples.dim)).to(device)
        objective = _Objective(examples, train_rows, job, device)
        learned = [*net.parameters(), *objective.parameters()]
        matrices = [p for p in learned if p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": job.weight_decay},
             {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0}],
            lr=job.learning_rate, fused=True,
        )  # fmt: skip
        batches = max(1, len(train_rows) // job.batch_rows)
        epochs = job.epochs or max(min(_EPOCHS, -(-_MOST_STEPS // batches)), -(-_STEPS // batches))
        patience = job.patience or max(1, epochs // 4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        rng = np.random.default_rng(job.seed)
        watched = _some(watched_rows, _WATCHED_ROWS, job.seed)
        best, best_score, since, done = net.state_dict(), -math.inf, 0, 0
        for done in range(1, epochs + 1):
            total = 0.0
            for rows in np.array_split(rng.permutation(train_rows), batches):
                loss = objective.loss(net, rows, rng)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            score = objective.score(net, watched)
            epoch(done, epochs, total / batches, score)
            since += 1
            if score > best_score:
                best, best_score, since = {k: v.detach().clone() for k, v in net.state_dict().items()}, score, 0
            if since >= patience:
                break
        net.load_state_dict(best)
        return net.to("cpu").eval(), done


class _Objective:
    """What a batch costs, and how good a network is on rows that it is not trained on."""

    def __init__(self, examples: Examples, train_rows: Ids, job: TrainJob, device: str):
        import torch

        self._examples, self._job, self._device = examples, job, device
        start = (10.0, -10.0) if job.loss == "siglip" else (1 / 0.07, 0.0)
        self._log_scale = torch.nn.Parameter(torch.tensor(math.log(start[0]), device=device))
        self._bias = torch.nn.Parameter(torch.tensor(start[1], device=device))
        lacking = not (examples.has_image.all() and examples.has_text.all())
        self._dropout = (0.2 if lacking else 0.0) if job.modality_dropout is None else job.modality_dropout
        self._head: Any = None
        if examples.classes:
            self._head = torch.nn.Linear(examples.dim, len(examples.classes), device=device)
            counts = np.bincount(_known(examples.label[examples.row[train_rows]]), minlength=len(examples.classes))
            share = torch.tensor(np.maximum(counts, 1) / max(1, counts.sum()), dtype=torch.float32, device=device)
            self._log_share = share.log()
            self._class_weights = 1 / (share * len(examples.classes)) if job.class_weights else None

    def parameters(self) -> list[Any]:
        """What is learned beside the network."""
        found = [self._log_scale] if self._examples.contrastive else []
        found += [self._bias] if self._examples.contrastive and self._job.loss == "siglip" else []
        return found + (list(self._head.parameters()) if self._head is not None else [])

    def loss(self, net: Any, rows: Ids, rng: np.random.Generator) -> Any:
        """The loss of a batch of examples."""
        import torch

        from fusion_core import losses

        job, examples = self._job, self._examples
        has = [examples.has_image[rows], examples.has_text[rows]]
        if self._dropout:
            both, side = has[0] & has[1], rng.random(len(rows)) < 0.5
            loses = both & (rng.random(len(rows)) < self._dropout)
            has = [has[0] & ~(loses & side), has[1] & ~(loses & ~side)]
        image, text = self._tensor(examples.image[rows]), self._tensor(examples.text[rows])
        flags = [torch.from_numpy(flag).to(self._device) for flag in has]
        fused, _ = net(image, text, *flags)
        total = fused.new_zeros(())
        own = examples.row[rows]
        targets = None
        if examples.contrastive:
            targets = self._targets(net, own)
            same = self._same(own)
            scale = self._log_scale.exp().clamp(max=losses.LARGEST_SCALE)
            if job.loss == "siglip":
                total = total + losses.siglip(fused, targets, scale, self._bias, same)
            else:
                total = total + losses.info_nce(fused, targets, scale, same)
        if self._head is not None:
            total = total + (job.label_weight if examples.contrastive else 1.0) * self._label_loss(fused, own)
        if job.coral or job.mmd or job.jsd:
            total = total + self._regularised(net, image, text, has[0] & has[1], targets)
        return total

    def _same(self, own: Ids) -> Any:
        """Which pairs of these rows are no negatives of each other, bool [n, n]; None where there are none."""
        import torch

        from fusion_core import losses

        caption = self._examples.caption[own]
        codes = [np.unique(self._examples.group[own], return_inverse=True)[1], caption]
        said = caption[caption >= 0]
        if len(np.unique(codes[0])) == len(own) and len(np.unique(said)) == len(said):
            return None
        return losses.same_content(*(torch.from_numpy(code).to(self._device) for code in codes))

    def _label_loss(self, fused: Any, own: Ids) -> Any:
        import torch

        label = torch.from_numpy(self._examples.label[own]).to(self._device)
        if not bool((label >= 0).any()):
            return fused.new_zeros(())
        logits = self._logits(fused) + self._job.logit_adjustment * self._log_share
        return torch.nn.functional.cross_entropy(logits, label, self._class_weights, ignore_index=-1)

    def _logits(self, fused: Any) -> Any:
        return self._head(fused * self._examples.dim**0.5)

    def _regularised(self, net: Any, image: Any, text: Any, both: Bools, targets: Any) -> Any:
        import torch

        from fusion_core import losses

        rows = torch.from_numpy(np.flatnonzero(both)).to(self._device)
        if len(rows) < 2:
            return image.new_zeros(())
        there, absent = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        x, _ = net(image[rows], text[rows], there, absent)
        y, _ = net(image[rows], text[rows], absent, there)
        anchors = (targets if targets is not None else torch.cat([x, y])).detach()
        job = self._job
        apart = job.coral * metrics.coral(x, y) + job.mmd * losses.mmd2(x, y)
        return apart + job.jsd * losses.neighbour_jsd(x, y, anchors)

    def _targets(self, net: Any, own: Ids) -> Any:
        """What queries are to find: the column's vectors; through the fuser, too, where that has a space of its own."""
        import torch

        target = torch.nn.functional.normalize(self._tensor(self._examples.targets[own]), dim=1)
        if fusers.TRAINED[self._job.kind] == "backbone":
            return target
        there = torch.ones(len(own), dtype=torch.bool, device=self._device)
        flags = (there, ~there) if self._job.target == "image" else (~there, there)
        return net(target, target, *flags)[0]

    def _tensor(self, vectors: Floats) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(vectors)).to(self._device).float()

    def score(self, net: Any, rows: Ids) -> float:
        """Mean reciprocal rank on these examples, or accuracy where there are labels only."""
        import torch

        examples = self._examples
        with torch.inference_mode():
            flags = [torch.from_numpy(flag[rows]).to(self._device) for flag in (examples.has_image, examples.has_text)]
            fused, _ = net(self._tensor(examples.image[rows]), self._tensor(examples.text[rows]), *flags)
            if not examples.contrastive:
                label = examples.label[examples.row[rows]]
                return float((self._logits(fused).argmax(1).cpu().numpy() == label).mean())
            gallery, own = contents(examples, rows)
            targets = self._targets(net, gallery).cpu().numpy()
            return float((1 / ranks(fused.cpu().numpy(), targets, own)).mean())


def _known(labels: Ids) -> Ids:
    return labels[labels >= 0]


def describe(trained: Trained) -> str:
    """The outcome in words: each system's figures, the differences, and whether the fuser is worth having."""
    rows, lines = trained.rows, []
    lines.append(
        f"{rows['used']:,} of {rows['table']:,} rows; examples: {rows['train']:,} for training, {rows['validation']:,} "
        f"for validation, {rows['test']:,} for these figures (copies of a picture together); {trained.epochs} epochs"
    )
    for report in trained.reports:
        names = list(next(iter(report.figures.values())))
        width = max(map(len, report.figures))
        lines.append(f"{report.task + f' (n={report.n:,})':<{width}}" + "".join(f"{name:>14}" for name in names))
        for system, named in report.figures.items():
            lines.append(f"{system:<{width}}" + "".join(f"{100 * named[name]:>14.1f}" for name in names))
        for against, (mean, low, high) in report.differences.items():
            lines.append(
                f"{list(report.figures)[-1]} minus {against}: {_points(mean, low, high)} "
                f"points of {report.measure} (paired bootstrap, 95 %)"
            )
        lines += [f"between the modalities: {name} {value:g}" for name, value in report.distances.items()]
    lines.append("promoted" if trained.promoted else _not_promoted(trained))
    return "\n".join(lines)


def _not_promoted(trained: Trained) -> str:
    beaten = [
        against for report in trained.reports for against, (_, low, _) in report.differences.items() if not low > 0
    ]
    return f"not promoted: it is not certain to beat {' and '.join(dict.fromkeys(beaten))}; use that instead"
