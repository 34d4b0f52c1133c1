"""The standard streams: closed ones are opened, and nobody waits for who does not read."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

from liveblockd.runtime.streams import LogHandler, say

ROOT = Path(__file__).resolve().parents[3]
REPORT = """
import os, sys
from liveblockd.runtime.streams import open_standard_streams
open_standard_streams()
print("to nobody"); print("nor this", file=sys.stderr); sys.stdin.read(1)
names = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
next_one = os.open(os.devnull, os.O_RDWR)
open("report", "w").write(f"{names} {next_one > 2}")
"""


def full_pipe():
    """A pipe that takes nothing more; (reading end, writing end that waits)."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    return reading, writing


def test_closed_descriptors_are_dev_null(tmp_path):
    command = f"exec '{sys.executable}' -c '{REPORT}' <&- >&- 2>&-"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (tmp_path / "report").read_text() == f"{['/dev/null'] * 3} True"


def test_a_line_is_written_at_once():
    reading, writing = os.pipe()
    with open(reading, "rb") as there, open(writing, "w") as stream:
        stream.write("before, ")
        assert say("a line \udc80", stream)
        assert there.read(20) == b"before, a line \\udc80"[:20]


def test_a_full_pipe_is_not_waited_for():
    reading, writing = full_pipe()
    with open(reading, "rb"), open(writing, "w") as stream:
        assert not say("x", stream)
        os.read(reading, 4096)
        assert say("y", stream)
        assert not say("z" * 100_000, stream)  # the rest of it


def test_a_stream_that_fails_or_is_closed_is_no_error():
    with open("/dev/full", "w") as full:
        assert not say("x", full)
    assert not say("x", full)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        assert not say("x", stream)


def test_the_log_goes_to_stderr_as_it_is_now(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("p: %(message)s"))
    handler.emit(logging.LogRecord("n", logging.WARNING, "", 0, "%d things", (3,), None))
    assert stream.getvalue() == "p: 3 things\n"
