"""Where the Beam jobs run: the default runner's options, and the knobs that decide only how fast."""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apache_beam.options.pipeline_options import PipelineOptions

from fusion_core import shards


@dataclass(frozen=True)
class Knobs:
    """What decides only how fast the rows come."""

    device: str = "auto"
    batch: int = 0  # 0: what suits the device
    workers: int = 0  # 0: one for each core
    quiet: bool = False

    @property
    def threads(self) -> int:
        """Units worked on at once by the local runner."""
        return self.workers or len(os.sched_getaffinity(0))


def local_runner(knobs: Knobs, beam_options: Sequence[str]) -> list[str]:
    """The options of the default runner: Beam's FnApiRunner by name, in threads (workers.py has the processes).

    Beam's own default first tries to download a binary; its multi-processing mode hangs for good when a worker is
    killed, so it is refused.
    """
    if any("multi_processing" in option for option in beam_options):
        raise shards.InputError(
            "--direct_running_mode=multi_processing hangs when a worker is killed: use --workers, and "
            "several launchers with --shard-index/--num-shards over machines"
        )
    if any(option.startswith("--runner") for option in beam_options):
        return []
    return ["--runner=FnApiRunner", "--direct_running_mode=multi_threading", f"--direct_num_workers={knobs.threads}"]


def check_beam_options(beam_options: Sequence[str], ours: Iterable[str]) -> None:
    """Raises InputError for an option that neither we nor Beam know; other runners than the local one may know more."""
    if any(option.startswith("--runner") for option in beam_options):
        return
    known = PipelineOptions([]).get_all_options()
    for option in beam_options:
        name = option.lstrip("-").partition("=")[0]
        if option.startswith("-") and name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name, [*known, *(item.replace("_", "-") for item in ours)], n=3)
            hint = f"; did you mean {' or '.join('--' + item for item in near)}?" if near else ""
            raise shards.InputError(f"no option {option.partition('=')[0]}, neither of fusion nor of Beam{hint}")
