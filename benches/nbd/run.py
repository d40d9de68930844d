#!/usr/bin/env python3
"""Random writes through the sender's nbd beside nbdkit's file plugin and qemu-nbd: the same fio job, interleaved, in one run.

usage: run.py BIN_DIR [--size-mib 1024] [--seconds 10] [--rounds 3]

Each server serves a file of its own with the same content. The sender replicates all the while to a receiver with a local store on
the same cores, which the other two do not do: its figure is that of the whole path. What counts are the ratios.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "demo"))
from live import LivePair, filled, fio, wait_for  # noqa: E402


class Server:
    def __init__(self, name, folder, size_mib):
        self.name, self.socket = name, os.path.join(folder, name + ".sock")
        self.disk = os.path.join(folder, name + ".img")
        filled(self.disk, size_mib)

    def uri(self):
        return f"nbd+unix:///disk?socket={self.socket}"

    def ready(self):
        wait_for(self.name, lambda: subprocess.run(["nbdinfo", "--size", self.uri()], capture_output=True).returncode == 0)


class Peer(Server):
    def __init__(self, name, folder, size_mib, command):
        super().__init__(name, folder, size_mib)
        words = [word.format(socket=self.socket, disk=self.disk) for word in command]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        self.ready()

    def settle(self):
        pass

    def close(self):
        self.process.kill()
        self.process.wait()


class Blockferry(Server):
    def __init__(self, folder, size_mib, bin_dir):
        super().__init__("blockferry", folder, size_mib)
        self.pair = LivePair(bin_dir, os.path.join(folder, "pair"))
        self.pair.protect([f"disk={self.disk},capture=nbd,listen={self.socket}"])
        self.ready()
        self.pair.first_point("disk")

    def settle(self):
        """All of the last round is committed: it does not take from the next one's time."""
        self.pair.first_point("disk")

    def overloads(self):
        return sum(volume["overloads"] for volume in self.pair.status()["volumes"].values())

    def close(self):
        self.pair.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-bench-") as folder:
        size = options.size_mib
        blockferry = Blockferry(folder, size, options.bin_dir)
        servers = [
            blockferry,
            Peer("nbdkit", folder, size, ["nbdkit", "-f", "-e", "disk", "-U", "{socket}", "file", "{disk}"]),
            Peer("qemu-nbd", folder, size, ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "disk", "-k", "{socket}", "{disk}"]),
        ]
        try:
            measure(servers, options)
            print(f"blockferry was overloaded {blockferry.overloads()} times (page sets only, points later)")
        finally:
            for server in servers:
                server.close()


def measure(servers, options):
    print("| job | server | IOPS | MB/s | p50 µs | p99 µs | Blockferry is at |\n| --- | --- | --- | --- | --- | --- | --- |")
    for block, depth in [("4k", 1), ("4k", 16), ("8k", 1), ("8k", 16)]:
        results = {server.name: [] for server in servers}
        for turn in range(options.rounds):
            for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
                job = ["--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite", f"--bs={block}", f"--iodepth={depth}"]
                job += [f"--size={options.size_mib}M", "--time_based", f"--runtime={options.seconds}", "--randrepeat=0"]
                results[server.name].append(fio("writes", *job, "--buffer_compress_percentage=50", "--refill_buffers"))
                server.settle()
        def median(name, figure):
            return statistics.median(result[figure] for result in results[name])
        for server in servers:
            ratio = median("blockferry", "iops") / median(server.name, "iops")
            beside = "" if server.name == "blockferry" else f"{ratio:.2f} ×"
            figures = [f"{median(server.name, figure):,.0f}" for figure in ("iops", "mb_s", "p50_us", "p99_us")]
            print(f"| random {block}, depth {depth} | {server.name} | {' | '.join(figures)} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
