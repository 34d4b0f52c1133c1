"""From samples to ratios, a Markdown table and plots: docs/benchmarks.md and beside it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plot import Bar, plot
from benchmarks.registry import Measure, Metric

OURS = ("uvloop", "asyncio")
MIB = 1 << 20
MEMORY_LIMIT = 200


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratios`` by daemon of ours, pair by pair."""

    title: str
    unit: str
    values: dict[str, list[float]]
    ratios: dict[str, list[float]]
    target: str
    verdict: str
    limit: float | None = None


def load(docs: Path) -> dict[str, Any]:
    """What earlier runs left; a run replaces only the lines that it measured."""
    try:
        found: dict[str, Any] = json.loads((docs / "benchmarks" / "results.json").read_text())
    except FileNotFoundError:
        return {"machine": {}, "measures": {}}
    return found


def save(docs: Path, results: dict[str, Any], measures: Sequence[Measure]) -> None:
    """Raw figures, plots and the page."""
    beside = docs / "benchmarks"
    beside.mkdir(parents=True, exist_ok=True)
    (beside / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plots = []
    for name, title, prefix in (
        ("streams", "Streams", "stream-"),
        ("requests", "Requests of a guest", "nbd-"),
        ("meanwhile", "Guests and monitors during streams, memory", ""),
    ):
        group = [
            m for m in measures
            if (m.name.startswith(prefix) if prefix else not m.name.startswith(("stream-", "nbd-")))
        ]  # fmt: skip
        bars = [
            Bar(row.title, row.ratios["uvloop"], row.limit)
            for m in group
            for row in rows(m, results)
            if row.ratios.get("uvloop")
        ]
        if bars:
            (beside / f"{name}.svg").write_text(
                plot(f"{title}: gain over qemu-storage-daemon", bars)
            )
            plots.append(f"![{title}](benchmarks/{name}.svg)")
    floors = floor_table(results, measures)
    page = PAGE.format(
        machine=machine_text(results), table=table(results, measures),
        floors=FLOORS.format(table=floors) if floors else "",
        plots="\n\n".join(plots),
    )  # fmt: skip
    (docs / "benchmarks.md").write_text(page)


def rows(measure: Measure, results: dict[str, Any]) -> list[Row]:
    """The lines of one measure; also those that could not be taken."""
    found = results["measures"].get(measure.name, {"absent": "not measured yet"})
    return [row(metric, found) for metric in measure.metrics]


def row(metric: Metric, found: dict[str, Any]) -> Row:
    """One metric's line."""
    target = goal(metric)
    samples = found.get("samples", {})
    values = {
        kind: [sample[metric.name] for sample in taken if metric.name in sample]
        for kind, taken in samples.items()
    }
    for key, word in (("failed", "WRONG or failed: "), ("missing", "cannot run: "), ("absent", "")):
        if key in found:
            why = word + brief(found[key])
            return Row(metric.title, metric.unit, {}, {}, target, why, metric.target)
    peers = values.get("qsd", [])
    ratios = {
        kind: [gain(metric, own, peer) for own, peer in zip(taken, peers, strict=True)]
        for kind, taken in values.items()
        if kind != "qsd"
    }
    first = next((kind for kind in OURS if values.get(kind)), None)
    verdict = "" if first is None else judged(metric, values[first], ratios[first])
    return Row(metric.title, metric.unit, values, ratios, target, verdict, metric.target)


def brief(text: str) -> str:
    """One line of a table, without the names of this machine's directories."""
    text = re.sub(r"/[^\s:,]*/", "", text.replace("\n", " ").replace("|", "/"))
    return text if len(text) < 160 else text[:157] + "..."


def gain(metric: Metric, own: float, peer: float) -> float:
    """How many times better than the peer; more is better whatever the figure means."""
    better, worse = (peer, own) if metric.less else (own, peer)
    if worse <= 0:
        return math.inf if better > 0 else 1.0
    return better / worse


def goal(metric: Metric) -> str:
    parts = []
    if metric.target is not None:
        parts.append(f"{'>' if metric.strict else '≥'} {metric.target:g}×")
    if metric.limit is not None:
        parts.append(f"{'<' if metric.less else '≥'} {metric.limit:g} {metric.unit}")
    return ", ".join(parts)


def judged(metric: Metric, own: list[float], ratios: list[float]) -> str:
    """Reached or not, by the medians."""
    if not own or (metric.target is None and metric.limit is None):
        return ""
    reached = True
    if metric.target is not None:
        median = statistics.median(ratios)
        reached &= median > metric.target if metric.strict else median >= metric.target
    if metric.limit is not None:
        median = statistics.median(own)
        reached &= median < metric.limit if metric.less else median >= metric.limit
    return "reached" if reached else "**not reached**"


def figure(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def spread(values: list[float]) -> str:
    """Median and the range of all."""
    if not values:
        return "-"
    middle = figure(statistics.median(values))
    return f"**{middle}** ({figure(min(values))}..{figure(max(values))})"


def median(values: list[float] | None) -> str:
    return figure(statistics.median(values)) if values else "-"


def taken_when(found: dict[str, Any]) -> str:
    """When, how often and at which scale a measure was taken."""
    pairs = len(found.get("samples", {}).get("qsd", []))
    if not pairs:
        return ""
    return f"{found.get('when', '')[:10]}, {pairs} pairs, scale {found.get('scale', 1):g}".strip(
        ", "
    )


def cpu_gain(found: dict[str, Any]) -> str:
    """QSD's processor time over ours for the same work: median and range over the pairs."""
    taken = found.get("cpu", {})
    own: list[float] = next((taken[kind] for kind in OURS if taken.get(kind)), [])
    if "failed" in found or not own or 0 in own:
        return ""
    return spread([peer / mine for peer, mine in zip(taken["qsd"], own, strict=True)])


def table_line(found: Row, cpu: str, taken: str) -> str:
    cells = [
        found.title,
        found.unit,
        median(found.values.get("qsd")),
        median(found.values.get("uvloop")),
        spread(found.ratios.get("uvloop", [])),
        spread(found.ratios.get("asyncio", [])),
        cpu,
        found.target,
        found.verdict,
        taken,
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, Any], measures: Sequence[Measure]) -> str:
    """Markdown."""
    lines = [
        "| measure | unit | QSD | liveblockd | gain | gain, asyncio | CPU gain | target | "
        "| taken |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for measure in measures:
        taken = taken_when(results["measures"].get(measure.name, {}))
        cpu = cpu_gain(results["measures"].get(measure.name, {}))
        for number, found in enumerate(rows(measure, results)):
            lines.append(table_line(found, "" if number else cpu, taken))
    peaks = [results["measures"].get(m.name, {}).get("peak", {}) for m in measures]
    most = {k: max((p[k] for p in peaks if k in p), default=0) / MIB for k in ("qsd", *OURS)}
    if most["uvloop"]:
        asyncio = f"asyncio: {most['asyncio']:.0f} MiB" if most["asyncio"] else "-"
        verdict = "reached" if most["uvloop"] < MEMORY_LIMIT else "**not reached**"
        lines.append(
            f"| peak resident memory in all the above | MiB | {most['qsd']:.0f} "
            f"| {most['uvloop']:.0f} | **{most['qsd'] / most['uvloop']:.2g}** "
            f"| {asyncio} | | < {MEMORY_LIMIT} MiB | {verdict} | |"
        )
    return "\n".join(lines)


def floor_line(metric: Metric, found: dict[str, Any]) -> str | None:
    """What the machine allows of one metric; None where nothing is known of that."""
    floors = [figures[metric.name] for figures in found.get("floor", []) if metric.name in figures]
    samples = found.get("samples", {})
    first = next((kind for kind in OURS if samples.get(kind)), None)
    if first is None or "failed" in found or not len(floors) == len(samples[first]) > 0:
        return None
    peers = [sample[metric.name] for sample in samples["qsd"]]
    own = [sample[metric.name] for sample in samples[first]]
    reach = [gain(metric, bare, peer) for bare, peer in zip(floors, peers, strict=True)]
    share = [gain(metric, mine, bare) for mine, bare in zip(own, floors, strict=True)]
    verdict = ""
    if metric.target is not None:
        verdict = "yes" if statistics.median(reach) >= metric.target else "**no**"
    cells = [
        metric.title, metric.unit, figure(statistics.median(floors)), spread(reach), goal(metric),
        verdict, spread(share), str(found.get("floor_how", "")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def floor_table(results: dict[str, Any], measures: Sequence[Measure]) -> str:
    """Markdown: what the machine allows; empty where that was not measured."""
    lines = []
    for measure in measures:
        found = results["measures"].get(measure.name, {})
        found = results.get("floors", {}).get(measure.name, found)
        lines += [line for m in measure.metrics if (line := floor_line(m, found)) is not None]
    if not lines:
        return ""
    head = [
        "| measure | unit | machine alone | over QSD | target | allowed | liveblockd of it | by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines)


def machine(directory: str | None) -> dict[str, str]:
    """What the figures hang on; no names of machines or directories."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    place = directory or os.environ.get("TMPDIR") or "/tmp"
    found = {
        "processors": f"{len(os.sched_getaffinity(0))} ({cpu[1].strip() if cpu else 'unknown'})",
        "memory": f"{int(memory[1]) >> 20} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "file system": said("stat", "-f", "-c", "%T", place),
        "Python": platform.python_version(),
    }
    for tool in ("qemu-storage-daemon", "qemu-img", "fio"):
        words = re.search(r"\d+(\.\d+)+", said(tool, "--version"))
        found[tool] = words[0] if words else "missing"
    from liveblockd import __version__

    return {**found, "liveblockd": __version__, "load average": f"{os.getloadavg()[0]:.1f}"}


def said(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def machine_text(results: dict[str, Any]) -> str:
    found = dict(results["machine"])
    if "client" in results:
        found["fio alone, 4 KiB randread of a server that does nothing, depth 1 / 16 / 64"] = (
            f"{results['client']} IOPS"
        )
    return "\n".join(f"| {name} | {value} |" for name, value in found.items())


PAGE = """\
# liveblockd beside qemu-storage-daemon

Written by `make bench` ([benchmarks/](../benchmarks/README.md)); the raw figures are in
[benchmarks/results.json](benchmarks/results.json). Both daemons work on the same images, with the
same command line and QMP, in turn (A B A B). Figures are medians; *gain* is ours over QSD's (or
QSD's over ours where less is better), taken pair by pair: median and, in brackets, the range.
*CPU gain* is the same of the processor time that the daemons took for that work; it suffers less
from whatever else the machine did. Every sample was checked: the bytes with `qemu-img compare` or
block by block, the image with `qemu-img check`. Time runs from the QMP command to
BLOCK_JOB_COMPLETED, or from the first request to the last.

What the two do in that time is not the same: before BLOCK_JOB_COMPLETED liveblockd makes durable
what the merged image consists of ([durability.md](durability.md)); QSD leaves most of it to later,
and a crash may lose it. On a file system with a slow disk behind it that is what the time goes to.

The *load average* below tells how busy the machine was with other things: where it is far above
one, the ranges are wide and the processor time is the better guide.

{table}

{floors}{plots}

The dash on a bar's line is the range over the pairs, the triangle the target.

| machine | |
|---|---|
{machine}
"""

FLOORS = """\
## What the machine allows

In turn with the daemons the same work was done without one: the bytes of a stream copied by bare
threads, with nothing to decide (no tables, no job, no guest; on the file system with fdatasync in
the end), the best of several ways; the same guest on an nbdkit, which is C, that does nothing or
next to nothing. *over QSD* is the gain that this would be, *allowed* whether the target is within
it, *liveblockd of it* how much of it liveblockd reaches (1: all of it). Rows that were taken by
themselves (`--floors`) have figures of QSD and liveblockd of their own, taken in the same turns.

{table}

"""
