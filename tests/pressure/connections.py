"""Idle connections: T10."""

import asyncio
import socket
import time

from downloads import timed_pull
from kit.client import Probe, manifest, pull
from kit.content import Image

IDLE = "127.0.0.77"


async def stay_idle(load, address, count):
    """Keeps `count` connections that send nothing. A closed one is opened again."""
    loop, sockets = asyncio.get_running_loop(), [None] * count

    def connect():
        client = socket.socket()
        client.setblocking(False)
        client.bind((IDLE, 0))
        client.connect_ex(address)
        return client

    def is_closed(client):
        try:
            return client.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or True

    for n in range(count):
        sockets[n] = connect()
        if n % 100 == 0:
            await asyncio.sleep(0.001)
    load.ready.set()
    while not load.stopped.is_set():
        for n, client in enumerate(sockets):
            if is_closed(client):
                client.close()
                sockets[n] = connect()
        await asyncio.sleep(0.5)


async def t10(lab):
    registry = lab.registry()
    program = lab.program(registry)
    image = registry.push_image("library/warm", "latest", Image([("warm", 1000)]))
    await pull(program.address, "library/warm", "latest", image)
    load = lab.background(stay_idle, program.address, 4200)
    await load.until_ready()
    # Longer than `header_timeout`, so that they are closed and opened again.
    probe = await Probe(program.address, manifest("library/warm", "latest"), every_s=0.05, timeout=30).seconds(13)
    lab.at_most("4,200 idle connections of one address, another's slowest request", probe.worst, 1, "s")
    lab.at_most("4,200 idle connections of one address, another's failures", len(probe.failures), 0)
    load.kill()
    program.stop()

    program = lab.program(registry, descriptors_max=256)
    images = [registry.push_image("library/cold", f"v{n}", Image([("cold", 1000 + n)])) for n in range(2)]
    quiet_s = await timed_pull(program, "library/cold", "v0", images[0])
    load = lab.background(stay_idle, program.address, 400)
    await load.until_ready()
    began = time.monotonic()
    cold_s = await timed_pull(program, "library/cold", "v1", images[1])
    lab.not_slower("256 descriptors and 400 idle connections, a cold pull", cold_s, quiet_s, floor_s=2)
    if cold_s == float("inf"):
        print(f"      given up after {time.monotonic() - began:.0f} s", flush=True)
