"""The fusers that are trained, in PyTorch: from two embeddings of a row and what is there of them to one vector.

All take `image`, `text`: float [n, D], and `has_image`, `has_text`: bool [n]; they give unit vectors [n, D] (zeros for
a row without either) and how much each modality weighed, [n, 2] (image, text; together 1, an absent one 0). What lies
in an absent slot does not matter: it is replaced by zeros before anything is computed.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = {"projection": 16_384, "hidden": 32_768, "layers": 12, "heads": 64, "expansion": 8}
LARGEST_DIM = 16_384


class Net(nn.Module):
    """A fuser's network; kinds of it say how two slots become one vector."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, image: Tensor, text: Tensor, has_image: Tensor, has_text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [n, D] and the modalities' weights [n, 2]."""
        present = torch.stack([has_image, has_text], dim=1)
        slots = [_slot(vectors, there) for vectors, there in ((image, has_image), (text, has_text))]
        mixed, weights = self.mix(slots[0], slots[1], present)
        some = present.any(dim=1, keepdim=True)
        weights = weights * present
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return functional.normalize(torch.where(some, mixed, 0), dim=1), weights

    def mix(self, image: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [n, D] of any length, and weights [n, 2]; slots are unit vectors or zeros, `present` bool [n, 2]."""
        raise NotImplementedError


class Gate(Net):
    """z x_i + (1 - z) x_t with one z for each row, of both embeddings and of what is there."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.gate = nn.Linear(2 * dim + 2, 1)

    def mix(self, image: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """See Net."""
        z = _forced(torch.sigmoid(self.gate(_joined(image, text, present))), present)
        return z * image + (1 - z) * text, torch.cat([z, 1 - z], dim=1)


class Gmu(Net):
    """The gated multimodal unit: z * tanh(W_i x_i) + (1 - z) * tanh(W_t x_t) with a z for each dimension."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.image = nn.Linear(dim, dim)
        self.text = nn.Linear(dim, dim)
        self.gate = nn.Linear(2 * dim + 2, dim)

    def mix(self, image: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """See Net; the weights are the mean z."""
        z = _forced(torch.sigmoid(self.gate(_joined(image, text, present))), present)
        mixed = z * torch.tanh(self.image(image)) + (1 - z) * torch.tanh(self.text(text))
        share = z.mean(dim=1, keepdim=True)
        return mixed, torch.cat([share, 1 - share], dim=1)


class Combiner(Net):
    """f(x_i, x_t) + z x_i + (1 - z) x_t: a network's correction of a gated sum, after CLIP4Cir's Combiner."""

    def __init__(self, dim: int, projection: int, hidden: int):
        super().__init__(dim)
        self.image = nn.Linear(dim, projection)
        self.text = nn.Linear(dim, projection)
        self.hidden = nn.Linear(2 * projection + 2, hidden)
        self.output = nn.Linear(hidden, dim)
        self.gate_hidden = nn.Linear(2 * projection + 2, hidden)
        self.gate = nn.Linear(hidden, 1)

    def mix(self, image: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """See Net; the weights are the gate's."""
        joined = _joined(functional.relu(self.image(image)), functional.relu(self.text(text)), present)
        z = _forced(torch.sigmoid(self.gate(functional.relu(_wide(self.gate_hidden, joined)))), present)
        mixed = self.output(functional.relu(_wide(self.hidden, joined))) + z * image + (1 - z) * text
        return mixed, torch.cat([z, 1 - z], dim=1)


class Attention(Net):
    """A learned query among the modalities' tokens, through some blocks; corrects the mean of what is there."""

    def __init__(self, dim: int, layers: int, heads: int, expansion: int):
        super().__init__(dim)
        self.query = nn.Parameter(torch.zeros(dim))
        self.kinds = nn.Parameter(torch.zeros(2, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, expansion) for _ in range(layers))
        self.normal = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)

    def mix(self, image: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """See Net; the weights are what the query attends to in the last block, over all heads."""
        slots = torch.stack([image, text], dim=1)
        # The lengths of unit vectors' entries are about 1 / sqrt(D): what blocks are made for is about 1.
        tokens = slots * self.dim**0.5 + self.kinds
        tokens = torch.cat([self.query.expand(len(image), 1, -1), tokens], dim=1)
        seen = torch.cat([present.new_ones(len(present), 1), present], dim=1)  # the query is never masked: no empty row
        weights = slots.new_zeros(len(image), 2)
        for block in self.blocks:
            tokens, weights = block(tokens, seen)
        mean = slots.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp_min(1)
        return mean + self.output(self.normal(tokens[:, 0])), weights


class _Block(nn.Module):
    """A pre-norm transformer block over [n, 3, D] tokens."""

    def __init__(self, dim: int, heads: int, expansion: int):
        super().__init__()
        self.heads = heads
        self.normal_1, self.normal_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attended = nn.Linear(dim, dim)
        self.hidden = nn.Linear(dim, expansion * dim)
        self.output = nn.Linear(expansion * dim, dim)

    def forward(self, tokens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and how much the first attends to the second and the third, [n, 2]."""
        n, length, dim = tokens.shape
        qkv = self.qkv(self.normal_1(tokens)).view(n, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mask = seen[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.attended(mixed.transpose(1, 2).reshape(n, length, dim))
        tokens = tokens + self.output(functional.gelu(self.hidden(self.normal_2(tokens))))
        scores = (query[:, :, :1] @ key.transpose(2, 3)) * (dim // self.heads) ** -0.5
        shares = scores.masked_fill(~mask, float("-inf")).softmax(dim=3)[:, :, 0, 1:].mean(dim=1)
        return tokens, shares


def _slot(vectors: Tensor, there: Tensor) -> Tensor:
    return functional.normalize(torch.where(there[:, None], vectors, 0), dim=1)


def _joined(image: Tensor, text: Tensor, present: Tensor) -> Tensor:
    return torch.cat([image, text, present.to(image.dtype)], dim=1)


def _wide(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """What the layer gives; to be differentiated, its width is filled up with zeros to a multiple of 16: the gradient
    of a matrix of 2,050 columns takes a third longer than of one with 2,064.
    """
    if not torch.is_grad_enabled():
        return cast(Tensor, layer(inputs))
    missing = (0, -inputs.shape[1] % 16)
    return functional.linear(functional.pad(inputs, missing), functional.pad(layer.weight, missing), layer.bias)


def _forced(z: Tensor, present: Tensor) -> Tensor:
    """The image's share: all of it or nothing where the other modality or the image is missing."""
    return torch.where(present.all(dim=1, keepdim=True), z, present[:, :1].to(z.dtype))


def defaults(kind: str, dim: int) -> dict[str, float]:
    """The parameters of a kind for embeddings of `dim` dimensions, where none are given."""
    if kind == "combiner":
        return {"projection": float(2 * dim), "hidden": float(4 * dim)}
    if kind == "attention":
        heads = next(n for n in (8, 4, 2, 1) if dim % n == 0 and (dim // n >= 16 or n == 1))
        return {"layers": 1.0, "heads": float(heads), "expansion": 4.0}
    return {}


def wrong_params(kind: str, dim: int, params: Mapping[str, float]) -> str:
    """What is wrong with the parameters of a kind; empty when nothing is."""
    known = defaults(kind, dim) if 1 <= dim <= LARGEST_DIM else None
    if known is None:
        return f"embeddings of {dim} dimensions, expected 1 to {LARGEST_DIM}"
    if params.keys() != known.keys():
        return f"the parameters {sorted(params)}, expected {sorted(known)}"
    for name, value in params.items():
        if not 1 <= value <= LARGEST[name] or value != int(value):
            return f"{name} = {value}, expected a whole number from 1 to {LARGEST[name]}"
    if kind == "attention" and dim % int(params["heads"]):
        return f"heads = {params['heads']:g}, which does not divide {dim} dimensions"
    return ""


def build(kind: str, dim: int, params: Mapping[str, float], device: str = "cpu") -> Net:
    """The network of a kind, freshly initialised from torch's generator (on the device "meta": shapes only)."""
    kinds: dict[str, type[Net]] = {"gate": Gate, "gmu": Gmu, "combiner": Combiner, "attention": Attention}
    with torch.device(device):
        net = kinds[kind](dim, **{name: int(value) for name, value in params.items()})
        if device == "meta":
            return net
        # A fuser begins as the mean of what is there: what it learns is where to leave that.
        if isinstance(net, Combiner | Attention):
            nn.init.normal_(net.output.weight, std=0.02 * net.dim**-0.5)
            nn.init.zeros_(net.output.bias)
        if isinstance(net, Attention):
            nn.init.normal_(net.query, std=0.02)
            nn.init.normal_(net.kinds, std=0.02)
    return net
