"""Several caches over one bucket: a warm bucket, an unavailable one, and damaged or deleted objects."""

import asyncio
import random
import re
import signal
import time

from bucket import Bucket, host
from fleet import Requests
from kit.client import LOCAL, blob, get, manifest, pull
from kit.content import Image
from kit.lab import until

NAME = "library/app"

# Bytes a second of one connection to the storage services of clouds.
RATE = 60_000_000


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    await warm(fleet, registry, bucket)
    await damaged(fleet, registry, bucket)
    await deleted(fleet, registry, bucket)
    await frozen(fleet, registry, bucket)
    await killed(fleet, registry, bucket)


def image(label, layers=10, layer_bytes=3_000_000):
    return Image([(f"{label}-{n}", layer_bytes + n) for n in range(layers)], config=(f"{label}-config", 5000), label=label)


async def limit(background, port):
    """Relays to the bucket at a storage's usual rate of one connection."""

    async def relay(reader, writer, bytes_per_s=0):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
            if bytes_per_s:
                await asyncio.sleep(len(piece) / bytes_per_s)
        writer.close()

    async def accept(reader, writer):
        from_bucket, to_bucket = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(relay(reader, to_bucket), relay(from_bucket, writer, RATE), return_exceptions=True)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        background.port.value = server.sockets[0].getsockname()[1]
        background.ready.set()
        await background.until_stopped()


async def metric(cache, name):
    """Sum of the values of this metric; `name` may have labels."""
    text = (await get(cache.admin, "/metrics", headers=LOCAL)).body.decode()
    pattern = re.compile(rf"^{re.escape(name.removesuffix('}'))}[^ ]* ([\d.]+)$", re.M)
    return sum(float(value) for value in pattern.findall(text))


async def uploaded(cache, count):
    """Waits until this cache has uploaded so many objects."""
    for _ in range(600):
        if await metric(cache, 'ifnewer_shared_uploads_total{result="done"}') >= count:
            return True
        await asyncio.sleep(0.1)
    return False


async def recorded(cache, *classes, count=1):
    """Waits until this cache has written so many records of each class."""
    for _ in range(300):
        written = [await metric(cache, f'ifnewer_shared_records_total{{class="{name}",result="written"}}')
                   for name in classes or ("tag", "content", "public")]
        if min(written) >= count:
            return True
        await asyncio.sleep(0.1)
    return False


async def until_conditional(cache):
    """Waits until this cache knows that the bucket keeps conditions: without, there are no claims."""
    for _ in range(300):
        if await metric(cache, "ifnewer_shared_conditional") == 1:
            return
        await asyncio.sleep(0.1)
    raise RuntimeError("the cache does not use claims")


async def warm(fleet, registry, bucket):
    pushed = registry.push_image(NAME, "1", image("warm", layer_bytes=15_000_000))
    first = host(fleet, registry, bucket)
    fleet.check("a cold pull with an empty bucket", await pull(first.address, NAME, "1", pushed))
    count = len(pushed.blobs) + 1
    fleet.check(f"its {count} objects are uploaded", await uploaded(first, count))
    found = bucket.objects("blobs") + bucket.objects("manifests")
    fleet.equal("objects in the bucket", count, len(found))
    before = await metric(first, "ifnewer_shared_requests_total")
    fleet.check("a warm pull", await pull(first.address, NAME, "1", pushed))
    fleet.equal("requests to the bucket of a warm pull", before, await metric(first, "ifnewer_shared_requests_total"))

    limited = fleet.background(limit, bucket.port)
    await limited.until_ready()
    plain_s = min(bucket.download(found, limited.port.value) for _ in range(2))
    took = []
    for number in range(2):
        second = host(fleet, registry, bucket, "write = false", port=limited.port.value)
        at_registry = Requests(registry)
        took.append(await pull(second.address, NAME, "1", pushed) or 1e9)
        if number == 0:
            fleet.equal("bytes of a cold cache at the registry", 0, at_registry.blob_bytes)
            fleet.equal("its GETs at the registry", 0, at_registry.count("GET "))
            fleet.equal("its HEADs of the tag", 1, at_registry.count("HEAD .*/manifests/1$"))
            asked = await metric(second, "ifnewer_shared_requests_total")
            fleet.equal("its requests to the bucket", count, asked)
        second.stop()
    fleet.at_most("a cold cache with a warm bucket, in times of a download by curl", min(took) / plain_s, 1.15)
    first.stop()


async def damaged(fleet, registry, bucket):
    """Each kind of damage costs at most a repeated request, and the object is replaced."""
    pushed = registry.push_image(NAME, "damaged", image("damaged"))
    writer = host(fleet, registry, bucket)
    fleet.check("a cold pull", await pull(writer.address, NAME, "damaged", pushed))
    count = len(pushed.blobs) + 1
    fleet.check("its objects are uploaded", await uploaded(writer, count))
    writer.stop()
    paths = [path for path in bucket.objects("blobs") if "sha256:" + path.rpartition("/")[2] in [pushed.config, *pushed.layers]]
    intact = {path: bucket.read(path) for path in paths}
    flipped, truncated, longer, swapped, other, *_ = sorted(paths, key=lambda path: len(intact[path]), reverse=True)
    middle = bytearray(intact[flipped])
    middle[len(middle) // 2] ^= 1
    bucket.write(flipped, bytes(middle))
    bucket.write(truncated, intact[truncated][:-1000])
    bucket.write(longer, intact[longer] + b"more")
    bucket.write(swapped, intact[other])
    bucket.write(other, intact[swapped])
    [of_manifest] = [path for path in bucket.objects("manifests") if path.endswith(pushed.digest.removeprefix("sha256:"))]
    bucket.write(of_manifest, b'{"schemaVersion": 2}')

    reader = host(fleet, registry, bucket)
    reply = await get(reader.address, manifest(NAME, "damaged"))
    fleet.equal("the manifest, of which the bucket has other bytes", (True, pushed.digest), (reply.is_ok, reply.digest))
    repeated = 0
    for digest in [pushed.config, *pushed.layers]:
        reply = await get(reader.address, blob(NAME, digest), keep=False)
        if not reply.is_ok:
            fleet.check("a damaged response broke off", not reply.is_whole or reply.status == 0, reply.status)
            repeated += 1
            reply = await get(reader.address, blob(NAME, digest), keep=False)
        fleet.check("a blob has its digest", reply.is_ok and reply.digest == digest, reply.cause())
    # One is flipped and two are swapped. Objects of another size are not begun.
    fleet.check("responses that broke off, at most three", repeated <= 3, repeated)
    fleet.check("damage is counted", await metric(reader, "ifnewer_shared_wrong_objects_total") >= 1)
    is_replaced = await until(lambda: all(bucket.read(path) == content for path, content in intact.items()), 20, 0.5)
    fleet.check("the right bytes replace the damaged objects", is_replaced,
                [path for path, content in intact.items() if bucket.read(path) != content])
    reader.stop()


async def deleted(fleet, registry, bucket):
    """A lifecycle rule deletes objects while they are read."""
    pushed = registry.push_image(NAME, "deleted", image("deleted", layer_bytes=8_000_000))
    writer = host(fleet, registry, bucket)
    fleet.check("a cold pull", await pull(writer.address, NAME, "deleted", pushed))
    fleet.check("its objects are uploaded", await uploaded(writer, len(pushed.blobs) + 1))
    writer.stop()
    readers = [host(fleet, registry, bucket, "write = false") for _ in range(3)]
    paths = [path for kind in ("blobs", "manifests") for path in bucket.objects(kind)]
    random.Random(1).shuffle(paths)

    async def delete():
        for path in paths:
            await asyncio.to_thread(bucket.delete, path)

    results = await asyncio.gather(delete(), *(pull(cache.address, NAME, "deleted", pushed) for cache in readers))
    fleet.check("pulls while all objects are deleted", all(results[1:]), results[1:])
    for cache in readers:
        cache.stop()


async def frozen(fleet, registry, bucket):
    """The bucket accepts connections and sends nothing."""
    held = registry.push_image(NAME, "held", image("held", 3))
    cache = host(fleet, registry, bucket)
    fleet.check("a pull before it freezes", await pull(cache.address, NAME, "held", held))
    quiet = await unchanged(cache, held)
    bucket.signal(signal.SIGSTOP)
    try:
        waits = []
        for number in range(4):
            cold = registry.push_image(NAME, f"frozen-{number}", image(f"frozen {number}", 1, 500_000))
            waits.append(await pull(cache.address, NAME, f"frozen-{number}", cold) or 1e9)
        fleet.at_most("a frozen bucket, the slowest of four cold pulls", max(waits), 2.5, "s")
        fleet.at_most("a frozen bucket, the last of them", waits[-1], 0.5, "s")
        fleet.not_slower("a frozen bucket, unchanged pulls", await unchanged(cache, held), quiet)
        ready = await get(cache.admin, "/readyz", headers=LOCAL)
        fleet.check("a frozen bucket, readiness", ready.status == 200 and b"cannot be read" in ready.body, ready.body)
    finally:
        bucket.signal(signal.SIGCONT)
    back = await until(lambda: cache.says("shared storage available again"), 40)
    fleet.check("the bucket is used again", back)
    cache.stop()


async def unchanged(cache, held):
    """The median time of a pull of cached content."""
    times = sorted([await pull(cache.address, NAME, "held", held) or 1e9 for _ in range(15)])
    return times[len(times) // 2]


async def killed(fleet, registry, bucket):
    """The bucket ends in the middle of reads and uploads."""
    images = [registry.push_image(NAME, f"killed-{n}", image(f"killed {n}", 4, 12_000_000)) for n in range(2)]
    writer = host(fleet, registry, bucket)
    fleet.check("a cold pull", await pull(writer.address, NAME, "killed-0", images[0]))
    fleet.check("its objects are uploaded", await uploaded(writer, len(images[0].blobs) + 1))
    readers = [host(fleet, registry, bucket) for _ in range(3)]
    began = time.monotonic()
    pulls = [pull(cache.address, NAME, f"killed-{n}", images[n]) for cache in readers for n in range(2)]
    tasks = [asyncio.create_task(one) for one in pulls]
    await asyncio.sleep(0.3)
    bucket.stop()
    results = await asyncio.gather(*tasks)
    fleet.check(f"{len(results)} pulls while the bucket ends", all(results), results)
    fleet.at_most("their time", time.monotonic() - began, 10, "s")
    bucket.start()
    back = await until(lambda: all(cache.says("shared storage available again") for cache in readers
                                   if cache.says("shared storage unavailable")), 40)
    fleet.check("the bucket is used again", back)
    for cache in [writer, *readers]:
        cache.stop()
