"""Runs the scenarios by name; see ./run."""

import os
import pathlib
import sys

# The scripted registry and the client are those of the load tests.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "pressure"))

import balancer
import born
import chain
import claims
import compose
import costs
import faults
import liar
import loops
import maintenance
import outage
import shared
import sidecars
import times
from fleet import Fleet
from kit import scenarios

SCENARIOS = {
    "chain": chain.run,
    "outage": outage.run,
    "loops": loops.run,
    "sidecars": sidecars.run,
    "balancer": balancer.run,
    "shared": shared.run,
    "claims": claims.run,
    "born": born.run,
    "faults": faults.run,
    "costs": costs.run,
    "times": times.run,
    "liar": liar.run,
    "maintenance": maintenance.run,
    "compose": compose.run,
}
# With KILLS, claims kill so many owners.
SCENARIO_S = 300 + 40 * int(os.environ.get("KILLS", "0"))

sys.exit(scenarios.run(SCENARIOS, sys.argv[1:], Fleet, SCENARIO_S))
