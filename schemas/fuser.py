"""The fuser's contract: what a table, an index and a fuser directory say about the fuser they were made with."""

from dataclasses import dataclass, field
from typing import Literal

from schemas import records

Space = Literal["backbone", "own"]


@dataclass(frozen=True)
class FuserSpec:
    """What a fuser is. Two fusers with one fingerprint give the same vectors."""

    type: str
    params: dict[str, float]
    out_dim: int
    space: Space
    fingerprint: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of fuser.safetensors."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FuserRecord:
    """A fuser directory's fuser.json."""

    spec: FuserSpec
    in_dim: int
    modalities: tuple[str, ...] = ("image", "text")
    backbone: str = ""  # fingerprint of the towers it was trained on; empty: any
    trained_on: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    schema_version: str = records.VERSION
