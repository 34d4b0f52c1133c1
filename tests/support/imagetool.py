"""Runs ``liveblockctl image`` within the test and qemu-img beside it; both give the same answer."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path

import pytest

from liveblockd import ctl

#: exit status, stdout, stderr without the name of the program
Answer = tuple[int, str, str]


def ours(*words: str | Path) -> Answer:
    """``liveblockctl image WORDS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = ctl.main(["image", *map(str, words)])
        except SystemExit as exc:
            status = int(exc.code or 0)
    return status, out.getvalue(), err.getvalue().replace("liveblockctl: ", "")


def qemu(*words: str | Path) -> Answer:
    """``qemu-img WORDS``; again where it could not measure its own speed (a busy machine)."""
    for _ in range(4):
        done = subprocess.run(
            ["qemu-img", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
        )
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    else:
        pytest.skip("qemu-img could not measure the processor: the machine is too busy")
    return done.returncode, done.stdout, done.stderr.replace("qemu-img: ", "")


def qemu_io(path: Path | str, *commands: str, image_format: str = "qcow2") -> None:
    """qemu-io commands on an image."""
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", image_format, *words, str(path)],
        check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip
