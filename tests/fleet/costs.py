"""What pulls cost: numbers of requests, a tag that moves under many caches, and memory."""

import asyncio
import itertools
import json
import re

from bucket import Bucket, host
from fleet import Requests
from faults import record_key
from kit.client import LOCAL, get, manifest, pull
from kit.content import Image
from kit.lab import until
from shared import image, metric, recorded, until_conditional, uploaded

NAME = "library/app"
LAYERS = 10
HOSTS, MOVES, MOVE_S = 8, 16, 0.5

# The clock of the bucket is known to a second, at both ends.
CLOCK_S = 2


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    key = record_key(bucket)
    await requests(fleet, registry, bucket, key)
    await moving(fleet, registry, bucket, key)
    await memory(fleet, registry, bucket)


async def operations(cache):
    """Requests to the bucket by operation."""
    text = (await get(cache.admin, "/metrics", headers=LOCAL)).body.decode()
    found = {}
    for line in re.findall(r"^ifnewer_shared_requests_total\{(.*)\} (\d+)", text, re.M):
        operation = re.search(r'op="([^"]*)"', line[0])[1]
        found[operation] = found.get(operation, 0) + int(line[1])
    return found


async def requests(fleet, registry, bucket, key):
    """The table in docs/fleet.md rests on these numbers."""
    pushed = registry.push_image(NAME, "counted", image("counted", LAYERS))
    blobs = LAYERS + 1
    first = host(fleet, registry, bucket, key)
    await until_conditional(first)
    before, at_registry = await operations(first), Requests(registry)
    fleet.check("a pull that is cold everywhere", await pull(first.address, NAME, "counted", pushed))
    fleet.check("its objects are uploaded", await uploaded(first, blobs + 1))
    fleet.check("its records are written", await recorded(first))
    fleet.check("its claims end", await until(lambda: not [path for path in bucket.objects("claims") if "probe" not in path], 20))
    counts = [at_registry.count(what) for what in ("HEAD .*/manifests/", "GET .*/manifests/", "HEAD .*/blobs/", "GET .*/blobs/")]
    fleet.equal("its requests at the registry: HEAD and GET of manifests, of blobs", [1, 1, blobs, blobs], counts)
    # Those of claims that depend on time are not counted.
    exact = {"get": blobs + 1, "create": blobs + 1, "head": LAYERS, "claim-delete": LAYERS + 1, "record": 4, "record-create": 3}
    now = await operations(first)
    fleet.equal("its requests to the bucket", exact, {name: now.get(name, 0) - before.get(name, 0) for name in exact})
    won = await metric(first, 'ifnewer_shared_claims_total{result="manifest-won"}')
    fleet.equal("its claims of manifests, each one create and one deletion", 1, won)

    second = host(fleet, registry, bucket, f"{key}\nwrite = false")
    at_registry = Requests(registry)
    fleet.check("a pull by a cold cache with a warm bucket", await pull(second.address, NAME, "counted", pushed))
    counts = (at_registry.count("HEAD "), at_registry.count("GET "))
    fleet.equal("its requests at the registry: HEAD, GET", (1, 0), counts)
    fleet.equal("its requests to the bucket", {"get": blobs + 1, "record": 1}, await operations(second))
    third = host(fleet, registry, bucket, key)
    await until_conditional(third)
    before = await operations(third)
    fleet.check("the same by a cache that may claim", await pull(third.address, NAME, "counted", pushed))
    now = await operations(third)
    claims = {name: now[name] - before.get(name, 0) for name in now if name.startswith("claim") or name == "get"}
    fleet.equal("its reads, and its requests for claims", {"get": blobs + 1}, {name: count for name, count in claims.items() if count})
    third.stop()
    before = await operations(second)
    fleet.check("a warm pull", await pull(second.address, NAME, "counted", pushed))
    fleet.equal("its requests to the bucket", before, await operations(second))
    first.stop()
    second.stop()


async def moving(fleet, registry, bucket, key):
    """Caches confirm one tag while it moves. Its record never names an earlier digest again."""
    repository = "library/moving"
    images = [Image([("same", 1000)], config=("same-config", 500), label=number) for number in range(MOVES)]
    order = {pushed.digest: number for number, pushed in enumerate(images)}
    registry.push_image(repository, "1", images[0])
    hosts = [host(fleet, registry, bucket, key) for _ in range(HOSTS)]
    for cache in hosts:
        await until_conditional(cache)
    known, ended, failures, seen = set(bucket.objects("records/tag")), asyncio.Event(), [], []

    async def confirm(cache):
        while not ended.is_set():
            reply = await get(cache.address, manifest(repository, "1"), method="HEAD")
            if reply.status != 200:
                failures.append(reply.cause())

    def read():
        added = set(bucket.objects("records/tag")) - known
        return [order[each["digest"]] for path in added for each in json.loads(bucket.read(path))["variants"]]

    async def watch():
        while not ended.is_set():
            seen.extend(await asyncio.to_thread(read))

    async def move():
        for pushed in images:
            registry.push_image(repository, "1", pushed)
            await asyncio.sleep(MOVE_S)
        await asyncio.sleep(CLOCK_S)
        ended.set()

    await asyncio.gather(move(), watch(), *(confirm(cache) for cache in hosts))
    fleet.equal("a tag that moves: failed requests", [], failures)
    back = max(latest - now for latest, now in zip(itertools.accumulate(seen, max), seen, strict=True))
    fleet.at_most(f"its record, read {len(seen)} times, names a digest of s before", back * MOVE_S, CLOCK_S, bound=CLOCK_S)
    fleet.equal("the record names the last digest", MOVES - 1, (await asyncio.to_thread(read))[-1])
    lost = sum([await metric(cache, 'ifnewer_shared_records_total{class="tag",result="lost"}') for cache in hosts])
    fleet.equal("updates that were given up", 0, lost)
    for cache in hosts:
        cache.stop()


async def memory(fleet, registry, bucket):
    """Three uploads and three parts for other caches at once."""
    pushed = registry.push_image(NAME, "large", image("large", 6, 40_000_000))
    registry.rule("slow", path="/blobs/", bytes_per_s=10_000_000)
    alone = fleet.cache("regional.toml", more=f'[upstream."docker.io"]\nurl = "{registry.url}"\n')
    fleet.check("a large image without a bucket", await pull(alone.address, NAME, "large", pushed))
    owner, follower = host(fleet, registry, bucket), host(fleet, registry, bucket)
    for cache in (owner, follower):
        await until_conditional(cache)
    pulls = asyncio.create_task(pull(owner.address, NAME, "large", pushed))
    await asyncio.sleep(0.5)
    took = await asyncio.gather(pulls, pull(follower.address, NAME, "large", pushed))
    fleet.check("a large image for two caches", all(took), took)
    fleet.check("its objects are uploaded", await uploaded(owner, len(pushed.blobs) + 1))
    more = owner.rss_peak_mib() - alone.rss_peak_mib()
    fleet.at_most(f"memory beyond that without a bucket ({alone.rss_peak_mib():.0f} MiB), MiB", more, 32)
    registry.drop("slow")
