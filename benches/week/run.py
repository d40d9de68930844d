#!/usr/bin/env python3
"""Requests and stored bytes of one volume over a simulated week, and what that costs at S3's list prices.

usage: run.py BIN_DIR TOOLS_DIR [--size-mib 256] [--hours 168] [--percent 0.25]

Each step is an hour: a share of the 4 KiB pages is overwritten anywhere, half with random bytes, half with what compresses
as text does, then a point is made and committed. Real binaries, a real SeaweedFS, one sender that runs all the time.
Nothing is collected: what is stored is all of it. The requests are counted one by one, as they went out.
"""
import argparse
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "store"))
from lab import Pair, build_image, change_pages, fail  # noqa: E402
from server import BUCKET, SeaweedFs, metrics  # noqa: E402

# List prices of S3 Standard in the first region, in USD.
GB_MONTH, PUT, GET = 0.023, 0.005 / 1000, 0.0004 / 1000
WRITES, READS = {"put", "part", "multipart", "list"}, {"get", "head"}
HOURS_PER_MONTH = 730.5
SEGMENT, PART = 32 << 20, 8 << 20


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bin_dir")
    arguments.add_argument("tools_dir")
    arguments.add_argument("--size-mib", type=int, default=256)
    arguments.add_argument("--hours", type=int, default=168)
    arguments.add_argument("--percent", type=float, default=0.25)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-week-") as folder:
        server = SeaweedFs(given.tools_dir, folder)
        try:
            bench(given, folder, server)
        finally:
            server.close()


def counted(pair):
    requests = metrics(pair.metrics, "blockferry_store_requests_total")
    writes = sum(count for op, count in requests.items() if op in WRITES)
    reads = sum(count for op, count in requests.items() if op in READS)
    sent = sum(metrics(pair.metrics, "blockferry_store_sent_bytes_total").values())
    return writes, reads, sent, requests


def bench(given, folder, server):
    os.environ.update(server.environment())
    image, pair = os.path.join(folder, "disk.img"), Pair(given.bin_dir, folder)
    pair.store = f"s3://{BUCKET}"
    build_image(image, given.size_mib, folder)
    pair.start_receiver()
    sender = None
    try:
        pair.register()
        pair.finish_sender(pair.start_sender("disk", image))
        full = counted(pair)
        with open(os.path.join(folder, "sender.log"), "wb") as log:
            sender = subprocess.Popen(
                [pair.program("blockferry-sender"), "run", "--state-dir", pair.state, "--volume", f"disk={image}"]
                + ["--point-interval", "30d", "--metrics-listen", "127.0.0.1:0"],
                stderr=log,
            )
        point = [pair.program("blockferry-sender"), "point", "--state-dir", pair.state, "--volume", "disk"]
        made = 0
        for _ in range(600):  # until it answers on its socket
            if subprocess.run(point, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode in (0, 3):
                made = 1
                break
        if not made:
            fail("the sender made no point")
        before, changed = counted(pair), 0
        for hour in range(given.hours):
            changed += change_pages(image, given.percent / 100, hour)
            if subprocess.run(point, stdout=subprocess.DEVNULL).returncode not in (0, 3):
                fail(f"no point in hour {hour}")
        after = counted(pair)
    finally:
        if sender:
            sender.terminate()
            sender.wait()
        pair.close()
    by_op = {op: count - before[3].get(op, 0) for op, count in sorted(after[3].items())}
    report(given, full, [b - a for a, b in zip(before[:3], after[:3])], changed, by_op)


def report(given, full, week, changed, by_op):
    size, writes, reads, stored = given.size_mib << 20, *week
    scale = HOURS_PER_MONTH / given.hours
    print(f"\n{given.size_mib} MiB volume, {given.hours} hours, {given.percent} % of its pages overwritten in each, a point each hour, nothing collected")
    print(f"first replication: {full[2] / 1e6:.1f} MB stored, {full[0]:.0f} write requests (PUT, parts, lists), {full[1]:.0f} reads (GET, HEAD)")
    print(f"the week:          {changed / 1e6:.1f} MB changed, {stored / 1e6:.1f} MB stored ({stored / changed:.2f} × what changed), {writes:.0f} write requests, {reads:.0f} reads")
    print(f"                   {writes / given.hours:.2f} writes and {reads / given.hours:.2f} reads a point, {writes / (stored / (1 << 30)):.0f} writes per GiB stored")
    print(f"                   by operation: {', '.join(f'{op} {count:.0f}' for op, count in by_op.items() if count)}")
    # Storage over the first month: the full copy, and on average half of what the month adds.
    volume_gb = (full[2] + stored * scale / 2) / 1e9
    volume = volume_gb * GB_MONTH + scale * (writes * PUT + reads * GET)
    print(f"this volume costs  {volume:.4f} USD in its first month: {volume_gb * GB_MONTH:.4f} storage, {scale * (writes * PUT + reads * GET):.4f} requests")
    # A TiB that changes alike: bytes grow with it; a point stays one log entry, and what it adds is cut into segments of parts.
    factor = (1 << 40) / size
    added = stored * factor * scale
    requests = HOURS_PER_MONTH + added / SEGMENT * (2 + SEGMENT / PART)
    storage = (full[2] * factor + added / 2) / 1e9 * GB_MONTH
    print(f"a TiB of the same: {storage + requests * PUT:.2f} USD per TiB-month: {storage:.2f} storage, {requests * PUT:.2f} for {requests:,.0f} requests")
    print(f"                   computed: bytes in proportion, {SEGMENT >> 20} MiB segments in parts of {PART >> 20} MiB, an entry of the log for each point")


if __name__ == "__main__":
    main()
