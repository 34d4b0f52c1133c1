"""What the demo shows: titles, the chain and a progress bar, plain where there is no terminal."""

from __future__ import annotations

import sys

WIDTH = 36


class Screen:
    """Writes to standard output; a progress bar is redrawn in place on a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._bar = ""
        self._decile = -1

    def _styled(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._terminal else text

    def title(self, text: str) -> None:
        """A headline."""
        print("\n" + self._styled(text, "1"), flush=True)

    def say(self, text: str) -> None:
        """A line of detail."""
        print("  " + text, flush=True)

    def ok(self, text: str) -> None:
        """Something that was verified."""
        print("  " + self._styled("ok", "32") + "  " + text, flush=True)

    def chain(self, names: list[str]) -> None:
        """The backing chain, base first."""
        print("  " + self._styled(" <- ".join(f"[{n}]" for n in names), "36"), flush=True)

    def progress(self, title: str, offset: int, length: int) -> None:
        """Draw the bar; without a terminal a line for each tenth."""
        done = offset / length if length else 1.0
        filled = int(done * WIDTH)
        self._bar = f"  {title} [{'#' * filled}{'.' * (WIDTH - filled)}] {done:6.1%}"
        if self._terminal:
            print("\r" + self._bar, end="", flush=True)
        elif int(done * 10) != self._decile:
            self._decile = int(done * 10)
            print(self._bar, flush=True)

    def end_progress(self, seconds: float) -> None:
        """The job is over."""
        self._decile = -1
        print((f"\r{self._bar}" if self._terminal else " ") + f" in {seconds:.2f} s", flush=True)
