"""Models written for torchrec's collections run on ours, unchanged."""

import numpy as np
import pytest
import torch
import torchrec
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.sizes import format_bytes

FEATURES = [et.Feature("user", 500), et.Feature("shop", 60, pooling="mean"), et.Feature("item", 300)]


def batch_of(size: int, seed: int) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    """Dense [B, 4], ids in bags of 0 to 3, and labels that depend on the first item of the bag and the dense part."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 4, (3, size))
    lengths[0] = 1
    values = np.concatenate([random.integers(0, f.num_ids, n.sum()) for f, n in zip(FEATURES, lengths, strict=True)])
    dense = torch.from_numpy(random.standard_normal((size, 4)).astype(np.float32))
    users = torch.from_numpy(values[:size])
    label = ((users % 2 == 0) ^ (dense[:, 0] > 1.5)).float()
    names = [f.name for f in FEATURES]
    return dense, KeyedJaggedTensor(names, torch.from_numpy(values), lengths=torch.from_numpy(lengths.ravel())), label


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("method", ["dense", "unified", "qr"])
def test_torchrec_dlrm_trains_on_our_tables(method: str, backend: str) -> None:
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(
        et.plan(FEATURES, method, None if method == "dense" else "0.6x"),
        backend=backend,
        optimizer=et.Optimizer("adagrad", lr=0.05) if backend == "fbgemm" else None,
        init_std=0.1,
    )
    model = DLRM(tables, dense_in_features=4, dense_arch_layer_sizes=[16, 16], over_arch_layer_sizes=[16, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(120):
        dense, sparse, label = batch_of(256, step)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, sparse).squeeze(-1), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])


def test_dense_bags_equal_torchrecs_own() -> None:
    ours = et.EmbeddingBagCollection(et.plan(FEATURES), backend="torch")
    kinds = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
    theirs = torchrec.EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f.name,
                embedding_dim=16,
                num_embeddings=f.num_ids,
                feature_names=[f.name],
                pooling=kinds[f.pooling],
            )
            for f in FEATURES
        ]
    )
    theirs.load_state_dict({f"embedding_bags.{name}.weight": rows for name, rows in ours.lookup.state_dict().items()})
    sparse = batch_of(64, 0)[1]
    assert ours(sparse).keys() == theirs(sparse).keys()
    torch.testing.assert_close(ours(sparse).values(), theirs(sparse).values())
    assert [c.feature_names for c in ours.embedding_bag_configs()] == [
        c.feature_names for c in theirs.embedding_bag_configs()
    ]


def test_sequences_equal_torchrecs_own() -> None:
    features = [et.Feature("target", 300, id_space="item_ids"), et.Feature("history", 300, "none", id_space="item_ids")]
    ours = et.EmbeddingCollection(et.plan(features), backend="torch")
    config = EmbeddingConfig(name="item_ids", embedding_dim=16, num_embeddings=300, feature_names=["target", "history"])
    theirs = torchrec.EmbeddingCollection([config])
    theirs.load_state_dict({"embeddings.item_ids.weight": ours.state_dict()["lookup.item_ids"]})
    sparse = KeyedJaggedTensor(
        ["history", "target"], torch.tensor([5, 6, 6, 299, 0, 1, 2]), lengths=torch.tensor([3, 0, 1, 1, 1, 1])
    )
    got, expected = ours(sparse), theirs(sparse)
    for name in ("target", "history"):
        torch.testing.assert_close(got[name].values(), expected[name].values())
        assert torch.equal(got[name].lengths(), expected[name].lengths())


def test_any_torch_optimizer_trains_the_torch_backend() -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "unified", "0.5x"), backend="torch")
    before = {k: v.clone() for k, v in tables.state_dict().items()}
    optimizer = torch.optim.AdamW(tables.parameters(), lr=0.1)
    tables(batch_of(32, 0)[1]).values().square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(before[k], v) for k, v in tables.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda plan: et.EmbeddingBagCollection(plan, backend="cuda"), "unknown lookup backend 'cuda'"),
        (
            lambda plan: et.EmbeddingBagCollection(plan, backend="torch", optimizer=et.Optimizer()),
            "torch backend has no optimizer",
        ),
        (lambda plan: et.Optimizer("adam"), "must be one of sgd, adagrad, rowwise_adagrad"),
        (lambda plan: et.Optimizer(lr=-1.0), "lr must be zero or more and finite, got -1.0"),
        (
            lambda plan: et.EmbeddingBagCollection(plan, backend="torch").set_learning_rate(0.1),
            "torch backend has no optimizer",
        ),
        (
            lambda plan: et.EmbeddingBagCollection(et.plan([et.Feature("h", 3, "none")])),
            "feature 'h' has pooling 'none'; use EmbeddingCollection",
        ),
        (
            lambda plan: et.EmbeddingBagCollection(plan)(
                KeyedJaggedTensor(["user"], torch.tensor([1]), lengths=torch.tensor([1]))
            ),
            "feature 'shop' of the plan is not in the batch; it has user",
        ),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(et.plan(FEATURES))


def test_the_learning_rate_of_fused_tables_can_change() -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES), optimizer=et.Optimizer("sgd", lr=0.1))

    def moved() -> bool:
        before = {name: tensor.clone() for name, tensor in tables.state_dict().items()}
        tables(batch_of(64, 0)[1]).values().square().sum().backward()
        return any(not torch.equal(before[name], tensor) for name, tensor in tables.state_dict().items())

    assert moved()
    tables.set_learning_rate(0.0)
    assert not moved()
    tables.set_learning_rate(0.1)
    assert moved()


def test_a_state_of_other_tables_is_refused_by_name() -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES), backend="torch")
    state = tables.state_dict()
    name = next(key for key in state if key.startswith("lookup."))
    with pytest.raises(RuntimeError, match=rf"{name}: saved shape \(1, 2\)"):
        tables.load_state_dict(state | {name: torch.zeros(1, 2)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*lookup\.other"):
        tables.load_state_dict(state | {"lookup.other": torch.zeros(1, 2)})


def test_collections_describe_their_logical_tables() -> None:
    spaces = [et.Feature("item", 50, "none", id_space="shelf"), et.Feature("seen", 50, "none", id_space="shelf")]
    (config,) = et.EmbeddingCollection(et.plan(spaces, "hash", "0.5x", dim=8)).embedding_configs()
    assert (config.name, config.num_embeddings, config.embedding_dim) == ("shelf", 50, 8)
    assert config.feature_names == ["item", "seen"]


def test_fused_state_survives_a_save() -> None:
    """Training on after a reload equals training through: tables and second moments both come back."""
    plan = et.plan(FEATURES, "hash", "0.5x")

    def step(tables: et.EmbeddingBagCollection, seed: int) -> None:
        tables(batch_of(64, seed)[1]).values().square().sum().backward()

    through = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("rowwise_adagrad", lr=0.1))
    first = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("rowwise_adagrad", lr=0.1))
    first.load_state_dict(through.state_dict())
    for seed in range(3):
        step(through, seed)
    for seed in range(2):
        step(first, seed)
    second = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("rowwise_adagrad", lr=0.1))
    second.load_state_dict(first.state_dict())
    step(second, 2)
    for name, value in through.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("method", ["unified", "qr"])
def test_fused_tables_answer_in_inference_mode(method: str) -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, method, "0.6x"))
    expected = tables(batch_of(16, 0)[1]).values().detach()
    with torch.inference_mode():
        assert torch.equal(tables(batch_of(16, 0)[1]).values(), expected)
    tables(batch_of(16, 0)[1]).values().sum().backward()  # and train on


def test_a_collection_says_what_it_is() -> None:
    plan = et.plan([et.Feature("user", 3000), et.Feature("item", 500)], {"user": "hash", "*": "dense"}, "0.5x", dim=8)
    said = repr(et.EmbeddingBagCollection(plan, "fbgemm", et.Optimizer("sgd", lr=0.5)))
    for words in (
        "dense, hash: 2 features, 2 tables",
        format_bytes(plan.nbytes),
        "fbgemm, Optimizer(name='sgd', lr=0.5",
    ):
        assert words in said
    assert str(plan) == plan.describe()
    assert et.list_methods() == ["auto", *et.METHODS]
