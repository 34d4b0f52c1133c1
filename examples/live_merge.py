#!/usr/bin/env python3
"""Live merge with QMPClient of the Python package qemu.qmp.

Usage: live_merge.py SOCKET DEVICE [BASE]
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def stream(qmp: QMPClient, device: str, base: str | None = None) -> None:
    """Stream into ``device`` and wait for the end; RuntimeError when it fails or is cancelled."""
    arguments = {"job-id": device, "device": device}
    if base is not None:
        arguments["base"] = base
    # Listen before the command: a short job may be over when its return arrives.
    with qmp.listener(("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")) as ends:
        await qmp.execute("block-stream", arguments)
        while True:
            try:
                event = await asyncio.wait_for(ends.get(), timeout=1)
            except TimeoutError:
                for job in await qmp.execute("query-block-jobs"):
                    print(f"{job['device']}: {job['offset']} of {job['len']} bytes", flush=True)
                continue
            if event["data"]["device"] == device:
                break
    if event["event"] == "BLOCK_JOB_CANCELLED":
        raise RuntimeError("the job was cancelled")
    if "error" in event["data"]:
        raise RuntimeError(event["data"]["error"])


async def main() -> None:
    socket, device, *base = sys.argv[1:]
    qmp = QMPClient("live-merge")
    await qmp.connect(socket)
    try:
        await stream(qmp, device, *base)
        print(f"{device}: done")
    finally:
        await qmp.disconnect()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (ExecuteError, RuntimeError) as exc:
        sys.exit(f"live_merge: {exc}")
