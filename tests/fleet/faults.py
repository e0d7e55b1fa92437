"""A bucket that fails in other ways than by its end, partitions, clocks that are wrong, and forged objects."""

import asyncio
import json
import os
import pathlib
import subprocess

import relay
from bucket import Bucket, host
from fleet import Requests
from kit.client import LOCAL, get, manifest, pull
from kit.content import Image
from kit.lab import until
from kit.process import plain_environment
from relay import Relay
from shared import image, metric, recorded, unchanged, until_conditional, uploaded

NAME = "library/app"


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    key = record_key(bucket)
    await failing(fleet, registry, bucket)
    await partitioned(fleet, registry, bucket, key)
    await skewed(fleet, registry, bucket, key)
    await forged(fleet, registry, bucket, key)


def record_key(bucket):
    """The setting of a fresh key."""
    key = bucket.folder / "records.key"
    made = subprocess.run([os.environ["IFNEWER"], "shared", "key", "new"], capture_output=True, check=True, env=plain_environment())
    key.write_bytes(made.stdout)
    key.chmod(0o600)
    return f'key_file = "{key}"'


def small(label):
    return Image([(f"{label}-layer", 600_000)], config=(f"{label}-config", 700), label=label)


async def failing(fleet, registry, bucket):
    """The local cache is complete without the bucket, and no pull fails."""
    kept = registry.push_image(NAME, "held", image("kept", 3))
    through = Relay(fleet, bucket.port)
    for what, mode, first_s in (
        ("denies all requests", 403, 0.5),
        ("limits the rate", 503, 1.5),
        ("responds after 2 s", relay.SLOW, 2.5),
        ("does not respond", relay.SILENT, 2.5),
        ("resets connections", relay.CUT, 1.5),
    ):
        cache = host(fleet, registry, bucket, port=through.port)
        fleet.check(f"a bucket that {what}: a pull before", await pull(cache.address, NAME, "held", kept))
        quiet = await unchanged(cache, kept)
        through.switch(mode)
        waits = []
        for number in range(5):
            cold = registry.push_image(NAME, f"{mode}-{number}", small(f"{mode} {number}"))
            waits.append(await pull(cache.address, NAME, f"{mode}-{number}", cold) or 1e9)
        fleet.at_most(f"a bucket that {what}: the slowest of five cold pulls", max(waits), first_s, "s")
        fleet.at_most(f"a bucket that {what}: the last of them", waits[-1], 0.5, "s")
        fleet.not_slower(f"a bucket that {what}: unchanged pulls", await unchanged(cache, kept), quiet)
        ready = await get(cache.admin, "/readyz", headers=LOCAL)
        fleet.equal(f"a bucket that {what}: readiness", 200, ready.status)
        through.switch(relay.PASS)
        back = await until(lambda: cache.says("shared storage available again"), 40)
        fleet.check(f"a bucket that {what}: it is used again", back)
        cache.stop()


async def eventually(read, wanted, seconds=40):
    """What `read` gives, once it is this value, or at the end."""
    deadline = asyncio.get_running_loop().time() + seconds
    while (found := await read()) != wanted and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.1)
    return found


class Through:
    """This registry by a relay."""

    def __init__(self, between):
        self.url = between.url


async def partitioned(fleet, registry, bucket, key):
    """One cache loses the bucket, another one the registry, a third one both. Each is the cache that it was."""
    before, after = small("before the partition"), small("after the partition")
    registry.push_image(NAME, "moving", before)
    bucket_of_a, registry_of_b = Relay(fleet, bucket.port), Relay(fleet, registry.port)
    bucket_of_c, registry_of_c = Relay(fleet, bucket.port), Relay(fleet, registry.port)
    a = host(fleet, registry, bucket, key, port=bucket_of_a.port)
    b = host(fleet, Through(registry_of_b), bucket, key)
    c = host(fleet, Through(registry_of_c), bucket, key, port=bucket_of_c.port)
    for name, cache in (("a", a), ("b", b), ("c", c)):
        fleet.check(f"partition: {name} pulls before", await pull(cache.address, NAME, "moving", before))
    for one in (bucket_of_a, registry_of_b, bucket_of_c, registry_of_c):
        one.switch(relay.SILENT)
    registry.push_image(NAME, "moving", after)
    fleet.check("partition: without the bucket, the moved tag is served", await pull(a.address, NAME, "moving", after))
    for what, cache in (("the registry", b), ("both", c)):
        reply = await get(cache.address, manifest(NAME, "moving"))
        fleet.equal(f"partition: without {what}, the cached image is served as stale", (200, before.digest, True),
                    (reply.status, reply.digest, reply.is_stale))
    for one in (bucket_of_a, registry_of_b, bucket_of_c, registry_of_c):
        one.switch(relay.PASS)
    for name, cache in (("a", a), ("b", b), ("c", c)):
        async def current(cache=cache):
            reply = await get(cache.address, manifest(NAME, "moving"))
            return reply.status, reply.digest, reply.is_stale
        found = await eventually(current, (200, after.digest, False), 10)
        fleet.equal(f"partition: healed, {name} serves the moved tag", (200, after.digest, False), found)
        cache.stop()


async def skewed(fleet, registry, bucket, key):
    """Clocks of hosts are wrong. Ages in records are those of the bucket's clock."""
    library = bucket.folder / "skew.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, pathlib.Path(__file__).parent / "skew.c"], check=True)
    pushed = registry.push_image("library/skewed", "1", small("skewed"))
    writer = host(fleet, registry, bucket, key, environment=shifted(library, -10))
    fleet.check("clocks: a pull through a cache 10 min behind", await pull(writer.address, "library/skewed", "1", pushed))
    fleet.check("clocks: it writes to the bucket", await uploaded(writer, len(pushed.blobs) + 1))
    fleet.check("clocks: it writes records", await recorded(writer))
    at_registry = Requests(registry)
    for minutes in (10, 60, -60):
        cache = host(fleet, registry, bucket, key, environment=shifted(library, minutes))
        fleet.check(f"clocks: a pull through a cache {minutes} min ahead", await pull(cache.address, "library/skewed", "1", pushed))
        if minutes == 10:
            fleet.equal("clocks: its bytes come from the bucket", 0, at_registry.blob_bytes)
        else:
            is_named = await until(lambda: cache.says("denies access (RequestTimeTooSkewed)"), 5)
            fleet.check("clocks: the log names the reason", is_named)
        cache.stop()
    registry.refuse()
    born = host(fleet, registry, bucket, key, environment=shifted(library, 10))
    reply = await get(born.address, manifest("library/skewed", "1"))
    fleet.equal("clocks: born in an outage, 20 min apart from the writer", (200, pushed.digest, True),
                (reply.status, reply.digest, reply.is_stale))
    fleet.at_most("clocks: the age of its tag, in s", int(reply.headers.get("age", 1 << 30)), 60)
    registry.listen()
    for cache in (writer, born):
        cache.stop()


def shifted(library, minutes):
    return {"LD_PRELOAD": str(library), "SKEW_S": str(60 * minutes)}


async def forged(fleet, registry, bucket, key):
    """Objects that no cache has written."""
    claims = {
        "no JSON": b"claim",
        "10 MiB": b" " * (10 << 20),
        "a later version": json.dumps({"version": 99, "lease": "x"}).encode(),
        "no owner": json.dumps({"owner": "", "beat": 1, "size": 1, "received": 0, "published": 0, "wanted": True}).encode(),
        "parts that are absent": json.dumps(
            {"owner": "ff" * 16, "beat": 1, "size": 600_000, "received": 600_000, "published": 600_000, "wanted": True}
        ).encode(),
    }
    cache = host(fleet, registry, bucket, key)
    await until_conditional(cache)
    for number, (what, content) in enumerate(claims.items()):
        pushed = registry.push_image(NAME, f"forged-{number}", small(f"forged {number}"))
        hexadecimal = pushed.layers[0].removeprefix("sha256:")
        bucket.write(f"team-a/v1/claims/sha256/{hexadecimal[:2]}/{hexadecimal}", content)
        took = await pull(cache.address, NAME, f"forged-{number}", pushed) or 1e9
        fleet.at_most(f"a forged claim, {what}: the pull", took, 1.5, "s")
    public = registry.push_image("library/records", "1", small("records"))
    fleet.check("forged records: a pull", await pull(cache.address, "library/records", "1", public))
    fleet.check("forged records: they are written", await recorded(cache))
    fleet.check("forged records: the objects are uploaded", await until_there(bucket, public))
    cache.stop()
    registry.refuse()
    paths = bucket.objects("records")
    intact = {path: bucket.read(path) for path in paths}
    rotated = dict(zip(paths, [*list(intact.values())[1:], intact[paths[0]]], strict=True))
    flipped = {path: content[:20] + bytes([content[20] ^ 1]) + content[21:] for path, content in intact.items()}
    for what, contents in (("changed", flipped), ("moved", rotated)):
        for path, content in contents.items():
            bucket.write(path, content)
        born = host(fleet, registry, bucket, key)
        reply = await get(born.address, manifest("library/records", "1"))
        fleet.check(f"{what} records: the image is not served", reply.status >= 500, reply.status)
        unsealed = await metric(born, "ifnewer_shared_records_total{class=\"public\",result=\"unsealed\"}")
        fleet.check(f"{what} records are counted", unsealed >= 1, unsealed)
        born.stop()
    for path, content in intact.items():
        bucket.write(path, content)
    born = host(fleet, registry, bucket, key)
    reply = await get(born.address, manifest("library/records", "1"))
    fleet.equal("intact records: the image is served", (200, public.digest), (reply.status, reply.digest))


async def until_there(bucket, pushed):
    wanted = {digest.removeprefix("sha256:") for digest in (pushed.digest, pushed.config, *pushed.layers)}

    def names():
        return {path.rpartition("/")[2] for kind in ("blobs", "manifests") for path in bucket.objects(kind)}
    return await until(lambda: wanted <= names(), 20, 0.2)
