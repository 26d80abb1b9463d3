# Everything a newcomer needs: Rust, python3 with pip, and make.
#   make demo    fold the demo checkpoint and classify real photographs
#   make test    every test
#   make serve   the demo model behind HTTP on port 8000 (optimised build)
#   make tools   what some tests need beyond that, from Debian's packages; they say SKIP without it
#   make ort     fetch ONNX Runtime into .ort/ (the others do it too); make ort-gpu for CUDA and TensorRT

SHELL := /bin/bash
PYTHON ?= python3
DEMO := target/debug/nfold
PHOTOGRAPHS := tests/data/cat.jpg $(foreach c,airplane dog frog horse ship truck,$(firstword $(wildcard tests/data/cifar10/$(c)/*.jpg)))

.PHONY: demo test serve tools ort ort-gpu

demo: ort
	cargo build --quiet --locked
	$(DEMO) fold models/nf_regnet_cifar10 --replace
	@echo
	$(DEMO) classify --top-k 3 $(PHOTOGRAPHS)

test: ort target/python/onnx
	cargo test --locked
	PYTHONPATH=target/python $(PYTHON) tests/check_onnx.py $(DEMO)
	$(PYTHON) tests/clients/run.py $(DEMO)

serve: ort
	cargo build --release --locked
	target/release/nfold fold models/nf_regnet_cifar10 --replace
	target/release/nfold serve

# as root on Debian
tools:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver fonts-liberation >/dev/null

ort:
	@deploy/onnxruntime/fetch cpu

ort-gpu:
	@deploy/onnxruntime/fetch gpu

# ONNX's own checker, for tests only
target/python/onnx:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/python onnx==1.23.2
