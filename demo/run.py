#!/usr/bin/env python3
"""The main job on a real disk image: replicate, change, kill, restore, compare. Prints a table and `identical`.

usage: run.py BIN_DIR [--size-mib 1024] [--keep]

Everything happens on loopback in a new temporary directory, with the local store (file://). Needs root, for the loop mount
through which the image's files are changed.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

PAGE = 4096
SOURCES = ["/usr/bin", "/usr/sbin", "/usr/share", "/usr/include", "/usr/libexec", "/usr/lib"]


def say(text):
    print(f"\n== {text}", flush=True)


def fail(text):
    print(f"demo: {text}", file=sys.stderr)
    sys.exit(1)


def build_image(image, size_mib, folder):
    """An ext4 image of this size, some two thirds of it filled with this machine's own files, every block allocated."""
    tree = os.path.join(folder, "tree")
    budget = size_mib * 2 // 3 << 20
    files = []
    for top in SOURCES:
        for place, dirs, names in os.walk(top):
            dirs.sort()
            for name in sorted(names):
                path = os.path.join(place, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    files.append((path, os.path.getsize(path)))
    random.Random(42).shuffle(files)
    used = 0
    for path, length in files:
        rounded = (length + PAGE - 1) // PAGE * PAGE
        if length > 100 << 20 or used + rounded > budget:
            continue
        target = tree + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(path, target)
        used += rounded
    with open(image + ".sparse", "wb") as disk:
        disk.truncate(size_mib << 20)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", "-d", tree, image + ".sparse"],
        check=True,
    )
    subprocess.run(["cp", "--sparse=never", image + ".sparse", image], check=True)  # a device has no holes
    os.unlink(image + ".sparse")
    shutil.rmtree(tree)
    os.sync()
    print(f"{size_mib} MiB ext4 with {used >> 20} MiB of files")


def change_pages(image, folder, share, seed):
    """Overwrites about this share of the image's pages, inside its files, through a mount: the file system stays sound."""
    mount = os.path.join(folder, "mnt")
    os.makedirs(mount, exist_ok=True)
    subprocess.run(["mount", "-o", "loop,noatime", image, mount], check=True)
    try:
        files = []
        for place, dirs, names in os.walk(mount):
            dirs.sort()
            for name in sorted(names):
                path = os.path.join(place, name)
                files.append((path, os.path.getsize(path) // PAGE))
        rng = random.Random(seed)
        pages = [(path, page) for path, count in files for page in range(count)]
        for turn, (path, page) in enumerate(sorted(rng.sample(pages, int(os.path.getsize(image) // PAGE * share)))):
            with open(path, "r+b") as file:
                file.seek(page * PAGE)
                # Half random bytes, half bytes that compress as text does.
                content = rng.randbytes(PAGE) if turn & 1 else (b"%020d blockferry " % rng.getrandbits(60)) * (PAGE // 32)
                file.write(content[:PAGE])
    finally:
        subprocess.run(["umount", mount], check=True)
    os.sync()


def changed_bytes(before, after):
    changed = 0
    with open(before, "rb") as left, open(after, "rb") as right:
        while True:
            a, b = left.read(1 << 20), right.read(1 << 20)
            if not a:
                return changed
            if a != b:
                changed += sum(PAGE for at in range(0, len(a), PAGE) if a[at : at + PAGE] != b[at : at + PAGE])


class Usage:
    """CPU seconds and peak memory of one end, over all its processes."""

    def __init__(self):
        self.cpu, self.peak = 0.0, 0

    def wait(self, process):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu += usage.ru_utime + usage.ru_stime
        self.peak = max(self.peak, usage.ru_maxrss << 10)
        return process.returncode


class Demo:
    def __init__(self, bin_dir, folder):
        self.bin, self.folder = bin_dir, folder
        self.data, self.state = os.path.join(folder, "receiver"), os.path.join(folder, "sender")
        self.store = "file://" + os.path.join(folder, "store")
        self.image = os.path.join(folder, "disk.img")
        self.receiver, self.listen, self.metrics = None, None, None
        self.rows, self.receiver_usage = [], Usage()

    def program(self, name):
        return os.path.join(self.bin, name)

    def start_receiver(self):
        listen = self.listen or "127.0.0.1:0"
        endpoint = os.path.join(self.data, "endpoint.json")
        if os.path.exists(endpoint):
            os.unlink(endpoint)
        log = open(os.path.join(self.folder, "receiver.log"), "ab")
        self.receiver = subprocess.Popen(
            [self.program("blockferry-receiver"), "run", "--data-dir", self.data, "--store", self.store]
            + ["--listen", listen, "--metrics-listen", "127.0.0.1:0"],
            stderr=log,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.receiver.poll() is not None:
                fail(f"the receiver ended; see {log.name}:\n" + open(log.name).read()[-2000:])
            if os.path.exists(endpoint):
                with open(endpoint) as file:
                    where = json.load(file)
                self.listen, self.metrics = where["listen"], where["metrics"]
                return
            time.sleep(0.02)
        fail("the receiver did not get ready in two minutes")

    def kill_receiver(self):
        self.receiver.send_signal(signal.SIGKILL)
        self.receiver_usage.wait(self.receiver)

    def metric(self, name):
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(name) and line[len(name)] in " {":
                    return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stored_bytes(self):
        total = 0
        for place, _, names in os.walk(os.path.join(self.folder, "store")):
            total += sum(os.path.getsize(os.path.join(place, name)) for name in names)
        return total

    def replicate(self, what, kill=False):
        stored, cpu = self.stored_bytes(), self.receiver_cpu()
        received = self.metric("blockferry_receiver_received_bytes_total")
        sender = subprocess.Popen(
            [self.program("blockferry-sender"), "run", "--once", "--json", "--state-dir", self.state]
            + ["--volume", "disk=" + self.image, "--metrics-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
        )
        if kill:
            while self.metric("blockferry_receiver_received_bytes_total") - received < 24 << 20 and sender.poll() is None:
                time.sleep(0.01)
            if sender.returncode is not None:
                fail("the run was over before the receiver could be killed")
            print("receiver: SIGKILL")
            cpu -= self.receiver_cpu()
            self.kill_receiver()
            self.start_receiver()
            cpu += self.receiver_cpu()
            print("receiver: started again")
        output = sender.stdout.read()
        usage = Usage()
        if usage.wait(sender) != 0:
            fail(f"the sender ended with code {sender.returncode}")
        result = json.loads(output)
        peak = self.receiver_peak()
        self.rows.append(
            (what, result, self.stored_bytes() - stored, usage, self.receiver_cpu() - cpu, max(peak, self.receiver_usage.peak))
        )
        return result

    def receiver_cpu(self):
        with open(f"/proc/{self.receiver.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def receiver_peak(self):
        with open(f"/proc/{self.receiver.pid}/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

    def table(self):
        mib = 1 << 20
        head = f"{'run':<22}{'read MiB':>10}{'sent MiB':>10}{'stored MiB':>11}{'seconds':>9}{'MB/s':>8}"
        print(head + f"{'sender CPU s':>14}{'peak MiB':>10}{'receiver CPU s':>16}{'peak MiB':>10}")
        for what, result, stored, usage, cpu, peak in self.rows:
            rate = result["bytes_read"] / 1e6 / max(result["seconds"], 1e-9)
            line = f"{what:<22}{result['bytes_read'] / mib:>10.1f}{result['bytes_sent'] / mib:>10.1f}{stored / mib:>11.1f}"
            line += f"{result['seconds']:>9.2f}{rate:>8.0f}{usage.cpu:>14.2f}{usage.peak / mib:>10.0f}"
            print(line + f"{cpu:>16.2f}{peak / mib:>10.0f}")


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
        if demo.receiver and demo.receiver.returncode is None:
            demo.receiver.kill()
            demo.receiver.wait()
        if arguments.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def run(demo, size_mib):
    images = []

    def keep_copy():
        copy = os.path.join(demo.folder, f"expected-{len(images) + 1}.img")
        subprocess.run(["cp", "--reflink=auto", "--sparse=never", demo.image, copy], check=True)
        images.append(copy)

    say("1. a real ext4 image")
    build_image(demo.image, size_mib, demo.folder)
    keep_copy()

    say("2. a receiver, a passphrase, a registered sender")
    demo.start_receiver()
    passphrase = os.path.join(demo.folder, "passphrase.txt")
    with open(passphrase, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        fleet = ["--data-dir", demo.data, "--store", demo.store]
        subprocess.run([demo.program("blockferry-receiver"), "passphrase", "create", *fleet], stdout=file, check=True)
    register = ["register", "-i", demo.listen, "-P", passphrase, "--state-dir", demo.state, "--name", "demo"]
    subprocess.run([demo.program("blockferry-sender"), *register], check=True)

    say("3. first replication")
    demo.replicate("first replication")

    say("4. 1 % of the pages change, replicate again")
    change_pages(demo.image, demo.folder, 0.01, seed=1)
    changed = changed_bytes(images[-1], demo.image)
    keep_copy()
    result = demo.replicate("1 % changed")
    ratio = result["bytes_sent"] / changed
    print(f"changed {changed} bytes, sent {result['bytes_sent']} bytes: {ratio:.3f} × the changed bytes")
    if ratio > 1.4:
        fail("more than 1.4 × the changed bytes travelled")

    say("5. 20 % change; the receiver is killed in the middle of the run")
    change_pages(demo.image, demo.folder, 0.20, seed=2)
    keep_copy()
    result = demo.replicate("receiver killed", kill=True)
    print(f"records sent {result['records_sent']}, sent again although staged {result['records_resent']}")
    if result["records_resent"] != 0:
        fail("records that were staged travelled twice")

    say("6. restore every point, compare, check the file system")
    points_command = [demo.program("blockferry"), "points", "--store", demo.store, "--volume", "disk"]
    subprocess.run(points_command, check=True)
    points = json.loads(subprocess.run([*points_command, "--json"], check=True, capture_output=True).stdout)
    if len(points) != len(images):
        fail(f"{len(points)} points, expected {len(images)}")
    for point, expected in zip(points, images):
        target = os.path.join(demo.folder, "restored.img")
        restore = ["restore", "--store", demo.store, "--volume", "disk", "--point", point["id"], "--to", target]
        key = os.path.join(demo.state, "blockferry.key")
        subprocess.run([demo.program("blockferry"), *restore, "--key-file", key], check=True)
        subprocess.run(["cmp", target, expected], check=True)
        subprocess.run(["e2fsck", "-fn", target], check=True, stdout=subprocess.DEVNULL)
        os.unlink(target)
    subprocess.run([demo.program("blockferry"), "verify", "--store", demo.store, "--volume", "disk"], check=True)
    demo.receiver.terminate()
    if demo.receiver_usage.wait(demo.receiver) not in (0, 128 + signal.SIGTERM):
        fail(f"the receiver did not drain cleanly: code {demo.receiver.returncode}")

    say("7. figures")
    demo.table()
    print("identical")


if __name__ == "__main__":
    main()
