"""The command line of ``liveblockctl image``, option by option that of qemu-img.

Runs on an event loop of its own, made for one command. Nothing escapes ``main`` but ``SystemExit``
of argparse (status 1 for wrong usage, as qemu-img).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError, ConfigError
from liveblockd.imagetool import option_help
from liveblockd.imagetool.images import OptionText, ToolError, reason
from liveblockd.imagetool.output import warn
from liveblockd.runtime.loop import run

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The commands; each is run by the module of its name."""
    top = _Parser(prog="liveblockctl image", description="Work on disk images that are not in use.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        added.add_argument(
            "--object", dest="objects", action="append", default=[], metavar="secret,id=ID,...",
            help="a secret that options refer to",
        )  # fmt: skip
        added.add_argument("-q", "--quiet", action="store_true", help="print errors only")
        return added

    _describing(command)
    _changing(command)
    _management(command)
    return top


def _describing(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = command("check", "check an image, and repair it on request")
    _image(one, output=True)
    one.add_argument("-r", dest="repair", choices=("leaks", "all"), help="repair")
    _cache(one)
    one.add_argument("filename")

    one = command("info", "what an image says of itself")
    _image(one, output=True)
    one.add_argument("--backing-chain", action="store_true", help="all images below it, too")
    one.add_argument("filename")

    one = command("map", "which image of a chain has which range")
    _image(one, output=True)
    one.add_argument("-s", "--start-offset", help="begin there (64k, 1G)")
    one.add_argument("-l", "--max-length", help="so many bytes")
    one.add_argument("filename")

    one = command("measure", "how many bytes a new image would take")
    _image(one, output=True)
    one.add_argument("-O", dest="output_format", default="raw", help="format of the new image")
    one.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE,...")
    one.add_argument("--size", help="of the disk in it, which is empty")
    one.add_argument("-l", dest="snapshot", help="an internal snapshot, by its id or name")
    one.add_argument("filenames", nargs="*", metavar="filename", help="what it is a copy of")

    one = command("compare", "whether two images hold the same bytes")
    _image(one)
    one.add_argument("-F", dest="format2", help="format of the second image")
    one.add_argument("-s", dest="strict", action="store_true", help="sizes and allocation as well")
    one.add_argument("-p", "--progress", action="store_true")
    _cache(one)
    one.add_argument("filename1")
    one.add_argument("filename2")


def _changing(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = command("create", "make an image")
    one.add_argument("-f", "--format", default="raw")
    one.add_argument("-b", dest="backing", help="backing file")
    one.add_argument("-F", dest="backing_format", help="format of the backing file")
    one.add_argument("-u", dest="unsafe", action="store_true", help="do not look at it")
    one.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE,...")
    one.add_argument("filename")
    one.add_argument("size", nargs="?")

    _convert(command("convert", "copy an image into a new one, of another format"))

    one = command("resize", "change the size of the disk in an image")
    _format(one)
    one.add_argument("--shrink", action="store_true", help="allow it to become smaller")
    one.add_argument("--preallocation", default="off", help="off, metadata, falloc or full")
    one.add_argument("filename")
    one.add_argument("size", help="[+|-]SIZE")


def _convert(one: argparse.ArgumentParser) -> None:
    _image(one)
    one.add_argument("-O", dest="output_format", default=None, help="format of the new image")
    one.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE,...")
    one.add_argument("-B", "-b", dest="backing", help="backing file of the new image")
    one.add_argument("-F", dest="backing_format", help="format of the backing file")
    one.add_argument("-c", dest="compress", action="store_true", help="compressed clusters")
    one.add_argument("-n", dest="no_create", action="store_true", help="the target is there")
    one.add_argument("-p", "--progress", action="store_true")
    one.add_argument("-l", dest="snapshot", help="an internal snapshot, by its id or name")
    one.add_argument("-S", dest="sparse_size", help="bytes of zeros that become a hole; 0: never")
    one.add_argument("--target-is-zero", action="store_true", help="the target reads as zeros")
    one.add_argument("--target-image-opts", action="store_true", help="the target is options")
    one.add_argument("--bitmaps", action="store_true", help="copy the dirty bitmaps, too")
    one.add_argument("--skip-broken-bitmaps", action="store_true", help="but inconsistent ones")
    one.add_argument("-r", dest="rate", help="bytes per second")
    one.add_argument("-W", dest="out_of_order", action="store_true", help="has no effect here")
    one.add_argument("-C", dest="copy_range", action="store_true", help="is done anyway")
    one.add_argument("-m", dest="coroutines", type=_count, help="has no effect here")
    _cache(one)
    one.add_argument(
        "-t", dest="target_cache", help="unsafe: do not wait until the target is durable"
    )
    one.add_argument("sources", nargs="+", metavar="source")
    one.add_argument("target")


def _bitmap(one: argparse.ArgumentParser) -> None:
    _format(one)
    for name in ("add", "remove", "clear", "enable", "disable"):
        one.add_argument(
            f"--{name}", dest="actions", action="append_const", const=(name, None),
            help=f"{name} it",
        )  # fmt: skip
    one.add_argument(
        "--merge", dest="actions", action="append", type=_merged, metavar="SOURCE",
        help="add what is dirty in SOURCE",
    )  # fmt: skip
    one.add_argument("-g", "--granularity", help="bytes; with --add")
    one.add_argument("-b", "--source-file", help="image that has SOURCE")
    one.add_argument("-F", "--source-format", help="its format")
    one.add_argument("filename")
    one.add_argument("bitmap")


def _merged(name: str) -> tuple[str, str]:
    return "merge", name


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _management(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = command("snapshot", "internal snapshots of an image")
    _image(one)
    actions = one.add_mutually_exclusive_group()
    actions.add_argument("-l", dest="list", action="store_true", help="list them")
    actions.add_argument("-c", dest="create", metavar="NAME", help="create one")
    actions.add_argument("-a", dest="apply", metavar="NAME", help="go back to one")
    actions.add_argument("-d", dest="delete", metavar="NAME", help="delete one")
    one.add_argument("filename")

    one = command("rebase", "give an image another backing file; its disk stays the same")
    _format(one)
    one.add_argument("-b", dest="backing", required=True, help="the new one; '' for none")
    one.add_argument("-F", dest="backing_format", help="its format")
    one.add_argument("-u", dest="unsafe", action="store_true", help="only change the name")
    one.add_argument("-p", "--progress", action="store_true")
    one.add_argument("-t", dest="target_cache", help=argparse.SUPPRESS)
    one.add_argument("-U", "--force-share", action="store_true", help=argparse.SUPPRESS)
    _cache(one)
    one.add_argument("filename")

    one = command("commit", "put what an image holds into its backing file")
    _format(one)
    one.add_argument("-b", dest="base", help="an image further below; implies -d")
    one.add_argument("-d", dest="drop", action="store_true", help="do not empty the image")
    one.add_argument("-p", "--progress", action="store_true")
    one.add_argument("-r", dest="rate", help="bytes per second")
    one.add_argument("-t", dest="target_cache", help="unsafe: do not wait until it is durable")
    one.add_argument("filename")

    _bitmap(command("bitmap", "dirty bitmaps that an image keeps"))

    one = command("amend", "change the version, refcount width, size or passphrases of an image")
    _format(one)
    one.add_argument("-p", "--progress", action="store_true")
    one.add_argument("-t", dest="target_cache", help=argparse.SUPPRESS)
    one.add_argument("--force", action="store_true", help="even the last passphrase")
    one.add_argument("-o", dest="options", action="append", required=True, metavar="KEY=VALUE,...")
    one.add_argument("filename")


def _image(one: argparse.ArgumentParser, *, output: bool = False) -> None:
    _format(one)
    one.add_argument(
        "-U", "--force-share", action="store_true", help="although others may be writing to it"
    )
    if output:
        one.add_argument("--output", choices=("human", "json"), default="human")


def _format(one: argparse.ArgumentParser) -> None:
    one.add_argument("-f", "--format", help="format of the image; else it is guessed")
    one.add_argument(
        "--image-opts", action="store_true", help="images are driver=...,file.filename=..."
    )


def _cache(one: argparse.ArgumentParser) -> None:
    one.add_argument("-T", dest="source_cache", help=argparse.SUPPRESS)


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit status."""
    load_all_drivers()
    try:
        if (asked := option_help.asked_for(argv)) is not None:
            option_help.show(*asked)
            return 0
        args = parser().parse_args(_with_negative_sizes(argv))
        module = importlib.import_module(f"liveblockd.imagetool.{args.command}")
        _take_option_texts(args)
        status: int = run(module.run(args))
        return status
    except ToolError as error:
        warn(error.message)
        return error.status
    except (BlockError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        warn(reason(error))
        return 1
    except ConfigError as error:
        warn(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _take_option_texts(args: argparse.Namespace) -> None:
    """With ``--image-opts`` the names of images are options; ToolError beside ``-f``."""
    status = 2 if args.command == "compare" else 1
    exclusive = ToolError("--image-opts and --format are mutually exclusive", status)
    if getattr(args, "target_image_opts", False):
        if args.output_format is not None:
            raise exclusive
        args.target = OptionText(args.target)
    elif "output_format" in args and args.output_format is None:
        args.output_format = "raw"
    if not getattr(args, "image_opts", False):
        return
    if args.format is not None or getattr(args, "format2", None) is not None:
        raise exclusive
    for name in ("filename", "filename1", "filename2"):
        if hasattr(args, name):
            setattr(args, name, OptionText(getattr(args, name)))
    for name in ("sources", "filenames"):
        if hasattr(args, name):
            setattr(args, name, [OptionText(text) for text in getattr(args, name)])


def _with_negative_sizes(argv: Sequence[str]) -> list[str]:
    """``resize IMAGE -1G``: the size is no option."""
    words = list(argv)
    if (
        words[:1] == ["resize"]
        and "--" not in words
        and words[-1][0:1] == "-"
        and words[-1][1:2].isdigit()
    ):
        words.insert(-1, "--")
    return words
