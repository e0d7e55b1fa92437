"""Admin listener: connection limits and token: T14."""

import asyncio
import time

from connections import stay_idle
from kit.client import LOCAL, Probe, get, request
from kit.process import plain_environment

WRONG_TOKENS_PER_S_MAX = 200
TOKEN = "the-token-of-this-scenario-is-long-enough"


async def follow_events(load, address, count):
    """Event streams that stay open."""

    async def one():
        while True:
            try:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(request("/api/v1/events/stream", headers={**LOCAL, "Accept": "text/event-stream"}))
                while await reader.read(65536):
                    pass
            except OSError:
                pass
            await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await asyncio.sleep(1)
    load.ready.set()
    await load.until_stopped()
    for task in tasks:
        task.cancel()


async def guess_tokens(load, address):
    """Sends wrong tokens. Returns the number of compared ones, and the seconds. 429 means not compared."""
    refused, began = 0, time.monotonic()

    async def one():
        nonlocal refused
        while not load.stopped.is_set():
            reply = await get(address, "/api/v1/status", headers={**LOCAL, "Authorization": f"Bearer wrong{refused}"})
            refused += reply.status in (401, 403)

    tasks = [asyncio.create_task(one()) for _ in range(16)]
    await load.until_stopped()
    for task in tasks:
        task.cancel()
    return refused, time.monotonic() - began


async def t14(lab):
    registry = lab.registry()
    program = lab.program(registry)
    for what, attack in (("idle admin connections", stay_idle), ("event streams", follow_events)):
        load = lab.background(attack, program.admin, 300)
        await load.until_ready()
        probe = Probe(program.admin, "/healthz", every_s=0.05, timeout=10, headers=LOCAL)
        await probe.seconds(3)
        lab.at_most(f"300 {what}: /healthz failures", len(probe.failures), 0)
        lab.at_most(f"300 {what}: /healthz at worst", probe.worst, 1, "s")
        metrics = await get(program.admin, "/metrics", timeout=10, headers=LOCAL)
        lab.at_most(f"300 {what}: /metrics", metrics.seconds if metrics.status == 200 else float("inf"), 1, "s")
        lab.at_most(f"300 {what}: exit code of `ifnewer healthcheck`", await health_check(program), 0)
        load.kill()
        await asyncio.sleep(0.3)
    program.stop()

    token = program.folder.with_name(program.folder.name + "-token")
    token.write_text(TOKEN + "\n")
    program = lab.program(registry, listen=f'admin_token_file = "{token}"')
    load = lab.background(guess_tokens, program.admin)
    await asyncio.sleep(4)
    shown = {**LOCAL, "Authorization": f"Bearer {TOKEN}"}
    right = await get(program.admin, "/api/v1/status", headers=shown, source="127.0.0.5")
    refused, seconds = await load.finish()
    lab.at_most("wrong admin tokens of one address compared per second", refused / seconds, WRONG_TOKENS_PER_S_MAX)
    log = program.log.read_text(errors="replace")
    lines = [line for line in log.splitlines() if "token" in line.lower() and "WARN" in line]
    lab.at_least("wrong admin tokens, lines in the log", len(lines), 1)
    lab.at_most("wrong admin tokens, lines in the log, bounded", len(lines), 20)
    lab.report(right.status == 200, f"meanwhile the correct token of another address: {right.status} (goal 200)")
    lab.at_most("meanwhile the correct token of another address", right.seconds, 1, "s")


async def health_check(program):
    host, port = program.admin
    process = await asyncio.create_subprocess_exec(
        program.process.args[0], "healthcheck", "--admin", f"{host}:{port}",
        env=plain_environment(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )
    return await process.wait()
