# `make setup` makes .venv; every other target makes it first where it is absent or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread: fbgemm stalls when its threads contend for cores.
export OMP_NUM_THREADS ?= 1
# Processes that run tests side by side.
WORKERS ?= 2

# With an NVIDIA driver torchrec's own dependency, the CUDA build of fbgemm-gpu, is right; without one it cannot be
# imported, and the code-free package of packaging/ puts the CPU build in its place.
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
FBGEMM :=
else
FBGEMM := ./packaging/fbgemm-gpu-cpu
endif

.PHONY: setup test coverage lint docs demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml packaging/fbgemm-gpu-cpu/pyproject.toml
	@echo "Installing into .venv (under a minute with a warm package cache)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $(FBGEMM) --editable '.[dev]'
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Lines of embtab that no test of the default suite runs, processes that tests start included.
coverage: $(STAMP)
	@rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover --show-missing

# models/ and datasets/ live inside the embtab namespace only once installed; a tree of links shows mypy the same, and
# import-linter, which holds the wings to the floors of pyproject.toml.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .typecheck && mkdir -p .typecheck/embtab
	@ln -s $(CURDIR)/embtab/* .typecheck/embtab/
	@ln -s $(CURDIR)/models .typecheck/embtab/models
	@ln -s $(CURDIR)/datasets .typecheck/embtab/datasets
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml -p embtab
	cd .typecheck && PYTHONPATH=. ../$(BIN)/lint-imports ../pyproject.toml --no-cache --no-logo

# What a program imports: the command line, and what only it uses, have no page. Packages with __all__ are named file by
# file. Warnings are errors, but for those of the libraries that are imported on the way.
PAGES := $(wildcard embtab/[a-z]*.py embtab/methods/[a-z]*.py embtab/learned/[a-z]*.py models/[a-z]*.py)
PAGES := $(filter-out embtab/cli.py,$(PAGES:models/%=embtab/models/%))

docs: $(STAMP)
	@rm -rf build/docs
	$(BIN)/python -W error -W ignore::DeprecationWarning -W ignore::FutureWarning -m pdoc -d google -t docs/api \
	    -o build/docs embtab embtab.methods embtab.models embtab.datasets embtab.training embtab.sharding embtab.learned \
	    embtab.serving $(subst /,.,$(PAGES:.py=))

demo: $(STAMP)
	$(BIN)/embtab prepare synthetic --out data/demo --rows 200000 --scale 0.002 --seed 0 --if-absent
	$(BIN)/embtab compare --config configs/compare_demo.yaml --out report/demo --jobs $$(nproc)

clean:
	rm -rf .venv .typecheck build dist *.egg-info data/demo report/demo
