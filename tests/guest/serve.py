#!/usr/bin/env python3
"""A guest that boots from a recovery point at once: its disk is `blockferry serve`, its writes an overlay.

usage: serve.py BIN_DIR CACHE_DIR

QEMU emulates the machine (TCG), so that this runs anywhere. The guest's root file system is an ext4 that was replicated. It boots from the
served point, writes and syncs a file, and is switched off; booted again over the same overlay, it finds what it wrote. The point
itself stays as it was.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

import run as tracking
from lab import Pair, fail

MODULES = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"]
ROOT_MIB, FILE_MIB = 96, 8

INITRAMFS_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec >/dev/ttyS0 2>&1 </dev/null
for module in virtio_pci virtio_blk ext4; do modprobe $module || { echo "GUEST: failed: modprobe $module"; poweroff -f; }; done
mount -t ext4 /dev/vda /root || { echo "GUEST: failed: the root file system does not mount"; poweroff -f; }
mount --move /dev /root/dev
exec switch_root /root /sbin/init
"""

ROOT_INIT = f"""#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
exec >/dev/ttyS0 2>&1 </dev/null
if [ -e /written ]; then
    [ "$(sha256sum </written)" = "$(cat /written.sha256)" ] && echo "GUEST: what was written is there"
else
    dd if=/dev/urandom of=/written bs=1M count={FILE_MIB} && sha256sum </written >/written.sha256 && sync && echo "GUEST: booted from the point"
fi
[ "$(sha256sum </ballast)" = "$(cat /ballast.sha256)" ] || echo "GUEST: failed: the ballast is not what it was"
mount -o remount,ro /
echo "GUEST: done"
poweroff -f
"""


def script(path, text):
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o755)


def root_image(work):
    """A root file system of busybox and some ballast."""
    tree = os.path.join(work, "tree")
    for name in ("bin", "sbin", "dev", "proc"):
        os.makedirs(os.path.join(tree, name))
    shutil.copy(shutil.which("busybox"), tree + "/bin/busybox")
    for applet in ("sh", "sha256sum", "dd", "sync", "mount", "poweroff", "cat"):
        os.symlink("busybox", f"{tree}/bin/{applet}")
    script(tree + "/sbin/init", ROOT_INIT)
    with open(tree + "/ballast", "wb") as file:
        file.write(os.urandom(24 << 20))
    with open(tree + "/ballast") as ballast, open(tree + "/ballast.sha256", "w") as said:
        subprocess.run([shutil.which("busybox"), "sha256sum"], stdin=ballast, stdout=said, check=True)
    image = os.path.join(work, "root.img")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", "-d", tree, image, f"{ROOT_MIB}M"], check=True)
    return image


def initramfs(root, folder, version):
    os.makedirs(root + "/bin")
    os.makedirs(root + "/root")
    shutil.copy(shutil.which("busybox"), root + "/bin/busybox")
    tracking.modules(root, folder, version, MODULES)
    for name in ("dev", "proc"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    script(root + "/init", INITRAMFS_INIT)
    image = root + ".cpio.gz"
    with open(image, "wb") as out:
        subprocess.run(f"cd {root} && find . | cpio -o -H newc --quiet | gzip -1", shell=True, stdout=out, check=True)
    return image


class Served:
    def __init__(self, pair, work, *flags):
        command = [pair.program("blockferry"), "serve", "--store", pair.store, "--volume", "root", "--json"]
        command += ["--key-file", os.path.join(pair.state, "blockferry.key"), "--nbd", os.path.join(work, "nbd.sock"), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            fail("`serve` did not start")
        self.uri = json.loads(line)["uri"]

    def stop(self):
        self.process.terminate()
        code = self.process.wait(60)
        if code != 143:
            fail(f"`serve` ended with exit code {code}")


def boot(kernel, image, uri, said):
    guest = tracking.Guest(*kernel, image, [uri], "serve", "")
    guest.until("done", 600)
    guest.process.wait(60)
    if said not in guest.said:
        fail(f'the guest did not say "{said}"')


def main():
    bin_dir, cache = sys.argv[1:3]
    kernel = tracking.kernel(tracking.KERNELS[0], cache)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="blockferry-guest-") as work:
        pair = Pair(bin_dir, os.path.join(work, "pair"))
        os.makedirs(pair.folder)
        pair.start_receiver()
        try:
            pair.register()
            root = root_image(work)
            pair.finish_sender(pair.start_sender("root", root))
        finally:
            pair.close()
        image = initramfs(os.path.join(work, "initramfs"), *kernel)
        for said in ("booted from the point", "what was written is there"):
            served = Served(pair, work, "--overlay", os.path.join(work, "overlay"))
            boot(kernel, image, served.uri, said)
            served.stop()
        served = Served(pair, work, "--read-only")
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, root], check=True)
        served.stop()
        print("a guest booted from a point, wrote, and booted again over its overlay; the point is as it was")


if __name__ == "__main__":
    main()
