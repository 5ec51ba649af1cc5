"""What is wrong with an installation, in words: versions that must match, libraries that load, kernels that compute.

Every library is imported in a process of its own, since a broken one may crash instead of raising; this module itself
imports none of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 300  # for an import from a cold disk

KERNEL = """
import os, torch, fbgemm_gpu
from torch import nn
import embtab as et
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
plan = et.plan([et.Feature("f", 50)], "unified", "0.5x")
ids = KeyedJaggedTensor(["f"], torch.arange(50), lengths=torch.ones(50, dtype=torch.int32))
made = []
for backend in ("torch", "fbgemm"):
    torch.manual_seed(0)
    tables = et.EmbeddingBagCollection(plan, backend=backend, init_std=1.0)
    if made:
        tables.load_state_dict(state, strict=False)
    state = {k: v.clone() for k, v in tables.state_dict().items() if not k.endswith(".optimizer")}
    made.append(tables(ids).values().detach())
assert torch.allclose(*made, atol=1e-6), "fbgemm and torch give different vectors"
"""


class Finding(NamedTuple):
    """What one check found.

    Args:
        name: of the check.
        state: "ok", "warning" (works, but slowly or not for all) or "broken".
        text: what was found, and what to do about it.
    """

    name: str
    state: str
    text: str


def examine() -> Iterator[Finding]:
    """Runs every check, cheap ones first; a check that fails never keeps the others from running."""
    yield python()
    yield from packages()
    for module in ("torch", "fbgemm_gpu", "torchrec", "lightning", "pyarrow", "polars"):
        yield loads(module)
    yield computes()
    yield builds()
    yield gpu()
    yield threads(os.environ, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def python() -> Finding:
    """The interpreter that runs this, and where it is."""
    return Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def packages(
    wanted: Callable[[str], list[str] | None] = requires, there: Callable[[str], str] = version
) -> list[Finding]:
    """Every package that embtab requires: there, and of a version that its requirement allows."""
    found = []
    try:
        requirements = wanted("embtab") or []
    except PackageNotFoundError:
        return [
            Finding("embtab", "broken", "runs from a folder and is not installed: pip install it, as the README does")
        ]
    for text in requirements:
        if "extra ==" in text:
            continue
        name = re.match(r"[\w.-]+", text).group()  # type: ignore[union-attr]
        bounds = re.findall(r"(==|>=|<)\s*([\d.]+)", text)
        wish = text.removeprefix(name)
        try:
            installed = there(name)
        except PackageNotFoundError:
            found.append(Finding(name, "broken", f"is not installed; embtab needs {text}: pip install '{text}'"))
            continue
        if all(_holds(installed, *bound) for bound in bounds):
            found.append(Finding(name, "ok", installed))
        else:
            advice = TRIPLE if name in ("torch", "torchrec", "fbgemm-gpu") else f"pip install '{text}'"
            found.append(Finding(name, "broken", f"{installed} is installed, embtab needs {wish}: {advice}"))
    return found


TRIPLE = (
    "torch, torchrec and fbgemm-gpu are built against each other (fbgemm-gpu 1.8 and torchrec 1.8 go with torch 2.13), "
    "so install the three together, as the README does"
)


def _holds(installed: str, relation: str, bound: str) -> bool:
    """Whether a version is within a bound; local parts such as +cpu do not count, and 2.13. means any 2.13."""
    have, want = ([int(part) for part in re.findall(r"\d+", text.split("+")[0])] for text in (installed, bound))
    if relation == "==":
        return have[: len(want)] == want
    return have >= want if relation == ">=" else have < want


def loads(module: str) -> Finding:
    """Whether a library can be imported, and what the loader's complaint means."""
    error = _run(f"import {module}")
    return (
        Finding(f"import {module}", "ok", "loads")
        if error is None
        else Finding(f"import {module}", "broken", f"{error}; {explained(error)}")
    )


MEANINGS = {
    "libtorch_cuda": "fbgemm-gpu is the CUDA build and torch is not: install fbgemm-gpu-cpu in its place, as the "
    "README says, or a CUDA torch",
    "libnvidia-ml|libcuda": "a CUDA build on a machine without NVIDIA's driver: install the CPU wheels, or the driver",
    "undefined symbol|DispatchKey|_ZN": "it was built for another torch: " + TRIPLE,
    "No module named": "it is not installed in this environment: pip install embtab again",
    "GLIBC|manylinux": "the wheel needs a newer Linux than this one",
    "signal": "it crashed while loading, mostly because it was built for another torch or another processor: " + TRIPLE,
    "seconds": "the disk or the machine is very slow, or a lock is held by another process",
}


def explained(error: str) -> str:
    """A loader's message, in words."""
    for pattern, meaning in MEANINGS.items():
        if re.search(pattern, error):
            return meaning
    return "try the import alone in Python for the whole message"


def computes() -> Finding:
    """Whether fbgemm's kernels give the vectors that plain torch gives, on a table of this package."""
    error = _run(KERNEL)
    if error is None:
        return Finding("fbgemm kernels", "ok", "give the vectors that plain torch gives")
    return Finding("fbgemm kernels", "broken", f"{error}; until that is mended, backend='torch' does without them")


def builds() -> Finding:
    """Whether C++ loops can be built: the native backend stands for all."""
    error = _run('import embtab as et; et.EmbeddingBagCollection(et.plan([et.Feature("f", 50)], "dense"), "native")')
    if error is None:
        return Finding("native backend", "ok", "is built")
    without = "backend='native' and compile_rows are refused without, AutoInt's attention and Dice computed by torch"
    return Finding("native backend", "warning", f"{error}; {without}")


def gpu(driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """Whether a GPU that is there can be used."""
    asked = "import torch; print(torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    if done.returncode:
        return Finding("gpu", "warning", "torch does not load, see above")
    cuda, usable, count = done.stdout.split()
    if usable == "True":
        return Finding("gpu", "ok", f"{count} usable, CUDA {cuda}")
    if not driver.exists():
        return Finding("gpu", "ok", "none; everything runs on the CPU")
    if cuda == "None":
        return Finding("gpu", "warning", "there is a driver, but torch is the CPU build: install the CUDA wheels")
    return Finding(
        "gpu", "warning", f"the driver does not fit CUDA {cuda} of torch: update the driver; nvidia-smi tells"
    )


def threads(environment: Mapping[str, str], cores: int) -> Finding:
    """Settings of OpenMP that make training many times slower on a machine that is shared."""
    number, policy = environment.get("OMP_NUM_THREADS", ""), environment.get("OMP_WAIT_POLICY", "passive")
    if number and (not number.isdigit() or int(number) > cores):
        return Finding("threads", "warning", f"OMP_NUM_THREADS={number} on {cores} cores: set 1 to {cores}")
    if policy.lower() != "passive":
        return Finding("threads", "warning", f"OMP_WAIT_POLICY={policy}: threads spin while they wait; unset it")
    used = number or f"{cores}, as OMP_NUM_THREADS is not set; for several processes at once set it to 1"
    return Finding("threads", "ok", f"{cores} cores, OpenMP uses {used}")


def _run(code: str) -> str | None:
    """The last line of what a child process complained of, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_S} seconds"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")
