"""Bundles: what is saved is what comes back, whole or not at all."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from laws import CASES, EXTREMES, FEATURES, Case, adapted, single_ids
from safetensors.numpy import load_file

import embtab as et
from embtab.bundle.writer import torch_answers
from embtab.datasets import criteo
from embtab.errors import UserError
from embtab.quantise import served
from embtab.reader import Bundle, BundleError, golden
from embtab.reader.manifest import write_signed
from embtab.reader.schema import read_config, tensor_specs

MIXED = next(case for case in CASES if case.name == "mixed")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def trained(case: Case = MIXED, backend: str = "torch") -> et.EmbeddingBagCollection:
    torch.manual_seed(0)
    return adapted(et.EmbeddingBagCollection(case.plan(), backend=backend, init_std=1.0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    et.save(trained(), tmp_path / "bundle")
    return tmp_path / "bundle"


@every_case
def test_golden_vectors_come_out_of_every_backend(case: Case, tmp_path: Path) -> None:
    et.save(trained(case), tmp_path / "b", precision="int4")
    opened = Bundle(tmp_path / "b")
    answers = [torch_answers(et.load(tmp_path / "b", backend)) for backend in ("torch", "fbgemm")]
    for answer in [*answers, golden.reader_answers(opened)]:
        found = golden.differences(opened, answer)
        assert list(found) == [feature.name for feature in FEATURES]
        assert all(fine for _, fine in found.values()), found


@every_case
def test_many_ids_give_the_vectors_of_the_tables_that_were_saved(case: Case, tmp_path: Path) -> None:
    tables = trained(case, "fbgemm").eval()
    et.save(tables, tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    random = np.random.default_rng(0)
    ids = {}
    for feature in FEATURES:
        drawn = random.integers(0, feature.num_ids, 20_000)
        if case.plan().encoding(feature.name).num_ids is None:
            drawn[::2] = random.integers(-(2**63), 2**63 - 1, 10_000, dtype=np.int64)
            drawn[: len(EXTREMES)] = EXTREMES
        ids[feature.name] = drawn
    live = tables(single_ids(ids)).to_dict()
    again = et.load(tmp_path / "b", "fbgemm").eval()(single_ids(ids)).to_dict()
    for name, expected in live.items():
        assert torch.equal(again[name], expected)
        np.testing.assert_allclose(opened.lookup(name, ids[name]), expected.detach().numpy(), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("dim", [1, 5, 16])
def test_rows_are_read_as_serving_reads_them(precision: str, dim: int, tmp_path: Path) -> None:
    plan = et.plan([et.Feature("user", 37)], dim=dim, precision=precision)
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0)
    et.save(tables, tmp_path / "b")
    expected = served(tables.lookup.table("user"), precision)
    np.testing.assert_array_equal(Bundle(tmp_path / "b").vectors("user", np.arange(37)), expected.numpy())
    stored = sum(t.nbytes for t in load_file(tmp_path / "b" / "tables.safetensors").values())
    assert stored == plan.nbytes


def test_the_config_says_what_a_decoder_must_know(tmp_path: Path) -> None:
    about = {"dataset": "ml", "fingerprint": "abc"}
    et.save(trained(), tmp_path / "b", provenance=about, quality={"auc": 0.75})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["format"], config["version"]) == ("embtab-bundle", 1)
    assert config["provenance"] == about
    assert config["quality"] == {"auc": 0.75}
    assert set(config["files"]) == {"README.md", "golden.safetensors", "tables.safetensors"}
    for example in config["rules"]["hash"]["examples"]:  # on Python's integers, from the steps in words
        x = (example["id"] + example["seed"]) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x = x ^ x >> 31
        assert (x >> 33) * example["num_rows"] >> 31 == example["row"]
    assert "auc: 0.75" in (tmp_path / "b" / "README.md").read_text()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "b").iterdir()}
    assert len(modes) == 1


def test_large_tables_go_to_several_files(tmp_path: Path) -> None:
    tables = trained(next(case for case in CASES if case.name == "qr sum"))
    et.save(tables, tmp_path / "b", max_file_bytes=5000)
    assert len(list((tmp_path / "b").glob("tables-*-of-*.safetensors"))) > 2
    ids = {f.name: np.arange(30) % f.num_ids for f in FEATURES}
    assert torch.equal(et.load(tmp_path / "b")(single_ids(ids)).values(), tables(single_ids(ids)).values())


def test_sequences_are_saved_and_loaded(tmp_path: Path) -> None:
    plan = et.plan([et.Feature("item", 500), et.Feature("seen", 500, pooling="none")], "hash", "0.3x")
    tables = et.EmbeddingCollection(plan, backend="torch", init_std=1.0)
    et.save(tables, tmp_path / "b")
    again = et.load(tmp_path / "b", collection=et.EmbeddingCollection)
    ids = {"item": np.arange(9), "seen": np.arange(9) * 7}
    for name, jagged in again(single_ids(ids)).items():
        assert torch.equal(jagged.values(), tables(single_ids(ids))[name].values())
    with pytest.raises(ValueError, match="not pooled"):
        Bundle(tmp_path / "b").lookup("seen", np.arange(4), np.array([0, 4]))


def test_the_vocabularies_of_a_dataset_travel_along(tmp_path: Path) -> None:
    lines = ("\t".join(["1", *["2"] * 13, *(f"{i % (3 + c):x}" for c in range(26))]) for i in range(200))
    (tmp_path / "raw.txt").write_text("".join(f"{line}\n" for line in lines))
    criteo.prepare([tmp_path / "raw.txt"], tmp_path / "data", min_count=1)
    tables = et.EmbeddingBagCollection(et.plan(et.read_features(tmp_path / "data")), backend="torch")
    et.save(tables, tmp_path / "b", vocab=tmp_path / "data")
    opened = Bundle(tmp_path / "b")
    for feature in ("C1", "C26"):
        other, *values = pq.read_table(tmp_path / "data" / "vocab" / f"{feature}.parquet")["value"].to_pylist()
        assert other is None
        np.testing.assert_array_equal(opened.raw_ids(feature, values), np.arange(1, len(values) + 1))
        assert opened.raw_ids(feature, ["not there"]) == [0]
    assert len(values) == 28


def test_a_vocabulary_travels_along(tmp_path: Path) -> None:
    plan = et.plan([et.Feature("shop", 4), et.Feature("user", 3)])
    tables = et.EmbeddingBagCollection(plan, backend="torch")
    et.save(tables, tmp_path / "b", vocab={"shop": [None, "Zürich", "", "a"]})
    opened = Bundle(tmp_path / "b")
    np.testing.assert_array_equal(opened.raw_ids("shop", ["a", "?", "Zürich", ""]), [3, 0, 1, 2])
    with pytest.raises(KeyError, match="user"):
        opened.raw_ids("user", ["a"])
    for wrong in ({"shop": ["a"]}, tmp_path / "nowhere", {"shop": ["a", "b", "c", "a"]}, {"nothing": ["a"]}):
        with pytest.raises(UserError, match="vocab"):
            et.save(tables, tmp_path / "c", vocab=wrong)
    assert not (tmp_path / "c").exists()


def test_an_existing_folder_is_replaced_only_when_asked(saved: Path, tmp_path: Path) -> None:
    before = (saved / "config.json").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        et.save(trained(), saved)
    assert (saved / "config.json").read_bytes() == before
    et.save(trained(), saved, precision="int8", overwrite=True)
    assert Bundle(saved).plan["tables"][0]["precision"] == "int8"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_text("dear")
    with pytest.raises(UserError, match="not a bundle"):
        et.save(trained(), other, overwrite=True)
    assert (other / "a.jpg").read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "photos"}  # nothing hidden left behind


@pytest.mark.parametrize(("value", "precision"), [("nan", "fp32"), ("inf", "fp32"), ("nan", "int8"), ("70000", "fp16")])
def test_a_row_that_cannot_be_stored_is_named_and_nothing_is_written(
    value: str, precision: str, saved: Path, tmp_path: Path
) -> None:
    tables = trained()
    tables.lookup.table("colour")[2, 5] = float(value)
    before = sorted(path.name for path in tmp_path.iterdir())
    for path, overwrite in ((tmp_path / "new", False), (saved, True)):
        with pytest.raises(UserError, match="table 'colour': row 2 "):
            et.save(tables, path, precision=precision, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    Bundle(saved)


def test_tables_that_changed_while_being_written_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import embtab.bundle.writer as module

    tables, write = trained(), module._write_tables

    def disturbed(*args):
        places = write(*args)
        tables.lookup.table("colour").add_(1)
        return places

    monkeypatch.setattr(module, "_write_tables", disturbed)
    with pytest.raises(UserError, match="colour"):
        et.save(tables, tmp_path / "b")
    assert not list(tmp_path.iterdir())


SAVE_FOR_EVER = """
import sys, torch, embtab as et
plan = et.plan([et.Feature("user", 2000)], dim=16)
tables = et.EmbeddingBagCollection(plan, backend="torch")
value = 0
while True:
    tables.lookup.table("user").fill_(value)
    et.save(tables, sys.argv[1], overwrite=True)
    print(value, flush=True)
    value += 1
"""


def test_a_killed_export_leaves_the_old_bundle_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    random = np.random.default_rng(0)
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    seen = []
    for _ in range(40):  # the bundle is whole at every moment at which another process looks
        time.sleep(float(random.uniform(0, 0.01)))
        seen.append(json.loads((path / "config.json").read_text())["created"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    vectors = Bundle(path).vectors("user", np.arange(2000))
    assert (vectors == vectors[0, 0]).all()
    assert os.listdir(path)


def test_a_damaged_bundle_is_not_loaded(saved: Path) -> None:
    file = saved / "tables.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"tables\.safetensors: damaged"):
        et.load(saved)


def test_the_page_describes_every_method() -> None:
    page = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text()
    for method in et.METHODS:
        assert f"\n| `{method}` | " in page, f"docs/bundle.md: no decoder for {method}"


def test_save_writes_nothing_that_a_bundle_refuses(tmp_path: Path) -> None:
    tables = et.EmbeddingBagCollection(et.plan([et.Feature("wide", 1)], dim=2**20), "torch", init_std=None)
    with pytest.raises(BundleError, match="dim 1048576 cannot be"):
        et.save(tables, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["dense", "lowrank", "memcom", "qr"])
def test_a_bundle_may_have_2_to_the_31_rows_and_more(method: str, tmp_path: Path) -> None:
    """Its description; a terabyte is not written."""
    plan = et.plan([et.Feature("user", 10**11)], method, None if method == "dense" else "0.1x").to_dict()
    assert max(table["num_rows"] for table in plan["tables"]) >= 2**31 - 1
    et.save(trained(), tmp_path / "small")
    about = json.loads((tmp_path / "small" / "config.json").read_text())
    arrays = [
        {"space": space, "name": name, "dtype": spec.dtype, "shape": list(spec.shape)}
        for space, encoding in et.Plan.from_dict(plan).encodings.items()
        for name, spec in encoding.arrays().items()
    ]
    described = {
        name: {"file": "tables.safetensors", "dtype": dtype, "shape": shape}
        for name, (dtype, shape) in tensor_specs(plan, arrays).items()
    }
    about = {name: entry for name, entry in about.items() if name not in ("files", "sha256")}
    (tmp_path / "small" / "config.json").unlink()
    write_signed(tmp_path / "small", {**about, "plan": plan, "arrays": arrays, "tensors": described})
    assert read_config(tmp_path / "small")["plan"] == plan
