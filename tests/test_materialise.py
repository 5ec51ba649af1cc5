"""Plain vectors: what other stores read is what the reader gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

import embtab as et
from embtab import cli
from embtab.bundle.materialise import materialise
from embtab.convert.dense import read_dense
from embtab.errors import UserError
from embtab.reader import Bundle

FEATURES = [
    et.Feature("a/b.c", 70_000),
    et.Feature("item", 50, id_space="items"),
    et.Feature("seen", 50, id_space="items", pooling="mean"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("materialise") / "bundle"
    plan = et.plan(FEATURES, "unified", "0.1x", dim=4, precision="int8")
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), path)
    return path


def expected(bundle: Path) -> dict[str, np.ndarray]:
    opened = Bundle(bundle)
    return {"a/b.c": opened.vectors("a/b.c", np.arange(70_000)), "items": opened.vectors("seen", np.arange(50))}


def test_parquet_holds_every_id_and_comes_back_as_dense_tables(bundle: Path, tmp_path: Path) -> None:
    materialise(Bundle(bundle), "parquet", tmp_path / "p")
    found = read_dense([tmp_path / "p"])
    for space, name in (("a/b.c", "a%2Fb%2Ec"), ("items", "items")):
        np.testing.assert_array_equal(found[name].numpy(), expected(bundle)[space])


def test_hugectr_pairs_hold_every_id(bundle: Path, tmp_path: Path) -> None:
    materialise(Bundle(bundle), "hugectr", tmp_path / "h")
    for space, name in (("a/b.c", "a%2Fb%2Ec"), ("items", "items")):
        keys = np.fromfile(tmp_path / "h" / name / "key", "<i8")
        np.testing.assert_array_equal(keys, np.arange(len(keys)))
        values = np.fromfile(tmp_path / "h" / name / "emb_vector", "<f4").reshape(len(keys), 4)
        np.testing.assert_array_equal(values, expected(bundle)[space])


def test_a_state_dict_loads_into_an_embedding(bundle: Path, tmp_path: Path) -> None:
    cli.main(["export", str(bundle), str(tmp_path / "s"), "--format", "state_dict"])
    state = torch.load(tmp_path / "s" / "tables.pt", weights_only=True)
    torch.nn.EmbeddingBag(50, 4).load_state_dict({"weight": state["items.weight"]})
    np.testing.assert_array_equal(state["items.weight"].numpy(), expected(bundle)["items"])


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="unknown format 'csv'"):
        materialise(Bundle(bundle), "csv", tmp_path / "x")
    for arguments, match in (
        ([bundle, tmp_path / "x"], "is a bundle already"),
        ([tmp_path, tmp_path / "x", "--format", "parquet"], "not a bundle"),
        ([bundle, tmp_path / "x", "--format", "parquet", "--precision", "int8"], "leave them out"),
        ([bundle, bundle, "--format", "parquet"], "already exists"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", *map(str, arguments)])
        error = capsys.readouterr().err
        assert match in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
