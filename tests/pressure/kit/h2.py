"""Minimal HTTP/2 for a misbehaving client: cleartext with prior knowledge, no dynamic table, no Huffman coding."""

import asyncio
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
END_STREAM, END_HEADERS, ACK = 1, 4, 1
WINDOW_BYTES_MAX = 2**31 - 1
CANCEL = 8
STATUS_200 = b"\x88"


def frame(kind, flags, stream, payload=b""):
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def text(value):
    """A string literal of HPACK, for strings below 127 bytes or a little above."""
    raw = value.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    return bytes([127, len(raw) - 127]) + raw


def get_headers(path, headers=()):
    fields = [(":method", "GET"), (":scheme", "http"), (":authority", "cache"), (":path", path), *headers]
    return b"".join(b"\0" + text(name) + text(value) for name, value in fields)


def settings(window_bytes):
    return struct.pack("!HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, window_bytes)


class Connection:
    """Sends requests, and reads only on request."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.next_stream = reader, writer, 1
        self.statuses_200, self.responses, self.resets, self.went_away = 0, 0, 0, False

    @staticmethod
    async def open(address, window_bytes=65535, source=None, receive_buffer=None):
        reader, writer = await asyncio.open_connection(*address, local_addr=(source, 0) if source else None)
        writer.write(PREFACE + frame(SETTINGS, 0, 0, settings(window_bytes)))
        if window_bytes > 65535:
            writer.write(frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", WINDOW_BYTES_MAX - 65535)))
        return Connection(reader, writer)

    def request(self, path, headers=()):
        stream = self.next_stream
        self.next_stream += 2
        self.writer.write(frame(HEADERS, END_STREAM | END_HEADERS, stream, get_headers(path, headers)))
        return stream

    def reset(self, stream):
        self.writer.write(frame(RST_STREAM, 0, stream, struct.pack("!I", CANCEL)))

    async def read(self):
        """Reads frames until the connection ends, and grants no window."""
        try:
            while True:
                head = await self.reader.readexactly(9)
                kind, flags = head[3], head[4]
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                if kind == HEADERS:
                    self.responses += 1
                    self.statuses_200 += payload.startswith(STATUS_200)
                elif kind == RST_STREAM:
                    self.resets += 1
                elif kind == SETTINGS and not flags & ACK:
                    self.writer.write(frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self.writer.write(frame(PING, ACK, 0, payload))
                elif kind == GOAWAY:
                    self.went_away = True
        except (asyncio.IncompleteReadError, OSError):
            pass

    def close(self):
        self.writer.transport.abort()
