"""Dirty bitmaps in step with qemu-storage-daemon: bits, what is refused, what a crash leaves.

The bits are compared by their digest after every change, in steps of all granularities.
"""

from tests.conformance.test_against_qsd import act, left_behind, run, same
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]

KIB, MIB = 1 << 10, 1 << 20
DISKS = ("d0", "d1", "t0")


def options():
    found = []
    for name in DISKS:
        file = f"file.driver=file,file.filename={name}.qcow2"
        found += ["--blockdev", f"driver=qcow2,node-name={name},{file}"]
    return found


def bitmap(both, verb, name, node="d0", **more):
    both.do(f"block-dirty-bitmap-{verb}", node=node, name=name, **more)


def digest(both, name, node="d0"):
    both.do("x-debug-block-dirty-bitmap-sha256", node=node, name=name)


def guests(both, found, **commands):
    both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    for node, writes in commands.items():
        both.do("block-export-add", type="nbd", id=node, node_name=node, name=node, writable=True)
        args = [part for write in writes for part in ("-c", write)]
        for directory in found:
            run(directory, "qemu-io", "-f", "raw", *args, f"nbd+unix:///{node}?socket=nbd.sock")
    both.do("nbd-server-stop")
    both.look()


def test_merges_across_granularities_and_nodes(directories):
    sizes = (512, 4 * KIB, 64 * KIB, MIB)
    with InStep(*directories, *options()) as both:
        for size in (*sizes, 1 << 31):
            bitmap(both, "add", f"g{size}", granularity=size)
            bitmap(both, "add", f"g{size}", "d1", granularity=size, persistent=size < 4 * MIB)
        guests(
            both, directories,
            d0=("write 0 512", "write 1000k 3k", "write 2047k 1k", "write -z 300k 5k",
                "discard 400k 64k"),
            d1=("write 700k 8k", "write -z -u 0 64k"),
        )  # fmt: skip
        for into in sizes:
            for size in sizes:
                source = {"node": "d0", "name": f"g{size}"}
                both.do("block-dirty-bitmap-merge", node="d1", target=f"g{into}", bitmaps=[source])
                digest(both, f"g{into}", "d1")
        bitmap(both, "add", "m", granularity=4 * KIB, disabled=True)
        for sources in (["g512", "ghost"], ["g512", {"node": "d1", "name": f"g{MIB}"}], ["m"]):
            both.do("block-dirty-bitmap-merge", node="d0", target="m", bitmaps=sources)
            digest(both, "m")
        both.do("transaction", actions=[
            act("block-dirty-bitmap-clear", node="d0", name="m"),
            act("block-dirty-bitmap-merge", node="d0", target="m", bitmaps=["g4096"]),
            act("abort"),
        ])  # fmt: skip
        digest(both, "m")
        both.look()


def test_on_disks_that_change_their_size(directories):
    with InStep(*directories, *options()) as both:
        bitmap(both, "add", "p", persistent=True)
        bitmap(both, "add", "v", granularity=512)
        bitmap(both, "add", "off", granularity=512, persistent=True, disabled=True)
        guests(both, directories, d0=("write 0 100k", "write 1900k 100k"))
        for size in (2 * MIB + 512, MIB - 512, 700 * KIB + 512, 5 * MIB, 1900 * KIB, 3 * MIB):
            both.do("block_resize", node_name="d0", size=size)
            both.look()
            for name in ("p", "v", "off"):
                digest(both, name)


def test_what_a_crash_leaves(directories):
    """Bitmaps that were in use are told as inconsistent, and can be removed, and nothing else."""
    with InStep(*directories, *options()) as both:
        for name, more in (("p", {}), ("off", {"disabled": True})):
            bitmap(both, "add", name, persistent=True, **more)
        guests(both, directories, d0=("write 0 100k", "write 1900k 100k"))
    with InStep(*directories, *options()) as both:
        both.look()
        digest(both, "p")
        guests(both, directories, d0=("write 500k 10k",))
        bitmap(both, "add", "late", persistent=True)
        for peer in both.peers:
            peer.kill()
    for directory in directories:
        (directory / "qmp.sock").unlink()
    with InStep(*directories, *options()) as both:
        both.look()
        bitmap(both, "add", "fresh")
        server = {"type": "unix", "data": {"path": "nbd.sock"}}
        both.do("nbd-server-start", addr=server)
        for name in ("p", "off"):
            both.do("block-export-add", type="nbd", id="x", node_name="d0", bitmaps=[name])
            for sync, mode in (("incremental", None), ("bitmap", "never"), ("full", "always")):
                more = {} if mode is None else {"bitmap_mode": mode}
                both.do("blockdev-backup", job_id="b", device="d0", target="t0", sync=sync,
                        bitmap=name, **more)  # fmt: skip
            for verb in ("clear", "enable", "disable"):
                bitmap(both, verb, name)
            for target, source in (("fresh", name), (name, "fresh")):
                both.do("block-dirty-bitmap-merge", node="d0", target=target, bitmaps=[source])
        both.do("block_resize", node_name="d0", size=3 * MIB)
        both.do("transaction", actions=[
            act("block-dirty-bitmap-remove", node="d0", name="p"),
            act("block-dirty-bitmap-add", node="d0", name="p", persistent=True),
        ])  # fmt: skip
        both.look()
        for name in ("off", "late", "p"):
            bitmap(both, "remove", name)
        bitmap(both, "add", "p", persistent=True)
        both.do("block_resize", node_name="d0", size=3 * MIB)
        both.look()
    same(*map(left_behind, directories))
