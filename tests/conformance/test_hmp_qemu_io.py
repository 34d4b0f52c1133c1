"""``qemu-io`` of the human monitor beside the program, line by line, on twins of an image."""

import random
import re
import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

QEMU_IO = shutil.which("qemu-io")
SIZE = 8 << 20
pytestmark = pytest.mark.skipif(QEMU_IO is None, reason="qemu-io is not installed")

FIXED = [
    "write -P 0xab 0 64k", "read -P 0xab 0 64k", "read -P 0xac 0 64k", "read -v 0 37",
    "readv 0 4k 4k", "writev -P 3 0 4k 4k", "map", "alloc 0 1M",
    "read 7M 2M", "write 7M 2M", "readv 7M 2M",
    "write -z 0 64k", "write -z -u 64k 64k", "write -c -P 9 128k 64k", "discard 0 128k",
    "discard 7M 2M", "aio_read -P 3 0 64k",
    "aio_write -P 7 0 64k", "aio_flush", "flush",
    "length", "alloc 0", "alloc 7M 2M", "alloc 9M 1M", "info",
    "truncate 16M", "length", "foo", "read", "read a b", "read -q 0 64k", "read -C 0 64k",
    "write -P 300 0 512", "read 0 1x", "read 0 3G", "writev 0 3G", "discard 0 3G", "write 0 0",
    "read 0 0", "write -z -P 3 0 512", "write -b -z 0 512", "write -n 0 512", "write -u 0 512",
    "write -f -c 0 64k", "write -c 1 64k", "write -c 0 512", "aio_write -z 0 1k 1k",
    "aio_write -u 0 1k", "read -P 0 -s 512 -l 1k 0 1k", "read -P 9 -s 512 0 1k", "read -P",
    "resume x", "remove_break x", "break a b", "read 99999999999999999999 1", "read 1.5k 512",
    "read 0x200 0x200", "length 5", "alloc", "reopen -r -w", "sleep x", "help foo",
    "write -s /nonexistent/file 0 512", "read -s 0 0 512", "w -P 5 3 700", "r -v 0 20",
    "truncate -m foo 17M", "write -f -P 1 1M 1M", "write 0 64k -P 77", "read -vP 77 0 64",
    "read -a 0 512", "aio_read -i 0 512", "aio_write -i 0 512", "write -P 077 0 512",
    "read -P 63 0 512", "alloc -5 512", "sleep -1", "read 1.5 512", "read +5 5", "read 1.0 5",
    "write -z 0 3G", "write 0 3G", "write -z -n 0 3G", "aio_read -Cv 0 16",
    "truncate -m metadata 17M", "truncate -m falloc 18M", "truncate -m full 19M", "alloc 16M 3M",
    "read -P 0 16M 3M", "truncate -m full 1M", "truncate -m metadata 1M", "truncate -m nope 1M",
    "truncate -m nope x", "truncate -m off 20M", "truncate -m", "truncate -m full 20M", "length",
    "reopen", "reopen x", "reopen -x", "reopen -c", "reopen -c foo", "reopen -c writeback",
    "reopen -r -o read-only=off", "reopen -c none -o cache.direct=off", "reopen -o foo=bar",
    "reopen -o lazy-refcounts=on", "reopen -o l2-cache-size=1M,overlap-check=all",
    "reopen -o driver=raw", "reopen -o file.filename=b", "reopen -o discard=unmap",
    "reopen -o detect-zeroes=unmap,discard=unmap", "reopen -o backing=x",
    "reopen -o node-name=zz",
    "reopen -o force-share=on", "reopen -c foo -r -w",
    "reopen -o detect-zeroes=unmap,discard=ignore", "reopen -o lazy-refcounts=maybe",
    *(f"write -q -P {32 + 6 * n} {n} 1" for n in range(17)), "read -v 0 17",
]  # fmt: skip


def masked(text: str) -> list[str]:
    """Without times and rates, and without the words of the usage that follows a wrong option."""
    text = re.sub(
        r"(00\.\d\d sec|\d+:\d\d:\d\d\.\d\d) \(.*?/sec and [\d.]+ ops/sec\)", "TIME", text
    )
    text = re.sub(r"^(\d+,\d+),.*$", r"\1,TIME", text, flags=re.MULTILINE)
    return [line.split(" -- ")[0].split("[")[0].rstrip() for line in text.splitlines()]


def program(path, lines):
    """What qemu-io prints of each line; each line is a run of its own."""
    answers = []
    for line in lines:
        run = subprocess.run(
            [QEMU_IO, "-f", "qcow2", "-d", "unmap", "-c", line, str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        )  # fmt: skip
        answers.append(run.stdout)
    return answers


def monitor(directory, lines):
    """What the daemon prints of each line."""
    options = ("--drive", "id=d0,node-name=n0,file=ours.qcow2,format=qcow2,discard=unmap")
    with DaemonProcess(directory, *options) as daemon:
        client = daemon.qmp()
        for number, line in enumerate(lines):
            for command in (line, "aio_flush", f"mark{number}"):
                name = random.Random(number).choice(("d0", "n0"))
                answer = client("human-monitor-command", command_line=f'qemu-io {name} "{command}"')
                assert answer == ""
        client("quit")
        daemon.wait()
        output = daemon.output.decode()
    answers = []
    for number in range(len(lines)):
        answer, output = output.split(f'command "mark{number}" not found\n')
        answers.append(answer)
    return answers


@pytest.fixture
def twins(tmp_path):
    for name in ("ours", "theirs"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / f"{name}.qcow2"), str(SIZE)],
            check=True,
        )
    return tmp_path


def compare(twins, lines):
    ours = monitor(twins, lines)
    theirs = program(twins / "theirs.qcow2", lines)
    pairs = zip(lines, ours, theirs, strict=True)
    assert not [pair for pair in pairs if masked(pair[1]) != masked(pair[2])]
    for name in ("ours", "theirs"):
        subprocess.run(["qemu-img", "check", "-q", str(twins / f"{name}.qcow2")], check=True)
    same = ["qemu-img", "compare", str(twins / "ours.qcow2"), str(twins / "theirs.qcow2")]
    subprocess.run(same, check=True, stdout=subprocess.DEVNULL)


def test_lines_that_scripts_use(twins):
    """aio lines end before the next begins, so the order of the output is that of the lines."""
    compare(twins, FIXED)


def drawn(rng):
    """No map: what zeros leave allocated is the business of each engine."""
    offset = rng.choice((0, rng.randrange(SIZE), rng.randrange(SIZE // 65536) * 65536))
    length = rng.choice((512, 4096, 65536, rng.randrange(1, 300_000)))
    pattern = rng.randrange(256)
    quiet = rng.choice(("", "-q ", "-C "))
    return rng.choice((
        f"write {quiet}-P {pattern} {offset} {length}", f"write {quiet}-z {offset} {length}",
        f"write -z -u {offset} {length}", f"read {quiet}-P {pattern} {offset} {length}",
        f"writev {quiet}-P {pattern} {offset} {length} 1k", f"readv -v {offset} 40 9",
        f"aio_write -P {pattern} {offset} {length}", f"aio_read {offset} {length}",
        "flush", "length",
    ))  # fmt: skip


def test_random_lines(twins):
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201
    rng = random.Random(seed)
    compare(twins, [drawn(rng) for _ in range(40)])


def test_what_stands_against_a_line_is_the_answer(twins):
    options = ("--blockdev", "driver=file,node-name=f,filename=ours.qcow2",
               "--blockdev", "driver=qcow2,node-name=n,file=f,read-only=on")  # fmt: skip
    with DaemonProcess(twins, *options) as daemon:
        client = daemon.qmp()

        def say(line):
            return client("human-monitor-command", command_line=line)

        assert say('qemu-io n "write 0 512"') == "Block node is read-only\r\n"
        assert say('qemu-io nope "length"') == (
            "Error: Cannot find device='' nor node-name='nope'\r\n"
        )
        assert say('qemu-io -d n "length"') == "Error: Device 'n' not found\r\n"
        assert say("qemu-io n").startswith("qemu-io: string expected\r\nTry")
        assert say('qemu-io n ""') == ""
        assert say('qemu-io n "read 0 512"') == ""
        client("blockdev-del", node_name="n")  # nothing of it is left behind
