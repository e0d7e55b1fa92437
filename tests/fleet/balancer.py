"""HAProxy with a consistent hash of the repository before three regional caches."""

import asyncio
import json
import os
import signal
import ssl

from fleet import Balancer, Requests, basic, layers, size_of, upstreams
from kit.client import LOCAL, blob, get, manifest, pull
from kit.lab import until

REPOSITORIES = 12
CLIENTS = 8
BALANCER = "127.0.0.1"
# A client without the balancer: a node expects a PROXY header from the balancer's address.
DIRECT = "127.0.0.9"


async def run(fleet):
    registry = fleet.registry()
    nodes = [fleet.cache("node.toml", {"192.0.2.10": BALANCER}, more=upstreams(registry)) for _ in range(3)]
    balancer = Balancer(fleet, nodes)
    fleet.programs.append(balancer)
    images = [registry.push_image(f"library/app{n}", "1", layers(f"app{n}", 2)) for n in range(REPOSITORIES)]
    fleet.check("the balancer starts", await until_serving(balancer), balancer.log.read_text(errors="replace"))

    at_registry = Requests(registry)
    await pull_all(fleet, balancer, images, f"{CLIENTS} clients pull {REPOSITORIES} cold images")
    whole = sum(size_of(image) for image in images)
    fleet.equal("bytes at the registry, in images", 1.0, round(at_registry.blob_bytes / whole, 3))
    fleet.equal("manifest GETs at the registry", REPOSITORIES, at_registry.count("GET .*/manifests/"))
    share = [await holdings(node, images) for node in nodes]
    fleet.check(f"every node has some, and none is at two: {[len(held) for held in share]}",
                all(share) and sum(map(len, share)) == REPOSITORIES, share)

    await spellings(fleet, registry, balancer, images[0])
    await private(fleet, registry, balancer)
    await addresses(fleet, balancer, nodes)
    await over_tls(fleet, balancer, images[0])
    await node_killed(fleet, registry, balancer, nodes, share, images)


async def until_serving(balancer):
    for _ in range(200):
        if (await get(balancer.address, "/v2/")).status == 200:
            return True
        await asyncio.sleep(0.05)
    return False


async def node_frozen(fleet, balancer, node):
    """It accepts connections and sends nothing: the checks find out."""
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        down = "Server ifnewer/c is DOWN"
        fleet.check("a frozen node is found out", await until(lambda: down in balancer.log.read_text(errors="replace"), 20) is not None)
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
    up = "Server ifnewer/c is UP"
    fleet.check("and is used again", await until(lambda: up in balancer.log.read_text(errors="replace"), 20) is not None)


async def pull_all(fleet, balancer, images, what):
    pulls = [pull(balancer.address, f"library/app{n}", "1", image) for _ in range(CLIENTS) for n, image in enumerate(images)]
    took = await asyncio.gather(*pulls)
    fleet.equal(what, len(pulls), sum(seconds is not None for seconds in took))


async def holdings(node, images):
    """The images of which this node has the layers; asked without the balancer, and without its registry."""
    found = set()
    for n in range(len(images)):
        if list(node.data.glob(f"**/*{images[n].layers[0].removeprefix('sha256:')}")):
            found.add(n)
    return found


async def spellings(fleet, registry, balancer, image):
    """Every name of a repository leads to the same node."""
    at_registry = Requests(registry)
    for path in ("library/app0", "docker.io/library/app0"):
        fleet.check(f"as {path}", await pull(balancer.address, path, "1", image))
    reply = await get(balancer.address, f"{manifest('library/app0', '1')}?ns=docker.io")
    fleet.check("as library/app0?ns=docker.io", reply.is_ok, reply.cause())
    reply = await get(balancer.address, f"{blob('library/app0', image.layers[0])}?ns=docker.io")
    fleet.check("its layer with ?ns=docker.io", reply.is_ok, reply.cause())
    fleet.equal("bytes for other spellings", 0, at_registry.blob_bytes)


async def private(fleet, registry, balancer):
    image = registry.push_image("team/app", "1", layers("private", 2))
    registry.allow("team/app", [basic("alice")])
    at_registry = Requests(registry)
    for _ in range(2):
        pulled = await pull(balancer.address, "registry.example/team/app", "1", image, headers={"Authorization": basic("alice")})
        fleet.check("a private image by alice", pulled)
    fleet.equal("its bytes at the registry, in images", 1.0, at_registry.times(image))
    for caller in ({}, {"Authorization": basic("mallory")}):
        for path in (manifest("registry.example/team/app", "1"), blob("registry.example/team/app", image.layers[0])):
            reply = await get(balancer.address, path, headers=caller)
            fleet.equal("a private image by others", 401, reply.status)


async def addresses(fleet, balancer, nodes):
    """Nodes see the clients' addresses, by the PROXY protocol and not by a header of the client."""
    client, claimed = "127.0.0.5", "198.51.100.7"
    await get(balancer.address, manifest("library/app1", "1"), source=client, headers={"X-Forwarded-For": claimed})
    seen = set()
    for node in nodes:
        events = json.loads((await get(node.admin, "/api/v1/events?limit=200", headers=LOCAL)).body)["events"]
        seen |= {event.get("client") for event in events}
    fleet.check("nodes log the client's address", client in seen, seen)
    fleet.check("X-Forwarded-For is ignored", claimed not in seen, seen)
    reply = await get(nodes[0].address, "/v2/", source=DIRECT)
    fleet.equal("a node serves clients without the balancer too", 200, reply.status)


async def over_tls(fleet, balancer, image):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(*balancer.tls_address, ssl=context)
    path = manifest("library/app0", "1")
    writer.write(f"HEAD {path} HTTP/1.1\r\nHost: regional.example.org\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode())
    head = (await reader.read(65536)).decode("latin-1")
    writer.close()
    fleet.check("over TLS", head.startswith("HTTP/1.1 200") and image.digest in head, head)


async def node_killed(fleet, registry, balancer, nodes, share, images):
    lost = share[1]
    at_registry = Requests(registry)
    nodes[1].stop()
    await pull_all(fleet, balancer, images, f"{CLIENTS} clients pull all images after a node was killed")
    times = at_registry.blob_bytes / sum(size_of(images[n]) for n in lost)
    # The requests that find out that the node is dead may be sent to different nodes.
    fleet.check(f"its images are fetched once more: {times:.3f} times", 1 <= times <= 1.5, f"{len(lost)} images")
    others = "|".join(str(n) for n in range(len(images)) if n not in lost)
    fleet.equal("requests for the bytes of other nodes' images", 0, at_registry.count(f"GET /v2/library/app({others})/"))
    nodes[1].start()
    back = "Server ifnewer/b is UP"
    fleet.check("the node comes back", await until(lambda: back in balancer.log.read_text(errors="replace"), 20) is not None)
    await node_frozen(fleet, balancer, nodes[2])
    at_registry = Requests(registry)
    await pull_all(fleet, balancer, images, "all images after it is back")
    fleet.equal("bytes fetched again after it is back", 0, at_registry.blob_bytes)
