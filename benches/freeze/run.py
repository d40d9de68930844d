#!/usr/bin/env python3
"""How long file systems are frozen: 100 points of a tracked device under fio, beside --freeze-limit.

usage: run.py BIN_DIR [--size-mib 1024] [--points 100] [--limit 100ms]

The time is the sender's own (`blockferry_sender_freeze_seconds`), and beside it the longest write that fio saw.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from lab import fail  # noqa: E402
from live import LivePair, loop_attach, loop_detach  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--limit", default="100ms")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-bench-") as folder:
        disk, mount = os.path.join(folder, "disk.img"), os.path.join(folder, "mnt")
        with open(disk, "wb") as file:
            file.truncate(options.size_mib << 20)
        device = loop_attach(disk, "--direct-io=on")
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        os.makedirs(mount)
        subprocess.run(["mount", device, mount], check=True)
        pair = LivePair(options.bin_dir, os.path.join(folder, "pair"))
        try:
            pair.protect([f"disk={device},capture=ebpf"], "--point-interval", "1h", "--freeze-limit", options.limit)
            pair.first_point("disk")
            measure(pair, mount, options)
        finally:
            pair.close()
            subprocess.run(["umount", mount], check=False)
            loop_detach(device)


def measure(pair, mount, options):
    job = ["fio", "--name=load", f"--directory={mount}", f"--size={options.size_mib // 2}M", "--rw=randwrite", "--bs=8k"]
    job += ["--ioengine=psync", "--direct=1", "--time_based", "--runtime=3600", "--rate_iops=1500", "--output-format=json"]
    load = subprocess.Popen(job, stdout=subprocess.PIPE, text=True)
    frozen, kinds, none = [], {}, 0
    while sum(kinds.values()) < options.points:
        before = [pair.metric(f"blockferry_sender_freeze_seconds_{part}") for part in ("sum", "count")]
        answer = pair.point("disk")
        if answer is None:
            none += 1
            if none > options.points:
                fail(f"no point for the {none}th time")
            continue
        consistency = (answer[0]["point"] or {}).get("consistency", "none")
        kinds[consistency] = kinds.get(consistency, 0) + 1
        seconds, freezes = (
            pair.metric(f"blockferry_sender_freeze_seconds_{part}") - was for part, was in zip(("sum", "count"), before)
        )
        # A point that took more than one freeze gives their mean as often as there were any.
        frozen += [seconds / freezes * 1e3] * int(freezes)
    load.send_signal(signal.SIGINT)
    output = load.communicate()[0]
    slowest = json.loads(output[output.index("{") :])["jobs"][0]["write"]["clat_ns"]["max"] / 1e6
    print("| points | consistency | freezes | frozen, median ms | max ms | --freeze-limit | longest write of fio, ms |\n| --- | --- | --- | --- | --- | --- | --- |")
    figures = f"{len(frozen)} | {statistics.median(frozen):.1f} | {max(frozen):.1f}"
    print(f"| {options.points} | {kinds} | {figures} | {options.limit} | {slowest:.1f} |")


if __name__ == "__main__":
    main()
