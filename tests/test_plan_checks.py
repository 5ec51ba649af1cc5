"""A plan that comes from a file is held to itself and to what lies beside it, whoever reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing.structure import bounded, reseal
from laws import CASES, Case
from safetensors.numpy import load_file, save_file

import embtab as et
from embtab.errors import UserError
from embtab.planning.checks import check_plan
from embtab.reader import Bundle
from embtab.serving.quantised import QuantisedTables
from embtab.serving.tables import ServedTables
from embtab.training.checkpoint import description, load_tables

FEATURES = [et.Feature("user", 1000), et.Feature("item", 20)]
BACKENDS = ["torch", "fbgemm", "native"]


def of_user(about: dict[str, Any]) -> dict[str, Any]:
    encoding: dict[str, Any] = about["plan"]["encodings"]["user"]
    return encoding


def saved(folder: Path, method: Any, budget: str = "0.5x") -> Path:
    plan = et.plan(FEATURES, {"user": method, "*": "dense"}, budget, dim=8)
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), folder / "bundle")
    return folder / "bundle"


def refused(path: Path, match: str) -> None:
    """By every backend and by what is exported."""
    for backend in BACKENDS:
        with bounded(backend), pytest.raises(UserError, match=match):
            et.load(path, backend=backend)
    for read in (ServedTables, QuantisedTables):
        with bounded(read.__name__), pytest.raises(UserError, match=match):
            read(Bundle(path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tables_are_exactly_as_a_method_says(case: Case) -> None:
    """One row or number more or less, in any table, is refused by name."""
    plan = case.plan()
    check_plan(plan.features, plan.encodings, plan.tables, plan.dim)
    for name in plan.tables:
        for field in ("num_rows", "width"):
            for by in (-1, 1):
                described = plan.to_dict()
                table = next(table for table in described["tables"] if table["name"] == name)
                table[field] += by
                with pytest.raises(UserError, match=r"rows of .* numbers from table|cannot be"):
                    et.Plan.from_dict(described)


@pytest.mark.parametrize("num_rows", [600, 2**31 - 1, 2, 0, -1])
def test_a_hash_that_claims_other_rows_than_its_table(num_rows: int, tmp_path: Path) -> None:
    path = saved(tmp_path, "hash")
    reseal(path, lambda about: of_user(about).update(num_rows=num_rows))
    said = "ids cannot be hashed to" if num_rows < 1 else f"reads {num_rows} rows of 8 numbers from table 'user', which"
    refused(path, f"bundle: feature 'user', method 'hash': {said}")


@pytest.mark.parametrize("value", [2**63, 299.0, True, None, "9", [9], {}])
def test_numbers_of_another_type(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, "hash")
    reseal(path, lambda about: of_user(about).update(num_rows=value))
    refused(path, "bundle: not a plan: feature 'user': num_rows cannot be")


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("dhe", {"hashes": 5_000_000}),
        ("dhe", {"hashes": 2**40}),
        ("dhe", {"layers": 2**40}),
        ("dhe", {"width": 2**16}),
        ("cafe", {"num_buckets": 2**40}),
        ({"name": "robe", "chunk": 8, "granule": 4}, {"window": 2**40}),
        ("cce", {"chunks": 2**40}),
        ("cce", {"centroids": 0}),
        ("tt", {"p": [2**40, 2**40, 2**40]}),
        ("qr", {"collisions": 0}),
        ("partitions", {"moduli": [2**40] * 3}),
        ("unified", {"seeds": [1] * 5000, "tables": ["user"] * 5000}),
        ("freqcut", {"hot": 10**6}),
        ("pruned", {"num_rows": 10**6}),
        ({"name": "sparse", "form": "csr"}, {"num_values": 2**40}),
    ],
)
def test_work_that_no_file_can_ask_for(method: Any, change: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, method, "0.4x" if method != "cce" else "0.8x")
    reseal(path, lambda about: of_user(about).update(change))
    refused(path, "user")
    with bounded("reader"):
        Bundle(path).vectors("user", np.arange(300))


ARRAYS: list[tuple[Any, str, Callable[[np.ndarray], None]]] = [
    ({"name": "cce", "centroids": 20}, "pointers", lambda a: a.__setitem__((0, 0), 255)),
    ({"name": "sparse", "form": "csr"}, "first", lambda a: a.__setitem__(1, 2**31 - 1)),
    ({"name": "sparse", "form": "csr"}, "first", lambda a: a.__setitem__(1, -1)),
    ({"name": "sparse", "form": "csr"}, "columns", lambda a: a.__setitem__(0, 8)),
    ({"name": "sparse", "form": "bitmap"}, "bits", lambda a: a.__setitem__(0, -1)),
    ({"name": "sparse", "form": "bitmap"}, "starts", lambda a: a.__setitem__(-1, 2**31 - 1)),
    ({"name": "sparse", "form": "bitmap"}, "starts", lambda a: a.__setitem__(-1, -5)),
]


@pytest.mark.parametrize(("method", "name", "change"), ARRAYS)
def test_arrays_that_lead_to_rows_that_are_not_there(
    method: Any, name: str, change: Callable[[np.ndarray], None], tmp_path: Path
) -> None:
    path = saved(tmp_path, method, "0.8x" if name == "pointers" else "0.4x")
    tensors = {key: tensor.copy() for key, tensor in load_file(path / "tables.safetensors").items()}
    change(tensors[f"arrays.user.{name}"])
    save_file(tensors, path / "tables.safetensors")
    reseal(path, lambda about: None)
    refused(path, f"feature 'user', method '{method if isinstance(method, str) else method['name']}': ")
    with bounded("reader"):
        Bundle(path).vectors("user", np.arange(300))


@pytest.mark.parametrize("num_rows", [2**31 - 1, 400])
def test_a_checkpoint_takes_no_more_memory_than_it_holds(num_rows: int, tmp_path: Path) -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "dense", dim=8), backend="torch")
    state = {f"tables.{name}": value for name, value in tables.state_dict().items()}
    entry = description(tables.plan, {})
    entry["plan"]["features"][0]["num_ids"] = num_rows
    entry["plan"]["encodings"]["user"]["num_ids"] = num_rows
    entry["plan"]["tables"][0]["num_rows"] = num_rows
    torch.save({"embtab": entry, "state_dict": state}, tmp_path / "run.ckpt")
    with (
        bounded("load"),
        pytest.raises(UserError, match=rf"'user' should be \[{num_rows}, 8\] by"),
    ):
        load_tables(tmp_path / "run.ckpt")
    state["tables.lookup.user"] = torch.zeros(1).expand(num_rows, 8)
    torch.save({"embtab": entry, "state_dict": state}, tmp_path / "run.ckpt")
    with bounded("load"), pytest.raises(UserError, match=r"'tables\.lookup\.user' in state_dict is no whole tensor"):
        load_tables(tmp_path / "run.ckpt")
