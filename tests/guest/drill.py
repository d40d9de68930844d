#!/usr/bin/env python3
"""Drills that boot: a disk with its own boot sector, one with a Debian kernel and an initramfs that mounts it, and one that never comes up.

usage: drill.py BIN_DIR CACHE_DIR

QEMU emulates the machine (TCG), so that this runs anywhere.
"""
import json
import os
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "demo")]
from lab import Pair, fail  # noqa: E402
from run import KERNELS, kernel  # noqa: E402

MIB = 1 << 20
# Prints what follows it on the first serial port, byte by byte, and halts.
SECTOR_CODE = bytes.fromhex("fa 31c0 8ed8 be177c baf803 fc ac 84c0 7403 ee ebf8 f4 ebfd")
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
for module in $(cat /modules); do insmod /$module.ko; done
mkdir /disk
mount -t ext4 -o ro /dev/vda1 /disk && echo "found $(cat /disk/says)"
echo "guest login:"
exec sleep 100000
"""
MODULES = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"]


def disk_image(path, says):
    """One ext4 partition behind a boot sector that says something."""
    with tempfile.TemporaryDirectory() as tree:
        with open(os.path.join(tree, "says"), "w") as file:
            file.write("the file system\n")
        with open(path + ".part", "wb") as part:
            part.truncate(16 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, path + ".part"], check=True)
    sector = (SECTOR_CODE + says.encode() + b"\0").ljust(446, b"\0")
    sector += struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 2048, 32768) + bytes(48) + b"\x55\xaa"
    with open(path, "wb") as disk, open(path + ".part", "rb") as part:
        disk.write(sector.ljust(MIB, b"\0") + part.read())
    os.unlink(path + ".part")


def initramfs(root, folder, version):
    os.makedirs(root + "/bin")
    subprocess.run(["cp", subprocess.run(["which", "busybox"], capture_output=True, text=True, check=True).stdout.strip(), root + "/bin/busybox"], check=True)
    names = []
    for module in MODULES:
        shown = subprocess.run(["modprobe", "-d", folder, "-S", version, "--show-depends", module], capture_output=True, text=True)
        for line in shown.stdout.splitlines():
            if line.startswith("insmod "):
                source = line.split()[1]
                name = os.path.basename(source).removesuffix(".xz").removesuffix(".ko")
                if name not in names:
                    names.append(name)
                    packed = source.endswith(".xz")
                    command = f"xz -dc '{source}'" if packed else f"cat '{source}'"
                    subprocess.run(f"{command} > '{root}/{name}.ko'", shell=True, check=True)
    with open(root + "/modules", "w") as file:
        file.write("\n".join(names) + "\n")
    with open(root + "/init", "w") as file:
        file.write(INIT)
    os.chmod(root + "/init", 0o755)
    for name in ("dev", "proc", "sys"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    image = root + ".cpio.gz"
    with open(image, "wb") as out:
        subprocess.run(f"cd {root} && find . | cpio -o -H newc --quiet | gzip -1", shell=True, stdout=out, check=True)
    return image


def drill(pair, volume, code, *flags):
    command = [pair.program("blockferry"), "drill", "--store", pair.store, "--volume", volume, "--scratch", pair.folder]
    command += ["--key-file", os.path.join(pair.state, "blockferry.key"), "--json", "--boot", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"  {volume}: exit code {done.returncode}; {done.stderr.strip().splitlines()[-1:]}", flush=True)
    if done.returncode != code:
        fail(f"{volume}: exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}")
    return done.stderr if code else json.loads(done.stdout)


def proof(pair, volume):
    points = subprocess.run(
        [pair.program("blockferry"), "points", "--store", pair.store, "--volume", volume, "--json"], stdout=subprocess.PIPE, check=True
    )
    return json.loads(points.stdout)[-1]["proof"]


def main():
    bin_dir, cache = sys.argv[1:3]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-drill-test-") as work:
        pair = Pair(bin_dir, os.path.join(work, "pair"))
        os.makedirs(pair.folder)
        pair.start_receiver()
        try:
            run(pair, work, kernel(KERNELS[0], cache))
        finally:
            pair.close()


def run(pair, work, booted_with):
    pair.register()
    for volume, says in [("up", "\r\nweb login: "), ("down", "\r\nno system\r\n")]:
        disk_image(os.path.join(work, volume), says)
        sender = pair.start_sender(volume, os.path.join(work, volume))
        pair.finish_sender(sender)
    report = drill(pair, "up", 0, "--boot-timeout", "5m")
    if report["boot"]["marker"] != "login:" or report["parts"][0]["state"] != "sound" or proof(pair, "up") != "booted":
        fail(f"the boot is not told as it was: {report}, {proof(pair, 'up')}")
    said = drill(pair, "down", 1, "--boot-timeout", "20s")
    if "no system" not in said or proof(pair, "down") != "checked":
        fail(f"what does not boot is not told as it was: {said}, {proof(pair, 'down')}")
    folder, version = booted_with
    image = initramfs(os.path.join(work, "root"), folder, version)
    flags = ["--kernel", os.path.join(folder, "boot", "vmlinuz-" + version), "--initrd", image, "--append", "console=ttyS0 quiet"]
    report = drill(pair, "down", 0, "--boot-timeout", "10m", "--boot-marker", "found the file system", *flags)
    if proof(pair, "down") != "booted":
        fail(f"it booted with a kernel, and is {proof(pair, 'down')}")
    print("drills that boot: a boot sector, a kernel and its initramfs, and a disk that does not come up, each told as it is")


if __name__ == "__main__":
    main()
