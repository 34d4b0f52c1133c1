"""block-commit and block-stream in long chains: the same requests to qemu-storage-daemon and to us.

The same answers, events and nodes, and images of the same content; what we refuse on purpose
(``liveblockd/jobs/README.md``) is not asked here.
"""

from tests.conformance.test_against_qsd import blockdev, compared, disk, export, look

__all__ = ["compared"]


def chain(*names, read_only=()):
    """Nodes of the images base <- mid <- top, and what stands on it, by name."""
    options = []
    below = None
    for name in names:
        more = () if below is None else (f"backing={below}",)
        options += blockdev(name, *more, *(("read-only=on",) if name in read_only else ()))
        below = name
    return options


def overlay(peer, node, name):
    peer.do("blockdev-snapshot-sync", node_name=node, snapshot_file=f"{name}.qcow2",
            snapshot_node_name=name)  # fmt: skip


def ended(peer, job_id):
    peer.until("JOB_STATUS_CHANGE", id=job_id, status="null")


def intermediate(peer):
    export(peer, "top")
    overlay(peer, "top", "act")
    peer.do("block-commit", device="act", job_id="a", top="top.qcow2", base="base.qcow2", speed=1)
    look(peer)
    peer.do("block-commit", device="act", job_id="b")
    peer.do("block-stream", device="mid", job_id="b")
    peer.do("block-stream", device="act", job_id="b")
    peer.do("blockdev-snapshot-sync", node_name="act", snapshot_file="x.qcow2",
            snapshot_node_name="x")  # fmt: skip
    peer.do("blockdev-del", node_name="mid")
    peer.do("blockdev-del", node_name="top")
    for name in ("mid", "top", "base"):
        peer.do("block-export-add", type="nbd", id=f"r-{name}", node_name=name)
    peer.do("block-export-add", type="nbd", id="w", node_name="base", name="w", writable=True)
    peer.do("block-job-complete", device="a")
    peer.do("block-job-set-speed", device="a", speed=0)
    ended(peer, "a")
    look(peer)
    peer.do("blockdev-del", node_name="top")
    peer.do("blockdev-del", node_name="mid")
    overlay(peer, "act", "new")
    peer.do("block-commit", device="new", job_id="c", top_node="act", backing_file="base.qcow2",
            filter_node_name="flt", auto_finalize=False, auto_dismiss=False)  # fmt: skip
    peer.until("JOB_STATUS_CHANGE", id="c", status="pending")
    look(peer)
    peer.do("job-finalize", id="c")
    peer.until("JOB_STATUS_CHANGE", id="c", status="concluded")
    look(peer)
    peer.do("blockdev-del", node_name="act")
    peer.do("job-dismiss", id="c")
    ended(peer, "c")


def test_intermediate(compared):
    compared(intermediate, *chain("base", "mid", "top"))


def test_intermediate_with_images_that_are_read_only(compared):
    compared(intermediate, *chain("base", "mid", "top", read_only=("base", "mid")))


def unnamed(peer):
    export(peer, "top")
    overlay(peer, "top", "act")
    peer.do("block-commit", device="act", job_id="a", top_node="top")
    ended(peer, "a")
    look(peer)


def test_images_that_nobody_named(compared):
    compared(unnamed, *blockdev("top"))


def active(peer):
    export(peer, "top")
    peer.do("block-commit", device="top", job_id="a", filter_node_name="mid")
    peer.do("block-commit", device="top", job_id="a", base_node="base", filter_node_name="flt")
    peer.until("BLOCK_JOB_READY", device="a")
    look(peer)
    peer.do("block-commit", device="top", job_id="b")
    peer.do("block-stream", device="mid", job_id="b")
    peer.do("blockdev-del", node_name="mid")
    peer.do("blockdev-del", node_name="flt")
    peer.do("block-export-add", type="nbd", id="r-mid", node_name="mid")
    peer.do("block-job-cancel", device="a")
    ended(peer, "a")
    look(peer)
    peer.do("block-commit", device="top", job_id="b", speed=1)
    peer.do("block-job-complete", device="b")
    peer.do("block-job-cancel", device="b")
    ended(peer, "b")
    peer.do("block-commit", device="top", job_id="c", base_node="mid")
    peer.until("BLOCK_JOB_READY", device="c")
    peer.do("block-job-cancel", device="c", force=True)
    ended(peer, "c")
    peer.do("block-commit", device="top", job_id="d", base_node="base")
    peer.until("BLOCK_JOB_READY", device="d")
    peer.do("block-job-complete", device="d")
    ended(peer, "d")
    peer.do("query-block-exports")
    look(peer)
    peer.do("blockdev-del", node_name="base")
    peer.do("blockdev-del", node_name="top")
    peer.do("blockdev-del", node_name="mid")
    overlay(peer, "base", "new")
    peer.do("block-commit", device="new", job_id="e", base="base.qcow2", auto_dismiss=False)
    peer.until("BLOCK_JOB_READY", device="e")
    peer.do("job-complete", id="e")
    peer.until("JOB_STATUS_CHANGE", id="e", status="concluded")
    look(peer)
    peer.do("job-dismiss", id="e")


def test_active(compared):
    compared(active, *chain("base", "mid", "top"))


def grown(peer):
    disk(peer.directory, "b.qcow2", "1 0 64k", size="1M")
    disk(peer.directory, "m.qcow2", "2 1M 512k", size="2M", backing="b.qcow2")
    disk(peer.directory, "t.qcow2", "3 3M 64k", size="4M", backing="m.qcow2")
    disk(peer.directory, "u.qcow2", "4 0 64k", size="3M", backing="t.qcow2")
    peer.do("blockdev-add", driver="qcow2", node_name="u",
            file={"driver": "file", "filename": "u.qcow2"})  # fmt: skip
    peer.do("block-commit", device="u", job_id="a", top="t.qcow2", base="m.qcow2")
    ended(peer, "a")
    peer.do("block-commit", device="u", job_id="b", base="b.qcow2")
    peer.until("BLOCK_JOB_READY", device="b")
    peer.do("job-complete", id="b")
    ended(peer, "b")


def test_a_base_that_is_smaller(compared):
    compared(grown)


def refused(peer):
    def commit(**arguments):
        peer.do("block-commit", **arguments)

    commit()
    commit(device="ghost", job_id="c")
    commit(device="top")
    commit(device="top", job_id="1")
    commit(device="top", job_id="c", top="mid.qcow2", top_node="mid")
    commit(device="top", job_id="c", base="base.qcow2", base_node="base")
    commit(device="top", job_id="c", top="nowhere")
    commit(device="top", job_id="c", top_node="ghost")
    commit(device="top", job_id="c", base="nowhere")
    commit(device="top", job_id="c", base="top.qcow2")
    commit(device="top", job_id="c", base_node="top")
    commit(device="top", job_id="c", top_node="base", base_node="mid")
    commit(device="top", job_id="c", top_node="base")
    commit(device="top", job_id="c", backing_file="x")
    commit(device="top", job_id="c", speed=-1)
    commit(device="top", job_id="c", top_node="mid", speed=-1)
    commit(device="top", job_id="c", top_node="mid", filter_node_name="top")
    commit(device="top", job_id="c", top_node="mid", filter_node_name="-")
    commit(device="top", job_id="", top_node="mid")
    commit(device="mid", job_id="c")
    commit(device="top", job_id="c", on_error="never")
    commit(device="top", job_id="c", bottom="x")
    look(peer)


def test_refusals(compared):
    compared(refused, *chain("base", "mid", "top"))


def together(peer):
    """A stream into the middle of a chain and a commit above it, at once."""
    below = None
    for number in range(6):
        name = f"i{number}"
        disk(peer.directory, f"{name}.qcow2", f"{number + 1} {number * 8}M 8M", size="48M",
             backing=below and f"{below}.qcow2")  # fmt: skip
        below = name
    below = None
    for name in (f"i{number}" for number in range(6)):
        peer.do("blockdev-add", driver="qcow2", node_name=name, backing=below,
                file={"driver": "file", "filename": f"{name}.qcow2"})  # fmt: skip
        below = name
    export(peer, "i5")
    peer.do("block-stream", device="i2", job_id="s", base_node="i0", speed=1)
    peer.do("block-commit", device="i5", job_id="c", top_node="i4", base_node="i3", speed=1)
    look(peer)
    peer.do("block-stream", device="i3", job_id="x", base_node="i2")
    peer.do("block-stream", device="i4", job_id="x", bottom="i4")
    peer.do("block-stream", device="i2", job_id="x")
    peer.do("block-commit", device="i5", job_id="x", top_node="i2", base_node="i0")
    peer.do("block-job-set-speed", device="c", speed=0)
    ended(peer, "c")
    look(peer)
    peer.do("block-commit", device="i5", job_id="x", top_node="i3", base_node="i2")
    peer.do("block-commit", device="i5", job_id="x")
    peer.do("block-job-set-speed", device="s", speed=0)
    ended(peer, "s")
    look(peer)
    peer.do("block-stream", device="i5", job_id="y", bottom="i3")
    ended(peer, "y")
    look(peer)


def test_a_stream_and_a_commit_in_one_chain(compared):
    compared(together)
