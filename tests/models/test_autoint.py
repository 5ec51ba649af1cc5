"""AutoInt against a plain NumPy loop, and the laws its formulas imply."""

import numpy as np
import pytest
import torch

from embtab.errors import UserError
from embtab.models.autoint import AutoInt, InteractingLayer


def weights(module):
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def attention_by_loops(x, layer):
    """One layer for one row, x [F, D], written as the paper's equations 5 to 8."""
    w = weights(layer)
    num_fields, out_dim = len(x), len(w["query.weight"])
    width = out_dim // layer.num_heads
    out = np.zeros((num_fields, out_dim))
    for h in range(layer.num_heads):
        rows = slice(h * width, (h + 1) * width)
        q, k, v = (w[f"{name}.weight"][rows] for name in ("query", "key", "value"))
        for m in range(num_fields):
            similarity = np.array([(q @ x[m]) @ (k @ x[other]) * layer.scale for other in range(num_fields)])
            share = np.exp(similarity) / np.exp(similarity).sum()
            out[m, rows] = sum(share[other] * (v @ x[other]) for other in range(num_fields))
    out = np.maximum(out + x @ w["residual.weight"].T, 0)
    if "norm.weight" in w:
        centred = out - out.mean(-1, keepdims=True)
        out = centred / np.sqrt(out.var(-1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    return out


def autoint_by_loops(model, dense, embeddings):
    w = weights(model)
    logits = []
    for values, vectors in zip(dense.double().numpy(), embeddings.double().numpy(), strict=True):
        fields = np.concatenate([values[:, None] * w["numeric"], vectors])
        x = fields
        for layer in model.attention:
            x = attention_by_loops(x, layer)
        logit = w["logit.weight"][0] @ x.ravel() + w["logit.bias"][0]
        if model.dnn is not None:
            h, depth = fields.ravel(), len(model.dnn)
            for i in range(0, depth, 3):
                h = w[f"dnn.{i}.weight"] @ h + w[f"dnn.{i}.bias"]
                h = np.maximum(h, 0) if i < depth - 1 else h
            logit += h[0]
        logits.append(logit)
    return np.array(logits)


def case(num_dense=3, num_features=5, dim=4, batch=6, **options):
    torch.manual_seed(0)
    model = AutoInt(num_dense, num_features, dim, **{"attention_dim": 6, "dnn": (7, 5), **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # biases and numeric vectors away from (nearly) zero
    return model, torch.randn(batch, num_dense), torch.randn(batch, num_features, dim)


@pytest.mark.parametrize("dnn", [(7, 5), ()])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("num_dense", [3, 0])
def test_equals_the_loops(dnn, use_scale, layer_norm, num_heads, num_dense):
    model, dense, embeddings = case(
        num_dense, dnn=dnn, use_scale=use_scale, layer_norm=layer_norm, num_heads=num_heads, num_layers=2
    )
    logits = model(dense, embeddings)
    assert logits.shape == (6,)
    np.testing.assert_allclose(logits.detach(), autoint_by_loops(model, dense, embeddings), rtol=2e-5, atol=2e-5)


def test_defaults_are_the_published_run():
    model = AutoInt(13, 26, 16)
    assert [layer.residual.out_features for layer in model.attention] == [64, 64, 64]
    assert {layer.num_heads for layer in model.attention} == {2}
    assert model.logit.in_features == 39 * 64  # width of a layer = heads x width of a head; flattened over fields
    assert [m.out_features for m in model.dnn if isinstance(m, torch.nn.Linear)] == [400, 400, 1]
    assert model.numeric.std().item() == pytest.approx(0.01, rel=0.2)
    assert AutoInt(13, 26, 16, dnn=()).dnn is None


def test_numeric_field_is_value_times_vector():
    model, dense, embeddings = case()
    seen = []
    model.attention[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(dense, embeddings)
    model(2 * dense, embeddings)
    model(torch.zeros_like(dense), embeddings)
    once, twice, zero = seen
    assert torch.equal(twice[:, :3], 2 * once[:, :3])
    assert not zero[:, :3].any()
    assert torch.equal(once[:, 3:], embeddings)  # a categorical field is the embedding itself


def test_permuting_fields_permutes_the_layer():
    torch.manual_seed(1)
    layer, x, order = InteractingLayer(4, 6, 2), torch.randn(5, 7, 4), torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_without_query_key_value_only_the_residual_is_left():
    torch.manual_seed(2)
    layer, x = InteractingLayer(4, 6, 2), torch.randn(5, 7, 4)
    for linear in (layer.query, layer.key, layer.value):
        torch.nn.init.zeros_(linear.weight)
    torch.testing.assert_close(layer(x), torch.relu(layer.residual(x)))


def test_attention_shares_sum_to_one():
    """With one vector for all fields every average of the values is that value, whatever the shares."""
    torch.manual_seed(3)
    layer = InteractingLayer(4, 6, 2)
    torch.nn.init.zeros_(layer.residual.weight)
    x = torch.randn(5, 1, 4).expand(5, 7, 4)
    torch.testing.assert_close(layer(x), torch.relu(layer.value(x)))


def test_dnn_only_adds_its_logit():
    model, dense, embeddings = case()
    torch.nn.init.zeros_(model.dnn[-1].weight)
    torch.nn.init.zeros_(model.dnn[-1].bias)
    plain, _, _ = case(dnn=())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("dnn")})
    torch.testing.assert_close(model(dense, embeddings), plain(dense, embeddings))


def test_gradients_reach_every_parameter_and_input():
    model, dense, embeddings = case()
    embeddings.requires_grad_()
    model(dense, embeddings).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert embeddings.grad.abs().sum() > 0


def test_dropout_acts_in_training_only():
    model, dense, embeddings = case(dropout=0.5)
    assert not torch.equal(model(dense, embeddings), model(dense, embeddings))
    model.eval()
    assert torch.equal(model(dense, embeddings), model(dense, embeddings))
    np.testing.assert_allclose(
        model(dense, embeddings).detach(), autoint_by_loops(model, dense, embeddings), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention_dim": 10, "num_heads": 3}, "attention_dim 10"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"num_layers": -1}, "num_layers"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": 0.5, "dnn": ()}, "DNN only"),
        ({"num_dense": 0, "num_features": 0}, "0 numeric, 0 categorical"),
    ],
)
def test_bad_sizes_are_named(options, says):
    with pytest.raises(UserError, match=says):
        AutoInt(**{"num_dense": 2, "num_features": 3, "dim": 4, **options})


def test_a_layer_with_hooks_is_called_by_itself_and_gives_the_same():
    model, dense, embeddings = case(num_layers=3)
    alone, seen = model(dense, embeddings), []
    model.attention[1].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    torch.testing.assert_close(model(dense, embeddings), alone)
    assert [tensor.shape for pair in seen for tensor in pair] == [(6, 8, 6), (6, 8, 6)]
