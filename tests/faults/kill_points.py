"""Loaded into every process of a job that is to be killed: it notes what is embedded, and ends where it is told to.

The folder in FUSION_KILLS holds `embedded` (a line for each forward: process, tower, rows) and, when a kill inside a
commit is wanted, `armed`: "before" or "after", and how the name begins that is published then, or "remove".
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = Path(os.environ.get("FUSION_KILLS", ""))


def note(tower: str, rows: int) -> None:
    """Appends a line, whole, whoever else does."""
    descriptor = os.open(_FOLDER / "embedded", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {tower} {rows}\n".encode())
    os.close(descriptor)


def die_at(when: str, what: str) -> None:
    """Ends this process if a kill is wanted here: only one process gets it."""
    try:
        wanted = (_FOLDER / "armed").read_text().split()
        if wanted and wanted[0] == when and what.startswith(wanted[1]):
            (_FOLDER / "armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:
        pass


def watch_towers(module: ModuleType) -> None:
    """Notes each forward when it begins."""
    for name, tower in (("embed_images", "images"), ("_embed_tokens", "captions")):
        forward = getattr(module.Towers, name)

        def noted(self: Any, rows: Any, pad_to: int = 1, forward: Any = forward, tower: str = tower) -> Any:
            note(tower, len(rows))
            return forward(self, rows, pad_to)

        setattr(module.Towers, name, noted)


def watch_files(module: ModuleType) -> None:
    """Ends the process before or after a file becomes visible, or before one is removed."""
    publish, remove = module.PendingFile.publish, module.remove

    def publish_or_die(self: Any, name: str, **how: Any) -> None:
        die_at("before", name)
        publish(self, name, **how)
        die_at("after", name)

    def remove_or_die(place: str) -> None:
        die_at("before", "remove")
        remove(place)

    module.PendingFile.publish, module.remove = publish_or_die, remove_or_die  # type: ignore[attr-defined]


_WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "fusion_core.towers": watch_towers,
    "fusion_core.files": watch_files,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds a module as the others do, and changes it once it is there."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        watch = _WATCHED.pop(name, None)  # so that the search that follows passes by here
        spec = importlib.util.find_spec(name) if watch else None
        if spec is None or spec.loader is None or watch is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            watch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FUSION_KILLS" in os.environ:
    sys.meta_path.insert(0, Finder())
