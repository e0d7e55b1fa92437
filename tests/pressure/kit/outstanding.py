"""Client with many outstanding requests."""

import asyncio

from kit import h2
from kit.client import blob, manifest
from kit.content import made_up_digest

GREEDY = "127.0.0.66"


async def keep_outstanding(load, address, connections, streams, headers):
    """Keeps this number of outstanding requests for unknown digests."""
    opened = [await h2.Connection.open(address, source=GREEDY) for _ in range(connections)]
    loop, counter = asyncio.get_running_loop(), iter(range(10**9))

    def ask(connection):
        if not connection.writer.is_closing():
            n = next(counter)
            kind = (blob, manifest)[n % 2]
            connection.request(kind("library/warm", made_up_digest("greedy", n)), headers)

    async def refill(connection):
        done = 0
        while not load.stopped.is_set():
            now_done = connection.responses + connection.resets
            for _ in range(now_done - done):
                loop.call_later(0.1, ask, connection)
            done = now_done
            await asyncio.sleep(0.05)

    tasks = []
    for connection in opened:
        for _ in range(streams):
            ask(connection)
        tasks += [asyncio.create_task(connection.read()), asyncio.create_task(refill(connection))]
    load.ready.set()
    await load.until_stopped()
    for task in tasks:
        task.cancel()
    for connection in opened:
        connection.close()
