"""Context of a scenario: registries, and caches with the files of config/fleet."""

import base64
import os
import pathlib
import socket
import subprocess
import time

from kit.client import get, manifest
from kit.content import Image
from kit.lab import Lab
from kit.process import Program, address, plain_environment

CONFIG = pathlib.Path(__file__).parent.parent.parent / "config" / "fleet"
REGIONAL = "https://regional.example.org:5000"
REGIONAL_CA = "/etc/ifnewer/regional-ca.pem"
LAYER_BYTES = 3_000_000


def basic(user):
    return "Basic " + base64.b64encode(f"{user}:secret of {user}".encode()).decode()


def layers(label, count=3):
    return Image([(f"{label}-{n}", LAYER_BYTES + n) for n in range(count)], config=(f"{label}-config", 500), label=label)


def size_of(image):
    return sum(size for _, size in image.blobs)


def upstreams(registry):
    """Sections for this registry as Docker Hub and as registry.example, by the host that its challenges name."""
    url = registry.url.replace("127.0.0.1", "localhost")
    return "".join(f'[upstream."{name}"]\nurl = "{url}"\n' for name in ("docker.io", "registry.example"))


class Cache(Program):
    """ifnewer with a file of config/fleet. Its own addresses and folders are set by variables."""

    def __init__(self, folder, text, environment):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        self.data, self.certs = self.folder / "data", self.folder / "certs"
        self.descriptors_max, self.process = 0, None
        self.environment = {
            "IFNEWER_DATA": str(self.data),
            "IFNEWER_TLS_FOLDER": str(self.certs),
            "IFNEWER_LISTEN_REGISTRY": "127.0.0.1:0",
            "IFNEWER_LISTEN_ADMIN": "127.0.0.1:0",
            "IFNEWER_STORE_FREE": "0 B",
            **environment,
        }
        self.write(text)
        self.start()
        # The same port after a restart, because others are configured with it.
        self.environment["IFNEWER_LISTEN_REGISTRY"] = self.host

    def write(self, text):
        (self.folder / "ifnewer.toml").write_text(text)

    @property
    def host(self):
        return "{}:{}".format(*self.address)

    def says(self, words):
        return words in self.log.read_text(errors="replace")


class Fleet(Lab):
    """One scenario while it runs."""

    def cache(self, file, replaced=None, more="", environment=None):
        """A cache with this file, in which each of the texts is replaced."""
        text = (CONFIG / file).read_text()
        for old, new in (replaced or {}).items():
            assert old in text, f"{file} has no {old}"
            text = text.replace(old, new)
        self.count += 1
        folder = pathlib.Path(os.environ["SCRATCH"]) / f"{self.number}-{self.count}-{file.removesuffix('.toml')}"
        self.programs.append(Cache(folder, f"{text}\n{more}", environment or {}))
        return self.programs[-1]

    def regional(self, registry, more=""):
        """In front of this registry as Docker Hub, and as registry.example."""
        names = upstreams(registry)
        return self.cache("regional.toml", more=f"{names}{more}")

    def sidecar(self, regional, file="sidecar.toml", transport="tls", replaced=None, more=""):
        url = f"{'https' if transport == 'tls' else 'http'}://{regional.host}"
        named = {REGIONAL.replace("https", "http") if transport == "proxy" else REGIONAL: url}
        replaced = {**named, REGIONAL_CA: str(regional.certs / "ca.pem"), **(replaced or {})}
        return self.cache(file, replaced, more)

    def check(self, what, is_so, found=""):
        self.report(bool(is_so), what if is_so else f"{what}: {found}")

    def equal(self, what, wanted, found):
        self.report(wanted == found, what if wanted == found else f"{what}: {found!r} instead of {wanted!r}")


class Requests:
    """Requests and blob bytes at a registry since a moment."""

    def __init__(self, registry):
        self.registry, self.since = registry, time.monotonic()
        self.bytes_before = registry.counters()["blob_bytes"]

    def count(self, pattern):
        return self.registry.requests(pattern, self.since)

    @property
    def blob_bytes(self):
        return self.registry.counters()["blob_bytes"] - self.bytes_before

    def times(self, image):
        """Blob bytes as a multiple of this image."""
        return round(self.blob_bytes / size_of(image), 3)


async def members(cache, repository, reference, **options):
    """The caches in `Cache-Status` of a manifest, in order, each by its first parameter."""
    reply = await get(cache.address, manifest(repository, reference), **options)
    status = reply.headers.get("cache-status", "")
    return [part.split(";")[1].strip() for part in status.split(", ")]


class Balancer:
    """HAProxy with config/fleet/haproxy.cfg in front of these nodes."""

    def __init__(self, fleet, nodes):
        folder = pathlib.Path(os.environ["SCRATCH"]) / f"{fleet.number}-haproxy"
        folder.mkdir()
        pem = folder / "regional.pem"
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        made = subprocess.run([*make, "-keyout", "-", "-out", "-"], capture_output=True, check=True)
        pem.write_bytes(made.stdout)
        text = (CONFIG / "haproxy.cfg").read_text()
        self.address = address(f"127.0.0.1:{free_port()}")
        port = self.address[1]
        tls = "bind :5000 ssl crt /etc/haproxy/regional.pem alpn h2,http/1.1"
        assert tls in text
        # TLS on one port, and none on another: the client of these tests speaks plain HTTP.
        self.tls_address = address(f"127.0.0.1:{free_port()}")
        binds = f"bind 127.0.0.1:{self.tls_address[1]} ssl crt {pem} alpn h2,http/1.1\n    bind 127.0.0.1:{port}"
        text = text.replace(tls, binds)
        for name, at in zip("abc", ("192.0.2.11:5000", "192.0.2.12:5000", "192.0.2.13:5000"), strict=True):
            assert f"server {name} {at}" in text
            text = text.replace(at, nodes["abc".index(name)].host)
        (folder / "haproxy.cfg").write_text(text)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["haproxy", "-db", "-f", folder / "haproxy.cfg"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=plain_environment(),
            )

    def remove(self):
        self.process.kill()
        self.process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
