"""Limits of drives: their guests wait, jobs and other disks do not, nobody hangs when they end."""

import json
import shutil
import socket
import struct
import subprocess
import time

import pytest

from tests.support.daemon import DaemonProcess, QmpError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is missing")
MIB = 1 << 20
NONE = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
#: bytes a second at which the second MiB of a guest waits for a quarter of an hour
SLOW = 1000


def limit(client, device, **limits):
    """block_set_io_throttle, whose members have underscores."""
    arguments = {"device": device, **NONE, **limits}
    request = {"execute": "block_set_io_throttle", "arguments": arguments}
    client.socket.sendall(json.dumps(request).encode())
    while "event" in (answer := client.receive()):
        client.events.append(answer)
    assert answer == {"return": {}}


class Guest:
    """An NBD client that asks, and looks for the answer later."""

    def __init__(self, directory, export):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(directory / "nbd.sock"))
        self._stream = self._socket.makefile("rwb")
        assert self._stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        self._say(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(export)) + export.encode())
        self._stream.read(10)

    def _say(self, data):
        self._stream.write(data)
        self._stream.flush()

    def write(self, offset, data, handle=7):
        self._say(struct.pack(">IHHQQI", 0x25609513, 0, 1, handle, offset, len(data)) + data)

    def read(self, offset, length):
        self._say(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, offset, length))

    def answer(self, length=0):
        """The bytes that were read, when the request has ended well."""
        assert struct.unpack(">IIQ", self._stream.read(16)) == (0x67446698, 0, 7)
        return self._stream.read(length)

    def answers(self, length):
        """Of a read, and of a write with the handle 8, in any order."""
        for _ in range(2):
            magic, error, handle = struct.unpack(">IIQ", self._stream.read(16))
            assert (magic, error) == (0x67446698, 0)
            if handle == 7:
                self._stream.read(length)

    def waits(self):
        """Whether there is no answer for a fifth of a second."""
        self._socket.settimeout(0.2)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(60)

    def close(self):
        self._stream.close()
        self._socket.close()


@pytest.fixture
def started(tmp_path):
    """A daemon with the drives ``a`` and ``b``, each with an export of its name."""

    def start(*limits):
        options = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
        for name, more in zip("ab", (*limits, "", ""), strict=False):
            create = ("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.img", "8M")
            subprocess.run(create, cwd=tmp_path, check=True, timeout=60)
            options += [
                "--drive",
                f"id={name},file={name}.img,node-name={name}1,format=qcow2{more}",
            ]
            export = f"type=nbd,id=e{name},node-name={name}1,name={name},writable=on"
            options += ["--export", export]
        return DaemonProcess(tmp_path, *options)

    return start


def test_a_guest_waits_until_the_limits_are_lifted(started, tmp_path):
    with started(f",throttling.bps-total={SLOW}") as daemon:
        client = daemon.qmp()
        slow, free = Guest(tmp_path, "a"), Guest(tmp_path, "b")
        slow.write(0, b"a" * MIB)
        slow.answer()
        slow.read(0, MIB)
        assert slow.waits()
        for number in range(4):
            free.write(number * MIB, b"b" * MIB)
            free.answer()
        (drive, other) = client("query-block")
        assert (drive["inserted"]["bps"], drive["inserted"]["group"]) == (SLOW, "a")
        assert other["inserted"]["bps"] == 0 and "group" not in other["inserted"]
        limit(client, "a")
        assert slow.answer(MIB) == b"a" * MIB
        for _ in range(20):
            slow.read(0, MIB)
            slow.answer(MIB)
        limit(client, "b", iops=1)
        free.read(0, 1)
        free.answer(1)
        free.read(0, 1)
        assert free.waits()


def test_limits_follow_the_disk_and_jobs_have_none(started, tmp_path):
    with started() as daemon:
        client = daemon.qmp()
        guest = Guest(tmp_path, "a")
        guest.write(0, b"x" * 4 * MIB)
        guest.answer()
        limit(client, "a", bps_wr=SLOW)
        client("blockdev-snapshot-sync", device="a", snapshot_file="over.img", format="qcow2")
        guest.write(0, b"y" * MIB)
        guest.answer()
        guest.write(MIB, b"z" * MIB)
        assert guest.waits()
        client("block-stream", job_id="j", device="a")
        client.wait("BLOCK_JOB_COMPLETED", device="j")
        client("drive-mirror", job_id="m", device="a",
               target="copy.img", sync="full", format="qcow2")  # fmt: skip
        client.wait("BLOCK_JOB_READY", device="m")
        client("job-complete", id="m")
        client.wait("BLOCK_JOB_COMPLETED", device="m")
        assert guest.waits()
        limit(client, "a")
        guest.answer()
        guest.read(0, 4 * MIB)
        assert guest.answer(4 * MIB) == b"y" * MIB + b"z" * MIB + b"x" * 2 * MIB


def test_a_group_of_drives_and_an_object(started, tmp_path):
    with started(",iops=1,throttling.group=g", ",iops=1,throttling.group=g") as daemon:
        client = daemon.qmp()
        one, other = Guest(tmp_path, "a"), Guest(tmp_path, "b")
        one.read(0, 1)
        one.answer(1)
        other.read(0, 1)
        assert other.waits()
        limits = {"iops-total": 1000}
        client("object-add", qom_type="throttle-group", id="o", limits=limits)
        limit(client, "a", bps=SLOW, group="o")
        with pytest.raises(QmpError, match="active references"):
            client("object-del", id="o")
        limit(client, "a")
        client("object-del", id="o")
        limit(client, "b")
        other.answer(1)


@pytest.mark.parametrize("how", ["block-export-del", "nbd-server-stop", "drive_del", "quit"])
def test_what_ends_does_not_wait_for_the_limits(started, tmp_path, how):
    with started(f",bps={SLOW}") as daemon:
        client = daemon.qmp()
        guest = Guest(tmp_path, "a")
        for number in range(3):
            guest.write(number * MIB, b"w" * MIB)
        guest.answer()
        assert guest.waits()
        begun = time.monotonic()
        if how == "drive_del":
            client("human-monitor-command", command_line="drive_del a")
            guest.answer()
            guest.answer()
        else:
            client(how, **({"id": "ea", "mode": "hard"} if how == "block-export-del" else {}))
        if how == "quit":
            daemon.wait()
        elif how != "drive_del":
            client.wait("BLOCK_EXPORT_DELETED", id="ea")
        assert time.monotonic() - begun < 20
        guest.close()


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
@pytest.mark.parametrize("held", ["drive", "node", "breakpoint"])
def test_a_line_of_qemu_io_does_not_hold_up_the_end(tmp_path, held, how):
    """It waits on the monitor, which no other command can be given meanwhile."""
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))
    options = (
        "--object", f"throttle-group,id=g,limits.bps-total={SLOW}",
        "--drive", f"id=a,format=raw,file=null-co://,bps={SLOW}",
        "--blockdev", "driver=null-co,node-name=n,size=4194304",
        "--blockdev", "driver=throttle,node-name=t,throttle-group=g,file=n",
        "--blockdev", "driver=raw,node-name=b,file.driver=blkdebug,file.image.driver=file,"
        "file.node-name=d,file.image.filename=disk.raw",
    )  # fmt: skip
    disk = {"drive": "a", "node": "t", "breakpoint": "b"}[held]
    with DaemonProcess(tmp_path, *options) as daemon:
        client, other = daemon.qmp(), daemon.qmp()
        if held == "breakpoint":
            client("human-monitor-command", command_line='qemu-io d "break write_aio A"')
        else:
            client("human-monitor-command", command_line=f'qemu-io {disk} "write 0 1M"')
        line = {"command-line": f'qemu-io {disk} "write 1M 1M"'}
        request = {"execute": "human-monitor-command", "arguments": line}
        client.socket.sendall(json.dumps(request).encode())
        time.sleep(0.3)
        begun = time.monotonic()
        if how == "quit":
            other("quit")
        else:
            daemon.process.terminate()
        assert daemon.wait() == 0
        assert time.monotonic() - begun < 20
    if held == "breakpoint":
        assert (tmp_path / "disk.raw").read_bytes()[MIB : 2 * MIB] == b"\xcd" * MIB


def hmp(client, line):
    return client("human-monitor-command", command_line=line)


def later(client, line):
    """A line whose answer is read later."""
    request = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
    client.socket.sendall(json.dumps(request).encode())


def answer(client):
    while "event" in (found := client.receive()):
        client.events.append(found)
    return found["return"]


@pytest.fixture
def slow(tmp_path):
    """``t`` has used up what its limit allows; requests to ``b`` can be stopped."""
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", tmp_path / "disk.qcow2", "1M"], check=True
    )
    with DaemonProcess(
        tmp_path,
        "--object", f"throttle-group,id=g,limits.bps-total={SLOW}",
        "--blockdev", "driver=file,node-name=n,filename=disk.qcow2",
        "--blockdev", "driver=throttle,node-name=t,throttle-group=g,file=n",
        "--blockdev", "driver=raw,node-name=b,file.driver=blkdebug,file.node-name=d,"
        "file.image.driver=file,file.image.filename=disk.raw",
        "--chardev", "socket,id=q,path=qmp.sock,server=on,wait=off", "--monitor", "q",
        "--chardev", "socket,id=h,path=hmp.sock,server=on,wait=off", "--monitor", "h,mode=readline",
    ) as daemon:  # fmt: skip
        hmp(daemon.qmp(), 'qemu-io t "read 0 64k"')
        yield daemon


def test_others_have_their_turn_while_a_line_of_qemu_io_waits(slow):
    """They stop and start requests, lift limits, and change the graph."""
    client, other = slow.qmp(), slow.qmp()
    hmp(other, 'qemu-io d "break write_aio A"')
    later(client, 'qemu-io b "write -P 9 1M 1M"')
    assert hmp(other, 'qemu-io d "wait_break A"') == ""
    other("blockdev-add", driver="null-co", node_name="new")
    other("blockdev-del", node_name="new")
    hmp(other, 'qemu-io d "resume A"')
    assert answer(client) == ""
    assert (slow.directory / "disk.raw").read_bytes()[MIB : 2 * MIB] == b"\x09" * MIB

    later(client, 'qemu-io t "read 0 64k"')
    other("blockdev-add", driver="null-co", node_name="new")
    other("qom-set", path="/objects/g", property="limits", value={"bps-total": 0})
    assert answer(client) == ""
    later(client, 'qemu-io b "sleep 60000"')
    other("blockdev-del", node_name="new")
    later(slow.qmp(), 'qemu-io d "wait_break nobody"')
    other("quit")
    assert answer(client) == ""
    assert slow.wait() == 0


def test_a_quit_on_the_human_monitor_waits_for_no_limit(slow):
    """Here a command waits for it, and has the turn; ``quit x`` is none."""
    client = slow.qmp()
    opening = {"execute": "blockdev-add", "arguments": {
        "driver": "qcow2", "node-name": "q", "file": "t"}}  # fmt: skip
    client.socket.sendall(json.dumps(opening).encode())
    with socket.socket(socket.AF_UNIX) as human:
        human.settimeout(60)
        human.connect(str(slow.directory / "hmp.sock"))
        human.sendall(b"quit x\n")
        time.sleep(0.2)
        client.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.socket.recv(1, socket.MSG_PEEK)
        human.sendall(b"quit\n")
        assert slow.wait() == 0


def test_what_a_guest_reads_is_copied(started, tmp_path):
    """With copy-on-read the disk is whole in the end, whatever the guest writes meanwhile."""
    for command in (
        ("qemu-img", "create", "-q", "-f", "qcow2", "base.img", "8M"),
        ("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 8M", "base.img"),
        ("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", "c.img"),
    ):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    with started() as daemon:
        client = daemon.qmp()
        added = "drive_add 0 id=c,file=c.img,node-name=c1,format=qcow2,copy-on-read=on"
        assert client("human-monitor-command", command_line=added) == "OK\r\n"
        client("block-export-add", id="ec", type="nbd", node_name="c1", name="c", writable=True)
        guest = Guest(tmp_path, "c")
        guest.write(MIB + 5, b"w" * 100_000)
        guest.answer()
        for offset in range(0, 8 * MIB, MIB // 2):
            guest.read(offset, MIB // 2)
            guest.write(offset + 100, b"w", 8)  # in flight with the read
            guest.answers(MIB // 2)
        client("human-monitor-command", command_line="drive_del c")
        guest.close()
        client("block-export-del", id="ec", mode="hard")
    (tmp_path / "base.img").unlink()
    unsafe = ("qemu-img", "rebase", "-u", "-b", "", "c.img")
    subprocess.run(unsafe, cwd=tmp_path, check=True, timeout=60)
    convert = ("qemu-img", "convert", "-O", "raw", "c.img", "c.raw")
    subprocess.run(convert, cwd=tmp_path, check=True, timeout=60)
    expected = bytearray(b"\5" * 8 * MIB)
    expected[MIB + 5 : MIB + 100_005] = b"w" * 100_000
    for offset in range(0, 8 * MIB, MIB // 2):
        expected[offset + 100] = ord("w")
    assert (tmp_path / "c.raw").read_bytes() == expected
