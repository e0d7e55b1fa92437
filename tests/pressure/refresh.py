"""Scheduled refreshes of many tags: what they cost, and whether clients notice."""

import asyncio
import os

from kit.client import Probe, get, manifest, pull
from kit.content import Image

TAGS = 10_000
# 10,000 tags in an hour are 167 in a minute. So many are refreshed each minute, and the others are planned only.
DUE_EACH_MINUTE = 167
AT_ONCE = 32
MEASURED_S = 120
CLIENT_S = 10


async def refresh(lab):
    registry = lab.registry()
    rules = """
[default]
refresh = "1h"
[[rule]]
images = ["docker.io/library/due"]
refresh = "1m"
"""
    program = lab.program(registry, more=rules)
    image = Image([("layer", 1000)], label="refreshed")
    names = [("library/due", n) for n in range(DUE_EACH_MINUTE)]
    names += [("library/app", n) for n in range(TAGS - DUE_EACH_MINUTE)]
    for repository, n in names:
        registry.push_image(repository, f"t{n}", image)
    for repository in ("library/due", "library/app"):
        await pull(program.address, repository, "t0", image)
    turns = asyncio.Semaphore(AT_ONCE)

    async def cached(repository, n):
        async with turns:
            reply = await get(program.address, manifest(repository, f"t{n}"))
            return reply.digest == image.digest

    lab.at_least("tags cached", sum(await asyncio.gather(*(cached(*name) for name in names))), TAGS)
    path = manifest("library/app", "t1")
    quiet = await Probe(program.address, path).seconds(CLIENT_S)
    # A tag that was pulled less than half an interval ago is not due.
    await asyncio.sleep(60)
    heads, cpu_s = registry.requests("/library/due/manifests/"), cpu_seconds(program)
    await asyncio.sleep(MEASURED_S)
    heads = registry.requests("/library/due/manifests/") - heads
    cpu_s = cpu_seconds(program) - cpu_s
    lab.at_least(f"{TAGS:,} tags an hour, HEADs a second", heads / MEASURED_S, 2)
    lab.at_most(f"{TAGS:,} tags an hour, HEADs a second", heads / MEASURED_S, 3)
    lab.at_most(f"{TAGS:,} tags an hour, of one core", 100 * cpu_s / MEASURED_S, 1, "%", bound=5)
    busy = await Probe(program.address, path).seconds(CLIENT_S)
    lab.at_most("clients during refreshes, failures", len(busy.failures + quiet.failures), 0)
    lab.not_slower("clients during refreshes, p99", busy.p99, quiet.p99)
    program.stop()


def cpu_seconds(program):
    with open(f"/proc/{program.process.pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
