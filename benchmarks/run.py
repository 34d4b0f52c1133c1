"""Take the samples: the daemons in turn, A B A B, so that a noisy machine is noisy for all."""

from __future__ import annotations

import datetime
import sys
import time
import traceback
from typing import Any

from benchmarks.daemons import KINDS, Kind, QmpFailure
from benchmarks.lab import Lab
from benchmarks.registry import CannotRun, Measure, WrongResult


def take(measure: Measure, lab: Lab, kinds: list[Kind], pairs: int) -> dict[str, Any]:
    """All samples of one measure, as they are kept in the results."""
    result: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "scale": lab.scale,
        "samples": {kind.name: [] for kind in kinds},
        "cpu": {kind.name: [] for kind in kinds},
        "peak": {},
        "floor": [],
    }
    try:
        measure.prepare(lab)
        peaks: dict[str, list[int]] = {kind.name: [] for kind in kinds}
        for number in range(pairs):
            for kind in kinds:
                start = time.monotonic()
                measure.peaks, measure.cpu = [], []
                figures = measure.sample(lab, kind)
                result["samples"][kind.name].append(figures)
                peaks[kind.name] += measure.peaks
                if measure.cpu:  # of several runs in a sample the last is what the figures are of
                    result["cpu"][kind.name].append(measure.cpu[-1])
                figures_and_cpu = {**figures, "cpu": measure.cpu[-1]} if measure.cpu else figures
                shown = "  ".join(f"{k} {value:.4g}" for k, value in figures_and_cpu.items())
                took = time.monotonic() - start
                print(
                    f"{measure.name} {number + 1}/{pairs} {kind.name}: {shown}  [{took:.0f} s]",
                    flush=True,
                )
            floor(measure, lab, result)
        result["peak"] = {name: max(found) for name, found in peaks.items() if found}
    except CannotRun as exc:
        result["missing"] = str(exc)
        print(f"{measure.name}: cannot run here: {exc}", flush=True)
    except (WrongResult, QmpFailure, OSError) as exc:
        # the samples taken so far stay, but the line counts as failed
        result["failed"] = f"{type(exc).__name__}: {exc}"
        print(f"{measure.name}: FAILED: {exc}", file=sys.stderr, flush=True)
    except Exception as exc:
        traceback.print_exc()
        result["failed"] = f"{type(exc).__name__}: {exc}"
    finally:
        lab.clean()
    return result


def floor(measure: Measure, lab: Lab, result: dict[str, Any]) -> None:
    """What the machine allows, in the same turn as the daemons' samples."""
    if "no_floor" in result:
        return
    start = time.monotonic()
    try:
        figures = measure.floor(lab)
    except CannotRun as exc:
        result["no_floor"] = str(exc)
        print(f"{measure.name}: nothing of the machine alone: {exc}", flush=True)
        return
    if not figures:
        result["no_floor"] = ""
        return
    result["floor"].append(figures)
    result["floor_how"] = measure.floor_how
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    took = time.monotonic() - start
    print(f"{measure.name} machine alone: {shown}  [{took:.0f} s]", flush=True)


def chosen_kinds(names: str) -> list[Kind]:
    """By name; the peer is always first."""
    found = [KINDS[name] for name in names.split(",") if name]
    return [KINDS["qsd"], *(kind for kind in found if kind.name != "qsd")]
