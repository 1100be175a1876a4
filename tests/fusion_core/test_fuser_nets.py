"""Trained fusers against their formulas in float64, and their folders against tampering."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fusion_core import fusers
from schemas.records import SchemaMismatch
from tests.corpora import untrained_fuser

D = 16
KINDS = list(fusers.TRAINED)


def rows(n: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, n, D)).astype(np.float32) * rng.uniform(0.1, 30, (2, n, 1)).astype(np.float32)
    return [image, text, rng.random(n) < 0.7, rng.random(n) < 0.7]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def oracle(fuser: fusers.Fuser, image: np.ndarray, text: np.ndarray, has: tuple[bool, bool]) -> tuple[Any, Any]:
    """One row in float64 with the fuser's own weights: the unit vector, and the modalities' weights."""
    assert fuser.net is not None
    w = {name: tensor.double().numpy() for name, tensor in fuser.net.state_dict().items()}
    x = [unit(v.astype(np.float64)) if there else np.zeros(D) for v, there in zip((image, text), has, strict=True)]
    m = np.array(has, np.float64)
    forced = None if all(has) else float(has[0])
    if fuser.spec.type == "gate":
        z = sigmoid(linear(w, "gate", np.concatenate([*x, m])))[0] if forced is None else forced
        return unit(z * x[0] + (1 - z) * x[1]), (z, 1 - z)
    if fuser.spec.type == "gmu":
        z = sigmoid(linear(w, "gate", np.concatenate([*x, m]))) if forced is None else np.full(D, forced)
        mixed = z * np.tanh(linear(w, "image", x[0])) + (1 - z) * np.tanh(linear(w, "text", x[1]))
        return unit(mixed), (z.mean(), 1 - z.mean())
    if fuser.spec.type == "combiner":
        joined = np.concatenate(
            [np.maximum(linear(w, n, v), 0) for n, v in zip(("image", "text"), x, strict=True)] + [m]
        )
        z = sigmoid(linear(w, "gate", np.maximum(linear(w, "gate_hidden", joined), 0)))[0] if forced is None else forced
        extra = linear(w, "output", np.maximum(linear(w, "hidden", joined), 0))
        return unit(extra + z * x[0] + (1 - z) * x[1]), (z, 1 - z)
    tokens = np.stack([w["query"], x[0] * D**0.5 + w["kinds"][0], x[1] * D**0.5 + w["kinds"][1]])
    heads, seen = int(fuser.spec.params["heads"]), [0, *(i + 1 for i in (0, 1) if has[i])]
    q, k, v = np.split(linear(w, "blocks.0.qkv", layer_norm(w, "blocks.0.normal_1", tokens)), 3, axis=1)
    mixed, shares = np.zeros((3, D)), np.zeros((heads, 3))
    for h in range(heads):
        part = slice(h * D // heads, (h + 1) * D // heads)
        scores = np.exp(q[:, part] @ k[seen, part].T / np.sqrt(D // heads))
        attention = scores / scores.sum(axis=1, keepdims=True)
        mixed[:, part] = attention @ v[seen, part]
        shares[h, seen] = attention[0]
    tokens = tokens + linear(w, "blocks.0.attended", mixed)
    hidden = linear(w, "blocks.0.hidden", layer_norm(w, "blocks.0.normal_2", tokens))
    erf = torch.special.erf(torch.from_numpy(hidden / np.sqrt(2))).numpy()
    tokens = tokens + linear(w, "blocks.0.output", hidden * (1 + erf) / 2)
    out = (x[0] + x[1]) / sum(has) + linear(w, "output", layer_norm(w, "normal", tokens[0]))
    share = shares.mean(axis=0)[1:]
    return unit(out), share / share.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 7, 257])
def test_each_row_is_the_formulas(kind: str, n: int) -> None:
    fuser, (image, text, has_image, has_text) = untrained_fuser(kind), rows(n)
    fused, valid, weights = fuser.explain(image, text, has_image, has_text)
    assert (fused.dtype, fused.shape, weights.shape) == (np.float32, (n, D), (n, 2))
    np.testing.assert_array_equal(valid, has_image | has_text)
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), valid, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), valid, atol=1e-5)
    assert not weights[:, 0][~has_image].any() and not weights[:, 1][~has_text].any()
    for row in range(min(n, 40)):
        has = bool(has_image[row]), bool(has_text[row])
        if any(has):
            vector, shares = oracle(fuser, image[row], text[row], has)
            np.testing.assert_allclose(fused[row], vector, atol=1e-5)
            np.testing.assert_allclose(weights[row], shares, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_slots_do_not_matter_and_rows_are_independent(kind: str) -> None:
    fuser, (image, text, has_image, has_text) = untrained_fuser(kind), rows(150)
    expected, _ = fuser.fuse(image, text, has_image, has_text)
    order = np.random.default_rng(2).permutation(150)
    shuffled, _ = fuser.fuse(image[order], text[order], has_image[order], has_text[order])
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-5)
    for cut in (1, 63, 64, 100):
        parts = [fuser.fuse(image[s], text[s], has_image[s], has_text[s])[0] for s in (slice(0, cut), slice(cut, None))]
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    image[~has_image], text[~has_text] = np.nan, 1e30
    found, _ = fuser.fuse(image, text, has_image, has_text)
    np.testing.assert_array_equal(found, expected)
    image[has_image] = np.nan
    with pytest.raises(fusers.FuserError, match="present holds NaN"):
        fuser.fuse(image, text, has_image, has_text)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences_and_never_nan(kind: str) -> None:
    fuser = untrained_fuser(kind, dim=4)
    net = fuser.net
    assert net is not None
    net = net.double()
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    has_image, has_text = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    call = lambda image, text: net(image, text, has_image, has_text)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (image, text))
    broken = image.detach().clone()
    broken[2:] = float("nan")
    net(broken, text.detach(), has_image, has_text)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_a_gate_pushed_to_its_ends_is_one_modality() -> None:
    for kind in ("gate", "combiner"):
        fuser, (image, text, _, _) = untrained_fuser(kind), rows(20)
        there = np.ones(20, bool)
        assert fuser.net is not None
        shares = []
        for bias in (-1e4, -2.0, 0.0, 2.0, 1e4):
            with torch.no_grad():
                fuser.net.gate.bias.fill_(bias)  # type: ignore[union-attr,operator]
                if kind == "combiner":
                    fuser.net.output.weight.zero_()  # type: ignore[union-attr,operator]
                    fuser.net.output.bias.zero_()  # type: ignore[union-attr,operator]
            fused, _, weights = fuser.explain(image, text, there, there)
            shares.append(weights[:, 0])
            if abs(bias) == 1e4:
                np.testing.assert_allclose(fused, fusers.normalize(image if bias > 0 else text), atol=1e-5)
        assert (np.diff(shares, axis=0) >= 0).all()


def test_attention_does_not_know_an_order_but_by_kind() -> None:
    fuser, (image, text, has_image, has_text) = untrained_fuser("attention"), rows(40)
    expected, _ = fuser.fuse(image, text, has_image, has_text)
    assert fuser.net is not None
    with torch.no_grad():
        fuser.net.kinds.copy_(fuser.net.kinds.flip(0).clone())  # type: ignore[operator,union-attr]
    swapped, _ = fuser.fuse(text, image, has_text, has_image)
    np.testing.assert_allclose(swapped, expected, atol=1e-5)


# --- folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_fuser_comes_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    fuser = untrained_fuser(kind)
    fusers.save(fuser, str(tmp_path / "fuser"))
    loaded = fusers.parse(str(tmp_path / "fuser"), D, "b" * 64)
    assert loaded.spec == fuser.spec and loaded.record == fuser.record
    for before, after in zip(fuser.fuse(*rows(30)), loaded.fuse(*rows(30)), strict=True):
        np.testing.assert_array_equal(before, after)
    fusers.keep(fuser, str(tmp_path / "table"))
    assert fusers.from_spec(fuser.spec, str(tmp_path / "table")).record == fuser.record


def test_the_fingerprint_is_of_content_not_of_files(tmp_path: Path) -> None:
    fuser = untrained_fuser("combiner")
    fusers.save(fuser, str(tmp_path))
    tensors = load_file(tmp_path / fusers.TENSORS)
    save_file(tensors, tmp_path / fusers.TENSORS, metadata={"a": "1", "b": "2"})
    assert fusers.load(str(tmp_path), D).spec.fingerprint == fuser.spec.fingerprint
    others = [untrained_fuser("combiner", seed=1), untrained_fuser("combiner", backbone="c" * 64)]
    assert len({fuser.spec.fingerprint, *(other.spec.fingerprint for other in others)}) == 3


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def done(folder: Path) -> None:
        record = json.loads((folder / fusers.RECORD).read_text())
        change(record)
        (folder / fusers.RECORD).write_text(json.dumps(record))

    return done


def retensor(change: Callable[[dict[str, np.ndarray]], None], told: bool = False) -> Callable[[Path], None]:
    """Changes tensors; with `told`, so that fuser.json tells of what they are now."""

    def done(folder: Path) -> None:
        tensors = load_file(folder / fusers.TENSORS)
        change(tensors)
        save_file(tensors, folder / fusers.TENSORS)
        if told:
            import hashlib

            record = json.loads((folder / fusers.RECORD).read_text())
            for name, array in tensors.items():
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                record["tensors"][name] = {"dtype": "F32", "shape": list(array.shape), "sha256": digest}
            (folder / fusers.RECORD).write_text(json.dumps(record))

    return done


def flip(folder: Path) -> None:
    data = bytearray((folder / fusers.TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / fusers.TENSORS).write_bytes(data)


def nothing_finite(tensors: dict[str, np.ndarray]) -> None:
    tensors["gate.bias"][:] = np.nan


def huge(record: dict[str, Any]) -> None:
    record["spec"]["params"]["hidden"] = 1e9


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (flip, "does not have the SHA-256"),
        (lambda folder: (folder / fusers.TENSORS).unlink(), "is missing"),
        (lambda folder: (folder / fusers.TENSORS).write_bytes(b"x" * 100), "has 100 bytes"),
        (
            lambda folder: (folder / fusers.TENSORS).write_bytes(bytes((folder / fusers.TENSORS).stat().st_size)),
            "no safe",
        ),
        (retensor(lambda t: t.update({"gate.bias": np.zeros(2, np.float32)})), r"float32 \(1,\)"),
        (retensor(lambda t: t.update({"gate.bias": np.zeros(2, np.float32)}), told=True), "names other tensors"),
        (retensor(lambda t: t.update({"gate.bias": np.zeros(1, np.float64)})), "float64"),
        (retensor(lambda t: t.update(more=np.zeros(2, np.float32))), "holds other tensors.*'more'"),
        (retensor(nothing_finite, told=True), "NaN or infinity"),
        (retensor(lambda t: t.update({"gate.bias": np.ones(1, np.float32)}), told=True), "fingerprint"),
        (edit(lambda r: r.update(extra=1)), "has a field that no fuser of version 1.1 has: extra"),
        (edit(lambda r: r["spec"].update(extra=1)), r"spec\.extra"),
        (edit(lambda r: r["spec"].update(type="os.system")), r"no fuser 'os\.system'"),
        (edit(lambda r: r["spec"].update(type="gate")), "the parameters"),
        (edit(huge), r"hidden = 1e\+09|hidden = 1000000000"),
        (edit(lambda r: r["spec"].update(space="own")), "fingerprint"),
        (edit(lambda r: r.update(backbone="c" * 64)), "other towers"),
        (edit(lambda r: r.update(schema_version="2.0")), "version '2.0'"),
    ],
)
def test_tampered_folders_are_refused_by_name(tmp_path: Path, tamper: Callable[[Path], None], message: str) -> None:
    fusers.save(untrained_fuser("combiner"), str(tmp_path))
    tamper(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        fusers.parse(str(tmp_path), D, "b" * 64)
    assert isinstance(caught.value, (fusers.FuserError, SchemaMismatch))


def test_fields_of_a_later_minor_version_are_passed_over(tmp_path: Path) -> None:
    fusers.save(untrained_fuser("gate"), str(tmp_path))
    edit(lambda r: r.update(schema_version="1.7", later="x"))(tmp_path)
    assert fusers.load(str(tmp_path), D).spec == untrained_fuser("gate").spec


def test_other_dimensions_and_towers_are_refused_and_trained_kinds_need_a_folder(tmp_path: Path) -> None:
    fusers.save(untrained_fuser("gate"), str(tmp_path / "fuser"))
    with pytest.raises(fusers.FuserError, match="16 dimensions, the towers give 8"):
        fusers.parse(str(tmp_path / "fuser"), 8)
    with pytest.raises(fusers.FuserError, match="other towers"):
        fusers.parse(str(tmp_path / "fuser"), D, "c" * 64)
    with pytest.raises(fusers.FuserError, match="fit one with `fusion train`"):
        fusers.parse("gate", D)
    spec = untrained_fuser("gate").spec
    with pytest.raises(fusers.FuserError, match="is missing"):
        fusers.from_spec(spec, str(tmp_path / "nowhere"))
    fusers.keep(untrained_fuser("gate"), str(tmp_path / "table"))
    with pytest.raises(fusers.FuserError, match="is another fuser"):
        fusers.from_spec(dataclasses.replace(spec, out_dim=8), str(tmp_path / "table"))


def test_what_is_differentiated_is_what_is_computed() -> None:
    net = untrained_fuser("combiner", D).net
    assert net is not None
    slots = [torch.from_numpy(array) for array in rows(50)]
    learned, _ = net(*slots)
    with torch.no_grad():
        plain, _ = net(*slots)
    torch.testing.assert_close(learned, plain, rtol=0, atol=1e-5)
    learned[:, 0].sum().backward()
    for name, tensor in net.named_parameters():
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape and tensor.grad.any(), name
