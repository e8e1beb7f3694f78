# `make demo` and `make test` each do their own set-up: a virtual environment, the pinned packages, the job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test lint types unit nightly audit tensorrt-lab clean

$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mmdet3d]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mmdet3d
	touch $(READY)

demo: $(READY)
	$(BIN)/bevqat demo --out runs/demo

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# One thread in each of the two processes: they share the cores. worksteal keeps a file's tests, and so what they share, in one
# process until the other one has nothing left to do.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# What takes too long for `make test`: kills at twenty moments of every verb, fuzzing, every command of the docs, the controls of
# verification at every site of camera-tiny, 195 right exports, long soaks, torchrun's error cases.
nightly: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m nightly

# Licences and known vulnerabilities of what is installed, and ruff's security rules (which `make lint` has too).
audit: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python tools/audit.py

# TensorRT 8.5.3.1 and later releases' bindings, for tests/engine/test_tensorrt_lab.py; about 1 GB in .trt.
PYTHON310 ?= python3.10
tensorrt-lab:
	$(PYTHON310) tests/engine/make_tensorrt_lab.py .trt

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
