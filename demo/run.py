#!/usr/bin/env python3
"""The main job on a real disk image: replicate, change, kill, restore, compare. Prints a table and `identical`.

usage: run.py BIN_DIR [--size-mib 1024] [--keep]

Everything happens on loopback in a new temporary directory, with the local store (file://). Needs root, for the loop mount
through which the image's files are changed.
"""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time

from lab import Pair, build_image, change_files, changed_bytes, fail, process_cpu, process_peak, tree_bytes

MIB = 1 << 20


def say(text):
    print(f"\n== {text}", flush=True)


class Demo(Pair):
    def __init__(self, bin_dir, folder):
        super().__init__(bin_dir, folder)
        self.image = os.path.join(folder, "disk.img")
        self.expected, self.rows = [], []

    def keep_copy(self):
        copy = os.path.join(self.folder, f"expected-{len(self.expected) + 1}.img")
        subprocess.run(["cp", "--reflink=auto", "--sparse=never", self.image, copy], check=True)
        self.expected.append(copy)

    def replicate(self, what, kill=False):
        stored, cpu, received = tree_bytes(self.store_dir), process_cpu(self.receiver.pid), self.received_bytes()
        sender = self.start_sender("disk", self.image)
        if kill:
            while self.received_bytes() - received < 24 * MIB and sender.poll() is None:
                time.sleep(0.01)
            if sender.returncode is not None:
                fail("the run was over before the receiver could be killed")
            cpu -= process_cpu(self.receiver.pid)
            self.kill_receiver()
            print("receiver: SIGKILL", flush=True)
            self.start_receiver()
            print("receiver: started again", flush=True)
        result, usage = self.finish_sender(sender)
        cpu = process_cpu(self.receiver.pid) - cpu
        peak = max(process_peak(self.receiver.pid), self.receiver_usage.peak)
        self.rows.append((what, result, tree_bytes(self.store_dir) - stored, usage, cpu, peak))
        return result

    def table(self):
        head = f"{'run':<20}{'read MiB':>10}{'sent MiB':>10}{'stored MiB':>11}{'seconds':>9}{'MB/s':>7}"
        print(head + f"{'sender CPU s':>14}{'peak MiB':>9}{'receiver CPU s':>16}{'peak MiB':>9}")
        for what, result, stored, usage, cpu, peak in self.rows:
            rate = result["bytes_read"] / 1e6 / max(result["seconds"], 1e-9)
            line = f"{what:<20}{result['bytes_read'] / MIB:>10.1f}{result['bytes_sent'] / MIB:>10.1f}{stored / MIB:>11.1f}"
            line += f"{result['seconds']:>9.2f}{rate:>7.0f}{usage.cpu:>14.2f}{usage.peak / MIB:>9.0f}"
            print(line + f"{cpu:>16.2f}{peak / MIB:>9.0f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin_dir")
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--keep", action="store_true", help="leave the temporary directory")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="blockferry-demo-", dir=os.environ.get("BLOCKFERRY_DEMO_DIR", "/var/tmp"))
    demo = Demo(arguments.bin_dir, folder)
    try:
        run(demo, arguments.size_mib)
    finally:
        demo.close()
        if arguments.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def run(demo, size_mib):
    say("1. a real ext4 image")
    build_image(demo.image, size_mib, demo.folder)
    demo.keep_copy()

    say("2. a receiver, a passphrase, a registered sender")
    demo.start_receiver()
    demo.register()

    say("3. first replication")
    demo.replicate("first replication")

    say("4. 1 % of the pages change, replicate again")
    change_files(demo.image, demo.folder, 0.01, seed=1)
    changed = changed_bytes(demo.expected[-1], demo.image)
    demo.keep_copy()
    result = demo.replicate("1 % changed")
    ratio = result["bytes_sent"] / changed
    print(f"changed {changed} bytes, sent {result['bytes_sent']} bytes: {ratio:.3f} × the changed bytes")
    if ratio > 1.4:
        fail("more than 1.4 × the changed bytes travelled")

    say("5. 20 % change; the receiver is killed in the middle of the run")
    change_files(demo.image, demo.folder, 0.20, seed=2)
    demo.keep_copy()
    result = demo.replicate("receiver killed", kill=True)
    print(f"records sent {result['records_sent']}, sent again although staged {result['records_resent']}")
    if result["records_resent"] != 0:
        fail("records that were staged travelled twice")

    say("6. restore every point, compare, check the file system")
    command = [demo.program("blockferry"), "points", "--store", demo.store, "--volume", "disk"]
    subprocess.run(command, check=True)
    points = json.loads(subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE).stdout)
    if len(points) != len(demo.expected):
        fail(f"{len(points)} points, expected {len(demo.expected)}")
    target, key = os.path.join(demo.folder, "restored.img"), os.path.join(demo.state, "blockferry.key")
    for point, expected in zip(points, demo.expected):
        restore = ["restore", "--store", demo.store, "--volume", "disk", "--point", point["id"], "--to", target]
        subprocess.run([demo.program("blockferry"), *restore, "--key-file", key], check=True)
        subprocess.run(["cmp", target, expected], check=True)
        subprocess.run(["e2fsck", "-fn", target], check=True, stdout=subprocess.DEVNULL)
        print(f"point {point['id']}: identical, file system clean", flush=True)
        os.unlink(target)
    subprocess.run([demo.program("blockferry"), "verify", "--store", demo.store, "--volume", "disk"], check=True)
    demo.stop_receiver()

    say("7. figures")
    demo.table()
    print("identical")


if __name__ == "__main__":
    main()
