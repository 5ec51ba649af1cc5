"""What is measured of a trained table, against brute force and worked values."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.compare import measure
from embtab.compare.measure import collisions, deciles, latency, rarity, slices, torch_tables
from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer
from embtab.datasets.synthetic import write_counts
from embtab.training.metrics import auc, logloss

FEATURES = [
    et.Feature("user", 700),
    et.Feature("item", 300),
    et.Feature("tag", 40),
    et.Feature("last", 300, id_space="item"),
]


def tables_of(method: str | dict, budget: str | None = "0.2x", precision: str = "fp32") -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return torch_tables(et.EmbeddingBagCollection(et.plan(FEATURES, method, budget, 8, 0, precision)))


def vectors_of(tables: et.EmbeddingBagCollection, name: str, num_ids: int) -> np.ndarray:
    """One id at a time of one feature, the others left empty."""
    names = [feature.name for feature in tables.plan.features]
    lengths = torch.zeros(len(names), num_ids, dtype=torch.int64)
    lengths[names.index(name)] = 1
    batch = KeyedJaggedTensor(names, torch.arange(num_ids), lengths=lengths.flatten(), stride=num_ids)
    return tables(batch)[name].detach().numpy()


@pytest.mark.parametrize("method", ["dense", "hash", "unified", "qr", "memcom", "freqcut"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_collisions_are_ids_whose_vectors_are_equal(
    method: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BLOCK", 128)  # several blocks
    tables = tables_of(method, None if method == "dense" else "0.3x", precision)
    tables.round_to_served()
    expected = {}
    for name, num_ids in (("user", 700), ("item", 300), ("tag", 40)):
        seen: dict[bytes, int] = {}
        vectors = [vector.tobytes() for vector in vectors_of(tables, name, num_ids) + np.float32(0)]
        for vector in vectors:
            seen[vector] = seen.get(vector, 0) + 1
        expected[name] = [sum(seen[vector] > 1 for vector in vectors), num_ids]
    found = collisions(tables)
    assert found == expected
    if method in ("hash", "freqcut"):
        assert found["user"][0] > 100


def test_a_hash_of_70_rows_leaves_few_of_700_ids_alone() -> None:
    found = collisions(tables_of("hash", "0.1x"))
    # Each id is alone with probability (1 - 1/70)^699, 0.00004: all share.
    assert found["user"] == [700, 700]
    assert collisions(tables_of("dense", None)) == {"user": [0, 700], "item": [0, 300], "tag": [0, 40]}


def test_large_spaces_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_IDS", 500)
    assert set(collisions(tables_of("hash"))) == {"item", "tag"}


def test_the_torch_copy_gives_the_same_vectors_and_has_a_latency() -> None:
    tables = et.EmbeddingBagCollection(et.plan(FEATURES, "qr", "0.3x", 8))
    copy = torch_tables(tables)
    ids = KeyedJaggedTensor(
        ["user", "item", "tag", "last"],
        torch.tensor([5, 699, 7, 299, 3, 39, 0, 1]),
        lengths=torch.ones(8, dtype=torch.int64),
    )
    assert torch.equal(tables(ids).values(), copy(ids).values())
    assert 0 < latency(copy, ids) < 1e6


def test_slices_partition_rows_by_their_rarest_id() -> None:
    generator = np.random.default_rng(0)
    labels, logits = (generator.random(9) < 0.5).astype(float), generator.standard_normal(9)
    rarest = np.array([0, 0, 1, 2, 2, 5, 9, 9, measure.UNKNOWN])
    found = slices(labels, logits, rarest)
    # Seen: 1 2 2 5 9 9, their median 3.5.
    assert found["rare"]["up_to"] == 3.5
    assert {name: each["rows"] for name, each in found.items()} == {"unseen": 2, "rare": 3, "frequent": 3}
    assert found["rare"]["logloss"] == logloss(labels[2:5], logits[2:5])
    assert found["frequent"]["auc"] == pytest.approx(auc(labels[5:8], logits[5:8]), nan_ok=True)


def test_deciles_of_a_hundred_rows() -> None:
    logits = np.linspace(-3, 3, 100)[::-1]
    labels = (np.arange(100) < 20).astype(float)  # the twenty highest
    groups = deciles(labels, logits)
    assert [group[2] for group in groups] == [10] * 10
    assert [group[1] for group in groups] == [0] * 8 + [1, 1]
    assert groups[0][0] == pytest.approx(np.mean(1 / (1 + np.exp(-logits[-10:]))))
    assert len(deciles(labels[:4], logits[:4])) == 4


def test_rarity_is_the_count_of_a_rows_rarest_id(tmp_path: Path) -> None:
    columns = (Categorical("user", 3), Categorical("tags", 4, multi=True), Categorical("hour", 2))
    dataset = Dataset("tiny", columns)
    rows = {"label": [0.0, 1.0, 0.0], "user": [1, 2, 0], "tags": [[1, 3], [], [3]], "hour": [0, 1, 1]}
    for split in ("train", "valid", "test"):
        with open_writer(tmp_path / split / "0.parquet", dataset.arrow_schema()) as writer:
            writer.write_table(pa.table(rows, schema=dataset.arrow_schema()))
    write_counts(tmp_path / "vocab", {"tags": np.array([9, 4, 3, 2])})
    users = pl.DataFrame(
        {"value": [None, "a", "b"], "count": [50, 7, 6]}, schema={"value": pl.String, "count": pl.Int64}
    )
    users.write_parquet(tmp_path / "vocab" / "user.parquet")
    Dataset("tiny", columns, files=describe_files(tmp_path)).save(tmp_path)
    # user 1: 7, tags 1 and 3: 4 and 2; user 2: 6, no tag; user 0 is what rare values share: as if never seen.
    assert rarity(str(tmp_path)).tolist() == [2, 6, 0]  # type: ignore[union-attr]
    (tmp_path / "vocab" / "tags.parquet").unlink()
    (tmp_path / "vocab" / "user.parquet").unlink()
    rarity.cache_clear()
    assert rarity(str(tmp_path)) is None
