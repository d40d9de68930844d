"""What the demo and the pipeline bench share: images, a receiver and a sender as real processes, and what they used."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

PAGE = 4096
SOURCES = ["/usr/bin", "/usr/sbin", "/usr/share", "/usr/include", "/usr/libexec", "/usr/lib"]


def fail(text):
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
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
    print(f"{size_mib} MiB ext4 with {used >> 20} MiB of files", flush=True)


def change_files(image, folder, share, seed):
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
        chosen = sorted(rng.sample(pages, int(os.path.getsize(image) // PAGE * share)))
        for turn, (path, page) in enumerate(chosen):
            with open(path, "r+b") as file:
                file.seek(page * PAGE)
                file.write(new_page(rng, turn))
    finally:
        subprocess.run(["umount", mount], check=True)
    os.sync()


def change_pages(image, share, seed):
    """Overwrites this share of the image's pages, anywhere; the file system inside does not survive it."""
    rng = random.Random(seed)
    with open(image, "r+b") as disk:
        pages = os.path.getsize(image) // PAGE
        for turn, page in enumerate(sorted(rng.sample(range(pages), int(pages * share)))):
            disk.seek(page * PAGE)
            disk.write(new_page(rng, turn))
        disk.flush()
        os.fsync(disk.fileno())
    return int(pages * share) * PAGE


def new_page(rng, turn):
    """Half random bytes, half bytes that compress as text does."""
    content = rng.randbytes(PAGE) if turn & 1 else (b"%020d blockferry " % rng.getrandbits(60)) * (PAGE // 32)
    return content[:PAGE]


def changed_bytes(before, after):
    changed = 0
    with open(before, "rb") as left, open(after, "rb") as right:
        while a := left.read(1 << 20):
            b = right.read(1 << 20)
            if a != b:
                changed += sum(PAGE for at in range(0, len(a), PAGE) if a[at : at + PAGE] != b[at : at + PAGE])
    return changed


def tree_bytes(folder):
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)


class Usage:
    """CPU seconds and peak memory of one end, over all of its processes."""

    def __init__(self):
        self.cpu, self.peak = 0.0, 0

    def wait(self, process):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu += usage.ru_utime + usage.ru_stime
        self.peak = max(self.peak, usage.ru_maxrss << 10)
        return process.returncode


def process_cpu(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def process_peak(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


class Pair:
    """A receiver with a local store, and a sender registered with it, in one folder."""

    def __init__(self, bin_dir, folder):
        self.bin, self.folder = bin_dir, folder
        self.data, self.state = os.path.join(folder, "receiver"), os.path.join(folder, "sender")
        self.store_dir = os.path.join(folder, "store")
        self.store = "file://" + self.store_dir
        self.receiver, self.listen, self.metrics = None, None, None
        self.receiver_usage = Usage()

    def program(self, name):
        return os.path.join(self.bin, name)

    def start_receiver(self):
        endpoint = os.path.join(self.data, "endpoint.json")
        if os.path.exists(endpoint):
            os.unlink(endpoint)
        with open(os.path.join(self.folder, "receiver.log"), "ab") as log:
            self.receiver = subprocess.Popen(
                [self.program("blockferry-receiver"), "run", "--data-dir", self.data, "--store", self.store]
                + ["--listen", self.listen or "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
                stderr=log,
            )
        deadline = time.monotonic() + 120
        while not os.path.exists(endpoint):
            if self.receiver.poll() is not None:
                with open(log.name) as text:
                    fail(f"the receiver ended; its log says:\n{text.read()[-2000:]}")
            if time.monotonic() > deadline:
                fail("the receiver did not get ready in two minutes")
            time.sleep(0.02)
        with open(endpoint) as file:
            where = json.load(file)
        self.listen, self.metrics = where["listen"], where["metrics"]

    def kill_receiver(self):
        self.receiver.send_signal(signal.SIGKILL)
        self.receiver_usage.wait(self.receiver)

    def stop_receiver(self):
        self.receiver.terminate()
        if self.receiver_usage.wait(self.receiver) != 128 + signal.SIGTERM:
            fail(f"the receiver did not drain cleanly: exit code {self.receiver.returncode}")

    def close(self):
        if self.receiver and self.receiver.returncode is None:
            self.receiver.kill()
            self.receiver.wait()

    def register(self):
        passphrase = os.path.join(self.folder, "passphrase.txt")
        with open(passphrase, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            fleet = ["--data-dir", self.data, "--store", self.store]
            subprocess.run([self.program("blockferry-receiver"), "passphrase", "create", *fleet], stdout=file, check=True)
        register = ["register", "-i", self.listen, "-P", passphrase, "--state-dir", self.state, "--name", "demo"]
        subprocess.run([self.program("blockferry-sender"), *register], check=True)

    def received_bytes(self):
        name = "blockferry_receiver_received_bytes_total"
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def start_sender(self, volume, image, *flags):
        return subprocess.Popen(
            [self.program("blockferry-sender"), "run", "--once", "--json", "--state-dir", self.state]
            + ["--volume", f"{volume}={image}", "--metrics-listen", "127.0.0.1:0", *flags],
            stdout=subprocess.PIPE,
        )

    def finish_sender(self, sender):
        """What the sender printed, and what it used."""
        output, usage = sender.stdout.read(), Usage()
        if usage.wait(sender) != 0:
            fail(f"the sender ended with exit code {sender.returncode}")
        return json.loads(output), usage
