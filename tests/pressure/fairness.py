"""A client that sends many requests and disconnects: T8, T9."""

import asyncio
import time

from kit import h2
from kit.client import Probe, blob, get, manifest, pull, request
from kit.content import Image, made_up_digest
from kit.outstanding import GREEDY, keep_outstanding
from downloads import introduced, timed_pull

async def with_warm_tag(lab, registry, **options):
    program = lab.program(registry, **options)
    warm = registry.push_image("library/warm", "latest", Image([("warm", 1000)]))
    await pull(program.address, "library/warm", "latest", warm)
    return program


# --- T8 ---------------------------------------------------------------------------------------------------------------


async def ask_and_leave(load, address, count, at_once):
    """Each on a separate connection: a request for a digest without content, sent and abandoned."""

    async def one(n):
        try:
            _, writer = await asyncio.open_connection(*address, local_addr=(GREEDY, 0))
        except OSError:
            return
        writer.write(request(blob("library/warm", made_up_digest("left", n))))
        await asyncio.sleep(0.03)
        writer.transport.abort()

    for begin in range(0, count, at_once):
        await asyncio.gather(*(one(n) for n in range(begin, begin + at_once)))


async def reset_streams(load, address, connections, streams):
    for number in range(connections):
        connection = await h2.Connection.open(address, source=GREEDY)
        reading = asyncio.create_task(connection.read())
        for n in range(streams):
            stream = connection.request(blob("library/warm", made_up_digest("reset", number, n)))
            await asyncio.sleep(0.0005)
            connection.reset(stream)
        await asyncio.sleep(0.02)
        reading.cancel()
        connection.close()


async def t08(lab):
    await abandoned(lab)
    await abandoned_in_silence(lab, "requests", ask_and_leave, 8000, 160)
    await abandoned_in_silence(lab, "HTTP/2 streams", reset_streams, 160, 50)
    await one_byte_of_each(lab)


async def abandoned(lab):
    registry = lab.registry()
    program = await with_warm_tag(lab, registry, more="[default]\nprefetch = false")
    images = [Image([("cold", 1000 + n)], label=n) for n in range(2)]
    for n, image in enumerate(images):
        registry.push_image("library/cold", f"v{n}", image)
    registry.rule("slow", path="/blobs/", after_s=0.4)
    quiet_s = await timed_pull(program, "library/cold", "v0", images[0])
    since = time.monotonic()
    load = lab.background(ask_and_leave, program.address, 1500, 150)
    await load.result()
    pulled_s = await timed_pull(program, "library/cold", "v1", images[1])
    lab.not_slower("1,500 abandoned requests, a cold pull after them", pulled_s, quiet_s)
    await asyncio.sleep(2)
    lab.at_most("1,500 abandoned requests, requests upstream", registry.requests("/library/warm/blobs/", since), 300, bound=600)
    program.stop()


async def abandoned_in_silence(lab, what, function, count, at_once):
    registry = lab.registry()
    program = await with_warm_tag(lab, registry)
    registry.rule("hang", path="/blobs/", silent=True)
    before = program.rss_mib()
    load = lab.background(function, program.address, count, at_once)
    await load.result(90)
    lab.at_most(f"8,000 {what} abandoned in an outage, RSS {before:.0f} MiB before, peak", program.rss_peak_mib(), 64, "MiB", bound=96)
    since = time.monotonic()
    registry.drop("hang")
    await asyncio.sleep(3)
    late = registry.requests("/library/warm/blobs/", since)
    lab.at_most(f"8,000 {what} abandoned in an outage, requests upstream after it", late, 300, bound=600)
    program.stop()


async def one_byte_of_each(lab):
    registry = lab.registry()
    program = await with_warm_tag(lab, registry, more="[default]\nprefetch = false")
    paths = await introduced(program, registry, "library/big", [("big", 5_000_000 + n) for n in range(20)])
    registry.rule("paced", path="/library/big/blobs/", bytes_per_s=2_500_000)
    before = registry.counters()["blob_bytes"]
    replies = await asyncio.gather(*(get(program.address, path, headers={"Range": "bytes=0-0"}) for path in paths))
    lab.at_least("the first byte of 20 cold blobs, successful", sum(reply.status in (200, 206) for reply in replies), 20)
    await asyncio.sleep(4)
    fetched = (registry.counters()["blob_bytes"] - before) / 1e6
    lab.at_most("the first byte of 20 cold blobs of 5 MB, then abandoned: fetched", fetched, 20, "MB", bound=60)
    program.stop()


# --- T9 ---------------------------------------------------------------------------------------------------------------


async def t09(lab):
    registry = lab.registry()
    program = await with_warm_tag(lab, registry, more="[default]\nprefetch = false")
    images = [Image([("cold", 1000 + n)], label=n) for n in range(3)]
    for n, image in enumerate(images):
        registry.push_image("library/cold", f"v{n}", image)
    registry.rule("tags", path="/manifests/", after_s=0.05)
    registry.rule("slow", path="/(blobs|manifests)/sha256:", after_s=0.4)
    path = manifest("library/warm", "latest")
    quiet = await Probe(program.address, path).seconds(2)
    quiet_s = await timed_pull(program, "library/cold", "v0", images[0])

    load = lab.background(keep_outstanding, program.address, 40, 100, ())
    await load.until_ready()
    await asyncio.sleep(1)
    async with Probe(program.address, path) as elsewhere, Probe(
        program.address, path, source=GREEDY, headers={"Authorization": "Basic b3RoZXI6cHJpbmNpcGFs"}
    ) as same:
        cold_s = await timed_pull(program, "library/cold", "v1", images[1])
        await asyncio.sleep(3)
    lab.not_slower("beside 4,000 outstanding requests, a warm tag's p99", elsewhere.p99, quiet.p99)
    lab.at_most("beside 4,000 outstanding requests, stale responses", sum(r.is_stale for r in elsewhere.replies), 0)
    lab.not_slower("beside 4,000 outstanding requests, a cold pull", cold_s, quiet_s)
    lab.not_slower("the same address, another principal, a warm tag's p99", same.p99, quiet.p99)
    await load.finish()
    began, quick = time.monotonic(), 0
    while quick < 5 and time.monotonic() - began < 20:
        reply = await get(program.address, path)
        quick = quick + 1 if reply.seconds <= max(2 * quiet.p99, 0.1) and not reply.is_stale else 0
    lab.at_most("after them, normal speed within", time.monotonic() - began, 1.5, "s")
