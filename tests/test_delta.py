"""Deltas: a bundle and what changed since are the later bundle, or are refused."""

import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from laws import CASES, FEATURES, Case, adapted
from test_reader import mutated, put, sign

import embtab as et
from embtab import cli
from embtab.bundle.delta_writer import save_delta
from embtab.errors import UserError
from embtab.reader import Bundle, BundleError, golden
from embtab.reader.manifest import CONFIG

PLAN = et.plan([et.Feature("item", 90), et.Feature("user", 400)], {"item": "dense", "*": "unified"}, "0.6x", dim=4)


def changed(tables: et.EmbeddingBagCollection, table: str, row: int) -> et.EmbeddingBagCollection:
    tables.lookup.table(table)[row] += 1
    return tables


def same_rows(one: Bundle, other: Bundle) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        np.testing.assert_array_equal(one.tensors[name], tensor)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_base_and_delta_are_the_later_bundle(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tables = adapted(et.EmbeddingBagCollection(case.plan(), backend="torch", init_std=1.0))
    et.save(tables, tmp_path / "base", precision="int8")
    for name in list(tables.plan.tables)[:2]:
        tables.lookup.table(name)[0] += 1
    for array in tables.arrays.parameters():
        array.data[0] += 0.5
    et.save(tables, tmp_path / "whole", precision="int8")
    counts = save_delta(tables, tmp_path / "delta", [tmp_path / "base"])
    assert 1 <= max(counts.values()) <= 2
    opened = Bundle(tmp_path / "base", deltas=[tmp_path / "delta"])
    same_rows(opened, Bundle(tmp_path / "whole"))
    found = golden.differences(opened, golden.reader_answers(opened))
    assert list(found) == [feature.name for feature in FEATURES]
    assert all(fine for _, fine in found.values())


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A bundle and two deltas on top of it; and the bundle of the end."""
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(PLAN, backend="torch", init_std=1.0)
    et.save(tables, tmp_path / "base")
    assert save_delta(changed(tables, "item", 5), tmp_path / "one", [tmp_path / "base"]) == {"rows.item": 1}
    changed(tables, "@unified2", 7)
    counts = save_delta(changed(tables, "item", 6), tmp_path / "two", [tmp_path / "base", tmp_path / "one"])
    assert counts == {"rows.@unified2": 1, "rows.item": 1}
    et.save(tables, tmp_path / "end")
    return tmp_path


def test_a_chain_is_applied_in_its_order_and_no_other(chain: Path) -> None:
    base, one, two = (chain / name for name in ("base", "one", "two"))
    before = (base / "tables.safetensors").read_bytes()
    same_rows(Bundle(base, deltas=[one, two]), Bundle(chain / "end"))
    loaded, end = et.load(base, deltas=[one, two]), et.load(chain / "end")
    for name, tensor in end.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert (base / "tables.safetensors").read_bytes() == before
    for wrong in ([two], [two, one], [one, one], [one, two, one]):
        with pytest.raises(BundleError, match="made for"):
            Bundle(base, deltas=wrong)
    with pytest.raises(BundleError, match="made for"):
        Bundle(chain / "end", deltas=[one])
    with pytest.raises(BundleError, match="not the description of a delta"):
        Bundle(base, deltas=[base])
    with pytest.raises(BundleError, match="not the description of a bundle"):
        Bundle(one)


def test_what_a_delta_cannot_say_is_refused(chain: Path) -> None:
    other = et.plan([et.Feature("item", 90), et.Feature("user", 400)], "hash", "0.3x", dim=4)
    with pytest.raises(UserError, match="its plan is not that"):
        save_delta(et.EmbeddingBagCollection(other, backend="torch"), chain / "new", [chain / "base"])
    with pytest.raises(UserError, match="nothing changed"):
        save_delta(et.load(chain / "base"), chain / "new", [chain / "base"])
    assert {path.name for path in chain.iterdir()} == {"base", "one", "two", "end"}


def test_signed_nonsense_is_refused(chain: Path) -> None:
    for edit, match in (
        (put(2, "version"), "version 2"),
        (put(7, "base"), "base must be"),
        (put("0" * 64, "base"), "made for"),
        (put(2**62, "changed", "rows.item"), "is not one of the base's"),
        (put(0, "changed", "rows.item"), "0 changed rows"),
        (put(1, "changed", "rows.other"), "does not hold"),
        (put(1e999, "golden", "absolute"), "JSON|golden"),
    ):
        shutil.copytree(chain / "one", chain / "new")
        sign(chain / "new", edit)
        with pytest.raises(BundleError, match=match):
            Bundle(chain / "base", deltas=[chain / "new"])
        shutil.rmtree(chain / "new")


def test_commands_write_and_verify_deltas(chain: Path, capsys: pytest.CaptureFixture) -> None:
    from embtab.training.checkpoint import description

    tables = changed(et.load(chain / "end"), "item", 3)
    state = {f"tables.{name}": value for name, value in tables.state_dict().items()}
    torch.save({"state_dict": state, "embtab": description(PLAN, {}), "epoch": 0}, chain / "c.ckpt")
    since = [f"--since={chain / name}" for name in ("base", "one", "two")]
    cli.main(["export", str(chain / "c.ckpt"), str(chain / "three"), *since])
    assert "rows.item" in capsys.readouterr().out
    deltas = [f"--delta={chain / name}" for name in ("one", "two", "three")]
    cli.main(["verify", str(chain / "base"), *deltas])
    assert "within tolerance" in capsys.readouterr().out
    for arguments in (["verify", str(chain / "base"), *deltas[1:]], ["export", str(chain / "end"), "x", *since]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert capsys.readouterr().err.count("\n") == 1


def fuzz(chain: Path, rounds: int) -> None:
    chance, path = Random(0), chain / "two"
    names = sorted(file.name for file in path.iterdir())
    for _ in range(rounds):
        name = chance.choice([*names, CONFIG])
        content = (path / name).read_bytes()
        damaged = mutated(content, chance)
        (path / name).write_bytes(damaged)
        if damaged != content:
            with pytest.raises(BundleError) as caught:
                Bundle(chain / "base", deltas=[chain / "one", path])
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
        if name != CONFIG:  # and signed anew: refused or read, never another error
            text = (path / CONFIG).read_bytes()
            sign(path)
            try:
                opened = Bundle(chain / "base", deltas=[chain / "one", path])
                golden.differences(opened, golden.reader_answers(opened))
            except BundleError as error:
                assert "\n" not in str(error)
            (path / CONFIG).write_bytes(text)
        (path / name).write_bytes(content)


def test_damage_is_refused(chain: Path) -> None:
    fuzz(chain, 200)


@pytest.mark.slow
def test_much_damage_is_refused(chain: Path) -> None:
    fuzz(chain, 3000)
