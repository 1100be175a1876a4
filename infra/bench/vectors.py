"""Tables of synthetic vectors with what makes retrieval hard: few intrinsic dimensions, clusters, a modality gap.

A pair shares a meaning (a point of a mixture in `latent` dimensions of falling variance); each modality adds noise of
its own and a constant offset. Rows are made unit by unit, so that a table of any size costs the memory of one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core import manifest, table
from fusion_core.writer import UnitWriter
from schemas.feature_table import Preprocess, TableSpec, TowerSpec, features_schema
from schemas.samples import InputIdentity, Unit

Floats = npt.NDArray[np.float32]
CLUSTERS = 2000
UNIT_ROWS = 25_000


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class World:
    """Where pairs are drawn from."""

    def __init__(self, dim: int = 512, latent: int = 96, seed: int = 0):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.standard_normal((dim, latent + 2)))[0].T.astype(np.float32)
        scale = (1 + np.arange(latent, dtype=np.float32)) ** -0.5
        self._basis, self._gaps = basis[:latent] * scale[:, None], basis[latent:]
        self._centres = rng.standard_normal((CLUSTERS, latent), dtype=np.float32)
        self._dim = dim

    def pairs(self, rows: int, seed: int) -> tuple[Floats, Floats]:
        """Image and text vectors [rows, D]."""
        rng = np.random.default_rng([1, seed])
        latent = self._centres.shape[1]
        meaning = self._centres[rng.integers(CLUSTERS, size=rows)]
        meaning = meaning + 0.9 * rng.standard_normal((rows, latent), dtype=np.float32)
        found = []
        for noise, gap in zip((0.3, 0.6), self._gaps, strict=True):
            seen = _unit((meaning + noise * rng.standard_normal((rows, latent), dtype=np.float32)) @ self._basis)
            grain = np.float32(0.15 / np.sqrt(self._dim)) * rng.standard_normal((rows, self._dim), dtype=np.float32)
            found.append(_unit(seen + 0.8 * gap + grain))
        return found[0], found[1]


def write_unit(
    place: Path, spec: TableSpec, number: int, keys: Sequence[str], image: Floats, text: Floats, **columns: pa.Array
) -> None:
    """A unit of a table: vectors [n, D], of zeros where a modality is absent; `columns` beside what they need."""
    schema, n = features_schema(spec), len(keys)
    given = {field.name: pa.nulls(n, field.type) for field in schema}
    unit = Unit(_name(number), "tar", f"/data/{number:06d}.tar", InputIdentity(1, 1))
    given |= {"key": pa.array(keys), "shard": pa.array([unit.shard] * n), "row": pa.array(np.arange(n))} | columns
    for side, matrix in (("image", image), ("text", text)):
        given[f"has_{side}"] = pa.array(matrix.any(axis=1))
        name = f"{side}_embedding"
        given[name] = table.to_arrow(matrix.astype(np.float16), schema.field(name).type)
    with UnitWriter(str(place), spec, unit) as writer:
        writer.write(pa.record_batch([given[name] for name in schema.names], schema=schema))
        writer.commit()


def _name(number: int) -> str:
    return f"unit-{number:06d}"


def write_table(place: Path, rows: int, dim: int = 512, unit_rows: int = UNIT_ROWS) -> table.Table:
    """A table of so many pairs at `place`; the units that stand there, of as many rows, are taken as they are."""
    tower = TowerSpec("synthetic", "", "c", "w", dim, "fp32", Preprocess(32, 32, (0.5,) * 3, (0.5,) * 3))
    spec, world = manifest.claim(str(place), TableSpec(tower)), World(dim)
    standing = manifest.read(str(place)).by_unit
    for number, start in enumerate(range(0, rows, unit_rows)):
        n = min(unit_rows, rows - start)
        if _name(number) not in standing:
            keys = [str(start + row) for row in range(n)]
            write_unit(place, spec, number, keys, *world.pairs(n, number + 1))
    manifest.compact(str(place))
    return table.Table.open(str(place))
