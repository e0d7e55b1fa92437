"""More downloads than permits: T2, T12, T13."""

import asyncio
import time

from kit.client import Probe, blob, get, manifest, pull
from kit.content import Image, made_up_digest, noise_digest
from kit.lab import until
from kit.outstanding import GREEDY, keep_outstanding
from kit.process import NotStarted


# The limits with which the goals of T2 and T12 were measured.
PLACES = """
[default]
prefetch = false
[limits]
downloads_max = 256
downloads_per_upstream_max = 32
"""


async def pulled_at_once(program, requests, **options):
    """Requests all (path, source) at once. Returns the number of complete ones, and the other responses."""
    replies = await asyncio.gather(
        *(get(program.address, path, source=source, keep=False, **options) for path, source in requests)
    )
    wrong = [reply for reply in replies if not reply.is_ok]
    return len(replies) - len(wrong), wrong


async def introduced(program, registry, name, layers):
    """An image with a cached manifest and no cached layer. Returns the layers' paths."""
    image = registry.push_image(name, "latest", Image(layers, label=name))
    reply = await get(program.address, manifest(name, "latest"))
    if not reply.is_ok:
        raise RuntimeError(f"the manifest of {name}: {reply.cause()}")
    repository = name
    return [blob(repository, digest) for digest in image.layers]


def explain(wrong):
    return "; first other: " + f"{wrong[0].status} after {wrong[0].seconds:.1f} s, {wrong[0].cause()}" if wrong else ""


async def t02(lab):
    await forty_layers(lab)
    await hundred_times_three(lab)
    await beyond_all_places(lab)
    await full_queue(lab)


async def forty_layers(lab):
    registry = lab.registry()
    program = lab.program(registry, upstream='first_byte_timeout = "2s"', more=PLACES)
    paths = await introduced(program, registry, "library/forty", [("forty", 40_000 + n) for n in range(40)])
    registry.rule("slow", path="/blobs/", bytes_per_s=10_000)
    began = time.monotonic()
    came, wrong = await pulled_at_once(program, [(path, None) for path in paths])
    lab.at_least("40 cold layers of 4 s each at once, complete", came, 40, note=explain(wrong))
    # Two rounds of 4 s with 32 permits.
    lab.at_most("40 cold layers of 4 s each, all", time.monotonic() - began, 8 * 1.25, "s")
    program.stop()


async def hundred_times_three(lab):
    registry = lab.registry()
    program = lab.program(registry, upstream='first_byte_timeout = "2s"', more=PLACES)
    requests = []
    for n in range(100):
        paths = await introduced(program, registry, f"library/job{n}", [(f"job{n}", 1000 + k) for k in range(3)])
        requests += [(path, None) for path in paths]
    registry.rule("slow", path="/blobs/", after_s=0.7)
    began = time.monotonic()
    came, wrong = await pulled_at_once(program, requests)
    lab.at_least("100 clients x 3 cold layers of one address, complete", came, 300, note=explain(wrong))
    # 300 with 32 permits: ten rounds of 0.7 s.
    lab.at_most("100 clients x 3 cold layers, all", time.monotonic() - began, 7 * 1.25, "s")
    program.stop()


async def beyond_all_places(lab):
    """The limit over all upstreams, lowered, with timeouts on the same scale."""
    first, second = lab.registry(), lab.registry()
    program = lab.program(
        first,
        upstream='first_byte_timeout = "2s"',
        more=f"""
[upstream."second.test"]
url = "{second.url}"
first_byte_timeout = "2s"
[default]
prefetch = false
[limits]
downloads_max = 8
downloads_per_upstream_max = 8
idle_timeout = "7s"
write_timeout = "7s"
""",
    )
    # Three rounds of 5 s: the last third waits longer than the idle timeout of a connection.
    layers = [("beyond", 50_000 + n) for n in range(12)]
    paths = await introduced(program, first, "library/beyond", layers)
    second.push_image("beyond", "latest", Image([("second", 50_000 + n) for n in range(12)]))
    await get(program.address, "/v2/second.test/beyond/manifests/latest")
    paths += [f"/v2/second.test/beyond/blobs/{noise_digest('second', 50_000 + n)}" for n in range(12)]
    for registry in (first, second):
        registry.rule("slow", path="/blobs/", bytes_per_s=10_000)
    came, wrong = await pulled_at_once(program, [(path, None) for path in paths])
    lab.at_least("24 cold layers with 8 permits over all upstreams, complete", came, 24, note=explain(wrong))
    program.stop()


async def full_queue(lab):
    """Beyond the limit of waiting requests: denied at once, without effect on another client."""
    registry = lab.registry()
    program = lab.program(registry, more=PLACES)
    paths = await introduced(program, registry, "library/warm", [("warm", 1000), ("more", 1000)])
    await get(program.address, paths[0])
    registry.rule("slow", path="/(blobs|manifests)/sha256:", after_s=2)
    load = lab.background(keep_outstanding, program.address, 40, 100, ())
    await load.until_ready()
    await asyncio.sleep(1)
    refused = await get(program.address, blob("library/warm", made_up_digest("one more")), source=GREEDY, timeout=5)
    lab.report(
        refused.status in (503, 429) and "retry-after" in refused.headers,
        f"beyond 4,000 waiting requests of one client: {refused.status}, "
        f"Retry-After {refused.headers.get('retry-after', 'absent')} (goal 503 or 429 with Retry-After)",
    )
    lab.at_most("beyond 4,000 waiting requests of one client, denied after", refused.seconds, 0.5, "s")
    await load.finish()
    program.stop()


# --- T12 --------------------------------------------------------------------------------------------------------------


async def many_slow(load, address, paths):
    load.ready.set()
    tasks = [
        asyncio.create_task(get(address, path, source=f"127.0.0.{60 + n // 200}", keep=False, timeout=600))
        for n, path in enumerate(paths)
    ]
    await load.until_stopped()
    for task in tasks:
        task.cancel()


async def t12(lab):
    await many_places(lab)
    await small_behind_slow(lab)


async def many_places(lab):
    registry = lab.registry()
    limits = "[limits]\ndownloads_max = 600\ndownloads_per_upstream_max = 600\n[default]\nprefetch = false"
    try:
        program = lab.program(registry, more=limits)
    except NotStarted:
        lab.report(True, "downloads_max = 600 is refused")
        return
    warm = registry.push_image("library/warm", "latest", Image([("warm", 1000)]))
    await pull(program.address, "library/warm", "latest", warm)
    paths = []
    for n in range(6):
        name = f"library/slow{n}"
        paths += await introduced(program, registry, name, [(name, 50_000 + k) for k in range(100)])
    registry.rule("slow", path="/library/slow", bytes_per_s=1000)
    quiet = await Probe(program.address, manifest("library/warm", "latest")).seconds(1)
    load = lab.background(many_slow, program.address, paths)
    await until(lambda: registry.counters()["in_progress"] > 500, 10)
    probe = await Probe(program.address, manifest("library/warm", "latest")).seconds(4)
    lab.not_slower("600 slow downloads, a warm tag's p99", probe.p99, quiet.p99)
    lab.at_most("600 slow downloads, stale responses", sum(reply.is_stale for reply in probe.replies), 0)
    lab.at_most("600 slow downloads, threads", program.threads(), 200, bound=600)
    await load.finish()
    program.stop()


async def small_behind_slow(lab):
    registry, other = lab.registry(), lab.registry()
    more = "".join(f'[upstream."up{n}.test"]\nurl = "{registry.url}"\n' for n in range(8))
    more += f'[upstream."other.test"]\nurl = "{other.url}"\n{PLACES}'
    program = lab.program(registry, more=more)
    paths = []
    for n in range(8):
        image = Image([(f"slow{n}", 1_200_000 + k) for k in range(32)], label=n)
        registry.push_image(f"slow{n}", "latest", image)
        await get(program.address, f"/v2/up{n}.test/slow{n}/manifests/latest")
        paths += [f"/v2/up{n}.test/slow{n}/blobs/{digest}" for digest in image.layers]
    small = [Image([("small", 1000 + n)], label=n) for n in range(4)]
    for n, image in enumerate(small):
        other.push_image("small", f"v{n}", image)
        registry.push_image("small", f"v{n}", image)
    quiet_s = await pull(program.address, "other.test/small", "v0", small[0])
    registry.rule("slow", path="/slow", bytes_per_s=10_000)
    load = lab.background(many_slow, program.address, paths)
    await until(lambda: registry.counters()["in_progress"] > 150, 10)
    await asyncio.sleep(1)
    elsewhere_s, same_s = await asyncio.gather(
        timed_pull(program, "other.test/small", "v1", small[1]), timed_pull(program, "up0.test/small", "v2", small[2])
    )
    lab.not_slower("behind 256 slow downloads, a small cold pull of another upstream", elsewhere_s, quiet_s, floor_s=0.5)
    lab.not_slower("behind 256 slow downloads, a small cold pull of the same upstream", same_s, quiet_s, floor_s=0.5)
    await load.finish()


async def timed_pull(program, repository, tag, image, **options):
    seconds = await pull(program.address, repository, tag, image, timeout=40, **options)
    return float("inf") if seconds is None else seconds


# --- T13 --------------------------------------------------------------------------------------------------------------


async def t13(lab):
    slow, quick = lab.registry(), lab.registry()
    program = lab.program(slow, more=f'[upstream."quick.test"]\nurl = "{quick.url}"')
    slow.rule("drip", path="/blobs/", bytes_per_s=200)
    first = []
    for n in range(2):
        name = f"library/slow{n}"
        image = slow.push_image(name, "latest", Image([(name, 1_000_000 + k) for k in range(8)], config=(name, 300)))
        await get(program.address, manifest(name, "latest"))
        first.append(asyncio.create_task(get(program.address, blob(name, image.layers[0]))))
    await until(lambda: slow.requests("GET .*/blobs/") >= 10, 5)
    print(f"      {slow.counters()['in_progress']} downloads drip", flush=True)
    wanted = quick.push_image("quick", "latest", Image([("quick", 10_000 + n) for n in range(5)]))
    await get(program.address, "/v2/quick.test/quick/manifests/latest")
    await get(program.address, f"/v2/quick.test/quick/blobs/{wanted.layers[0]}")
    all_s = await until(lambda: all(quick.requests(f"GET .*{digest}") for digest in wanted.layers), 15)
    lab.at_most("meanwhile another upstream's layers are prefetched after", all_s or float("inf"), 5, "s")
    for task in first:
        task.cancel()
