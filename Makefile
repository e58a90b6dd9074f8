# make demo   caption, ask and draw with the model in the package; writes unimm-demo.png
# make test   the whole test suite
# make lint   ruff and mypy
#
# Each needs only Python >= 3.11 and make: the first run sets up .venv with uv, later runs start at once.

SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
ARGS  ?=

# After set-up nothing reaches for the network.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
# Without cached bytecode every start of torch takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint setup clean
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/unimm demo $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup: $(READY)

clean:
	rm -rf $(VENV) .uv

# uv from the PATH, else one in .uv/ of our own, put there by the first Python that is new enough.
$(READY): pyproject.toml
	@set -euo pipefail; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ] || ! "$$uv" --version >/dev/null 2>&1; then \
	  uv=.uv/bin/uv; \
	  if [ ! -x "$$uv" ]; then \
	    for python in python3 python3.14 python3.13 python3.12 python3.11 python ''; do \
	      [ -n "$$python" ] || { echo 'unimm: no Python >= 3.11 was found on the PATH' >&2; exit 2; }; \
	      "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    done; \
	    "$$python" -m venv .uv; \
	    .uv/bin/python -m pip install --quiet uv; \
	  fi; \
	fi; \
	[ -x $(BIN)/python ] || "$$uv" venv --quiet --python '>=3.11' $(VENV); \
	"$$uv" pip install --python $(BIN)/python --editable '.[dev,data,eval,emu3,lora,lpips,report,serve,structured,tables,video]'; \
	touch $@
