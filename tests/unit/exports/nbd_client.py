"""A small NBD client for tests: sends what it is told to, right or wrong."""

import asyncio
import contextlib
import struct

from liveblockd.nbd.constants import ChunkType, Command, Option, OptionReply
from liveblockd.nbd.transmission import Chunk, Request, SimpleReply, parse_reply

OPTION_MAGIC = 0x49484156454F5054


def text(value):
    data = value.encode()
    return struct.pack(">I", len(data)) + data


def option_bytes(option, data=b""):
    return struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.input = b""
        self.reads = {}  # lengths of reads by cookie, for simple replies
        self.structured = False
        self.cookie = 0

    @classmethod
    async def greeted(cls, path):
        reader, writer = await asyncio.open_unix_connection(str(path))
        client = cls(reader, writer)
        await reader.readexactly(18)
        writer.write(struct.pack(">I", 3))
        return client

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, path, name, *, structured=True, contexts=()):
        client = await cls.greeted(path)
        try:
            await client.choose(name, structured=structured, contexts=contexts)
            yield client
        finally:
            client.close()

    async def choose(self, name, *, structured=True, contexts=()):
        if structured:
            await self.option(Option.STRUCTURED_REPLY)
            self.structured = True
        if contexts:
            queries = b"".join(map(text, contexts))
            data = text(name) + struct.pack(">I", len(contexts)) + queries
            await self.option(Option.SET_META_CONTEXT, data)
        replies = await self.option(Option.GO, text(name) + b"\0\0")
        self.size, self.flags = struct.unpack(">QH", replies[-2][1][2:])

    async def option(self, option, data=b""):
        self.writer.write(option_bytes(option, data))
        replies = []
        while True:
            head = await self.reader.readexactly(20)
            _, _, kind, length = struct.unpack(">QIII", head)
            replies.append((OptionReply(kind), await self.reader.readexactly(length)))
            if kind & 0x80000000:
                raise ConnectionRefusedError(OptionReply(kind).name)
            if kind == OptionReply.ACK:
                return replies

    def close(self):
        self.writer.close()

    # -- requests

    def send(self, command, offset=0, length=0, flags=0, payload=b""):
        self.cookie += 1
        if command == Command.READ:
            self.reads[self.cookie] = length
        request = Request(flags, command, self.cookie, offset, length)
        self.writer.write(request.to_bytes() + payload)
        return self.cookie

    async def reply(self):
        """The next reply: SimpleReply, Chunk, or (SimpleReply, data) of a READ that went well."""
        while (found := parse_reply(self.input)) is None:
            await self._more()
        reply, used = found
        self.input = self.input[used:]
        if isinstance(reply, SimpleReply) and not reply.error and reply.cookie in self.reads:
            length = self.reads[reply.cookie]
            while len(self.input) < length:
                await self._more()
            data, self.input = self.input[:length], self.input[length:]
            return reply, data
        return reply

    async def _more(self):
        data = await self.reader.read(1 << 20)
        if not data:
            raise EOFError
        self.input += data

    async def done(self, cookie):
        """(error, what came) of the request with that cookie, which must be the next answered."""
        content = []
        while True:
            reply = await self.reply()
            if isinstance(reply, tuple) and not hasattr(reply, "cookie"):
                assert reply[0].cookie == cookie
                return 0, reply[1]
            assert reply.cookie == cookie
            if isinstance(reply, SimpleReply):
                return reply.error, None
            assert isinstance(reply, Chunk)
            match reply.type:
                case ChunkType.OFFSET_DATA:
                    content.append(reply.data()[1])
                case ChunkType.OFFSET_HOLE:
                    content.append(bytes(reply.hole()[1]))
                case ChunkType.BLOCK_STATUS:
                    content.append(reply.extents())
                case ChunkType.ERROR:
                    assert reply.error()[1], "an error has a message"
                    return reply.error()[0], None
            if reply.done:
                if content and isinstance(content[0], bytes):
                    return 0, b"".join(content)
                return 0, content

    async def ask(self, command, offset=0, length=0, flags=0, payload=b""):
        return await self.done(self.send(command, offset, length, flags, payload))

    async def read(self, offset, length, flags=0):
        error, data = await self.ask(Command.READ, offset, length, flags)
        assert error == 0
        return data or b""

    async def write(self, offset, data, flags=0):
        error, _ = await self.ask(Command.WRITE, offset, len(data), flags, data)
        assert error == 0

    async def ended(self):
        """The server closes the connection, sending nothing more."""
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(self.reader.read(1), 30) == b""
