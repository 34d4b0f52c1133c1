"""Gains, verdicts and the table: arithmetic that the whole comparison hangs on."""

import math

from benchmarks import report
from benchmarks.plot import Bar, plot
from benchmarks.registry import Measure, Metric, load_measures


class Streams(Measure):
    name = "streams"
    metrics = (
        Metric("rate", "rate", "MiB/s", target=4),
        Metric("wait", "wait", "s", less=True, target=1.2),
        Metric("memory", "memory", "MiB", less=True, limit=60),
        Metric("faster", "faster", "MiB/s", target=1, strict=True),
    )


def sample(rate, wait, memory, faster=1.0):
    return {"rate": rate, "wait": wait, "memory": memory, "faster": faster}


RESULTS = {
    "machine": {},
    "measures": {
        "streams": {
            "when": "2026-01-01 00:00 UTC",
            "scale": 1,
            "samples": {
                "qsd": [sample(100, 6, 10), sample(200, 6, 10), sample(100, 6, 10)],
                "uvloop": [sample(400, 5, 70), sample(600, 2, 50), sample(500, 6, 61)],
                "asyncio": [sample(300, 6, 50), sample(300, 6, 50), sample(300, 6, 50)],
            },
        }
    },
}


def test_gain_is_taken_pair_by_pair_and_greater_is_better():
    rate, wait, memory, faster = report.rows(Streams(), RESULTS)
    assert rate.ratios["uvloop"] == [4, 3, 5]
    assert rate.verdict == "reached"
    assert wait.ratios["uvloop"] == [1.2, 3, 1]
    assert wait.verdict == "reached"
    assert memory.verdict == "**not reached**", "a limit looks at our own figure"
    assert faster.verdict == "**not reached**", "strict: 1.0 is not more than 1"


def test_gain_of_nothing():
    less = Metric("space", "", "MiB", less=True)
    assert report.gain(less, 0, 20) == math.inf
    assert report.gain(less, 0, 0) == 1


def test_lines_that_could_not_be_taken_stay_in_the_table():
    table = report.table({"measures": {"streams": {"missing": "no loop mount"}}}, [Streams()])
    assert table.count("cannot run: no loop mount") == 4
    failed = {**RESULTS["measures"]["streams"], "failed": "WrongResult: bytes differ"}
    table = report.table({"measures": {"streams": failed}}, [Streams()])
    assert "WRONG" in table and "reached" not in table


def test_what_the_machine_allows_stands_beside_both():
    measure = RESULTS["measures"]["streams"]
    floor = [{"rate": 500, "wait": 3}, {"rate": 600, "wait": 3}, {"rate": 300, "wait": 6}]
    results = {"measures": {"streams": {**measure, "floor": floor, "floor_how": "bare hands"}}}
    head, _, rate, wait = report.floor_table(results, [Streams()]).splitlines()
    assert head.startswith("| measure")
    assert "| 500 | **3** (3..5) | ≥ 4\u00d7 | **no** | **1** (0.8..1.67) | bare hands |" in rate
    assert "| 3 | **2** (1..2) | ≥ 1.2\u00d7 | yes | **1** (0.6..1.5) |" in wait
    few = {"measures": {"streams": {**measure, "floor": floor[:2]}}}
    assert report.floor_table(few, [Streams()]) == ""
    assert report.floor_table(RESULTS, [Streams()]) == ""


def test_no_directory_of_the_machine_gets_into_the_table():
    assert "/some/where" not in report.brief("cannot open /some/where/base.qcow2: no")


def test_plot_marks_what_is_reached():
    drawn = plot(
        "all", [Bar("a < b", [5, 4, 6], 4), Bar("c", [0.1], 2), Bar("d", [math.inf], None)]
    )
    assert drawn.count("<rect") == 4
    assert "a &lt; b" in drawn
    assert ">5\u00d7</text>" in drawn and ">0.1\u00d7</text>" in drawn and ">∞</text>" in drawn


def test_every_line_has_a_place_a_goal_and_metrics_of_its_own():
    measures = load_measures()
    assert len({measure.name for measure in measures}) == len(measures) >= 25
    for measure in measures:
        names = [metric.name for metric in measure.metrics]
        assert len(set(names)) == len(names) > 0
        assert any(m.target is not None or m.limit is not None for m in measure.metrics)
