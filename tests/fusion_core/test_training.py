"""Training on worlds whose answer is known: where one modality is right, where both are needed, where nothing is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion_core import examples, fusers, judging, training
from fusion_core.examples import TrainError
from fusion_core.labels import BadLabels
from fusion_core.table import Table
from schemas.feature_table import InputSpec, TableSpec
from schemas.fuser import TrainJob
from tests.corpora import TOWER, write_vectors

D, N = 16, 900
SPEC = TableSpec(TOWER, InputSpec())
QUICK = TrainJob("gate", epochs=40, batch_rows=128, learning_rate=1e-2)


def units(rng: np.random.Generator, n: int = N) -> np.ndarray:
    vectors = rng.normal(size=(n, D))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def noisy(vectors: np.ndarray, amount: Any, rng: np.random.Generator) -> np.ndarray:
    found = vectors + np.asarray(amount).reshape(-1, 1) * units(rng, len(vectors))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of things: `whole`; `moody`, where a mark in each view's own vector tells which of the two is bad."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    things = units(rng)
    things[:, 0] = 0.0
    things /= np.linalg.norm(things, axis=1, keepdims=True)
    write_vectors(folder / "whole", things, noisy(things, 0.2, rng), SPEC)
    bad = rng.random(N) < 0.5
    image, text = noisy(things, np.where(bad, 30.0, 0.6), rng), noisy(things, np.where(bad, 0.6, 30.0), rng)
    image[:, 0], text[:, 0] = np.where(bad, 0.8, 0), np.where(bad, 0, 0.8)
    write_vectors(folder / "moody", image / np.linalg.norm(image, axis=1, keepdims=True),
                  text / np.linalg.norm(text, axis=1, keepdims=True), SPEC)  # fmt: skip
    equal = [noisy(things, 0.9, rng) for _ in range(2)]
    write_vectors(folder / "equal", *equal, SPEC)
    return folder


def test_a_gate_learns_whom_to_trust_and_is_promoted(world: Path) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    heard = []
    done = training.train(whole, QUICK, [moody], epoch=lambda *told: heard.append(told))
    (report,) = done.reports
    assert done.promoted and done.fuser.record is not None and done.fuser.record.promoted
    assert report.figures["gate"]["R@1"] > report.figures[report.tuned_sum]["R@1"] + 0.1
    assert set(report.differences) == {report.best_single, report.tuned_sum}
    assert [told[0] for told in heard] == list(range(1, done.epochs + 1))
    image, text = (np.concatenate([m for _, m, _ in moody.vectors(f"{s}_embedding")]) for s in ("image", "text"))
    there = np.ones(N, bool)
    _, _, weights = done.fuser.explain(image, text, there, there)
    bad = image[:, 0] > 0.1
    assert np.corrcoef(weights[:, 1], bad)[0, 1] > 0.9
    said = training.describe(done)
    assert said.endswith("\npromoted") and "gate minus weighted sum, image" in said


def test_the_same_seed_gives_the_same_fuser_and_another_does_not(world: Path) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    job = replace(QUICK, kind="attention", epochs=2, modality_dropout=0.3, mmd=0.1, coral=0.1, jsd=0.1, loss="siglip")
    first, second = (training.train(whole, job, [moody]).fuser for _ in range(2))
    assert first.record == second.record
    assert training.train(whole, replace(job, seed=1), [moody]).fuser.spec.fingerprint != first.spec.fingerprint


def test_where_there_is_nothing_to_gain_the_fuser_is_not_promoted(world: Path) -> None:
    whole, equal = (Table.open(str(world / name)) for name in ("whole", "equal"))
    done = training.train(whole, replace(QUICK, kind="combiner", epochs=3), [equal])
    assert not done.promoted and done.fuser.record is not None and done.fuser.record.promoted is False
    assert "not promoted: it is not certain to beat weighted sum" in training.describe(done)


def test_a_fuser_of_its_own_space_is_judged_in_it(world: Path) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    done = training.train(whole, replace(QUICK, kind="gmu"), [moody])
    assert done.fuser.spec.space == "own"
    assert done.reports[0].figures["gmu"]["R@1"] > 10 / done.reports[0].n


def test_the_reported_figures_are_those_of_a_plain_search(world: Path) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    done = training.train(whole, replace(QUICK, epochs=2), [moody])
    found = examples.gather(whole, QUICK, [moody], "", "")
    test = np.flatnonzero(found.split(QUICK.seed) == examples.TEST)
    fused, _ = done.fuser.fuse(found.image[test], found.text[test], found.has_image[test], found.has_text[test])
    scores = fused @ fusers.normalize(found.targets[found.row[test]]).T
    assert done.reports[0].n == len(test)
    assert done.reports[0].figures["gate"]["R@1"] == pytest.approx((scores.argmax(1) == np.arange(len(test))).mean())


def test_fusers_of_the_same_rows_are_compared_and_others_are_not(world: Path) -> None:
    whole, moody, equal = (Table.open(str(world / name)) for name in ("whole", "moody", "equal"))
    jobs = [replace(QUICK, kind=kind, epochs=2) for kind in ("combiner", "gate")]
    done = [training.train(whole, job, [moody]) for job in jobs]
    records = [one.fuser.record for one in done if one.fuser.record is not None]
    found = training.compare(records)
    names = ["image only", "text only", done[0].reports[0].tuned_sum]
    assert [system.name for system in found.systems] == [*names, "combiner", "gate"]
    assert found.n == done[0].reports[0].n and found.measures == ["R@1", "R@5", "R@10", "MRR"]
    for one, system in zip(done, found.systems[3:], strict=True):
        (report,) = one.reports
        assert system.figures == pytest.approx(list(report.figures[system.name].values()), abs=1e-6)
        assert system.verdict == ("promoted" if one.promoted else "not promoted")
        for against, (mean, low, high) in report.differences.items():
            assert system.differences[against] == f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert all(not system.differences and not system.verdict for system in found.systems[:3])
    assert f"n={found.n}" in training.describe_together(records)
    other = training.train(whole, jobs[0], [equal]).fuser.record
    assert other is not None
    with pytest.raises(ValueError, match="the same rows"):
        training.compare([*records, other])


# --- labels and triplets


def test_labels_teach_too_and_imbalance_can_be_weighed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    n = 1200
    label = (rng.random(n) < 0.15).astype(int)
    image, text = units(rng, n), units(rng, n)
    sign = np.where(rng.random(n) < 0.5, 1, -1)
    image[:, 1], text[:, 1] = sign, np.where(label == 1, sign, -sign)  # only both together tell: an exclusive or
    image, text = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (image, text))
    meta = [json.dumps({"kind": "rare" if one else "usual"}) for one in label]
    table = write_vectors(
        tmp_path / "table", image, text, SPEC, meta=meta, caption=["rare" if x else "usual" for x in label]
    )
    job = TrainJob(
        "combiner", epochs=20, patience=20, batch_rows=128, class_weights=True, logit_adjustment=1.0, learning_rate=5e-3
    )
    done = training.train(table, job, labels="meta.kind")
    (report,) = done.reports
    assert done.promoted and report.figures["combiner"]["macro recall"] > 0.9
    assert report.figures["concat"]["macro recall"] < 0.7
    keys = [f"k{row}" for row in range(n)]
    pq.write_table(pa.table({"key": keys, "label": label.astype(str)}), tmp_path / "labels.parquet")
    by_file, by_column, by_meta = (
        examples.gather(table, job, [], "", what).label
        for what in (str(tmp_path / "labels.parquet"), "caption", "meta.kind")
    )
    np.testing.assert_array_equal(by_file, label)
    np.testing.assert_array_equal(by_column, 1 - label)
    np.testing.assert_array_equal(by_meta, 1 - label)


def test_labels_of_pictures_that_have_no_captions(tmp_path: Path) -> None:
    """Nothing is known of a modality that no row has: its figures are 0, and nothing is divided by its rows."""
    rng = np.random.default_rng(1)
    image = units(rng)
    meta = [json.dumps({"side": bool(one)}) for one in image[:, 0] > 0]
    table = write_vectors(tmp_path / "table", image, np.zeros((N, D)), SPEC, meta=meta, caption=[None] * N)
    (report,) = training.train(table, replace(QUICK, epochs=2), labels="meta.side").reports
    assert report.figures["text only"] == {"accuracy": 0.0, "macro recall": 0.0}
    assert report.figures["image only"]["accuracy"] > 0.9 and report.best_single == "image only"


def test_copies_of_few_pictures_are_not_enough_to_judge_by(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = units(rng, 20)[rng.integers(0, 20, N)]
    table = write_vectors(tmp_path / "table", image, units(rng), SPEC, meta=['{"a": "x"}', '{"a": "y"}'] * (N // 2))
    with pytest.raises(TrainError, match=r"copies of a picture counted once: 1\d in train, "):
        training.train(table, QUICK, labels="meta.a")


def test_triplets_ask_with_the_rows_they_name(world: Path, tmp_path: Path) -> None:
    whole = Table.open(str(world / "whole"))
    lines = ["query_image_key,query_text_key,target_key", "k1,k2,k3", "k4,,k5", "k6,k7,nobody", ",k8,k0"]
    (tmp_path / "triplets.csv").write_text("\n".join(lines))
    found = examples.gather(whole, QUICK, [], str(tmp_path / "triplets.csv"), "")
    image, text = (np.concatenate([m for _, m, _ in whole.vectors(f"{s}_embedding")]) for s in ("image", "text"))
    assert found.row.tolist() == [3, 5, 0]
    assert found.has_image.tolist() == [True, True, False] and found.has_text.tolist() == [True, False, True]
    np.testing.assert_array_equal(found.image[:2], image[[1, 4]])
    np.testing.assert_array_equal(found.text[[0, 2]], text[[2, 8]])
    (tmp_path / "words.csv").write_text("query_image_key,query_text,target_key\nk1,in red,k2\n")
    with pytest.raises(TrainError, match="texts are not embedded here"):
        examples.gather(whole, QUICK, [], str(tmp_path / "words.csv"), "")
    for odd in ([["k1"]], [b"\xff"]):
        pq.write_table(pa.table({"query_image_key": odd, "target_key": ["k2"]}), tmp_path / "odd.parquet")
        with pytest.raises(TrainError, match=r"odd.parquet: keys are strings or numbers"):
            examples.gather(whole, QUICK, [], str(tmp_path / "odd.parquet"), "")


# --- rows


def test_copies_never_straddle_and_the_shares_are_about_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    picture = rng.integers(0, 600, N)  # copies among them
    table = write_vectors(
        tmp_path / "table", units(rng), units(rng), SPEC, caption=[f"c{row % 700}" for row in range(N)],
        sha256=[int(p).to_bytes(32, "little") for p in picture * 7919],
    )  # fmt: skip
    found = examples.gather(table, QUICK, [table], "", "")
    parts = found.split(0)
    for number in np.unique(picture):
        assert len(set(parts[picture[found.row] == number])) == 1
    assert [round(float((parts == part).mean()), 1) for part in (0, 1, 2)] == [0.7, 0.1, 0.2]
    assert (found.split(1) != parts).any()
    assert len(np.unique(found.caption)) == 700


def test_rows_without_a_picture_are_grouped_by_their_caption(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = units(rng, 40)
    image[10:30] = 0
    captions = [f"c{row % 5}" for row in range(40)]
    digests = [None if 10 <= row < 30 else bytes([row]) * 32 for row in range(40)]
    table = write_vectors(tmp_path / "table", image, units(rng, 40), SPEC, caption=captions, sha256=digests)
    found = examples.gather(table, QUICK, [table], "", "")
    assert len(np.unique(found.group)) == 20 + 5
    assert len(np.unique(found.group[10:30])) == 5


@pytest.mark.parametrize("most", [1, 300, 20_000, 10**6])
def test_a_sample_is_of_whole_row_groups(tmp_path: Path, most: int) -> None:
    table = write_vectors(tmp_path / "table", *np.ones((2, 20_000, D)) / 4, SPEC, per_unit=9_000)
    rows = examples.sampled(table, most, 0)
    assert len(rows) == min(most, 20_000) == len(np.unique(rows))
    assert (np.diff(rows) > 0).all() and np.array_equal(rows, examples.sampled(table, most, 0))
    assert (np.diff(rows) > 1).sum() <= 4
    if most == 300:
        assert len({int(examples.sampled(table, most, seed)[0]) for seed in range(20)}) > 1
    got = np.concatenate([some["row"].to_numpy() for some in table.pick(rows, ["row"])])
    np.testing.assert_array_equal(got, rows % 9_000)


def test_views_are_joined_by_key_and_keys_that_stand_twice_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    image, text = units(rng, 30), units(rng, 30)
    whole = write_vectors(tmp_path / "whole", image, text, SPEC, key=[f"k{max(row, 1)}" for row in range(30)])
    order = rng.permutation(30)
    keys = [f"k{row}" if row != 29 else "k28" for row in order]
    view = write_vectors(tmp_path / "view", text[order], image[order], SPEC, key=keys)
    found = examples.gather(whole, QUICK, [view, view], "", "")
    assert sorted(found.row[:26].tolist()) == list(range(2, 28))
    assert found.row[26:].tolist() == found.row[:26].tolist()
    np.testing.assert_array_equal(found.image[:26], text.astype(np.float16)[found.row[:26]])
    np.testing.assert_array_equal(found.targets, image.astype(np.float16))


def test_ranks_count_ties_and_what_is_no_vector_against_us() -> None:
    gallery = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    queries = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [np.nan, 0, 0, 0], [0, 0, 0, 1]], np.float32)
    assert judging.ranks(queries, gallery, np.array([0, 2, 3, 3, 3])).tolist() == [2, 1, 4, 4, 4]


def test_sums_of_scores_rank_as_the_sums(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    found = examples.gather(whole, QUICK, [moody], "", "")
    found.has_image[::7], found.has_text[::5] = False, False
    rows = np.flatnonzero(found.split(0) == examples.TEST)
    monkeypatch.setattr(judging, "_JUDGED_AT_ONCE", 100)
    for weight, places in judging.ranks_of_sums(found, rows).items():
        fused = judging.retrieved(found, rows, judging.weighted_sum(weight, found.dim), "image")
        assert (places != fused).mean() < 0.02 and np.abs(places - fused).max() <= 1, "but for the last bit of a score"


def test_the_interval_of_a_difference_is_drawn_by_groups() -> None:
    rng = np.random.default_rng(5)
    gains = rng.choice([-1.0, 0, 1], 400, p=[0.1, 0.6, 0.3])
    mean, low, high = judging.bootstrap(gains, np.arange(400), 0)
    assert mean == pytest.approx(gains.mean())
    half = 1.96 * gains.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    fourfold = judging.bootstrap(np.tile(gains, 4), np.tile(np.arange(400), 4), 0)
    assert fourfold == pytest.approx((mean, low, high))  # copies make nothing more certain


# --- refusals


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"kind": "weighted_sum"}, "there are gate, gmu, combiner, attention"),
        ({"target": "sound"}, "target must be one of image, text"),
        ({"modality_dropout": 1.0}, "modality_dropout"),
        ({"mmd": -1.0}, "mmd must be"),
        ({"learning_rate": float("nan")}, "learning rate above 0"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_jobs_that_cannot_be_are_refused(job: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        training.check_job(TrainJob(**job))


def test_what_teaches_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    whole, moody = (Table.open(str(world / name)) for name in ("whole", "moody"))
    few = write_vectors(tmp_path / "few", *np.eye(D)[[[0, 1], [2, 3]]], SPEC)
    other = TableSpec(replace(TOWER, weights_sha256="0" * 64))
    foreign = write_vectors(tmp_path / "foreign", *np.eye(D)[[[0, 1], [2, 3]]], other)
    strange = write_vectors(tmp_path / "strange", *np.eye(D)[[[0, 1], [2, 3]]], SPEC, key=["x", "y"])
    with pytest.raises(TrainError, match="there is nothing to learn from"):
        training.train(whole, QUICK)
    with pytest.raises(
        TrainError, match=r"once: \d+ in train, \d+ in validation, \d+ in test: at least 50 of each are needed"
    ):
        training.train(few, QUICK, [few])
    with pytest.raises(TrainError, match="embedded by other towers"):
        training.train(whole, QUICK, [foreign])
    with pytest.raises(TrainError, match="has no key of the table's"):
        training.train(whole, QUICK, [strange])
    with pytest.raises(BadLabels, match="'nowhere' is no file"):
        training.train(whole, QUICK, labels="nowhere")
    with pytest.raises(TrainError, match="two classes at least"):
        training.train(whole, QUICK, labels="meta.kind")
    with pytest.raises(TrainError, match="train with one of them"):
        training.train(whole, QUICK, [moody], triplets="x.csv")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TrainError, match=r"holds files but no fuser\.json"):
        training.check_output(str(tmp_path))
    with pytest.raises(OSError, match="fuser"):
        training.check_output(str(tmp_path / "mine.txt" / "fuser"))
    for _ in range(2):  # what it leaves behind is no stranger
        training.check_output(str(tmp_path / "fuser"))
