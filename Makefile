# `make demo` shows everything, `make test` checks everything; both install what they need into .venv.
# For a machine with an NVIDIA GPU: `make setup EXTRA=gpu`.

PYTHON ?= python3
EXTRA ?= cpu
BIN := .venv/bin

.PHONY: setup demo test lint format protos clean

setup: .venv/installed-$(EXTRA)

# The CPU and GPU builds of FAISS and onnxruntime collide, so a change of EXTRA starts from nothing.
.venv/installed-$(EXTRA): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRA),dev]"
	touch .venv/installed-$(EXTRA)

demo: setup
	$(BIN)/trirank demo

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The code beside protos/trirank/v1/recommender.proto; a test holds it to the .proto.
protos: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . \
		--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
		protos/trirank/v1/recommender.proto

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache demo
