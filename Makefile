PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EMULATORS := .emulators
FLINK := .flink
AIRFLOW := .airflow
UV ?= uv

.PHONY: setup setup-emulators setup-flink setup-airflow demo test test-all test-lanes lint bench clean lock

setup: $(READY)

# The stamp is written last, so an interrupted set-up runs again.
$(READY): pyproject.toml requirements.lock setup.py
	@$(PYTHON) scripts/set_up.py $(VENV)
	@touch $@

# Stand-ins for Cloud Storage and BigQuery, and another engine of Beam, which the tests start.
setup-emulators: $(EMULATORS)/.ready

$(EMULATORS)/.ready: emulators.lock scripts/set_up_emulators.py
	@$(PYTHON) scripts/set_up_emulators.py $(EMULATORS)
	@touch $@

# Flink, for the tests marked so and for `python -m runners.flink`.
setup-flink: $(FLINK)/.ready

$(FLINK)/.ready: scripts/set_up_flink.py runners/flink/software.py | $(READY)
	@$(BIN)/python scripts/set_up_flink.py $(FLINK)
	@touch $@

# Airflow with Google's operators, in an environment of its own, for the tests marked so.
setup-airflow: $(AIRFLOW)/.ready

$(AIRFLOW)/.ready: airflow.lock | $(READY)
	@echo "Setting up Airflow: 370 MB, about a minute, only once."
	@rm -rf $(AIRFLOW) && mkdir $(AIRFLOW) && echo '*' > $(AIRFLOW)/.gitignore
	@$(BIN)/python -m venv $(AIRFLOW)/venv
	@$(AIRFLOW)/venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement airflow.lock
	@touch $@

# No row shares a word with these queries that means anything.
demo: $(READY)
	$(BIN)/embeam embed --input='examples/demo/corpus/*' --output=build/demo --keep_text
	$(BIN)/embeam query build/demo "looking at the heavens with an optical instrument" --top=3
	$(BIN)/embeam query build/demo "insects visiting blossoms" --top=3
	$(BIN)/embeam query build/demo "a ruined dessert" --top=3

# What needs nothing but the environment: before every commit.
test: $(READY)
	@$(BIN)/python scripts/run_tests.py

# All that is proven: the same, and every lane.
test-all: test test-lanes

# Lanes are markers in pyproject.toml; `make test-LANE` runs one.
test-lanes: $(READY) $(EMULATORS)/.ready $(FLINK)/.ready $(AIRFLOW)/.ready
	@$(BIN)/python scripts/run_tests.py lanes

test-dataflow test-emulator test-engine: $(EMULATORS)/.ready
test-flink: $(FLINK)/.ready
test-airflow: $(AIRFLOW)/.ready
test-%: $(READY)
	@$(BIN)/python scripts/run_tests.py $*

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

bench: $(READY)
	$(BIN)/python -m benchmarks

# Keeps the environment; to start that over too: rm -rf .venv
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Needs uv. The bound on Python stands in pyproject.toml and would only repeat itself on every line.
lock:
	mkdir -p build
	$(UV) pip compile --quiet --universal --upgrade --python-version 3.11 --extra dev --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --output-file build/requirements.lock pyproject.toml
	{ echo "# Written by 'make lock' from pyproject.toml: one resolution for Python 3.11 to 3.13."; \
	  sed -e "s/ ; python_full_version < '3.14'$$//" -e "s/python_full_version < '3.14' and //" build/requirements.lock; \
	} > requirements.lock
