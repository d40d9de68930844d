#!/usr/bin/env bash
# Writes THIRD_PARTY.md: every library that the shipped binaries link on Linux, from the lock file. With --check, fails where
# the file is not current.
set -euo pipefail
cd "$(dirname "$0")/.."
list() {
    cargo metadata --format-version 1 --locked --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, sys
meta = json.load(sys.stdin)
packages = {p["id"]: p for p in meta["packages"]}
nodes = {n["id"]: n for n in meta["resolve"]["nodes"]}
shipped = {"blockferry-sender", "blockferry-receiver", "blockferry-operator"}
todo = [p["id"] for p in meta["packages"] if p["name"] in shipped and p["source"] is None]
seen = set()
while todo:
    one = todo.pop()
    if one in seen:
        continue
    seen.add(one)
    for dep in nodes[one]["deps"]:
        # A normal dependency has no kind; tools of the build and of tests are not linked in.
        if any(kind["kind"] is None for kind in dep["dep_kinds"]):
            todo.append(dep["pkg"])
rows = sorted({(p["name"], p["version"], p["license"] or "see its file " + str(p["license_file"])) for p in map(packages.get, seen) if p["source"]})
print("# What is linked in\n")
print("The libraries in the binaries, made by `deploy/notices.sh`. RocksDB and zstd (C and C++) come with `librocksdb-sys` and")
print("`zstd-sys`, jemalloc with `tikv-jemalloc-sys`, under the licences named there. The full texts lie in each package.\n")
print("| package | version | licence |\n| --- | --- | --- |")
for name, version, licence in rows:
    print(f"| {name} | {version} | {licence} |")
'
}
if [ "${1:-}" = --check ]; then
    list | diff -u THIRD_PARTY.md - >&2 || {
        echo "THIRD_PARTY.md is not current: run deploy/notices.sh and commit it" >&2
        exit 1
    }
else
    list > THIRD_PARTY.md.new
    mv THIRD_PARTY.md.new THIRD_PARTY.md
fi
