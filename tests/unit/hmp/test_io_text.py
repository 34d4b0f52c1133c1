"""What `qemu-io` of the human monitor prints of a request (the program itself: conformance)."""

import pytest

from liveblockd.qmp.hmp.io_text import report


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.256, "00.25 sec"), (0.9999, "00.99 sec"), (1.22, "0:00:01.22"), (62.5, "0:01:02.50"),
     (3723.5, "1:02:03.50")],
)  # fmt: skip
def test_how_long_a_request_took(seconds, shown):
    text = report("read", 1024, 512, seconds, terse=False)
    assert text.startswith(f"read 512/512 bytes at offset 1024\n512 bytes, 1 ops; {shown} (")


def test_the_line_for_machines_has_the_long_form():
    assert report("read", 0, 512, 0.25, terse=True) == "512,1,0:00:00.25,2048.000,4.000\n"
