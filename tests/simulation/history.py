"""What a disk may read as after a crash: the guest's requests on the way to being durable.

The guest notes its requests in the log of the machine, among those of the disks: ``begin`` (the
number, the place and the bytes), ``done`` (with the bytes that a discard left), ``failed``,
``sync`` and ``synced``, ``resize`` and ``resized``, ``switch`` (the image that is the top now),
``keep`` and ``kept``, ``forget`` and ``forgotten`` (an internal snapshot), ``apply`` and
``applied``; ``backup``, ``backed`` and ``base`` (``copies``).

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


@dataclass(slots=True)
class Kept:
    """An internal snapshot; ``content`` None: nobody knows it."""

    image: str
    name: str
    content: Bytes | None
    #: of the image when it was taken
    backing: str | None
    #: for sure it is there; it may be there
    there: bool = False
    possible: bool = True


@dataclass(slots=True)
class Copy:
    """An image that is to hold, or holds, the disk of one instant."""

    image: str
    content: Bytes
    known: npt.NDArray[np.bool_]
    done: bool = False

    def wrong(self, view: Bytes) -> str | None:
        """What cannot be so in the bytes of a finished one."""
        if len(view) != len(self.content):
            return f"the backup {self.image} has {len(view)} bytes"
        bad = np.flatnonzero((view != self.content) & self.known)
        if not len(bad):
            return None
        return f"{len(bad)} wrong bytes in the backup {self.image} from {int(bad[0]):#x}"


def copy_of(image: str, content: bytes, unknown: tuple[tuple[int, int], ...]) -> Copy:
    """From a line of the log."""
    known = np.ones(len(content), np.bool_)
    for start, end in unknown:
        known[start:end] = False
    return Copy(image, np.frombuffer(content, np.uint8), known)


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
    #: by the number of the request that took it
    kept: dict[int, Kept] = field(default_factory=dict)
    #: by the number of the request that forgets it
    going: dict[int, Kept] = field(default_factory=dict)
    #: the state to which the whole disk goes back at one instant
    applied: dict[int, tuple[int, Bytes]] = field(default_factory=dict)
    #: by the number of their instant
    copies: dict[int, Copy] = field(default_factory=dict)
    #: the source and the backup that its bitmap counts from
    base: tuple[str, Copy] | None = None
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
            case "backup":
                self.copies[number] = copy_of(*entry.data)
            case "backed":
                self.copies[number].done = True
            case "gone":
                self.copies.pop(number)
            case "base":
                self.base = None
                if entry.data is not None:
                    source, image = entry.data
                    found = next(c for c in self.copies.values() if c.image == image)
                    self.base = (source, found)
            case "resize":
                self.base = None
                self.sizes[number] = entry.offset
                self.least = min(self.least, entry.offset)
                low = min(self.size, entry.offset)
                self.open[number] = Open(number, low, np.zeros(len(self.durable) - low, np.uint8))
            case "resized":
                self.size = self.sizes.pop(number)
                self._make_durable(self.open.pop(number))
            case "keep":
                image, name, content, backing = entry.data
                known = None if content is None else np.frombuffer(content, np.uint8)
                self.kept[number] = Kept(image, name, known, backing)
            case "kept":
                self.kept[number].there = True
            case "forget":
                found = next(k for k in self.kept.values() if (k.image, k.name) == entry.data)
                found.there = False
                self.going[number] = found
            case "forgotten":
                self.going.pop(number).possible = False
            case "apply":
                self.base = None
                whole = np.zeros(len(self.durable), np.uint8)
                whole[: len(entry.data)] = np.frombuffer(entry.data, np.uint8)
                self.applied[number] = (entry.offset, whole)
                self.least = min(self.least, entry.offset)
            case "applied":
                self.size, self.durable = self.applied.pop(number)
                self.open.clear()
            case "unapplied":
                del self.applied[number]
            case "switch":
                self.top = entry.data
            case "note":
                self.notes.append(entry.data)
            case _:
                raise AssertionError(entry.kind)

    def wrong_snapshots(
        self, name: str, backing: str | None, found: dict[str, tuple[Bytes, Bytes]]
    ) -> str | None:
        """What cannot be so in the internal snapshots of an image.

        ``found``: by name, the bytes, and which of them are the image's own.
        """
        for kept in self.kept.values():
            if kept.image != name:
                continue
            if kept.name not in found:
                if kept.there:
                    return f"{name}: the snapshot {kept.name} is gone"
                continue
            if not kept.possible:
                return f"{name}: the snapshot {kept.name} is back"
            view, own = found[kept.name]
            if kept.content is None:
                continue
            if len(view) != len(kept.content):
                return f"{name}: the snapshot {kept.name} has {len(view)} bytes"
            bad = view != kept.content
            if backing != kept.backing:
                bad &= own != 0  # what showed through from below is another image's now
            if bad.any():
                at = np.flatnonzero(bad)
                return f"{name}: {len(at)} wrong bytes in {kept.name} from {int(at[0]):#x}"
        return None

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
        for size, content in self.applied.values():
            if len(view) == size and (view == content[:size]).all():
                return None
        if len(view) != self.size and len(view) not in self.sizes.values():
            return f"the size is {len(view)}, not {self.size} or {list(self.sizes.values())}"
        whole = self.durable
        padded = view
        if len(view) < len(whole):
            padded = np.zeros(len(whole), np.uint8)
            padded[: len(view)] = view
        wrong = padded != whole
        if not wrong.any():
            return None
        for request in self.open.values():
            start, end = request.offset, request.offset + len(request.data)
            differs = padded[start:end] != request.data
            if request.left is not None:
                differs |= ~request.left
            wrong[start:end] &= differs
        bad = np.flatnonzero(wrong)
        if not len(bad):
            return None
        first = int(bad[0])
        # By chance one byte in 256 is right: the extent is what counts.
        return (
            f"{len(bad)} wrong bytes from {first:#x} to {int(bad[-1]):#x}: "
            f"{padded[first]:#x}, not {whole[first]:#x}"
        )
