"""``replaces`` of mirrors: a child of a quorum is replaced where qemu-storage-daemon does it."""

from tests.conformance.test_against_qsd import run
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]


def options(*names):
    found = []
    for name in names:
        file = f"file.driver=file,file.filename={name}.qcow2"
        found += ["--blockdev", f"driver=qcow2,node-name={name},{file}"]
    return found


def mirror(both, **more):
    given = {"job_id": "m", "device": "q", "target": "t0", "sync": "full"}
    both.do("blockdev-mirror", **given | more)
    both.look()


def test_a_child_of_a_quorum(directories):
    """A bad copy is replaced by what most have: the guest goes on, with the new one among them."""
    for directory in directories:
        # One that has always been right, and one that is to go.
        (directory / "d1.qcow2").write_bytes((directory / "d0.qcow2").read_bytes())
    quorum = "driver=quorum,node-name=q,vote-threshold=1,children.0=d0,children.1=d1"
    export = {"type": "nbd", "id": "x", "node_name": "d0"}
    with InStep(*directories, *options("d0", "d1", "t0", "t1"), "--blockdev", quorum) as both:
        both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        both.do("block-export-add", type="nbd", id="g", node_name="q", writable=True)
        mirror(both, replaces="t1")
        mirror(both, device="d0", replaces="d0")
        both.do("block-export-add", **export)
        mirror(both, replaces="d0")  # somebody else reads it
        both.do("block-export-del", id="x")
        mirror(both, replaces="d0")
        both.do("block-export-del", id="g")
        both.do("job-complete", id="m")
        both.look()
        mirror(both, target="t1", replaces="d1")
        both.do("job-complete", id="m")
        both.look()
        for name in ("d0", "d1", "t0", "t1"):
            both.do("blockdev-del", node_name=name)
        both.do("blockdev-del", node_name="q")
        both.do("blockdev-del", node_name="t0")
        both.look()
    for directory in directories:
        for name in ("t0", "t1"):
            run(directory, "qemu-img", "compare", "-q", "d0.qcow2", f"{name}.qcow2")


def test_it_is_looked_at_again_in_the_end(directories):
    quorum = "driver=quorum,node-name=q,vote-threshold=1,children.0=d0,children.1=t1"
    with InStep(*directories, *options("d0", "t0", "t1"), "--blockdev", quorum) as both:
        both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        for peer in both.peers:
            peer.do("blockdev-mirror", job_id="m", device="q", target="t0", sync="full",
                    replaces="d0")  # fmt: skip
            peer.until("BLOCK_JOB_READY")
            peer.do("block-export-add", type="nbd", id="x", node_name="d0")
            peer.do("job-complete", id="m")
            peer.until("JOB_STATUS_CHANGE", status="null")
            (ended,) = (e["data"] for e in peer.log if e.get("event") == "BLOCK_JOB_COMPLETED")
            assert ended["error"]
        both.look()
