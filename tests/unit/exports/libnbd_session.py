"""What libnbd says of our server; run with the system's Python, which has its module ``nbd``."""

import errno
import os
import sys

import nbd

DISK = f"nbd+unix:///disk?socket={sys.argv[1]}"
MI = 1 << 20


def connected(uri=DISK, contexts=(), structured=True):
    handle = nbd.NBD()
    handle.set_strict_mode(0)  # what is wrong is for the server to say
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle


def refused(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[expected], (error.errno, error.string, arguments[1:])
        return
    raise AssertionError(f"{call.__name__}{arguments[1:]} was not refused")


def extents(handle, offset, length, flags=0):
    found = {}

    def extent(context, at, entries, _error):
        assert at == offset
        found[context] = list(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, extent, flags)
    return found


def data():
    handle = connected(contexts=["base:allocation", "qemu:allocation-depth"])
    assert handle.get_structured_replies_negotiated()
    size = handle.get_size()
    content = os.urandom(3 * MI)
    handle.pwrite(content, 512)
    assert handle.pread(3 * MI, 512) == content
    handle.pwrite(content[:512], 512, nbd.CMD_FLAG_FUA)
    assert handle.pread(512, 512, nbd.CMD_FLAG_DF) == content[:512]
    kinds = set()
    handle.pread_structured(MI, 8 * MI, lambda _data, offset, kind, _error: kinds.add(kind) or 0)
    assert kinds == {nbd.READ_HOLE}, kinds
    kinds.clear()
    handle.pread_structured(
        MI, 8 * MI, lambda _data, offset, kind, _error: kinds.add(kind) or 0, nbd.CMD_FLAG_DF
    )
    assert kinds == {nbd.READ_DATA}, kinds
    handle.zero(MI, MI, nbd.CMD_FLAG_NO_HOLE)
    assert handle.pread(MI, MI) == bytearray(MI)
    handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    handle.trim(4096, 8192)
    handle.cache(MI, 0)
    handle.flush()
    found = extents(handle, 0, size)
    assert found["base:allocation"][-1][1] == 3 and found["qemu:allocation-depth"][-1][1] == 0
    assert len(extents(handle, 0, size, nbd.CMD_FLAG_REQ_ONE)["base:allocation"]) == 1
    handle.shutdown()


def refusals(structured):
    contexts = ["base:allocation"] if structured else []
    handle = connected(contexts=contexts, structured=structured)
    size = handle.get_size()
    for offset in (size, size - 511, 2**63):
        refused(errno.EINVAL, handle.pread, 512, offset)
        refused(errno.ENOSPC, handle.pwrite, bytes(512), offset)
        refused(errno.ENOSPC, handle.zero, 512, offset)
        refused(errno.EINVAL, handle.trim, 512, offset)
        refused(errno.EINVAL, handle.cache, 512, offset)
        refused(errno.EINVAL, handle.block_status, 512, offset, lambda *_: 0)
    refused(errno.EINVAL, handle.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, handle.pwrite, bytes(512), 0, nbd.CMD_FLAG_DF)
    assert handle.pread(512, 0) is not None
    handle.shutdown()
    handle = connected(DISK.replace("/disk", "/ro"), structured=structured)
    assert handle.is_read_only() and not handle.can_trim()
    refused(errno.EPERM, handle.pwrite, bytes(512), 0)
    refused(errno.EPERM, handle.pwrite, bytes(2 * MI), 0)
    refused(errno.EPERM, handle.trim, 512, 0)
    refused(errno.EPERM, handle.zero, 512, 0)
    refused(errno.EINVAL, handle.block_status, 512, 0, lambda *_: 0)
    assert handle.pread(512, 0) is not None
    handle.shutdown()


def negotiation():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(sys.argv[1])
    names = []
    assert handle.opt_list(lambda name, text: names.append((name, text)) or 0) == 3
    assert names == [("disk", ""), ("ram", ""), ("ro", "hello")], names
    handle.set_export_name("absent")
    refused(errno.ENOENT, handle.opt_info)
    handle.set_export_name("ro")
    handle.set_full_info(True)
    handle.opt_info()
    assert handle.get_export_description() == "hello"
    handle.set_export_name("disk")
    contexts = []
    handle.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation", "qemu:allocation-depth"], contexts
    handle.opt_go()
    assert handle.get_canonical_export_name() == "disk"
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MI
    handle.shutdown()


def pipeline():
    """Many requests at once, over two connections that see each other's writes."""
    handles = [connected(), connected()]
    assert all(h.can_multi_conn() for h in handles)
    size = 65536
    buffers, cookies = {}, []
    for i in range(64):
        content = bytes([i]) * size
        buffers[i] = nbd.Buffer.from_bytearray(bytearray(content))
        cookies.append((handles[i % 2], handles[i % 2].aio_pwrite(buffers[i], i * size)))
    for handle in handles:
        while handle.aio_in_flight():
            handle.poll(-1)
    assert all(handle.aio_command_completed(cookie) for handle, cookie in cookies)
    for i in range(64):
        assert handles[(i + 1) % 2].pread(size, i * size) == bytearray([i]) * size
    for handle in handles:
        handle.shutdown()


if not hasattr(nbd.NBD, "set_request_structured_replies"):
    sys.exit(77)
data()
refusals(True)
refusals(False)
negotiation()
pipeline()
