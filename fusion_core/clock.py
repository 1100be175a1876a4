"""How long the stages of a job take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by stage, told to `log` as each stage ends."""

    log: Callable[[str], None]
    job: str  # which names the lines
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts its block as `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.log(f"{self.job}: {name} took {self.seconds[name]:.1f} s")
