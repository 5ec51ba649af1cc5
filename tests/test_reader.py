"""The reader: light, lazy, and not to be fooled."""

import copy
import gc
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab import golden, reader
from embtab.reader import Bundle
from embtab.signed import BundleError, config_digest, file_digest

FEATURES = [et.Feature("colour", 3), et.Feature("item", 90, pooling="mean"), et.Feature("user", 400)]
PLAN = et.plan(FEATURES, {"colour": "dense", "item": "qr", "*": "unified"}, "0.4x", dim=4, precision="int8")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reader") / "bundle"
    et.save(et.EmbeddingBagCollection(PLAN, backend="torch", init_std=1.0), path)
    return path


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def test_torch_is_never_imported(original: Path) -> None:
    code = (
        "import sys; from embtab.reader import Bundle; import numpy as np; b = Bundle(sys.argv[1]);"
        "b.lookup('user', np.arange(5), np.array([0, 5]));"
        "sys.exit(', '.join({'torch', 'torchrec', 'pyarrow', 'polars', 'lightning'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_lookups_pool_weight_and_refuse(original: Path) -> None:
    opened = Bundle(original)
    ids, weights = np.array([5, 5, 7, 2]), np.array([1, 2, 0.5, -1], np.float32)
    each = opened.vectors("item", ids)
    pooled = opened.lookup("item", ids, np.array([0, 3, 3, 4]), weights)
    np.testing.assert_allclose(pooled[0], (each[:3] * weights[:3, None]).sum(0) / 3, rtol=1e-6)
    np.testing.assert_array_equal(pooled[1], 0)
    np.testing.assert_array_equal(opened.lookup("item", ids), each)
    huge = np.array([2**64 - 1], np.uint64)
    np.testing.assert_array_equal(opened.vectors("user", huge), opened.vectors("user", np.array([-1])))
    assert opened.vectors("user", []).shape == (0, 4)
    with pytest.raises(IndexError, match=r"feature 'item': id 90 is outside \[0, 90\)"):
        opened.vectors("item", np.array([3, 90]))
    with pytest.raises(KeyError, match="there are colour, item, user"):
        opened.vectors("nothing", ids)
    for wrong in (np.array([0, 3]), np.array([1, 4]), np.array([0, 3, 2, 4]), np.array([0.0, 4.0]), np.array([], int)):
        with pytest.raises(ValueError, match="offsets"):
            opened.lookup("item", ids, wrong)
    with pytest.raises(ValueError, match="weights must have shape"):
        opened.lookup("item", ids, np.array([0, 4]), weights[:2])
    with pytest.raises(ValueError, match="ids must be one row of integers"):
        opened.vectors("item", np.array([0.5]))


MEASURE = """
import resource, sys, numpy as np
from embtab.reader import Bundle
bundle = Bundle(sys.argv[1], verify=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bundle.lookup("user", np.arange(0, 500_000, 5000), np.array([0, 50, 100]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


WRONG_OFFSETS = [[0, 2, 1, 3], [0, 1, 2, 2], [0, 1, 2, 4], [1, 1, 2, 3], [0, -1, 2, 3], [0.0, 3.0], [[0, 3]], []]


@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_offsets_that_are_not_those_of_bags_are_refused_by_both_lookups(original: Path, offsets: list) -> None:
    bundle, ids = Bundle(original), np.array([1, 0, 2])
    feature = next(entry["name"] for entry in bundle.plan["features"] if entry["pooling"] != "none")
    for answer in (bundle.lookup, partial(reader.lookup, bundle.plan, bundle.tables)):
        assert answer(feature, ids, np.array([0, 0, 3])).shape == (2, bundle.plan["dim"])
        with pytest.raises(ValueError, match="offsets must"):
            answer(feature, ids, np.array(offsets))
        with pytest.raises(ValueError, match=r"weights must have shape \(3,\), one per id; got \(2,\)"):
            answer(feature, ids, np.array([0, 3]), np.ones(2, np.float32))


@pytest.mark.parametrize(("method", "precision"), [("dense", "fp32"), ("dense", "int4"), ("robe", "int8")])
def test_only_the_rows_that_are_read_are_decoded(method: str, precision: str, tmp_path: Path) -> None:
    """A table of 32 MB as float32 grows the process by far less."""
    plan = et.plan([et.Feature("user", 1_000_000)], method, "0.5x", dim=16) if method != "dense" else None
    plan = plan or et.plan([et.Feature("user", 500_000)], dim=16)
    et.save(et.EmbeddingBagCollection(plan, backend="torch"), tmp_path / "b", precision=precision)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "b")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8_000  # kB


def refused(path: Path, match: str, verify: bool = True) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle(path, verify)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_extra_renamed_and_shortened_files_are_refused(bundle: Path, verify: bool) -> None:
    tables = bundle / "tables.safetensors"
    whole = tables.read_bytes()
    (bundle / "more.txt").write_text("")
    refused(bundle, "more.txt: not part of the bundle", verify)
    (bundle / "more.txt").unlink()
    for size in (0, 7, 100, len(whole) - 1):
        tables.write_bytes(whole[:size])
        refused(bundle, f"{size} bytes where {len(whole)} were written", verify)
    tables.write_bytes(whole + b"\0")
    refused(bundle, "were written", verify)
    tables.unlink()
    refused(bundle, r"tables\.safetensors: missing", verify)
    (bundle / "other").write_bytes(whole)
    tables.symlink_to("other")
    refused(bundle, "other: not part of the bundle", verify)
    tables.unlink()
    (bundle / "other").unlink()
    tables.write_bytes(whole)
    (bundle / "config.json").rename(bundle / "config.jsn")
    refused(bundle, "not a bundle", verify)
    refused(bundle / "nowhere", "not a bundle", verify)


def test_files_that_changed_places_are_refused(bundle: Path) -> None:
    one, two = bundle / "tables.safetensors", bundle / "golden.safetensors"
    os.rename(one, bundle / "x")
    os.rename(two, one)
    os.rename(bundle / "x", two)
    refused(bundle, "were written")


Edit = Callable[[dict[str, Any]], Any]


def sign(bundle: Path, edit: Edit = lambda config: None) -> None:
    """Edits config.json and makes all digests right again, as someone would who means it."""
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    for name in config["files"]:
        if (bundle / name).exists():
            config["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": file_digest(bundle / name)}
    edit(config)
    write_signed(path, json.dumps(config))


def write_signed(path: Path, text: str) -> None:
    old = json.loads(text)["sha256"]
    zeros = "0" * 64
    text = text.replace(old, zeros) if isinstance(old, str) and len(old) == 64 else text
    path.write_text(text.replace(zeros, config_digest(text.encode(), zeros)))


def put(value: Any, *keys: Any) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return edit


def moved(old: str, new: str) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        config["files"][new] = config["files"].pop(old)
        for entry in config["tensors"].values():
            entry["file"] = new if entry["file"] == old else entry["file"]

    return edit


HOSTILE: dict[str, tuple[Edit, str]] = {
    "a newer version": (put(2, "version"), "version 2; this embtab reads version 1"),
    "no version": (put(None, "version"), "version None"),
    "another format": (put("zip", "format"), "not the description"),
    "a file outside": (moved("tables.safetensors", "../tables.safetensors"), "file name '../tables.safetensors'"),
    "an absolute file": (moved("tables.safetensors", "/etc/passwd"), "file name '/etc/passwd'"),
    "a hidden file": (moved("tables.safetensors", ".tables"), "file name '.tables'"),
    "2^62 rows": (put(2**62, "plan", "tables", 0, "num_rows"), "tensors do not agree"),
    "2^63 rows": (put(2**63, "plan", "tables", 0, "num_rows"), "shape"),
    "2^30 rows": (put(2**30, "plan", "tables", 0, "num_rows"), "tensors do not agree"),
    "negative rows": (put(-1, "plan", "tables", 0, "num_rows"), "shape"),
    "rows as text": (put("3", "plan", "tables", 0, "num_rows"), "shape"),
    "rows as a truth": (put(True, "plan", "tables", 0, "num_rows"), "shape"),
    "another width": (put(8, "plan", "tables", 0, "width"), "tensors do not agree"),
    "another precision": (put("fp32", "plan", "tables", 0, "precision"), "tensors"),
    "an unknown precision": (put("fp8", "plan", "tables", 0, "precision"), "precision 'fp8'"),
    "a table twice": (lambda c: c["plan"]["tables"].append(c["plan"]["tables"][0]), "two tables have one name"),
    "no tables": (lambda c: c["plan"].pop("tables"), "no entry 'tables'"),
    "tables as a number": (put(3, "plan", "tables"), "tables must be a list"),
    "a plan as a list": (put([], "plan"), "indices must be"),
    "another dim": (put(8, "plan", "dim"), "dim 4, not 8"),
    "an unknown table": (put(["gone"], "plan", "encodings", "user", "tables"), "reads a table 'gone'"),
    "no encoding": (lambda c: c["plan"]["encodings"].pop("user"), "no encoding"),
    "fewer ids": (put(50, "plan", "features", 1, "num_ids"), "num_ids is not its encoding's"),
    "an unknown pooling": (put("max", "plan", "features", 1, "pooling"), "pooling 'max'"),
    "a feature twice": (put("colour", "plan", "features", 1, "name"), "stands twice"),
    "a tensor elsewhere": (
        put("golden.safetensors", "tensors", "rows.colour", "file"),
        "should not be here|is missing",
    ),
    "an unlisted file": (put("x.safetensors", "tensors", "rows.colour", "file"), "not listed"),
    "no golden file": (put("x", "golden", "file"), "golden names a file"),
    "a tolerance that allows all": (put(1e999, "golden", "absolute"), "no JSON number|damaged"),
    "a missing size": (lambda c: c["files"]["README.md"].pop("bytes"), "no entry 'bytes'"),
    "a lying size": (put(1, "files", "README.md", "bytes"), "bytes where 1 were written"),
    "a lying digest": (put("0" * 63 + "1", "files", "README.md", "sha256"), "sha256 does not match"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_cannot_be_is_refused(name: str, bundle: Path) -> None:
    edit, match = HOSTILE[name]
    sign(bundle)
    Bundle(bundle)  # signing alone changes nothing
    sign(bundle, edit)
    refused(bundle, match)


def test_keys_that_stand_twice_are_refused(bundle: Path) -> None:
    path = bundle / "config.json"
    write_signed(path, path.read_text().replace('"version": 1,', '"version": 1, "version": 1,', 1))
    refused(bundle, "a key stands twice")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "2^62 rows": lambda h: h["rows.colour"].update(shape=[2**62, 4]),
    "2^62 rows and bytes": lambda h: h["rows.colour"].update(shape=[2**62, 4], data_offsets=[0, 2**64]),
    "another shape": lambda h: h["rows.colour"].update(shape=[4, 3]),
    "another type": lambda h: h["rows.colour"].update(dtype="I8"),
    "an unknown type": lambda h: h["rows.colour"].update(dtype="C64"),
    "a renamed tensor": lambda h: h.update(other=h.pop("rows.colour")),
    "negative places": lambda h: h["rows.colour"].update(data_offsets=[-12, 0]),
    "overlapping places": lambda h: h["scales.colour"].update(data_offsets=h["offsets.colour"]["data_offsets"]),
    "three places": lambda h: h["rows.colour"].update(data_offsets=[0, 6, 12]),
    "text for places": lambda h: h["rows.colour"].update(data_offsets=["0", "12"]),
    "no shape": lambda h: h["rows.colour"].pop("shape"),
    "a number for a tensor": lambda h: h.update({"rows.colour": 3}),
    "a list for a type": lambda h: h["rows.colour"].update(dtype=["U8"]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_is_refused(name: str, bundle: Path) -> None:
    path = bundle / "tables.safetensors"
    header, data = header_of(path)
    HEADERS[name](header)
    with_header(path, header, data)
    sign(bundle)
    refused(bundle, r"tables\.safetensors: ")


def test_a_header_longer_than_its_file_is_refused(bundle: Path) -> None:
    path = bundle / "tables.safetensors"
    content = path.read_bytes()
    for length in (len(content), 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        sign(bundle)
        refused(bundle, "header is longer")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, bundle: Path) -> None:
    path = bundle / "tables.safetensors"
    header, data = header_of(path)
    first = header["scales.colour"]["data_offsets"][0] + 2
    with_header(path, header, data[:first] + np.float16(value).tobytes() + data[first + 2 :])
    sign(bundle)
    refused(bundle, r"scales\.colour holds NaN or infinity in row 1")


def test_an_altered_number_of_a_method_is_seen_by_the_golden_vectors(bundle: Path) -> None:
    """Whoever signs an edit anew cannot be found out by digests; `embtab verify` still does."""
    for edit in (put([1, 2], "plan", "encodings", "user", "seeds"), put(7, "plan", "encodings", "item", "collisions")):
        sign(bundle, edit)
        opened = Bundle(bundle)
        try:
            assert not all(fine for _, fine in golden.differences(opened, golden.reader_answers(opened)).values())
        except BundleError as error:
            assert "cannot be decoded" in str(error)


@pytest.mark.parametrize(
    ("key", "value"), [("num_rows", 10**12), ("seeds", "x"), ("seeds", [1]), ("seeds", None), ("method", "magic")]
)
def test_numbers_that_no_decoder_can_use_give_one_line(key: str, value: Any, bundle: Path) -> None:
    sign(bundle, put(value, "plan", "encodings", "user", key))
    with pytest.raises(BundleError, match="feature 'user'"):
        Bundle(bundle).vectors("user", np.arange(50))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One damage: bytes flipped, cut out, doubled, zeroed, or the end lost."""
    at = chance.randrange(len(content))
    size = chance.choice([1, 1, 1, 2, 8, 64])
    part = content[at : at + size]
    damage = chance.choice(["flip", "drop", "double", "zero", "cut", "noise"])
    if damage == "flip":
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    new = {"drop": b"", "double": part * 2, "zero": bytes(len(part)), "noise": chance.randbytes(len(part))}
    return content[:at] if damage == "cut" else content[:at] + new[damage] + content[at + size :]


def fuzz(original: Path, bundle: Path, rounds: int) -> None:
    chance = random.Random(0)
    names = sorted(path.name for path in original.iterdir())
    expected = Bundle(original).vectors("user", np.arange(400))
    for _ in range(rounds):
        name = chance.choice([*names, "config.json"])
        content = (original / name).read_bytes()
        damaged = mutated(content, chance)
        (bundle / name).write_bytes(damaged)
        if damaged == content:
            np.testing.assert_array_equal(Bundle(bundle).vectors("user", np.arange(400)), expected)
        else:
            refused(bundle, ".")
        (bundle / name).write_bytes(content)


def fuzz_signed(original: Path, bundle: Path, rounds: int) -> None:
    """JSON values exchanged for others and signed anew: refused, or readable; never another error."""
    chance = random.Random(1)
    values = [None, True, -1, 0, 3, 2**31, 2**62, 2**70, 1.5, "", "user", "../x", [], {}, [[]], {"a": 1}, "x" * 500]
    text = (original / "config.json").read_text()
    for _ in range(rounds):
        config = json.loads(text)
        places = list(walk({key: value for key, value in config.items() if key != "sha256"}))
        path = chance.choice(places)
        put(copy.deepcopy(chance.choice(values)), *path)(config)
        write_signed(bundle / "config.json", json.dumps(config))
        try:
            opened = Bundle(bundle)
            for feature in opened.features:
                opened.lookup(feature, np.arange(3), np.array([0, 3]))
        except BundleError as error:
            assert "\n" not in str(error)
        except (IndexError, ValueError) as error:
            assert "outside [0," in str(error) or "not pooled" in str(error)
    (bundle / "config.json").write_text(text)


def walk(value: Any, path: tuple = ()) -> Any:
    """Every place in nested JSON."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from walk(inner, (*path, key))


def test_damage_is_refused(original: Path, bundle: Path) -> None:
    fuzz(original, bundle, 300)
    fuzz_signed(original, bundle, 200)


@pytest.mark.slow
def test_much_damage_is_refused(original: Path, bundle: Path) -> None:
    fuzz(original, bundle, 5000)
    fuzz_signed(original, bundle, 3000)


def test_the_digest_of_the_description_covers_every_byte(original: Path) -> None:
    text = (original / "config.json").read_bytes()
    digest = json.loads(text)["sha256"]
    assert hashlib.sha256(text.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_a_bundle_goes_when_nobody_has_it(original: Path, tmp_path: Path) -> None:
    tables = et.load(original)
    et.save(tables, tmp_path / "named", vocab={"colour": [None, "red", "blue"]})
    opened = Bundle(tmp_path / "named")
    assert opened.raw_ids("colour", ["blue", "red"]).tolist() == [2, 1]
    assert opened.raw_ids("colour", ["blue"]).tolist() == [2]
    known = weakref.ref(opened)
    del opened
    gc.collect()
    assert known() is None


class Unlisted(dict):
    """A dictionary that may be asked for single entries alone."""

    def __iter__(self):
        raise AssertionError("all entries were looked at")

    items = keys = values = __iter__


def test_a_lookup_looks_at_no_table_but_its_own(tmp_path: Path) -> None:
    plan = et.plan([et.Feature(name, 900) for name in "abc"], {"a": "cce", "b": "lowrank", "c": "dhe"}, "0.5x")
    tables = et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0).eval()
    et.save(tables, tmp_path / "bundle")
    opened = Bundle(tmp_path / "bundle")
    expected = {name: opened.vectors(name, np.arange(9)) for name in "abc"}
    opened.tables = Unlisted(opened.tables)
    tables.arrays.places = Unlisted(tables.arrays.places)
    batch = KeyedJaggedTensor(list("abc"), torch.arange(9).repeat(3), lengths=torch.ones(27).int())
    found = tables(batch).to_dict()
    for name in "abc":
        np.testing.assert_array_equal(opened.vectors(name, np.arange(9)), expected[name])
        np.testing.assert_allclose(found[name].detach().numpy(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [et.EmbeddingBagCollection, et.EmbeddingCollection])
def test_saving_asks_for_all_golden_vectors_together(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = [et.Feature(f"f{i}", 5 + 40 * i, pooling="mean") for i in range(20)]
    tables = kind(et.plan(features, "qr", "0.5x"), backend="torch", init_std=1.0)
    forward, batches = kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda self, batch: batches.append(batch) or forward(self, batch))
    et.save(tables, tmp_path / "bundle")
    assert len(batches) == (3 if kind is et.EmbeddingBagCollection else 1)
    tables.lookup.stack(16)[3, 2] += 0.1
    monkeypatch.setattr("embtab.bundle._write_tables", lambda tables, plan, folder, _: copied(tmp_path, folder))
    with pytest.raises(et.errors.UserError, match="feature 'f0': what was written does not give the vectors"):
        et.save(tables, tmp_path / "other")


def copied(tmp_path: Path, folder: Path) -> dict[str, str]:
    shutil.copyfile(tmp_path / "bundle" / "tables.safetensors", folder / "tables.safetensors")
    held = json.loads((tmp_path / "bundle" / "config.json").read_text())["tensors"]
    return {name: entry["file"] for name, entry in held.items()}
