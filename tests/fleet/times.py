"""Times of a blob with a bucket 20 ms away: cold everywhere, and from a warm bucket."""

import asyncio
import statistics
import time

from bucket import NAME as BUCKET
from bucket import Bucket, host, signed
from kit.client import blob, get, manifest
from shared import image, metric, until_conditional, uploaded

NAME = "library/app"
LAYERS, LARGE_BYTES = 12, 100_000_000

# What each request to the bucket takes longer than on loopback.
DELAY_S = 0.02

# Bytes a second of the registry.
RATE = 40_000_000

# The client is the first to request a layer.
ALONE = "[default]\nprefetch = false\n"

# On a busy machine.
BOUND = 4


async def run(fleet):
    bucket, registry = Bucket(fleet), fleet.registry()
    delayed = fleet.background(delay, bucket.port)
    await delayed.until_ready()
    port = delayed.port.value
    small = registry.push_image(NAME, "small", image("small", LAYERS, 1_000_000))
    large = registry.push_image(NAME, "large", image("large", 1, LARGE_BYTES))
    first = host(fleet, registry, bucket, upstream=ALONE, port=port)
    await until_conditional(first)
    source = ("127.0.0.1", registry.port)
    for tag in ("small", "large"):
        await get(first.address, manifest(NAME, tag))

    absent = [f"absent-{number}" for number in range(LAYERS)]
    trip_ms = 1000 * bucket.first_byte_s(absent, port)
    direct = await first_bytes_ms(source, small)
    through = await first_bytes_ms(first.address, small)
    goal = round(2 * trip_ms + 3, 1)
    note = f"; a request to the bucket: {trip_ms:.1f}"
    fleet.at_most("cold everywhere, the first byte of a layer after that of a direct pull, in ms", through - direct, goal, note=note, bound=BOUND * goal)

    won = await metric(first, 'ifnewer_shared_claims_total{result="won"}')
    fleet.check("its layers are claimed", won >= LAYERS, won)

    registry.rule("slow", path="/blobs/", bytes_per_s=RATE)
    times = [(await get(address, blob(NAME, large.layers[0]), keep=False)).seconds for address in (source, first.address)]
    fleet.at_most("cold everywhere, a large layer, in times of a direct pull", times[1] / times[0], 1.02, bound=2)
    registry.drop("slow")

    fleet.check("the objects are uploaded", await uploaded(first, LAYERS + 1))
    paths = [path for path in bucket.objects("blobs") if "sha256:" + path.rpartition("/")[2] in small.layers]
    # By the same client, each object over a connection of its own, as those of the cache.
    plain = [await get(("127.0.0.1", port), f"/{BUCKET}/{path}", headers=signed(path, port), keep=False) for path in paths]
    plain_ms = median_ms(plain)
    second = host(fleet, registry, bucket, "write = false", upstream=ALONE, port=port)
    await get(second.address, manifest(NAME, "small"))
    warm = await first_bytes_ms(second.address, small)
    fleet.at_most("a warm bucket, the first byte of a layer after that of the bucket, in ms", warm - plain_ms, 3, bound=BOUND * 20)


async def delay(background, port):
    """Relays to the bucket, as over a longer way: what is sent arrives later."""

    async def relay(reader, writer, wait_s):
        on_the_way = asyncio.Queue()

        async def arrive():
            while True:
                due, piece = await on_the_way.get()
                await asyncio.sleep(due - time.monotonic())
                if not piece:
                    return writer.close()
                writer.write(piece)
                await writer.drain()

        arriving = asyncio.create_task(arrive())
        while piece := await reader.read(1 << 16):
            on_the_way.put_nowait((time.monotonic() + wait_s, piece))
        on_the_way.put_nowait((time.monotonic() + wait_s, b""))
        await arriving

    async def accept(reader, writer):
        from_bucket, to_bucket = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(relay(reader, to_bucket, DELAY_S), relay(from_bucket, writer, 0), return_exceptions=True)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        background.port.value = server.sockets[0].getsockname()[1]
        background.ready.set()
        await background.until_stopped()


async def first_bytes_ms(address, pushed):
    """Median time to the first byte of the layers, one after the other."""
    return median_ms([await get(address, blob(NAME, digest), keep=False) for digest in pushed.layers])


def median_ms(replies):
    assert all(reply.is_ok for reply in replies), [reply.cause() for reply in replies]
    return 1000 * statistics.median(reply.first_byte_s for reply in replies)
