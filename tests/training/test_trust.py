"""A configuration loads chosen kinds of classes of known packages, and of others only when the user has named them."""

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from embtab import cli
from embtab.errors import UserError
from embtab.serving.ranker import load_trained
from embtab.training.cli import FitCLI
from embtab.training.trust import allowed, held_to, imported

CONFIGS = [path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if "\ntrainer:" in path.read_text()]
EVIL = "class_path: evil_package.Model"
CALLBACK = "trainer: {callbacks: [{class_path: evil_package.Model}]}"
WORDS = ["--data.path", "x", "--model.model", "embtab.models.AutoInt"]


def at_start(runs: str) -> str:
    return (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: "
        f"{runs}}}}}]}}"
    )


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that leaves a trace when it is imported; no test's file may make it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_package.py").write_text(
        f"import pathlib, lightning\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n"
        "class Model(lightning.Callback): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "trace"
    sys.modules.pop("evil_package", None)


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that `embtab fit` ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.partition("embtab: error: ")[2].removesuffix("\n")
    assert said
    assert "\n" not in said
    return said


def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FitCLI, "instantiate_classes", lambda self: sys.exit(0))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_configurations_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed_only(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--config", str(path)])
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((CALLBACK, name) for name in ("config.YAML", "config.json", "config")),
        *(
            (text, "config.yaml")
            for text in (
                f"model: {{model: {{{EVIL}, init_args: {{}}}}}}",
                CALLBACK,
                "trainer: {callbacks: [evil_package.Model]}",
                "trainer: {callbacks: evil_package.Model}",
                "trainer: {logger: evil_package.Model}",
                f"trainer: {{plugins: [{{{EVIL}}}]}}",
                f"trainer: {{profiler: {{{EVIL}}}}}",
                f"trainer: {{strategy: {{{EVIL}}}}}",
                f"name: 2001-99-99\n{CALLBACK}",
                "trainer: {callbacks: !!set {? evil_package.Model}}",
                "trainer: {callbacks: !!python/object/apply:evil_package.Model []}",
                at_start("evil_package.Model"),
                at_start(f"{{{EVIL}}}"),
            )
        ),
    ],
)
def test_fit_imports_no_other_package(
    text: str, name: str, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text(text)
    refusal(["--data.path", "x", "--config", name], capsys)
    assert not evil.exists()
    assert "evil_package" not in sys.modules


@pytest.mark.parametrize("nested", ["trainer: other.txt", "trainer: {callbacks: other.txt}"])
def test_files_that_a_file_names_are_held_to_the_same(
    nested: str, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(nested)
    (tmp_path / "other.txt").write_text(f"callbacks: [{{{EVIL}}}]" if "{" not in nested else f"[{{{EVIL}}}]")
    refusal(["--data.path", "x", "--config", "config.yaml"], capsys)
    assert not evil.exists()


def test_no_file_comes_from_elsewhere(evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        (tmp_path / "trainer.yaml").write_text("max_epochs: 1")
        url = f"http://127.0.0.1:{server.server_port}/trainer.yaml"
        (tmp_path / "config.yaml").write_text(f"trainer: {url}")
        for words in (
            ["--config", url],
            ["--config", "config.yaml"],
            ["--trainer", url],
            ["--trainer", f"simplecache::{url}"],
        ):
            refusal(["--data.path", "x", *words], capsys)
    finally:
        server.shutdown()
    assert not asked


@pytest.mark.parametrize(
    "runs",
    [
        "os.system",
        "subprocess.Popen",
        "embtab.files.write_text",
        "torch.distributed.launcher.api.launch_agent",
        "{class_path: torch.distributed.launcher.api.elastic_launch, init_args: {entrypoint: /bin/ls, config: "
        "{class_path: torch.distributed.launcher.api.LaunchConfig, init_args: {min_nodes: 1, max_nodes: 1, "
        "nproc_per_node: 1}}}}",
        "{class_path: lightning.pytorch.callbacks.lambda_function.Callable, init_args: {}}",
    ],
)
def test_functions_and_other_kinds_of_known_packages_are_refused(
    runs: str, tmp_path: Path, evil: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(at_start(runs))
    said = refusal([*WORDS, "--config", "config.yaml"], capsys)
    assert "would be imported" in said or "a file may name no others" in said


def test_the_user_may_allow_a_package(
    tmp_path: Path, evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parsed_only(monkeypatch)
    (tmp_path / "config.yaml").write_text(CALLBACK)
    words = [*WORDS, "--config", "config.yaml"]
    for _ in range(2):  # what was allowed once is not allowed for good
        said = refusal(words, capsys)
        assert "evil_package.Model would be imported" in said
        assert said.endswith("if you trust it, set EMBTAB_ALLOW=evil_package")
        monkeypatch.setenv("EMBTAB_ALLOW", "other, evil_package")
        with pytest.raises(SystemExit) as stopped:
            cli.main(["fit", *words])
        assert stopped.value.code == 0
        monkeypatch.delenv("EMBTAB_ALLOW")


@pytest.mark.parametrize(
    "typed",
    [
        ["--trainer.callbacks", "evil_package.Model"],
        ["--trainer.callbacks=evil_package.Model"],
        ["--trainer.callbacks", '[{"class_path": "evil_package.Model"}]'],
    ],
)
def test_what_is_typed_is_the_users(typed: list[str], evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed_only(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", *WORDS, *typed])
    assert stopped.value.code == 0
    assert evil.exists()


def test_classes_of_a_checkpoint_are_not_looked_at(
    evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Lightning would merge `hyper_parameters` into the settings."""
    torch.save(
        {"embtab": {"format": 1}, "hyper_parameters": {"_class_path": "evil_package.Model"}}, tmp_path / "a.ckpt"
    )
    monkeypatch.setattr("embtab.training.cli.read_checkpoint", lambda path: {})
    parsed_only(monkeypatch)
    with pytest.raises(SystemExit):
        cli.main(["fit", *WORDS, "--ckpt_path", "a.ckpt"])
    assert not evil.exists()


def test_an_export_holds_the_configuration_to_the_same(evil: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set EMBTAB_ALLOW=evil_package"):
        imported("evil_package.Model", allowed())
    for name in ("os.path.join", "embtab.plan", "torch.nn.functional.relu", "torch.load", "builtins.exec", "Model", 7):
        with pytest.raises(UserError):
            imported(name, allowed())
    assert imported("lightning.pytorch.callbacks.EarlyStopping", allowed()) is EarlyStopping
    assert imported("torch.nn.Linear", allowed()) is nn.Linear
    assert not evil.exists()
    with pytest.raises(UserError, match="no such checkpoint"):
        load_trained(tmp_path / "none.ckpt")


@pytest.mark.parametrize("value", ["jsonargparse", "a-b", "1", "a..b", "*"])
def test_what_cannot_be_allowed_is_said(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBTAB_ALLOW", value)
    with pytest.raises(UserError, match=r"EMBTAB_ALLOW: .* is no package that could be allowed"):
        allowed()


def test_files_and_options_are_not_mistaken_for_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    words = [
        "--config",
        "config.yaml",
        "--trainer.max_epochs=3",
        "runs/fit.v2/last.ckpt",
        "0.5",
        "a.B",
        "torch.nn.Linear",
    ]
    assert allowed(words) == ("a", "torch.nn.Linear")
    with held_to(("a",)):
        pass
