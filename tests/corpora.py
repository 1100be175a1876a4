"""Small real corpora and tables for the tests."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fusion_core import fusers, manifest, table
from fusion_core.writer import UnitWriter
from schemas.feature_table import InputSpec, ManifestRecord, Preprocess, TableSpec, TowerSpec, features_schema
from schemas.samples import DeadLetter, InputIdentity, Unit

TOWER = TowerSpec("toy", "", "c" * 64, "w" * 64, 16, "fp32", Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3))
SPEC = TableSpec(TOWER, InputSpec())


def photo(
    seed: int, size: tuple[int, int] = (80, 60), format: str = "JPEG", mode: str = "RGB", **options: object
) -> bytes:
    """An encoded picture with smooth and noisy parts; the seed decides which."""
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (size[1], size[0], 3))
    image = Image.fromarray(np.clip(np.asarray(low) + noise, 0, 255).astype(np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of (name, content) members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(n: int, start: int = 0, size: tuple[int, int] = (80, 60)) -> list[tuple[str, bytes]]:
    """The members of n good samples: picture, caption, sidecar."""
    members = []
    for i in range(start, start + n):
        sidecar = {"url": f"https://pictures.example/{i}.jpg", "width": size[0], "note": "naïve"}
        members += [
            (f"{i:06d}.jpg", photo(i, size)),
            (f"{i:06d}.txt", f"a picture of number {i}".encode()),
            (f"{i:06d}.json", json.dumps(sidecar).encode()),
        ]
    return members


def toy_unit(name: str = "shard-0123456789ab", shard: str = "/data/shard.tar", **fields: object) -> Unit:
    """A unit that nothing needs to lie behind."""
    return Unit(id=name, layout="tar", shard=shard, identity=InputIdentity(1, 2), **fields)  # type: ignore[arg-type]


def toy_batch(
    rows: Iterable[int], spec: TableSpec = SPEC, shard: str = "/data/shard.tar", **columns: object
) -> pa.RecordBatch:
    """Feature rows with random unit vectors that the row number decides."""
    numbers = list(rows)
    schema = features_schema(spec)
    given: Mapping[str, object] = {
        "key": [f"k{row}" for row in numbers],
        "shard": [shard] * len(numbers),
        "row": numbers,
        "has_image": [True] * len(numbers),
        "has_text": [True] * len(numbers),
        "similarity": np.zeros(len(numbers), np.float32),
        **columns,
    }
    arrays = []
    for field in schema:
        if pa.types.is_fixed_size_list(field.type) and field.name not in given:
            arrays.append(table.to_arrow(toy_vectors(numbers, field.type.list_size, field.name), field.type))
        elif field.name in given:
            value = given[field.name]
            arrays.append(value if isinstance(value, pa.Array) else pa.array(value, field.type))
        else:
            arrays.append(pa.nulls(len(numbers), field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def toy_vectors(rows: Iterable[int], dim: int, salt: str) -> np.ndarray:
    """Unit vectors, float16 [n, dim]."""
    numbers = np.fromiter(rows, np.int64)
    matrix = np.random.default_rng([*salt.encode()]).normal(size=(numbers.max(initial=0) + 1, dim))[numbers]
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)


def write_unit(
    place: Path, unit: Unit, rows: Iterable[int], dead: Iterable[int] = (), spec: TableSpec = SPEC, **writer: object
) -> ManifestRecord:
    """One unit committed to the table at `place`."""
    manifest.claim(str(place), spec)
    with UnitWriter(str(place), spec, unit, **writer) as out:  # type: ignore[arg-type]
        out.write(toy_batch(rows, spec, unit.shard))
        out.reject(DeadLetter(f"k{row}", row, "decode", "CorruptImage", "broken on purpose") for row in dead)
        return out.commit()


def write_vectors(
    place: Path, image: np.ndarray, text: np.ndarray, spec: TableSpec, per_unit: int = 500, **columns: Any
) -> table.Table:
    """A table of these vectors [n, D], those of zeros being absent; `columns` are sequences of n values."""
    manifest.claim(str(place), spec)
    has = {"has_image": image.any(axis=1), "has_text": text.any(axis=1)}
    for start in range(0, len(image), per_unit):
        rows = slice(start, min(start + per_unit, len(image)))
        unit = toy_unit(f"unit-{start:012d}", f"/data/{start:09d}.tar")
        given = {name: value[rows] for name, value in (columns | has).items()}
        given.setdefault("key", [f"k{row}" for row in range(start, rows.stop)])
        given.setdefault("sha256", [hashlib.sha256(vector.tobytes()).digest() for vector in image[rows]])
        for name, matrix in (("image_embedding", image), ("text_embedding", text)):
            kind = features_schema(spec).field(name).type
            given[name] = table.to_arrow(matrix[rows].astype(np.float16), kind)
        with UnitWriter(str(place), spec, unit) as out:
            out.write(toy_batch(range(rows.stop - start), spec, unit.shard, **given))
            out.commit()
    return table.Table.open(str(place))


def write_triple(
    folder: Path, number: str, image: np.ndarray | None, text: np.ndarray | None, columns: dict[str, Any]
) -> None:
    """As clip-retrieval writes it: np.save and DataFrame.to_parquet."""
    for side, matrix in (("img_emb", image), ("text_emb", text)):
        if matrix is not None:
            (folder / side).mkdir(parents=True, exist_ok=True)
            np.save(folder / side / f"{side}_{number}.npy", matrix)
    import pandas as pd

    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / "metadata" / f"metadata_{number}.parquet")


def untrained_fuser(kind: str, dim: int = 16, seed: int = 0, backbone: str = "b" * 64) -> fusers.Fuser:
    """A fuser whose every tensor is random, so that no part of it does nothing."""
    import torch

    from fusion_core import fuser_nets

    torch.manual_seed(seed)
    params = fuser_nets.defaults(kind, dim)
    net = fuser_nets.build(kind, dim, params)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return fusers.trained(kind, dim, params, net, backbone)


def write_scene_index(folder: Path, scenes: int = 40) -> str:
    """The place of an index of drawn scenes, embedded with the demo's model, and of some rows that are odd: a caption
    in HTML, a picture without a caption, a transparent one, a caption without a picture.
    """
    from fusion_core import build, shards, towers, unit
    from fusion_core.demo import shards as demo_shards

    (shard,) = demo_shards.write_shards(folder / "shards", scenes, scenes, 7, broken=False)
    odd = [
        ("odd-html.jpg", photo(1)),
        ("odd-html.txt", HTML_CAPTION.encode()),
        ("odd-silent.jpg", photo(2)),
        ("odd-clear.png", photo(3, (90, 40), "PNG", "RGBA")),
        ("odd-clear.txt", b"a transparent picture"),
        ("odd-words.txt", b"words alone"),
    ]
    write_tar(folder / "shards" / "odd.tar", odd)
    demo, inputs = towers.load(towers.DEMO, device="cpu", precision="fp32"), InputSpec()
    spec = manifest.claim(str(folder / "table"), TableSpec(demo.spec, inputs))
    for work in shards.plan([str(shard.parent / "*.tar")], inputs):
        unit.run_unit(unit.Work(work), str(folder / "table"), spec, demo)
    build.build(table.Table.open(str(folder / "table")), str(folder / "index"))
    return str(folder / "index")


def write_scene_table(
    folder: Path, scenes: int, members: Iterable[tuple[str, bytes]] = (), seed: int = 7
) -> table.Table:
    """A table of drawn scenes (and of a shard of other members), embedded with the demo's model in fp32 on the CPU."""
    from fusion_core import shards, towers, unit
    from fusion_core.demo import shards as demo_shards

    demo_shards.write_shards(folder / "shards", scenes, scenes, seed, broken=False)
    if members := list(members):
        write_tar(folder / "shards" / "more.tar", members)
    demo = towers.load(towers.DEMO, device="cpu", precision="fp32")
    spec = manifest.claim(str(folder / "table"), TableSpec(demo.spec, InputSpec()))
    for work in shards.plan([str(folder / "shards" / "*.tar")], spec.input):
        unit.run_unit(unit.Work(work), str(folder / "table"), spec, demo)
    return table.Table.open(str(folder / "table"))


HTML_CAPTION = "<img src=x onerror=document.title='broken'> <script>alert(1)</script> & more"


def assert_same_rows(found: pa.Table, expected: pa.Table) -> None:
    """The same rows; their vectors to one step of float16, all else to the bit."""
    derived = [name for name in ("similarity", *table.EMBEDDINGS) if name in expected.column_names]
    assert found.drop(derived).equals(expected.drop(derived))
    for name in derived:
        a, b = (rows[name].combine_chunks() for rows in (found, expected))
        if name == "similarity":
            np.testing.assert_allclose(a.to_numpy(zero_copy_only=False), b.to_numpy(zero_copy_only=False), atol=1e-3)
        else:
            np.testing.assert_allclose(table.to_numpy(a), table.to_numpy(b), atol=1e-3)
