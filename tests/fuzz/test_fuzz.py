"""Damaged files at every door: the errors that it names and no other, no hang, and what it lets in adds up."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import campaign
from tests.fuzz.doors import DOORS, Door, damaged

# Not in this process, whose memory has no limit: FAISS takes what a forged length claims, up to 13 GB in 9 seconds.
IN_A_CHILD = ("forged index",)


@pytest.fixture(scope="module", params=[name for name in DOORS if name not in IN_A_CHILD])
def door(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Path]]:
    scratch = tmp_path_factory.mktemp(request.param)
    yield DOORS[request.param](scratch), scratch


@settings(max_examples=80, deadline=5_000)
@given(seed=st.integers(0, 2**64))
def test_a_damaged_file_is_refused_or_adds_up(door: tuple[Door, Path], seed: int) -> None:
    rng = random.Random(seed)
    opened, scratch = door
    name, good = rng.choice(opened.seeds)
    with TemporaryDirectory(dir=scratch) as folder:
        opened.try_one(Path(folder), name, damaged(good, opened.seeds, rng))


def test_good_files_pass(door: tuple[Door, Path]) -> None:
    opened, scratch = door
    for number, (name, good) in enumerate(opened.seeds):
        folder = scratch / f"good-{number}"
        folder.mkdir()
        opened.enter(folder, name, good)


@pytest.mark.parametrize("name", IN_A_CHILD)
def test_a_damaged_file_is_refused_by_a_child_with_little_memory(name: str) -> None:
    tried, findings = campaign.hunt(name, DOORS[name], seed=7, cases=80)
    assert tried == 80 and not findings, findings


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_thousands_of_damaged_files_neither_crash_nor_hang_nor_fill_the_memory(name: str) -> None:
    tried, findings = campaign.hunt(name, DOORS[name], seed=20_261, cases=2_000)
    assert tried == 2_000 and not findings, findings


GOOD = ("good", b"0123456789")


def raises(folder: Path, name: str, data: bytes) -> None:
    if data != GOOD[1]:
        raise ZeroDivisionError


def hangs(folder: Path, name: str, data: bytes) -> None:
    while data != GOOD[1]:
        pass


def fills(folder: Path, name: str, data: bytes) -> None:
    if data != GOOD[1]:
        bytearray(2 << 30)


def crashes(folder: Path, name: str, data: bytes) -> None:
    if data != GOOD[1]:
        os.kill(os.getpid(), signal.SIGSEGV)


def broken(folder: Path, enter: Callable[[Path, str, bytes], None]) -> Door:
    return Door((GOOD,), enter)


@pytest.mark.slow
@pytest.mark.parametrize(
    "enter, told", [(raises, "ZeroDivisionError"), (hangs, "hung"), (fills, "MemoryError"), (crashes, "ended with -11")]
)
def test_a_hunt_sees_errors_hangs_full_memory_and_crashes(enter: Callable[[Path, str, bytes], None], told: str) -> None:
    _, (finding,) = campaign.hunt("broken", partial(broken, enter=enter), seed=1, cases=50)
    assert told in finding.what and finding.data and finding.data != GOOD[1]
