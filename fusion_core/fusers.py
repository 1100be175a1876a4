"""Fusers: two embeddings of one row into one vector, with masks for what is missing; their spec, saving and loading.

Inputs are L2-normalised before they are weighed (summing vectors of unequal length lets the longer one decide). Some
fusers are formulas with weights that a command line can give; others are trained (training.py) and are loaded from a
folder: `fuser.json`, and `fuser.safetensors` with their tensors. Nothing of it is unpickled or imported by name.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fusion_core import files
from schemas import records
from schemas.errors import UserError
from schemas.fuser import FuserRecord, FuserSpec, Space, TensorRecord

if TYPE_CHECKING:
    from fusion_core.fuser_nets import Net

Fuse = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]

RECORD, TENSORS = "fuser.json", "fuser.safetensors"
TRAINED: dict[str, Space] = {"gate": "backbone", "gmu": "own", "combiner": "backbone", "attention": "backbone"}

_RECORD_BYTES = 1 << 20
_HEADER_BYTES = 1 << 16  # of a safetensors file: some tens of tensors
_FORWARD_ROWS = 64  # of every forward of a trained fuser: what shares a batch changes no shape


class FuserError(UserError):
    """A fuser that is not known or not well-formed: what was given, and what is possible."""


@dataclass(frozen=True)
class Fuser:
    """Fuses image and text embeddings as its spec says."""

    spec: FuserSpec
    record: FuserRecord | None = field(default=None, compare=False, repr=False)  # of a trained one
    net: "Net | None" = field(default=None, compare=False, repr=False)

    def fuse(
        self, image: np.ndarray, text: np.ndarray, has_image: np.ndarray, has_text: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fused vectors, float32 [n, out_dim] of unit length, and bool [n]: whether the row has one (else zeros).

        `image`, `text`: float [n, D]; `has_image`, `has_text`: bool [n]. What lies in an absent slot does not matter.
        """
        fused, valid, _ = self.explain(image, text, has_image, has_text)
        return fused, valid

    def explain(
        self, image: np.ndarray, text: np.ndarray, has_image: np.ndarray, has_text: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `fuse`, and float32 [n, 2]: how much image and text weighed, together 1, or 0 where there is no vector.

        Of a formula they are its own, of a gate its z, of a GMU the mean z, of attention what its query attends to.
        """
        image, text = _slot(image, has_image), _slot(text, has_text)
        if self.net is not None:
            fused, weights = _forward(self.net, image, text, has_image, has_text)
            needed = has_image | has_text
        else:
            kind = _KINDS[self.spec.type]
            given = [self.spec.params.get(name, 1.0) for name in ("image", "text")]
            fused = kind.fuse(image, text, *given)
            needed = (has_image & has_text) if kind.needs_both else (has_image | has_text)
            weights = np.stack([has_image, has_text], axis=1) * np.array(given, np.float32)
        fused = normalize(np.where(needed[:, None], fused, 0))
        valid = np.asarray(fused.any(axis=1))
        weights = np.where(valid[:, None], weights, 0)
        total = weights.sum(axis=1, keepdims=True)
        shares = np.divide(weights, total, out=np.zeros_like(weights, np.float32), where=total > 0)
        return fused, valid, shares


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


def parse(text: str, dim: int, backbone: str = "") -> Fuser:
    """The fuser that a command line names: `weighted_sum:image=0.7,text=0.3`, `concat`, `hadamard`, or a folder.

    `dim` is the towers' embedding dimension, `backbone` their fingerprint. Raises FuserError.
    """
    name, _, options = text.partition(":")
    if name not in _KINDS and files.stat(files.join(files.absolute(text), RECORD)):
        return load(files.absolute(text), dim, backbone)
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
    if kind in TRAINED:
        raise FuserError(f"the fuser {kind} is trained: fit one with `fusion train`, and name its folder")
    if kind not in _KINDS:
        raise FuserError(f"no fuser {kind!r}; there are {', '.join(_KINDS)}, or a folder with {RECORD}")
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


def from_spec(spec: FuserSpec, place: str = "") -> Fuser:
    """The fuser of a table's or index's spec; raises FuserError when this release would not build the same one.

    `place` is that table or index, below which a trained fuser lies.
    """
    if spec.type in TRAINED:
        kept = _kept(_home(place, spec), spec.fingerprint)
        if kept.spec != spec:
            raise FuserError(
                f"{_home(place, spec)} is another fuser: {'; '.join(records.differences(kept.spec, spec))}"
            )
        return kept
    if spec.type not in _KINDS:
        raise FuserError(f"no fuser {spec.type!r}; this release knows {', '.join([*_KINDS, *TRAINED])}")
    fuser = create(spec.type, spec.params, spec.out_dim // _KINDS[spec.type].width)
    if fuser.spec != spec:
        raise FuserError(f"fuser {spec.type}: {'; '.join(records.differences(fuser.spec, spec))}")
    return fuser


def save(fuser: Fuser, place: str) -> None:
    """Writes the fuser's folder, `fuser.json` last."""
    record = fuser.record
    if fuser.net is not None and record is not None:
        from safetensors.numpy import save as to_bytes

        files.write_bytes(place, TENSORS, to_bytes(_tensors(fuser.net)))
    else:
        width = _KINDS[fuser.spec.type].width
        record = FuserRecord(spec=fuser.spec, in_dim=fuser.spec.out_dim // width)
    files.write_bytes(place, RECORD, records.to_json(record, indent=2))


def load(place: str, dim: int, backbone: str = "") -> Fuser:
    """The fuser of a folder, for embeddings of `dim` dimensions by the towers whose fingerprint is `backbone`.

    Raises FuserError or SchemaMismatch.
    """
    where = files.join(place, RECORD)
    record = _read_record(where)
    if record.in_dim != dim:
        raise FuserError(f"{where} fuses embeddings of {record.in_dim} dimensions, the towers give {dim}")
    if record.backbone and backbone and record.backbone != backbone:
        raise FuserError(
            f"{where} was trained on embeddings of other towers (backbone {record.backbone[:12]}) than these "
            f"({backbone[:12]}): train one on a table of these"
        )
    return _read_trained(place, record) if record.spec.type in TRAINED else from_spec(record.spec)


def keep(fuser: Fuser, place: str) -> None:
    """Copies a trained fuser below the table or index at `place`, which needs it; of a formula the spec says all."""
    home = _home(place, fuser.spec)
    if fuser.net is not None and files.stat(files.join(home, RECORD)) is None:
        save(fuser, home)


def trained(kind: str, dim: int, params: Mapping[str, float], net: "Net", backbone: str, **told: Any) -> Fuser:
    """A trained fuser of its network (on the CPU); `told` fills the record's fields about its training."""
    tensors = _tensors(net)
    named = {name: TensorRecord("F32", array.shape, _digest(array)) for name, array in sorted(tensors.items())}
    params = {name: float(value) for name, value in params.items()}
    spec = FuserSpec(kind, params, dim, TRAINED[kind], _fingerprint(kind, params, dim, backbone, tensors))
    return Fuser(spec, FuserRecord(spec, dim, backbone=backbone, tensors=named, **told), net.eval())


def with_record(fuser: Fuser, **told: Any) -> Fuser:
    """The trained fuser, with other things told of it."""
    assert fuser.record is not None
    return replace(fuser, record=replace(fuser.record, **told))


# --- trained fusers: what their folder holds, checked


def _home(place: str, spec: FuserSpec) -> str:
    return files.join(place, "fusers", spec.fingerprint[:16])


@lru_cache(8)
def _kept(home: str, fingerprint: str) -> Fuser:
    """The trained fuser in a table or index; read once, as a folder of its name holds nothing else."""
    where = files.join(home, RECORD)
    if files.stat(where) is None:
        raise FuserError(f"{where} is missing: a table or index is copied with its trained fuser, or written anew")
    record = _read_record(where)
    if record.spec.fingerprint != fingerprint or record.spec.type not in TRAINED:
        raise FuserError(f"{where} is another fuser than its folder says: {record.spec.fingerprint}")
    return _read_trained(home, record)


def _read_record(where: str) -> FuserRecord:
    entry = files.stat(where)
    if entry is not None and entry.size_bytes > _RECORD_BYTES:
        raise FuserError(f"{where} has {entry.size_bytes:,} bytes; a fuser's record has at most {_RECORD_BYTES:,}")
    data = files.read_bytes(where)
    record = records.from_json(FuserRecord, data, where)
    minor = record.schema_version.partition(".")[2]
    if minor.isdecimal() and int(minor) <= int(FuserRecord.schema_version.partition(".")[2]):
        try:
            unknown = _unknown(msgspec.json.decode(data), msgspec.to_builtins(record))
        except records.NOT_JSON as error:
            raise FuserError(f"{where} is damaged ({error}): copy or train the fuser anew") from error
        if unknown:
            raise FuserError(f"{where} has a field that no fuser of version {record.schema_version} has: {unknown}")
    return record


def _unknown(given: Any, known: Any, prefix: str = "") -> str:
    """The first field that was given and is not known, by its path; empty when there is none."""
    if not (isinstance(given, dict) and isinstance(known, dict)):
        return ""
    extra = sorted(given.keys() - known.keys())
    found = (_unknown(given[name], known[name], f"{prefix}{name}.") for name in sorted(given.keys() & known.keys()))
    return prefix + extra[0] if extra else next(filter(None, found), "")


def _read_trained(place: str, record: FuserRecord) -> Fuser:
    """The fuser of a record that was read from `place`; every tensor is checked before it is used."""
    import torch

    from fusion_core import fuser_nets

    spec, where = record.spec, files.join(place, TENSORS)
    if wrong := fuser_nets.wrong_params(spec.type, record.in_dim, spec.params):
        raise FuserError(f"{files.join(place, RECORD)}: the fuser {spec.type} has {wrong}")
    expected = fuser_nets.build(spec.type, record.in_dim, spec.params, "meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    told = {name: tensor.shape for name, tensor in record.tensors.items()}
    if told != shapes or any(tensor.dtype != "F32" for tensor in record.tensors.values()):
        raise FuserError(
            f"{files.join(place, RECORD)} names other tensors than a fuser {spec.type} has: {_odd(told, shapes)}"
        )
    tensors = _read_tensors(where, record.tensors)
    if _fingerprint(spec.type, spec.params, record.in_dim, record.backbone, tensors) != spec.fingerprint or (
        (spec.out_dim, spec.space) != (record.in_dim, TRAINED[spec.type])
    ):
        raise FuserError(
            f"{files.join(place, RECORD)} does not have the fingerprint of what it says: copy or train it anew"
        )
    net = fuser_nets.build(spec.type, record.in_dim, spec.params, "meta")
    net.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, assign=True)
    return Fuser(spec, record, net.eval())


def _read_tensors(where: str, told: Mapping[str, TensorRecord]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    size = sum(4 * int(np.prod(tensor.shape)) for tensor in told.values())
    entry = files.stat(where)
    if entry is None or not size <= entry.size_bytes <= size + _HEADER_BYTES:
        found = "is missing" if entry is None else f"has {entry.size_bytes:,} bytes"
        raise FuserError(f"{where} {found}; {RECORD} tells of tensors of {size:,} bytes: copy or train the fuser anew")
    try:
        tensors = from_bytes(files.read_bytes(where))
    except (SafetensorError, ValueError, KeyError) as error:
        raise FuserError(f"{where} is no safetensors file: {error}") from error
    if tensors.keys() != told.keys():
        raise FuserError(f"{where} holds other tensors than {RECORD} names: {_odd(tensors, told)}")
    for name, array in tensors.items():
        if array.dtype != np.float32 or array.shape != told[name].shape:
            raise FuserError(
                f"{where}: the tensor {name} is {array.dtype} {array.shape}, not float32 {told[name].shape}"
            )
        if _digest(array) != told[name].sha256:
            raise FuserError(f"{where}: the tensor {name} does not have the SHA-256 that {RECORD} says")
        if not np.isfinite(array).all():
            raise FuserError(f"{where}: the tensor {name} holds NaN or infinity")
    return tensors


def _odd(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """What differs first between two sets of tensors."""
    names = sorted(ours.keys() ^ theirs.keys()) or [name for name in sorted(ours) if ours[name] != theirs[name]]
    return f"{names[0]!r} {ours.get(names[0], 'is missing')}" if names else "their type"


def _tensors(net: "Net") -> dict[str, np.ndarray]:
    state = net.state_dict()
    return {name: np.ascontiguousarray(state[name].detach().cpu().float().numpy()) for name in sorted(state)}


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _fingerprint(
    kind: str, params: Mapping[str, float], dim: int, backbone: str, tensors: Mapping[str, np.ndarray]
) -> str:
    """SHA-256 over the canonical JSON of what it is, and over its tensors by name: not over a file."""
    body = {"type": kind, "params": dict(params), "in_dim": dim, "backbone": backbone}
    held: Iterable[list[Any]] = ([name, list(a.shape), _digest(a)] for name, a in sorted(tensors.items()))
    return records.fingerprint([body, list(held)])


# --- computing


def _forward(
    net: "Net", image: np.ndarray, text: np.ndarray, has_image: np.ndarray, has_text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [n, D] and weights [n, 2]; every forward has the same number of rows."""
    import torch

    n, out = len(image), (np.zeros((len(image), net.dim), np.float32), np.zeros((len(image), 2), np.float32))
    inputs = (image, text, has_image, has_text)
    with torch.inference_mode():
        for start in range(0, n, _FORWARD_ROWS):
            rows = slice(start, min(n, start + _FORWARD_ROWS))
            found = net(*(torch.from_numpy(_padded(array[rows])) for array in inputs))
            for whole, part in zip(out, found, strict=True):
                whole[rows] = part[: rows.stop - start].numpy()
    return out


def _padded(rows: np.ndarray) -> np.ndarray:
    missing = _FORWARD_ROWS - len(rows)
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _slot(vectors: np.ndarray, present: np.ndarray) -> np.ndarray:
    given = np.where(present[:, None], vectors, 0)
    if not np.isfinite(given).all():
        raise FuserError("an embedding that is said to be present holds NaN or infinity")
    return normalize(given)
