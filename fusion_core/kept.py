"""What a unit that was cut short had embedded: kept beside the table, taken up by its next attempt.

Nothing of it is needed or visible: an attempt that finds none begins anew. A file bears the SHA-256 of its bytes in its
name, so that a torn one is not used, and goes when the unit's record stands; or, with a unit that nobody tries again,
as any old temporary file does. On an object store nothing is kept.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from fusion_core import files, table
from schemas.feature_table import TableSpec
from schemas.samples import Unit

SAVE_SECONDS = 0.25  # what a kill costs at most (a file takes under 1 ms), and
_SAVE_SHARE = 0.02  # of what the unit has taken: one of hours shall not leave files by the thousand


# SHA-256 or caption, the image's width and height, and the vector, float16 [D].
KeptVector = tuple[bytes | None, str | None, int | None, int | None, np.ndarray]


class Kept:
    """The vectors of one unfinished unit: images by SHA-256, with the size as decoded, and captions."""

    def __init__(self, place: str, spec: TableSpec, unit: Unit):
        self._is_local = files.is_local(place)
        self._place, self._name = place, f"kept-{unit.id}-{spec.fingerprint[:16]}"
        self._vector = pa.list_(pa.float16(), spec.tower.embedding_dim)
        self._found: list[str] = []
        self._new: list[KeptVector] = []
        self._started = self._saved = time.monotonic()

    def read(self) -> Iterator[KeptVector]:
        """What earlier attempts have left whole."""
        pattern = re.compile(re.escape(self._name) + "-([0-9a-f]{64})")
        entries: list[files.Entry] = []
        with contextlib.suppress(OSError):
            if self._is_local:
                entries = files.list_files(files.join(self._place, files.TEMPORARY))
        for entry in entries:
            if match := pattern.fullmatch(entry.place.rpartition("/")[2]):
                self._found.append(entry.place)
                with contextlib.suppress(OSError, pa.ArrowException):
                    data = files.read_bytes(entry.place)
                    if hashlib.sha256(data).hexdigest() == match[1]:
                        yield from self._rows(data)

    def _rows(self, data: bytes) -> Iterator[KeptVector]:
        rows = pa.ipc.open_stream(data).read_all().combine_chunks()
        columns = [rows[name].to_pylist() for name in ("sha256", "caption", "width", "height")]
        yield from zip(*columns, table.to_numpy(rows["vector"].chunk(0)), strict=True)

    def image(self, sha256: bytes, width: int | None, height: int | None, vector: np.ndarray) -> None:
        """Keeps an image's vector, float16 [D]."""
        if self._is_local:
            self._new.append((sha256, None, width, height, vector))

    def caption(self, caption: str, vector: np.ndarray) -> None:
        """Keeps a caption's vector, float16 [D]."""
        if self._is_local:
            self._new.append((None, caption, None, None, vector))

    def save(self) -> None:
        """Writes what is new, where it is time to. A disk that does not take it is for others to tell."""
        now = time.monotonic()
        due = self._saved + SAVE_SECONDS + _SAVE_SHARE * (self._saved - self._started)
        if now < due or not self._new:
            return
        digests, captions, widths, heights, vectors = zip(*self._new, strict=True)
        columns = {
            "sha256": pa.array(digests, pa.binary(32)),
            "caption": pa.array(captions, pa.string()),
            "width": pa.array(widths, pa.int32()),
            "height": pa.array(heights, pa.int32()),
            "vector": table.to_arrow(np.stack(vectors), self._vector),
        }
        rows = pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_batch(rows)
        with contextlib.suppress(OSError), files.PendingFile(self._place) as pending:
            pending.write(sink.getvalue())
            name = f"{files.TEMPORARY}/{self._name}-{pending.sha256}"
            pending.publish(name, durably=False)
            self._found.append(files.join(self._place, name))
        self._new.clear()
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Deletes what was kept: the unit's record stands."""
        for place in self._found:
            with contextlib.suppress(OSError):
                files.remove(place)
