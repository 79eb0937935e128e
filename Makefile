# apt_jobs: `make demo` shows it, `make test` proves it. Everything lives in .venv and build/.

PYTHON ?= python3
SHARE ?= 1
VENV := .venv
BIN := $(VENV)/bin
# Without compiling: torch and its like have 10,000 modules, of which a process imports a tenth. Python compiles those and
# keeps what it compiled, unless this variable says not to: then each process that imports torch does it again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SETUP_INPUTS := pyproject.toml constraints.txt hatch_build.py apt_jobs/web/ui/package-lock.json
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
UI_SOURCES := $(shell find apt_jobs/web/ui/src apt_jobs/web/ui/index.html -type f 2>/dev/null)

.PHONY: help setup setup-dev demo test check faults bench screenshots docs generate lock wheel clean

help:
	@echo "make demo         set up, start everything, train a small model, show it live"
	@echo "make test         set up, check and test everything"
	@echo "make check        ruff, mypy, import contracts, the page's checks"
	@echo "make generate     the TypeScript and pages that are generated from Python"
	@echo "make faults       every promise under its full number of faults; takes hours (SHARE=0.1 for a tenth)"
	@echo "make bench        benchmarks (ONLY=group for one of them)"
	@echo "make screenshots  the pictures of docs/images"
	@echo "make generate     the generated pages of docs/reference"
	@echo "make docs         the site, in build/site"
	@echo "make lock         the hashed locks of the images, from pyproject.toml and constraints.txt"
	@echo "make wheel        the wheel of a release, in dist/"
	@echo "make clean        remove .venv, build/ and caches"

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev
	$(call debian,chromium chromium-browser google-chrome,chromium,The browser tests need Chromium)
	$(call debian,nginx,nginx-light,The tests behind a proxy need nginx)
	$(call debian,slurmctld,slurm-wlm,The tests on Slurm need its controller and daemon,--no-install-recommends)
	$(call debian,zsh,zsh,The tests of completion need zsh)
	$(call debian,fish,fish,The tests of completion need fish)

# $(call debian,commands,package,who needs it,options): install a package of Debian where none of the commands is there.
define debian
	@PATH="$$PATH:/usr/sbin"; for one in $(1); do ! command -v $$one >/dev/null || exit 0; done; \
	  as_root="sudo -n"; [ "$$(id -u)" != 0 ] || as_root=; \
	  { $$as_root apt-get update -qq && \
	    $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(4) $(2) >/dev/null; } || \
	  { echo "$(3): install it (apt-get install $(2)) and run this again." >&2; exit 1; }
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "apt_jobs needs Python 3.11 or newer; say which one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python $(SETUP_INPUTS) $(UI_SOURCES)
	$(INSTALL) -e '.[train,export]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m apt_jobs demo

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python hatch_build.py run check

generate: setup-dev
	$(BIN)/python -m scripts.generate

# Files are spread over processes, since most tests wait for some process that starts. The browser's tests run apart:
# its driver keeps an event loop running.
test: setup-dev check
	$(BIN)/python -m pytest --ignore=tests/browser $(PARALLEL)
	$(BIN)/python -m pytest tests/browser $(PARALLEL)

faults: setup-dev
	APT_JOBS_TEST_FAULTS=$(SHARE) $(BIN)/python -m pytest tests/faults --timeout 0

bench: setup-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ONLY)

screenshots: setup-dev
	$(BIN)/python -m pytest tests/browser/screenshots.py

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

# uv reads only names, versions and hashes here; pip installs. `--universal`: one file for every Python and machine.
LOCK = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
  --constraint constraints.txt --custom-compile-command "make lock"

lock: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(LOCK) pyproject.toml --extra export --output-file requirements.lock
	$(LOCK) pyproject.toml --extra export --extra train --output-file requirements-train.lock
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
	  $(LOCK) - --output-file requirements-build.lock

wheel: $(VENV)/bin/python
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache apt_jobs/web/static apt_jobs/web/ui/node_modules
