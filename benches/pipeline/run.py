#!/usr/bin/env python3
"""The whole path beside its peers: real binaries, a real image, loopback, everything durable at the end.

usage: run.py BIN_DIR [--size-mib 4096] [--rounds 3]

Peers: restic into a local repository, an rsync daemon with zstd, and `zstd -1` piped into a file. All run interleaved, round after
round, in the same run on the same image with a warm page cache; figures are medians over the rounds, and what counts are the
ratios. The second table is the same after 1 % of the image's 4 KiB pages changed.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from lab import Pair, build_image, change_pages, fail, process_cpu, process_peak, tree_bytes  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30


class Measured:
    def __init__(self, seconds, cpu, peak, added):
        self.seconds, self.cpu, self.peak, self.added = seconds, cpu, peak, added


def run_command(command, added_in, **options):
    """Runs a command, syncs, and measures both, with the command's CPU and peak memory."""
    before, start = tree_bytes(added_in), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    seconds = time.monotonic() - start
    if process.returncode != 0:
        fail(f"{command[0]} ended with exit code {process.returncode}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, [usage.ru_maxrss << 10], tree_bytes(added_in) - before)


class Blockferry:
    name = "blockferry"

    def __init__(self, folder, bin_dir):
        os.makedirs(folder)
        self.pair = Pair(bin_dir, folder)
        self.pair.start_receiver()
        self.pair.register()

    def run(self, image):
        pair = self.pair
        before, cpu, start = tree_bytes(pair.store_dir), process_cpu(pair.receiver.pid), time.monotonic()
        result, usage = pair.finish_sender(pair.start_sender("disk", image))
        os.sync()
        seconds = time.monotonic() - start
        cpu = process_cpu(pair.receiver.pid) - cpu
        peak = [usage.peak, process_peak(pair.receiver.pid)]
        measured = Measured(seconds, usage.cpu + cpu, peak, tree_bytes(pair.store_dir) - before)
        measured.sent = result["bytes_sent"]
        return measured

    def close(self):
        self.pair.close()


class Restic:
    name = "restic"

    def __init__(self, folder, _):
        os.makedirs(folder)
        self.folder = folder
        self.environment = dict(
            os.environ,
            RESTIC_REPOSITORY=os.path.join(folder, "repository"),
            RESTIC_PASSWORD="bench",
            RESTIC_CACHE_DIR=os.path.join(folder, "cache"),
        )
        subprocess.run(["restic", "init", "--quiet"], env=self.environment, check=True)

    def run(self, image):
        return run_command(["restic", "backup", "--quiet", image], self.folder, env=self.environment)

    def close(self):
        pass


class Rsync:
    name = "rsync, zstd 1"

    def __init__(self, folder, _):
        self.target = os.path.join(folder, "target")
        os.makedirs(self.target)
        self.config = os.path.join(folder, "rsyncd.conf")
        with open(self.config, "w") as file:
            file.write(f"use chroot = no\nuid = root\ngid = root\n[bench]\npath = {self.target}\nread only = no\n")

    def run(self, image):
        # One daemon for each connection, over a pipe in place of a socket: no port to be free.
        shell = f"sh -c 'exec rsync --server --daemon --config={self.config} .'"
        command = ["rsync", "--rsh", shell, "--inplace", "--compress", "--compress-choice=zstd", "--compress-level=1", "--checksum-choice=xxh3"]
        whole = not os.path.exists(os.path.join(self.target, os.path.basename(image)))
        # An image that only changed inside has the same size; its time tells rsync to look.
        os.utime(image)
        mode = ["--whole-file"] if whole else ["--no-whole-file"]
        return run_command([*command, *mode, image, "bench::bench/"], self.target, stderr=subprocess.DEVNULL)

    def close(self):
        pass


class ZstdPipe:
    name = "zstd -1 pipe"

    def __init__(self, folder, _):
        os.makedirs(folder)
        self.folder, self.count = folder, 0

    def run(self, image):
        self.count += 1
        target = os.path.join(self.folder, f"{self.count}.zst")
        return run_command(["sh", "-c", 'cat "$1" | zstd -q -1 -T2 > "$2"', "sh", image, target], self.folder)

    def close(self):
        pass


def print_table(title, image_bytes, runs):
    print(f"\n{title}")
    print(f"{'':<16}{'seconds':>9}{'MB/s':>7}{'CPU s/GiB':>11}{'peak MiB':>14}{'added MiB':>11}{'speed ratio to':>16}")
    medians = {name: statistics.median(m.seconds for m in measured) for name, measured in runs.items()}
    for name, measured in runs.items():
        cpu = statistics.median(m.cpu for m in measured) / (image_bytes / GIB)
        peak = " + ".join(str(max(m.peak[end] for m in measured) >> 20) for end in range(len(measured[0].peak)))
        added = statistics.median(m.added for m in measured) / MIB
        ratio = f"{medians[name] / medians['blockferry']:.2f} ×"
        line = f"{name:<16}{medians[name]:>9.2f}{image_bytes / 1e6 / medians[name]:>7.0f}{cpu:>11.2f}{peak:>14}"
        print(line + f"{added:>11.1f}{ratio:>16}")
    return {name: seconds / medians["blockferry"] for name, seconds in medians.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="blockferry-bench-", dir=os.environ.get("BLOCKFERRY_BENCH_DIR", "/var/tmp"))
    tools = []
    try:
        image = os.path.join(folder, "disk.img")
        build_image(image, arguments.size_mib, folder)
        image_bytes = os.path.getsize(image)
        full, incremental = {}, {}
        for turn in range(arguments.rounds):
            present = [tool(os.path.join(folder, f"{turn}-{tool.__name__}"), arguments.bin_dir) for tool in (Blockferry, Restic, Rsync, ZstdPipe)]
            tools += present
            subprocess.run(["cat", image], stdout=subprocess.DEVNULL, check=True)
            for tool in present:
                full.setdefault(tool.name, []).append(tool.run(image))
            changed = change_pages(image, 0.01, seed=turn)
            for tool in present:
                incremental.setdefault(tool.name, []).append(tool.run(image))
            for tool in present:
                tool.close()
                shutil.rmtree(os.path.join(folder, f"{turn}-{type(tool).__name__}"))
            print(f"round {turn + 1} of {arguments.rounds} done", flush=True)
        first = print_table(f"full, {image_bytes >> 20} MiB image, medians of {arguments.rounds}", image_bytes, full)
        second = print_table(f"1 % of 4 KiB pages changed ({changed / MIB:.1f} MiB)", image_bytes, incremental)
        sent = statistics.median(m.sent for m in incremental["blockferry"])
        print(f"\nincremental: sent {sent / MIB:.1f} MiB, {sent / changed:.3f} × the changed bytes (limit 1.4)")
        print(f"full: {first['restic']:.2f} × restic (goal 1.5); incremental: {second['restic']:.2f} × restic (goal 5)")
    finally:
        for tool in tools:
            tool.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
