"""Jobs in chains with filters, and errors that a client wants ignored: as qemu-storage-daemon does.

The graph is base <- t-base (throttle) <- mid <- t-mid (throttle) <- cor-mid (copy-on-read) <- top
<- cor (copy-on-read).
"""

import pytest

from tests.conformance.test_against_qsd import disk
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]

BACKING = {"mid": "t-base", "top": "cor-mid"}
FILTERS = {
    "base": ["driver=throttle,node-name=t-base,throttle-group=g,file=base"],
    "mid": ["driver=throttle,node-name=t-mid,throttle-group=g,file=mid",
            "driver=copy-on-read,node-name=cor-mid,file=t-mid"],
    "top": ["driver=copy-on-read,node-name=cor,file=top"],
}  # fmt: skip


def options():
    found = ["--object", "throttle-group,id=g"]
    for name, filters in FILTERS.items():
        image = f"driver=qcow2,node-name={name},file.driver=file,file.filename={name}.qcow2"
        below = f",backing={BACKING[name]}" if name in BACKING else ""
        for node in (image + below, *filters):
            found += ["--blockdev", node]
    return found


@pytest.mark.parametrize("device", ["top", "cor"])
@pytest.mark.parametrize(
    "below",
    [{}, *({"base_node": name} for name in ("base", "t-base", "mid", "t-mid", "cor-mid", "top")),
     {"base": "base.qcow2"}, {"bottom": "mid"}, {"bottom": "top"}, {"bottom": "t-mid"}],
    ids=str,
)  # fmt: skip
def test_a_stream_leaves_the_filters_that_qemu_leaves(device, below, directories):
    with InStep(*directories, *options()) as both:
        both.do("block-stream", job_id="s", device=device, **below)
        both.look()


@pytest.mark.parametrize(
    "job",
    [("blockdev-backup", {"device": "d0", "target": "t0", "sync": "full"}),
     ("blockdev-mirror", {"device": "d0", "target": "t0", "sync": "full"}),
     ("blockdev-snapshot-sync", {"node-name": "d0", "snapshot-file": "x.qcow2"})],
    ids=lambda job: job[0],
)  # fmt: skip
def test_a_link_that_is_frozen_is_in_the_way(job, directories):
    command, given = job
    name = {} if "snapshot" in command else {"job_id": "j"}
    files = [f"driver=qcow2,node-name={n},file.driver=file,file.filename={n}.qcow2"
             for n in ("d0", "t0")]  # fmt: skip
    with InStep(*directories, "--blockdev", files[0], "--blockdev", files[1]) as both:
        both.do("blockdev-add", driver="copy-on-read", node_name="c", file="d0", bottom="d0")
        both.do(command, **given, **name)
        both.look()


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["backup", "commit"])
def test_an_ignored_error_is_tried_again(side, kind, directories):
    failing = {"backup": ("d0", "t0"), "commit": ("mid", "base")}
    bad = failing[kind][side == "target"]

    def image(name, **more):
        file = {"driver": "file", "filename": f"{name}.qcow2"}
        if name != bad:
            return {"driver": "qcow2", "node_name": name, "file": file, **more}
        rule = {"event": "read_aio" if side == "source" else "write_aio", "errno": 5, "once": True}
        if name == "t0":  # below the format our copy of many clusters gets around it
            rule |= {"event": "none", "iotype": "write"}
            node = {"driver": "qcow2", "file": file}
            return {"driver": "blkdebug", "node_name": name, "image": node, "inject-error": [rule]}
        file = {"driver": "blkdebug", "image": file, "inject-error": [rule]}
        return {"driver": "qcow2", "node_name": name, "file": file, **more}

    with InStep(*directories) as both:
        if kind == "backup":
            both.do("blockdev-add", **image("d0"))
            both.do("blockdev-add", **image("t0"))
            both.do("blockdev-backup", job_id="j", device="d0", target="t0", sync="full",
                    on_source_error="ignore", on_target_error="ignore")  # fmt: skip
        else:
            for name, below in (("base", None), ("mid", "base"), ("top", "mid")):
                both.do("blockdev-add", **image(name, backing=below))
            both.do("block-commit", job_id="j", device="top", top_node="mid", on_error="ignore")
        both.look()


@pytest.mark.parametrize("above_first", [True, False])
def test_the_filter_of_another_stream_is_not_passed_by(above_first, directories):
    """Into ``mid``, and into ``top`` down to ``mid``: what covers ``mid`` has to stay."""
    images = []
    for name, below in (("base", ""), ("mid", ",backing=base"), ("top", ",backing=mid")):
        file = f"file.driver=file,file.filename={name}.qcow2"
        images += ["--blockdev", f"driver=qcow2,node-name={name},{file}{below}"]
    for directory in directories:  # something to copy, with a layer in between
        disk(directory, "new.qcow2", "8 1500k 64k", backing="top.qcow2")
    images += ["--blockdev", "driver=qcow2,node-name=new,file.driver=file,file.filename=new.qcow2,"
               "backing=top"]  # fmt: skip
    lower = {"job_id": "l", "device": "mid"}
    upper = {"job_id": "u", "device": "new", "base_node": "mid"}
    with InStep(*directories, *images) as both:
        for job in (upper, lower) if above_first else (lower, upper):
            both.do("block-stream", **job, auto_finalize=False)
            both.look()
        for job in ("u", "l"):
            both.do("job-finalize", id=job)
            both.look()


def test_internal_snapshots_are_shown_through_what_stands_on_one_node(directories):
    """Not through a copy-before-write filter, be it a job's: that stands on its target, too."""
    options = ["--object", "throttle-group,id=g"]
    for name in ("d0", "d1", "t0", "t1"):
        file = f"file.driver=file,file.filename={name}.qcow2"
        options += ["--blockdev", f"driver=qcow2,node-name={name},{file}"]
    with InStep(*directories, *options) as both:
        for name in ("d0", "d1"):
            both.do("blockdev-snapshot-internal-sync", device=name, name=f"of {name}")
        for driver in (
            {"driver": "throttle", "throttle-group": "g", "file": "d0"},
            {"driver": "blkdebug", "image": "d0"},
            {"driver": "raw", "file": "d0"},
            {"driver": "raw", "file": "d0", "size": 65536},
            {"driver": "copy-before-write", "file": "d0", "target": "t0"},
        ):
            both.do("blockdev-add", node_name="above", **driver)
            both.look()
            both.do("blockdev-del", node_name="above")
        both.do("blockdev-mirror", job_id="m", device="d1", target="t1", sync="full",
                filter_node_name="top")  # fmt: skip
        both.do("blockdev-backup", job_id="b", device="d0", target="t0", sync="full",
                filter_node_name="cbw", auto_finalize=False)  # fmt: skip
        both.look()
