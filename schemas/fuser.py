"""The fuser's contract: what a table, an index and a fuser directory say about the fuser they were made with."""

from dataclasses import dataclass, field
from typing import Literal

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
    """A fuser directory's fuser.json.

    In a record of a version that a reader knows, fields that it does not know are an error, not ignored. `promoted`
    came with 1.1: whether a trained fuser beat the best single modality and the tuned weighted sum on held-out rows,
    with an interval that excludes zero; None where nothing was measured.
    """

    spec: FuserSpec
    in_dim: int
    modalities: tuple[str, ...] = ("image", "text")
    backbone: str = ""  # fingerprint of the towers it was trained on; empty: any
    trained_on: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    promoted: bool | None = None
    schema_version: str = "1.1"


@dataclass(frozen=True)
class TrainJob:
    """What decides a trained fuser, beside the rows that it is trained on."""

    kind: str = "combiner"
    target: Literal["image", "text"] = "image"  # the column of whole rows that a fused query is to find
    loss: Literal["info_nce", "siglip"] = "info_nce"
    label_weight: float = 1.0  # of the cross-entropy of labels beside the contrastive loss
    coral: float = 0.0  # of these distances between fused(image alone) and fused(text alone), as regularisers
    mmd: float = 0.0
    jsd: float = 0.0  # of what the two find among a batch's targets
    modality_dropout: float | None = None  # share of rows that lose one; None: 0.2 if any row lacks one, else 0
    class_weights: bool = False  # by inverse frequency
    logit_adjustment: float = 0.0  # times the log of a class's share, added to its logit in training; 1 is usual
    epochs: int = 0  # 0: 25, but between 500 and about 5,000 steps
    patience: int = 0  # epochs without a better validation before training ends; 0: a quarter of all
    batch_rows: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    max_rows: int = 1_000_000  # of the table, drawn in whole row groups
    seed: int = 0
