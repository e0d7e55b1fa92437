"""Runs the scenarios by number; see ./run."""

import asyncio
import sys
import time
import traceback

import admin
import connections
import disk
import downloads
import fairness
import memory
import refresh
import silence
from kit.lab import Lab

SCENARIOS = {
    "t02": downloads.t02,
    "t03": memory.t03,
    "t04": silence.t04,
    "t05": silence.t05,
    "t06": disk.t06,
    "t07": disk.t07,
    "t08": fairness.t08,
    "t09": fairness.t09,
    "t10": connections.t10,
    "t11": silence.t11,
    "t12": downloads.t12,
    "t13": downloads.t13,
    "t14": admin.t14,
    "t18": memory.t18,
    "o02": silence.o02,
    "refresh": refresh.refresh,
}
SCENARIO_S = 400


def main(chosen):
    unknown = [number for number in chosen if number not in SCENARIOS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {' '.join(SCENARIOS)}")
    missed, failed = [], []
    for number in chosen or SCENARIOS:
        began = time.monotonic()
        lab = Lab(number)
        try:
            asyncio.run(asyncio.wait_for(SCENARIOS[number](lab), SCENARIO_S))
        except Exception:  # the scenarios after it still run
            traceback.print_exc()
            lab.report(False, f"broke off: {sys.exc_info()[1]!r}")
        finally:
            lab.end()
        print(f"      {number} took {time.monotonic() - began:.0f} s", flush=True)
        if lab.missed:
            missed.append(number)
        if lab.failed:
            failed.append(number)
    print(f"missed goals: {' '.join(missed) or 'none'}; failed: {' '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


sys.exit(main(sys.argv[1:]))
