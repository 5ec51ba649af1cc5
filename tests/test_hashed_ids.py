"""Hashed ids: any int64 is one, nobody numbers them, and a method either takes them all or says that it cannot."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.bundle.materialise import materialise
from embtab.cli import main
from embtab.convert import from_dense
from embtab.errors import UserError
from embtab.methods import METHODS
from embtab.reader import Bundle

HASHING = ("hash", "unified", "multihash", "robe", "cafe", "dhe")
EXTREMES = torch.tensor([0, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)])
FEATURES = [et.Feature("user", 1000, hashed=True), et.Feature("country", 20)]


def ids_of(user: torch.Tensor) -> KeyedJaggedTensor:
    country = torch.arange(len(user)) % 20
    return KeyedJaggedTensor(["user", "country"], torch.cat([user, country]), lengths=torch.ones(2 * len(user)).long())


@pytest.mark.parametrize("budget", [None, "3x", "1x", "0.3x"])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_a_method_takes_any_id_or_refuses_the_feature(tmp_path: Path, method: str, budget: str | None) -> None:
    if method not in (*HASHING, "auto"):
        with pytest.raises((UserError, et.InfeasibleBudget)):
            et.plan(FEATURES, method, budget, dim=8)
        with pytest.raises(UserError, match="feature 'user': its ids are any 64-bit numbers"):
            et.plan(FEATURES, method, None, dim=8)
        return
    plan = et.plan(FEATURES, method, budget, dim=8, precision="fp32")
    assert plan.encodings["user"].num_ids is None
    assert et.Plan.from_dict(plan.to_dict()) == plan
    tables = et.EmbeddingBagCollection(plan, init_std=1.0).eval()
    found = tables(ids_of(EXTREMES)).values()
    et.save(tables, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    read = bundle.vectors("user", EXTREMES.numpy())
    np.testing.assert_allclose(found[:, :8].detach().numpy(), read, atol=1e-5)
    assert len(np.unique(read, axis=0)) > 1
    with pytest.raises(UserError, match=r"feature 'user': its ids are any 64-bit numbers .* cannot all be"):
        materialise(bundle, "parquet", tmp_path / "plain")


def test_hash_has_no_more_than_a_row_for_each_id_that_is_expected() -> None:
    sizes = [et.plan(FEATURES[:1], "hash", budget, dim=8).nbytes for budget in ("0.5x", None, "4x")]
    assert sizes == [500 * 32, 1000 * 32, 1000 * 32]


def test_auto_keeps_what_is_small_exact() -> None:
    for budget in (None, "2x", "0.5x"):
        plan = et.plan(FEATURES, "auto", budget, dim=8)
        assert {space: encoding.method for space, encoding in plan.encodings.items()} == {
            "user": "unified",
            "country": "dense",
        }


def test_what_would_need_a_list_of_ids_is_refused() -> None:
    with pytest.raises(UserError, match="cannot have counts"):
        et.Feature("user", 3, counts=np.ones(3, np.int64), hashed=True)
    with pytest.raises(UserError, match="hashed must be that of its id space 'users'"):
        et.plan([et.Feature("a", 9, id_space="users", hashed=True), et.Feature("b", 9, id_space="users")])
    dense = {"user": torch.zeros(1000, 8), "country": torch.zeros(20, 8)}
    with pytest.raises(UserError, match="dense table 'user': the ids of its feature are any 64-bit numbers"):
        from_dense(dense, et.plan(FEATURES, "hash", "0.5x", dim=8))


def test_from_raw_numbers_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    users = random.integers(-(2**63), 2**63, 50)[random.integers(0, 50, 600)]
    columns = {"y": random.integers(0, 2, 600), "user": users, "kind": random.integers(0, 3, 600)}
    pq.write_table(pa.table(columns), tmp_path / "raw.parquet")
    (tmp_path / "roles.yaml").write_text("{label: y, categorical: [{user: {hashed: true}}, kind], split: {by: order}}")
    main(["prepare", "table", f"{tmp_path}/raw.parquet", "--roles", f"{tmp_path}/roles.yaml", "--out", f"{tmp_path}/d"])
    assert "hashed, so not counted: user" in capsys.readouterr().out
    main(["plan", f"{tmp_path}/d", "--budget", "0.5x", "--dim", "4", "--all"])
    overview = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "any 64-bit numbers" in overview["qr"]
    assert "any 64-bit numbers" not in overview["unified"]
    model = {"name": "AutoInt", "num_layers": 0, "dnn": [4]}
    sweep = {"data": f"{tmp_path}/d", "budgets": ["0.5x"], "seeds": [0], "dim": 4, "model": model, "batch_size": 128}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"methods": ["hash", "auto"], "epochs": 1}))
    main(["compare", "--config", f"{tmp_path}/sweep.yaml", "--out", f"{tmp_path}/report"])
    assert "| hash | fp32 | 0.5x |" in (tmp_path / "report/report.md").read_text()
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(sweep | {"methods": ["magnitude"], "epochs": 1}))
    with pytest.raises(SystemExit):
        main(["search", "--config", f"{tmp_path}/search.yaml", "--out", f"{tmp_path}/searched"])
    assert "the ids of 'user' are any 64-bit numbers (hashed), and a search needs a row" in capsys.readouterr().err
