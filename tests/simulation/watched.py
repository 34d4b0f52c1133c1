"""What a disk holds at an instant while its guest goes on writing."""

from __future__ import annotations

from typing import Any, Self

from tests.simulation.guest import Guest

Span = tuple[int, int]


class Watched(Guest):
    """A guest whose writes can be looked at for a while."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.watchers: dict[int, list[Span]] = {}

    def _take(self, writing: bool) -> Span | None:
        place = super()._take(writing)
        if place is not None and writing:
            for watcher in self.watchers.values():
                watcher.append((place[0], sum(place)))
        return place

    def unfinished(self) -> list[Span]:
        """Where writes are under way."""
        return [(start, end) for start, end, writing in self._busy if writing]


class Moment:
    """What the disk holds at an instant within the block, and where that is not known."""

    def __init__(self, guest: Watched) -> None:
        self.guest = guest
        self.unknown: list[Span] = []
        self.data = b""
        #: of the disk, which a commit into a longer image makes longer than what the guest knows
        self.length = 0

    def begin(self) -> None:
        """The instant is not before this, or begins anew."""
        self.unknown = self.guest.unfinished()
        self.guest.watchers[id(self)] = self.unknown

    def end(self) -> None:
        """It has passed."""
        del self.guest.watchers[id(self)]
        self.data = bytes(self.guest.model)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def compare(self, found: bytes, what: str) -> None:
        """Everything but what is not known; raises AssertionError."""
        one, other = bytearray(self.data), bytearray(found[: len(self.data)])
        assert len(one) == len(other), f"{what}: {len(other)} bytes, not {len(one)}"
        for start, end in self.unknown:
            one[start:end] = other[start:end] = bytes(len(one[start:end]))
        if one != other:
            wrong = [i for i in range(0, len(one), 512) if one[i : i + 512] != other[i : i + 512]]
            raise AssertionError(f"{what}: {len(wrong)} wrong sectors from {wrong[0]:#x} on")
