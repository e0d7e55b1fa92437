"""One fetch across hosts: eight caches that miss at once, and an owner of claims that is killed, frozen or cut off."""

import asyncio
import os
import signal
import time

from bucket import Bucket, host
from fleet import Requests
from kit.client import blob, get, manifest, pull
from kit.content import Image
from kit.lab import until
from shared import metric, until_conditional

HOSTS, CLIENTS = 8, 4
NAME = "library/app"

# A part in the bucket has at most so many bytes. What the owner has fetched and not yet published is lost with it.
PART_BYTES, FIRST_PART_BYTES = 5 << 20, 1 << 20
SOCKET_BYTES = 6 << 20
TAKEOVER_S = 12

# Bytes a second of each connection to the registry.
RATE = 8_000_000


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    await at_once(fleet, registry, bucket)
    for number in range(int(os.environ.get("KILLS", "2"))):
        await without_its_owner(fleet, registry, bucket, f"killed {number}", signal.SIGKILL)
    await without_its_owner(fleet, registry, bucket, "frozen", signal.SIGSTOP)


def claimed(bucket):
    return [path for path in bucket.objects("claims") if "probe" not in path]


async def ready(fleet, registry, bucket, count):
    """Caches that may claim."""
    hosts = [host(fleet, registry, bucket) for _ in range(count)]
    for cache in hosts:
        await until_conditional(cache)
    return hosts


async def at_once(fleet, registry, bucket):
    sizes = [300_000, 2_000_000, 8_000_000, 12_000_000, 40_000_000]
    image = Image([(f"cold-{n}", size) for n, size in enumerate(sizes)], config=("cold-config", 5000))
    registry.push_image(NAME, "cold", image)
    registry.rule("slow", path="/blobs/", bytes_per_s=10_000_000)
    hosts = await ready(fleet, registry, bucket, HOSTS)
    at_registry = Requests(registry)
    pulls = [pull(cache.address, NAME, "cold", image) for cache in hosts for _ in range(CLIENTS)]
    took = await asyncio.gather(*pulls)
    fleet.check(f"{HOSTS} cold caches, {len(pulls)} pulls at once", all(took), took)
    late = int(sum([await metric(cache, 'ifnewer_shared_claims_total{result="unavailable"}') for cache in hosts]))
    # A cache whose claim is late fetches the blob itself. That depends on the load of the machine.
    fleet.at_most("claims that the bucket did not answer in time", late, 0, bound=HOSTS // 2)
    gets = [at_registry.count(f"GET .*/blobs/{digest}") for digest in image.layers]
    fleet.at_most(f"GETs at the registry for {len(gets)} layers", sum(gets), len(gets), bound=len(gets) + late)
    slow = 0
    for result in ("manifest-late", "manifest-slow"):
        counts = [await metric(cache, f'ifnewer_shared_claims_total{{result="{result}"}}') for cache in hosts]
        slow += int(sum(counts))
    fleet.at_most("GETs of the manifest at the registry", at_registry.count("GET .*/manifests/"), 1, bound=1 + slow)
    more = late * max(sizes) / sum(sizes)
    fleet.at_most("bytes at the registry, in images", at_registry.times(image), 1.001, bound=1.001 + more)
    took = sorted(each or 1e9 for each in took)
    fleet.at_most("the last pull after the first one", took[-1] - took[0], 1.5, "s")
    fleet.at_most("the last pull, in times of the largest layer at the registry's rate", took[-1] / (40 / 10), 2, bound=4)
    registry.drop("slow")
    fleet.check("the claims end", await until(lambda: not claimed(bucket), 30), claimed(bucket))
    fleet.equal("parts that are left in the bucket", [], bucket.objects("parts"))
    for cache in hosts:
        cache.stop()


async def without_its_owner(fleet, registry, bucket, what, number):
    """Four caches pull a layer. The one that fetches it gets this signal in the middle."""
    image = Image([(what, 40_000_000)], config=(f"{what}-config", 5000))
    registry.push_image(NAME, "lost", image)
    registry.rule("slow", path="/blobs/", bytes_per_s=RATE)
    hosts = await ready(fleet, registry, bucket, 4)
    for cache in hosts:
        await get(cache.address, manifest(NAME, "lost"))
    at_registry, [layer] = Requests(registry), image.layers
    pulls = {cache: asyncio.create_task(get(cache.address, blob(NAME, layer), keep=False)) for cache in hosts}
    await until(lambda: at_registry.count(f"GET .*/blobs/{layer}") > 0, 20)
    await asyncio.sleep(2)
    owners = [cache for cache in hosts if await metric(cache, 'ifnewer_shared_claims_total{result="won"}') >= 1]
    fleet.equal(f"{what}: caches that own the claim", 1, len(owners))
    [owner] = owners[:1] or hosts[:1]
    os.kill(owner.process.pid, number)
    began = time.monotonic()
    replies = await asyncio.gather(*(task for cache, task in pulls.items() if cache is not owner))
    fleet.check(f"{what}: the other three are served", all(reply.is_ok and reply.digest == layer for reply in replies),
                [reply.cause() for reply in replies])
    fleet.at_most(f"{what}: until then", time.monotonic() - began, TAKEOVER_S + 40 / 8 + 2, "s")
    # The owner has no part for the first of them before it is asked for.
    first_s = max((reply.first_byte_s for reply in replies), default=0)
    goal = FIRST_PART_BYTES / RATE + 0.8
    fleet.at_most(f"{what}: the first byte of those that follow", first_s, round(goal, 2), "s")
    allowed = 1 + (2 * PART_BYTES + SOCKET_BYTES) / 40_000_000
    fleet.at_most(f"{what}: bytes at the registry, in images", at_registry.times(image), round(allowed, 2), bound=2.1)
    if number == signal.SIGSTOP:
        os.kill(owner.process.pid, signal.SIGCONT)
        reply = await pulls[owner]
        fleet.check(f"{what}: the owner goes on and serves its own client", reply.is_ok, reply.cause())
    registry.drop("slow")
    for task in pulls.values():
        task.cancel()
    for cache in hosts:
        cache.stop()
