"""Where the Beam jobs run: the default runner, clusters, and the knobs that decide only how fast."""

import difflib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion_core import shards
from schemas.errors import RunError

if TYPE_CHECKING:  # a run that finds little to do is over before they would be imported
    import apache_beam as beam
    import grpc


class RunnerError(RunError):
    """A job that a cluster gave up, or that never reached it. What is recorded stays."""


@dataclass(frozen=True)
class Knobs:
    """What decides only how fast the rows come."""

    device: str = "auto"
    batch: int = 0  # 0: what suits the device
    workers: int = 0  # 0: one for each core
    quiet: bool = False
    local: bool = True  # the runner is this process, not a cluster

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
    if not is_local(beam_options):
        return []
    return ["--runner=FnApiRunner", "--direct_running_mode=multi_threading", f"--direct_num_workers={knobs.threads}"]


def is_local(beam_options: Sequence[str]) -> bool:
    """Whether the job runs in this process: no other runner is named."""
    return not any(option.startswith("--runner") for option in beam_options)


def run(pipeline: "beam.Pipeline", beam_options: Sequence[str]) -> None:
    """Runs a pipeline to its end; the cluster is asked to cancel an interrupted one.

    Raises RunnerError where a cluster gave the job up or was not reached: of its many lines, the last cause.
    """
    if is_local(beam_options):
        pipeline.run().wait_until_finish()
        return
    import grpc

    result = None
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except KeyboardInterrupt:
        with suppress(Exception):  # a cluster that is gone has nothing to cancel
            if result:
                result.cancel()
        raise
    except grpc.FutureTimeoutError as error:
        raise RunnerError("the job endpoint does not answer: is the job server running?") from error
    except grpc.RpcError as error:
        raise RunnerError(f"lost the job server ({_said(error)}); {_AGAIN}") from error
    except RuntimeError as error:
        raise RunnerError(f"the cluster gave the job up: {_last_cause(str(error))}; {_AGAIN}") from error


_AGAIN = "what is recorded stays: when the cluster is back, run the same command again to go on"


def _said(error: "grpc.RpcError") -> str:
    import grpc

    return str(error.details() if isinstance(error, grpc.Call) else error)


def _last_cause(text: str) -> str:
    """The innermost cause of a Java error's text, which is the one that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("at ")]
    return (lines[-1] if lines else "no reason given").removeprefix("Caused by: ")[:500]


def check_beam_options(beam_options: Sequence[str], ours: Iterable[str]) -> None:
    """Raises InputError for an option that neither we nor Beam know; other runners than the local one may know more."""
    if not is_local(beam_options) or not beam_options:
        return
    from apache_beam.options.pipeline_options import PipelineOptions

    known = PipelineOptions([]).get_all_options()
    for option in beam_options:
        name = option.lstrip("-").partition("=")[0]
        if option.startswith("-") and name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name, [*known, *(item.replace("_", "-") for item in ours)], n=3)
            hint = f"; did you mean {' or '.join('--' + item for item in near)}?" if near else ""
            raise shards.InputError(f"no option {option.partition('=')[0]}, neither of fusion nor of Beam{hint}")
