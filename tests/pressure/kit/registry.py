"""Scripted registry in a separate process, so that its work does not slow down the measuring client.

It knows the manifests and blobs that were pushed, and rules. The first rule whose method and path match says what
becomes of a request: no answer, a status, an answer later, a body at some rate.
"""

import asyncio
import dataclasses
import json
import os
import pickle
import re
import signal
import socket
import struct
import threading
import time

from kit.content import MANIFEST, digest_of, noise, noise_digest
from kit.process import die_with_parent

STEP_S = 0.1


@dataclasses.dataclass
class Rule:
    name: str
    methods: str
    path: str
    silent: bool = False
    status: int = 0
    headers: str = ""
    after_s: float = 0.0
    bytes_per_s: int = 0
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


@dataclasses.dataclass
class Seen:
    """A request that arrived."""

    at: float
    method: str
    path: str
    authorization: str


class State:
    """State in the registry's process. The test can call each public method."""

    def __init__(self):
        self.manifests, self.tags, self.blobs, self.rules, self.seen = {}, {}, {}, [], []
        self.allowed, self.needs_token, self.token_readers, self.token_host = {}, False, {}, ""
        self.blob_bytes_sent, self.in_progress, self.in_progress_max = 0, 0, 0
        self.connections, self.server, self.port, self.fillers = set(), None, 0, []

    # --- called from the test

    def push(self, repository, tag, manifest, blobs):
        digest = digest_of(manifest)
        self.manifests[repository, tag] = self.manifests[repository, digest] = manifest
        self.tags.setdefault(repository, []).append(tag)
        for blob in blobs:
            self.blobs[noise_digest(*blob)] = blob

    def rule(self, name, methods="GET HEAD", path=".*", **what):
        self.drop(name)
        self.rules.insert(0, Rule(name, methods, path, **what))

    def drop(self, name):
        """Responds to the requests that this rule has stalled."""
        for rule in [rule for rule in self.rules if rule.name == name]:
            self.rules.remove(rule)
            rule.ended.set()

    def allow(self, repository, credentials):
        """Restricts reads to these values of Authorization."""
        self.allowed[repository] = frozenset(credentials)

    def need_token(self):
        """Requires a token of this registry. Other requests get a challenge."""
        self.needs_token = True

    def allow_by_token(self, repository, credentials, host="localhost"):
        """Restricts reads to tokens that the token service at this host issues to these values of Authorization."""
        self.token_readers[repository] = frozenset(credentials)
        self.token_host = host

    def credentials(self, pattern):
        """The different values of Authorization in requests "METHOD path"."""
        matches = re.compile(pattern).search
        return {seen.authorization for seen in self.seen if matches(f"{seen.method} {seen.path}")}

    def requests(self, pattern, since=0.0):
        """Number of requests "METHOD path"."""
        matches = re.compile(pattern).search
        return sum(1 for seen in self.seen if seen.at >= since and matches(f"{seen.method} {seen.path}"))

    def first_request(self, pattern, since=0.0):
        matches = re.compile(pattern).search
        return next((s.at for s in self.seen if s.at >= since and matches(f"{s.method} {s.path}")), None)

    def counters(self):
        return {"blob_bytes": self.blob_bytes_sent, "in_progress": self.in_progress, "most": self.in_progress_max}

    def refuse(self):
        """Stops listening and resets all connections."""
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()

    def drop_packets(self):
        """A SYN is dropped: the queue of a listener that never accepts is full."""
        self.refuse()
        listener = listening(self.port, 0)
        self.fillers = [listener]
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self.fillers.append(filler)

    async def listen(self):
        for filler in self.fillers:
            filler.close()
        self.fillers = []
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Connection(self), sock=listening(self.port, 4096))
        self.port = self.server.sockets[0].getsockname()[1]
        return self.port

    # --- requests

    def rule_for(self, method, path):
        for rule in self.rules:
            if method in rule.methods.split() and re.search(rule.path, path):
                return rule
        return None

    def respond(self, method, path, authorization):
        """(status, headers, body) of a registry without faults."""
        path = path.partition("?")[0]
        if path == "/token":
            token = token_of(authorization) if self.token_readers else "good"
            return 200, {"Content-Type": "application/json"}, json.dumps({"token": token, "expires_in": 3600}).encode()
        if self.needs_token and authorization != "Bearer good":
            realm = f'Bearer realm="http://127.0.0.1:{self.port}/token",service="registry",scope="repository:x:pull"'
            return 401, {"WWW-Authenticate": realm, "Content-Type": "application/json"}, error("UNAUTHORIZED")
        if path in ("/v2/", "/v2"):
            return 200, {"Content-Type": "application/json"}, b"{}"
        found = re.fullmatch(r"/v2/(.+)/(manifests|blobs|tags)/([^/]+)", path)
        if not found:
            return 404, {"Content-Type": "application/json"}, error("NAME_UNKNOWN")
        repository, kind, reference = found.groups()
        if repository in self.allowed and authorization not in self.allowed[repository]:
            challenge = {"WWW-Authenticate": 'Basic realm="pressure"', "Content-Type": "application/json"}
            return 401, challenge, error("UNAUTHORIZED")
        readers = {f"Bearer {token_of(reader)}" for reader in self.token_readers.get(repository, ())}
        if repository in self.token_readers and authorization not in readers:
            scope = f'service="registry",scope="repository:{repository}:pull"'
            realm = f'Bearer realm="http://{self.token_host}:{self.port}/token",{scope}'
            return 401, {"WWW-Authenticate": realm, "Content-Type": "application/json"}, error("UNAUTHORIZED")
        if kind == "tags":
            body = json.dumps({"name": repository, "tags": sorted(set(self.tags.get(repository, [])))}).encode()
            return 200, {"Content-Type": "application/json"}, body
        if kind == "manifests":
            manifest = self.manifests.get((repository, reference))
            if manifest is None:
                return 404, {"Content-Type": "application/json"}, error("MANIFEST_UNKNOWN")
            return 200, {"Content-Type": MANIFEST, "Docker-Content-Digest": digest_of(manifest)}, manifest
        blob = self.blobs.get(reference)
        if blob is None:
            return 404, {"Content-Type": "application/json"}, error("BLOB_UNKNOWN")
        return 200, {"Content-Type": "application/octet-stream", "Docker-Content-Digest": reference}, noise(*blob)


def token_of(credential):
    """The token that the token service issues to this value of Authorization."""
    return f"token-{digest_of(credential.encode())[7:23]}"


def error(code):
    return json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode()


def listening(port, backlog):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(backlog)
    return listener


class Connection(asyncio.Protocol):
    """One connection. Its requests are served one after the other."""

    def __init__(self, state):
        self.state, self.unread, self.task, self.transport = state, b"", None, None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport):
        self.transport = transport
        self.state.connections.add(self)

    def connection_lost(self, _):
        self.state.connections.discard(self)
        self.writable.set()
        if self.task:
            self.task.cancel()

    def pause_writing(self):
        self.writable.clear()

    def resume_writing(self):
        self.writable.set()

    def data_received(self, data):
        self.unread += data
        if not self.task:
            self.next_request()

    def next_request(self):
        self.task = None
        head, end, rest = self.unread.partition(b"\r\n\r\n")
        if not end:
            return
        self.unread = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        state = self.state
        state.seen.append(Seen(time.monotonic(), method, path, headers.get("authorization", "")))
        self.task = asyncio.get_running_loop().create_task(self.answer(method, path, headers))

    async def answer(self, method, path, headers):
        state = self.state
        state.in_progress += 1
        state.in_progress_max = max(state.in_progress_max, state.in_progress)
        try:
            rule = state.rule_for(method, path)
            if rule and rule.silent:
                await rule.ended.wait()
            if rule and rule.after_s:
                await asyncio.sleep(rule.after_s)
            if rule and rule.status:
                status, more, body = rule.status, {"Content-Type": "application/json"}, error("UNKNOWN")
            else:
                status, more, body = state.respond(method, path, headers.get("authorization", ""))
            await self.send(method, path, status, more, body, headers.get("range"), rule.bytes_per_s if rule else 0)
        finally:
            state.in_progress -= 1
        self.next_request()

    async def send(self, method, path, status, headers, body, range_, bytes_per_s):
        spans = re.fullmatch(r"bytes=(\d+)-(\d*)", range_ or "") if status == 200 else None
        if spans:
            begin, end = int(spans[1]), min(int(spans[2] or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
            status, body = 206, body[begin : end + 1]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} Status\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
        if method == "HEAD":
            self.transport.write(head)
            return
        if not bytes_per_s and len(body) <= 65536:
            self.count(path, len(body))
            self.transport.write(head + body)
            return
        self.transport.write(head)
        step = max(1, int(bytes_per_s * STEP_S)) if bytes_per_s else 1 << 20
        body = memoryview(body)
        for at in range(0, len(body), step):
            await self.writable.wait()
            if self.transport.is_closing():
                return
            piece = body[at : at + step]
            self.count(path, len(piece))
            self.transport.write(piece)
            if bytes_per_s:
                await asyncio.sleep(STEP_S)

    def count(self, path, size):
        if "/blobs/" in path:
            self.state.blob_bytes_sent += size


class Registry:
    """Handle in the test: calls methods of `State` in the registry's process."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            die_with_parent()
            try:
                asyncio.run(serve(theirs))
            finally:
                os._exit(0)
        theirs.close()
        self.wire, self.lock = ours, threading.Lock()
        self.port = self.listen()
        self.url = f"http://127.0.0.1:{self.port}"

    def __getattr__(self, method):
        def call(*positional, **named):
            with self.lock:
                send(self.wire, (method, positional, named))
                failed, result = receive(self.wire)
            if failed:
                raise RuntimeError(f"{method}: {result}")
            return result

        return call

    def push_image(self, repository, tag, image):
        self.push(repository, tag, image.manifest, image.blobs)
        return image

    def stop(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.wire.close()


async def serve(wire):
    state, loop, ended = State(), asyncio.get_running_loop(), asyncio.Event()

    async def run(method, positional, named):
        try:
            result = getattr(state, method)(*positional, **named)
            if asyncio.iscoroutine(result):
                result = await result
            send(wire, (False, result))
        except Exception as failure:  # told to the test, which fails with it
            send(wire, (True, repr(failure)))

    def readable():
        try:
            call = receive(wire)
        except EOFError:
            ended.set()
            return
        asyncio.ensure_future(run(*call))

    loop.add_reader(wire.fileno(), readable)
    await ended.wait()


def send(wire, what):
    data = pickle.dumps(what)
    wire.sendall(struct.pack("!I", len(data)) + data)


def receive(wire):
    return pickle.loads(exactly(wire, struct.unpack("!I", exactly(wire, 4))[0]))


def exactly(wire, size):
    data = b""
    while len(data) < size:
        more = wire.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
