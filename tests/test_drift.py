"""What becomes of ids, values and features that training did not know, in every method and where users look."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from laws import CASES, FEATURES, Case, single_ids
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.cli import main
from embtab.datasets import table
from embtab.datasets.drift import drift_line, unseen_shares
from embtab.errors import DataError, UserError

TAKE_ANY_INT64 = {"hash", "unified", "cafe", "multihash", "freqcut", "robe", "dhe"}
"""Where they compress; in the other methods an id at or above num_ids is a mistake."""
ROWS_OF_THEIR_OWN = {"dense", "pruned", "sparse"}
"""Where an id that training never saw keeps its first vector; elsewhere others that share its rows move it."""
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def collection_of(case: Case) -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return et.EmbeddingBagCollection(case.plan(), backend="torch", init_std=1.0)


def one_id(user: int, others: int = 0) -> KeyedJaggedTensor:
    return single_ids({f.name: np.array([user if f.name == "user" else others]) for f in FEATURES})


@every_case
def test_an_id_beyond_the_cardinality_is_hashed_or_refused_by_name(case: Case) -> None:
    collection = collection_of(case)
    if collection.plan.encoding("user").method in TAKE_ANY_INT64:
        new = [collection(one_id(user))["user"] for user in (5000, 5001, -1, 2**62)]
        assert all(vector.isfinite().all() for vector in new)
        return
    for user in (5000, -1):
        with pytest.raises(UserError, match=f"feature 'user'.*id {user} .*5000"):
            collection(one_id(user))


@every_case
def test_an_id_that_training_never_saw_has_a_vector(case: Case) -> None:
    """Id 0, which stands for all unseen values, as well as one of its own that only the test split holds."""
    collection, rng = collection_of(case), np.random.default_rng(0)
    before = {user: collection(one_id(user))["user"].detach().clone() for user in (0, 4999)}
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    for _ in range(3):
        ids = {f.name: rng.integers(1, f.num_ids - 1, 2048) for f in FEATURES}
        optimizer.zero_grad()
        collection(single_ids(ids)).values().square().mean().backward()
        optimizer.step()
    after = {user: collection(one_id(user))["user"].detach() for user in before}
    assert all(vector.isfinite().all() for vector in after.values())
    if collection.plan.encoding("user").method in ROWS_OF_THEIR_OWN:
        assert all(torch.equal(before[user], after[user]) for user in before)


@every_case
def test_a_feature_that_vanishes_is_zero_where_it_is_empty_and_refused_where_it_is_absent(case: Case) -> None:
    collection = collection_of(case)
    names = [f.name for f in FEATURES]
    lengths = torch.tensor([[name != "user"] * 3 for name in names]).int().flatten()
    emptied = KeyedJaggedTensor(names, torch.zeros(3 * (len(names) - 1), dtype=torch.int64), lengths=lengths)
    assert not collection(emptied)["user"].any()
    with pytest.raises(UserError, match="user"):
        collection(KeyedJaggedTensor(names[:-1], torch.zeros(4, dtype=torch.int64), lengths=torch.ones(4).int()))


ROLES = {
    "label": "y",
    "categorical": {"city": None, "shop": {"raw": True, "num_ids": 40}, "kind": None},
    "multi": "tags",
    "split": {"by": "column", "column": "part"},
    "min_count": 1,
}


def write_table(folder: Path, **changes: list) -> tuple[list[Path], Path]:
    """Sixteen rows to train on, four each to validate and test, in which some values are new."""
    columns = {
        "y": [0, 1] * 12,
        "city": ["a", "b"] * 10 + ["a", "new", "newer", "b"],
        "shop": [1, 2] * 10 + [1, 2, 30, 2],
        "kind": ["x"] * 20 + [""] * 4,
        "tags": [["red", "blue"]] * 20 + [[]] * 4,
        "part": ["train"] * 16 + ["valid"] * 4 + ["test"] * 4,
    }
    columns = {name: values for name, values in (columns | changes).items() if values}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    (folder / "roles.yaml").write_text(yaml.safe_dump(ROLES))
    return [folder / "a.parquet"], folder / "roles.yaml"


def prepare(folder: Path, capsys: pytest.CaptureFixture) -> list[str]:
    (raw,), roles = write_table(folder)
    main(["prepare", "table", str(raw), "--roles", str(roles), "--out", str(folder / "out")])
    return capsys.readouterr().out.splitlines()


def test_prepare_counts_what_training_never_saw(tmp_path, capsys):
    said = prepare(tmp_path, capsys)
    assert said[1:] == [
        "valid: ids unseen or too rare in training: none",
        "test: ids unseen or too rare in training: kind 100.00%, city 50.00%, shop 25.00%; no id at all: tags",
    ]
    test = pq.read_table(tmp_path / "out/test").to_pydict()
    assert test["city"][1] == test["city"][2] == 0
    assert test["kind"] == [0] * 4
    assert test["tags"] == [[]] * 4


def test_shares_are_of_ids_and_not_of_rows(tmp_path, capsys):
    tags = [["red", "blue"]] * 16 + [["red"]] * 4 + [["red", "new"], ["new", "blue", "red"], [], ["red"]]
    write_table(tmp_path, tags=tags)
    table.prepare([tmp_path / "a.parquet"], tmp_path / "out", roles=tmp_path / "roles.yaml")
    assert unseen_shares(tmp_path / "out", "test")["tags"] == 2 / 6
    with pytest.raises(UserError, match="unknown split"):
        unseen_shares(tmp_path / "out", "tests")


def test_a_column_that_vanished_is_named(tmp_path):
    raw, roles = write_table(tmp_path, kind=[])
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'kind'; there are y, city, shop, tags, part"):
        table.prepare(raw, tmp_path / "out", roles=roles)


def test_many_features_are_not_all_listed(tmp_path, monkeypatch):
    shares = {f"f{i}": (i + 1) / 100 for i in range(9)} | {"known": 0.0}
    features = [et.Feature("f0", 9), et.Feature("raw", 9, hashed=True)]
    monkeypatch.setattr("embtab.datasets.drift.unseen_shares", lambda *_: shares)
    monkeypatch.setattr("embtab.datasets.drift.read_features", lambda *_, **__: features)
    line = drift_line(tmp_path, "test")
    assert line == (
        "test: ids unseen or too rare in training: f8 9.00%, f7 8.00%, f6 7.00%, f5 6.00%, f4 5.00% and 4 more features"
        "; hashed, so not counted: raw"
    )


def test_validate_and_test_say_it_too(tmp_path, capsys):
    prepare(tmp_path, capsys)
    config = {
        "data": {"path": str(tmp_path / "out"), "batch_size": 8},
        "model": {"method": "dense", "dim": 4, "backend": "torch"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    given = ["--config", str(tmp_path / "fit.yaml")]
    logger = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    main(["fit", *given, *logger])
    assert "valid: ids unseen or too rare in training: none" in capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    main(["test", *given, *logger, "--ckpt_path", str(checkpoint)])
    assert "test: ids unseen or too rare in training: kind 100.00%, city 50.00%" in capsys.readouterr().err


def test_a_damaged_vocabulary_is_named(tmp_path, capsys):
    prepare(tmp_path, capsys)
    (tmp_path / "out/vocab/city.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"vocab/city\.parquet"):
        unseen_shares(tmp_path / "out", "test")
