"""qcow2 images in memory and in files, opened by the driver without a graph; qemu-img beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liveblockd.events import Publisher
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.options import Qcow2Options
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import BlockIO
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers


async def open_qcow2(
    file: BlockIO,
    backing: BlockIO | None = None,
    *,
    autosync: float | None = None,
    publisher: Publisher | None = None,
    workers: WorkerPool | None = None,
    data_file: BlockIO | None = None,
    secret: Callable[[str], bytes] | None = None,
    **options: Any,
) -> Qcow2:
    """The driver on ``file``; ``options`` are members of blockdev-add."""
    members = {"driver": "qcow2", "file": "file", **options}
    model = parse(Qcow2Options, {k.replace("_", "-"): v for k, v in members.items()})
    children: dict[str, BlockIO] = {"file": file}
    if data_file is not None:
        children["data-file"] = data_file
    environment = Environment(
        workers or InlineWorkers(), publisher=publisher or Publisher(), node_name="node"
    )
    if secret is not None:
        environment = replace(environment, secret=secret)
    image = await Qcow2.open(model, children, environment, autosync=autosync)
    if backing is not None:
        children["backing"] = backing
    return image


async def new_qcow2(disk: MemoryDriver | None = None, **options: Any) -> MemoryDriver:
    """A file in memory with a new image (arguments of ``create_qcow2``)."""
    disk = disk or MemoryDriver()
    await create_qcow2(disk, **options)
    return disk


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where one of the programs is missing."""
    missing = [p for p in programs if shutil.which(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def run(*arguments: str | Path, status: int = 0) -> str:
    """Run a program, bounded; its output."""
    done = subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout


def check(path: Path) -> dict[str, int]:
    """Counts of qemu-img check that are not 0: corruptions, leaks, check-errors."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    keys = ("corruptions", "leaks", "check-errors")
    return {key: report[key] for key in keys if report.get(key)}
