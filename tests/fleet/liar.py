"""Storages that ignore conditions: rclone, and s3s-fs if S3S_FS names it. Their objects are used; claims and the records that
need an order are not."""

import asyncio
import os
import pathlib
import subprocess
import time

from bucket import KEY, NAME, SECRET, host
from faults import record_key
from fleet import Requests, free_port
from kit.client import pull
from kit.lab import until
from kit.process import plain_environment
from shared import image, metric

IMAGE = "library/app"
HOSTS = 4
START_S = 30


def rclone(port, data):
    serve = ["serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", data]
    return [os.environ["RCLONE"], *serve]


def s3s_fs(port, data):
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [os.environ["S3S_FS"], *address, "--access-key", KEY, "--secret-key", SECRET, data]


class Folder:
    """A folder with the API of S3."""

    def __init__(self, fleet, server):
        self.folder = pathlib.Path(os.environ["SCRATCH"]) / f"{fleet.number}-{server.__name__}"
        (self.folder / "data" / NAME).mkdir(parents=True)
        self.port = free_port()
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                server(self.port, self.folder / "data"), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**plain_environment(), "HOME": str(self.folder)},
            )
        fleet.programs.append(self)

    async def until_ready(self):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text(errors="replace")[-2000:])

    def remove(self):
        self.process.kill()
        self.process.wait()

    def objects(self, kind):
        return [path for path in self.folder.glob(f"data/{NAME}/team-a/v1/{kind}/**/*") if path.is_file()]


async def run(fleet):
    await over(fleet, rclone)
    if "S3S_FS" in os.environ:
        await over(fleet, s3s_fs)


async def over(fleet, server):
    bucket, registry = Folder(fleet, server), fleet.registry()
    await bucket.until_ready()
    key = record_key(bucket)
    pushed = registry.push_image(IMAGE, "1", image("liar", 4))
    hosts = [host(fleet, registry, bucket, key) for _ in range(HOSTS)]
    took = await asyncio.gather(*(pull(cache.address, IMAGE, "1", pushed) for cache in hosts))
    fleet.check(f"{server.__name__}: {HOSTS} pulls at once", all(took), took)
    wanted = {digest.removeprefix("sha256:") for digest in (pushed.digest, pushed.config, *pushed.layers)}
    are_there = await until(lambda: wanted <= {path.name for kind in ("blobs", "manifests") for path in bucket.objects(kind)}, 20, 0.2)
    fleet.check("its objects are uploaded", are_there)
    for cache in hosts:
        fleet.check("the log names the reason", await until(lambda cache=cache: cache.says("ignores conditions"), 20))
        fleet.equal("claims", 0, await metric(cache, "ifnewer_shared_claims_total"))
    for _ in range(100):
        if bucket.objects("records/content"):
            break
        await asyncio.sleep(0.1)
    found = {kind: len(bucket.objects(f"records/{kind}")) for kind in ("content", "tag", "public")}
    fleet.equal("records", {"content": 1, "tag": 0, "public": 0}, found)
    cold, at_registry = host(fleet, registry, bucket, key), Requests(registry)
    fleet.check("a cold cache", await pull(cold.address, IMAGE, "1", pushed))
    fleet.equal("its GETs at the registry", 0, at_registry.count("GET "))
