"""Compressed clusters: raw deflate with a window of 4 KiB, or zstd frames.

Specification: docs/interop/qcow2, "Compressed Clusters Descriptor", "compression_type".

Runs on: workers; both libraries let go of the GIL. Invariants: never more than a cluster comes out,
whatever the data claims to hold, and the time is bounded. Errors: OSError(EIO) for what is none.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import zlib
from errno import EIO
from typing import Any

from liveblockd.formats.qcow2.layout import Compression
from liveblockd.storage.driver import Buffer

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:  # a dependency, but images without zstd do well without it
    HAS_ZSTD = False
else:
    HAS_ZSTD = True

#: zstd frames of one cluster; every known writer makes one
MAX_FRAMES = 256
#: of the extra ``speed``: the same answers, two to three times as fast
fast_zlib: Any = None
with contextlib.suppress(ImportError):
    fast_zlib = importlib.import_module("isal.isal_zlib")

_WINDOW_BITS = -12  # raw deflate, as in every qcow2 image


def inflate(data: Buffer, length: int, compression: int) -> bytes:
    """The ``length`` bytes of a compressed cluster; ``data`` may go on behind it."""
    try:
        if compression == Compression.ZSTD:
            result = _inflate_zstd(data, length)
        else:
            result = _inflate_deflated(data, length)
    except zlib.error as error:
        raise _damaged(error) from None
    if len(result) != length:
        raise OSError(EIO, "a compressed cluster is cut off")
    return result


def _inflate_deflated(data: Buffer, length: int) -> bytes:
    """What zlib makes of it; if the faster library can't, zlib says so."""
    if fast_zlib is not None:
        with contextlib.suppress(Exception):
            fast: bytes = fast_zlib.decompressobj(_WINDOW_BITS).decompress(data, length)
            if len(fast) == length:
                return fast
    return zlib.decompressobj(_WINDOW_BITS).decompress(data, length)


def _damaged(error: Exception) -> OSError:
    return OSError(EIO, f"a compressed cluster is damaged: {error}")


def _inflate_zstd(data: Buffer, length: int) -> bytes:
    """Frame after frame until there is enough.

    What is left of the input is copied at every frame: a stranger's million tiny ones took minutes.
    """
    result = b""
    for _ in range(MAX_FRAMES):
        decompressor = zstd.ZstdDecompressor()
        try:
            result += decompressor.decompress(data, length - len(result))
        except zstd.ZstdError as error:
            raise _damaged(error) from None
        data = decompressor.unused_data
        if len(result) >= length or not decompressor.eof or not data:
            return result
    raise OSError(EIO, "a compressed cluster has too many frames")


def deflate(data: Buffer, cluster_size: int, compression: int) -> bytes | None:
    """``data``, padded with zeros to a cluster, compressed; None where that saves nothing."""
    if len(data) < cluster_size:
        data = bytes(data).ljust(cluster_size, b"\0")
    if compression == Compression.ZSTD:
        result = zstd.compress(data)
    else:
        compressor = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS)
        result = compressor.compress(data) + compressor.flush()
    return result if len(result) < cluster_size else None
