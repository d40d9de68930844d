"""A SeaweedFS of one's own for a bench: one process, one bucket, on ports found free, ended with the bench."""
import json
import os
import random
import socket
import subprocess
import time

BUCKET = "blockferry"
ACCESS, SECRET = "AKBLOCKFERRYBENCH", "secret-of-the-bench-0123456789"


def free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


class SeaweedFs:
    def __init__(self, tools, folder):
        self.data = os.path.join(folder, "seaweed")
        os.makedirs(self.data)
        identities = os.path.join(folder, "s3.json")
        credentials = [{"accessKey": ACCESS, "secretKey": SECRET}]
        with open(identities, "w") as file:
            json.dump({"identities": [{"name": "b", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}]}, file)
        for _ in range(5):
            ports = random.sample([port for port in random.sample(range(10_000, 22_000), 200) if free(port) and free(port + 10_000)], 5)
            command = [os.path.join(tools, "venv/bin/weed"), "mini", f"-dir={self.data}", f"-s3.config={identities}", f"-bucket={BUCKET}"]
            command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
            command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
            for name, port in zip(["s3", "master", "volume", "filer", "admin"], ports):
                command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 10_000}"]
            log = os.path.join(folder, "seaweed.log")
            with open(log, "w") as output:
                self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and self.process.poll() is None:
                with open(log) as text:
                    if "running and ready to use" in text.read():
                        self.endpoint = f"http://127.0.0.1:{ports[0]}"
                        return
                time.sleep(0.05)
            self.close()
        raise SystemExit("SeaweedFS did not start")

    def environment(self):
        """For Blockferry."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def rclone(self):
        """For rclone, where the bucket is then `store:blockferry`."""
        return {
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_CONFIG_STORE_TYPE": "s3",
            "RCLONE_CONFIG_STORE_PROVIDER": "Other",
            "RCLONE_CONFIG_STORE_ENDPOINT": self.endpoint,
            "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": ACCESS,
            "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": SECRET,
            "RCLONE_CONFIG_STORE_REGION": "us-east-1",
        }

    def close(self):
        self.process.kill()
        self.process.wait()


def metrics(address, name):
    """Values of a metric by its `op` label, or under an empty name."""
    import urllib.request

    found = {}
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith((name + " ", name + "{")):
                label = line.split('op="')[1].split('"')[0] if 'op="' in line else ""
                found[label] = found.get(label, 0) + float(line.rsplit(" ", 1)[1])
    return found
