"""Context of a scenario: its registries, programs and figures."""

import asyncio
import os
import pathlib
import time

from kit.process import Background, Program
from kit.registry import Registry

# A p99 below this depends more on this machine's other load than on the program.
QUICK_S = 0.05


class Lab:
    """One scenario while it runs."""

    def __init__(self, number):
        self.number, self.missed, self.failed, self.count = number, 0, 0, 0
        self.programs, self.registries, self.backgrounds = [], [], []

    def registry(self):
        self.registries.append(Registry())
        return self.registries[-1]

    def program(self, registry, **options):
        self.count += 1
        folder = pathlib.Path(os.environ["SCRATCH"]) / f"{self.number}-{self.count}"
        self.programs.append(Program(folder, registry, **options))
        return self.programs[-1]

    def background(self, function, *arguments):
        self.backgrounds.append(Background(function, *arguments))
        return self.backgrounds[-1]

    def end(self):
        for background in self.backgrounds:
            background.kill()
        for program in self.programs:
            program.remove()
        for registry in self.registries:
            registry.stop()

    # --- figures

    def at_most(self, what, figure, goal, unit="", note="", bound=None):
        """`bound` fails the run. It differs from the goal for known misses and for times on a busy machine."""
        bound = bound or (2 * goal if unit == "s" else goal)
        self.report(figure <= goal, f"{what}: {shown(figure, unit)} (goal at most {shown(goal)}{note})", figure <= bound)

    def at_least(self, what, figure, goal, unit="", note=""):
        self.report(figure >= goal, f"{what}: {shown(figure, unit)} (goal at least {shown(goal)}{note})")

    def not_slower(self, what, figure_s, quiet_s, times=2, floor_s=QUICK_S):
        """Compares a time with the time without load in the same run."""
        goal = max(times * quiet_s, floor_s)
        self.report(
            figure_s <= goal,
            f"{what}: {shown(figure_s * 1000)} ms, quiet {shown(quiet_s * 1000)} ms (goal at most {shown(goal * 1000)})",
            figure_s <= 10 * goal,
        )

    def report(self, is_met, line, is_within_bound=False):
        verdict = "ok  " if is_met else "miss" if is_within_bound else "FAIL"
        self.missed += verdict == "miss"
        self.failed += verdict == "FAIL"
        print(f"{verdict}  {self.number} {line}", flush=True)


def shown(figure, unit=""):
    number = f"{figure:.0f}" if isinstance(figure, int) or abs(figure) >= 100 else f"{figure:.3g}"
    return f"{number} {unit}".rstrip()


async def until(condition, seconds, every_s=0.02):
    """Seconds until the condition is true; None after the timeout."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        await asyncio.sleep(every_s)
    return None
