"""A registry that is unavailable, slow or failing, completely or for one path: T4, T5, T11, O2."""

import asyncio
import time

from kit.client import Probe, get, manifest, pull
from kit.content import Image

IMAGES = 20
JOB_S_MAX = 3
# If each response is late, each image may wait 50 ms.
NEXT_JOB_S_MAX = 1.2
RECOVERY_S_MAX = 2


async def cached_images(program, registry, count=IMAGES):
    images = {}
    for n in range(count):
        name = f"library/app{n}"
        images[name] = registry.push_image(name, "latest", Image([("app", 1000 + n)], label=name))
        if await pull(program.address, name, "latest", images[name]) is None:
            raise RuntimeError(f"{name} is not pulled while all is well")
    return images


async def job(lab, what, program, images, goal_s):
    """Requests one tag after the other, as a job with these images does."""
    began, wrong = time.monotonic(), 0
    for name, image in images.items():
        reply = await get(program.address, manifest(name, "latest"))
        wrong += reply.digest != image.digest
    lab.at_most(f"{what}, {len(images)} cached images", time.monotonic() - began, goal_s, "s")
    if wrong:
        lab.at_most(f"{what}, images not served", wrong, 0)


async def recovery(lab, what, program, registry, comes_back):
    """Seconds from the registry's return until a moved tag is served."""
    name = "library/app0"
    moved = Image([("moved", 1000)], label=what)
    registry.push_image(name, "latest", moved)
    comes_back()
    began = time.monotonic()
    served_s = float("inf")
    while time.monotonic() - began < 10:
        reply = await get(program.address, manifest(name, "latest"))
        if reply.digest == moved.digest:
            served_s = time.monotonic() - began
            break
        await asyncio.sleep(0.05)
    lab.at_most(f"{what}, the new image after the registry is back", served_s, RECOVERY_S_MAX, "s")


async def silent_job(lab, what, rule=None, images_count=IMAGES, jobs=2, begin=None, end=None):
    registry = lab.registry()
    program = lab.program(registry)
    images = await cached_images(program, registry, images_count)
    begin_s = begin or (lambda registry: registry.rule("fault", **rule))
    begin_s(registry)
    for n in range(jobs):
        goal = JOB_S_MAX if n == 0 else NEXT_JOB_S_MAX
        await job(lab, what if n == 0 else f"{what}, next job", program, images, goal)
    await recovery(lab, what, program, registry, lambda: (end or (lambda r: r.drop("fault")))(registry))
    program.stop()


async def t05(lab):
    await silent_job(lab, "no answer to anything", {"silent": True})
    await silent_job(lab, "HEAD alone silent", {"methods": "HEAD", "path": "/manifests/", "silent": True})
    await silent_job(lab, "HEAD in 1.9 s", {"methods": "HEAD", "path": "/manifests/", "after_s": 1.9})
    await silent_job(lab, "SYNs dropped", begin=lambda r: r.drop_packets(), end=lambda r: r.listen())
    await one_tag(lab)
    await token_service(lab)


async def one_tag(lab):
    """An outage that only the requests of one repository meet."""
    registry = lab.registry()
    program = lab.program(registry)
    await cached_images(program, registry, 1)
    registry.rule("fault", path="/manifests/", silent=True)
    began, waited = time.monotonic(), 0.0
    while time.monotonic() - began < 12:
        waited += (await get(program.address, manifest("library/app0", "latest"))).seconds
        await asyncio.sleep(0.3)
    lab.at_most("one tag polled for 12 s of an outage, total wait", waited, JOB_S_MAX, "s")
    program.stop()


async def token_service(lab):
    registry = lab.registry()
    registry.need_token()
    program = lab.program(registry)
    images = await cached_images(program, registry, 8)
    program.restart()
    registry.rule("fault", path="/token", silent=True)
    await job(lab, "token service silent after a restart", program, images, JOB_S_MAX)
    await recovery(lab, "token service silent", program, registry, lambda: registry.drop("fault"))
    program.stop()


async def o02(lab):
    await silent_job(lab, "a black hole", {"silent": True}, images_count=12, jobs=1)


# --- T4 ---------------------------------------------------------------------------------------------------------------


async def ask_for_bad_names(load, address, prefix, clients):
    async def client(number):
        n = 0
        while not load.stopped.is_set():
            n += 1
            await get(address, manifest(f"library/{prefix}{number}-{n % 7}", "latest"), source="127.0.0.66", timeout=1)

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await load.until_stopped()
    for task in tasks:
        task.cancel()


async def t04(lab):
    await bad_path(lab, "names that get 500", {"path": "/library/bad", "status": 500, "after_s": 0.02})
    await bad_path(lab, "names that get no answer", {"path": "/library/bad", "silent": True})


async def bad_path(lab, what, rule):
    registry = lab.registry()
    program = lab.program(registry)
    images = await cached_images(program, registry, 1)
    (name,) = images
    registry.rule("bad", **rule)
    load = lab.background(ask_for_bad_names, program.address, "bad", 8)
    await asyncio.sleep(1)
    replies = []

    async def poll(count):
        for _ in range(count):
            replies.append(await get(program.address, manifest(name, "latest")))
            await asyncio.sleep(0.1)

    await poll(40)
    moved = registry.push_image(name, "latest", Image([("moved", 1000)], label=what))
    moved_at, seen = time.monotonic(), len(replies)
    new_s = float("inf")
    for _ in range(40):
        await poll(1)
        if replies[-1].digest == moved.digest and new_s == float("inf"):
            new_s = time.monotonic() - moved_at
    lab.at_most(f"{what}: stale responses of 80 for another tag", sum(reply.is_stale for reply in replies), 0)
    old = sum(reply.digest != moved.digest for reply in replies[seen:])
    lab.at_most(f"{what}: responses of 40 with the old image after the tag moved", old, 0)
    lab.at_most(f"{what}: the new image came after", new_s, RECOVERY_S_MAX, "s")
    await load.finish()
    program.stop()


# --- T11 --------------------------------------------------------------------------------------------------------------


async def t11(lab):
    registry = lab.registry()
    program = lab.program(registry)
    await cached_images(program, registry, 1)
    path = "/v2/library/app0/tags/list"
    registry.rule("lists", path="/tags/list", after_s=0.5)
    quiet = await Probe(program.address, manifest("library/app0", "latest")).seconds(1)
    since = time.monotonic()
    async with Probe(program.address, manifest("library/app0", "latest")) as probe:
        lists = await asyncio.gather(*(get(program.address, path) for _ in range(100)))
    lab.at_most("100 equal tag lists, requests upstream", registry.requests("tags/list", since), 2)
    lab.at_least("100 equal tag lists, successful", sum(reply.is_ok for reply in lists), 100)
    lab.at_most("100 equal tag lists, stale responses for a warm tag", sum(r.is_stale for r in probe.replies), 0)
    lab.not_slower("100 equal tag lists, a warm tag's p99", probe.p99, quiet.p99)

    registry.rule("lists", path="/tags/list", silent=True)
    first = await get(program.address, path, timeout=30)
    lab.at_most("a cached list, registry unresponsive", first.seconds, 2.2, "s")
    following = [await get(program.address, path, timeout=5) for _ in range(5)]
    lab.at_most("a cached list, next five", sum(reply.seconds for reply in following), 1, "s")
    lab.at_least("a cached list, successful", sum(reply.is_ok for reply in [first, *following]), 6)
    registry.drop("lists")
    registry.push_image("library/app0", "second", Image([("app", 1000)]))
    began = time.monotonic()
    new_s = float("inf")
    while time.monotonic() - began < 10 and new_s == float("inf"):
        if b"second" in (await get(program.address, path)).body:
            new_s = time.monotonic() - began
        await asyncio.sleep(0.05)
    lab.at_most("a list, the new tag after the registry is back", new_s, RECOVERY_S_MAX, "s")
