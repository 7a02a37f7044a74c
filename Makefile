# make demo | make test | make test-all: each sets everything up on a fresh machine first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_MODEL := models/smollm2-135m

.PHONY: setup demo test test-all test-gpu lint clean

setup: $(READY) $(DEMO_MODEL)/model.safetensors

$(READY): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[gguf,serve,otel,dev]"
	touch $(READY)

$(DEMO_MODEL)/model.safetensors: | $(READY)
	$(BIN)/python -m phalanx.launch.get_model demo out=$(DEMO_MODEL)

demo: setup
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m phalanx.launch.generate \
		model=smollm2_135m input=benchmarks/prompts.jsonl output=outputs/demo.jsonl stream=true sampling.max_tokens=48

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "slow or not slow" --hypothesis-profile=explore

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml __init__.py engine kernels launch parallel serving
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp')
	mkdir -p $(VENV)/typecheck && ln -sfn "$(CURDIR)" $(VENV)/typecheck/phalanx
	cd $(VENV)/typecheck && ../bin/mypy phalanx/engine phalanx/parallel phalanx/serving phalanx/launch

clean:
	rm -rf $(VENV) models outputs build *.egg-info
