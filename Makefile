# Every target does its own set-up: a fresh clone needs only Python >= 3.12 and a package index.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
ARGS ?=

# The extra for the accelerator that is here.
ACCELERATOR := $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; \
	elif ls /dev/accel* /dev/vfio/[0-9]* 2>/dev/null | grep -q .; then echo tpu; fi)
BASE = plots,tokenizers$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
comma := ,

.PHONY: train test test-slow test-next check-cuda bench lint clean
.DEFAULT_GOAL := train

train: $(VENV)/installed-run
	$(RUN) -m lcx.train --config configs/ring_1m.py $(ARGS)

test: $(VENV)/installed-test
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS) tests

# Large topologies, compiles at a million tokens and more. Needs libtpu, which compiles without a TPU.
test-slow: $(VENV)/installed-plan
	$(RUN) -m pytest -q -m slow $(ARGS) tests

# The newest release of everything, in an environment of its own.
test-next: .venv-next/installed
	.venv-next/bin/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS) tests

# The GPU kernels through the CUDA compiler, which needs no GPU. 5 GB of packages, in an environment of their own.
check-cuda: .venv-cuda/installed
	TRITON_INTERPRET=0 .venv-cuda/bin/python -m pytest -q $(ARGS) tests/cuda

# Attention kernels: numerics, then speed beside cuDNN (pallas_kernels/README.md, "Measured").
bench: $(VENV)/installed-run
	$(RUN) -m lcx.bench attention $(ARGS)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf .venv .venv-next .venv-cuda build *.egg-info

# One line for an older Python, before anything is downloaded.
define venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit("error: lcx needs Python >= 3.12 and %s is %s; try: make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

# uv installs in a tenth of pip's time; pip does it where uv is not to be had.
define install
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	@if test -x $(1)/bin/uv; then $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2); \
	else $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2); fi
endef

$(VENV)/installed-run: setup.py constraints.txt
	$(call venv,$(VENV))
	@echo "installing lcx [$(BASE)] into $(VENV); a minute or two the first time"
	$(call install,$(VENV),-c constraints.txt -e '.[$(BASE)]')
	@touch $@

$(VENV)/installed-test: setup.py constraints.txt
	$(call venv,$(VENV))
	@echo "installing lcx [$(BASE),test] into $(VENV); a minute or two the first time"
	$(call install,$(VENV),-c constraints.txt -e '.[$(BASE)$(comma)test]')
	@touch $@ $(VENV)/installed-run

$(VENV)/installed-plan: $(VENV)/installed-test
	$(call install,$(VENV),-c constraints.txt -e '.[plan]')
	@touch $@

.venv-next/installed: setup.py
	$(call venv,.venv-next)
	$(call install,.venv-next,--upgrade -e '.[test$(comma)plots$(comma)tokenizers]')
	@touch $@

.venv-cuda/installed: setup.py constraints.txt
	$(call venv,.venv-cuda)
	@echo "installing lcx [cuda,test] into .venv-cuda: 5 GB, a few minutes the first time"
	$(call install,.venv-cuda,-c constraints.txt -e '.[cuda$(comma)test]')
	@touch $@
