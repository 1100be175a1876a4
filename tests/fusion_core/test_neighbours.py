"""Each way of finding pairs against all pairs compared in float64, whatever the memory."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_core import neighbours
from fusion_core.neighbours import Components

PLENTY, LITTLE = 2 << 30, 1
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def labels(rows: int, pairs: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> list[int]:
    """The first row of each row's component, found by walking: the oracle."""
    linked: dict[int, set[int]] = {row: set() for row in range(rows)}
    for a, b in pairs:
        linked[a].add(b)
        linked[b].add(a)
    label: list[int] = [-1] * rows
    for row in range(rows):
        waiting = [row] if label[row] < 0 else []
        while waiting:
            found = waiting.pop()
            if label[found] < 0:
                label[found] = row
                waiting += linked[found]
    return label


def found(components: Components) -> list[int]:
    return components.roots(np.arange(len(components))).tolist()


def halves(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)


def near_pairs(vectors: np.ndarray, cosine: float) -> list[tuple[int, int]]:
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return [(int(a), int(b)) for a, b in np.argwhere(exact @ exact.T >= cosine - neighbours.TOLERANCE) if a < b]


def families(rows: int, dim: int, spread: float, seed: int = 0) -> np.ndarray:
    """Vectors in groups of three that are near each other, in shuffled order."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((-(-rows // 3), dim)), 3, axis=0)[:rows]
    return halves(rng.permutation(centres + spread * rng.standard_normal((rows, dim))))


@quick
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_those_found_by_walking(case: tuple[int, list[tuple[int, int]]]) -> None:
    rows, pairs = case
    components = Components(rows)
    for start in range(0, len(pairs), 7):
        some = np.array(pairs[start : start + 7], np.int64).reshape(-1, 2)
        components.join(some[:, 0], some[:, 1])
    expected = labels(rows, pairs)
    assert found(components) == expected
    assert components.is_joined().tolist() == [expected.count(label) > 1 for label in expected]


def test_a_long_chain_and_a_wide_star_are_joined_quickly() -> None:
    rows = 200_000
    components = Components(2 * rows + 1)
    components.join(np.arange(1, rows), np.arange(rows - 1))
    components.join(np.arange(rows, 2 * rows), np.full(rows, 2 * rows))
    assert set(found(components)) == {0, rows}


@quick
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 60), kinds=st.integers(1, 40))
@pytest.mark.parametrize("memory_bytes", [PLENTY, LITTLE])
def test_equal_digests_are_joined(tmp_path: Path, memory_bytes: int, seed: int, rows: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    digests = rng.integers(0, 2, (kinds, 4)).astype(np.uint64)[rng.integers(0, kinds, rows)]  # equal but for one word
    numbers = np.arange(5, 5 + rows)
    components = Components(5 + rows)
    blocks = [(numbers[start : start + 9], digests[start : start + 9]) for start in range(0, rows, 9)]
    neighbours.join_equal(components, blocks, rows, str(tmp_path), memory_bytes)
    pairs = [(a + 5, b + 5) for a, b in itertools.combinations(range(rows), 2) if (digests[a] == digests[b]).all()]
    assert found(components) == labels(5 + rows, pairs)
    assert not list(tmp_path.iterdir()), "scratch files are removed once read"


@quick
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 80), bits=st.integers(0, 10), flips=st.integers(0, 14))
@pytest.mark.parametrize("memory_bytes", [PLENTY, LITTLE])
def test_hashes_that_differ_in_few_bits_are_joined(
    tmp_path: Path, memory_bytes: int, seed: int, rows: int, bits: int, flips: int
) -> None:
    rng = np.random.default_rng(seed)
    originals = rng.integers(0, 2**64, 5, dtype=np.uint64)[rng.integers(0, 5, rows)]
    masks = [
        sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, flips + 1), replace=False)) for _ in range(rows)
    ]
    hashes = originals ^ np.array(masks, np.uint64)
    components = Components(rows)
    neighbours.join_near_bits(components, [(np.arange(rows), hashes)], rows, bits, str(tmp_path), memory_bytes)
    values = [int(value) for value in hashes]
    pairs = [(a, b) for a, b in itertools.combinations(range(rows), 2) if (values[a] ^ values[b]).bit_count() <= bits]
    assert found(components) == labels(rows, pairs)


@pytest.mark.parametrize("rows", [10, 10**4, 10**6, 10**9])
@pytest.mark.parametrize("bits", [0, 1, 4, 10])
def test_whichever_bits_differ_some_mask_leaves_them_out(rows: int, bits: int) -> None:
    masks = [int(mask) for mask in neighbours._masks(rows, bits)]
    rng = np.random.default_rng(0)
    for _ in range(300):
        flipped = sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False))
        assert any(not mask & flipped for mask in masks)


@quick
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), cosine=st.floats(0.3, 1.0))
@pytest.mark.parametrize("memory_bytes", [PLENTY, LITTLE])
def test_few_vectors_are_compared_all_with_all(
    tmp_path: Path, memory_bytes: int, seed: int, rows: int, cosine: float
) -> None:
    vectors = families(rows, 6, 0.3, seed)
    components = Components(rows)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.arange(rows // 2), vectors[: rows // 2]
        yield np.arange(rows // 2, rows), vectors[rows // 2 :]

    cells, measured = neighbours.join_near_vectors(components, blocks, rows, cosine, str(tmp_path), memory_bytes)
    assert (cells, measured) == (1, None)
    assert found(components) == labels(rows, near_pairs(vectors, cosine))


@pytest.mark.parametrize("memory_bytes", [PLENTY, LITTLE])
def test_cells_find_nearly_all_pairs_and_tell_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    monkeypatch.setattr(neighbours, "BRUTE_ROWS", 100)
    vectors = families(3000, 24, 0.16)
    pairs = near_pairs(vectors, 0.95)
    assert len(pairs) > 1000
    components = Components(len(vectors))
    cells, measured = neighbours.join_near_vectors(
        components, lambda: [(np.arange(3000), vectors)], 3000, 0.95, str(tmp_path), memory_bytes
    )
    label = found(components)
    met = np.mean([label[a] == label[b] for a, b in pairs])
    assert cells == 110 and measured is not None
    assert measured.queries > 700 and measured.pairs > 300
    assert met > 0.97
    assert abs(measured.found / measured.pairs - met) < 0.02
    assert all(label[a] == label[b] for a, b in enumerate(labels(3000, pairs)) if label[a] != a), (
        "nothing else is joined"
    )


def test_visits_that_are_spared_would_find_nothing() -> None:
    import torch

    vectors = families(2000, 8, 0.1)
    unit = neighbours._unit(vectors, "cpu")
    centres = unit[torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:12]]
    near, spared = (neighbours._Cells(centres, cosine).near(unit) for cosine in (-1.0, 0.95))
    assert (near >= 0).all()
    assert 0.1 < (spared < 0).mean() < 0.75
    assert (near[spared >= 0] == spared[spared >= 0]).all()
    for a, b in near_pairs(vectors, 0.95):
        for one, other in ((a, b), (b, a)):
            assert (near[other, 0] in near[one]) == (near[other, 0] in spared[one])


def test_a_crowd_is_compared_with_others_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    compare = neighbours._near_pairs

    def counted(left: Any, right: Any, *more: Any) -> Any:
        nonlocal compared
        compared += len(left) * len(right)
        return compare(left, right, *more)

    monkeypatch.setattr(neighbours, "_near_pairs", counted)
    rng = np.random.default_rng(0)
    crowd = rng.standard_normal(16) + 0.01 * rng.standard_normal((10_000, 16))
    vectors = halves(np.concatenate([crowd, rng.standard_normal((500, 16))]))
    rows = len(vectors)
    components = Components(rows)
    neighbours.join_near_vectors(components, lambda: [(np.arange(rows), vectors)], rows, 0.99, str(tmp_path), PLENTY)
    assert set(found(components)[:10_000]) == {0}
    assert found(components)[10_000:] == list(range(10_000, rows))
    assert compared < 0.3 * rows**2


def test_the_same_seed_gives_the_same_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BRUTE_ROWS", 100)
    vectors = families(1500, 16, 0.2)
    results = []
    for memory_bytes in (PLENTY, LITTLE):
        components = Components(1500)
        told = neighbours.join_near_vectors(
            components, lambda: [(np.arange(1500), vectors)], 1500, 0.9, str(tmp_path), memory_bytes
        )
        results.append((found(components), told))
    assert results[0] == results[1]


def test_a_pair_at_the_threshold_counts(tmp_path: Path) -> None:
    """Whatever float32 products say."""
    vectors = halves(np.random.default_rng(1).standard_normal((40, 512)))
    vectors = np.concatenate([vectors, vectors])
    a, b = neighbours.near_pairs(vectors, vectors, 1.0)
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == sorted(
        (i, j) for i in range(80) for j in range(80) if i % 40 == j % 40
    )
