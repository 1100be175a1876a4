"""The demo's scenes, degraded: trained fusers find more than what needs no training."""

import pytest

from fusion_core import table, towers, training
from fusion_core.demo import shards
from pipelines import cli
from schemas.fuser import TrainJob

PAIRS, SEED = 6000, 7
SHARES = {"half": 0.5, "all": 1.0}  # of the pictures that are blurred, and of the captions without colours


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, table.Table]:
    """Feature tables of the scenes, whole and degraded."""
    folder = tmp_path_factory.mktemp("learning")
    shards.write_shards(folder / "whole", PAIRS, 1000, SEED, broken=False)
    for name, share in SHARES.items():
        shards.write_views(folder / name, PAIRS, 1000, SEED, blurred=share, colourless=share)
    opened = {}
    for name in ("whole", *SHARES):
        place = str(folder / f"{name}-table")
        arguments = ["--input", str(folder / name / "*.tar"), "--output", place, "--model", towers.DEMO, "--quiet"]
        assert cli.main(["embed", *arguments]) == cli.DONE
        opened[name] = table.Table.open(place)
    return opened


@pytest.mark.slow
@pytest.mark.parametrize("views", SHARES)
def test_fusers_trained_on_degraded_scenes_beat_the_tuned_sum(tables: dict[str, table.Table], views: str) -> None:
    for kind in ("attention", "combiner"):
        done = training.train(tables["whole"], TrainJob(kind), [tables[views]])
        print(training.describe(done))
        assert done.promoted, training.describe(done)
        (report,) = done.reports
        assert all(low > 0 for _, low, _ in report.differences.values())
