"""Runs the scenarios by name; see ./run."""

import asyncio
import pathlib
import sys
import time
import traceback

# The scripted registry and the client are those of the load tests.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "pressure"))

import balancer
import chain
import loops
import outage
import sidecars
from fleet import Fleet

SCENARIOS = {
    "chain": chain.run,
    "outage": outage.run,
    "loops": loops.run,
    "sidecars": sidecars.run,
    "balancer": balancer.run,
}
SCENARIO_S = 120


def main(chosen):
    unknown = [name for name in chosen if name not in SCENARIOS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {' '.join(SCENARIOS)}")
    failed = []
    for name in chosen:
        began = time.monotonic()
        fleet = Fleet(name)
        try:
            asyncio.run(asyncio.wait_for(SCENARIOS[name](fleet), SCENARIO_S))
        except Exception:  # the scenarios after it still run
            traceback.print_exc()
            fleet.report(False, f"broke off: {sys.exc_info()[1]!r}")
        finally:
            fleet.end()
        print(f"      {name} took {time.monotonic() - began:.0f} s", flush=True)
        if fleet.failed:
            failed.append(name)
    print(f"failed: {' '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


sys.exit(main(sys.argv[1:]))
