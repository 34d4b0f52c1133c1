"""Many writes by one system call store what writes one by one would."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveblockd.formats.qcow2 import new_tables
from liveblockd.storage import hostcalls, many_requests, many_writes
from liveblockd.storage.many_writes import Batch, write_many

PAGE = 4096


def batch_of(seed: int, count: int) -> Batch:
    """Pages here and there, one to three at a time, in any order, aligned."""
    rng = random.Random(seed)
    places = rng.sample(range(count * 4), count)
    lengths = np.array([rng.randint(1, 3) * PAGE for _ in places])
    data = np.frombuffer(hostcalls.aligned_buffer(int(lengths.sum())), np.uint8)
    data[:] = np.frombuffer(rng.randbytes(len(data)), np.uint8)
    return Batch(np.array(places) * 4 * PAGE, lengths, data)


def expected(batch: Batch) -> bytes:
    found = bytearray(max(offset + len(data) for offset, data in batch.writes()))
    for offset, data in batch.writes():
        found[offset : offset + len(data)] = data
    return bytes(found)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("way", ["together", "one by one", "cut short"])
def test_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, direct: bool
) -> None:
    if many_requests.context() is None:
        pytest.skip("no Linux AIO here")
    batch = batch_of(1, 600)  # more than one call takes
    one_by_one: list[int] = []

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def write(fd: int, offset: int, *rest: Any) -> None:
            one_by_one.append(offset)
            real(fd, offset, *rest)

        return write

    for name in ("write", "write_aligned"):
        monkeypatch.setattr(hostcalls, name, counted(getattr(hostcalls, name)))
    if way == "one by one":
        monkeypatch.setattr(many_writes, "context", lambda: None)
    elif way == "cut short":
        real = many_requests.Context.write

        def cut(own: many_requests.Context, fd: int, offsets: Any, *rest: Any) -> Any:
            found = real(own, fd, offsets, *rest)
            assert found is not None
            found[::7] -= 512
            return found

        monkeypatch.setattr(many_requests.Context, "write", cut)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
    try:
        fd = os.open(tmp_path / "file", flags)
    except OSError:
        pytest.skip("no O_DIRECT here")
    try:
        write_many(fd, batch, alignment=PAGE if direct else 0)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == expected(batch)
    counts = {"together": 0, "one by one": 600, "cut short": 37 + 37 + 13}
    assert len(one_by_one) == counts[way]


def test_an_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as caught:
            write_many(fd, batch_of(2, 3))
    finally:
        os.close(fd)
    assert caught.value.errno == ENOSPC


@pytest.mark.parametrize("seed", range(6))
def test_tables_are_what_their_entries_say(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fit into a buffer; a page of a table suffices where it is fresh."""
    rng = random.Random(seed)
    size = rng.choice((512, 4096, 65536))
    monkeypatch.setattr(new_tables, "BUFFER", rng.choice((512, 3 * 4096, 1 << 20)))
    count = 40
    entries: dict[int, dict[int, int]] = {}
    indices: list[int] = []
    bounds = [0]
    for table in range(count):
        chosen = sorted(rng.sample(range(size // 8), rng.choice((1, 1, 2, 5))))
        entries[table] = {index: (1000 + len(indices) + n) * size for n, index in enumerate(chosen)}
        indices += chosen
        bounds.append(len(indices))
    places = rng.sample(range(1, 3 * count), count)
    fresh = [rng.random() < 0.8 for _ in range(count)]
    hosts = np.array([host for table in entries.values() for host in table.values()], np.uint64)
    zero = np.array([rng.random() < 0.2 for _ in indices])
    made = new_tables.NewTables(
        np.arange(count),
        np.array(places, np.uint64) * np.uint64(size),
        fresh,
        bounds,
        np.array(indices),
        hosts,
    )
    file = bytearray(b"\xee" * (3 * count + 1) * size)
    for place, is_fresh in zip(places, fresh, strict=True):
        if is_fresh:
            file[place * size : (place + 1) * size] = bytes(size)
    written = 0
    for batch in new_tables.table_writes(made, zero, size):
        for offset, data in batch.writes():
            file[offset : offset + len(data)] = data
            written += len(data)
    number = 0
    for table, place in enumerate(places):
        want = [0] * (size // 8)
        for index, host in entries[table].items():
            want[index] = 1 if zero[number] else host | 1 << 63
            number += 1
        found = np.frombuffer(bytes(file[place * size : (place + 1) * size]), ">u8").tolist()
        assert found == want, f"table {table} of seed {seed}"
    assert written <= count * size
    if size > PAGE:
        assert written < count * size
