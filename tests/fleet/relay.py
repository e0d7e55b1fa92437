"""A relay in front of a server: it passes requests on, answers them itself, or loses them."""

import asyncio

from kit.process import forks

PASS, CUT, SILENT, SLOW = range(4)
SLOW_S = 2
PIECE_BYTES = 1 << 16


class Relay:
    """Relays to this port of this machine in another process. A status of HTTP as the mode is the response to each request."""

    def __init__(self, fleet, port):
        self.mode = forks.Value("i", PASS)
        self.background = fleet.background(serve, port, self.mode)
        while not self.background.ready.wait(0.1):
            assert self.background.process.is_alive(), "the relay has ended"
        self.port = self.background.port.value

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def switch(self, mode):
        """Ends the connections of the mode before."""
        self.mode.value = mode


async def serve(background, port, mode):
    connections = set()

    async def accept(reader, writer):
        connection = asyncio.current_task()
        connections.add(connection)
        try:
            await serve_one(reader, writer, port, mode.value)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            connections.discard(connection)
            writer.transport.abort()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        background.port.value = server.sockets[0].getsockname()[1]
        background.ready.set()
        current = mode.value
        while not background.stopped.is_set():
            await asyncio.sleep(0.01)
            if mode.value != current:
                current = mode.value
                for connection in list(connections):
                    connection.cancel()


async def serve_one(reader, writer, port, mode):
    if mode == CUT:
        return
    if mode == SILENT:
        while await reader.read(PIECE_BYTES):
            pass
        return
    if mode not in (PASS, SLOW):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {mode} Status\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        return
    from_server, to_server = await asyncio.open_connection("127.0.0.1", port)

    async def relay(source, target, after_s=0):
        while piece := await source.read(PIECE_BYTES):
            await asyncio.sleep(after_s)
            target.write(piece)
            await target.drain()
        target.close()

    try:
        await asyncio.gather(relay(reader, to_server), relay(from_server, writer, SLOW_S if mode == SLOW else 0))
    finally:
        to_server.transport.abort()
