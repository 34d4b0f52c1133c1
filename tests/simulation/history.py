"""What a disk may read as after a crash: the guest's requests on the way to being durable.

The guest notes its requests in the log of the machine, among those of the disks: ``begin`` (the
number, the place and the bytes), ``done`` (with the bytes that a discard left), ``failed``,
``sync`` and ``synced``, ``resize`` and ``resized``, ``switch`` (the image that is the top now).

``History`` walks along with ``crash.Replay``. At every moment each byte is either what the last
durable request made it, or what one of the requests since then would make it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.simulation.disks import Entry

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Open:
    """A request whose bytes may be there."""

    number: int
    offset: int
    data: Bytes
    ended: bool = False
    #: where nothing durable came later; None: nowhere did it
    left: npt.NDArray[np.bool_] | None = None

    def cover(self, start: int, end: int) -> None:
        """Something later is durable in a range."""
        low, high = max(0, start - self.offset), max(0, end - self.offset)
        if low < high and low < len(self.data):
            if self.left is None:
                self.left = np.ones(len(self.data), np.bool_)
            self.left[low:high] = False


@dataclass
class History:
    """``durable`` has the largest size that the disk ever has, zeros behind its end."""

    durable: Bytes
    size: int
    top: str
    open: dict[int, Open] = field(default_factory=dict)
    syncs: dict[int, list[int]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: the disk was never smaller, nor is it on its way there
    least: int = 1 << 62

    def apply(self, entry: Entry) -> None:
        """Go on by one line of the log."""
        number = entry.number
        match entry.kind:
            case "begin":
                self.open[number] = Open(number, entry.offset, np.frombuffer(entry.data, np.uint8))
            case "done":
                request = self.open[number]
                request.ended = True
                if entry.data:
                    request.data = np.frombuffer(entry.data, np.uint8)
            case "failed":
                pass  # it never ends: what it was to write may be there until something later is
            case "sync":
                self.syncs[number] = [n for n, r in self.open.items() if r.ended]
            case "synced":
                for covered in self.syncs.pop(number):
                    if covered in self.open:
                        self._make_durable(self.open.pop(covered))
            case "resize":
                self.sizes[number] = entry.offset
                self.least = min(self.least, entry.offset)
                low = min(self.size, entry.offset)
                self.open[number] = Open(number, low, np.zeros(len(self.durable) - low, np.uint8))
            case "resized":
                self.size = self.sizes.pop(number)
                self._make_durable(self.open.pop(number))
            case "switch":
                self.top = entry.data
            case "note":
                self.notes.append(entry.data)
            case _:
                raise AssertionError(entry.kind)

    def _make_durable(self, request: Open) -> None:
        start, end = request.offset, request.offset + len(request.data)
        if request.left is None:
            self.durable[start:end] = request.data
        else:
            self.durable[start:end][request.left] = request.data[request.left]
        for other in self.open.values():
            # What began later, and overlaps, began after this one had ended.
            if other.number < request.number:
                other.cover(start, end)

    def wrong(self, view: Bytes) -> str | None:
        """What cannot be so in the bytes found after a crash; None if all can."""
        if len(view) != self.size and len(view) not in self.sizes.values():
            return f"the size is {len(view)}, not {self.size} or {list(self.sizes.values())}"
        whole = self.durable
        good = np.zeros(len(whole), np.bool_)
        good[: len(view)] = view == whole[: len(view)]
        good[len(view) :] = whole[len(view) :] == 0
        if good.all():
            return None
        padded = np.zeros(len(whole), np.uint8)
        padded[: len(view)] = view
        for request in self.open.values():
            start, end = request.offset, request.offset + len(request.data)
            same = padded[start:end] == request.data
            if request.left is not None:
                same &= request.left
            good[start:end] |= same
        bad = np.flatnonzero(~good)
        if not len(bad):
            return None
        first = int(bad[0])
        # By chance one byte in 256 is right: the extent is what counts.
        return (
            f"{len(bad)} wrong bytes from {first:#x} to {int(bad[-1]):#x}: "
            f"{padded[first]:#x}, not {whole[first]:#x}"
        )
