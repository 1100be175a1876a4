"""The fusers against a few lines of numpy in float64."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion_core import fusers
from schemas.records import SchemaMismatch

SPECS = ["weighted_sum", "weighted_sum:image=0.7,text=0.3", "concat", "concat:image=0.2,text=0.8", "hadamard"]
D = 6


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def oracle(spec: str, image: np.ndarray | None, text: np.ndarray | None) -> np.ndarray | None:
    """One row in float64, absent modalities as None."""
    name, _, options = spec.partition(":")
    weights = {"image": 0.5, "text": 0.5, **{k: float(v) for k, v in (o.split("=") for o in options.split(",") if o)}}
    i = np.zeros(D) if image is None else unit(image.astype(np.float64))
    t = np.zeros(D) if text is None else unit(text.astype(np.float64))
    if name == "hadamard":
        fused = i * t
    elif name == "concat":
        fused = np.concatenate([np.sqrt(weights["image"]) * i, np.sqrt(weights["text"]) * t])
    else:
        fused = weights["image"] * i + weights["text"] * t
    return unit(fused) if np.linalg.norm(fused) > 0 else None


def random_rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, n, D)).astype(np.float32) * rng.uniform(0.1, 30, (2, n, 1)).astype(np.float32)
    return image, text, rng.random(n) < 0.7, rng.random(n) < 0.7


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [0, 1, 7, 257])
def test_each_row_is_the_oracles(spec: str, n: int) -> None:
    image, text, has_image, has_text = random_rows(n)
    fuser = fusers.parse(spec, D)
    fused, valid = fuser.fuse(image, text, has_image, has_text)
    assert (fused.dtype, fused.shape) == (np.float32, (n, fuser.spec.out_dim))
    for row in range(n):
        expected = oracle(spec, image[row] if has_image[row] else None, text[row] if has_text[row] else None)
        assert valid[row] == (expected is not None)
        np.testing.assert_allclose(fused[row], 0 if expected is None else expected, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_what_lies_in_an_absent_slot_does_not_matter(spec: str) -> None:
    image, text, has_image, has_text = random_rows(50, seed=1)
    fuser = fusers.parse(spec, D)
    expected, _ = fuser.fuse(image, text, has_image, has_text)
    image[~has_image], text[~has_text] = np.nan, 1e30
    found, _ = fuser.fuse(image, text, has_image, has_text)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS),
    hnp.arrays(np.float32, (2, 5, D), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.bool_, (2, 5)),
)
def test_results_are_unit_or_zero_and_rows_are_independent(spec: str, vectors: np.ndarray, present: np.ndarray) -> None:
    fuser = fusers.parse(spec, D)
    fused, valid = fuser.fuse(vectors[0], vectors[1], present[0], present[1])
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), valid.astype(np.float32), atol=1e-5)
    assert not valid[~(present[0] | present[1])].any()
    order = np.array([3, 0, 4, 1, 2])
    shuffled, _ = fuser.fuse(vectors[0][order], vectors[1][order], present[0][order], present[1][order])
    np.testing.assert_array_equal(shuffled, fused[order])


def test_one_weight_alone_is_the_identity_and_input_length_does_not_count() -> None:
    image, text, _, _ = random_rows(20)
    there = np.ones(20, bool)
    only_image, _ = fusers.parse("weighted_sum:image=1,text=0", D).fuse(image, text, there, there)
    np.testing.assert_allclose(only_image, fusers.normalize(image), atol=1e-6)
    half = fusers.parse("weighted_sum", D)
    np.testing.assert_allclose(
        half.fuse(image, text, there, there)[0], half.fuse(9 * image, text, there, there)[0], atol=1e-6
    )


def test_inner_products_of_concatenations_are_weighted_sums_of_inner_products() -> None:
    image, text, _, _ = random_rows(30)
    there = np.ones(30, bool)
    fused, _ = fusers.parse("concat:image=0.3,text=0.7", D).fuse(image, text, there, there)
    i, t = fusers.normalize(image), fusers.normalize(text)
    np.testing.assert_allclose(fused @ fused.T, 0.3 * i @ i.T + 0.7 * t @ t.T, atol=1e-6)


def test_spaces_are_named() -> None:
    assert [fusers.parse(spec, D).spec.space for spec in ("weighted_sum", "concat", "hadamard")] == [
        "backbone",
        "own",
        "own",
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_fuser_comes_back(tmp_path: Path, spec: str) -> None:
    fuser = fusers.parse(spec, D)
    fusers.save(fuser, str(tmp_path))
    assert fusers.parse(str(tmp_path), D) == fuser
    assert fusers.from_spec(fuser.spec) == fuser


def test_fingerprints_differ_with_anything_that_decides() -> None:
    found = [fusers.parse(spec, dim).spec.fingerprint for spec in SPECS for dim in (D, 2 * D)]
    assert len(set(found)) == len(SPECS) * 2
    assert fusers.parse("weighted_sum", D).spec == fusers.parse("weighted_sum:image=0.5", D).spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("median", "there are weighted_sum, concat, hadamard"),
        ("weighted_sum:picture=1", "no parameter 'picture'; it has image, text"),
        ("weighted_sum:image", "'image' is not like image=0.7"),
        ("hadamard:image=1", "no parameter 'image'; it has none"),
        ("concat:image=nan", "weights must be finite"),
        ("concat:image=-1", "not negative"),
        ("weighted_sum:image=0,text=0", "not all zero"),
    ],
)
def test_bad_specs_say_what_is_possible(spec: str, message: str) -> None:
    with pytest.raises(fusers.FuserError, match=message):
        fusers.parse(spec, D)


def test_tampered_folders_are_refused(tmp_path: Path) -> None:
    fusers.save(fusers.parse("weighted_sum:image=0.7,text=0.3", D), str(tmp_path))
    record = tmp_path / "fuser.json"
    with pytest.raises(fusers.FuserError, match="6 dimensions, the towers give 8"):
        fusers.parse(str(tmp_path), 8)
    whole = record.read_text()
    record.write_text(whole.replace("0.7", "0.9"))
    with pytest.raises(fusers.FuserError, match="fingerprint"):
        fusers.parse(str(tmp_path), D)
    record.write_text(whole.replace("weighted_sum", "os.system"))
    with pytest.raises(fusers.FuserError, match=r"no fuser 'os\.system'"):
        fusers.parse(str(tmp_path), D)
    record.write_text("{")
    with pytest.raises(SchemaMismatch):
        fusers.parse(str(tmp_path), D)


def test_formulas_do_not_open_torch() -> None:
    code = (
        "import sys, numpy as np\nfrom fusion_core import fusers\nthere = np.ones(1, bool)\n"
        "fusers.parse('weighted_sum', 4).fuse(np.ones((1, 4)), np.ones((1, 4)), there, there)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_weights_of_a_formula_fall_to_what_is_there() -> None:
    image, text, _, _ = random_rows(4)
    has_image, has_text = np.array([True, True, False, False]), np.array([True, False, True, False])
    _, _, weights = fusers.parse("weighted_sum:image=0.6,text=0.2", D).explain(image, text, has_image, has_text)
    np.testing.assert_allclose(weights, [[0.75, 0.25], [1, 0], [0, 1], [0, 0]])
    _, _, weights = fusers.parse("hadamard", D).explain(image, text, has_image, has_text)
    np.testing.assert_allclose(weights, [[0.5, 0.5], [0, 0], [0, 0], [0, 0]])
