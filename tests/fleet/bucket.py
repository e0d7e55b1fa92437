"""A real bucket: SeaweedFS with the API of S3."""

import hashlib
import hmac
import json
import os
import pathlib
import signal
import statistics
import subprocess
import time
import urllib.error
import urllib.request

from fleet import Cache, free_port, upstreams
from kit.process import plain_environment

KEY, SECRET = "fleet", "secret-of-the-fleet"
READER, READER_SECRET = "reader", "secret-of-a-reader"
NAME, PREFIX = "images", "team-a"
START_S = 60

SERVERS = ("master", "volume", "filer", "s3")


class Bucket:
    """SeaweedFS in one process. Its filer shows and changes the objects without signatures."""

    def __init__(self, fleet):
        fleet.count += 1
        self.folder = pathlib.Path(os.environ["SCRATCH"]) / f"{fleet.number}-{fleet.count}-seaweedfs"
        (self.folder / "data").mkdir(parents=True)
        self.ports = {f"{server}.port{kind}": free_port() for server in SERVERS for kind in ("", ".grpc")}
        identity = {
            "name": "caches",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Read", "Write", "List"],
        }
        reader = {
            "name": "reader",
            "credentials": [{"accessKey": READER, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
        fleet.programs.append(self)
        self.start()

    def start(self):
        options = {
            "dir": self.folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1",
            "master.telemetry": "false", "master.volumeSizeLimitMB": 256, "volume.max": 50, "volume.preStopSeconds": 0,
            "filer": "true", "s3": "true", "s3.config": self.folder / "s3.json", "s3.iam": "false",
            "s3.port.iceberg": 0, "s3.port.lance": 0, **self.ports,
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [os.environ["WEED"], "server", *(f"-{name}={value}" for name, value in options.items())],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                env={**plain_environment(), "HOME": str(self.folder)},
            )
        deadline = time.monotonic() + START_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)

    def is_ready(self):
        """Whether it stores an object and the S3 port is open."""
        try:
            self.filer("ready", "PUT", b"ready")
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError as answer:
            return answer.code == 403
        except OSError:
            return False

    @property
    def port(self):
        """Port with the API of S3."""
        return self.ports["s3.port"]

    @property
    def endpoint(self):
        return endpoint(self.port)

    def filer(self, path, method="GET", body=None):
        url = f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{NAME}/{path}"
        headers = {"Accept": "application/json", **({"Content-Type": "application/octet-stream"} if body is not None else {})}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=30) as answer:
            return answer.read()

    def objects(self, kind):
        """Names of the objects below this folder of the prefix."""
        found, folders = [], [f"{PREFIX}/v1/{kind}"]
        while folders:
            folder = folders.pop()
            try:
                entries = json.loads(self.filer(f"{folder}/?limit=10000"))["Entries"] or []
            except urllib.error.HTTPError:
                continue
            for entry in entries:
                path = entry["FullPath"].removeprefix(f"/buckets/{NAME}/")
                is_folder = entry["Mode"] & (1 << 31)
                (folders if is_folder else found).append(path)
        return sorted(found)

    def read(self, path):
        return self.filer(path)

    def write(self, path, content):
        self.filer(path, "PUT", content)

    def delete(self, path):
        self.filer(path, "DELETE")

    def signal(self, number):
        os.kill(self.process.pid, number)

    def stop(self):
        self.signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def remove(self):
        self.stop()

    def download(self, paths, port):
        """Seconds that curl needs for these objects, one after the other over one connection."""
        began = time.monotonic()
        curl("-f", paths, port)
        return time.monotonic() - began

    def first_byte_s(self, paths, port):
        """Median time to the first byte of the responses for these objects, one after the other over one connection."""
        return statistics.median(float(line) for line in curl("-w%{time_starttransfer}\n", paths, port).split())


def curl(option, paths, port):
    """The output of GETs of these objects, signed as those of a cache."""
    urls = [argument for path in paths for argument in ("-o", "/dev/null", f"{endpoint(port)}/{NAME}/{path}")]
    signed = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", f"{KEY}:{SECRET}"]
    done = subprocess.run(["curl", "-sS", option, *signed, *urls], check=True, env=plain_environment(), stdout=subprocess.PIPE)
    return done.stdout.decode()


def signed(path, port):
    """Headers of a GET of this object, by AWS Signature Version 4."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    scope = f"{now[:8]}/us-east-1/s3/aws4_request"
    headers = {"host": f"127.0.0.1:{port}", "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
    names = ";".join(headers)
    lines = [f"{name}:{value}" for name, value in headers.items()]
    canonical = "\n".join(["GET", f"/{NAME}/{path}", "", *lines, "", names, "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{SECRET}".encode()
    for part in [*scope.split("/"), to_sign]:
        key = hmac.digest(key, part.encode(), "sha256")
    credential = f"Credential={KEY}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    headers["Host"] = headers.pop("host")
    return {**headers, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


def endpoint(port):
    return f"http://127.0.0.1:{port}"


def section(port, more):
    return f"""
[shared]
bucket = "s3://{NAME}/{PREFIX}"
endpoint = "{endpoint(port)}"
region = "us-east-1"
{more}
"""


def host(fleet, registry, bucket, more="", upstream="", environment=None, port=None):
    """A cache with an empty disk, in front of this registry and over this bucket, or a relay to it."""
    fleet.count += 1
    folder = pathlib.Path(os.environ["SCRATCH"]) / f"{fleet.number}-{fleet.count}-host"
    credential = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    text = f"{upstreams(registry)}{upstream}{section(port or bucket.port, more)}"
    fleet.programs.append(Cache(folder, text, {**credential, **(environment or {})}))
    return fleet.programs[-1]
