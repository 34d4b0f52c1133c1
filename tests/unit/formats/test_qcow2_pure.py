"""The pure modules: bytes to values and back, and models that are simpler than the code."""

from __future__ import annotations

import itertools
import random
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2 import subclusters
from liveblockd.formats.qcow2.allocator import (
    BlockNeeded,
    Refcounts,
    pack_counts,
    unpack_counts,
)
from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.header import (
    Header,
    feature_name_table,
    parse,
    relink,
    serialise,
)
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, ZERO, Geometry
from liveblockd.formats.qcow2.mapping import append_extent, in_place, kind_of, runs
from liveblockd.formats.qcow2.newimage import NewImage, lay_out
from liveblockd.formats.qcow2.quarantine import Quarantine
from liveblockd.formats.qcow2.snapshots import Incomplete, parse_snapshots
from liveblockd.formats.qcow2.tables import (
    CompressedRange,
    DamageError,
    bad_l1_entries,
    bad_l2_entries,
    bad_refcount_table_entries,
    compressed_entry,
    compressed_range,
    from_disk,
    to_disk,
)
from liveblockd.storage.driver import Extent, ExtentKind

# -- the header

V3 = Header(
    version=3,
    cluster_bits=16,
    size=1 << 20,
    l1_size=1,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
)

V3_BYTES = bytes.fromhex(
    "514649fb 00000003 0000000000000000 00000000 00000010 0000000000100000 00000000 00000001"
    "0000000000030000 0000000000010000 00000001 00000000 0000000000000000"
    "0000000000000000 0000000000000000 0000000000000000 00000004 00000070 0000000000000000"
    "0000000000000000"
)
V2_BYTES = bytes.fromhex(
    "514649fb 00000002 0000000000000060 00000001 00000009 0000000000a00000 00000000 00000140"
    "0000000000000600 0000000000000200 00000001 00000000 0000000000000000"
    "e2792aca 00000003 7261770000000000 0000000000000000 78"
)


def test_version_3_vector() -> None:
    assert parse(V3_BYTES) == V3
    assert serialise(V3) == V3_BYTES


def test_version_2_vector() -> None:
    header = parse(V2_BYTES)
    assert (header.version, header.cluster_bits, header.size) == (2, 9, 10 << 20)
    assert (header.l1_size, header.l1_table_offset) == (0x140, 0x600)
    assert (header.backing_name, header.backing_format) == ("x", "raw")
    assert header.refcount_order == 4
    assert serialise(header) == V2_BYTES


@pytest.mark.parametrize("length", range(len(V2_BYTES)))
def test_a_header_cut_off_anywhere_is_refused_or_read(length: int) -> None:
    try:
        parse(V2_BYTES[:length])
    except BlockError:
        assert length < len(V2_BYTES)


extensions = st.lists(
    st.tuples(st.integers(1, 0xFFFFFFFF).filter(lambda k: k != 0xE2792ACA), st.binary(max_size=40)),
    max_size=4,
)


@given(
    st.integers(9, 21),
    st.integers(0, 6),
    st.one_of(st.none(), st.binary(min_size=1, max_size=200).filter(lambda n: b"\0" not in n)),
    extensions,
    st.integers(0, 3),
    st.binary(max_size=3).map(lambda b: b * 8),
)
def test_headers_come_back(
    bits: int,
    order: int,
    name: bytes | None,
    extra: list[tuple[int, bytes]],
    autoclear: int,
    unknown: bytes,
) -> None:
    size = 1 << bits
    header = Header(
        version=3, cluster_bits=bits, size=size, l1_size=1, l1_table_offset=3 * size,
        refcount_table_offset=size, refcount_table_clusters=1, refcount_order=order,
        autoclear=autoclear, header_length=112 + len(unknown), unknown_fields=unknown,
        backing_file=name, extensions=tuple(extra),
    )  # fmt: skip
    try:
        data = serialise(header)
    except BlockError:
        assert bits < 10
        return
    again = parse(data.ljust(size, b"\0"))
    assert replace(again, backing_file_offset=0) == header
    assert serialise(again) == data


@given(st.binary(max_size=200), st.integers(0, 200))
def test_headers_with_wrong_bytes_are_refused_in_words(noise: bytes, at: int) -> None:
    data = bytearray(V3_BYTES.ljust(65536, b"\0"))
    data[at : at + len(noise)] = noise
    try:
        parse(bytes(data))
    except BlockError as error:
        assert error.message


def test_unknown_features_are_named_by_the_image() -> None:
    table = bytes((0, 5)) + b"frobnication".ljust(46, b"\0") + bytes((1, 6)) + b"no".ljust(46)
    header = replace(V3, incompatible=1 << 5 | 1 << 6, extensions=((0x6803F857, table),))
    with pytest.raises(BlockError) as caught:
        parse(serialise(header))
    assert caught.value.message == (
        "Unsupported qcow2 feature(s): frobnication, Unknown incompatible feature: 40"
    )


@given(
    st.sampled_from((9, 10, 12, 16)),
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text("abc/", min_size=1, max_size=1000)),
            st.sampled_from((None, "raw", "qcow2")),
        ),
        max_size=5,
    ),
)
def test_relinking_keeps_everything_else(bits: int, links: list[tuple[str, str]]) -> None:
    size = 1 << bits
    header = Header(
        version=3, cluster_bits=bits, size=size, l1_size=1, l1_table_offset=3 * size,
        refcount_table_offset=size, refcount_table_clusters=1,
        extensions=((0x6803F857, feature_name_table()), (0x12345678, b"keep me")),
    )  # fmt: skip
    if bits == 9:
        header = replace(header, extensions=header.extensions[1:])
    disk = bytearray(serialise(header).ljust(size, b"\0"))
    header = parse(bytes(disk))
    for name, backing_format in links:
        try:
            rewrite = relink(header, name.encode() if name else None, backing_format)
        except BlockError:
            assert name
            assert bits < 12
            continue
        for offset, data in rewrite.steps:
            assert offset + len(data) <= size
            assert len(rewrite.steps) == 1 or offset or len(data) == 512
            disk[offset : offset + len(data)] = data
        header = parse(bytes(disk))
        assert header == rewrite.header
        assert header.backing_name == name
        assert header.backing_format == (backing_format if name else None)
        assert header.extension(0x12345678) == b"keep me"


# -- entries

GEOMETRIES = [Geometry(3, bits, 4) for bits in (9, 12, 16, 21)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: str(g.cluster_bits))
def test_entries_that_cannot_be(geometry: Geometry) -> None:
    size = geometry.cluster_size
    good = [0, ZERO, COPIED | 5 * size, 5 * size, COPIED | ZERO | 5 * size, COMPRESSED | 5 * size]
    bad = [2, 1 << 57, 1 << 61, COMPRESSED | COPIED | 5 * size, COMPRESSED]
    if size > 512:
        bad.append(COPIED | 5 * size | 512)
    table = np.array([*good, *bad], np.uint64)
    assert bad_l2_entries(table, geometry).tolist() == list(range(len(good), len(table)))
    old = Geometry(2, geometry.cluster_bits, 4)
    assert bad_l2_entries(np.array([ZERO], np.uint64), old).tolist() == [0]
    l1 = np.array([0, COPIED | size, size, size | 1, 1 << 60 | size, 1 << 56], np.uint64)
    assert bad_l1_entries(l1, geometry).tolist() == [3, 4, 5]
    blocks = np.array([0, size, size | 1, 1 << 63], np.uint64)
    assert bad_refcount_table_entries(blocks, geometry).tolist() == [2, 3]


@given(st.sampled_from(GEOMETRIES), st.data())
def test_compressed_descriptors_come_back(geometry: Geometry, data: st.DataObject) -> None:
    host = data.draw(st.integers(geometry.cluster_size, (1 << 40) - 1))
    sectors = data.draw(st.integers(1, geometry.cluster_size // 512))
    place = CompressedRange(host, sectors * 512 - host % 512)
    entry = compressed_entry(place, geometry)
    assert compressed_range(entry, geometry) == place
    assert kind_of(entry) is ExtentKind.COMPRESSED
    assert not in_place(entry)


def test_a_compressed_vector() -> None:
    # 64 KiB clusters: x = 54; offset 0x50123, one additional sector
    entry = 1 << 62 | 1 << 54 | 0x50123
    assert compressed_range(entry, Geometry(3, 16, 4)) == (0x50123, 1024 - 0x123)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_tables_come_back(values: list[int]) -> None:
    table = from_disk(struct.pack(f">{len(values)}Q", *values))
    assert table.tolist() == values
    assert from_disk(to_disk(table)).tolist() == values


entry_values = st.one_of(
    st.sampled_from((0, ZERO)),
    st.integers(1, 12).map(lambda n: COPIED | n << 16),
    st.integers(1, 12).map(lambda n: n << 16),
    st.integers(1, 12).map(lambda n: COPIED | ZERO | n << 16),
    st.integers(1, 12).map(lambda n: COMPRESSED | n << 16 | 77),
)


@given(st.lists(entry_values, min_size=1, max_size=40), st.data())
def test_runs_are_those_of_a_slow_loop(values: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(1, len(values) - first))
    expected: list[Extent] = []
    for value in values[first : first + count]:
        kind = kind_of(value)
        host = value & 0x00FFFFFFFFFFFE00 if kind is ExtentKind.DATA else -1
        append_extent(expected, Extent(65536, kind, host))
    found = runs(np.array(values, np.uint64), None, first << 16, count << 16, 16)
    assert [(r.length, r.kind, r.host_offset) for r in found] == expected
    assert found[0].start == first << 16
    assert all(a.start + a.length == b.start for a, b in itertools.pairwise(found))


def subcluster_kinds(word: int, bitmap: int) -> list[Extent]:
    """Word for word as in the specification; clusters of 64 KiB."""
    if word & COMPRESSED:
        return [Extent(2048, ExtentKind.COMPRESSED)] * 32
    found = []
    for number in range(32):
        if bitmap >> number & 1:
            host = (word & 0x00FFFFFFFFFFFE00) + 2048 * number
            found.append(Extent(2048, ExtentKind.DATA, host))
        elif bitmap >> 32 >> number & 1:
            found.append(Extent(2048, ExtentKind.ZERO))
        else:
            found.append(Extent(2048, ExtentKind.UNALLOCATED))
    return found


@st.composite
def extended_entries(draw: st.DrawFn) -> tuple[int, int]:
    """First word and bitmap."""
    kind = draw(st.sampled_from(("none", "compressed", "plain", "zero", "preallocated", "mixed")))
    word = draw(st.integers(1, 12)) << 16 | draw(st.sampled_from((0, COPIED)))
    if kind == "none":
        return 0, 0
    if kind == "compressed":  # bits 0 and 1 are part of the offset here
        return COMPRESSED | word & ~COPIED | draw(st.integers(0, 3)), 0
    bitmap = {"plain": (1 << 32) - 1, "zero": ((1 << 32) - 1) << 32}.get(kind, 0)
    if kind == "mixed":
        zero = draw(st.integers(0, (1 << 32) - 1))
        bitmap = zero << 32 | draw(st.integers(0, (1 << 32) - 1)) & ~zero
    if not bitmap & (1 << 32) - 1 and draw(st.booleans()):
        word = 0
    return word, bitmap


@given(st.lists(extended_entries(), min_size=1, max_size=20), st.data())
def test_runs_of_subclusters(values: list[tuple[int, int]], data: st.DataObject) -> None:
    disk = b"".join(struct.pack(">QQ", *value) for value in values)
    words, bitmaps = subclusters.from_disk(disk)
    entries = subclusters.summaries(words, bitmaps)
    assert subclusters.to_disk(entries, bitmaps) == disk
    assert not len(subclusters.bad_bitmaps(words, bitmaps))
    first = data.draw(st.integers(0, len(values) * 32 - 1))
    count = data.draw(st.integers(1, len(values) * 32 - first))
    expected: list[Extent] = []
    for extent in [e for value in values for e in subcluster_kinds(*value)][first : first + count]:
        append_extent(expected, extent)
    found = runs(entries, bitmaps, first * 2048, count * 2048, 16)
    assert [Extent(r.length, r.kind, r.host_offset) for r in found] == expected
    uniform = np.array([not subclusters.has_mixed(entries[i : i + 1]) for i in range(len(values))])
    assert (subclusters.bitmaps_of(entries)[uniform] == bitmaps[uniform]).all()


@given(st.integers(1, (1 << 32) - 1))
def test_lowest_run(bits: int) -> None:
    first, end = subclusters.lowest_run(bits)
    text = f"{bits:032b}"[::-1]
    assert first < end
    assert text[:end] == "0" * first + "1" * (end - first) and text[end : end + 1] != "1"
    assert subclusters.mask(first, end) & ~bits == 0


def test_bitmaps_that_cannot_be() -> None:
    pairs = [(COPIED | 65536, 1 << 32 | 1), (0, 1), (0, 1 << 32), (COPIED | 65536, 1)]
    words, bitmaps = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    assert subclusters.bad_bitmaps(words, bitmaps).tolist() == [0, 1]


# -- refcounts


@pytest.mark.parametrize("order", range(7))
def test_refcounts_on_disk(order: int) -> None:
    rng = random.Random(order)
    bits = 1 << order
    counts = [rng.randrange(1 << bits) for _ in range(512 * 8 // bits)]
    number = 0
    if bits < 8:  # bit 0 is the least significant: the bytes are little endian numbers
        for index, value in enumerate(counts):
            number |= value << index * bits
        data = number.to_bytes(512, "little")
    else:
        data = b"".join(value.to_bytes(bits // 8, "big") for value in counts)
    assert unpack_counts(data, order).tolist() == counts
    assert pack_counts(unpack_counts(data, order), order) == data


def new_refcounts(order: int, clusters_in_use: int = 4) -> Refcounts:
    geometry = Geometry(3, 9, order)
    table = np.zeros(64, np.uint64)
    table[0] = 1024
    refcounts = Refcounts(geometry, table, 512)
    counts = np.zeros(geometry.refcounts_per_block, np.uint64)
    counts[:clusters_in_use] = 1
    refcounts.add_block(0, pack_counts(counts, order))
    refcounts.add_metadata(0, clusters_in_use)
    return refcounts


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((0, 3, 4, 6)), st.integers(0, 1 << 32))
def test_the_allocator_against_a_set(order: int, seed: int) -> None:
    rng = random.Random(seed)
    refcounts = new_refcounts(order)
    owned: Counter[int] = Counter({0: 1, 1: 1, 2: 1, 3: 1})
    for _ in range(150):
        choice = rng.random()
        if choice < 0.6:
            wanted = rng.choice((1, 1, 3, 40))
            host, found = refcounts.allocate(wanted)
            assert 1 <= found <= wanted
        elif choice < 0.7:
            found = rng.choice((1, 2, 70))
            host = refcounts.allocate_exactly(found)
        else:
            loose = [c for c in owned if c not in refcounts.metadata]
            if loose:
                cluster = rng.choice(loose)
                refcounts.decrement(cluster, 1)
                del owned[cluster]
            continue
        for cluster in range(host >> 9, (host >> 9) + found):
            assert not owned[cluster], "handed out twice"
            assert cluster not in refcounts.metadata
            owned[cluster] += 1
    owned.update({c: 1 for c in refcounts.metadata.array().tolist() if c not in owned})
    retired = {c for host, n in refcounts.retired for c in range(host >> 9, (host >> 9) + n)}
    for index, block in refcounts.blocks.items():
        base = index * refcounts.geometry.refcounts_per_block
        in_use = {base + n for n in np.flatnonzero(block.counts).tolist()}
        span = range(base, base + refcounts.geometry.refcounts_per_block)
        assert in_use == {c for c in span if owned[c] or c in retired}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from((0, 3, 4, 6)), st.integers(0, 1 << 32))
def test_one_cluster_is_taken_as_the_general_way_takes_it(order: int, seed: int) -> None:
    rng = random.Random(seed)
    quick, general = new_refcounts(order), new_refcounts(order)
    general._take_next = lambda: 0  # type: ignore[method-assign]
    taken = []
    take = quick._take_next
    quick._take_next = lambda: taken.append(take()) or taken[-1]  # type: ignore[method-assign]
    owned: list[int] = []
    for _ in range(200):
        choice = rng.random()
        if choice < 0.7:
            count = rng.choice((1, 1, 1, 5))
            host, found = quick.allocate(count)
            assert (host, found) == general.allocate(count)
            owned += range(host >> 9, (host >> 9) + found)
        elif owned:
            cluster = owned.pop(rng.randrange(len(owned)))
            quick.decrement(cluster, 1)
            general.decrement(cluster, 1)
        assert quick.blocks.keys() == general.blocks.keys()
        for index, block in quick.blocks.items():
            other = general.blocks[index]
            assert block.counts.tolist() == other.counts.tolist()
            assert (block.dirty.low, block.dirty.high) == (other.dirty.low, other.dirty.high)
    assert sum(map(bool, taken)) > 40


def test_no_metadata_is_taken_and_nothing_beyond_the_last_cluster() -> None:
    refcounts = new_refcounts(4)
    refcounts.add_metadata(5 * 512, 1)
    assert refcounts.allocate(1) == (4 * 512, 1)
    with pytest.raises(DamageError):
        refcounts.allocate(1)
    assert refcounts.refcount(5) == 0
    refcounts = new_refcounts(4)
    assert refcounts._take_next() == 0, "in use"
    assert refcounts.allocate(1) == (4 * 512, 1)
    refcounts._end = 6
    assert [refcounts._take_next() for _ in range(3)] == [5, 0, 0]


@pytest.mark.parametrize("count", [63, 64, 70, 200, 5000])
def test_more_adjacent_clusters_than_a_block_describes(count: int) -> None:
    refcounts = new_refcounts(6)  # 64 refcounts in a block, 64 blocks in the table
    refcounts.allocate(2)
    host = refcounts.allocate_exactly(count)
    first = host >> 9
    assert all(refcounts.refcount(c) == 1 for c in range(first, first + count))
    assert refcounts.metadata.isdisjoint(range(first, first + count))
    assert len(refcounts.blocks) < count // 60 + 8
    assert refcounts.allocate(1)[0] < host, "what was passed by is still there to be used"


def test_blocks_are_asked_for_and_nothing_changes_before() -> None:
    geometry = Geometry(3, 9, 4)
    table = np.zeros(64, np.uint64)
    table[:2] = 1024, 2048
    refcounts = Refcounts(geometry, table, 512)
    with pytest.raises(BlockNeeded) as needed:
        refcounts.allocate(1)
    assert needed.value.index == 0
    refcounts.add_block(0, pack_counts(np.ones(256, np.uint16), 4))
    with pytest.raises(BlockNeeded) as needed:
        refcounts.allocate(5)
    assert needed.value.index == 1
    refcounts.add_block(1, pack_counts(np.zeros(256, np.uint16), 4))
    assert refcounts.allocate(5) == (256 * 512, 5)
    with pytest.raises(DamageError):
        refcounts.decrement(300, 1)
    assert refcounts.refcount(256) == 1


def test_what_is_sealed_is_what_the_disk_lacks() -> None:
    rng = random.Random(1)
    refcounts = new_refcounts(6)
    disk = bytearray(64 << 20)
    for round_number in range(40):
        for _ in range(rng.randrange(60)):
            host, found = refcounts.allocate(rng.randrange(1, 5))
            if rng.random() < 0.3:
                refcounts.decrement(host >> 9, found)
        sealed = refcounts.seal()
        if round_number % 5 == 3:  # a failure: all of it must come again
            refcounts.reopen(sealed)
            continue
        for _, write in sealed.new:
            disk[write.offset : write.offset + 512] = write.data
        for _, _, write in sealed.blocks:
            disk[write.offset : write.offset + len(write.data)] = write.data
        for block, _ in sealed.new:
            block.is_new = False
        for write in sealed.table:
            disk[write.offset : write.offset + len(write.data)] = write.data
        refcounts.table_unwritten = False
    sealed = refcounts.seal()
    for write in (*(w for _, w in sealed.new), *(w for _, _, w in sealed.blocks), *sealed.table):
        disk[write.offset : write.offset + len(write.data)] = write.data
    assert not refcounts.is_dirty or refcounts.table_unwritten
    for index, block in refcounts.blocks.items():
        offset = refcounts.block_offset(index)
        assert unpack_counts(disk[offset : offset + 512], 6).tolist() == block.counts.tolist()
    place = refcounts.table_offset
    size = len(refcounts.table) * 8
    held = from_disk(bytes(disk[place : place + size])).tolist()
    assert [h for h in held if h] == [t for t in refcounts.table.tolist() if t][1:] or (
        held == refcounts.table.tolist()
    )


# -- quarantine, claims


def test_quarantine_waits_for_commit_and_for_requests() -> None:
    quarantine = Quarantine()
    old = quarantine.enter()
    quarantine.free(512, 1, unmap=False)
    assert quarantine.ready() == []
    batch = quarantine.seal()
    young = quarantine.enter()
    assert quarantine.ready() == []
    quarantine.committed(batch)
    assert quarantine.ready() == [], "a request of its time is still under way"
    assert quarantine.leave(old)
    assert [f.host_offset for f in quarantine.ready()] == [512]
    assert quarantine.ready() == []
    assert not quarantine.leave(young)
    assert quarantine.is_empty


def test_quarantine_keeps_what_a_failed_commit_took() -> None:
    quarantine = Quarantine()
    quarantine.free(512, 1, unmap=False)
    batch = quarantine.seal()
    quarantine.free(1024, 1, unmap=True)
    quarantine.failed(batch)
    assert quarantine.ready() == []
    assert quarantine.has_freed
    quarantine.committed(quarantine.seal())
    assert [f.host_offset for f in quarantine.ready()] == [512, 1024]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=6), st.data())
def test_claims_against_a_set(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    claims = Claims()
    held: set[int] = set()
    for first, count in ranges:
        wanted = set(range(first, first + count))
        if held & wanted:
            assert claims.first_held(first, count) == min(held & wanted)
            continue
        claim = claims.take(first, count)
        keep = data.draw(st.integers(1, count))
        claims.shrink(claim, keep)
        held |= set(range(first, first + keep))
    for first in range(32):
        for count in (1, 3, 40):
            free = next((n for n in range(count) if first + n in held), count)
            assert claims.free_count(first, count) == free
    assert len(claims) == len(held)


# -- new images and snapshots


@pytest.mark.parametrize("bits", range(7))
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_new_images_describe_themselves(bits: int, cluster_size: int) -> None:
    size = min(60 << 30, cluster_size * cluster_size * 100)
    layout = lay_out(NewImage(size=size, cluster_size=cluster_size, refcount_bits=1 << bits))
    header = parse(layout.header)
    assert header.size == size
    table, blocks, l1 = layout.tables
    end = l1.offset + len(l1.data)
    assert table.offset == header.refcount_table_offset
    assert l1.offset == header.l1_table_offset
    assert (table.offset + len(table.data), blocks.offset + len(blocks.data)) == (
        blocks.offset,
        l1.offset,
    )
    counts = unpack_counts(blocks.data, bits)
    assert counts[: end // cluster_size].all()
    assert not counts[end // cluster_size :].any()


def test_snapshot_tables_that_cannot_be() -> None:
    geometry = Geometry(3, 16, 4)
    good = struct.pack(">QIHHIIQII", 0x50000, 1, 1, 3, 5, 6, 7, 0, 16)
    data = good + struct.pack(">QQ", 1 << 40, 1 << 20) + b"1one"
    (snapshot,), length = parse_snapshots(data.ljust(64, b"\0"), 1, geometry)
    assert length == 64
    assert (snapshot.id, snapshot.name) == ("1", "one")
    assert (snapshot.vm_state_size, snapshot.disk_size) == (1 << 40, 1 << 20)
    for end in range(len(data)):
        with pytest.raises(Incomplete):
            parse_snapshots(data[:end], 1, geometry)
    for bad in (
        struct.pack(">QIHHIIQII", 0x50001, 1, 1, 3, 5, 6, 7, 0, 16),
        struct.pack(">QIHHIIQII", 0x50000, 1 << 30, 1, 3, 5, 6, 7, 0, 16),
        struct.pack(">QIHHIIQII", 0x50000, 1, 1, 3, 5, 6, 7, 0, 5000),
    ):
        with pytest.raises(BlockError):
            parse_snapshots(bad + bytes(100), 1, geometry)
