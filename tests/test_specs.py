"""How methods are written: names of features are data, and one form cannot be taken for another."""

import string
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import embtab as et
from embtab.cli import main
from embtab.datasets import table
from embtab.datasets.check import check
from embtab.errors import UserError
from embtab.planning.auto import choices
from embtab.planning.overview import outlooks
from embtab.planning.specs import by_feature, label
from embtab.reader import Bundle

NAMES = ["name", "*", "^c.*$", "a.b", "q\"uo'te", "ünï ☃", "with space", "features", "precision", "value", "count"]


def methods(plan: et.Plan) -> dict[str, str]:
    return {space: encoding.method for space, encoding in plan.encodings.items()}


def features(*names: str) -> list[et.Feature]:
    return [et.Feature(name, 200 + 10 * i) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ({"name": "dense", "*": "qr"}, {"name": "dense", "x": "qr"}),
        ({"name": "dense", "x": "qr"}, {"name": "dense", "x": "qr"}),
        ({"name": {"name": "qr", "op": "sum"}, "*": "hash"}, {"name": "qr", "x": "hash"}),
        ({"name": "qr"}, {"name": "qr", "x": "qr"}),
        ({"name": "qr", "op": "sum", "precision": "fp32"}, {"name": "qr", "x": "qr"}),
        ({"features": {"name": "hash", "x": "dense"}}, {"name": "hash", "x": "dense"}),
        ({"features": {"*": {"name": "qr", "op": "sum"}}}, {"name": "qr", "x": "qr"}),
    ],
)
def test_a_feature_called_name_has_a_method_of_its_own(method: dict, wanted: dict) -> None:
    assert methods(et.plan(features("name", "x"), method, "0.7x")) == wanted


def test_a_feature_called_features() -> None:
    two = features("features", "x")
    assert methods(et.plan(two, {"features": "dense", "x": "hash"}, "0.7x")) == {"features": "dense", "x": "hash"}
    inner = {"features": {"features": "dense", "*": "hash"}}
    assert methods(et.plan(two, inner, "0.7x")) == {"features": "dense", "x": "hash"}


def test_what_may_be_read_in_two_ways_is_refused() -> None:
    two = features("name", "op")
    with pytest.raises(UserError, match="is 'qr' with options, and a map of features as well; write the map as"):
        et.plan(two, {"name": "qr", "op": "hash"}, "0.5x")
    assert methods(et.plan(two, {"features": {"name": "qr", "op": "hash"}}, "0.5x")) == {"name": "qr", "op": "hash"}
    with pytest.raises(UserError, match="op must be one of"):
        et.plan(features("x"), {"name": "qr", "op": "hash"}, "0.5x")  # no feature is called so: no map


@pytest.mark.parametrize("method", [None, 3, ["qr"], {"name": ["qr"]}, {"name": 3}, {"*": None}, {"*": {"op": "sum"}}])
def test_what_is_no_method_is_refused_in_a_line(method: object) -> None:
    with pytest.raises(UserError, match="a method is a name, such as"):
        et.plan(features("x"), method, "0.5x")


def test_auto_may_be_given_a_precision_like_any_method() -> None:
    made = et.plan(features("x"), {"name": "auto", "precision": "int8"}, "0.5x")
    assert made.to_dict() == et.plan(features("x"), "auto", "0.5x", precision="int8").to_dict()
    with pytest.raises(UserError, match="'auto': unknown precision 'int3'"):
        et.plan(features("x"), {"name": "auto", "precision": "int3"}, "0.5x")


@given(st.lists(st.sampled_from(NAMES) | st.text(string.printable, min_size=1), min_size=1, max_size=4, unique=True))
def test_auto_plans_features_of_any_name(names: list[str]) -> None:
    named, plain = features(*names), features(*(f"f{i}" for i in range(len(names))))
    for budget in (None, "0.4x", "0.05x"):
        assert all(by_feature({"features": choice}) is choice for choice in choices(named, 5_000, 16))
        got, wanted = et.plan(named, "auto", budget), et.plan(plain, "auto", budget)
        assert sorted(methods(got).values()) == sorted(methods(wanted).values())
        assert got.nbytes == wanted.nbytes
    assert label({"features": dict.fromkeys(names, "qr")}) == " ".join(f"{name}:qr" for name in names)


def test_every_method_takes_features_of_any_name() -> None:
    named, plain = features(*NAMES, "a/b", "{x}", "%s", "back\\slash"), features(*"abcdefghijklmno")
    for one, other in zip(outlooks(named, "0.3x"), outlooks(plain, "0.3x"), strict=True):
        assert (one.plan is None) == (other.plan is None), (one, other)
        assert one.plan is None or abs(one.plan.nbytes - other.plan.nbytes) < 0.02 * one.plan.nbytes


def test_columns_of_any_name_from_a_file_to_a_bundle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense, columns = ["^d$", "dense.*"], [*NAMES, "c1"]
    values = rng.integers(0, 6, (400, len(columns)))
    values[:4] = rng.integers(0, 6, len(columns))  # so that each of these occurs more than once
    lines = [
        f"{rng.integers(2)},{i},{-i},u{i % 7}," + ",".join(f"v{value}" for value in row) for i, row in enumerate(values)
    ]
    header = ",".join('"' + name.replace('"', '""') + '"' for name in ["^y$", *dense, "^who$", *columns])
    (tmp_path / "rows.csv").write_text("\n".join([header, *lines, ""]))
    roles = {"label": "^y$", "dense": {name: {"transform": "none"} for name in dense}, "user": "^who$"}
    roles |= {
        "categorical": dict.fromkeys(columns),
        "split": {"by": "order", "valid": 0.1, "test": 0.1},
        "min_count": 1,
    }
    (tmp_path / "roles.yaml").write_text(yaml.safe_dump(roles, sort_keys=False))
    dataset = table.prepare([tmp_path / "rows.csv"], tmp_path / "out[1]*", roles=tmp_path / "roles.yaml")
    assert [feature.name for feature in dataset.features] == columns
    assert not check(tmp_path / "out[1]*")
    for feature, column in zip(et.read_features(tmp_path / "out[1]*"), values[:320].T, strict=True):
        counts = sorted(np.unique(column, return_counts=True)[1], reverse=True)
        assert feature.counts is not None
        assert feature.counts.tolist() == [0, *counts]
    tables = et.EmbeddingBagCollection(et.plan(et.read_features(tmp_path / "out[1]*"), "auto", "0.3x"))
    et.save(tables, tmp_path / "bundle")
    main(["verify", str(tmp_path / "bundle")])
    assert list(Bundle(tmp_path / "bundle").features) == columns


def test_a_program_has_inputs_of_any_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    tables = et.EmbeddingBagCollection(et.plan(features("q\"uo'te", "*"), "hash", "0.3x", dim=4))
    et.save(tables, tmp_path / "bundle")
    main(["export", str(tmp_path / "bundle"), str(tmp_path / "program"), "--format", "onnx"])
    main(["verify", str(tmp_path / "program"), "--run"])
