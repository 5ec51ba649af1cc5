"""Dense tables into plans: as good as the best there is, found by NumPy; and files read without trust."""

import json
import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from laws import single_ids
from safetensors.numpy import save_file
from test_reader import put, sign

import embtab as et
from embtab import cli
from embtab.convert import fit
from embtab.convert.dense import read_dense, reconstruction_errors
from embtab.errors import DataError, UserError
from embtab.reader import Bundle
from embtab.reader.decoders import hash_rows

N, D = 60, 4
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((N, D)).astype(np.float32)
COUNTS = RANDOM.integers(0, 50, N)
SEEN = np.maximum(COUNTS, 1).astype(np.float64)


def planned(method: Any, budget: Any = "0.4x", n: int = N, dim: int = D) -> et.Plan:
    return et.plan([et.Feature("user", n, counts=COUNTS if n == N else None)], method, budget, dim)


def vectors(tables: et.EmbeddingBagCollection, tmp_path: Path) -> np.ndarray:
    """What the NumPy reader gives for all ids."""
    et.save(tables, tmp_path / "fitted", overwrite=True)
    return Bundle(tmp_path / "fitted").vectors("user", np.arange(N))


def lost(fitted: np.ndarray) -> float:
    return float((SEEN[:, None] * (fitted - WEIGHT) ** 2).sum())


def least(design: np.ndarray, target: np.ndarray = WEIGHT) -> float:
    """The smallest weighted loss of `design @ x`, from NumPy's least squares."""
    root = np.sqrt(SEEN)[:, None]
    x, *_ = np.linalg.lstsq(root * design, root * target, rcond=None)
    return float((SEEN[:, None] * (design @ x - target) ** 2).sum())


def one_hot(rows: np.ndarray, num_rows: int) -> np.ndarray:
    return np.eye(num_rows)[rows]


def test_dense_comes_back_as_it_was(tmp_path: Path) -> None:
    tables = et.from_dense({"user": torch.from_numpy(WEIGHT)}, planned("dense", None))
    np.testing.assert_array_equal(vectors(tables, tmp_path), WEIGHT)


def test_hashed_rows_are_the_least_squares_answer(tmp_path: Path) -> None:
    plan = planned("hash")
    e: Any = plan.encodings["user"]
    best = least(one_hot(hash_rows(np.arange(N), e.seed, e.num_rows), e.num_rows))
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-5)


def test_shared_chunks_are_the_least_squares_answer(tmp_path: Path) -> None:
    plan = planned("unified")
    e: Any = plan.encodings["user"]
    rows = [one_hot(hash_rows(np.arange(N), seed, e.num_rows), e.num_rows) for seed in e.seeds]
    both = np.concatenate([WEIGHT[:, :2], WEIGHT[:, 2:]])  # both chunks read one table
    root = np.sqrt(np.tile(SEEN, 2))[:, None]
    design = np.concatenate(rows)
    x, *_ = np.linalg.lstsq(root * design, root * both, rcond=None)
    best = float(((root * (design @ x - both)) ** 2).sum())
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("op", ["sum", "concat"])
def test_quotients_and_remainders_are_the_least_squares_answer(op: str, tmp_path: Path) -> None:
    plan = planned({"name": "qr", "op": op}, "0.5x")
    c = plan.to_dict()["encodings"]["user"]["collisions"]
    q, r = one_hot(np.arange(N) // c, -(-N // c)), one_hot(np.arange(N) % c, c)
    if op == "sum":
        best = least(np.concatenate([q, r], axis=1))
    else:
        best = least(q, WEIGHT[:, : D // 2]) + least(r, WEIGHT[:, D // 2 :])
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-4)


def test_sums_of_hashed_rows_are_the_least_squares_answer(tmp_path: Path) -> None:
    plan = planned("multihash")
    e: Any = plan.encodings["user"]
    design = sum(one_hot(hash_rows(np.arange(N), s, n), n) for s, n in zip(e.seeds, e.num_rows, strict=True))
    best = least(design)
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-3)


def test_low_rank_is_the_weighted_singular_value_decomposition(tmp_path: Path) -> None:
    plan = planned("lowrank", "0.7x")
    rank = plan.tables["user"].width
    singular = np.linalg.svd(np.sqrt(SEEN)[:, None] * WEIGHT, compute_uv=False)
    best = float((singular[rank:] ** 2).sum())
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-4)


def test_low_rank_with_a_bias_is_the_decomposition_of_what_the_mean_leaves(tmp_path: Path) -> None:
    plan = planned({"name": "lowrank", "bias": True}, "0.7x")
    rank = plan.tables["user"].width
    centred = WEIGHT - np.average(WEIGHT, axis=0, weights=SEEN)
    singular = np.linalg.svd(np.sqrt(SEEN)[:, None] * centred, compute_uv=False)
    best = float((singular[rank:] ** 2).sum())
    assert lost(vectors(et.from_dense({"user": WEIGHT}, plan), tmp_path)) == pytest.approx(best, rel=1e-4)


def test_products_cannot_be_bettered_in_either_factor(tmp_path: Path) -> None:
    plan = planned({"name": "qr", "op": "product"}, "0.5x")
    tables = et.from_dense({"user": WEIGHT}, plan)
    found = lost(vectors(tables, tmp_path))
    c = plan.to_dict()["encodings"]["user"]["collisions"]
    rows = {"user@quotient": np.arange(N) // c, "user@remainder": np.arange(N) % c}
    parts = {name: tables.lookup.table(name).numpy() for name in rows}
    for fitted, other in (("user@quotient", "user@remainder"), ("user@remainder", "user@quotient")):
        factor = parts[other][rows[other]]
        best = 0.0
        for d in range(D):
            best += least(one_hot(rows[fitted], len(parts[fitted])) * factor[:, d : d + 1], WEIGHT[:, d : d + 1])
        assert found <= best * 1.01


@pytest.mark.parametrize(
    "method", ["qr", {"name": "qr", "op": "sum"}, "unified", "multihash", "memcom", "cafe", "lowrank", "tt"], ids=str
)
def test_what_the_method_can_hold_comes_back(method: Any) -> None:
    """Vectors of random tables of the same plan are found again."""
    n = 400
    torch.manual_seed(0)
    plan = planned(method, "0.5x", n)
    source = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    weight = source(single_ids({"user": np.arange(n)}))["user"].detach()
    again = et.from_dense({"user": weight}, plan)
    limit = 0.9 if method == "cafe" else 0.02  # whose hot ids are others
    assert reconstruction_errors(again, {"user": weight}, {})["user"] < limit


@pytest.mark.parametrize("method", ["dhe", {"name": "multihash", "weighted": True}], ids=str)
def test_any_other_method_is_fitted_by_descent(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "ADAM_STEPS", 300)
    groups = np.repeat(RANDOM.standard_normal((20, 16)), 20, axis=0).astype(np.float32)
    plan = planned(method, "0.5x", 400, 16)
    again = et.from_dense({"user": groups}, plan)
    assert plan.encodings["user"].method != "dense"
    assert reconstruction_errors(again, {"user": groups}, {})["user"] < 0.75


def test_pointers_follow_the_clusters_of_dense_rows() -> None:
    groups = np.repeat(RANDOM.standard_normal((10, 8)), 50, axis=0).astype(np.float32)
    plan = planned({"name": "cce", "chunks": 2, "centroids": 16}, "0.4x", 500, 8)
    assert reconstruction_errors(et.from_dense({"user": groups}, plan), {"user": groups}, {})["user"] < 1e-3


def test_errors_are_relative_and_weighted() -> None:
    tables = et.from_dense({"user": WEIGHT}, planned("hash"))
    fitted = tables.lookup.table("user").numpy()
    e: Any = tables.plan.encodings["user"]
    off = fitted[hash_rows(np.arange(N), e.seed, e.num_rows)] - WEIGHT
    expected = np.sqrt((SEEN[:, None] * off**2).sum() / (SEEN[:, None] * WEIGHT**2).sum())
    assert reconstruction_errors(tables, {"user": WEIGHT}, {"user": COUNTS})["user"] == pytest.approx(
        expected, rel=1e-5
    )


def test_wrong_dense_tables_are_refused_by_name() -> None:
    plan = planned("hash")
    broken = WEIGHT.copy()
    broken[7, 1] = np.nan
    for weights, match in (
        ({"item": WEIGHT}, "'item' is of no feature"),
        ({}, "no dense table for 'user'"),
        ({"user": WEIGHT[:-1]}, r"'user' is \(59, 4\); the plan wants \(60, 4\)"),
        ({"user": broken}, "'user': row 7 holds NaN"),
    ):
        with pytest.raises(UserError, match=match):
            et.from_dense(weights, plan)


def written(kind: str, folder: Path) -> Path:
    path = folder / f"user.{kind}"
    if kind == "safetensors":
        save_file({"user": WEIGHT, "steps": np.arange(3)}, path)
    elif kind == "npy":
        np.save(path, WEIGHT)
    elif kind == "parquet":
        order = RANDOM.permutation(N)
        pq.write_table(pa.table({"id": order, "vector": list(WEIGHT[order])}), path)
    else:
        torch.save({"state_dict": {"user": torch.from_numpy(WEIGHT), "bias": torch.zeros(3)}, "epoch": 1}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "npy", "parquet", "pt"])
def test_every_kind_of_file_is_read(kind: str, tmp_path: Path) -> None:
    found = read_dense([written(kind, tmp_path)])
    assert list(found) == ["user"]
    np.testing.assert_array_equal(found["user"].numpy(), WEIGHT)


def test_files_that_hold_no_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "user.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"user\.csv: unknown kind; give \.safetensors"):
        read_dense([tmp_path / "user.csv"])
    with pytest.raises(DataError, match=r"gone\.npy: no such file"):
        read_dense([tmp_path / "gone.npy"])


def test_tables_are_imported_into_either_backend() -> None:
    fused, plain = (
        et.from_dense({"user": WEIGHT}, planned("hash"), backend=backend) for backend in ("fbgemm", "torch")
    )
    assert list(et.outer_parameters(plain))
    assert not list(et.outer_parameters(fused))
    for name, tensor in plain.lookup.state_dict().items():
        assert torch.equal(tensor, fused.lookup.state_dict()[name]), name


def test_a_pattern_chooses_tables(tmp_path: Path) -> None:
    names = {
        "ebc.embedding_bags.user.weight": WEIGHT,
        "ebc.embedding_bags.item.weight": WEIGHT[:9],
        "over.0.weight": WEIGHT.T.copy(),
    }
    save_file(names, tmp_path / "m.safetensors")
    found = read_dense([tmp_path / "m.safetensors"], r"embedding_bags\.(.+)\.weight")
    assert sorted(found) == ["item", "user"]
    with pytest.raises(UserError, match="different widths"):
        read_dense([tmp_path / "m.safetensors"])
    with pytest.raises(UserError, match=r"--pattern '\(': missing \)"):
        read_dense([tmp_path / "m.safetensors"], "(")
    with pytest.raises(UserError, match="feature 'weight' has a table already"):
        read_dense([tmp_path / "m.safetensors"], r"embedding_bags\..+\.(weight)")
    with pytest.raises(UserError, match="needs a group"):
        read_dense([tmp_path / "m.safetensors"], "user")
    with pytest.raises(DataError, match="holds no matrix of floats whose name fits"):
        read_dense([tmp_path / "m.safetensors"], "(nothing)")


def test_what_torchrec_writes_is_found_by_name(tmp_path: Path) -> None:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    bags = [EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=9) for name in ("user", "t_item")]
    events = [EmbeddingConfig(name="seen", embedding_dim=4, num_embeddings=7)]
    model = torch.nn.ModuleDict(
        {"ebc": EmbeddingBagCollection(bags), "ec": EmbeddingCollection(events), "over": torch.nn.Linear(4, 4)}
    )
    torch.save(model.state_dict(), tmp_path / "m.pt")
    found = read_dense([tmp_path / "m.pt"], "torchrec")
    assert sorted(found) == ["seen", "t_item", "user"]
    expected = dict(model.named_parameters())["ebc.embedding_bags.t_item.weight"]
    torch.testing.assert_close(found["t_item"], expected.detach(), rtol=0, atol=0)


def test_what_fuxictr_writes_is_found_by_name(tmp_path: Path) -> None:
    """Modules as its FeatureEmbedding has them: numeric values are a Linear, a history shares the item's table."""
    item = torch.nn.Embedding(9, 4)
    layers = {"user.id": torch.nn.Embedding(5, 4), "item": item, "seen": item, "age": torch.nn.Linear(1, 4, bias=False)}
    state = {f"embedding_layer.embedding_layer.embedding_layers.{name}.weight": m.weight for name, m in layers.items()}
    narrow = {"fm.lr_layer.embedding_layer.embedding_layer.embedding_layers.item.weight": torch.zeros(9, 1)}
    torch.save(state | narrow | {"dnn.mlp.0.weight": torch.zeros(8, 4)}, tmp_path / "AutoInt.model")
    found = read_dense([tmp_path / "AutoInt.model"], "fuxictr")
    assert sorted(found) == ["item", "seen", "user.id"]
    features = [
        et.Feature("user.id", 5),
        et.Feature("item", 9, id_space="items"),
        et.Feature("seen", 9, id_space="items"),
    ]
    made = et.from_dense(found, et.plan(features, dim=4))
    torch.testing.assert_close(made.lookup.table("items"), item.weight.detach(), rtol=0, atol=0)
    with pytest.raises(UserError, match="has a table already"):
        et.from_dense(found | {"seen": found["seen"].clone()}, et.plan(features, dim=4))


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("name", ["user.pt", "user.npy", "user.safetensors", "user.parquet"])
def test_pickles_are_never_executed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name == "user.npy":
        np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps({"user": Trap()}))
    with pytest.raises(DataError, match=str(path)):
        read_dense([path])
    assert not (tmp_path / "sprung").exists()


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[str, str, int]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    output = capsys.readouterr()
    return output.out, output.err, code


def test_import_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, error, code = run(
        capsys, "import", written("npy", tmp_path), "--budget", "0.3x", "--method", "qr", "--option", "op=sum",
        "--precision", "int8", "--out", tmp_path / "b", "--quality", "auc=0.7",
    )  # fmt: skip
    assert code == 0, error
    assert "relative error" in out
    out, _, code = run(capsys, "inspect", tmp_path / "b")
    assert code == 0
    assert all(word in out for word in ("user", "qr", "rows.user@quotient", "auc: 0.7", "imported_from"))
    out, error, code = run(capsys, "verify", tmp_path / "b")
    assert code == 0, error
    assert out.split()[:4] == ["feature", "reader", "torch", "fbgemm"]
    _, error, code = run(capsys, "import", tmp_path / "user.npy", "--out", tmp_path / "b")
    assert (code, error.count("\n")) == (2, 1)
    assert "already exists" in error


def test_verify_fails_where_vectors_differ(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    et.save(et.from_dense({"user": WEIGHT}, planned("hash")), tmp_path / "b")
    sign(tmp_path / "b", put(5, "plan", "encodings", "user", "seed"))
    _, error, code = run(capsys, "verify", tmp_path / "b")
    assert (code, error.count("\n")) == (2, 1)
    assert "user by reader, user by torch, user by fbgemm" in error


def test_a_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from embtab.training.checkpoint import description

    tables = et.from_dense({"user": WEIGHT}, planned("hash"))
    state = {f"tables.{name}": value for name, value in tables.state_dict().items()}
    about = {"dataset": "toy", "fingerprint": "f00"}
    torch.save(
        {"state_dict": state, "embtab": description(tables.plan, about), "epoch": 3, "global_step": 70}, tmp_path / "c"
    )
    _, error, code = run(capsys, "export", tmp_path / "c", tmp_path / "b", "--precision", "fp16")
    assert code == 0, error
    opened = Bundle(tmp_path / "b")
    assert opened.config["provenance"]["fingerprint"] == "f00"
    assert opened.config["provenance"]["global_step"] == 70
    e: Any = tables.plan.encodings["user"]
    rows = tables.lookup.table("user").half().float().numpy()
    np.testing.assert_array_equal(
        opened.vectors("user", np.array([-5])), rows[hash_rows(np.array([-5]), e.seed, e.num_rows)]
    )
    assert run(capsys, "export", tmp_path / "c", tmp_path / "b", "--overwrite")[2] == 0
    _, error, code = run(capsys, "export", tmp_path / "absent", tmp_path / "d")
    assert (code, error) == (2, f"embtab: error: {tmp_path / 'absent'}: no such checkpoint\n")


MEASURE = """
import sys, threading, time
from pathlib import Path
import embtab as et
from embtab.convert import dense, fit
from embtab.convert.dense import from_dense, read_dense, reconstruction_errors

fit.CHUNK = dense.CHUNK = 2**13  # what a chunk needs in between is no part of what is asked here

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))

plan = et.plan([et.Feature("user", 1_000_000)], sys.argv[2], "1MB", dim=32)
small = et.plan([et.Feature("user", 1000)], sys.argv[2], "1kB", dim=32)
from_dense({"user": __import__("numpy").zeros((1000, 32), "float32")}, small)  # what is loaded once
before, most, done = anonymous(), 0, False

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
weights = read_dense([Path(sys.argv[1])])
reconstruction_errors(from_dense(weights, plan), weights, {})
done = True
watcher.join()
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt", "parquet"])
def test_a_large_table_stays_on_disk(kind: str, tmp_path: Path) -> None:
    """128 MB of vectors in a fraction of that."""
    weight, path = np.random.default_rng(0).random((1_000_000, 32), np.float32), tmp_path / f"user.{kind}"
    if kind == "npy":
        np.save(path, weight)
    elif kind == "safetensors":
        save_file({"user": weight}, path)
    elif kind == "parquet":
        flat = pa.FixedSizeListArray.from_arrays(weight.reshape(-1), 32)
        columns = pa.table([np.arange(len(weight)), flat], names=["id", "vector"])
        pq.write_table(columns, path, row_group_size=len(weight))
    else:
        torch.save({"user": torch.from_numpy(weight)}, path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), "hash"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 90_000, done.stdout  # kB


@pytest.mark.parametrize(
    ("ids", "vectors", "match"),
    [
        ([0, 2], [[1.0, 2.0], [3.0, 4.0]], "must hold 0..1, each once"),
        ([0, 0], [[1.0, 2.0], [3.0, 4.0]], "must hold 0..1, each once"),
        ([-1, 0], [[1.0, 2.0], [3.0, 4.0]], "must hold 0..1, each once"),
        ([0, 1], [[1.0, 2.0], [3.0]], "lists of one length"),
        ([], [], "must hold"),
    ],
)
def test_parquet_that_is_no_table_is_refused(ids: list, vectors: list, match: str, tmp_path: Path) -> None:
    columns = [pa.array(ids, pa.int64()), pa.array(vectors, pa.list_(pa.float32()))]
    pq.write_table(pa.table(columns, names=["id", "vector"]), tmp_path / "user.parquet")
    with pytest.raises(DataError, match=match):
        read_dense([tmp_path / "user.parquet"])


def test_an_import_is_measured_under_its_ranker(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from embtab.models.autoint import AutoInt
    from embtab.training.checkpoint import description

    data = tmp_path / "data"
    _, error, code = run(capsys, "prepare", "synthetic", "--out", data, "--rows", 3000, "--scale", 0.0005)
    assert code == 0, error
    features = et.read_features(data)
    plan = et.plan(features, "dense", None, 4)
    torch.manual_seed(0)
    tables, settings = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), {"num_layers": 0, "dnn": []}
    num_dense = len(json.loads((data / "dataset.json").read_text())["dense"])
    model = AutoInt(num_dense, len(features), 4, **settings)
    state = {f"tables.{k}": v for k, v in tables.state_dict().items()}
    state |= {f"model.{k}": v for k, v in model.state_dict().items()}
    about = {"dense": ["x"] * num_dense}
    torch.save({"state_dict": state, "embtab": description(plan, about)}, tmp_path / "c.ckpt")
    config = {"model": {"model": {"class_path": "embtab.models.autoint.AutoInt", "init_args": settings}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given = ["import", tmp_path / "c.ckpt", "--pattern", r"^tables\.lookup\.(.+)$", "--out", tmp_path / "b"]
    ranker = ["--ranker", tmp_path / "c.ckpt", "--config", tmp_path / "config.yaml"]
    _, error, code = run(capsys, *given, *ranker)
    assert (code, "--data" in error) == (2, True)
    _, error, code = run(capsys, *given, "--fine-tune", 1, "--data", data)
    assert (code, "--ranker" in error) == (2, True)
    # Exact tables cost nothing; a few bytes cost something; training on labels wins some back.
    out, error, code = run(capsys, *given, *ranker, "--data", data, "--method", "dense")
    assert code == 0, error
    assert "auc_imported" in out
    assert "(+0.0000)" in out.split("auc_imported")[1].splitlines()[0]
    given[-1] = tmp_path / "b2"
    before = logging.getLogger("lightning.pytorch").level, list(warnings.filters)
    out, error, code = run(
        capsys, *given, *ranker, "--data", data, "--method", "hash", "--budget", "0.02x", "--fine-tune", 2,
        "--table-lr", 0.2,
    )  # fmt: skip
    assert code == 0, error
    assert before == (logging.getLogger("lightning.pytorch").level, list(warnings.filters))
    quality = Bundle(tmp_path / "b2").config["quality"]
    assert list(quality) == ["auc_dense", "auc_imported", "auc_fine_tuned"]
    assert quality["auc_fine_tuned"] != quality["auc_imported"]
