"""Runs the scenarios by number; see ./run."""

import sys

import admin
import connections
import disk
import downloads
import fairness
import memory
import refresh
import silence
from kit import scenarios
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

sys.exit(scenarios.run(SCENARIOS, sys.argv[1:], Lab, SCENARIO_S))
