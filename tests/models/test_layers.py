"""The linear layer that goes through oneDNN, against float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embtab.models.layers import Linear, linear


@pytest.mark.parametrize("shape", [(100, 7), (64, 39, 16), (300, 200), (32, 5)])
@pytest.mark.parametrize("out", [1, 36, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_are_what_float64_gives(shape: tuple, out: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(shape[-1], out, bias=bias)
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], out)
    found = layer(x)
    assert found.grad_fn is not None
    assert "OneDnn" in type(found.grad_fn).__name__  # the path under test was taken
    found.backward(gradient)
    w, x64 = layer.weight.detach().double(), x.detach().double().requires_grad_()
    expected = F.linear(x64, w, layer.bias.detach().double() if bias else None)
    expected.backward(gradient.double())
    flat, flat_x = gradient.double().flatten(0, -2), x64.detach().flatten(0, -2)
    for mine, wanted in [(found, expected), (x.grad, x64.grad), (layer.weight.grad, flat.t() @ flat_x)]:
        np.testing.assert_allclose(mine.detach().numpy(), wanted.detach().numpy(), rtol=1e-4, atol=1e-4)
    if bias:
        np.testing.assert_allclose(layer.bias.grad.numpy(), flat.sum(0).numpy(), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_no_contiguous_matrices_give_the_same() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 2, 10).transpose(0, 1)[..., ::2], torch.randn(8, 5)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_what_onednn_is_not_for_goes_through_torch() -> None:
    """Few rows, other types, autocast and the exporters."""
    x, weight = torch.randn(64, 5), torch.randn(8, 5, requires_grad=True)
    assert "OneDnn" in type(linear(x, weight).grad_fn).__name__
    assert "OneDnn" not in type(linear(x[:31], weight).grad_fn).__name__
    assert linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    exported = torch.export.export(Linear(5, 8), (x,))
    assert any("linear" in str(node.target) and "mkldnn" not in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(linear(x[:0], weight), F.linear(x[:0], weight))
