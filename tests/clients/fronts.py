"""Front of a registry with faulty behaviour.

fronts.py KIND REGISTRY

KIND is one of
  lying    responds 404 to HEAD of a manifest by tag, and to HEAD of a blob until it was fetched in that repository
  limited  responds 429 to more than five requests a second, without Retry-After
  portal   redirects requests without bob's credential to a login page, which responds 200 with HTML to every request
  slow     has little bandwidth, shared by all responses

REGISTRY (host:port) is the registry behind it. Prints its address, then one line for each request:
"METHOD PATH STATUS".
"""

import base64
import http.client
import http.server
import sys
import threading
import time

kind, registry = sys.argv[1:]
BOB = "Basic " + base64.b64encode(b"bob:bobs-password").decode()
REQUESTS_PER_SECOND_MAX = 5
BYTES_PER_SECOND = 1_000_000
PIECE_BYTES = 8192

lock = threading.Lock()
fetched = set()
recent = []
# The time at which the line has sent all queued bytes.
line_is_free_at = [0.0]


class Front(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        refusal = getattr(self, kind)()
        if refusal is None:
            self.forward()
        else:
            self.answer(*refusal)

    do_HEAD = do_GET

    def lying(self):
        if self.command == "GET":
            fetched.add(self.path)
            return None
        by_tag = "/manifests/" in self.path and "/manifests/sha256:" not in self.path
        never_fetched = "/blobs/" in self.path and self.path not in fetched
        return (404, {"Content-Type": "application/json"}, b"{}") if by_tag or never_fetched else None

    def limited(self):
        now = time.monotonic()
        with lock:
            recent[:] = [at for at in recent if now - at < 1]
            if len(recent) < REQUESTS_PER_SECOND_MAX:
                recent.append(now)
                return None
        return 429, {"Content-Type": "application/json"}, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}'

    def portal(self):
        if self.headers.get("Authorization") == BOB:
            return None
        if self.path == "/v2/":
            return 401, {"WWW-Authenticate": 'Basic realm="the company"'}, b""
        if self.headers.get("Host", "").startswith("localhost:"):
            return 200, {"Content-Type": "text/html"}, b"<html><form>Please log in.</form></html>"
        return 302, {"Location": f"http://localhost:{self.server.server_port}/login?to={self.path}"}, b""

    def slow(self):
        return None

    def forward(self):
        behind = http.client.HTTPConnection(registry)
        own = ("authorization", "connection")
        headers = {name: ", ".join(self.headers.get_all(name)) for name in self.headers if name.lower() not in own}
        behind.request(self.command, self.path, headers=headers)
        reply = behind.getresponse()
        own = ("connection", "transfer-encoding")
        headers = {name: value for name, value in reply.getheaders() if name.lower() not in own}
        self.answer(reply.status, headers, reply.read(), reply.getheader("Content-Length"))

    def answer(self, status, headers, body, length=None):
        print(f"{self.command} {self.path} {status}", flush=True)
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind != "slow":
            self.wfile.write(body)
            return
        for begin in range(0, len(body), PIECE_BYTES):
            piece = body[begin : begin + PIECE_BYTES]
            with lock:
                line_is_free_at[0] = max(line_is_free_at[0], time.monotonic()) + len(piece) / BYTES_PER_SECOND
                sent_at = line_is_free_at[0]
            time.sleep(max(0, sent_at - time.monotonic()))
            self.wfile.write(piece)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer.request_queue_size = 128
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Front)
print(f"listening on 127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
