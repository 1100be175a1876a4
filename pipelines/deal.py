"""How units of work reach the workers: packed, so that a pipeline of a million is not larger than one of thousands."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import apache_beam as beam
import msgspec

ItemT = TypeVar("ItemT")

_PACKS = 8192  # a runner holds each of its elements several times, and the launcher sends them with the job


class Deal(beam.PTransform, Generic[ItemT]):  # type: ignore[misc]
    """Begin -> items of one type, big ones first, spread over the workers."""

    def __init__(self, kind: type[ItemT], items: Sequence[ItemT]):
        super().__init__()
        self._kind, self._packs = kind, pack(items)

    def expand(self, begin: Any) -> Any:
        """Reshuffle keeps the order of the packs."""
        packs = begin | "Packs" >> beam.Create(self._packs, reshuffle=False) | "Deal" >> beam.Reshuffle()
        return packs | "Unpack" >> beam.FlatMap(unpack, self._kind).with_output_types(self._kind)


def pack(items: Sequence[object]) -> list[bytes]:
    """The items, each in a pack of its own where they are not too many; else each pack has of the first and the last,
    so that all are about equally long.
    """
    packs = min(len(items), _PACKS)
    return [zlib.compress(msgspec.msgpack.encode(items[first::packs]), 1) for first in range(packs)]


def unpack(data: bytes, kind: Any) -> Iterator[Any]:  # Beam reads these types, and knows no type of types
    """A pack's items, of the type that was packed."""
    yield from msgspec.msgpack.decode(zlib.decompress(data), type=list[kind])
