"""What a plan says of itself before anything is trained: bytes by kind, parameters, expected collisions."""

import numpy as np
import pytest

import embtab as et
from embtab.hashing import expected_collisions
from embtab.planning.overview import outlooks


def counted(plan: et.Plan, num_ids: int) -> int:
    """Ids whose rows are all another id's as well, by looking at every id."""
    encoding = plan.encoding("f")
    generator = np.random.default_rng(plan.seed)
    constants = {k: np.asarray(v)[None, :] for k, v in encoding.constants().items()}
    arrays = {k: encoding.initial(k, generator) for k, a in encoding.arrays().items() if a.dtype.startswith(("i", "u"))}
    rows = type(encoding).rows(np.arange(num_ids)[:, None], constants | arrays)
    if plan.encoding("f").method == "multihash":
        rows = np.sort(rows, axis=1)  # a sum does not know the order
    _, inverse, size = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return int((size[inverse.reshape(-1)] > 1).sum())


@pytest.mark.parametrize(
    ("method", "num_ids", "budget"),
    [
        ("hash", 1000, 100 * 32),
        ("hash", 1000, 900 * 32),
        ({"name": "unified", "chunks": 2}, 5000, 80 * 32),
        ({"name": "robe", "chunk": 4}, 5000, 80 * 32),
        ({"name": "multihash", "hashes": 2}, 5000, 80 * 32),
        ({"name": "freqcut", "hot": 0.5}, 3000, 2000 * 32),
        ({"name": "cce", "chunks": 1, "centroids": 32}, 4000, 9000),
        ("qr", 1000, 100 * 32),
        ("tt", 1000, 100 * 32),
    ],
)
def test_expected_collisions_are_those_counted(method: object, num_ids: int, budget: int) -> None:
    features = [et.Feature("f", num_ids)]
    plans = [et.plan(features, method, budget, dim=8, seed=seed) for seed in range(30)]
    expected = plans[0].collisions()["f"]
    seen = np.array([counted(plan, num_ids) for plan in plans])
    error = seen.std() / len(seen) ** 0.5
    assert abs(seen.mean() - expected) <= 4 * error + 1e-9 * num_ids


@pytest.mark.parametrize(("ids", "places", "expected"), [(0, 5, 0), (1, 1, 0), (2, 1, 2), (2, 4, 0.5), (3, 2, 2.25)])
def test_expected_collisions_of_worked_values(ids: int, places: int, expected: float) -> None:
    assert expected_collisions(ids, places) == pytest.approx(expected)


def test_no_number_is_too_large() -> None:
    assert expected_collisions(10**9, 10**400) == 0
    assert expected_collisions(10**9, 10**9) == pytest.approx(10**9 * (1 - np.exp(-1)))


def test_every_method_has_an_outlook() -> None:
    features = [et.Feature("a", 5000, counts=np.arange(5000, 0, -1)), et.Feature("b", 3)]
    found = {each.method: each for each in outlooks(features, "0.1x", dim=8)}
    assert set(found) >= set(et.METHODS)
    for each in found.values():
        assert (each.plan is None) == bool(each.why)
        if each.plan is not None:
            assert sum(each.plan.bytes_by_kind().values()) == each.plan.nbytes <= 0.1 * each.plan.dense_nbytes
    assert "needs 160 kB" in found["dense"].why
    hashed = found["hash"].plan
    assert hashed is not None
    assert hashed.parameters * 4 == hashed.nbytes
