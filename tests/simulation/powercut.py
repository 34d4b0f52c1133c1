"""``python -m tests.simulation.powercut --seeds 500 --cuts 100``: power cuts, and what they cost.

Every seed is a machine: one drive or several, each with a chain of images on simulated disks, a
guest, streams, snapshots, resizes, all at the same time.
Every cut is a moment of it and one of the states that the disks may be left in.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.simulation.course import Plan
from tests.simulation.forms import KINDS
from tests.simulation.judging import Figures, judge
from tests.simulation.machine import run_machine


def run_seed(seed: int, cuts: int, **plan: object) -> Figures:
    """One machine and its cuts."""
    return judge(run_machine(Plan(seed, **plan)), cuts)  # type: ignore[arg-type]


def drives_of(seed: int) -> int:
    """How many a machine has when nobody says."""
    return random.Random(f"drives {seed}").choice((1, 1, 1, 2, 3))


def main() -> int:
    """Exit status 1 when anything was corrupt or lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.powercut")
    parser.add_argument("--seeds", type=int, default=100, help="machines")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--cuts", type=int, default=100, help="cuts of each machine")
    parser.add_argument("--mutant", help="put in a known defect: see mutants.py")
    parser.add_argument("--drives", type=int, help="of each machine; else one, two or three")
    parser.add_argument("--kind", choices=KINDS, help="images of one kind only")
    parser.add_argument("--quiet", action="store_true", help="only the sum")
    arguments = parser.parse_args()
    from tests.simulation.mutants import MUTANTS, PLANS, planted

    if arguments.mutant is not None and arguments.mutant not in MUTANTS:
        parser.error(f"--mutant is one of {', '.join(MUTANTS)}")
    plan = {"kind": arguments.kind} if arguments.kind else PLANS.get(arguments.mutant, {})
    started = time.monotonic()
    figures = Figures()
    with planted(arguments.mutant):
        for seed in range(arguments.start, arguments.start + arguments.seeds):
            try:
                drives = arguments.drives or drives_of(seed)
                one = run_seed(seed, arguments.cuts, **{"drives": drives, **plan})
            except Exception as error:
                say(f"seed {seed} failed: {error!r}")
                say(f"again: python -m tests.simulation.powercut --start {seed} --seeds 1")
                raise
            figures.add(one)
            for found in one.found[:3]:
                say(f"{found}")
            if not arguments.quiet and (seed - arguments.start) % 20 == 19:
                say(f"{time.monotonic() - started:6.0f} s: {figures}")
    say(f"{figures}; {time.monotonic() - started:.0f} s")
    return 1 if figures.found else 0


def say(line: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
