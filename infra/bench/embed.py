"""The real embedding job against the bare limits of its decoder and its towers, alternately.

    python -m infra.bench.embed [--quick] [--model tiny demo vit] [--precision fp32 bf16]

The job is `fusion embed` whole, run in this process through pipelines.cli after one unmeasured run, so that imports and
the loading of the model are excluded and everything else (planning, Beam, Parquet, manifest, compaction, report) is in.
Bare, with the same decode function, towers, batch and units in a process for each core, no Beam, Arrow or table:

    decode    the images' bytes, in memory, to pixels
    forward   ready pixels and ready captions through both towers
    loop      decode and forward, batch after batch in each process: the most that cores doing both can give

`÷ lower` is the job's rate by the lower of decode and forward: the target where a device does the forward. On a CPU the
same cores do both, so `÷ loop` tells what the job itself costs, and `CPU loop ÷ job` tells it in CPU-seconds, which
count alike when other processes take cores away. `fixed s` is the job over one sample a core.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core import images, readers, shards, towers
from infra.bench import measure, models, photos
from infra.bench.models import Model
from pipelines import cli
from schemas.feature_table import InputSpec

COLUMNS = (
    "model", "precision", "samples", "batch", "job/s", "decode/s", "forward/s", "loop/s", "÷ lower", "÷ loop",
    "CPU loop ÷ job", "fixed s",
)  # fmt: skip


@dataclass
class Samples:
    """One unit's content in memory, images in batches; `pixels` are of its first batch."""

    batches: list[list[bytes]]
    captions: list[str]
    pixels: np.ndarray


def load(paths: Sequence[Path], tower: towers.Towers, batch: int) -> list[Samples]:
    """What the shards hold."""
    units = []
    for unit in shards.plan([str(path) for path in paths], InputSpec()):
        found: list[Any] = list(readers.read(unit, InputSpec()))
        encoded = [sample.image for sample in found]
        batches = [encoded[start : start + batch] for start in range(0, len(encoded), batch)]
        units.append(Samples(batches, [sample.caption for sample in found], decode_all(tower, batches[0])))
    return units


def decode_all(tower: towers.Towers, encoded: Sequence[bytes]) -> np.ndarray:
    """The job's decode function over a batch."""
    preprocess, limit = tower.spec.preprocess, InputSpec().max_pixels
    return np.stack([images.decode(image, preprocess, limit).pixels for image in encoded])


def decode(tower: towers.Towers, unit: Samples) -> None:
    """Bytes to pixels."""
    for batch in unit.batches:
        decode_all(tower, batch)


def forward(tower: towers.Towers, unit: Samples) -> None:
    """Both towers, called as the job calls them: images batch by batch, a unit's captions at once."""
    for batch in unit.batches:
        tower.embed_images(unit.pixels[: len(batch)], pad_to=len(unit.pixels))
    tower.embed_texts(unit.captions, pad_to=len(unit.pixels))


def loop(tower: towers.Towers, unit: Samples) -> None:
    """Decode and forward."""
    for batch in unit.batches:
        tower.embed_images(decode_all(tower, batch), pad_to=len(unit.pixels))
    tower.embed_texts(unit.captions, pad_to=len(unit.pixels))


class Bare:
    """A process for each core, forked with the towers and the units in its memory."""

    def __init__(self, tower: towers.Towers, units: Sequence[Samples]):
        _GIVEN[:] = [tower, units]
        self._samples, self._units = sum(len(unit.captions) for unit in units), range(len(units))
        self._pool = ProcessPoolExecutor(measure.CORES, multiprocessing.get_context("fork"))
        self.rate(decode)

    def rate(self, work: Callable[[towers.Towers, Samples], None]) -> float:
        """Samples per second of `work` over the units."""
        return self._samples / measure.seconds(lambda: list(self._pool.map(partial(_on_unit, work), self._units)))

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown()


_GIVEN: list[Any] = []  # towers and units


def _on_unit(work: Callable[[towers.Towers, Samples], None], unit: int) -> None:
    work(_GIVEN[0], _GIVEN[1][unit])


def job(paths: Sequence[Path], model: Model, precision: str, samples: int) -> float:
    """Samples per second of `fusion embed` into a new table."""
    place = tempfile.mkdtemp(prefix="fusion-bench-")
    argv = ["embed", "--input", *map(str, paths), "--output", f"{place}/table", *model.options]
    argv += ["--precision", precision, "--device", "cpu", "--quiet"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            took = measure.seconds(lambda: _must(cli.main(argv)))
    finally:
        shutil.rmtree(place)
    return samples / took


def count_cpu(case: Callable[[], float], seconds: list[float]) -> float:
    """What the case returns; the CPU-seconds that it took are appended."""
    start = measure.cpu_seconds()
    result = case()
    seconds.append(measure.cpu_seconds() - start)
    return result


def _must(code: int) -> None:
    if code:
        raise RuntimeError(f"fusion embed ended with {code}")


def row(model: Model, precision: str, pairs: int, args: argparse.Namespace) -> list[Any]:
    """One line of the table, without the model's name."""
    tower = towers.load(model.name, model.pretrained, "cpu", precision)
    precision, batch = tower.spec.precision, tower.batch
    towers.one_thread_each()
    paths = photos.write_shards(args.cache, args.kind, pairs, (1 if model.pretrained else 4) * measure.CORES)
    tiny = photos.write_shards(args.cache, args.kind, measure.CORES, measure.CORES)
    units = load(paths, tower, batch)
    if sum(len(unit.captions) for unit in units) != pairs:
        raise RuntimeError(f"{paths[0].parent} does not hold {pairs} pairs: remove it")
    bare = Bare(tower, units)  # before Beam starts threads, which do not fork well
    job(tiny, model, precision, measure.CORES)
    cpu: dict[str, list[float]] = {}
    cases = {
        "job": partial(job, paths, model, precision, pairs),
        **{work.__name__: partial(bare.rate, work) for work in (decode, forward, loop)},
        "fixed": lambda: 1 / job(tiny, model, precision, 1),
    }
    counted = {name: partial(count_cpu, case, cpu.setdefault(name, [])) for name, case in cases.items()}
    found = measure.alternately(counted, args.repeats, warm=False)
    bare.close()
    rates = [found[name] for name in ("job", "decode", "forward", "loop")]
    ratios = [found["job"] / min(found["decode"], found["forward"]), found["job"] / found["loop"]]
    ratios.append(statistics.median(cpu["loop"]) / statistics.median(cpu["job"]))
    return [precision, pairs, batch, *rates, *ratios, found["fixed"]]


def main() -> None:
    """One row for each model and precision."""
    parser = measure.arguments("embed", __doc__)
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=models.NAMES)
    parser.add_argument("--precision", nargs="+", default=["auto"])
    parser.add_argument("--kind", choices=photos.KINDS, default="small", help="of photograph (default: %(default)s)")
    parser.add_argument("--pairs", type=int, help="samples (default: 6144, with vit 1024)")
    args = parser.parse_args()
    load, rows = measure.Load(), []
    for name, precision in itertools.product(args.model, args.precision):
        pairs = args.pairs or (1024 if name == "vit" else 6144) // (8 if args.quick else 1)
        rows.append([name, *row(models.named(name, args.cache), precision, pairs, args)])
    measure.tell("embed", args, load, COLUMNS, rows)


if __name__ == "__main__":
    main()
