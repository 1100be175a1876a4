"""What fusers are trained by, in PyTorch: contrastive losses, and distances between two sets of vectors.

Of the distances, `metrics` has CORAL, for tensors too.

Vectors are float [n, D] of unit length unless said otherwise; every loss is a scalar.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from fusion_core import metrics

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


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """`metrics.mmd2` of tensors; the kernel's width is taken as given, not differentiated."""
    both = torch.cat([x, y])
    squares = (both.square().sum(1)[:, None] + both.square().sum(1)[None] - 2 * both @ both.T).clamp_min(0)
    off = ~torch.eye(len(both), dtype=torch.bool, device=x.device)
    median = squares.detach()[off].median().clamp_min(1e-12)
    first = torch.cat([x.new_ones(len(x)), x.new_zeros(len(y))])
    found: Tensor = metrics.unbiased_mmd2(torch.exp(-squares / (2 * median)) * off, first)
    return found


def neighbour_jsd(x: Tensor, y: Tensor, anchors: Tensor, scale: float = 20.0) -> Tensor:
    """Mean Jensen–Shannon divergence, in bits (0 to 1), of what x_i and y_i find among the anchors.

    What a vector finds is the softmax of its scaled cosines to the anchors [m, D]. This compares pairs; how far the
    two sets of vectors can be told apart, whatever belongs together, is another divergence (`fusion eval` bounds it).
    """
    p, q = (functional.log_softmax(scale * vectors @ anchors.T, dim=1) for vectors in (x, y))
    middle = torch.logaddexp(p, q) - math.log(2)
    each = (p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)
    return each.mean() / (2 * math.log(2))
