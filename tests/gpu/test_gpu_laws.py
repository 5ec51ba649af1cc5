"""The laws on a GPU, where one is at hand: `python -m pytest -m gpu`."""

import numpy as np
import pytest
import torch
from laws import CASES, EXTREMES, Bags, Case, tables_of

import embtab as et
from embtab.hashing import hash_rows, seed_of
from embtab.reader import read as reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def random_bags(plan: et.Plan, seed: int, size: int = 64) -> Bags:
    """Bags of 0 to 4 weighted ids, extreme ones among them where the method takes any int64."""
    random = np.random.default_rng(seed)
    content = {}
    for feature in plan.features:
        anything = plan.encoding(feature.name).num_ids is None
        bags = []
        for length in random.integers(0, 5, size):
            ids = random.integers(0, feature.num_ids, length).tolist()
            if anything and length:
                ids[0] = EXTREMES[int(random.integers(len(EXTREMES)))]
            bags.append([(int(i), float(w)) for i, w in zip(ids, random.standard_normal(length), strict=True)])
        content[feature.name] = bags
    return Bags(content)


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pooled_vectors_are_what_numpy_computes(case: Case, backend: str) -> None:
    plan = case.plan()
    tables = et.EmbeddingBagCollection(plan, backend=backend, init_std=1.0, device="cuda")
    state = {name: value.copy() for name, value in tables_of(tables.cpu()).items()}
    tables = tables.to("cuda")
    for seed in range(3):
        bags = random_bags(plan, seed)
        pooled = tables(bags.kjt(weighted=True).to(torch.device("cuda"))).to_dict()
        for feature in plan.features:
            ids, offsets, weights = bags.arrays(feature.name)
            expected = reader.lookup(plan.to_dict(), state, feature.name, ids, offsets, weights)
            np.testing.assert_allclose(
                pooled[feature.name].detach().cpu().numpy(), expected, rtol=1e-4, atol=1e-4, err_msg=feature.name
            )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_on_the_gpu_is_a_step_on_the_cpu(case: Case, optimizer: str) -> None:
    plan = case.plan()
    cpu = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer(optimizer, lr=0.1), init_std=1.0)
    gpu = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer(optimizer, lr=0.1), init_std=1.0, device="cuda")
    gpu.load_state_dict(cpu.state_dict())
    for seed in range(3):
        bags = random_bags(plan, seed)
        cpu(bags.kjt(weighted=True)).values().square().sum().backward()
        gpu(bags.kjt(weighted=True).to(torch.device("cuda"))).values().square().sum().backward()
    for name, value in cpu.state_dict().items():
        torch.testing.assert_close(gpu.state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-4)


def test_hashes_are_the_same_bits() -> None:
    ids = torch.cat([torch.tensor(EXTREMES), torch.randint(-(2**63), 2**63 - 1, (1_000_000,))])
    seed = seed_of("a", 0, 0)
    assert torch.equal(hash_rows(ids.cuda(), seed, 1_000_003).cpu(), hash_rows(ids, seed, 1_000_003))
