"""Storage that fails, put before the real one at its one door, `fusion_core.files`."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow.fs as pafs
import pytest

from fusion_core import files

Fault = Callable[[str], None]  # told what is about to be done, as "write …", "publish …", "open …", "list …"


@contextmanager
def failing(
    fault: Fault, lost: Callable[[str], bool] = lambda name: False, shuffled: int | None = None
) -> Iterator[None]:
    """Storage where `fault` may raise before anything is done, files whose name `lost` picks never come to be, and
    listings come in an order that the seed `shuffled` decides.
    """
    write, publish, open_input, resolve = (
        files.PendingFile.write, files.PendingFile.publish, files.open_input, files.resolve,
    )  # fmt: skip

    def write_or_fail(self: files.PendingFile, data: Any) -> int:
        fault(f"write {self.path}")
        return write(self, data)

    def publish_or_fail(self: files.PendingFile, name: str, **how: bool) -> None:
        fault(f"publish {name}")
        if not lost(name):
            publish(self, name, **how)

    def open_or_fail(place: str) -> BinaryIO:
        fault(f"open {place}")
        return open_input(place)

    def resolve_or_fail(place: str) -> tuple[Any, str]:
        filesystem, path = resolve(place)
        return _Filesystem(filesystem, fault, shuffled), path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.PendingFile, "write", write_or_fail)
        patch.setattr(files.PendingFile, "publish", publish_or_fail)
        patch.setattr(files, "open_input", open_or_fail)
        patch.setattr(files, "resolve", resolve_or_fail)
        yield


class _Filesystem:
    def __init__(self, real: Any, fault: Fault, shuffled: int | None):
        self._real, self._fault, self._shuffled = real, fault, shuffled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_file_info(self, what: Any) -> Any:
        self._fault(f"list {what}")
        found = self._real.get_file_info(what)
        if self._shuffled is not None and isinstance(what, pafs.FileSelector):
            random.Random(self._shuffled).shuffle(found)
        return found


def never(_: str) -> None:
    """No fault."""


def one_in(n: int, seed: int, error: int = errno.EIO) -> Fault:
    """Fails about 1 time in n."""
    chance = random.Random(seed)

    def fault(what: str) -> None:
        if chance.randrange(n) == 0:
            raise OSError(error, os.strerror(error), what)

    return fault


def at(number: int, kind: str, error: int) -> Fault:
    """Fails once: at the n-th (from 0) of one kind of what is done."""
    seen = 0

    def fault(what: str) -> None:
        nonlocal seen
        if what.startswith(kind):
            seen += 1
            if seen == number + 1:
                raise OSError(error, os.strerror(error), what)

    return fault


def from_(number: int, kind: str, error: int) -> Fault:
    """Fails always from the n-th (from 0) of one kind of what is done, as a disk that is full."""
    seen = 0

    def fault(what: str) -> None:
        nonlocal seen
        if what.startswith(kind):
            seen += 1
            if seen > number:
                raise OSError(error, os.strerror(error), what)

    return fault


def slow(seconds: float) -> Fault:
    """Everything takes longer."""

    def fault(_: str) -> None:
        time.sleep(seconds)

    return fault
