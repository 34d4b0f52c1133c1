import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.storage import registry
from liveblockd.storage.driver import BlockDriver
from liveblockd.storage.file import FileOptions
from liveblockd.storage.options import BlockdevDiscardOptions, BlockdevOptions

registry.load_drivers()


def test_the_driver_picks_the_options():
    options = parse(
        BlockdevOptions,
        {
            "driver": "file",
            "filename": "a.img",
            "node-name": "f",
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": False},
        },
    )
    assert isinstance(options, FileOptions)
    assert options.unmaps and options.cache_direct and not options.cache_no_flush
    assert options.discard is BlockdevDiscardOptions.UNMAP
    assert options.read_only is None


def test_a_reference_is_a_name_or_options_of_any_driver():
    named = parse(BlockdevOptions, {"driver": "blkdebug", "image": "node"})
    assert named.image == "node"
    inline = parse(
        BlockdevOptions, {"driver": "blkdebug", "image": {"driver": "null-co", "size": 512}}
    )
    assert inline.image.size == 512


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": "zzz"}, "Parameter 'driver' does not accept value 'zzz'"),
        ({"driver": "file"}, "Parameter 'filename' is missing"),
        (
            {"driver": "file", "filename": 5},
            "Invalid parameter type for 'filename', expected: string",
        ),
        ({"driver": "file", "filename": "x", "colour": 1}, "Parameter 'colour' is unexpected"),
        (
            {"driver": "blkdebug", "image": 3},
            "Invalid parameter type for 'image', expected: BlockdevRef",
        ),
        (
            {"driver": "blkdebug", "image": {"driver": "file"}},
            "Parameter 'image.filename' is missing",
        ),
        (
            {"driver": "file", "filename": "x", "locking": "maybe"},
            "Parameter 'locking' does not accept value 'maybe'",
        ),
    ],
)
def test_errors_are_worded_as_in_qemu(value, message):
    with pytest.raises(BlockError) as caught:
        parse(BlockdevOptions, value)
    assert caught.value.message == message


def test_registry_refuses_duplicates_and_classes_without_options():
    class Twin(BlockDriver):
        driver_name = "file"
        Options = FileOptions

    with pytest.raises(ValueError, match="two drivers"):
        registry.register_driver(Twin)

    class Bare(BlockDriver):
        driver_name = "bare"

    with pytest.raises(ValueError, match="Options"):
        registry.register_driver(Bare)
    assert "bare" not in registry.drivers()


def test_lookup():
    assert registry.find_driver("file").driver_name == "file"
    with pytest.raises(BlockError, match="Unknown driver 'zzz'"):
        registry.find_driver("zzz")
    assert registry.option_models["file"] is FileOptions
