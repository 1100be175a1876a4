"""The demo's scenes, degraded: trained fusers find more than what needs no training."""

from pathlib import Path

import pytest

from fusion_core import table, towers, training
from fusion_core.demo import shards
from pipelines import cli
from schemas.fuser import TrainJob

PAIRS, SEED = 6000, 7


@pytest.mark.slow
def test_fusers_trained_on_degraded_scenes_beat_the_tuned_sum(tmp_path: Path) -> None:
    shards.write_shards(tmp_path / "whole", PAIRS, 1000, SEED, broken=False)
    shards.write_views(tmp_path / "degraded", PAIRS, 1000, SEED, blurred=1, colourless=1)
    opened = {}
    for name in ("whole", "degraded"):
        place = str(tmp_path / f"{name}-table")
        arguments = ["--input", str(tmp_path / name / "*.tar"), "--output", place, "--model", towers.DEMO, "--quiet"]
        assert cli.main(["embed", *arguments]) == cli.DONE
        opened[name] = table.Table.open(place)
    for kind in ("attention", "combiner"):
        done = training.train(opened["whole"], TrainJob(kind), [opened["degraded"]])
        print(training.describe(done))
        assert done.promoted, training.describe(done)
        (report,) = done.reports
        assert all(low > 0 for _, low, _ in report.differences.values())
