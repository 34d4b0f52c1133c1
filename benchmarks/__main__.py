"""``python -m benchmarks``: what ``make bench`` runs (README.md)."""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import signal
import sys
from pathlib import Path

from benchmarks import fio, report
from benchmarks.lab import Lab
from benchmarks.registry import CannotRun, load_measures
from benchmarks.run import chosen_kinds, take


def client_alone(lab: Lab) -> str:
    """fio's own ceiling, to tell whether a line measures the client."""
    try:
        fio.available()
        return fio.ceiling(lab.disk(0), min(1.0, lab.duration))
    except CannotRun as exc:
        return f"unknown ({exc})"
    finally:
        lab.clean()


def main() -> int:
    """0 if every line that could run gave right results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="names of measures, with * and commas")
    parser.add_argument("--pairs", type=int, default=5, help="samples of each daemon")
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes and durations")
    parser.add_argument("--daemons", default="uvloop,asyncio", help="ours, beside the peer")
    parser.add_argument("--directory", help="where 'file system' images go")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--list", action="store_true", help="name the measures and end")
    parser.add_argument("--render", action="store_true", help="only write the table anew")
    parser.add_argument(
        "--floors", action="store_true", help="renew only what the machine allows, not the lines"
    )
    parser.add_argument("--no-docs", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    measures = load_measures()
    if arguments.list:
        for measure in measures:
            print(f"{measure.name:28}{measure.metrics[0].title}")
        return 0
    patterns = [word for word in arguments.only.split(",") if word] or ["*"]
    chosen = [m for m in measures if any(fnmatch.fnmatch(m.name, p) for p in patterns)]
    if not chosen:
        parser.error(f"no measure is named {arguments.only} (--list names them)")
    results = report.load(arguments.docs)
    failed = False
    if not arguments.render:
        for tool in ("qemu-storage-daemon", "qemu-img", "qemu-io"):
            if not shutil.which(tool):
                parser.error(f"{tool} is missing (Debian: qemu-utils, qemu-system-common)")
        kinds = chosen_kinds(arguments.daemons)
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores ^C for us
            signal.signal(number, lambda *_: sys.exit("interrupted"))
        with Lab(arguments.scale, arguments.directory) as lab:
            if any(measure.name.startswith("nbd-") for measure in chosen):
                results["client"] = client_alone(lab)
            for measure in chosen:
                found = take(measure, lab, kinds, arguments.pairs)
                failed |= "failed" in found
                floors = results.setdefault("floors", {})
                floors.pop(measure.name, None)
                (floors if arguments.floors else results["measures"])[measure.name] = found
                results["machine"] = report.machine(arguments.directory)
                if not arguments.no_docs:  # after each, so that an interrupted run is not lost
                    report.save(arguments.docs, results, measures)
    elif not arguments.no_docs:
        report.save(arguments.docs, results, measures)
    shown = measures if arguments.render else chosen
    print(report.table(results, shown))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
