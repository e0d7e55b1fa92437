"""Clients of the cache: HTTP/1.1 requests with their time, and helpers of misbehaving clients."""

import asyncio
import dataclasses
import hashlib
import time

from kit.content import MANIFEST

TIMEOUT_S = 60


@dataclasses.dataclass
class Reply:
    status: int
    headers: dict
    body: bytes
    size: int
    is_whole: bool
    head_s: float
    seconds: float
    digest: str = ""
    first_byte_s: float = 0.0

    @property
    def is_ok(self):
        return self.status == 200 and self.is_whole

    @property
    def is_stale(self):
        return "warning" in self.headers

    def cause(self):
        return self.headers.get("cache-status") or self.body[:200].decode(errors="replace") or "no reply"


NO_REPLY = 0

# The admin listener accepts only a name of this machine.
LOCAL = {"Host": "localhost"}


async def get(address, path, method="GET", headers=None, source=None, timeout=TIMEOUT_S, keep=True):
    """One request on a separate connection, from this address of 127.0.0.0/8. Never raises: status 0 means no response."""
    began = time.monotonic()
    reply = Reply(NO_REPLY, {}, b"", 0, False, 0.0, 0.0)
    try:
        async with asyncio.timeout(timeout):
            await exchange(reply, address, path, method, headers or {}, source, keep, began)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ValueError) as failure:
        reply.body = reply.body or repr(failure).encode()
    reply.seconds = time.monotonic() - began
    return reply


async def exchange(reply, address, path, method, headers, source, keep, began):
    local = (source, 0) if source else None
    reader, writer = await asyncio.open_connection(*address, local_addr=local, limit=1 << 20)
    try:
        writer.write(request(path, method, {"Connection": "close", **headers}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        reply.head_s = time.monotonic() - began
        first, *lines = head[:-4].split("\r\n")
        reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        reply.status = int(first.split(" ")[1])
        hash_, pieces = hashlib.sha256(), []
        async for piece in body_of(reader, method, reply):
            reply.first_byte_s = reply.first_byte_s or time.monotonic() - began
            reply.size += len(piece)
            hash_.update(piece)
            if keep:
                pieces.append(piece)
        reply.body, reply.digest = b"".join(pieces), "sha256:" + hash_.hexdigest()
        wanted = reply.headers.get("docker-content-digest")
        reply.is_whole = method == "HEAD" or reply.status != 200 or wanted in (None, reply.digest)
    finally:
        writer.transport.abort()


async def body_of(reader, method, reply):
    if method == "HEAD" or reply.status in (204, 304):
        return
    if reply.headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return
    left = int(reply.headers.get("content-length", 0))
    while left:
        piece = await reader.read(min(left, 1 << 18))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def request(path, method="GET", headers=None):
    lines = {"Host": "cache", "Accept": MANIFEST, **(headers or {})}
    return f"{method} {path} HTTP/1.1\r\n{''.join(f'{n}: {v}' + chr(13) + chr(10) for n, v in lines.items())}\r\n".encode()


def manifest(repository, reference):
    return f"/v2/{repository}/manifests/{reference}"


def blob(repository, digest):
    return f"/v2/{repository}/blobs/{digest}"


async def pull(address, repository, tag, image, **options):
    """The manifest, then all blobs at once, as real clients do. Seconds, or None if content is wrong."""
    began = time.monotonic()
    reply = await get(address, manifest(repository, tag), **options)
    if not reply.is_ok or reply.digest != image.digest:
        return None
    digests = dict.fromkeys([image.config, *image.layers])
    blobs = await asyncio.gather(*(get(address, blob(repository, d), **{**options, "keep": False}) for d in digests))
    return time.monotonic() - began if all(reply.is_ok for reply in blobs) else None


class Probe:
    """Repeats a request during another load, and records the times."""

    def __init__(self, address, path, every_s=0.01, **options):
        self.address, self.path, self.every_s = address, path, every_s
        # Options, or a function that returns them for each request.
        self.options = options.pop("each", lambda: options)
        self.replies, self.starts, self.task = [], [], None

    async def __aenter__(self):
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_):
        # The current request counts with its time so far, because it may be the slow one.
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def run(self):
        while True:
            began = time.monotonic()
            try:
                reply = await get(self.address, self.path, **self.options())
            except asyncio.CancelledError:
                if time.monotonic() - began > 0.5:
                    self.replies.append(Reply(NO_REPLY, {}, b"no response", 0, False, 0.0, time.monotonic() - began))
                raise
            self.replies.append(reply)
            await asyncio.sleep(self.every_s)

    async def seconds(self, seconds):
        async with self:
            await asyncio.sleep(seconds)
        return self

    @property
    def failures(self):
        return [reply for reply in self.replies if reply.status not in (200, 206)]

    @property
    def p99(self):
        times = sorted(reply.seconds for reply in self.replies)
        return times[min(len(times) - 1, int(len(times) * 0.99))] if times else float("inf")

    @property
    def worst(self):
        return max((reply.seconds for reply in self.replies), default=float("inf"))
