"""Time, cost and sizes for 10^8 to 10^10 pairs on N GPUs: on paper, and by a simulation of units on workers.

    python -m infra.bench.capacity [--gpu-rate 2500] [--core-microseconds 500] [--cores 8] [--gpus 8 64 512]

What a pair costs comes from measured rates (RESULTS.md); the rate of a GPU is an assumption until one was measured. The
simulation deals units to workers one by one, as an engine does, or in fixed shares, as launchers take them; units
differ in size, some straggle, some fail and are done again, workers die and come back. `formula` is what the closed
expression says of the same; `÷` is simulation ÷ formula.
"""

import argparse
import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.bench import measure

COLUMNS = (
    "pairs", "GPUs", "units", "hours", "÷ formula", "shares: hours", "÷ formula ", "waste", "GPU hours", "cost",
    "table TB", "index GB", "manifest MB", "plan GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What the figures rest on. Rates are of one worker: a GPU with its cores."""

    gpu_rate: float  # pairs/s that a GPU's forwards reach
    core_microseconds: float  # CPU of a pair beside the forward: read, hash, decode, resize, tokenize, write
    cores: int  # beside a GPU
    price: float  # of a worker's hour
    unit_rows: int = 10_000
    spread: float = 0.15  # of units' times, as the deviation of their logarithm
    stragglers: float = 0.01  # share of units that take three times as long
    failures: float = 0.002  # share of attempts that fail, somewhere on the way
    hours_between_deaths: float = 200.0  # of one worker
    restart_seconds: float = 180.0  # until its place is taken: container, imports, model
    row_bytes: int = 2_300  # of ViT-B-32: two float16 vectors of 512, and the other columns
    index_bytes: int = 140  # a vector: 128 bytes of code, its id, its lists
    record_bytes: int = 150  # of a unit in a compacted manifest
    plan_bytes: int = 1_900  # of a unit in the launcher's memory while it plans

    @property
    def rate(self) -> float:
        """Pairs per second of a worker: the lower of forward and everything else, which overlap."""
        return min(self.gpu_rate, self.cores * 1e6 / self.core_microseconds)

    @property
    def unit_seconds(self) -> float:
        """The mean time of an undisturbed unit, stragglers counted in."""
        return self.unit_rows / self.rate * (1 + 2 * self.stragglers)

    @property
    def waste(self) -> float:
        """Time lost to failures and deaths, as a share of the work."""
        attempts = 1 / (1 - self.failures)
        lost = (self.unit_seconds / 2 + self.restart_seconds) / (self.hours_between_deaths * 3600)
        return (1 + (attempts - 1) / 2) * (1 + lost) - 1


def formula(given: Assumptions, units: int, workers: int, shares: bool) -> float:
    """Seconds: the work over the workers, and what the last of them waits for.

    Dealt one by one, the end is about one late unit; in fixed shares it is the largest of `workers` random shares. A
    worker that dies near the end is not in it: in runs of minutes on hundreds of workers that is what is missing.
    """
    work = units * given.unit_seconds * (1 + given.waste) / workers
    if shares:
        squares = math.exp(given.spread**2) * (1 + 8 * given.stragglers) / (1 + 2 * given.stragglers) ** 2
        return work + math.sqrt(2 * squares * units / workers * math.log(max(workers, 2))) * given.unit_seconds
    late = 3 if units * given.stragglers >= workers else 1
    return work + late * given.unit_seconds / 2


def simulate(given: Assumptions, units: int, workers: int, shares: bool, seed: int = 0) -> tuple[float, float]:
    """(seconds until the last unit is done, seconds of all workers that gave nothing)."""
    rng = np.random.default_rng(seed)
    base = given.unit_rows / given.rate
    times = base * rng.lognormal(-(given.spread**2) / 2, given.spread, units)
    times[rng.random(units) < given.stragglers] *= 3
    if shares:
        dealt = rng.integers(0, workers, units)
        ends = np.zeros(workers)
        wasted = 0.0
        for worker in range(workers):
            ends[worker], lost = _run(given, times[dealt == worker], rng)
            wasted += lost
        return float(ends.max()), wasted
    free = [(0.0, worker) for worker in range(workers)]
    deaths = rng.exponential(given.hours_between_deaths * 3600, workers)
    waiting = deque((float(seconds), 0.0) for seconds in times)  # and since when: what was lost is dealt again
    end = wasted = 0.0
    while waiting:
        seconds, since = waiting.popleft()
        now, worker = heapq.heappop(free)
        now = max(now, since)
        if deaths[worker] < now + seconds:
            ended = max(now, deaths[worker])
            wasted += ended - now + given.restart_seconds
            waiting.append((seconds, ended))
            deaths[worker] = ended + given.restart_seconds + rng.exponential(given.hours_between_deaths * 3600)
            heapq.heappush(free, (ended + given.restart_seconds, worker))
        elif rng.random() < given.failures:
            lost = rng.random() * seconds
            wasted += lost
            waiting.append((seconds, now + lost))
            heapq.heappush(free, (now + lost, worker))
        else:
            heapq.heappush(free, (now + seconds, worker))
            end = max(end, now + seconds)
    return end, wasted


def _run(given: Assumptions, times: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """One worker through its share: when it is done, and what it lost."""
    failed = rng.random(len(times)) < given.failures
    lost = float((times[failed] * rng.random(int(failed.sum()))).sum())
    busy = float(times.sum()) + lost
    for _ in range(rng.poisson(busy / (given.hours_between_deaths * 3600))):
        lost += float(rng.choice(times)) * rng.random() + given.restart_seconds
    return float(times.sum()) + lost, lost


def line(given: Assumptions, pairs: int, gpus: int) -> list[Any]:
    """One line of the table."""
    units = math.ceil(pairs / given.unit_rows)
    dealt, wasted = simulate(given, units, gpus, shares=False)
    fixed, _ = simulate(given, units, gpus, shares=True)
    hours = dealt * gpus / 3600
    return [
        f"{pairs:.0e}", gpus, units, dealt / 3600, dealt / formula(given, units, gpus, False),
        fixed / 3600, fixed / formula(given, units, gpus, True), wasted / (dealt * gpus), hours, hours * given.price,
        pairs * given.row_bytes / 1e12, pairs * given.index_bytes / 1e9, units * given.record_bytes / 1e6,
        units * given.plan_bytes / 2**30,
    ]  # fmt: skip


def main() -> None:
    """All sizes on all numbers of GPUs."""
    parser = measure.arguments("capacity", __doc__, repeats=1)
    parser.add_argument(
        "--gpu-rate", type=float, default=2500, help="pairs/s of a GPU's forwards (default: %(default)s)"
    )
    parser.add_argument("--core-microseconds", type=float, default=500, help="CPU of a pair (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=8, help="beside each GPU (default: %(default)s)")
    parser.add_argument(
        "--price", type=float, default=2.0, help="of a GPU's hour, its cores too (default: %(default)s)"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="(default: 8 64 512)")
    args: argparse.Namespace = parser.parse_args()
    given = Assumptions(args.gpu_rate, args.core_microseconds, args.cores, args.price)
    sizes = [10**7] if args.quick else [10**8, 10**9, 10**10]
    load = measure.Load()
    found = [line(given, pairs, gpus) for pairs in sizes for gpus in args.gpus]
    measure.tell("capacity", args, load, COLUMNS, found, assumptions=vars(given))


if __name__ == "__main__":
    main()
