#!/usr/bin/env python3
"""Upload to and restore from an object store, beside rclone copying the same bytes to and from the same server.

usage: run.py BIN_DIR TOOLS_DIR [--size-mib 1024] [--rounds 3]

The image is random, so that both move the same bytes. Blockferry's upload is the whole way: read, sealed, sent, staged
durably, uploaded, committed; its restore reads, checks, opens and writes. rclone copies the file with as many streams
and parts of the same size, without hashing it first. Interleaved, round after round; figures are medians.
"""
import argparse
import filecmp
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from lab import Pair, fail  # noqa: E402
from server import BUCKET, SeaweedFs, metrics  # noqa: E402


def timed(command, environment):
    start = time.monotonic()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    os.sync()
    if done.returncode != 0:
        fail(f"{command[0]} ended with exit code {done.returncode}")
    return time.monotonic() - start


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bin_dir")
    arguments.add_argument("tools_dir")
    arguments.add_argument("--size-mib", type=int, default=1024)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-store-") as folder:
        server = SeaweedFs(given.tools_dir, folder)
        try:
            bench(given, folder, server)
        finally:
            server.close()


def bench(given, folder, server):
    os.environ.update(server.environment())
    rclone = {**os.environ, **server.rclone()}
    rclone.pop("AWS_CA_BUNDLE", None)  # an authority of the machine's own, which rclone 1.60 can't load
    flags = ["--s3-chunk-size", "8M", "--s3-upload-concurrency", "4", "--s3-disable-checksum", "--s3-no-check-bucket"]
    flags += ["--multi-thread-streams", "4", "--multi-thread-cutoff", "1M", "--ignore-checksum", "--quiet"]
    image = os.path.join(folder, "disk.img")
    size = given.size_mib << 20
    seconds = {"upload": {"blockferry": [], "rclone": []}, "restore": {"blockferry": [], "rclone": []}}
    for turn in range(given.rounds):
        with open(image, "wb") as disk:
            for _ in range(given.size_mib):
                disk.write(os.urandom(1 << 20))
        os.sync()
        place = os.path.join(folder, f"round-{turn}")
        os.makedirs(place)
        pair = Pair(given.bin_dir, place)
        pair.store = f"s3://{BUCKET}/round-{turn}"
        pair.start_receiver()
        try:
            pair.register()
            start = time.monotonic()
            pair.finish_sender(pair.start_sender("disk", image))
            os.sync()
            seconds["upload"]["blockferry"].append(time.monotonic() - start)
            requests, sent = metrics(pair.metrics, "blockferry_store_requests_total"), metrics(pair.metrics, "blockferry_store_sent_bytes_total")
        finally:
            pair.close()
        remote = f"store:{BUCKET}/rclone-{turn}"
        seconds["upload"]["rclone"].append(timed(["rclone", "copyto", *flags, image, remote], rclone))
        target = os.path.join(folder, "restored.img")
        restore = [pair.program("blockferry"), "restore", "--store", pair.store, "--volume", "disk", "--to", target]
        restore += ["--key-file", os.path.join(pair.state, "blockferry.key")]
        seconds["restore"]["blockferry"].append(timed(restore, os.environ))
        if not filecmp.cmp(image, target, shallow=False):
            fail("the restored image differs")
        os.unlink(target)
        seconds["restore"]["rclone"].append(timed(["rclone", "copyto", *flags, remote, target], rclone))
        os.unlink(target)
        print(f"round {turn + 1} of {given.rounds} done", flush=True)
    version = subprocess.run(["rclone", "version"], stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()[0]
    print(f"\n{given.size_mib} MiB of random bytes, SeaweedFS on the same machine, {version}, {given.rounds} rounds, medians")
    print(f"{'':<10}{'Blockferry s':>14}{'MB/s':>8}{'rclone s':>10}{'MB/s':>8}{'at of rclone':>14}")
    for what, by in seconds.items():
        ours, theirs = statistics.median(by["blockferry"]), statistics.median(by["rclone"])
        print(f"{what:<10}{ours:>14.2f}{size / 1e6 / ours:>8.0f}{theirs:>10.2f}{size / 1e6 / theirs:>8.0f}{theirs / ours:>12.2f} ×")
    total = sum(requests.values())
    print(f"requests of one upload: {total:.0f} ({total / (size / (1 << 30)):.0f} per GiB): {dict(sorted(requests.items()))}; {sum(sent.values()) / (1 << 20):.0f} MiB sent")


if __name__ == "__main__":
    main()
