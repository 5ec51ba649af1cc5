"""The command line: quick to answer, one line per mistake, exit code 2, nothing half-written left behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from embtab.cli import main
from embtab.datasets import synthetic
from embtab.methods import METHODS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    synthetic.prepare(folder, rows=500, scale=0.0001, seed=0)
    return folder


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error
    return error


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom embtab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'torchrec', 'fbgemm_gpu', 'lightning', 'polars', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare methods at equal bytes" in done.stdout
    assert time.perf_counter() - started < 5  # without heavy imports; a second on an idle machine


def test_plan_all_prints_every_method(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(data), "--budget", "0.3x", "--dim", "8", "--all"])
    printed = capsys.readouterr().out
    for method in METHODS:
        assert f"\n{method} " in printed
    assert "colliding ids" in printed
    with pytest.raises(SystemExit):
        main(["plan", str(data), "--all", "--option", "op=sum"])
    assert "--all shows every method as it is" in capsys.readouterr().err


def test_plan_shows_the_budget(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(data), "--method", "qr", "--option", "op=concat", "--budget", "0.5x", "--dim", "8"])
    assert "smaller than dense" in capsys.readouterr().out


def test_options_may_be_truth_values(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(data), "--method", "lowrank", "--option", "bias=true", "--budget", "0.5x", "--dim", "8"])
    assert "lowrank" in capsys.readouterr().out
    assert "bias must be bool" in fails(["plan", str(data), "--method", "lowrank", "--option", "bias=yes"], capsys)


def test_plan_shows_how_devices_would_hold_the_tables(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(data), "--budget", "0.5x", "--method", "hash", "--shards", "2"])
    printed = capsys.readouterr().out
    assert "device 1" in printed


def test_check_data_is_silent_on_good_data_and_exits_2_on_bad(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check-data", str(data)])
    assert "no problems found" in capsys.readouterr().out
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(data), str(broken)], check=True)
    part = next((broken / "train").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    assert "problems found" in fails(["check-data", str(broken)], capsys)


def test_prepare_if_absent_leaves_what_is_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (data / "dataset.json").stat().st_mtime_ns
    main(["prepare", "synthetic", "--out", str(data), "--if-absent"])
    assert "already prepared" in capsys.readouterr().err
    assert (data / "dataset.json").stat().st_mtime_ns == before
    assert "already exists" in fails(["prepare", "synthetic", "--out", str(data)], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["plna"], "invalid choice: 'plna'"),
        (["plan", "DATA", "--budget", "0"], "must be above zero"),
        (["plan", "DATA", "--budget", "8 apples"], "'8 apples' is not a size"),
        (["plan", "DATA", "--method", "magic"], "unknown method 'magic'"),
        (["plan", "DATA", "--method", "qr", "--option", "op"], "write KEY=VALUE"),
        (["plan", "DATA", "--method", "qr", "--option", "size=3"], "has no option 'size'"),
        (["plan", "DATA", "--budget", "100 kB"], "its smallest form needs"),
        (["plan", "DATA", "--dim", "x"], "invalid int value: 'x'"),
        (["plan", "DATA", "--shards", "0"], "--shards must be at least 1"),
        (["plan", "DATA", "--shards", "2", "--hbm", "1kB"], "the fullest device would hold"),
        (["plan", "DATA", "--shards", "2", "--sharding", "by_luck"], "by_luck"),
        (["plan", "nowhere"], "nowhere: not a prepared dataset"),
        (["compare", "--config", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml: cannot be read"),
        (["compare", "--config", "x.yaml", "--out", "OUT", "--jobs", "0"], "--jobs must be at least 1"),
        (["compare", "--config", "x.yaml", "--out", "OUT", "--seeds", "0,b"], "write whole numbers"),
        (["search", "--config", "x.yaml", "--out", "OUT", "--seeds", "0,b"], "write whole numbers"),
        (["bench", "--rounds", "0"], "must be above zero"),
        (["bench", "--device", "tpu"], "--device tpu: not here"),
        (["bench", "--skew", "flat"], "--skew must be zipf or uniform"),
        (["import", "nowhere.npy", "--out", "OUT"], "nowhere.npy: no such file"),
        (["prepare", "criteo", "nowhere.txt", "--out", "OUT"], "nowhere.txt"),
        (["prepare", "movielens", "nowhere", "--out", "OUT"], "nowhere"),
        (["prepare", "frappe", "nowhere", "--out", "OUT"], "nowhere"),
        (["prepare", "synthetic", "--rows", "0", "--out", "OUT"], "rows"),
        (["prepare", "synthetic", "--valid", "0.7", "--test", "0.6", "--out", "OUT"], "valid"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [{"DATA": str(data), "OUT": str(out)}.get(argument, argument) for argument in arguments]
    assert message in fails(given, capsys)
    assert list(tmp_path.iterdir()) == []
