"""A cache whose upstream leads back to it: refused at once, directly and through another cache."""

import time

from fleet import Requests, layers
from kit.client import get, manifest, pull


async def run(fleet):
    registry = fleet.registry()
    image = registry.push_image("library/app", "1", layers("one", 1))
    first = fleet.regional(registry)
    second = fleet.sidecar(first)
    fleet.check("a pull through two caches", await pull(second.address, "library/app", "1", image))
    # The first one now has the second one as its upstream.
    looping = f'[upstream."docker.io"]\nurl = "http://{second.host}"\n'
    first.write(looping)
    first.restart()
    began, at_registry = time.monotonic(), Requests(registry)
    for name, cache in (("first", first), ("second", second)):
        reply = await get(cache.address, manifest("library/app", "2"))
        fleet.equal(f"the {name} cache refuses an uncached tag", 508, reply.status)
        reply = await get(cache.address, manifest("library/app", "1"))
        fleet.check(f"the {name} cache serves what it holds, as stale", reply.is_ok and reply.is_stale, reply.cause())
    fleet.check("four responses in two seconds", time.monotonic() - began < 2, time.monotonic() - began)
    fleet.equal("requests at the registry", 0, at_registry.count(""))
    fleet.check("the log names the loop", first.says("reason=\"loop\"") and second.says("cause=\"loop\""))
