#!/usr/bin/env python3
"""How old the newest recovery point is under load: random 8 KiB writes at a fixed rate through the sender's nbd, both ends and a
local store on this machine.

usage: run.py BIN_DIR [--size-mib 4096] [--seconds 120] [--mb-s 54]

The age is `blockferry_sender_rpo_seconds`, asked ten times a second: the time since the cut of the newest committed point.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from lab import fail  # noqa: E402
from live import LivePair, filled, wait_for  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--mb-s", type=float, default=54)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-bench-") as folder:
        disk, socket = os.path.join(folder, "disk.img"), os.path.join(folder, "nbd.sock")
        filled(disk, options.size_mib)
        pair = LivePair(options.bin_dir, os.path.join(folder, "pair"))
        try:
            pair.protect([f"disk={disk},capture=nbd,listen={socket}"])
            uri = f"nbd+unix:///disk?socket={socket}"
            wait_for("the export", lambda: subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode == 0)
            pair.first_point("disk")
            measure(pair, uri, options)
        finally:
            pair.close()


def measure(pair, uri, options):
    iops = int(options.mb_s * 1e6 / 8192)
    job = ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=8k", "--iodepth=16"]
    job += [f"--size={options.size_mib}M", "--time_based", f"--runtime={options.seconds}", f"--rate_iops={iops}"]
    job += ["--randrepeat=0", "--buffer_compress_percentage=50", "--refill_buffers", "--output-format=terse"]
    load = subprocess.Popen(job, stdout=subprocess.PIPE, text=True)
    ages, begun = [], time.monotonic()
    while load.poll() is None:
        time.sleep(0.1)
        # The first second has no point of the load yet.
        if time.monotonic() - begun > 2:
            ages.append(pair.metric("blockferry_sender_rpo_seconds"))
    if load.returncode != 0:
        fail(f"fio ended with exit code {load.returncode}")
    written = float(load.stdout.read().split(";")[46]) * 1024 / options.seconds / 1e6
    ages.sort()
    at = lambda share: ages[min(len(ages) - 1, int(len(ages) * share))]  # noqa: E731
    overloads = sum(volume["overloads"] for volume in pair.status()["volumes"].values())
    print("| written MB/s | seconds | recovery point age p50 s | p99 s | max s | overloads |\n| --- | --- | --- | --- | --- | --- |")
    figures = f"{at(0.5):.2f} | {at(0.99):.2f} | {ages[-1]:.2f}"
    print(f"| {written:.1f} | {options.seconds} | {figures} | {overloads} |")


if __name__ == "__main__":
    main()
