"""What the benches of continuous capture share: a sender that runs until it is told to end, fio, loop devices."""
import json
import os
import re
import signal
import subprocess
import time
import urllib.request

from lab import Pair, fail


class LivePair(Pair):
    """A pair whose sender protects live volumes."""

    def __init__(self, bin_dir, folder):
        os.makedirs(folder, exist_ok=True)
        super().__init__(bin_dir, folder)
        self.sender = None
        self.start_receiver()
        self.register()

    def protect(self, volumes, *flags):
        self.log = os.path.join(self.folder, "sender.log")
        command = [self.program("blockferry-sender"), "run", "--state-dir", self.state, "--metrics-listen", "127.0.0.1:0"]
        command += [word for volume in volumes for word in ("--volume", volume)]
        with open(self.log, "ab") as log:
            self.sender = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
        self.metrics_address = wait_for("the sender's metrics", self.find_metrics)

    def find_metrics(self):
        if self.sender.poll() is not None:
            with open(self.log) as text:
                fail(f"the sender ended; its log says:\n{text.read()[-2000:]}")
        with open(self.log) as text:
            found = re.findall(r"metrics endpoint open\S* .*?address=(\S+)", text.read())
        return found[-1] if found else None

    def metric(self, name):
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))

    def point(self, volume, *flags):
        """Asks for a point; its answer, or None where there is none now."""
        command = [self.program("blockferry-sender"), "point", "--state-dir", self.state, "--volume", volume, "--json"]
        answer = subprocess.run([*command, *flags], capture_output=True, text=True)
        return json.loads(answer.stdout) if answer.returncode in (0, 3) and answer.stdout else None

    def first_point(self, volume):
        return wait_for(f"the first point of {volume}", lambda: self.point(volume), 600)

    def status(self):
        command = [self.program("blockferry-sender"), "status", "--json", "--state-dir", self.state]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def stop_sender(self):
        if self.sender:
            self.sender.send_signal(signal.SIGTERM)
            self.sender.wait()
            self.sender = None

    def close(self):
        if self.sender:
            self.sender.kill()
            self.sender.wait()
        # What tracks in the kernel outlives processes.
        detach = [self.program("blockferry-sender"), "detach", "--all", "--state-dir", self.state]
        subprocess.run(detach, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        super().close()


def wait_for(what, ready, seconds=120):
    deadline = time.monotonic() + seconds
    while True:
        value = ready()
        if value:
            return value
        if time.monotonic() > deadline:
            fail(f"waited {seconds} s for {what}")
        time.sleep(0.05)


def fio(name, *flags):
    """Runs a job; its write figures: IOPS, MB/s, completion latencies in microseconds."""
    command = ["fio", f"--name={name}", "--output-format=json", *flags]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        fail(f"fio {name} failed:\n{answer.stderr[-1500:]}{answer.stdout[-500:]}")
    write = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"][0]["write"]
    percentiles = write["clat_ns"].get("percentile", {})
    return {
        "iops": write["iops"],
        "mb_s": write["bw_bytes"] / 1e6,
        "p50_us": percentiles.get("50.000000", 0) / 1e3,
        "p99_us": percentiles.get("99.000000", 0) / 1e3,
    }


def loop_attach(path, *flags):
    return subprocess.run(["losetup", "--find", "--show", *flags, path], capture_output=True, text=True, check=True).stdout.strip()


def loop_detach(device):
    subprocess.run(["losetup", "-d", device], check=False)


def filled(path, mib):
    """A file with every block written, half of it random, so that no server finds it sparse."""
    with open(path, "wb") as disk:
        for _ in range(mib):
            disk.write(os.urandom(1 << 19) + b"blockferry bench" * (1 << 15))
        disk.flush()
        os.fsync(disk.fileno())
