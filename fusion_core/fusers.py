"""Fusers: two embeddings of one row into one vector, with masks for what is missing; their spec, saving and loading.

Inputs are L2-normalised before they are weighed (summing vectors of unequal length lets the longer one decide).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusion_core import files
from schemas import records
from schemas.fuser import FuserRecord, FuserSpec, Space

Fuse = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]


class FuserError(ValueError):
    """A fuser that is not known or not well-formed: what was given, and what is possible."""


@dataclass(frozen=True)
class Fuser:
    """Fuses image and text embeddings as its spec says."""

    spec: FuserSpec

    def fuse(
        self, image: np.ndarray, text: np.ndarray, has_image: np.ndarray, has_text: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fused vectors, float32 [n, out_dim] of unit length, and bool [n]: whether the row has one (else zeros).

        `image`, `text`: float [n, D]; `has_image`, `has_text`: bool [n]. What lies in an absent slot does not matter.
        """
        kind = _KINDS[self.spec.type]
        image, text = _slot(image, has_image), _slot(text, has_text)
        fused = kind.fuse(image, text, self.spec.params.get("image", 1.0), self.spec.params.get("text", 1.0))
        needed = (has_image & has_text) if kind.needs_both else (has_image | has_text)
        fused = normalize(np.where(needed[:, None], fused, 0))
        return fused, np.asarray(fused.any(axis=1))


@dataclass(frozen=True)
class _Kind:
    fuse: Fuse
    space: Space
    width: int  # out_dim = width * D
    weighted: bool
    needs_both: bool


def _weighted_sum(image: np.ndarray, text: np.ndarray, w_image: float, w_text: float) -> np.ndarray:
    """w_i x_i + w_t x_t; a missing modality leaves the other one as it is. Ranks as the weighted sum of cosines."""
    return np.asarray(w_image * image + w_text * text)


def _concat(image: np.ndarray, text: np.ndarray, w_image: float, w_text: float) -> np.ndarray:
    """[sqrt(w_i) x_i, sqrt(w_t) x_t]: inner products of such vectors are weighted sums of the modalities' own."""
    return np.concatenate([np.sqrt(w_image) * image, np.sqrt(w_text) * text], axis=1)


def _hadamard(image: np.ndarray, text: np.ndarray, w_image: float, w_text: float) -> np.ndarray:
    """x_i * x_t, elementwise; not defined with a modality missing."""
    return np.asarray(image * text)


_KINDS = {
    "weighted_sum": _Kind(_weighted_sum, "backbone", 1, weighted=True, needs_both=False),
    "concat": _Kind(_concat, "own", 2, weighted=True, needs_both=False),
    "hadamard": _Kind(_hadamard, "own", 1, weighted=False, needs_both=True),
}


def normalize(vectors: np.ndarray) -> np.ndarray:
    """The rows as float32 of unit L2 norm; rows of zeros stay zeros."""
    vectors = vectors.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))


def parse(text: str, dim: int) -> Fuser:
    """The fuser that a command line names: `weighted_sum:image=0.7,text=0.3`, `concat`, `hadamard`, or a folder.

    `dim` is the towers' embedding dimension. Raises FuserError.
    """
    name, _, options = text.partition(":")
    if name not in _KINDS and files.stat(files.join(files.absolute(text), "fuser.json")):
        return load(files.absolute(text), dim)
    params = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        try:
            params[key.strip()] = float(value)
        except ValueError:
            raise FuserError(f"fuser {text!r}: {option!r} is not like image=0.7") from None
    return create(name, params, dim)


def create(kind: str, params: dict[str, float], dim: int) -> Fuser:
    """A fuser of a registered kind over embeddings of `dim` dimensions; weights default to 0.5 each."""
    if kind not in _KINDS:
        raise FuserError(f"no fuser {kind!r}; there are {', '.join(_KINDS)}, or a folder with fuser.json")
    known = ("image", "text") if _KINDS[kind].weighted else ()
    if unknown := sorted(params.keys() - set(known)):
        raise FuserError(f"fuser {kind} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    params = {name: float(params.get(name, 0.5)) for name in known}
    weights = np.array(list(params.values()) or [1.0])
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise FuserError(f"fuser {kind}: weights must be finite, not negative and not all zero, not {params}")
    body = {"type": kind, "params": params, "in_dim": dim}
    spec = FuserSpec(kind, params, dim * _KINDS[kind].width, _KINDS[kind].space, records.fingerprint(body))
    return Fuser(spec)


def from_spec(spec: FuserSpec) -> Fuser:
    """The fuser of a table's or index's spec; raises FuserError when this release would not build the same one."""
    if spec.type not in _KINDS:
        raise FuserError(f"no fuser {spec.type!r}; this release knows {', '.join(_KINDS)}")
    fuser = create(spec.type, spec.params, spec.out_dim // _KINDS[spec.type].width)
    if fuser.spec != spec:
        raise FuserError(f"fuser {spec.type}: {'; '.join(records.differences(fuser.spec, spec))}")
    return fuser


def save(fuser: Fuser, place: str) -> None:
    """Writes the fuser's folder."""
    width = _KINDS[fuser.spec.type].width
    record = FuserRecord(spec=fuser.spec, in_dim=fuser.spec.out_dim // width)
    files.write_bytes(place, "fuser.json", records.to_json(record, indent=2))


def load(place: str, dim: int) -> Fuser:
    """The fuser of a folder, for embeddings of `dim` dimensions; raises FuserError or SchemaMismatch."""
    where = files.join(place, "fuser.json")
    record = records.from_json(FuserRecord, files.read_bytes(where), where)
    if record.in_dim != dim:
        raise FuserError(f"{where} fuses embeddings of {record.in_dim} dimensions, the towers give {dim}")
    return from_spec(record.spec)


def _slot(vectors: np.ndarray, present: np.ndarray) -> np.ndarray:
    return normalize(np.where(present[:, None], vectors, 0))
