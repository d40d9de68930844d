#!/usr/bin/env python3
"""What tracking costs the machine that is tracked: the same fio job on the same loop device with and without, in pairs.

usage: run.py BIN_DIR [--size-mib 512] [--seconds 8] [--rounds 5]

With tracking the sender is attached and stopped in its tracks (SIGSTOP) for the first table, so that only the BPF programs are
measured; in the second it replicates meanwhile, on the same cores.
"""
import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from live import LivePair, filled, fio, loop_attach, loop_detach  # noqa: E402


def job(device, block, depth, options):
    flags = ["--ioengine=libaio", "--direct=1", f"--filename={device}", "--rw=randwrite", f"--bs={block}", f"--iodepth={depth}"]
    return fio("writes", *flags, "--time_based", f"--runtime={options.seconds}", "--randrepeat=0")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-bench-") as folder:
        disk = os.path.join(folder, "disk.img")
        filled(disk, options.size_mib)
        device = loop_attach(disk, "--direct-io=on")
        pair = LivePair(options.bin_dir, os.path.join(folder, "pair"))
        try:
            measure(pair, device, options)
        finally:
            pair.close()
            loop_detach(device)


def measure(pair, device, options):
    number = 0
    print("| job | what runs | IOPS without | IOPS with | with : without, median of pairs |\n| --- | --- | --- | --- | --- |")
    for block, depth in [("4k", 1), ("4k", 32)]:
        for what in ("tracking alone", "tracking and replication"):
            pairs = []
            for turn in range(options.rounds):
                def without():
                    return job(device, block, depth, options)["iops"]

                def tracked():
                    # A new volume each time: what was detached has to be adopted to go on.
                    nonlocal number
                    number += 1
                    pair.protect([f"disk{number}={device},capture=ebpf"], "--point-interval", "2s")
                    pair.first_point(f"disk{number}")
                    if what == "tracking alone":
                        pair.sender.send_signal(signal.SIGSTOP)
                    result = job(device, block, depth, options)["iops"]
                    pair.sender.send_signal(signal.SIGCONT)
                    pair.stop_sender()
                    detach(pair)
                    return result

                # Which comes first changes from pair to pair, since a loop device slows down and speeds up by itself.
                if turn % 2 == 0:
                    plain, with_tracking = without(), tracked()
                else:
                    with_tracking, plain = tracked(), without()
                pairs.append((plain, with_tracking))
            ratio = statistics.median(with_tracking / plain for plain, with_tracking in pairs)
            plain, with_tracking = (statistics.median(side) for side in zip(*pairs))
            print(f"| random {block}, depth {depth} | {what} | {plain:,.0f} | {with_tracking:,.0f} | {ratio:.3f} |", flush=True)


def detach(pair):
    """Without pins, else the next job without tracking would still be tracked."""
    subprocess.run(
        [pair.program("blockferry-sender"), "detach", "--all", "--state-dir", pair.state], check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
