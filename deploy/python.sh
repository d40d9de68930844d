#!/usr/bin/env bash
# Installs Python packages that only tests need into the virtual environment below CACHE_DIR. Quiet where they are there.
# usage: python.sh CACHE_DIR PACKAGE==VERSION…
set -euo pipefail
venv=$1/venv
shift
stamp=$venv/packages
if [ "$(cat "$stamp" 2>/dev/null)" != "$*" ]; then
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "$@"
    echo "$*" >"$stamp"
fi
