"""What fusers are trained by, in PyTorch: contrastive losses, and distances between two sets of vectors.

Vectors are float [n, D] of unit length unless said otherwise; every loss is a scalar.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_SCALE = 100.0


def info_nce(query: Tensor, target: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy of each query among all targets and each target among all queries, as CLIP's.

    `same`: bool [n, n], pairs that are no negatives of each other (duplicates); they are left out.
    """
    logits = scale * query @ target.T
    if same is not None:
        logits = logits.masked_fill(_off_diagonal(same), float("-inf"))
    own = torch.arange(len(query), device=query.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def siglip(query: Tensor, target: Tensor, scale: Tensor, bias: Tensor, same: Tensor | None = None) -> Tensor:
    """Sum over the targets, mean over the queries, of the logistic loss of "these belong together", as SigLIP's."""
    signs = 2 * torch.eye(len(query), device=query.device, dtype=query.dtype) - 1
    each = -functional.logsigmoid(signs * (scale * query @ target.T + bias))
    if same is not None:
        each = each.masked_fill(_off_diagonal(same), 0)
    return each.sum() / len(query)


def same_content(*codes: Tensor) -> Tensor:
    """bool [n, n]: which pairs have the same code in any of these int [n]; a negative code is like no other."""
    found = torch.zeros(len(codes[0]), len(codes[0]), dtype=torch.bool, device=codes[0].device)
    for code in codes:
        found |= (code[:, None] == code[None, :]) & (code >= 0)[:, None]
    return found


def _off_diagonal(same: Tensor) -> Tensor:
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


def coral(x: Tensor, y: Tensor) -> Tensor:
    """|C_x - C_y|² / 4 D²: how far apart the covariances are (D-CORAL). 0 for translated copies."""
    return (_covariance(x) - _covariance(y)).square().sum() / (4 * x.shape[1] ** 2)


def relative_coral(x: Tensor, y: Tensor) -> Tensor:
    """|C_x - C_y| / |C_x|: the same in readable size; of unit vectors CORAL itself is some 1e-7."""
    distance: Tensor = (_covariance(x) - _covariance(y)).norm() / _covariance(x).norm()
    return distance


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    return centred.T @ centred / max(1, len(x) - 1)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased squared maximum mean discrepancy by a Gaussian kernel as wide as the pooled median distance.

    About 0, below it too, for two samples of one distribution. Needs two rows of each, as many of both.
    """
    n, both = len(x), torch.cat([x, y])
    squares = (both.square().sum(1)[:, None] + both.square().sum(1)[None] - 2 * both @ both.T).clamp_min(0)
    off = ~torch.eye(2 * n, dtype=torch.bool, device=x.device)
    median = squares.detach()[off].median().clamp_min(1e-12)
    kernel = torch.exp(-squares / (2 * median)) * off
    within = (kernel[:n, :n].sum() + kernel[n:, n:].sum()) / (n * (n - 1))
    return within - 2 * kernel[:n, n:].mean()


def jsd(x: Tensor, y: Tensor, anchors: Tensor, scale: float = 20.0) -> Tensor:
    """Mean Jensen–Shannon divergence, in bits (0 to 1), of what x_i and y_i find among the anchors.

    What a vector finds is the softmax of its scaled cosines to the anchors [m, D].
    """
    p, q = (functional.log_softmax(scale * vectors @ anchors.T, dim=1) for vectors in (x, y))
    middle = torch.logaddexp(p, q) - math.log(2)
    each = (p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)
    return each.mean() / (2 * math.log(2))
