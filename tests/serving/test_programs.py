"""Exported programs: ONNX and AOTInductor packages give the model's outputs, or are refused in one line."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzzing.structure import reseal
from laws import CASES, Case
from safetensors.numpy import load_file, save_file
from serving.clean import assert_clean
from serving.test_tables import bundle, largest
from test_reader import mutated, put, sign, walk, write_signed
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab import cli
from embtab.datasets.reader import Batch
from embtab.errors import UserError
from embtab.models.autoint import AutoInt
from embtab.models.dare import DARE
from embtab.models.din import DIN
from embtab.models.events import ranks
from embtab.reader import Bundle, BundleError
from embtab.serving import exported
from embtab.serving.program import Program
from embtab.serving.ranker import Ranker
from embtab.serving.tables import ServedTables
from embtab.training.checkpoint import description
from embtab.training.sequence_task import SequenceTask

pytest.importorskip("onnxruntime")


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def agrees(case: Case, path: Path, precision: str, rows: int) -> None:
    """Bags, weights and extreme ids of a case's tables under ONNX Runtime against the NumPy reader."""
    opened = bundle(case, path / "bundle", precision)
    module = ServedTables(opened, weighted=True)
    exported.export(module, opened, path / "program", "onnx")
    program = Program(path / "program")
    given = exported.made_inputs(module, rows, np.random.default_rng(1))
    assert largest(program.run(given), exported.outputs_of(module, opened, given)) < 1e-6
    assert program.difference()[1]
    assert_clean(path / "program" / "model.onnx")


def test_onnx_gives_the_readers_vectors(tmp_path: Path) -> None:
    agrees(case_named("mixed"), tmp_path, "int8", 3000)


@pytest.mark.slow
@pytest.mark.timeout(900)  # csr is a long program
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_onnx_gives_the_readers_vectors_for_every_method_on_1e5_ids(case: Case, precision: str, tmp_path: Path) -> None:
    agrees(case, tmp_path, precision, 40_000)  # 2.5 ids a bag


def test_rows_found_by_a_bitmap_are_the_readers_in_onnx(tmp_path: Path) -> None:
    """Shifts by a tensor, of words whose highest bit is set too."""
    counts = np.random.default_rng(0).permutation(np.arange(1, 701))
    method = {"name": "pruned", "width": 3}
    plan = et.plan([et.Feature("x", 700, counts=counts)], method, "0.3x", dim=4)
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    assert (opened.tables["x.bits"] < 0).any()
    exported.export(ServedTables(opened, single=["x"]), opened, tmp_path / "p", "onnx")
    found = Program(tmp_path / "p").run({"ids.x": np.arange(700)})["vectors.x"]
    np.testing.assert_array_equal(found, opened.vectors("x", np.arange(700)))


@pytest.mark.parametrize("method", ["hash", "unified", "qr", "mixed"])
def test_stacked_ids_take_one_cast_there_and_one_back(method: str, tmp_path: Path) -> None:
    """Hashes are computed unsigned from end to end; all extremes of int64 are among the ids."""
    import onnx

    opened = bundle(case_named("qr product" if method == "qr" else method), tmp_path / "b")
    module = ServedTables(opened, stacked=True)
    exported.export(module, opened, tmp_path / "p", "onnx")
    program = Program(tmp_path / "p")
    assert program.config["inputs"]["ids"]["features"] == list(opened.features)
    assert_clean(tmp_path / "p" / "model.onnx")
    given = exported.made_inputs(module, 3000, np.random.default_rng(1))
    for rows in (3000, 1):
        some = {"ids": given["ids"][:rows]}
        assert largest(program.run(some), exported.outputs_of(module, opened, some)) < 1e-6
    casts = [n for n in onnx.load(tmp_path / "p" / "model.onnx").graph.node if n.op_type == "Cast"]
    hashes = {"hash": 1, "unified": 1, "qr": 0}
    if method in hashes:
        assert len(casts) == 2 * hashes[method]


@pytest.mark.parametrize("values", [[-7, -6, -1, 0, 1, 5, 6, 7, 2**53 + 1, -(2**53) - 1]], ids=["signs"])
def test_whole_numbers_are_divided_downwards_in_onnx(values: list[int], tmp_path: Path) -> None:
    from embtab.serving import onnx

    class Divided(torch.nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"whole": inputs["x"] // torch.tensor([[3], [-3]]), "parts": inputs["x"].float() // 3.0}

        def inputs(self) -> list[str]:
            return ["x"]

        def outputs(self) -> list[str]:
            return ["whole", "parts"]

    x = torch.tensor(values)
    onnx.write(Divided(), {"x": x}, tmp_path / "m.onnx")  # type: ignore[arg-type]
    found = onnx.load(tmp_path / "m.onnx")({"x": x.numpy()})
    np.testing.assert_array_equal(found["whole"], x.numpy() // np.array([[3], [-3]]))
    np.testing.assert_array_equal(found["parts"], x.numpy().astype(np.float32) // np.float32(3))


def test_integer_division_is_exact_above_2_to_the_53(tmp_path: Path) -> None:
    n = 3 * 10**16 + 7
    plan = et.plan([et.Feature("x", n)], {"name": "partitions", "parts": 4, "op": "sum"}, "1MB", dim=4)
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    exported.export(ServedTables(opened, single=["x"]), opened, tmp_path / "p", "onnx")
    ids = np.random.default_rng(0).integers(0, n, 100_000)
    ids[:5] = (0, n - 1, 2**53 + 1, 2**53 - 1, 2**24 + 1)
    found = Program(tmp_path / "p").run({"ids.x": ids})["vectors.x"]
    np.testing.assert_array_equal(found, opened.vectors("x", ids))
    for wrong in (-1, n, 2**63 - 1):
        with pytest.raises(UserError, match=rf"feature 'x': id {wrong} is outside \[0, {n}\)"):
            Program(tmp_path / "p").run({"ids.x": np.array([3, wrong])})


def checkpoint(folder: Path, sequences: bool = False) -> Path:
    """What `embtab fit` leaves: a checkpoint and the run's configuration."""
    torch.manual_seed(0)
    features = [et.Feature("user", 300), et.Feature("item", 90, id_space="items")]
    if sequences:
        features.append(et.Feature("seen", 90, pooling="none", id_space="items"))
    plan = et.plan(features, {"user": "unified", "*": "qr"}, "0.5x", dim=8)
    kind: Any = et.EmbeddingCollection if sequences else et.EmbeddingBagCollection
    tables = kind(plan, backend="torch", init_std=1.0)
    settings: dict[str, Any] = {"hidden": [8]} if sequences else {"attention_dim": 8, "num_layers": 1, "dnn": [8]}
    model = DIN(2, 1, 1, 8, **settings) if sequences else AutoInt(2, 2, 8, **settings)
    state = {f"tables.{name}": value for name, value in tables.state_dict().items()}
    state |= {f"model.{name}": value for name, value in model.state_dict().items()}
    path = folder / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "embtab": description(plan, {"dense": ["a", "b"]}), "global_step": 1}, path)
    name = "embtab.models.din.DIN" if sequences else "embtab.models.autoint.AutoInt"
    config = {"model": {"model": {"class_path": name, "init_args": settings}}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def checkpoint_of_dare(
    folder: Path, top_k: int = 3
) -> tuple[Path, et.EmbeddingCollection, et.EmbeddingCollection, DARE]:
    """A checkpoint of a model that searches by narrower tables of its own."""
    torch.manual_seed(0)
    events = [
        et.Feature("item", 90, id_space="items"),
        et.Feature("at", 50, id_space="positions"),
        et.Feature("seen", 90, pooling="none", id_space="items"),
        et.Feature("seen_at", 50, pooling="none", id_space="positions"),
    ]
    plan = et.plan([et.Feature("user", 300), *events], {"user": "unified", "*": "hash"}, "0.5x", dim=8)
    narrow = et.plan(events, {"items": "qr", "*": "dense"}, "0.6x", dim=4)
    tables = et.EmbeddingCollection(plan, backend="torch", init_std=1.0)
    attention = et.EmbeddingCollection(narrow, backend="torch", init_std=1.0)
    settings: dict[str, Any] = {"hidden": [8], "top_k": 3}
    model = DARE(2, 1, 2, 8, **settings).eval()
    parts = {"tables": tables, "attention": attention, "model": model}
    state = {f"{part}.{name}": value for part, each in parts.items() for name, value in each.state_dict().items()}
    about = {"dense": ["a", "b"], "attention_plan": narrow.to_dict()}
    path = folder / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "embtab": description(plan, about), "global_step": 1}, path)
    config = {"model": {"model": {"class_path": "embtab.models.dare.DARE", "init_args": settings}}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return path, tables, attention, model


def test_a_model_with_attention_tables_of_its_own_becomes_onnx(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Against the task that trains it, which searches before it looks up."""
    source, tables, attention, model = checkpoint_of_dare(tmp_path)
    _, error, code = answered(capsys, "export", source, tmp_path / "out", "--format", "onnx")
    assert code == 0, error
    assert_clean(tmp_path / "out" / "model.onnx")
    program, task = Program(tmp_path / "out"), SequenceTask(tables, model, attention=attention).eval()
    random = np.random.default_rng(0)
    for rows in (2, 300):
        lengths = random.integers(0, 9, rows)
        lengths[:2] = (0, 8)
        given = {name: random.integers(0, 50, lengths.sum()) for name in ("seen", "seen_at")}
        given |= {name: random.integers(0, 50, rows) for name in ("item", "at", "user")}
        dense = random.standard_normal((rows, 2), np.float32)
        keys = ["user", "item", "at", "seen", "seen_at"]
        each = [np.ones(rows, int)] * 3 + [lengths] * 2
        values, counts = np.concatenate([given[key] for key in keys]), np.concatenate(each)
        kjt = KeyedJaggedTensor(keys, torch.from_numpy(values), lengths=torch.from_numpy(counts))
        with torch.no_grad():
            expected = task(Batch(torch.from_numpy(dense), kjt, torch.zeros(rows))).numpy()
        inputs = {f"ids.{name}": ids for name, ids in given.items()} | {"dense": dense}
        inputs |= {"offsets.user": np.arange(rows + 1), "offsets.seen": np.cumsum([0, *lengths])}
        np.testing.assert_allclose(program.run(inputs)["logits"], expected, atol=1e-5)


class Ranks(torch.nn.Module):
    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ranks": ranks(inputs["scores"], inputs["lengths"])}

    def inputs(self) -> list[str]:
        return ["scores", "lengths"]

    def outputs(self) -> list[str]:
        return ["ranks"]


def test_sorting_breaks_ties_by_place_in_onnx(tmp_path: Path) -> None:
    """The search of DARE rests on it, and an unstable sort would rarely be seen."""
    from embtab.serving import onnx

    generator = torch.Generator().manual_seed(0)
    given = {
        "scores": torch.randint(0, 5, (5000,), generator=generator).float(),
        "lengths": torch.tensor([0, 1, 4000, 999]),
    }
    onnx.write(Ranks(), given, tmp_path / "m.onnx")  # type: ignore[arg-type]
    found = onnx.load(tmp_path / "m.onnx")({name: tensor.numpy() for name, tensor in given.items()})
    np.testing.assert_array_equal(found["ranks"], ranks(**given))


def answered(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[str, str, int]:
    try:
        cli.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return captured.out, captured.err, code


@pytest.mark.parametrize("sequences", [False, True])
def test_a_whole_ranker_becomes_onnx(sequences: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = checkpoint(tmp_path, sequences), tmp_path / "out"
    _, error, code = answered(capsys, "export", source, out, "--format", "onnx", "--precision", "int8")
    assert code == 0, error
    text, error, code = answered(capsys, "verify", out, "--run")
    assert code == 0, error
    assert text.startswith("onnx: largest difference")
    program = Program(out)
    et.save(exported_tables(source), tmp_path / "b", precision="int8")
    opened = Bundle(tmp_path / "b")
    trained = exported_model(source)
    module = Ranker(opened, trained, 2)
    for rows in (2, 700):
        given = exported.made_inputs(module, rows, np.random.default_rng(rows))
        assert largest(program.run(given), module.expected(opened, given)) < 1e-5
    described = program.config["inputs"]
    assert described["dense"] == {"dtype": "float32", "shape": ["batch", 2]}
    assert described["ids.item"]["shape"] == (["batch"] if sequences else ["ids of item"])
    assert (described["ids.item"]["below"], described["ids.user"]["below"]) == (90, None)
    assert_clean(out / "model.onnx")
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes() + b" ")
    _, error, code = answered(capsys, "verify", out, "--run")
    assert (code, error.count("\n")) == (2, 1)


def exported_tables(source: Path) -> Any:
    from embtab.training.checkpoint import load_tables

    return load_tables(source)


def exported_model(source: Path) -> torch.nn.Module:
    from embtab.serving.ranker import load_trained

    return load_trained(source).model


RUN = """
import json, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file

folder = Path(sys.argv[1])
config, golden = (json.loads((folder / "config.json").read_text()), load_file(folder / "golden.safetensors"))
program = torch._inductor.aoti_load_package(str(folder / config["program"]))
found = program({name: golden[name] for name in config["inputs"]})
assert "embtab" not in sys.modules
given = {name: golden[name] for name in config["inputs"]}
if "dense" in given:
    wrong = [{"dense": given["dense"].double()}, {"dense": given["dense"][:, :1].contiguous()}]
    wrong += [{name: each[: "offsets" in name] for name, each in given.items()}]  # no rows
    for changed, reason in zip(wrong, ["unmatched dtype", "unmatched dim value", "a batch of no rows"], strict=True):
        try:
            program(given | changed)
        except RuntimeError as error:
            assert reason in str(error), error
        else:
            raise AssertionError(reason)
for name in config["outputs"]:
    print(float((found[name] - golden[name]).abs().max()))
"""


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_whole_ranker_takes_stacked_ids(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = checkpoint(tmp_path), tmp_path / "out"
    given = ("export", source, out, "--format", "onnx", "--precision", precision, "--stacked")
    _, error, code = answered(capsys, *given)
    assert code == 0, error
    et.save(exported_tables(source), tmp_path / "b", precision=precision)
    opened, program = Bundle(tmp_path / "b"), Program(out)
    module = Ranker(opened, exported_model(source), 2, stacked=True)
    assert module.inputs() == list(program.config["inputs"]) == ["dense", "ids"]
    assert_clean(out / "model.onnx")
    for rows in (1, 2, 700):
        inputs = exported.made_inputs(module, 700, np.random.default_rng(rows))
        inputs = {name: array[:rows] for name, array in inputs.items()}
        apart = {f"ids.{name}": inputs["ids"][:, k] for k, name in enumerate(opened.features)}
        expected = Ranker(opened, module.model, 2, single=opened.features).expected(opened, inputs | apart)
        assert largest(program.run(inputs), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ids", None, "input 'ids' is missing; the program takes dense, ids"),
        ("ids", np.zeros((4, 2), np.int32), r"input 'ids' must be int64 \[batch, 2\], and is int32 \[4, 2\]"),
        ("ids", np.zeros((4, 3), np.int64), r"input 'ids' must be int64 \[batch, 2\], and is \[4, 3\]"),
        ("ids", np.zeros(8, np.int64), r"'ids' must be int64 \[batch, 2\], and is int64 \[8\]"),
        ("ids", np.zeros((3, 2), np.int64), r"and is \[3, 2\]: batch is 4 by input 'dense'"),
        ("dense", np.zeros((4, 2)), r"input 'dense' must be float32 \[batch, 2\], and is float64 \[4, 2\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    name: str, wrong: np.ndarray | None, message: str, stacked_ranker: Path
) -> None:
    given = {"dense": np.zeros((4, 2), np.float32), "ids": np.zeros((4, 2), np.int64)}
    given = {key: array for key, array in (given | {name: wrong}).items() if array is not None}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=message):
        Program(stacked_ranker).run(given)


def test_an_id_that_a_runtime_refuses_is_named(stacked_ranker: Path) -> None:
    program = Program(stacked_ranker)
    assert program.config["inputs"]["ids"]["below"] == [None, 90]  # unified takes any int64, qr its own
    given = {"dense": np.zeros((2, 2), np.float32), "ids": np.array([[2**60, 89], [-5, 0]])}
    assert program.run(given)["logits"].shape == (2,)
    for wrong in (90, -1):
        given["ids"][1, 1] = wrong
        with pytest.raises(UserError, match=rf"feature 'item': id {wrong} is outside \[0, 90\)"):
            program.run(given)


def test_offsets_are_one_more_than_rows(original: Path) -> None:
    with pytest.raises(UserError, match=r"'offsets.user' must be int64 \[batch \+ 1\]"):
        Program(original).run({"ids.user": np.arange(3), "offsets.user": np.arange(4.0)})
    found = Program(original).run({"ids.user": np.arange(3), "offsets.user": np.arange(4)})
    assert found["vectors.user"].shape == (3, 4)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [0, 1, 2, 2], [0, 1, 2, 4], [1, 1, 2, 3], [0, -1, 2, 3], []])
def test_offsets_that_are_not_those_of_bags_are_refused(original: Path, offsets: list[int]) -> None:
    """As the reader refuses them: runtimes answer, or read past the end."""
    with pytest.raises(UserError, match=r"input 'offsets.user' must rise from 0 to the 3 ids of feature 'user'"):
        Program(original).run({"ids.user": np.arange(3), "offsets.user": np.array(offsets, np.int64)})


@pytest.fixture(scope="module")
def stacked_ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    cli.main(["export", str(checkpoint(folder)), str(folder / "p"), "--format", "onnx", "--stacked"])
    return folder / "p"


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler runs
@pytest.mark.parametrize("method", ["hash", "unified", "qr product", "mixed", "mixed_dim blocks", "tt"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_compiled_programs_take_stacked_ids(method: str, precision: str, tmp_path: Path) -> None:
    """A batch of one row too, which a compiler that saw three may have taken for something else."""
    opened = bundle(case_named(method), tmp_path / "b", precision)
    module = ServedTables(opened, stacked=True)
    exported.export(module, opened, tmp_path / "p", "aoti")
    given = exported.made_inputs(module, 1000, np.random.default_rng(1))
    for rows in (1000, 17, 1):
        some = {"ids": given["ids"][:rows]}
        found = Program(tmp_path / "p").run(some)
        assert largest(found, exported.outputs_of(module, opened, some)) < 1e-6
    below = Program(tmp_path / "p").config["inputs"]["ids"]["below"]
    for k, limit in enumerate(below):
        if limit is not None:
            wrong = given["ids"].copy()
            wrong[500, k] = limit
            with pytest.raises(UserError, match=rf"id {limit} is outside \[0, {limit}\)"):
                Program(tmp_path / "p").run({"ids": wrong})


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler runs
@pytest.mark.parametrize("what", ["tables", "features", "sequences", "dare"])
def test_a_compiled_program_runs_in_a_fresh_process_without_embtab(what: str, tmp_path: Path) -> None:
    if what == "tables":
        bundle(case_named("mixed"), tmp_path / "bundle", "int8")
        source = tmp_path / "bundle"
    else:
        source = checkpoint_of_dare(tmp_path)[0] if what == "dare" else checkpoint(tmp_path, what == "sequences")
    cli.main(["export", str(source), str(tmp_path / "out"), "--format", "aoti"])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 1e-5
    assert Program(tmp_path / "out").difference()[1]


@pytest.mark.slow
def test_weights_beyond_a_limit_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embtab.serving import onnx

    monkeypatch.setattr(onnx, "MAX_INSIDE", 1000)
    agrees(case_named("dense"), tmp_path, "fp32", 100)
    assert (tmp_path / "program" / "model.onnx.data").stat().st_size > 6000 * 16 * 4


def test_a_bundle_may_hold_its_tables_as_onnx(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "b"
    _, error, code = answered(capsys, "export", checkpoint(tmp_path), out, "--precision", "int4", "--onnx")
    assert code == 0, error
    text, error, code = answered(capsys, "verify", out, "--run")
    assert code == 0, error
    assert text.split()[:6] == ["feature", "reader", "torch", "fbgemm", "quantised", "onnx"]
    assert_clean(out / Bundle(out).config["programs"]["onnx"])
    text, error, code = answered(capsys, "verify", out)
    assert (error, code) == ("", 0)
    assert "was not run: a program is code; add --run" in text
    assert " onnx" not in text.splitlines()[1]
    sign(out, put("gone.onnx", "programs", "onnx"))
    _, error, code = answered(capsys, "verify", out, "--run")
    assert (code, "'gone.onnx' is not listed" in error) == (2, True)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = checkpoint(tmp_path)
    config = tmp_path / "run" / "config.yaml"
    other = {"model": {"model": {"class_path": "embtab.models.autoint.AutoInt", "init_args": {"dnn": [9]}}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "wrong.yaml").write_text("model: {model: {class_path: torch.nn.Tanh}}")
    (tmp_path / "kind.yaml").write_text("model: {model: {class_path: torch.Size}}")
    (tmp_path / "foreign.yaml").write_text("model: {model: {class_path: pathlib.Path}}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    for more, match in (
        (["--config", tmp_path / "none.yaml"], "no such file"),
        (["--config", tmp_path / "other.yaml"], "not of the configured model"),
        (["--config", tmp_path / "wrong.yaml"], "its model cannot be made"),
        (["--config", tmp_path / "kind.yaml"], "torch.Size would be imported"),
        (["--config", tmp_path / "foreign.yaml"], "pathlib.Path would be imported"),
        (["--single", "nobody"], "no feature 'nobody'"),
        (["--single", "user", "--stacked"], "--single has no meaning beside --stacked"),
        (["--onnx"], "are of bundles"),
    ):
        _, error, code = answered(capsys, "export", source, tmp_path / "out", "--format", "onnx", *more)
        assert (code, error.count("\n")) == (2, 1), error
        assert match in error
        assert not (tmp_path / "out").exists()
    _, error, code = answered(capsys, "export", source, tmp_path / "full", "--format", "onnx")
    assert (code, "already exists" in error) == (2, True)
    config.unlink()
    _, error, code = answered(capsys, "export", source, tmp_path / "out", "--format", "onnx")
    assert (code, "--config" in error) == (2, True)


def test_a_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = et.plan([et.Feature("x", 9)], dim=4)
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), tmp_path / "b")
    opened = Bundle(tmp_path / "b")
    module = ServedTables(opened)
    true = exported.outputs_of(module, opened, exported.made_inputs(module, 16, np.random.default_rng(0)))
    false = {name: array + 0.001 for name, array in true.items()}
    monkeypatch.setattr(exported, "outputs_of", lambda *_: false)
    with pytest.raises(UserError, match="differs from the model"):
        exported.export(module, opened, tmp_path / "p", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    plan = et.plan([et.Feature("user", 300)], "hash", "0.5x", dim=4)
    et.save(et.EmbeddingBagCollection(plan, backend="torch", init_std=1.0), folder / "b")
    opened = Bundle(folder / "b")
    exported.export(ServedTables(opened), opened, folder / "p", "onnx")
    return folder / "p"


def fuzz(original: Path, path: Path, rounds: int) -> None:
    shutil.copytree(original, path)
    chance, names = Random(0), sorted(file.name for file in original.iterdir())
    for _ in range(rounds):
        name = chance.choice([*names, "config.json"])
        content = (original / name).read_bytes()
        damaged = mutated(content, chance)
        (path / name).write_bytes(damaged)
        if damaged != content:
            with pytest.raises(BundleError, match="p/") as caught:
                Program(path)
            assert "\n" not in str(caught.value)
        (path / name).write_bytes(content)


def test_verify_runs_no_program_unless_asked(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A compiled program is loaded as a library is, and so runs: here one that leaves a trace."""
    out, trace = tmp_path / "program", tmp_path / "ran"
    shutil.copytree(original, out)
    source = tmp_path / "trap.cpp"
    source.write_text(
        f'#include <cstdio>\nstatic int ran = [] {{ return std::fclose(std::fopen("{trace}", "w")); }}();'
    )
    (out / "model.onnx").unlink()
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "trap.so")], check=True)
    with zipfile.ZipFile(out / "model.pt2", "w") as package:
        package.write(tmp_path / "trap.so", "model/data/aotinductor/model/trap.wrapper.so")
        package.writestr("model/archive_format", "pt2")
        package.writestr("model/version", "0")
        package.writestr("model/data/aotinductor/model/trap.wrapper_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')

    def compiled(config: dict[str, Any]) -> None:
        config |= {"kind": "aoti", "program": "model.pt2"}

    reseal(out, compiled)
    text, error, code = answered(capsys, "verify", out)
    assert (error, code) == ("", 0)
    assert "all files are whole; the aoti program was not run: a program is code; add --run if you trust" in text
    assert not trace.exists()
    golden_file = dict(load_file(out / "golden.safetensors"))
    save_file({name: tensor[:-1] for name, tensor in golden_file.items()}, out / "golden.safetensors")
    reseal(out, lambda config: None)
    _, error, code = answered(capsys, "verify", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "golden tensors: input" in error
    assert not trace.exists()
    _, error, code = answered(capsys, "verify", out, "--run")
    assert (code, error.count("\n")) == (2, 1)
    assert trace.exists(), error  # the trap is one


def fuzz_signed(original: Path, path: Path, rounds: int) -> None:
    """Edits that are signed anew, of the description and of the ONNX file: refused, found by verify, or harmless."""
    chance = Random(1)
    values = [None, True, -1, 0, 2**62, 1.5, "", "../x", "aoti", [], {}, "x" * 500]
    text, onnx = (original / "config.json").read_text(), (original / "model.onnx").read_bytes()
    for _ in range(rounds):
        if chance.random() < 0.5:
            (path / "model.onnx").write_bytes(mutated(onnx, chance))
            sign(path)
        else:
            config = json.loads(text)
            place = chance.choice(list(walk({key: value for key, value in config.items() if key != "sha256"})))
            put(chance.choice(values), *place)(config)
            write_signed(path / "config.json", json.dumps(config))
        try:
            Program(path).difference()
        except UserError as error:
            assert "\n" not in str(error)
        (path / "model.onnx").write_bytes(onnx)
        (path / "config.json").write_text(text)


def test_damage_is_refused(original: Path, tmp_path: Path) -> None:
    fuzz(original, tmp_path / "p", 200)
    fuzz_signed(original, tmp_path / "p", 100)


@pytest.mark.slow
def test_much_damage_is_refused(original: Path, tmp_path: Path) -> None:
    fuzz(original, tmp_path / "p", 2000)
    fuzz_signed(original, tmp_path / "p", 1000)
