"""``help COMMAND`` of ``qemu-io``: nothing is left out."""

import re

import pytest

from liveblockd.qmp.hmp import io_help, table
from liveblockd.qmp.hmp.io_text import parse_words
from liveblockd.qmp.hmp.qemu_io import commands

table.load()


@pytest.mark.parametrize("name", commands)
def test_it_tells_of_every_option(name):
    usage = commands[name].usage
    first, *more = io_help.describe(name, usage).splitlines()
    assert first == usage.line(name)
    letters = set(usage.letters) - {":"}
    assert {line[2] for line in more if re.match(r" -\w  \w", line)} == letters


def test_its_examples_are_lines_that_can_be_given():
    for name, (example, _) in io_help._EXAMPLES.items():
        word, *words = example.split()
        assert word == name
        parse_words(name, commands[name].usage, words)


def test_what_stands_behind_s():
    assert "[-s file]" in commands["write"].usage.line("write")
    assert "[-s off]" in commands["read"].usage.line("read")
