"""AutoInt and AutoInt+: feature interactions by self-attention (Song et al., CIKM 2019, arXiv 1810.11921).

Every field is one vector: a categorical field its embedding, a numeric field its value times a learned vector. Layers
of multi-head attention over the fields let them interact; the flattened result gives the logit. AutoInt+ adds the
logit of a plain DNN over the same vectors.

Where the paper and its authors' code (github.com/shichence/AutoInt) differ:

                        paper                        authors' code                here
    q, k, v             linear                       ReLU after each              linear: ReLU would drop the sign
    residual            ReLU(attention + W e)        ReLU(attention + ReLU(W e))  as the paper
    scale               none                         1 / sqrt(width of a head)    `use_scale`, on by default
    layer norm          none                         after the residual's ReLU    `layer_norm`, off by default
    dropout             on MovieLens-1M only         0.5 in the DNN               `dropout`, in the DNN, off by default

The defaults are the authors' published run on Criteo: three layers, two heads, 64 units a layer (32 a head) and, for
AutoInt+, a DNN of 400-400 units. Initial values are theirs too: N(0, 0.01) for numeric fields, Glorot for matrices.

Shape suffixes: b batch, n numeric fields, f fields (numeric and categorical), d width of a field, h heads, w of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtab.errors import UserError
from embtab.models import attention
from embtab.models.layers import Linear, linear


class InteractingLayer(nn.Module):
    """One layer of multi-head self-attention over fields (section 4.3 of the paper).

    Args:
        in_dim: width of a field vector coming in.
        out_dim: width going out, all heads together; a multiple of `num_heads`.
        num_heads: number of heads.
        use_scale: divide the attention logits by the square root of a head's width.
        layer_norm: normalise every field vector at the end.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, use_scale: bool = True, layer_norm: bool = False):
        super().__init__()
        if num_heads < 1 or out_dim < 1 or out_dim % num_heads:
            raise UserError(f"attention_dim {out_dim} must be a positive multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (out_dim // num_heads) ** -0.5 if use_scale else 1.0
        # Four matrices rather than one fused: no slower, and heads are cut out of each without a copy.
        self.query = Linear(in_dim, out_dim, bias=False)
        self.key = Linear(in_dim, out_dim, bias=False)
        self.value = Linear(in_dim, out_dim, bias=False)
        self.residual = Linear(in_dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim) if layer_norm else nn.Identity()
        for each in (self.query, self.key, self.value, self.residual):
            nn.init.xavier_uniform_(each.weight)

    def forward(self, x_bfd: Tensor) -> Tensor:
        """Lets every field look at every field: float [b, f, in_dim] -> float [b, f, out_dim]."""
        # The scale is a factor of the matrix, which is smaller than what it is multiplied with.
        q_bfd = linear(x_bfd, self.query.weight * self.scale)
        q, k, v = (each.chunk(self.num_heads, dim=-1) for each in (q_bfd, self.key(x_bfd), self.value(x_bfd)))
        # Written out, for the kernels made for long sequences are slower on so few fields.
        seen = [torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v) for q, k, v in zip(q, k, v, strict=True)]
        out: Tensor = self.norm(F.relu(torch.cat(seen, dim=-1) + self.residual(x_bfd)))
        return out

    @property
    def plain(self) -> bool:
        """Whether the layer is no more than its matrices: it has no norm, and nobody waits for what goes in or out."""
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(module, kind) for module in self.modules() for kind in kinds)
        return isinstance(self.norm, nn.Identity) and not hooked

    def matrix(self) -> Tensor:
        """Those of q (with the scale), k, v and the residual, one below the other: float [4 * out_dim, in_dim]."""
        return torch.cat([self.query.weight * self.scale, self.key.weight, self.value.weight, self.residual.weight])


class Interaction(nn.Sequential):
    """Interacting layers, one after the other; on CPUs at once (see attention.py) unless one has hooks or a norm."""

    def forward(self, x_bfd: Tensor) -> Tensor:
        """Float [b, f, d] -> [b, f, attention_dim], or as it came where there is no layer."""
        layers = [layer for layer in self if isinstance(layer, InteractingLayer) and layer.plain]
        if not layers or len(layers) < len(self) or not attention.compiled(x_bfd, *self.parameters()):
            out: Tensor = super().forward(x_bfd)
            return out
        return attention.attend(x_bfd, [layer.matrix() for layer in layers], [layer.num_heads for layer in layers])


class AutoInt(nn.Module):
    """AutoInt+ (AutoInt with `dnn=()`): numeric values and embeddings in, logits out.

    Args:
        num_dense: number of numeric fields; may be 0.
        num_features: number of categorical fields.
        dim: embedding dimension.
        attention_dim: width of an attention layer's output, all heads together; a multiple of `num_heads`.
        num_layers: number of attention layers; 0 leaves a linear layer over the fields and the DNN, the cheapest.
        num_heads: number of heads of each.
        dnn: widths of the DNN's hidden layers; empty for plain AutoInt.
        dropout: share of the DNN's hidden activations dropped while training.
        use_scale: divide the attention logits by the square root of a head's width.
        layer_norm: normalise the field vectors after each attention layer.

    Raises:
        UserError: for sizes that are not positive or do not fit each other.
    """

    def __init__(
        self,
        num_dense: int,
        num_features: int,
        dim: int,
        *,
        attention_dim: int = 64,
        num_layers: int = 3,
        num_heads: int = 2,
        dnn: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        use_scale: bool = True,
        layer_norm: bool = False,
    ):
        super().__init__()
        num_fields = num_dense + num_features
        if num_fields < 1 or min(num_dense, num_features) < 0 or dim < 1:
            raise UserError(f"AutoInt needs fields; got {num_dense} numeric, {num_features} categorical of width {dim}")
        if num_layers < 0:
            raise UserError(f"num_layers must not be negative, got {num_layers}")
        if not 0 <= dropout < 1 or (dropout and not dnn):
            raise UserError(f"dropout {dropout} must lie in [0, 1) and acts on the DNN only, here {tuple(dnn)}")
        self.numeric = nn.Parameter(torch.empty(num_dense, dim).normal_(std=0.01))
        widths = [dim] + [attention_dim] * num_layers
        self.attention = Interaction(
            *(InteractingLayer(a, b, num_heads, use_scale, layer_norm) for a, b in pairwise(widths))
        )
        self.logit = _glorot(Linear(num_fields * widths[-1], 1))
        self.dnn = _tower(num_fields * dim, dnn, dropout) if dnn else None

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Logits of a click.

        Args:
            dense: float [B, num_dense], numeric values (transform heavy tails before: they scale a vector).
            embeddings: float [B, num_features, dim], one vector per categorical feature, already pooled.

        Returns:
            float [B].
        """
        numeric_bnd = dense.unsqueeze(-1) * self.numeric
        fields_bfd = torch.cat([numeric_bnd, embeddings], dim=1)
        logits: Tensor = self.logit(self.attention(fields_bfd).flatten(1))
        if self.dnn is not None:
            logits = logits + self.dnn(fields_bfd.flatten(1))
        return logits.squeeze(-1)


def _tower(in_dim: int, widths: Sequence[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [_glorot(Linear(in_dim, width)), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = width
    return nn.Sequential(*layers, _glorot(Linear(in_dim, 1)))


def _glorot(linear: Linear) -> Linear:
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
