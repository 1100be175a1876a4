"""The scenes and tables that fusers are compared on: nothing of what they are asked occurs in training."""

from pathlib import Path

import numpy as np

from fusion_core.demo.scenes import HELD_OUT, PAIRS
from fusion_core.table import Table
from infra.bench import fusers
from schemas.feature_table import TableSpec
from tests.corpora import TOWER


def test_scenes_are_of_the_asked_pairs_only() -> None:
    rng = np.random.default_rng(0)
    for unseen in (HELD_OUT, fusers.TUNING_PAIRS):
        allowed = frozenset(PAIRS) - HELD_OUT - unseen
        train = fusers.some_scenes(rng, 300, allowed, distinct=False)
        test = fusers.some_scenes(rng, 300, unseen, distinct=True)
        assert len(set(test)) == 300 and not {pair for scene in train for pair in scene.pairs} & (unseen | HELD_OUT)
        assert {pair for scene in test for pair in scene.pairs} == unseen
        assert {scene.count for scene in test} == {1, 2, 3, 4} and {bool(scene.relation) for scene in test} == {
            True,
            False,
        }
    assert not fusers.TUNING_PAIRS & HELD_OUT


def test_a_quarter_of_each_modality_is_missing_and_never_both(tmp_path: Path) -> None:
    n, dim = 2000, TOWER.embedding_dim
    image, text = np.random.default_rng(1).normal(size=(2, n, dim)).astype(np.float32)
    fusers.write_table(tmp_path / "whole", image, text, ["words"] * n, TableSpec(TOWER))
    found = fusers.write_missing(tmp_path / "missing", Table.open(str(tmp_path / "whole")), (0, 1))
    rows = found.pick(np.arange(n), ["has_image", "has_text"])
    has = np.concatenate([np.stack([some[name].to_numpy() for name in some.column_names], 1) for some in rows])
    assert has.any(axis=1).all()
    np.testing.assert_allclose(1 - has.mean(axis=0), 0.25, atol=0.04)
