"""`fusion serve` as a process, under a short siege (infra/bench/siege.py)."""

import json
from pathlib import Path

import pytest

from infra.bench import serve, siege


@pytest.mark.slow
def test_a_siege_gets_right_answers_and_reasons(tmp_path: Path) -> None:
    place = serve.scenes(tmp_path, 100, siege.PRECISION)
    tally, stopped = siege.run(place, siege.QUICK, 10, seed=1)
    assert tally.problems == []
    assert len(tally.milliseconds) > 100
    assert {"slow head", "slow body", "silent", "pipelined", "invalid JSON"} <= {kind for kind, _ in tally.outcomes}
    assert stopped["exit_code"] == 0 and stopped["in_progress_answered"] == stopped["of"]


def test_what_is_wrong_with_an_answer_is_told() -> None:
    wrong = siege.compared([(7, 0.9), (3, 0.5), (4, 0.5)])

    def body(*found: tuple[int, float]) -> bytes:
        return json.dumps({"results": [{"id": id, "score": score} for id, score in found]}).encode()

    assert wrong(body((7, 0.9), (4, 0.5), (3, 0.500001))) == ""  # equals may change places
    for found in ([(7, 0.9), (3, 0.5)], [(7, 0.9), (3, 0.5), (3, 0.5)], [(3, 0.9), (7, 0.5), (4, 0.5)],
                  [(7, 0.9), (3, 0.5), (4, 0.501)], [(8, 0.9), (3, 0.5), (4, 0.5)]):  # fmt: skip
        assert wrong(body(*found)), found


def test_growth_is_told_with_its_error() -> None:
    flat = [(float(i), 10**9 + (i % 7) * 10**5, 10, 5) for i in range(300)]
    rising = [(at, memory + int(at * 10**5), fds, threads) for at, memory, fds, threads in flat]
    assert abs(siege.growth(flat)["mb_per_minute"]) <= 3 * siege.growth(flat)["error"] + 0.01
    assert abs(siege.growth(rising)["mb_per_minute"] - 6) < 0.1
