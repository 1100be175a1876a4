"""The losses against open_clip's own and against loops over pairs."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from fusion_core import losses, metrics

N, D = 6, 5


def units(seed: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1)


def test_contrastive_losses_are_open_clips() -> None:
    x, y, scale, bias = units(0), units(1), torch.tensor(14.3), torch.tensor(-10.0)
    assert float(losses.info_nce(x, y, scale)) == pytest.approx(float(ClipLoss()(x, y, scale)), abs=1e-9)
    assert float(losses.siglip(x, y, scale, bias)) == pytest.approx(float(SigLipLoss()(x, y, scale, bias)), abs=1e-9)


def test_duplicates_are_no_negatives() -> None:
    x, y, scale, bias = units(0), units(1), torch.tensor(8.0), torch.tensor(-3.0)
    same = losses.same_content(torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([5, 6, 7, 7, -1, -1]))
    assert same.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [2, 3], [3, 2], [3, 3], [4, 4], [5, 5]]
    logits = scale * x @ y.T
    nce = siglip = 0.0
    for i in range(N):
        kept = [j for j in range(N) if j == i or not same[i, j]]
        nce += float(torch.logsumexp(logits[i, kept], 0) - logits[i, i]) / 2
        nce += float(torch.logsumexp(logits[kept, i], 0) - logits[i, i]) / 2
        siglip += sum(math.log1p(math.exp(-(1 if i == j else -1) * float(logits[i, j] + bias))) for j in kept)
    assert float(losses.info_nce(x, y, scale, same)) == pytest.approx(nce / N, abs=1e-9)
    assert float(losses.siglip(x, y, scale, bias, same)) == pytest.approx(siglip / N, abs=1e-9)


def test_coral_sees_shape_and_not_place() -> None:
    x, y = units(0, 50), units(1, 50) @ torch.diag(torch.tensor([3.0, 1, 1, 1, 1], dtype=torch.float64))
    assert float(metrics.coral(x, x)) == 0
    assert float(metrics.coral(x, x + 7)) == pytest.approx(0, abs=1e-12)
    expected = ((torch.cov(x.T) - torch.cov(y.T)) ** 2).sum() / (4 * D * D)
    assert float(metrics.coral(x, y)) == pytest.approx(float(expected), rel=1e-9)
    assert float(metrics.relative_coral(x, y)) > 0


def test_mmd_is_the_loop_over_pairs() -> None:
    x, y = units(0), units(1) + 0.5
    both = torch.cat([x, y])
    squares = [float(((a - b) ** 2).sum()) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    median = sorted(squares)[(len(squares) - 1) // 2]
    kernel = lambda a, b: math.exp(-float(((a - b) ** 2).sum()) / (2 * median))  # noqa: E731
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(N) for j in range(N) if i != j) / (N * (N - 1))
    across = sum(kernel(a, b) for a in x for b in y) / (N * N)
    assert float(losses.mmd2(x, y)) == pytest.approx(within - 2 * across, abs=1e-9)


def test_mmd_of_one_distribution_is_about_zero_and_of_two_is_not() -> None:
    both = units(3, 200)
    permuted = []
    for seed in range(40):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        permuted.append(float(losses.mmd2(both[order[:100]], both[order[100:]])))
    assert abs(sum(permuted) / 40) < 1e-3
    assert float(losses.mmd2(both[:100], both[100:] + 0.5)) > 10 * max(map(abs, permuted))


def test_jsd_is_nothing_for_equals_and_at_most_one_bit() -> None:
    x, y, anchors = units(0), units(1), units(2, 9)
    assert float(losses.neighbour_jsd(x, x, anchors)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(losses.neighbour_jsd(x, y, anchors)) < 1
    assert float(losses.neighbour_jsd(anchors[:1], anchors[1:2], anchors, scale=1e4)) == pytest.approx(1, abs=1e-6)
    assert float(losses.neighbour_jsd(x, y, anchors)) == pytest.approx(
        float(losses.neighbour_jsd(y, x, anchors)), abs=1e-12
    )


@pytest.mark.parametrize("name", ["info_nce", "siglip", "coral", "mmd", "jsd"])
def test_gradients_are_those_of_differences(name: str) -> None:
    x, y = units(0).requires_grad_(), units(1)
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    # The width of MMD's kernel is not differentiated: a fixed pool of distances keeps it where it is.
    calls = {
        "info_nce": lambda x: losses.info_nce(x, y, scale),
        "siglip": lambda x: losses.siglip(x, y, scale, bias),
        "coral": lambda x: metrics.coral(x, y),
        "jsd": lambda x: losses.neighbour_jsd(x, y, units(2)),
    }
    if name == "mmd":
        loss = losses.mmd2(x, y)
        loss.backward()
        step = units(4) * 1e-4
        with torch.no_grad():
            change = float(losses.mmd2(x + step, y) - losses.mmd2(x - step, y)) / 2
        assert change == pytest.approx(float((x.grad * step).sum()), abs=2e-5)  # type: ignore[operator]
        return
    assert torch.autograd.gradcheck(calls[name], (x,))
