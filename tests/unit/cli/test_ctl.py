"""What liveblockctl computes by itself."""

import pytest

from liveblockd import ctl, ctl_jobs


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64k", 65536), ("1.5G", 3 << 29), ("10M", 10 << 20), ("7b", 7)],
)
def test_sizes_are_bytes(text, size):
    assert ctl.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1q", "nan", "inf", "1e30", "k"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r".*"):
        ctl.parse_size(text)


def test_members():
    assert ctl._members(['{"a": [1]}']) == {"a": [1]}
    assert ctl._members(["device=d", "speed=1", "f.g=true", "f.h=x=y"]) == {
        "device": "d", "speed": 1, "f": {"g": True, "h": "x=y"}}  # fmt: skip
    for words in (["device"], ["{"], ["a=1", "a.b=2"]):
        with pytest.raises(ctl.ControlError) as caught:
            ctl._members(words)
        assert caught.value.status == ctl.USAGE


def test_progress_line():
    progress = ctl_jobs.Progress("j")
    progress._samples = [(10.0, 0), (12.0, 4 << 20)]
    assert progress.line(4 << 20, 12 << 20) == (
        "j  [########                ]  33%  4.0 MiB of 12.0 MiB  2.0 MiB/s  ETA 0:04"
    )
    assert progress.line(0, 0).startswith("j  [########################] 100%")
    assert progress.line(1, 2, "paused").endswith("  paused")


def test_job_ids():
    assert ctl_jobs._job_id("stream", "virtio0") == "virtio0"
    assert ctl_jobs._job_id("stream", "#block123") == "stream-block123"


def test_addresses():
    assert ctl._address("unix:/run/n") == {"type": "unix", "data": {"path": "/run/n"}}
    assert ctl._address("[::1]:10809") == {"type": "inet", "data": {"host": "::1", "port": "10809"}}
