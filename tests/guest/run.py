#!/usr/bin/env python3
"""Tracking in a guest: an LVM and an md volume under two of Debian's cloud kernels, and a machine that is killed hard between.

usage: run.py BIN_DIR CACHE_DIR

QEMU emulates the machine (TCG), so that this runs anywhere. The guest registers with a receiver on this host, tracks both volumes by
their bios, and is killed while it writes. It comes up again with another kernel: pins are gone, offsets of kernel structures
moved. Its last points have to equal its disks, and to have taken less than a full copy.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "demo"))
from lab import Pair, fail  # noqa: E402

KERNELS = ["linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64"]
MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "dm_mod", "raid1", "ext4", "crc32c_generic"]
PROGRAMS = ["/usr/sbin/lvm", "/usr/sbin/mdadm", "/usr/sbin/mke2fs", "/usr/bin/dd", "/usr/bin/sha256sum", "/usr/bin/od"]
DISK_MIB = 64


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel(meta, cache):
    """Fetches a kernel's package and unpacks it, without installing it on this machine; its folder and version."""
    package = next(line.split()[1] for line in output("apt-cache", "depends", meta).splitlines() if "Depends:" in line)
    folder = os.path.join(cache, "kernels", package)
    if not os.path.exists(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", "-q", package], cwd=scratch, check=True)
            subprocess.run(["dpkg-deb", "-x", os.path.join(scratch, os.listdir(scratch)[0]), folder + ".part"], check=True)
        os.rename(folder + ".part", folder)
    version = os.listdir(os.path.join(folder, "lib", "modules"))[0]
    subprocess.run(["depmod", "-b", folder, version], check=True)
    return folder, version


def install(root, path):
    """Copies a program and the libraries that it needs."""
    for file in [path, *re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", path], capture_output=True, text=True).stdout)]:
        target = root + file
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(os.path.realpath(file), target)
        os.chmod(target, 0o755)


def modules(root, folder, version, names):
    """Copies kernel modules and those that they need."""
    for module in names:
        shown = subprocess.run(["modprobe", "-d", folder, "-S", version, "--show-depends", module], capture_output=True, text=True)
        for line in shown.stdout.splitlines():
            if line.startswith("insmod "):
                source = line.split()[1]
                target = root + source[len(folder) :]
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copy(source, target)
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        shutil.copy(os.path.join(folder, "lib/modules", version, name), os.path.join(root, "lib/modules", version, name))
    subprocess.run(["depmod", "-b", root, version], check=True)


def initramfs(root, folder, version, bin_dir, passphrase):
    for path in PROGRAMS:
        install(root, path)
    busybox = shutil.which("busybox")
    os.makedirs(root + "/bin")
    shutil.copy(busybox, root + "/bin/busybox")
    sender = os.path.join(bin_dir, "blockferry-sender")
    install(root, sender)
    os.makedirs(root + "/usr/bin", exist_ok=True)
    os.rename(root + sender, root + "/usr/bin/blockferry-sender")
    modules(root, folder, version, MODULES)
    for name in ("dev", "proc", "sys", "etc"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    shutil.copy(passphrase, root + "/passphrase.txt")
    init = os.path.join(os.path.dirname(os.path.abspath(__file__)), "init.sh")
    shutil.copy(init, root + "/init")
    os.chmod(root + "/init", 0o755)
    image = root + ".cpio.gz"
    with open(image, "wb") as out:
        subprocess.run(f"cd {root} && find . | cpio -o -H newc --quiet | gzip -1", shell=True, stdout=out, check=True)
    return image


class Guest:
    def __init__(self, folder, version, image, disks, phase, receiver):
        command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024", "-nographic", "-no-reboot"]
        command += ["-kernel", os.path.join(folder, "boot", "vmlinuz-" + version), "-initrd", image]
        command += ["-append", f"console=ttyS0 quiet panic=-1 phase={phase} receiver={receiver}"]
        command += ["-nic", "user,model=virtio-net-pci"]
        for disk in disks:
            command += ["-drive", f"file={disk},format=raw,if=virtio,cache=writethrough"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace")
        self.said = []

    def until(self, marker, seconds):
        """Reads what the guest says until it says `marker`."""
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.start()
        for line in self.process.stdout:
            line = line.rstrip()
            print("  " + line, flush=True)
            if "GUEST: " in line:
                said = line.split("GUEST: ", 1)[1]
                self.said.append(said)
                if said.startswith("failed"):
                    print(self.process.stdout.read())
                    alarm.cancel()
                    fail(f"the guest {said}")
                if said == marker:
                    alarm.cancel()
                    return
        alarm.cancel()
        self.kill()
        fail(f'the guest did not say "{marker}"')

    def kill(self):
        self.process.kill()
        self.process.wait()

    def facts(self, kind):
        """What it said last of each name."""
        return {words[1]: words[2] for words in (line.split(" ", 2) for line in self.said) if words[0] == kind}


def main():
    bin_dir, cache = sys.argv[1:3]
    kernels = [kernel(meta, cache) for meta in KERNELS]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-guest-") as work:
        pair = Pair(bin_dir, os.path.join(work, "pair"))
        os.makedirs(pair.folder)
        pair.start_receiver()
        try:
            run(pair, work, kernels)
        finally:
            pair.close()


def run(pair, work, kernels):
    passphrase = os.path.join(work, "passphrase.txt")
    with open(passphrase, "wb") as file:
        fleet = ["--data-dir", pair.data, "--store", pair.store]
        subprocess.run([pair.program("blockferry-receiver"), "passphrase", "create", *fleet], stdout=file, check=True)
    disks = []
    for name, mib in [("state", 256), ("pv", DISK_MIB), ("raid0", DISK_MIB), ("raid1", DISK_MIB)]:
        disks.append(os.path.join(work, name))
        with open(disks[-1], "wb") as disk:
            disk.truncate(mib << 20)
            if name != "state":
                disk.seek(4 << 20)
                disk.write(os.urandom(16 << 20) if name != "raid1" else b"")
    # Both halves of the mirror hold the same, since it is said to be clean.
    shutil.copy(disks[2], disks[3])
    receiver = "10.0.2.2:" + pair.listen.rsplit(":", 1)[1]
    images = []
    for number, (folder, version) in enumerate(kernels):
        images.append(initramfs(os.path.join(work, f"root{number}"), folder, version, pair.bin, passphrase))
    first = Guest(*kernels[0], images[0], disks, "first", receiver)
    first.until("under load", 600)
    time.sleep(3)
    first.kill()
    print("  -- killed --", flush=True)
    second = Guest(*kernels[1], images[1], disks, "second", receiver)
    second.until("done", 600)
    second.process.wait(60)
    key = os.path.join(work, "blockferry.key")
    subprocess.run(["debugfs", "-R", f"dump /sender/blockferry.key {key}", disks[0]], check=True, capture_output=True)
    for volume, expected in second.facts("sha256").items():
        restored = os.path.join(work, volume + ".restored")
        restore = ["restore", "--store", pair.store, "--volume", volume, "--key-file", key, "--to", restored]
        point = json.loads(second.facts("point")[volume])
        subprocess.run([pair.program("blockferry"), *restore, "--point", find_id(point)], check=True)
        with open(restored, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            fail(f"the last point of {volume} differs from the guest's disk")
        print(f"{volume}: the last point equals the disk after a hard kill and a change of the kernel")
    sent = sum(float(line.rsplit(" ", 1)[1]) for line in second.said if line.startswith("metric blockferry_sender_sent_bytes_total"))
    print(f"sent again after the kill: {sent / 1e6:.1f} MB of {2 * DISK_MIB} MiB")
    if sent > DISK_MIB << 19:
        fail("a full copy travelled again")


def find_id(value):
    if isinstance(value, dict):
        return value["id"] if "id" in value else next((found for found in map(find_id, value.values()) if found), None)
    return next((found for found in map(find_id, value) if found), None) if isinstance(value, list) else None


if __name__ == "__main__":
    main()
