"""Slow disk calls: T6, T7."""

import asyncio
import base64
import os
import pathlib

from downloads import introduced, timed_pull
from kit.client import LOCAL, Probe, blob, get, manifest, pull
from kit.content import Image, made_up_digest, wide_manifest

PROOFS = 20_000
LAYERS = 1000


class SlowDisk:
    """Switches the delays of a program's disk while it runs; see slow_disk.c."""

    def __init__(self, lab):
        self.script = pathlib.Path(os.environ["SCRATCH"]) / f"{lab.number}-{lab.count + 1}.script"
        folder = pathlib.Path(os.environ["SCRATCH"]) / f"{lab.number}-{lab.count + 1}" / "data"
        self.environment = {
            "LD_PRELOAD": str(pathlib.Path(os.environ["SCRATCH"]) / "slow_disk.so"),
            "SLOW_DISK_FOLDER": str(folder),
            "SLOW_DISK_SCRIPT": str(self.script),
        }

    def takes(self, **milliseconds):
        self.write(self.script, milliseconds)

    def takes_once(self, **milliseconds):
        self.write(self.script.with_name(self.script.name + ".once"), milliseconds)

    def is_quick(self):
        self.script.unlink(missing_ok=True)

    @staticmethod
    def write(file, milliseconds):
        new = file.with_name(file.name + ".new")
        new.write_text(" ".join(f"{call}={time_}" for call, time_ in milliseconds.items()))
        new.rename(file)

    def delayed(self):
        calls = self.script.with_name(self.script.name + ".calls")
        return calls.stat().st_size if calls.exists() else 0


class Others:
    """Clients that need no disk: the health check, a warm tag, a warm blob."""

    def __init__(self, program, image):
        self.probes = {
            "/healthz": Probe(program.admin, "/healthz", headers=LOCAL),
            "a warm tag": Probe(program.address, manifest("library/warm", "latest"), source="127.0.0.2"),
            "a private tag for a new credential": Probe(
                program.address, manifest("library/private", "latest"), each=new_credential
            ),
            "a warm blob": Probe(program.address, blob("library/warm", image.layers[0]), source="127.0.0.3"),
        }

    async def __aenter__(self):
        for probe in self.probes.values():
            await probe.__aenter__()
        return self

    async def __aexit__(self, *_):
        for probe in self.probes.values():
            await probe.__aexit__()


def new_credential():
    return {"source": "127.0.0.4", "headers": {"Authorization": next(CREDENTIALS)}}


def basic(name):
    return "Basic " + base64.b64encode(f"{name}:secret".encode()).decode()


USERS = [basic(f"user{n}") for n in range(10_000)]
CREDENTIALS = iter(USERS)


async def with_slow_disk(lab, registry, **options):
    disk = SlowDisk(lab)
    program = lab.program(registry, environment=disk.environment, **options)
    image = registry.push_image("library/warm", "latest", Image([("warm", 1000)]))
    await pull(program.address, "library/warm", "latest", image)
    await asyncio.sleep(0.2)
    return disk, program, image


async def t06(lab):
    registry = lab.registry()
    disk, program, image = await with_slow_disk(lab, registry, more="[default]\nprefetch = false")
    registry.allow("library/private", USERS)
    private = registry.push_image("library/private", "latest", Image([("private", 1000)]))
    await pull(program.address, "library/private", "latest", private, **new_credential())

    async def others_while(what, paths, seconds):
        """Compared with the same disk without these requests."""
        async with Others(program, image) as quiet:
            await asyncio.sleep(2)
        async with Others(program, image) as others:
            asking = [asyncio.create_task(get(program.address, path)) for path in paths]
            await asyncio.sleep(seconds)
        for task in asking:
            task.cancel()
        for name, probe in others.probes.items():
            lab.not_slower(f"{what}: p99 of {name}", probe.p99, quiet.probes[name].p99)
            if probe.failures:
                lab.at_most(f"{what}: failures of {name}", len(probe.failures), 0)

    paths = await introduced(program, registry, "library/cold", [("cold", 5000 + n) for n in range(60)])
    disk.takes(open=300)
    await others_while("60 cold blobs, 300 ms for each open", paths, 5)
    lab.at_least("delayed calls of the program", disk.delayed(), 1)
    disk.is_quick()
    await asyncio.sleep(0.5)

    paths = await introduced(program, registry, "library/sync", [("sync", 5000 + n) for n in range(40)])
    disk.takes(sync=1000)
    await others_while("40 cold blobs, 1 s for each fsync", paths, 4)
    disk.is_quick()
    await asyncio.sleep(1.5)

    paths = await introduced(program, registry, "library/once", [("once", 5000)])
    disk.takes_once(open=10_000)
    await others_while("one open of 10 s", paths, 3)
    program.stop()
    await first_use_of_proofs(lab)


async def first_use_of_proofs(lab):
    """A repository with 20,000 members, requested after a restart."""
    registry = lab.registry()
    program = lab.program(registry)
    image = registry.push_image("library/warm", "latest", Image([("warm", 1000)]))
    await pull(program.address, "library/warm", "latest", image)
    for n in range(PROOFS // LAYERS):
        registry.push("library/wide", f"v{n}", wide_manifest(f"wide{n}", LAYERS), [("config", 200)])
        reply = await get(program.address, manifest("library/wide", f"v{n}"))
        if not reply.is_ok:
            raise RuntimeError(f"library/wide:v{n}: {reply.cause()}")
    program.restart()
    await pull(program.address, "library/warm", "latest", image)
    quiet = await Probe(program.admin, "/healthz", every_s=0.001, headers=LOCAL).seconds(1)
    async with Probe(program.admin, "/healthz", every_s=0.001, headers=LOCAL) as probe:
        await asyncio.sleep(0.05)
        await get(program.address, blob("library/wide", image.config))
        await get(program.address, blob("library/wide", made_up_digest("wide0", 0)))
        await asyncio.sleep(0.2)
    lab.not_slower(f"first use of {PROOFS} proofs: /healthz at worst", probe.worst, quiet.worst, floor_s=0.02)
    program.stop()


# --- T7 ---------------------------------------------------------------------------------------------------------------


async def t07(lab):
    for milliseconds in (50, 300):
        await revoked(lab, milliseconds)


async def revoked(lab, milliseconds):
    registry = lab.registry()
    disk, program, image = await with_slow_disk(lab, registry)
    clients = [basic(f"client{n}") for n in range(16)]
    strangers = [basic(f"stranger{n}") for n in range(3)]
    private = {name: registry.push_image(name, "latest", Image([(name, 1000)])) for name in ("library/team", "library/own")}
    registry.allow("library/team", clients)
    registry.allow("library/own", strangers)

    async def first_pull(stranger):
        shown = {"Authorization": stranger}
        return await timed_pull(program, "library/own", "latest", private["library/own"], headers=shown)

    for client in clients:
        await pull(program.address, "library/team", "latest", private["library/team"], headers={"Authorization": client})
    await first_pull(strangers[0])
    disk.takes(sync=milliseconds)
    await asyncio.sleep(1)
    quiet_s = await first_pull(strangers[1])
    warm = Probe(program.address, manifest("library/warm", "latest"))
    await warm.seconds(1)

    registry.allow("library/team", [])
    denied = [
        asyncio.create_task(get(program.address, manifest("library/team", "latest"), headers={"Authorization": client}))
        for client in clients
    ]
    await asyncio.sleep(0.02)
    async with Probe(program.address, manifest("library/warm", "latest")) as probe:
        first_s = await first_pull(strangers[2])
        replies = await asyncio.gather(*denied)
    what = f"16 revoked tokens, {milliseconds} ms for each fsync"
    lab.not_slower(f"{what}: a new client's first pull", first_s, quiet_s, floor_s=2 * milliseconds / 1000)
    lab.not_slower(f"{what}: a warm tag's p99", probe.p99, warm.p99)
    others = [reply for reply in replies if reply.status not in (401, 403)]
    note = f"; first other: {others[0].status}, {others[0].cause()}" if others else ""
    lab.at_least(f"{what}: denied", 16 - len(others), 16, note=note)
    lab.at_most(f"{what}: the last denial after", max(reply.seconds for reply in replies), 1 + 8 * milliseconds / 1000, "s")
    lab.at_least(f"{what}: delayed calls", disk.delayed(), 1)
    program.stop()
