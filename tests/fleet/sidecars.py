"""The regional cache sees one address for all clients of a sidecar: they are not refused, and delay no other sidecar."""

import asyncio
import time

from fleet import layers
from kit.client import LOCAL, get, pull
from kit.content import Image

CLIENTS = 300
SLOW_S = 0.1


async def run(fleet):
    registry = fleet.registry()
    regional = fleet.regional(registry)
    busy, other = (fleet.sidecar(regional, more="[default]\nprefetch = false\n") for _ in range(2))
    images = [Image([(f"busy-{n}", 20_000 + n)], config=(f"config-{n}", 300), label=n) for n in range(CLIENTS)]
    for n, image in enumerate(images):
        registry.push_image("library/busy", f"v{n}", image)
    quiet_image = registry.push_image("library/quiet", "1", layers("quiet", 1))
    registry.rule("slow", path="/(manifests|blobs)/", after_s=SLOW_S)

    began = time.monotonic()
    pulls = [asyncio.create_task(pull(busy.address, "library/busy", f"v{n}", image)) for n, image in enumerate(images)]
    await asyncio.sleep(4 * SLOW_S)
    other_began = time.monotonic()
    fleet.check("the only client of another sidecar pulls", await pull(other.address, "library/quiet", "1", quiet_image))
    other_s = time.monotonic() - other_began
    pulled = sum(took is not None for took in await asyncio.gather(*pulls))
    all_s = time.monotonic() - began
    fleet.equal(f"{CLIENTS} clients of one sidecar pull as many cold images at once", CLIENTS, pulled)
    # Alone it takes two round trips of SLOW_S; in the other sidecar's queue it would take about as long as all of it.
    fleet.check(f"the other sidecar's pull does not queue behind them: {other_s:.2f} s of {all_s:.2f} s", other_s < all_s / 2)
    metrics = (await get(regional.admin, "/metrics", headers=LOCAL)).body.decode()
    for name in ("ifnewer_connections_refused_total", "ifnewer_queue_refused_total"):
        values = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name) and "_created" not in line]
        fleet.equal(f"{name} at the regional cache", 0.0, sum(values))
