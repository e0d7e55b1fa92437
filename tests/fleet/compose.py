"""packaging/docker-compose.shared.yml without containers: its commands, settings and files, run as processes over loopback."""

import json
import os
import pathlib
import re
import shlex
import socket
import ssl
import subprocess
import time

from balancer import BALANCER, until_serving
from bucket import SERVERS
from fleet import Balancer, Requests, free_port, upstreams
from kit.client import LOCAL, get, pull
from kit.content import Image
from kit.process import plain_environment
from shared import uploaded

ROOT = pathlib.Path(__file__).parent.parent.parent
FILE = ROOT / "packaging" / "docker-compose.shared.yml"
CACHES = ("a", "b", "c")
# Another address of this host, as that of the storage in the network of the caches.
FROM_A_CACHE = "127.0.0.2"
NAME = "library/app"
# Longest time until an object is older than a second.
OLD_S = 20


async def run(fleet):
    # Not every machine that runs the other scenarios has it.
    import yaml

    compose = yaml.safe_load(FILE.read_text())
    services = compose["services"]
    least_rights(fleet, compose)
    folder = pathlib.Path(os.environ["SCRATCH"]) / f"{fleet.number}-compose"
    folder.mkdir()
    files = written_files(folder)
    storage = Storage(fleet, services, files)
    registry = fleet.registry()
    nodes, environments = [], {}
    for name in CACHES:
        settings = services[name]["environment"]
        environment = {key: inside(value, services[name], files) for key, value in settings.items()}
        environment["IFNEWER_SHARED_ENDPOINT"] = storage.endpoint
        environments[name] = environment
        nodes.append(fleet.cache("node.toml", {"192.0.2.10": BALANCER}, more=upstreams(registry), environment=environment))
    balancer = Balancer(fleet, nodes)
    fleet.programs.append(balancer)
    fleet.check("the balancer starts", await until_serving(balancer), balancer.log.read_text(errors="replace"))

    image = registry.push_image(NAME, "1", Image([("one", 3_000_000), ("two", 200_000)]))
    fleet.check("a cold pull", await pull(balancer.address, NAME, "1", image))
    owners = [node for node in nodes if (await get(node.admin, "/metrics", headers=LOCAL)).body.count(b'reason="not-cached"')]
    fleet.equal("caches that served it", 1, len(owners))
    fleet.check("its objects are in the bucket", await uploaded(owners[0], len(image.blobs) + 1))
    owners[0].stop()
    at_registry = Requests(registry)
    took = [await pull(balancer.address, NAME, "1", image) for _ in range(3)]
    fleet.check("pulls after that cache has ended", all(took), took)
    fleet.equal("its GETs at the registry: another cache reads from the bucket", 0, at_registry.count("GET "))
    collected(fleet, nodes[0], environments["a"])


def collected(fleet, node, environment):
    """The command for cron, in the environment of a cache."""
    [command] = re.findall(r"exec -T a /ifnewer (.*)", FILE.read_text())
    environment = {**plain_environment(), **environment, "IFNEWER_CONFIG": str(node.folder / "ifnewer.toml")}
    command = [os.environ["IFNEWER"], *command.split(), "--older", "1s", "--json"]
    deadline, deleted = time.monotonic() + OLD_S, 0
    # Ages are whole seconds of the storage.
    while not deleted and time.monotonic() < deadline:
        done = subprocess.run(command, capture_output=True, env=environment)
        deleted = json.loads(done.stdout)["deleted"]["objects"] if done.stdout else 0
        if done.returncode:
            break
    fleet.check("the credential may delete old objects", done.returncode == 0 and deleted > 0, (deleted, done.stderr))


def least_rights(fleet, compose):
    services = compose["services"]
    for name, service in services.items():
        fleet.check(f"{name} gains no privileges", service["security_opt"] == ["no-new-privileges:true"])
        fleet.check(f"{name} has a health check or ends", "healthcheck" in service or service["restart"] == "no")
        of_volume = [volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith(".")]
        fleet.check(f"the volumes of {name} are declared", all(volume in compose["volumes"] for volume in of_volume), of_volume)
    for name in (*CACHES, "balancer"):
        service = services[name]
        fleet.check(f"{name} has no capability and a read-only root", service["read_only"] and service["cap_drop"] == ["ALL"])
    fleet.equal("published ports", {"balancer": ["5000:5000"]},
                {name: service["ports"] for name, service in services.items() if "ports" in service})
    folders = [next(volume for volume in services[name]["volumes"] if ":/var/cache/ifnewer" in volume) for name in CACHES]
    fleet.equal("each cache has a folder of its own", len(CACHES), len(set(folders)))
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    shipped = [path for path in mounted if path.startswith("../config/fleet/")]
    fleet.check("the files of config/fleet exist", shipped and all((FILE.parent / path).exists() for path in shipped), shipped)
    node, haproxy = (ROOT / "config" / "fleet" / name for name in ("node.toml", "haproxy.cfg"))
    addresses = {name: services[name]["networks"]["caches"]["ipv4_address"] for name in (*CACHES, "balancer")}
    in_haproxy = dict(re.findall(r"server (\w) ([\d.]+):", haproxy.read_text()))
    fleet.equal("addresses in haproxy.cfg", in_haproxy, {name: addresses[name] for name in CACHES})
    fleet.check("address in node.toml", f'["{addresses["balancer"]}"]' in node.read_text(), addresses["balancer"])


def written_files(folder):
    """The files that the commands in its first lines write. Those that need root or containers are left out."""
    lines = [line.removeprefix("#").strip() for line in FILE.read_text().splitlines() if line.startswith("#   ")]
    lines = "\n".join(lines).replace("\\\n", "").splitlines()
    kept = [line for line in lines if not line.startswith(("sudo", "docker"))]
    program = shlex.quote(os.environ["IFNEWER"])
    script = "\n".join(kept).replace("mkdir -m 700 config/shared", "mkdir -p config/shared").replace("ifnewer shared", f"{program} shared")
    subprocess.run(["bash", "-ec", script], cwd=folder, check=True, env=plain_environment(), stderr=subprocess.DEVNULL)
    return folder / "config" / "shared"


def inside(value, service, files):
    """The file of this host that is mounted at a path, or the value itself."""
    for volume in service["volumes"]:
        source, target = volume.split(":")[:2]
        if target == value:
            return str(files / pathlib.Path(source).name)
    return value


class Storage:
    """The service `storage`, and then `bucket`."""

    def __init__(self, fleet, services, files):
        service = services["storage"]
        ports = {f"{server}.port{kind}": free_port() for server in SERVERS for kind in ("", ".grpc")}
        data = files / "data"
        data.mkdir()
        words = [option(word, {"/data": str(data)}, service, files) for word in service["command"]]
        # The health check names the port of the container.
        self.endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        extra = [f"-{name}={port}" for name, port in ports.items()] + ["-volume.preStopSeconds=0"]
        environment = {**plain_environment(), "HOME": str(files)}
        settings = {key: inside(value, service, files) for key, value in service["environment"].items()}
        with (files / "weed.log").open("wb") as log:
            self.process = subprocess.Popen([os.environ["WEED"], *words, *extra], stdout=log, stderr=log, cwd=files,
                                            env={**environment, **settings})
        fleet.programs.append(self)
        healthy = " ".join(service["healthcheck"]["test"][1:]).replace("http://127.0.0.1:8333", self.endpoint)
        healthy = healthy.replace("wget -q -O /dev/null", "curl -sSf -o /dev/null")
        fleet.check("the storage becomes healthy", self.succeeds(healthy, environment), (files / "weed.log").read_text()[-500:])
        open_ports = {name for name, port in ports.items() if is_open(FROM_A_CACHE, port)}
        fleet.equal("ports of the storage that a cache reaches", {"s3.port", "s3.port.grpc"}, open_ports)
        refusal = refusal_of_grpc(FROM_A_CACHE, ports["s3.port.grpc"])
        fleet.equal("the gRPC port answers only a client with the certificate", (b"", "CERTIFICATE_REQUIRED"), refusal)
        bucket = services["bucket"]
        fleet.equal("the network of the service that creates the bucket", "service:storage", bucket["network_mode"])
        [script] = bucket["command"]
        script = script.replace("weed shell", f"{shlex.quote(os.environ['WEED'])} shell")
        for name, server, port in (("master", 9333, "master.port"), ("filer", 8888, "filer.port")):
            script = script.replace(f"-{name}=127.0.0.1:{server}", f"-{name}=127.0.0.1:{ports[port]}.{ports[port + '.grpc']}")
        fleet.check("the bucket is created", self.succeeds(script, environment))
        again = subprocess.run(["bash", "-c", script], capture_output=True, env=environment)
        fleet.check("the next start leaves it as it is", again.returncode == 0, again.stderr)

    @staticmethod
    def succeeds(script, environment):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if subprocess.run(["bash", "-c", script], capture_output=True, env=environment).returncode == 0:
                return True
            time.sleep(0.3)
        return False

    def remove(self):
        self.process.kill()
        self.process.wait()


def option(word, replaced, service, files):
    name, equals, value = word.partition("=")
    value = replaced.get(value, value)
    return f"{name}{equals}{inside(value, service, files) if value.startswith('/etc') else value}"


def refusal_of_grpc(address, port):
    """What a client without TLS receives, and why TLS without a certificate fails; None: it does not."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    with socket.create_connection((address, port), timeout=5) as client:
        client.sendall(preface)
        plain = client.recv(100)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(socket.create_connection((address, port), timeout=5)) as client:
            client.sendall(preface)
            client.recv(100)
    except ssl.SSLError as error:
        return plain, error.reason.rpartition("ALERT_")[2]
    return plain, None


def is_open(address, port):
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0
