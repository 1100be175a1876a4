"""`kill -9` in the middle of the job: nothing lost, nothing twice, nothing unreadable ever visible."""

from pathlib import Path

import pytest

from tests.faults import kills


@pytest.mark.slow
def test_killed_runs_repeated_give_the_undisturbed_table(tmp_path: Path) -> None:
    found = kills.campaign(tmp_path, shards=12, each=200, kills=6, seed=1)
    assert found["problems"] == []
    assert found["kills"] == 6
    assert isinstance(found["reader_looks"], int) and found["reader_looks"] > 10
