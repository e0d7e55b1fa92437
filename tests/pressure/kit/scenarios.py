"""Runs the scenarios of a suite one after the other."""

import asyncio
import sys
import time
import traceback


def run(scenarios, chosen, new_lab, seconds_max):
    """Runs the chosen scenarios, or all of them. Returns the exit code."""
    unknown = [name for name in chosen if name not in scenarios]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {' '.join(scenarios)}")
    missed, failed = [], []
    for name in chosen or scenarios:
        began = time.monotonic()
        lab = new_lab(name)
        try:
            asyncio.run(asyncio.wait_for(scenarios[name](lab), seconds_max))
        except Exception:  # the scenarios after it still run
            traceback.print_exc()
            lab.report(False, f"broke off: {sys.exc_info()[1]!r}")
        finally:
            lab.end()
        print(f"      {name} took {time.monotonic() - began:.0f} s", flush=True)
        if lab.missed:
            missed.append(name)
        if lab.failed:
            failed.append(name)
    print(f"missed goals: {' '.join(missed) or 'none'}; failed: {' '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0
