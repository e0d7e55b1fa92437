"""Memory that clients and the status page cause: T3, T18."""

import asyncio
import socket
import time

from kit import h2
from kit.client import LOCAL, Probe, blob, get, manifest, pull, request
from kit.content import Image
from kit.lab import shown

RSS_MIB_MAX = 128
# A connection that had an HTTP/1 request takes some 16 KiB outside the budget of response bytes.
RSS_MIB_BOUND = 200
RSS_AT_REST_MIB_MAX = 64
LOOKING_MIB_MAX = 64
ATTACK_S = 6
REST_S = 8


async def unread_streams(load, address, path, connections, streams, window_bytes, reads):
    opened = []
    for number in range(connections):
        connection = await h2.Connection.open(address, window_bytes, source="127.0.0.66")
        opened.append(connection)
        if reads:
            load.readers = [*getattr(load, "readers", []), asyncio.create_task(connection.read())]
        else:
            connection.writer.transport.pause_reading()
        for _ in range(streams):
            connection.request(path)
        await asyncio.sleep(0)
    load.ready.set()
    await load.until_stopped()
    for connection in opened:
        connection.close()


async def slow_readers(load, address, path, addresses, connections):
    """Each reads a few bytes a second, so it is not idle."""
    sockets = []
    for number in range(addresses):
        for _ in range(connections):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            client.bind((f"127.0.1.{number + 1}", 0))
            try:
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(client, address), 2)
                client.send(request(path))
            except OSError:
                continue
            sockets.append(client)
    load.ready.set()
    while not load.stopped.is_set():
        for client in sockets:
            try:
                client.recv(512)
            except OSError:
                pass
        await asyncio.sleep(0.5)


async def large_pulls(load, address, paths, pulls):
    """Large blobs at once, read as fast as possible."""

    async def one(path):
        reader, writer = await asyncio.open_connection(*address, local_addr=("127.0.0.80", 0), limit=1 << 18)
        writer.write(request(path))
        while await reader.read(1 << 18):
            pass

    load.ready.set()
    tasks = [asyncio.create_task(one(paths[n % len(paths)])) for n in range(pulls)]
    await load.until_stopped()
    for task in tasks:
        task.cancel()


async def t03(lab):
    registry = lab.registry()
    program = lab.program(registry)
    three = registry.push_image("library/three", "latest", Image([("three", 3_000_000)]))
    await pull(program.address, "library/three", "latest", three)
    path = blob("library/three", three.layers[0])
    quiet = await Probe(program.address, manifest("library/three", "latest")).seconds(1)
    attacks = {
        "20 connections x 100 unread streams": (unread_streams, program.address, path, 20, 100, h2.WINDOW_BYTES_MAX, False),
        "2,000 streams with window 0": (unread_streams, program.address, path, 20, 100, 0, True),
        "2,000 slow HTTP/1 readers": (slow_readers, program.address, path, 10, 200),
    }
    for what, attack in attacks.items():
        await attacked(lab, what, program, quiet, [attack])
    large = registry.push_image("library/large", "latest", Image([("large", 300 << 20)]))
    await get(program.address, manifest("library/large", "latest"))
    paths = [blob("library/large", digest) for digest in large.layers]
    await asyncio.gather(*(get(program.address, path, keep=False) for path in paths))
    pulls = (large_pulls, program.address, paths, 64)
    # 64 fast readers share two processors here, so the latency of others is not measured.
    await attacked(lab, "all of these and 64 pulls of 300 MiB", program, None, [*attacks.values(), pulls])
    await asyncio.sleep(REST_S)
    lab.at_most(f"after {REST_S} s of rest, RSS", program.rss_mib(), RSS_AT_REST_MIB_MAX, "MiB", bound=RSS_MIB_BOUND)


async def attacked(lab, what, program, quiet, attacks):
    program.forget_peak()
    loads = [lab.background(*attack) for attack in attacks]
    for load in loads:
        await load.until_ready()
    probe = await Probe(program.address, manifest("library/three", "latest")).seconds(ATTACK_S)
    lab.at_most(f"{what}, RSS at most", program.rss_peak_mib(), RSS_MIB_MAX, "MiB", bound=RSS_MIB_BOUND)
    if quiet:
        lab.not_slower(f"{what}, another's p99", probe.p99, quiet.p99, times=3)
    lab.at_most(f"{what}, another's failures", len(probe.failures), 0)
    for load in loads:
        load.kill()
    await asyncio.sleep(0.5)


# --- T18 --------------------------------------------------------------------------------------------------------------

TAGS = 4000


async def t18(lab):
    registry = lab.registry()
    program = lab.program(registry)
    for n in range(TAGS):
        registry.push_image(f"library/app{n % 40}", f"v{n}", Image([("shared", 1000)], label=n))
    one = Image([("shared", 1000)])
    began = time.monotonic()

    async def pull_each(numbers):
        for n in numbers:
            await get(program.address, manifest(f"library/app{n % 40}", f"v{n}"))

    await asyncio.gather(*(pull_each(range(begin, TAGS, 8)) for begin in range(8)))
    for n in range(40):
        await get(program.address, blob(f"library/app{n}", one.layers[0]))
        await get(program.address, blob(f"library/app{n}", one.config))
    print(f"      {TAGS} tags were cached in {time.monotonic() - began:.0f} s: {shown(program.rss_mib())} MiB", flush=True)
    program.forget_peak()
    looks = {
        "three views of the page": [("/", 3)],
        "then two of /api/v1/images": [("/api/v1/images", 2)],
        "then `ifnewer ls`": [],
        "then 450 of /api/v1/images?limit=100": [("/api/v1/images?limit=100", 450)],
    }
    for what, paths in looks.items():
        if not paths:
            program.command("ls")
        for path, times in paths:
            replies = [await get(program.admin, path, headers=LOCAL) for _ in range(times)]
            wrong = [reply for reply in replies if reply.status != 200]
            if wrong:
                lab.report(False, f"{what}: {wrong[0].status} {wrong[0].body[:200]}")
            slowest = sorted(reply.seconds for reply in replies)[len(replies) // 2]
            print(f"      {what}: median {shown(slowest * 1000)} ms", flush=True)
        lab.at_most(f"{TAGS} tags, {what}, RSS at most", program.rss_peak_mib(), LOOKING_MIB_MAX, "MiB", bound=80)
    await asyncio.sleep(REST_S)
    lab.at_most(f"{TAGS} tags, after {REST_S} s of rest, RSS", program.rss_mib(), LOOKING_MIB_MAX, "MiB", bound=80)
