"""blockdev-create and x-blockdev-amend (qapi/block-core.json).

Runs on the event loop. Errors: BlockError; what goes wrong later is the ``error`` of the job.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar, Final

from liveblockd.errors import BlockError
from liveblockd.formats.luks_new import LuksCreateOptions
from liveblockd.formats.luks_slots import KeyslotState, LuksAmendment
from liveblockd.jobs import creating
from liveblockd.jobs.amending import amend_encryption, check_amendable
from liveblockd.jobs.creating import PreallocMode
from liveblockd.jobs.step import Amend, Create, OneStep
from liveblockd.qapi import Int64, QapiModel, Size
from liveblockd.qmp.block_drivers import BlockdevDriver
from liveblockd.qmp.block_info import Qcow2CompressionType
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command
from liveblockd.storage.options import BlockdevRef
from liveblockd.storage.registry import drivers


class BlockdevQcow2Version(enum.StrEnum):
    """Versions of the format."""

    V2 = "v2"
    V3 = "v3"


class QCryptoBlockFormat(enum.StrEnum):
    """Kinds of encryption; ``qcow`` is broken and never made."""

    QCOW = "qcow"
    LUKS = "luks"


class QCryptoBlockCreateOptions(QapiModel):
    """How a new image is encrypted."""

    qapi_tag: ClassVar[str] = "format"

    format: QCryptoBlockFormat

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The kinds."""
        return {"qcow": QCryptoBlockCreateQcow, "luks": QCryptoBlockCreateLuks}


class QCryptoBlockCreateQcow(QCryptoBlockCreateOptions):
    """Legacy AES."""

    key_secret: str | None = None


class QCryptoBlockCreateLuks(QCryptoBlockCreateOptions, LuksCreateOptions):
    """LUKS."""


#: drivers that make images in QEMU alone
_MADE_ELSEWHERE: Final = (
    "nfs", "parallels", "qcow", "qed", "rbd", "ssh", "vdi", "vhdx", "vmdk", "vpc",
)  # fmt: skip


class BlockdevCreateOptions(QapiModel):
    """What is to be made; a driver that makes no images has no further members."""

    qapi_tag: ClassVar[str] = "driver"

    driver: BlockdevDriver

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The drivers that make images."""
        elsewhere = dict.fromkeys(_MADE_ELSEWHERE, CreateElsewhere)
        return {"file": CreateFile, "qcow2": CreateQcow2, "luks": CreateLuks, **elsewhere}


class CreateElsewhere(BlockdevCreateOptions):
    """What QEMU makes images of and this project does not: its members do not matter."""

    qapi_any_members = True


class CreateFile(BlockdevCreateOptions):
    """A file of the host."""

    filename: str
    size: Size
    preallocation: PreallocMode = PreallocMode.OFF
    nocow: bool = False
    extent_size_hint: Size | None = None


class CreateQcow2(BlockdevCreateOptions):
    """A qcow2 image."""

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    size: Size
    version: BlockdevQcow2Version = BlockdevQcow2Version.V3
    backing_file: str | None = None
    backing_fmt: BlockdevDriver | None = None
    encrypt: QCryptoBlockCreateOptions | None = None
    cluster_size: Size = 65536
    preallocation: PreallocMode = PreallocMode.OFF
    lazy_refcounts: bool = False
    refcount_bits: Int64 = 16
    compression_type: Qcow2CompressionType = Qcow2CompressionType.ZLIB


class CreateLuks(BlockdevCreateOptions, LuksCreateOptions):
    """A LUKS image."""

    file: BlockdevRef | None = None
    header: BlockdevRef | None = None
    size: Size
    preallocation: PreallocMode = PreallocMode.OFF


class BlockdevCreate(QapiModel):
    """Arguments of blockdev-create."""

    job_id: str
    options: BlockdevCreateOptions


def _file(context: Context, options: CreateFile) -> Coroutine[Any, Any, None]:
    new = creating.NewHostFile(
        options.filename,
        options.size,
        options.preallocation,
        options.nocow,
        options.extent_size_hint,
    )
    return creating.create_file(context.graph, new)


def _qcow2(context: Context, options: CreateQcow2) -> Coroutine[Any, Any, None]:
    encrypt = options.encrypt
    if encrypt is not None and not isinstance(encrypt, QCryptoBlockCreateLuks):
        raise BlockError(
            "Encryption format 'qcow' is not supported for new images: it is broken, use 'luks'"
        )
    arguments: dict[str, Any] = {
        "cluster_size": options.cluster_size,
        "version": 3 if options.version is BlockdevQcow2Version.V3 else 2,
        "refcount_bits": options.refcount_bits,
        "backing_file": options.backing_file,
        "backing_format": None if options.backing_fmt is None else str(options.backing_fmt),
        "lazy_refcounts": options.lazy_refcounts,
        "extended_l2": options.extended_l2,
        "compression": str(options.compression_type),
        "preallocation": str(options.preallocation),
        "data_file_raw": options.data_file_raw,
    }
    new = creating.NewQcow2(options.file, options.size, options.data_file, encrypt, arguments)
    return creating.create_qcow2_image(context.graph, new)


def _luks(context: Context, options: CreateLuks) -> Coroutine[Any, Any, None]:
    if options.header is not None:
        raise BlockError("Detached LUKS headers are not supported")
    if options.file is None:
        raise BlockError("Either the parameter 'header' or 'file' must be specified")
    new = creating.NewLuks(options.file, options.size, options, options.preallocation)
    return creating.create_luks_image(context.graph, new)


_MAKERS: dict[type[QapiModel], Callable[[Context, Any], Coroutine[Any, Any, None]]] = {
    CreateFile: _file,
    CreateQcow2: _qcow2,
    CreateLuks: _luks,
}


async def _start(context: Context, job: OneStep) -> None:
    context.scheduler.create(job)
    await context.scheduler.start(job)


@command("blockdev-create", args=BlockdevCreate)
async def blockdev_create(context: Context, arguments: BlockdevCreate) -> None:
    """Make an image; a job does it, which is there until it is dismissed."""
    options = arguments.options
    maker = _MAKERS.get(type(options))
    if isinstance(options, CreateElsewhere) and options.driver not in drivers():
        raise BlockError(f"Block driver '{options.driver}' not found or not supported")
    if maker is None:
        raise BlockError("Driver does not support blockdev-create")

    async def work(_job: OneStep) -> None:
        await maker(context, options)

    await _start(context, Create(arguments.job_id, work))


# -- amend


class LuksKeyslotOptions(QapiModel):
    """What becomes of passphrases; ``iter-time`` in milliseconds."""

    state: KeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: Int64 | None = None
    iter_time: Int64 | None = None
    secret: str | None = None


class QCryptoBlockAmendOptions(QapiModel):
    """Changes of the encryption."""

    qapi_tag: ClassVar[str] = "format"

    format: QCryptoBlockFormat

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """LUKS alone has something to change."""
        return {"luks": QCryptoBlockAmendLuks}


class QCryptoBlockAmendLuks(QCryptoBlockAmendOptions, LuksKeyslotOptions):
    """LUKS."""


class BlockdevAmendOptions(QapiModel):
    """What is to be changed."""

    qapi_tag: ClassVar[str] = "driver"

    driver: BlockdevDriver

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The drivers that can."""
        return {"luks": AmendLuks, "qcow2": AmendQcow2}


class AmendLuks(BlockdevAmendOptions, LuksKeyslotOptions):
    """A LUKS image."""


class AmendQcow2(BlockdevAmendOptions):
    """A qcow2 image."""

    encrypt: QCryptoBlockAmendOptions | None = None


class BlockdevAmend(QapiModel):
    """Arguments of x-blockdev-amend."""

    job_id: str
    node_name: str
    options: BlockdevAmendOptions
    force: bool = False


@command("x-blockdev-amend", args=BlockdevAmend, features=("unstable",))
async def x_blockdev_amend(context: Context, arguments: BlockdevAmend) -> None:
    """Change an image in use; a job does it, which is there until it is dismissed."""
    options = arguments.options
    node = context.graph.lookup(None, arguments.node_name)
    name = node.driver_class.driver_name
    if options.driver != name:
        raise BlockError("x-blockdev-amend doesn't support changing the block driver")
    if not isinstance(options, AmendLuks | AmendQcow2):
        raise BlockError("Driver does not support x-blockdev-amend")
    slots: QapiModel | None = options if isinstance(options, AmendLuks) else options.encrypt

    async def work(_job: OneStep) -> None:
        if slots is None:
            return
        check_amendable(node, str(getattr(slots, "format", name)))
        assert isinstance(slots, LuksKeyslotOptions)
        await amend_encryption(
            context.graph, node, _amendment(context, slots), secret=slots.secret,
            force=arguments.force,
        )  # fmt: skip

    await _start(context, Amend(arguments.job_id, work))


def _amendment(context: Context, options: LuksKeyslotOptions) -> LuksAmendment:
    secret = context.graph.environment.secret
    return LuksAmendment(
        options.state,
        None if options.new_secret is None else secret(options.new_secret),
        None if options.old_secret is None else secret(options.old_secret),
        options.keyslot,
        options.iter_time,
    )
