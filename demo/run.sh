#!/usr/bin/env bash
# Runs the demo with the release binaries that make built.
set -euo pipefail
exec python3 "$(dirname "$0")/run.py" "${CARGO_TARGET_DIR:?set by make}/release" "$@"
