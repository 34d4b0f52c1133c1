#!/usr/bin/env python3
"""Live copy with QMPClient of the Python package qemu.qmp.

Usage: live_copy.py SOCKET DEVICE NEW-IMAGE
"""

import asyncio
import os
import sys

from live_merge import stream
from qemu.qmp import ExecuteError, QMPClient


async def main(socket: str, device: str, image: str) -> None:
    qmp = QMPClient("live-copy")
    await qmp.connect(socket)
    try:
        overlay = {"device": device, "snapshot-file": image, "format": "qcow2"}
        await qmp.execute("blockdev-snapshot-sync", overlay)
        await stream(qmp, device)
        print(f"{device}: lives in {image} now")
    finally:
        await qmp.disconnect()


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], os.path.abspath(sys.argv[3])))
    except (ExecuteError, RuntimeError) as exc:
        sys.exit(f"live_copy: {exc}")
