"""What ``help COMMAND`` of ``qemu-io`` says: the line of the list, an example, every option.

The texts are our own; scripts read the first line at most. Pure. Errors: none.
"""

from __future__ import annotations

import re
from typing import Final

from liveblockd.qmp.hmp.io_text import Usage

_SIZES: Final = (
    "Sizes and offsets are bytes, or have a suffix (k, M, G, T, P, E), a fraction before it, or\n"
    "are hexadecimal (0x200).\n"
)

#: per command: an example, and what it does
_EXAMPLES: Final = {
    "read": ("read -P 0xab 64k 4k", "are the 4 KiB from 64 KiB on all 0xab?"),
    "readv": ("readv -v 0 512 512", "show the first two sectors, read into a buffer each"),
    "aio_read": ("aio_read 0 1M", "returns at once; aio_flush waits for it"),
    "write": ("write -P 7 1M 64k", "64 KiB of the byte 7 from 1 MiB on"),
    "writev": ("writev -P 7 0 4k 4k", "one request of 8 KiB that is in two buffers"),
    "aio_write": ("aio_write -z 0 1M", "returns at once; aio_flush waits for it"),
    "aio_flush": ("aio_flush", "of all disks, whoever began it"),
    "discard": ("discard 1M 1M", "as a guest's discard: what is there reads as zeros or as before"),
    "truncate": ("truncate -m falloc 1G", "1 GiB, and room for what is new"),
    "reopen": ("reopen -o lazy-refcounts=on", "options that are not named stay as they are"),
    "alloc": ("alloc 0 1M", "how many bytes of the first MiB are in this image, not below"),
    "break": ("break write_aio A", "the next write of data stops, until resume A"),
    "sleep": ("sleep 100", "a tenth of a second; other monitors go on"),
}

#: options by letter; those of one command stand below its name
_OPTIONS: Final = {
    "C": "the report is one line for machines: bytes,requests,time,bytes/s,requests/s",
    "q": "no report when it went well",
    "b": "of the state of a machine: there is none, it is refused",
    "p": "nothing; old scripts have it",
    "v": "show the data, in numbers and letters",
    "l": "how much of what was read is compared (with -P)",
    "i": "no request: it is counted as an invalid one",
    "f": "durable when it returns (FUA)",
    "u": "with -z: the space may be given back",
    "z": "zeros, as far as possible without writing them",
    "n": "with -z: fail if that would have to write them",
    "c": "compressed",
    "P": "the byte to write, instead of 0xcd",
}
_OWN_OPTIONS: Final = {
    "read": {"P": "the byte that all of it must be", "s": "where comparing begins (with -P)"},
    "readv": {"P": "the byte that all of it must be"},
    "aio_read": {"P": "the byte that all of it must be"},
    "write": {"s": "a file whose bytes are written, again and again"},
    "truncate": {"m": "what is new is allocated: off, metadata, falloc or full"},
    "reopen": {
        "r": "for reading only",
        "w": "for writing",
        "c": "cache mode: writeback, writethrough, none, directsync or unsafe",
        "o": "options of the node: key=value,...",
    },
}


def options(name: str, usage: Usage) -> dict[str, str]:
    """What each option of the command means, in the order in which the line has them."""
    known = _OPTIONS | _OWN_OPTIONS.get(name, {})
    return {letter: known[letter] for letter in re.findall(r"\w", usage.letters)}


def describe(name: str, usage: Usage) -> str:
    """All that is to be said of a command; its first line is that of the list."""
    text = f"{usage.line(name)}\n"
    if name in _EXAMPLES:
        example, meaning = _EXAMPLES[name]
        text += f"\n {example}\n     {meaning}\n"
    if found := options(name, usage):
        text += "\n" + "".join(f" -{letter}  {meaning}\n" for letter, meaning in found.items())
    if re.search(r"\b(off|offset|len)\b", usage.words):
        text += f"\n{_SIZES}"
    return text
