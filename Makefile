# Each target works alone on a machine that has Python, git and make: it makes .venv when needed.
PYTHON ?= python3
BIN := .venv/bin
# Tests and benchmarks never ask a model hub
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench kills floors notebook clean

demo: .venv/demo.done
	$(BIN)/python examples/demo.py

test: .venv/dev.done
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/dev.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What `make test` takes a sample of
kills: .venv/dev.done
	INFOLD_ALL_KILLS=1 $(BIN)/python -m pytest -n auto --timeout 3000 tests/test_in_place.py

# The package as it is built, with the oldest releases of the core's dependencies that pyproject.toml allows
FLOORS := .venv/floors
floors:
	$(PYTHON) -m venv --clear $(FLOORS)
	sed -n '/^dependencies = /,/^]/s/^ *"\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml >$(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(FLOORS)/floors.txt . \
		gguf hypothesis pytest pytest-timeout
	$(FLOORS)/bin/python -m pytest tests/test_cli.py tests/test_crash.py tests/hostile

bench: .venv/dev.done
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/tuners.py
	$(BIN)/python benchmarks/undo.py curve
	$(BIN)/python benchmarks/undo.py time
	$(BIN)/python benchmarks/loop.py drift
	$(BIN)/python benchmarks/loop.py disk
	$(BIN)/python benchmarks/loop.py speed
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/deployment.py --pairs
	$(BIN)/python benchmarks/gguf_files.py times
	$(BIN)/python benchmarks/gguf_files.py run
	$(BIN)/python benchmarks/gguf_files.py decoded
	$(BIN)/python benchmarks/gguf_files.py accuracy
	$(BIN)/python benchmarks/gguf_files.py types
	$(BIN)/python benchmarks/gguf_files.py errors
	$(BIN)/python benchmarks/gguf_files.py report

# Runs every cell; NOTEBOOK=--save keeps the outputs
notebook: .venv/notebook.done
	$(BIN)/python examples/notebook.py $(NOTEBOOK)

.venv/%.done: pyproject.toml constraints.txt hatch_build.py $(wildcard src/infold/kernel/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
