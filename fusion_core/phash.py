"""A picture's perceptual hash: 64 bits that stay nearly the same when it is encoded anew or resized.

Each bit tells whether one of the 8 x 8 lowest frequencies (DCT-II) of the picture in 32 x 32 grey pixels is above their
median. From the pixels on all is whole numbers, so that no kind of processor changes a bit.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core import files, images, readers, shards
from fusion_core.table import Table
from schemas.dedup import HASHES
from schemas.feature_table import ManifestRecord, Preprocess
from schemas.samples import Sample

_PARTS_AT_ONCE = 256

SIDE, FREQUENCIES = 32, 8
_SCALE_BITS = 14
_SMALL = Preprocess(SIDE, SIDE, (0.0,) * 3, (1.0,) * 3, "bilinear", "squash")
_LUMA = np.array([299, 587, 114])  # thousandths of red, green and blue, as in JPEG
# [8, 32]: row u is the cosine of frequency u at the middle of each pixel, times 2^14.
_WAVES = np.rint(
    np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)) * 2**_SCALE_BITS
).astype(np.int64)
_FAINTEST = SIDE * SIDE // 4 << 2 * _SCALE_BITS  # the coefficient of a wave that swings by one grey level


def of_image(image: bytes, max_pixels: int) -> int | None:
    """The hash of an encoded picture; None where there is nothing to see in it. Raises images.BadImage."""
    pixels = images.decode(image, _SMALL, max_pixels).pixels
    return of_grey((pixels @ _LUMA + 500) // 1000)


def of_grey(grey: npt.NDArray[np.integer]) -> int | None:
    """The hash of grey levels 0 to 255, [32, 32]; None where all but their mean is fainter than one grey level.

    Such pictures (blank pages, plain colours) would otherwise all be near each other.
    """
    lowest = (_WAVES @ grey.astype(np.int64) @ _WAVES.T).reshape(-1)
    if np.abs(lowest[1:]).max() < _FAINTEST:
        return None
    middle = np.sort(lowest)[lowest.size // 2 - 1 : lowest.size // 2 + 1].sum()
    return int(np.packbits(2 * lowest > middle).view(">u8")[0])


# --- of a table -----------------------------------------------------------------------------------------------------


class Hashes:
    """The perceptual hashes of a table's pictures, in files that are row-aligned with its parts."""

    def __init__(self, place: str, table: Table):
        self._place, self._table = place, table

    def complete(self, workers: int, hashed: Callable[[int], None]) -> None:
        """Hashes the parts that have no hashes yet, reading their shards again."""
        missing = []
        for record in self._parts():
            if self._stands(record):
                hashed(record.rows_out)
            else:
                missing.append(record)
        with ThreadPoolExecutor(workers, "fusion-hash") as pool:
            for start in range(0, len(missing), _PARTS_AT_ONCE):
                for rows in pool.map(self._write, missing[start : start + _PARTS_AT_ONCE]):
                    hashed(rows)

    def of(self, record: ManifestRecord) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """The hashes [n] of a part's rows, and whether there is one [n]."""
        column = pq.read_table(pa.BufferReader(files.read_bytes(self._file(record))))["hash"].combine_chunks()
        return column.fill_null(0).to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)

    def _parts(self) -> list[ManifestRecord]:
        return [record for record in self._table.records if record.features]

    def _file(self, record: ManifestRecord) -> str:
        assert record.features is not None
        return files.join(self._place, "hashes", record.features.path.rpartition("/")[2])

    def _stands(self, record: ManifestRecord) -> bool:
        if files.stat(self._file(record)) is None:
            return False
        with files.open_input(self._file(record)) as stream, contextlib.suppress(pa.ArrowInvalid):
            found = pq.ParquetFile(stream)
            return bool(found.schema_arrow.equals(HASHES, True) and found.metadata.num_rows == record.rows_out)
        return False

    def _write(self, record: ManifestRecord) -> int:
        assert record.features is not None
        rows = self._table.read_part(record.features, ["row", "has_image"])
        pictured = rows.filter(rows["has_image"])["row"].to_numpy()
        found = _hash_unit(record, self._table, set(pictured.tolist()))
        if len(found) != len(pictured) or shards.identity(record.unit) != record.unit.identity:
            raise shards.InputError(
                f"{record.unit.shard} is not what was embedded any more: repeat the `fusion embed` that wrote the table"
            )
        numbers = rows["row"].to_pylist()
        columns = {
            "row": rows["row"].combine_chunks(),
            "hash": pa.array([found.get(row) for row in numbers], pa.uint64()),
        }
        with files.PendingFile(self._place) as pending:
            pq.write_table(pa.table(columns, HASHES), pending, compression="zstd", use_dictionary=False)
            pending.publish(f"hashes/{record.features.path.rpartition('/')[2]}")
        return record.rows_out


def _hash_unit(record: ManifestRecord, table: Table, wanted: set[int]) -> dict[int, int | None]:
    """The hashes of a unit's pictures by row, of the rows wanted."""
    found: dict[int, int | None] = {}
    for item in readers.read(record.unit, table.spec.input):
        if isinstance(item, Sample) and item.image is not None and item.row in wanted:
            try:
                found[item.row] = of_image(item.image, table.spec.input.max_pixels)
            except images.BadImage:  # it was decoded once: by a release that judged it otherwise
                found[item.row] = None
    return found
