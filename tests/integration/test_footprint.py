"""What the plain daemon costs: time to start, resident memory, and the modules that it loads."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liveblockd.formats.qcow2.newimage import NewImage, lay_out
from tests.support.daemon import TIMEOUT, DaemonProcess

ROOT = Path(__file__).resolve().parents[2]

#: the daemon, leaving behind the names of the modules it has at its end
RECORDED = """
import atexit, sys
atexit.register(lambda: open("modules", "w").write(" ".join(sys.modules)))
from liveblockd.__main__ import main
sys.exit(main())
"""
#: large, or slow to load, and of no use to a daemon that nobody asked for them
LATER = {
    "argparse",
    "email",
    "liveblockd.config",
    "liveblockd.ctl",
    "liveblockd.qmp.hmp.readline",
    "liveblockd.qmp.hmp.table",
    "liveblockd.qmp.introspection",
    "numpy.fft",
    "numpy.ma",
    "numpy.random",
    "pydantic.plugin._loader",
    "tomllib",
    "unittest",
}


@pytest.fixture
def disk(tmp_path):
    layout = lay_out(NewImage(size=64 << 20))
    with open(tmp_path / "disk.qcow2", "wb") as file:
        for write in layout.tables:
            file.seek(write.offset)
            file.write(write.data)
        file.seek(0)
        file.write(layout.header)
    return tmp_path


def test_modules_that_are_loaded_only_when_they_are_wanted(disk):
    command = [sys.executable, "-c", RECORDED, "--drive", "id=virtio0,file=disk.qcow2",
               "--qmp", "q.sock"]  # fmt: skip
    process = subprocess.Popen(command, cwd=disk, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (disk / "q.sock").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(TIMEOUT)
    loaded = set((disk / "modules").read_text().split())
    assert {"liveblockd.formats.qcow2.image", "liveblockd.qmp.commands.protocol"} <= loaded
    assert loaded & LATER == set()


def processor_time():
    """Seconds that ended children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_memory_and_processor_time_of_the_start(disk):
    """The start is beside what it imports of others, so that the machine's speed does not count."""
    began = processor_time()
    subprocess.run(
        [sys.executable, "-c", "import numpy, pydantic.main, uvloop, ssl, qemu.qmp"],
        check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    others = processor_time() - began
    with DaemonProcess(disk, "--drive", "id=virtio0,file=disk.qcow2", cold=True) as daemon:
        daemon.qmp()("query-block")
        assert daemon.memory() < 60 << 20
        fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # user and system
        # twice as much with compiled modules, three times without
        assert ticks / os.sysconf("SC_CLK_TCK") < 5 * others
