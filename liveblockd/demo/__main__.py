"""Run the two recipes of live block operations before the reader's eyes.

A chain A <- B <- C <- D is built, a daemon is started on D, a guest works on it over NBD, and
meanwhile D is merged down to A (``block_stream virtio0 A``) and then copied to a new image
(``snapshot_blkdev``, ``block_stream``). In the end every byte is compared.

A program of its own: it starts the daemon as a user does and speaks QMP and NBD to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from qemu.qmp import EventListener, QMPClient

from liveblockd.demo import chain
from liveblockd.demo.guest import Guest, MismatchError, NbdClient
from liveblockd.demo.screen import Screen
from liveblockd.errors import BlockError

MIB = 1 << 20


class DemoError(Exception):
    """The demo did not end as it must."""


def listens(path: Path) -> bool:
    """Whether somebody lets clients in there: the file of a socket comes a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def start_daemon(directory: Path, screen: Screen) -> asyncio.subprocess.Process:
    """Start liveblockd on D with a monitor and an NBD export; return when it answers."""
    command = [
        "--drive", "id=virtio0,node-name=disk,file=D.qcow2,format=qcow2",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on",
        "--qmp", "qmp.sock",
    ]  # fmt: skip
    screen.say("$ liveblockd " + " ".join(command).replace(" --", " \\\n      --"))
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "liveblockd", *command, cwd=directory,
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    begin = time.monotonic()
    while not listens(directory / "qmp.sock"):
        if daemon.returncode is not None or time.monotonic() - begin > 20:
            raise DemoError("the daemon did not start")
        await asyncio.sleep(0.01)
    screen.say(f"ready after {time.monotonic() - begin:.2f} s")
    return daemon


async def run_job(
    qmp: QMPClient, guest: Guest, screen: Screen, title: str, arguments: dict[str, object]
) -> None:
    """Start ``block_stream`` and show its progress until the event that tells its end."""
    guest.new_phase()
    begin = time.monotonic()
    finished = EventListener(names=("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"))
    with qmp.listen(finished):
        await qmp.execute("block_stream", arguments)
        done = asyncio.ensure_future(finished.get())
        while not done.done():
            jobs = cast(list[dict[str, Any]], await qmp.execute("query-block-jobs"))
            if jobs:
                screen.progress(title, int(jobs[0]["offset"]), int(jobs[0]["len"]))
            guest.check()
            await asyncio.wait([done], timeout=0.1)
        data = cast(dict[str, Any], done.result()["data"])
    if "error" in data:
        raise DemoError(f"{title}: {data['error']}")
    screen.progress(title, data["offset"], data["len"])
    screen.end_progress(time.monotonic() - begin)
    screen.say(f"BLOCK_JOB_COMPLETED {data['device']}; the guest meanwhile: {guest.new_phase()}")


async def recipes(directory: Path, model: bytearray, seed: int, screen: Screen) -> None:
    """Both recipes under a guest, on a daemon that is started and stopped here."""
    daemon = await start_daemon(directory, screen)
    try:
        qmp = QMPClient("demo")
        await qmp.connect(str(directory / "qmp.sock"))
        client = await NbdClient.connect(str(directory / "nbd.sock"), "disk")
        guest = Guest(client, model, seed)
        guest.start()

        screen.title("Live merge: [A] <- [B] <- [C] <- [D] becomes [A] <- [D]")
        screen.say("(qmp) block_stream device=virtio0 base=A.qcow2 speed=48M")
        await run_job(
            qmp, guest, screen, "live merge",
            {"device": "virtio0", "base": "A.qcow2", "speed": 48 * MIB},
        )  # fmt: skip
        screen.chain(chain.describe(directory / "D.qcow2"))

        screen.title("Live copy: the disk moves to copy.qcow2, alone")
        screen.say("(qmp) snapshot_blkdev device=virtio0 snapshot-file=copy.qcow2 format=qcow2")
        await qmp.execute(
            "snapshot_blkdev",
            {"device": "virtio0", "snapshot-file": "copy.qcow2", "format": "qcow2"},
        )
        screen.chain(chain.describe(directory / "copy.qcow2"))
        screen.say("(qmp) block_stream device=virtio0")
        await run_job(qmp, guest, screen, "live copy", {"device": "virtio0"})
        screen.chain(chain.describe(directory / "copy.qcow2"))

        screen.title("Verification")
        await guest.stop()
        count = await guest.verify()
        screen.ok(f"{count} bytes read over NBD are what the guest wrote")
        await client.close()
        await qmp.execute("quit")
        with contextlib.suppress(Exception):
            await qmp.disconnect()
        if await asyncio.wait_for(daemon.wait(), 20):
            raise DemoError(f"the daemon ended with status {daemon.returncode}")
    finally:
        if daemon.returncode is None:
            daemon.kill()
            await daemon.wait()


async def verify_alone(directory: Path, model: bytearray, screen: Screen) -> None:
    """Compare the copy byte by byte with all other images moved away."""
    away = directory / "away"
    away.mkdir()
    for name in "ABCD":
        (directory / f"{name}.qcow2").rename(away / f"{name}.qcow2")
    count = await chain.compare(directory / "copy.qcow2", model)
    screen.ok(f"{count} bytes of copy.qcow2, opened alone, are what the guest wrote")
    verdict = await chain.check_with_qemu_img([directory / "copy.qcow2", away / "A.qcow2"])
    if verdict:
        screen.ok(verdict)
    else:
        screen.say("qemu-img is not installed: its check is left out")


async def run(directory: Path, size: int, seed: int) -> None:
    """The whole demo in ``directory``; raises DemoError, MismatchError or OSError."""
    screen = Screen()
    begin = time.monotonic()
    screen.title("A chain with data in every image")
    model = await chain.build(directory, size, random.Random(seed))
    for name in "ABCD":
        screen.say(f"{name}.qcow2  {(directory / f'{name}.qcow2').stat().st_size / MIB:7.1f} MiB")
    screen.chain(chain.describe(directory / "D.qcow2"))
    await recipes(directory, model, seed, screen)
    await verify_alone(directory, model, screen)
    screen.title(f"All is well: merged and copied under load in {time.monotonic() - begin:.1f} s")


def main() -> int:
    """Entry point of ``python -m liveblockd.demo``; the exit status tells whether all was well."""
    parser = argparse.ArgumentParser(prog="liveblockd.demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size-mib", type=int, default=192, help="virtual disk (default 192)")
    parser.add_argument("--seed", type=int, default=2011)
    parser.add_argument("--directory", type=Path, help="where the images are made, and stay")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if arguments.directory:
            directory: Path = arguments.directory
            directory.mkdir(parents=True)
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liveblockd-")))
        try:
            asyncio.run(run(directory.resolve(), arguments.size_mib * MIB, arguments.seed))
        except (DemoError, MismatchError, BlockError, OSError) as error:
            print(f"demo: FAILED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
