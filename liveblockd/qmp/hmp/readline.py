"""The interactive human monitor: a line editor on any stream, and the session around it.

Scripts wait for the prompt ``(qemu) `` and so do we print it. Input is echoed on sockets too, as
QEMU does; keys are those of a VT100 and of Emacs. CR, LF and CR LF each end a line.

``LineEditor`` is pure (bytes in, lines and echo out); ``ReadlineSession`` runs on the event loop.
A client that does not read its output stops being read; one that vanishes ends its session, never
a command under way. Escaping: nothing but cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp.info import banner
from liveblockd.qmp.hmp.table import commands, info_commands, load, run_line

PROMPT: Final = "(qemu) "
_HISTORY_MAX: Final = 64
_LINE_MAX: Final = 4096
_READ_MAX: Final = 4096

_ESCAPES: Final = {
    "[D": "left",
    "[C": "right",
    "[A": "up",
    "[B": "down",
    "[H": "home",
    "[F": "end",
    "[1~": "home",
    "[3~": "delete",
    "[4~": "end",
    "OH": "home",
    "OF": "end",
    "OA": "up",
    "OB": "down",
    "OC": "right",
    "OD": "left",
}
_CONTROLS: Final = {
    "\x01": "home",
    "\x02": "left",
    "\x04": "delete",
    "\x05": "end",
    "\x06": "right",
    "\x08": "rubout",
    "\x09": "complete",
    "\x0b": "kill_end",
    "\x0e": "down",
    "\x10": "up",
    "\x15": "kill_line",
    "\x17": "kill_word",
    "\x7f": "rubout",
}


class LineEditor:
    """Turns typed bytes into lines; ``take_echo`` gives what the terminal has to show.

    A character here is a byte (latin-1), so that a file name passes as it was typed.
    """

    def __init__(self) -> None:
        self._line = ""
        self._cursor = 0
        self._history: list[str] = []
        self._place = 0  # in the history; its length stands for the line being typed
        self._typed = ""  # that line, while an older one is shown
        self._escape = ""
        self._after_return = False
        self._echo: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """The lines that ``data`` completes, in order; each was echoed with its line end."""
        lines = []
        for character in data.decode("latin-1"):
            line = self._key(character)
            if line is not None:
                lines.append(line)
        return lines

    def take_echo(self) -> bytes:
        """What to show since the last call."""
        text = "".join(self._echo)
        self._echo.clear()
        return text.encode("latin-1")

    @property
    def partial(self) -> str:
        """The line as it stands, not yet ended."""
        return self._line

    def _key(self, character: str) -> str | None:
        after_return, self._after_return = self._after_return, character == "\r"
        if self._escape:
            self._escape_key(character)
        elif character == "\x1b":
            self._escape = character
        elif character == "\n" and after_return:
            pass  # the second half of CR LF
        elif character in "\r\n":
            return self._enter()
        elif character in _CONTROLS:
            getattr(self, f"_do_{_CONTROLS[character]}")()
        elif character >= " " and len(self._line) < _LINE_MAX:
            self._insert(character)
        return None

    def _escape_key(self, character: str) -> None:
        self._escape += character
        sequence = self._escape[1:]
        unfinished = sequence in ("[", "O") or (sequence[0] == "[" and character in "0123456789;")
        if sequence in _ESCAPES:
            self._escape = ""
            getattr(self, f"_do_{_ESCAPES[sequence]}")()
        elif not unfinished or len(sequence) > 8:
            self._escape = ""

    def _enter(self) -> str:
        line, self._line = self._line, ""
        self._cursor = 0
        self._echo.append("\r\n")
        if line.strip() and (not self._history or self._history[-1] != line):
            self._history.append(line)
            del self._history[:-_HISTORY_MAX]
        self._place = len(self._history)
        return line.encode("latin-1").decode("utf-8", "surrogateescape")

    def _insert(self, text: str) -> None:
        tail = self._line[self._cursor :]
        self._line = self._line[: self._cursor] + text + tail
        self._cursor += len(text)
        self._echo.append(text + tail + "\b" * len(tail))

    def _replace(self, line: str) -> None:
        """Show ``line`` instead, with the cursor at its end."""
        self._echo.append("\b" * self._cursor + line + "\x1b[K")
        self._line, self._cursor = line, len(line)

    def _cut(self, start: int, end: int) -> None:
        """Remove characters; the cursor ends where they stood."""
        tail = self._line[end:]
        self._echo.append("\b" * max(self._cursor - start, 0))
        self._echo.append(tail + "\x1b[K" + "\b" * len(tail))
        self._line = self._line[:start] + tail
        self._cursor = start

    def _do_left(self) -> None:
        if self._cursor:
            self._cursor -= 1
            self._echo.append("\b")

    def _do_right(self) -> None:
        if self._cursor < len(self._line):
            self._echo.append(self._line[self._cursor])
            self._cursor += 1

    def _do_home(self) -> None:
        self._echo.append("\b" * self._cursor)
        self._cursor = 0

    def _do_end(self) -> None:
        self._echo.append(self._line[self._cursor :])
        self._cursor = len(self._line)

    def _do_delete(self) -> None:
        if self._cursor < len(self._line):
            self._cut(self._cursor, self._cursor + 1)

    def _do_rubout(self) -> None:
        if self._cursor:
            self._cut(self._cursor - 1, self._cursor)

    def _do_kill_end(self) -> None:
        self._cut(self._cursor, len(self._line))

    def _do_kill_line(self) -> None:
        self._cut(0, self._cursor)

    def _do_kill_word(self) -> None:
        start = len(self._line[: self._cursor].rstrip())
        start = self._line.rfind(" ", 0, start) + 1
        self._cut(start, self._cursor)

    def _do_up(self) -> None:
        if self._place:
            if self._place == len(self._history):
                self._typed = self._line
            self._place -= 1
            self._replace(self._history[self._place])

    def _do_down(self) -> None:
        if self._place < len(self._history):
            self._place += 1
            last = self._place == len(self._history)
            self._replace(self._typed if last else self._history[self._place])

    def _do_complete(self) -> None:
        """Complete the name of a command, as far as it is clear."""
        table, start = commands, 0
        if self._line.startswith("info "):
            table, start = info_commands, len("info ")
        word = self._line[start : self._cursor]
        names = sorted(name for name in table if name.startswith(word))
        if self._cursor != len(self._line) or " " in word or not names:
            return
        if len(names) == 1:
            self._insert(names[0][len(word) :] + " ")
            return
        common = next(
            (i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1),
            min(map(len, names)),
        )
        if common > len(word):
            self._insert(names[0][len(word) : common])
            return
        self._echo.append("\r\n" + "  ".join(names) + "\r\n" + PROMPT + self._line)


class ReadlineSession:
    """One client of a human monitor."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._editor = LineEditor()

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve until the client leaves or the daemon ends; ``writer`` is closed on return."""
        load()
        try:
            with contextlib.suppress(OSError):
                await self._serve(reader, writer)
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, f"{banner()}\r\n{PROMPT}")
        while data := await reader.read(_READ_MAX):
            # keys are looked at one at a time, so that echo and output alternate as on a terminal
            start = 0
            while start < len(data):
                end = _line_end(data, start)
                lines = self._editor.feed(data[start:end])
                start = end
                writer.write(self._editor.take_echo())
                for line in lines:
                    await self._write(writer, await self._run(line))
                    if self._context.quitting:
                        return
                    await self._write(writer, PROMPT)
        if self._editor.partial.strip():  # `echo -n quit | socat`: the end of input ends the line
            await self._write(writer, await self._run(self._editor.partial))

    async def _run(self, line: str) -> str:
        """One command at a time over all monitors, and to its end also when the client leaves."""
        try:
            return await run_line(self._context, line)
        except BlockError:
            if not self._context.quitting:
                raise
            return ""

    async def _write(self, writer: asyncio.StreamWriter, text: str) -> None:
        if text:
            writer.write(text.encode("utf-8", "surrogateescape"))
            await writer.drain()


def _line_end(data: bytes, start: int) -> int:
    """Where the next line ends in ``data``, its CR or LF included."""
    ends = [i for i in (data.find(b"\r", start), data.find(b"\n", start)) if i >= 0]
    return min(ends) + 1 if ends else len(data)
