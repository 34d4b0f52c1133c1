"""blockdev-create with random options beside qemu-storage-daemon: same answers, same images.

A seed is a walk of ``STEPS`` creations in step; what differs is told with the walk up to it. Of
each image ``qemu-img info`` says the same, ``qemu-img check`` finds nothing in ours, and
the contents are equal. ``WALKS``, ``FIRST_WALK``: as in ``test_random_requests_qsd``.
"""

import json
import os
import random
import subprocess

import pytest

from tests.support.in_step import InStep, PartedWaysError, missing

STEPS = 10
FIRST = int(os.environ.get("FIRST_WALK", "1"))
MIB = 1 << 20
#: what info says of the moment and of the place, or what is the engine's own affair
LEFT_OUT = ("actual-size", "filename", "full-backing-filename", "dirty-flag")


@pytest.fixture
def directories(tmp_path, monkeypatch):
    if (name := missing()) is not None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M"]
        subprocess.run(create, cwd=tmp_path / name, check=True, timeout=60)
    return tmp_path / "theirs", tmp_path / "ours"


def given(members):
    return {k.replace("_", "-"): v for k, v in members.items() if v is not None}


SIZES = (0, MIB, MIB, 3 * MIB + 512, 512, 70_000 * 512, 64 * MIB, 1 << 40)
#: one of these at most: which of two mistakes is told first is no promise
WRONG_SIZES = (1000, 1 << 62, (1 << 63) + 512, -1, 1 << 57)
QCOW2 = {
    "version": ("v2", "v3"),
    "backing_file": ("base.qcow2", "base.qcow2", "ghost"),
    "backing_fmt": ("qcow2", "raw"),
    "cluster_size": (512, 4096, 16384, 65536, 1 << 20, 2 << 20),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "lazy_refcounts": (True, False),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "extended_l2": (True, False),
    "compression_type": ("zlib", "zstd"),
    "data_file": ("data", "data", "data", "ghost"),
    "data_file_raw": (True,),
}
WRONG_QCOW2 = {
    "size": WRONG_SIZES, "version": ("v4",), "backing_file": ("",),
    "backing_fmt": ("nosuch",), "cluster_size": (4 << 20, 1000, 0, 256, -1),
    "preallocation": ("x",),
    "refcount_bits": (7, 128, 0, -1), "compression_type": ("lz4",),
}  # fmt: skip
FILE = {
    "preallocation": ("off", "falloc", "full"),
    "nocow": (True, False),
    "extent_size_hint": (0, 4096, 1000),
}
WRONG_FILE = {
    "size": (1 << 62,), "preallocation": ("metadata", "x"), "extent_size_hint": (1 << 32, -1),
}  # fmt: skip


def drawn(rng, members, chance=0.25):
    """Some of the members."""
    return {k: rng.choice(v) for k, v in members.items() if rng.random() < chance}


def spoiled(rng, options, wrong, chance=0.3):
    """With one mistake, or none."""
    if rng.random() < chance:
        name = rng.choice(list(wrong))
        options[name] = rng.choice(wrong[name])
    return bounded(given(options))


def qcow2(rng, place):
    options = {"driver": "qcow2", "file": place, "size": rng.choice(SIZES), **drawn(rng, QCOW2)}
    if "data_file" in options:  # what else is wrong is found before or after it is opened
        for name in ("version", "backing_file", "backing_fmt", "extended_l2", "refcount_bits"):
            options.pop(name, None)
        return bounded(given(options))
    return spoiled(rng, options, WRONG_QCOW2)


def file(rng, name):
    options = {"driver": "file", "filename": name, "size": rng.choice(SIZES), **drawn(rng, FILE)}
    return spoiled(rng, options, WRONG_FILE)


def bounded(options):
    """Not so large that it takes long to write."""
    plain = options.get("preallocation") not in ("metadata", "falloc", "full")
    if options["size"] > 64 * MIB and (not plain or options.get("data-file-raw")):
        options["size"] = MIB
    return options


def described(directory, name, image_format):
    """What qemu-img says of an image; None if it cannot open it."""
    command = ["qemu-img", "info", "--output=json", "-f", image_format, name]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        return None

    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in LEFT_OUT}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads(done.stdout))


def compare_images(directories, name, image_format):
    theirs, ours = (described(d, name, image_format) for d in directories)
    assert ours == theirs, f"{name}:\n  theirs {theirs}\n  ours   {ours}"
    if ours is None or ours.get("backing-filename") == "ghost":
        return
    if image_format == "qcow2":
        command = ["qemu-img", "check", "-f", "qcow2", name]
        done = subprocess.run(
            command, cwd=directories[1], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout
    if ours["virtual-size"] <= 64 * MIB:
        theirs, ours = (contents(d, name, image_format) for d in directories)
        assert theirs == ours, name


def contents(directory, name, image_format):
    """Names of data files are of where qemu-img runs."""
    command = ["qemu-img", "convert", "-f", image_format, "-O", "raw", name, "contents"]
    subprocess.run(command, cwd=directory, check=True, timeout=60)
    return (directory / "contents").read_bytes()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("WALKS", "2"))))
def test_walk(seed, directories):
    rng = random.Random(seed)
    with InStep(*directories) as both:
        for number in range(STEPS):
            name = f"i{number}.img"
            step(both, rng, name, directories)


def step(both, rng, name, directories):
    driver = rng.choice(("file", "qcow2", "qcow2", "qcow2"))
    if driver == "file":
        options = file(rng, name)
    else:
        for other in (name, f"{name}.data"):
            both.do("blockdev-create", job_id="file",
                    options={"driver": "file", "filename": other, "size": 0})  # fmt: skip
            both.do("job-dismiss", id="file")
        both.do("blockdev-add", driver="file", node_name="f", filename=name)
        both.do("blockdev-add", driver="file", node_name="data", filename=f"{name}.data")
        place = rng.choice(("f", "f", "f", "ghost", {"driver": "file", "filename": name}))
        if place != "f" and place != "ghost":
            both.do("blockdev-del", node_name="f")
        options = qcow2(rng, place)
    try:
        both.do("blockdev-create", job_id="c", options=options)
        both.look()
    except PartedWaysError:
        return
    failed = [job.get("error") for job in both.ask("query-jobs") if job["id"] == "c"]
    both.do("job-dismiss", id="c")
    for node in ("f", "data"):
        both.do("blockdev-del", node_name=node)
    if failed == [None]:
        compare_images(directories, name, {"file": "raw"}.get(driver, driver))
