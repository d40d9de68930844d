#!/bin/sh
# Builds every fuzz target with coverage feedback and runs each for a bounded number of inputs.
#
#   fuzz/run-short.sh [TARGET …]       FUZZ_RUNS=20000  FUZZ_SEED=1  FUZZ_SECONDS=60 (per target, whichever comes first)
#
# Stable Rust and a C++ compiler are enough: the flags below are what cargo-fuzz passes, less the address sanitizer, which needs
# nightly. The code under test is safe Rust but for zstd and ring, so what is looked for are panics, broken assertions, overflows
# and memory without bound, none of which needs it.
set -eu
cd "$(dirname "$0")"

RUNS=${FUZZ_RUNS:-20000} SEED=${FUZZ_SEED:-1} SECONDS_MAX=${FUZZ_SECONDS:-60}
TARGET_DIR=${CARGO_TARGET_DIR:-../target}/fuzz
HOST=$(rustc -vV | sed -n 's/^host: //p')
GOLDEN=../common/src/format/golden
mkdir -p "$TARGET_DIR"
TARGET_DIR=$(cd "$TARGET_DIR" && pwd)

# --target keeps build scripts and macros free of the instrumentation.
build() {
    RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1 -Cforce-frame-pointers" \
        CARGO_TARGET_DIR="$TARGET_DIR" cargo build --quiet --locked --release --target "$HOST" --bins
}
build
BIN=$TARGET_DIR/$HOST/release

# The first bytes ever written of a format are the seeds of its target.
seeds() {
    case $1 in
    envelope) echo close-v1 log-entry-v1 log-entry-v2 volume-header-v1 volume-name-v1 sender-volume-v1 ;;
    record | seal) echo record-v1 ;;
    record_meta) echo segment-v1 ;;
    close) echo close-v1 ;;
    frame) echo frames-v1 ;;
    segment) echo segment-v1 segment-v2 ;;
    log_entry) echo log-entry-v1 log-entry-v2 ;;
    checkpoint) echo checkpoint-v1 ;;
    volume_header) echo volume-header-v1 ;;
    volume_name) echo volume-name-v1 ;;
    sender_state) echo sender-volume-v1 sender-hashes-v1 sender-journal-v1 ;;
    esac
}

# Seeds that are no golden file.
more_seeds() {
    case $1 in
    record_meta) # The metadata of the golden segment's two records, 104 bytes each with their offsets, before the footer.
        tail -c 248 "$GOLDEN/segment-v1.bin" | head -c 96 >"$2/metadata-1"
        tail -c 144 "$GOLDEN/segment-v1.bin" | head -c 96 >"$2/metadata-2" ;;
    stage_key) head -c 80 /dev/zero >"$2/two-keys" ;;
    key_file)
        printf 'blockferry-key v1\nid: %s\nkey: %s\ncheck: 00000000\n' 01010101010101010101010101010101 \
            0202020202020202020202020202020202020202020202020202020202020202 >"$2/key-file" ;;
    passphrase_file)
        digits=0202020202020202020202020202020202020202020202020202020202020202
        printf 'blockferry-passphrase v1\nfleet: %s\nfingerprint: sha256:%s\nid: %s\nsecret: %s\nchecksum: 00000000\n' \
            01010101-0101-4101-8101-010101010101 $digits 03030303-0303-4303-8303-030303030303 $digits >"$2/passphrase" ;;
    nbd) # Flags, GO for "root", then a read and a write.
        {
            printf '\000\000\000\003IHAVEOPT\000\000\000\007\000\000\000\012\000\000\000\004root\000\000'
            printf '\045\140\225\023\000\000\000\000\000\000\000\000\000\000\000\001\000\000\000\000\000\000\020\000\000\000\020\000'
            printf '\045\140\225\023\000\001\000\001\000\000\000\000\000\000\000\002\000\000\000\000\000\000\002\000\000\000\000\020'
        } >"$2/read-and-write" ;;
    session) # Connect, claim, grant; then rounds of: offer, send, deliver, stage, acknowledge, close, commit.
        grant=$(printf '\\016\\003\\006\\011\\012')
        round=$(printf '\\000\\000\\003\\003\\006\\006\\014\\014\\011\\012\\002\\003\\006\\014\\011\\012\\015\\011\\012')
        # shellcheck disable=SC2059
        printf "$grant$round$round\\216\\016\\003\\006\\011\\012\\011\\012$round" >"$2/rounds" ;;
    esac
}

TARGETS=$*
[ -n "$TARGETS" ] || TARGETS=$(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' Cargo.toml)
failed=
for target in $TARGETS; do
    corpus=$TARGET_DIR/corpus/$target artifacts=$TARGET_DIR/artifacts/$target log=$TARGET_DIR/$target.log
    rm -rf "$corpus" "$artifacts"
    mkdir -p "$corpus" "$artifacts"
    for seed in $(seeds "$target"); do cp "$GOLDEN/$seed.bin" "$corpus/"; done
    more_seeds "$target" "$corpus"
    if "$BIN/$target" "$corpus" -runs="$RUNS" -seed="$SEED" -max_total_time="$SECONDS_MAX" -max_len=12288 -timeout=10 \
        -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix="$artifacts/" >"$log" 2>&1; then
        # Feedback or it did not happen: the counters are loaded, and the corpus covers something.
        counters=$(sed -n 's/^INFO: Loaded .* (\([0-9]*\) inline 8-bit counters).*/\1/p' "$log" | head -n 1)
        first=$(sed -n 's/.*INITED cov: \([0-9]*\).*/\1/p' "$log" | head -n 1)
        last=$(sed -n 's/^#[0-9]*[[:space:]].* cov: \([0-9]*\).*/\1/p; s/.*DONE *cov: \([0-9]*\).*/\1/p' "$log" | tail -n 1)
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        if [ -z "$counters" ] || [ -z "$last" ]; then
            echo "fuzz $target: no coverage feedback; see $log" >&2
            failed="$failed $target"
        else
            echo "fuzz $target: $runs inputs, $counters counters, coverage ${first:-0} to $last"
        fi
    else
        failed="$failed $target"
        tail -n 30 "$log" >&2
        for input in "$artifacts"/*; do
            echo "fuzz $target: failed; replay with: $BIN/$target $input" >&2
        done
    fi
done
if [ -n "$failed" ]; then
    echo "fuzz: failed:$failed" >&2
    exit 1
fi
