"""The regional cache is down: what the sidecar still serves, with and without a second URL, and the recovery."""

import asyncio
import os
import signal
import time

from fleet import REGIONAL, REGIONAL_CA, Requests, basic, layers
from kit.client import get, manifest, pull
from kit.content import Image

ALICE = {"Authorization": basic("alice")}
REGISTRY = "https://registry-1.docker.io"


async def run(fleet):
    registry = fleet.registry()
    regional = fleet.regional(registry)
    held = registry.push_image("library/held", "1", layers("held", 1))
    private = registry.push_image("team/app", "1", layers("private", 1))
    registry.allow("team/app", [basic("alice")])
    alone = fleet.sidecar(regional)
    direct = fleet.sidecar(regional, "sidecar-direct.toml", replaced={REGISTRY: registry.url})
    for cache in (alone, direct):
        fleet.check("a pull before the outage", await prepared(cache.address, "library/held", "1", held))
        fleet.check("a private pull before the outage", await prepared(cache.address, "team/app", "1", private, headers=ALICE))
    fresh = registry.push_image("library/fresh", "1", layers("fresh", 1))

    regional.stop()
    await one_url(fleet, registry, alone, (held, private))
    await two_urls(fleet, registry, direct, (held, private, fresh))

    regional.start()
    for what, cache in (("one URL", alone), ("two URLs", direct)):
        await recovered(fleet, what, registry, regional, cache)
    await frozen(fleet, registry, regional, held)
    await unreachable(fleet, registry, regional, held)
    await interrupted(fleet, registry, regional)


async def prepared(address, *image, **options):
    """A pull that is no subject of the test: on a busy machine, a connection may take longer than `connect_timeout`."""
    for _ in range(5):
        if await pull(address, *image, **options):
            return True
    return False


async def one_url(fleet, registry, cache, images):
    held, private = images
    at_registry = Requests(registry)
    reply = await get(cache.address, manifest("library/held", "1"))
    fleet.check("one URL: a held image is served as stale", reply.is_ok and reply.is_stale, reply.cause())
    fleet.check("one URL: a held image is pulled", await pull(cache.address, "library/held", "1", held))
    fleet.check("one URL: a held private image, by who pulled it", await pull(cache.address, "team/app", "1", private, headers=ALICE))
    for what, caller in (("nobody", {}), ("mallory", {"Authorization": basic("mallory")})):
        reply = await get(cache.address, manifest("team/app", "1"), headers=caller)
        fleet.check(f"one URL: a held private image, by {what}", reply.status in (401, 502, 503), reply.status)
    reply = await get(cache.address, manifest("library/fresh", "1"))
    fleet.check("one URL: an image that is not held", reply.status in (502, 503), reply.status)
    fleet.equal("one URL: requests past the regional cache", 0, at_registry.count(""))


async def two_urls(fleet, registry, cache, images):
    held, private, fresh = images
    at_registry = Requests(registry)
    reply = await get(cache.address, manifest("library/held", "1"))
    fleet.check("two URLs: a held image is confirmed by the registry", reply.is_ok and not reply.is_stale, reply.cause())
    fleet.equal("two URLs: HEADs at the registry", 1, at_registry.count("HEAD /v2/library/held/manifests/1$"))
    fleet.check("two URLs: an image that is not held comes from the registry", await pull(cache.address, "library/fresh", "1", fresh))
    fleet.check("two URLs: a private image, by alice", await pull(cache.address, "team/app", "1", private, headers=ALICE))
    for what, caller in (("nobody", {}), ("mallory", {"Authorization": basic("mallory")})):
        reply = await get(cache.address, manifest("team/app", "1"), headers=caller)
        fleet.equal(f"two URLs: a private image, by {what}", 401, reply.status)


async def recovered(fleet, what, registry, regional, cache):
    """The regional cache is asked again, and it alone."""
    tag = f"after-{what[:3]}"
    image = registry.push_image("library/after", tag, layers(tag, 1))

    async def is_pulled():
        return await pull(cache.address, "library/after", tag, image)

    began = time.monotonic()
    while not await is_pulled() and time.monotonic() - began < 10:
        pass
    fleet.check(f"{what}: pulls again after", time.monotonic() - began < 3, time.monotonic() - began)
    at_registry = Requests(registry)
    fleet.check(f"{what}: unchanged pull", await is_pulled())
    fleet.equal(f"{what}: one HEAD at the registry, by the regional cache", 1, at_registry.count("HEAD "))
    status = (await get(cache.address, manifest("library/after", tag))).headers.get("cache-status", "")
    fleet.equal(f"{what}: caches that were asked", 2, status.count("ifnewer;"))


def impatient(fleet, registry, regional):
    """With the registry as second URL, and a short wait for the first one."""
    waits = {REGISTRY: registry.url, 'connect_timeout = "1s"': 'connect_timeout = "1s"\nfirst_byte_timeout = "2s"'}
    return fleet.sidecar(regional, "sidecar-direct.toml", replaced=waits)


async def frozen(fleet, registry, regional, held):
    """It accepts connections and sends nothing."""
    cache = impatient(fleet, registry, regional)
    fleet.check("a pull before it freezes", await prepared(cache.address, "library/held", "1", held))
    cold = registry.push_image("library/cold", "1", layers("cold", 1))
    os.kill(regional.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        reply = await get(cache.address, manifest("library/held", "1"))
        fleet.check("a frozen regional cache: a held image is served", reply.is_ok, reply.cause())
        fleet.check("a frozen regional cache: within 3 s", time.monotonic() - began < 3, time.monotonic() - began)
        fleet.check("a frozen regional cache: an image that is not held comes from the registry",
                    await pull(cache.address, "library/cold", "1", cold))
    finally:
        os.kill(regional.process.pid, signal.SIGCONT)


async def unreachable(fleet, registry, regional, held):
    """Its host is gone: connections are not even refused."""
    host = fleet.registry()
    urls = {REGIONAL: host.url, REGIONAL_CA: str(regional.certs / "ca.pem"), REGISTRY: registry.url}
    cache = fleet.cache("sidecar-direct.toml", urls)
    # The other registry lacks the image, so the first pull comes from the second URL already.
    fleet.check("a pull before the host is gone", await prepared(cache.address, "library/held", "1", held))
    host.drop_packets()
    began = time.monotonic()
    reply = await get(cache.address, manifest("library/held", "1"))
    took = time.monotonic() - began
    is_confirmed = reply.is_ok and not reply.is_stale
    fleet.check(f"the host is gone: a held image is confirmed by the registry, after {took:.1f} s", is_confirmed, reply.cause())
    cold = registry.push_image("library/cold", "2", layers("cold 2", 1))
    took = await pull(cache.address, "library/cold", "2", cold)
    fleet.check(f"the host is gone: another image is pulled, in {took or 0:.1f} s", took and took < 10, took)


async def interrupted(fleet, registry, regional):
    """It ends in the middle of a download."""
    cache = impatient(fleet, registry, regional)
    image = registry.push_image("library/large", "1", Image([("large", 12_000_000)], label="large"))
    registry.rule("paced", path="/blobs/", bytes_per_s=4_000_000)
    pulling = asyncio.create_task(pull(cache.address, "library/large", "1", image))
    await asyncio.sleep(1.5)
    at_registry = Requests(registry)
    regional.stop()
    fleet.check("a download that the regional cache broke off is whole", await pulling)
    fleet.equal("it was resumed at the registry", 1, at_registry.count("GET /v2/library/large/blobs/"))
    registry.drop("paced")
    fleet.check("and the rest alone was fetched there", at_registry.blob_bytes < 11_000_000, at_registry.blob_bytes)
