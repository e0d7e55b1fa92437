"""Token service of a registry with access per repository.

tokens.py FOLDER ADDRESS

FOLDER holds server.pem and server.key (for TLS and for signing tokens), and rights.json, which is read at every
request: {"bob": {"password": "…", "reads": ["private/demo"], "writes": []}, "": {…}}; "" is a client without a login.
Prints its address, and then one line for each request: "METHOD /token STATUS USER ACCESS".
"""

import base64
import http.server
import json
import pathlib
import ssl
import subprocess
import sys
import time
import urllib.parse

folder = pathlib.Path(sys.argv[1])


def encoded(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(claims):
    der = ssl.PEM_cert_to_DER_cert((folder / "server.pem").read_text())
    head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
    text = ".".join(encoded(json.dumps(part).encode()) for part in (head, claims))
    sign = ["openssl", "dgst", "-sha256", "-sign", folder / "server.key", "-binary"]
    return text + "." + encoded(subprocess.run(sign, input=text.encode(), stdout=subprocess.PIPE, check=True).stdout)


def granted(rights, scopes):
    """The requested access that the user has. A request for more is no error."""
    access = []
    for kind, name, actions in (scope.rsplit(":", 2) for scope in scopes if scope.count(":") >= 2):
        may = {"pull": name in rights["reads"], "push": name in rights["writes"]}
        actions = [action for action in actions.split(",") if may.get(action)]
        if actions:
            access.append({"type": kind, "name": name, "actions": actions})
    return access


class Tokens(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        shown = self.headers.get("Authorization", "")
        user, _, password = base64.b64decode(shown.removeprefix("Basic ")).decode().partition(":")
        rights = json.loads((folder / "rights.json").read_text()).get(user)
        if rights is None or rights["password"] != password:
            return self.answer(401, {"errors": [{"code": "UNAUTHORIZED"}]}, user, "-")
        scopes = [scope for line in query.get("scope", []) for scope in line.split(" ")]
        access, now = granted(rights, scopes), int(time.time())
        token = signed({
            "iss": "the company", "sub": user, "aud": query["service"][0], "access": access,
            "nbf": now - 10, "iat": now, "exp": now + 300, "jti": f"{time.time_ns()}",
        })
        names = ",".join(f"{entry['name']}:{'+'.join(entry['actions'])}" for entry in access)
        return self.answer(200, {"token": token, "expires_in": 300}, user, names or "-")

    def do_POST(self):
        """Clients that try OAuth2 first then use GET."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(405, {}, "-", "-")

    def answer(self, status, body, user, access):
        body = json.dumps(body).encode()
        print(f"{self.command} /token {status} {user or '-'} {access}", flush=True)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


host, port = sys.argv[2].rsplit(":", 1)
server = http.server.ThreadingHTTPServer((host, int(port)), Tokens)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(folder / "server.pem", folder / "server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
print("listening on %s:%d" % server.server_address[:2], flush=True)
server.serve_forever()
