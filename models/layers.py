"""Layers that models share: a linear layer that is quick on every CPU, Dice (Zhou et al., KDD 2018, arXiv 1706.06978,
section 5.3), and the head of sequence models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models import dice

ACTIVATIONS = ("dice", "prelu", "relu", "sigmoid")


class Linear(nn.Linear):
    """`nn.Linear` by oneDNN where it is quicker: float32 on a CPU, and more than a few rows.

    torch multiplies float32 matrices by MKL, which leaves half the vector unit of AMD processors idle. Measured there,
    one thread, forward and backward: 4096 x 624 by 400 takes 0.49 of the time, 51,200 x 64 by 36 takes 0.64.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Float [..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, see `Linear`."""
    quicker = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= 32 * x.shape[-1]
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler and the exporters choose for themselves
    )
    if not quicker:
        return F.linear(x, weight, bias)
    # Strided weights, such as a part of a larger one, have no quick kernel there: measured, 270 times slower.
    out: Tensor = _OneDnnLinear.apply(x, weight.contiguous(), bias)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x weight^T + bias."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            _product(gradient, weight.t().contiguous()) if of_x else None,
            _inner(rows, inputs) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The product a^T b [A, B] of [N, A] and [N, B]; oneDNN transposes both first, which pays for wide ones only."""
    wide = a.shape[1] * b.shape[1] > 64 * (a.shape[1] + b.shape[1])
    return _product(a.t(), b.t()) if wide else a.t() @ b


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
        """Float [N, H] -> [N, H].

        Raises:
            UserError: for another width.
        """
        if s.shape[-1] != len(self.alpha):  # torch's own statistics would not look
            raise UserError(f"Dice of {len(self.alpha)} columns got {s.shape[-1]}")
        of_batch = self.training and len(s) > 1
        if not dice.compiled(s, self.alpha):
            p = torch.sigmoid(self.norm(s))
            return s * torch.lerp(self.alpha, torch.ones_like(self.alpha), p)  # alpha + p (1 - alpha), in one pass
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert var is not None
        if of_batch:
            assert self.norm.num_batches_tracked is not None
            self.norm.num_batches_tracked.add_(1)
            mean, var = torch.batch_norm_update_stats(s.detach(), mean, var, self.norm.momentum)  # type: ignore[arg-type]
        return dice.dice(s, self.alpha, mean, (var + self.norm.eps).rsqrt(), of_batch)


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
        layers += [Linear(in_dim, width), activation(act, width)]
        in_dim = width
    return nn.Sequential(*layers, Linear(in_dim, 1))


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
