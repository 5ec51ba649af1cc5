"""Layers that sequence models share: Dice (Zhou et al., KDD 2018, arXiv 1706.06978, section 5.3) and their head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.errors import UserError

ACTIVATIONS = ("dice", "prelu", "relu", "sigmoid")


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics where a training batch has fewer than two rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Float [N, H] -> [N, H]; N may be 0 or 1."""
        if not self.training or len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Dice(nn.Module):
    """p * s + (1 - p) * alpha * s with p = sigmoid of the normalised s: a PReLU whose step follows the data.

    alpha starts at 0 and the normalisation has no affine part, as in the authors' code.

    Args:
        width: H.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.norm = BatchNorm(width, eps=1e-8, affine=False)

    def forward(self, s: Tensor) -> Tensor:
        """Float [N, H] -> [N, H]."""
        p = torch.sigmoid(self.norm(s))
        return s * (p + (1 - p) * self.alpha)


def activation(name: str, width: int) -> nn.Module:
    """An activation of ACTIVATIONS for float [N, width].

    Raises:
        UserError: for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}")
    made = {"dice": lambda: Dice(width), "prelu": lambda: nn.PReLU(width, 0.1), "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
    return made[name]()


def mlp(in_dim: int, hidden: Sequence[int], act: str) -> nn.Sequential:
    """Linear layers to one number, with an activation after each but the last."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(in_dim, width), activation(act, width)]
        in_dim = width
    return nn.Sequential(*layers, nn.Linear(in_dim, 1))


class Head(nn.Module):
    """From all vectors of a row to its logit: batch normalisation, then an MLP.

    Args:
        in_dim: width of all inputs together.
        hidden: widths of the hidden layers.
        act: their activation, of ACTIVATIONS.
        dropout: share of the normalised inputs dropped while training.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int] = (200, 80), act: str = "dice", dropout: float = 0.0):
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {dropout}")
        self.norm = BatchNorm(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.mlp = mlp(in_dim, hidden, act)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tensors [B, ...], flattened and set side by side -> logits [B]."""
        row = torch.cat([each.flatten(1) for each in inputs], dim=1)
        logits: Tensor = self.mlp(self.dropout(self.norm(row)))
        return logits.squeeze(-1)
