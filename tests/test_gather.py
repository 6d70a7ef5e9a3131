"""Rows out of the page cache without what lies between them: real files, real system calls."""

import ctypes
import errno
import logging
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import shardstate
from reference import sides
from shardstate.coalesce import Piece, Read
from shardstate.errors import TruncatedFile
from shardstate.layout import Move, canonical
from shardstate.storage import Access, LocalStorage, Reading, gather
from shardstate.storage.adaptive import AdaptiveReader
from shardstate.targets import MemoryTarget, StoredDigests
from shardstate.targets.base import runs_of

ROW = 8192


@pytest.fixture
def file(tmp_path):
    """A file of 64 rows, in the page cache."""
    path = tmp_path / "f"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 64 * ROW, dtype=np.uint8).tobytes())
    return path


def share(rows=64, *, dest=1000, width=1000, dtype="U8"):
    """Return a read of some bytes of each row: from byte 100 on, to rows of `dest` bytes."""
    move = Move(100, 0, canonical([(rows, ROW, dest), (width, 1, 1)]))
    piece = Piece(0, 0, move, "U8", dtype, 0, 0)
    return Read("f", piece.begin, piece.end, (piece,))


def gathers(folder, target, read):
    """Return whether a read is gathered by a reader of its own."""
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        try:
            return reader.gather("f", read.begin, read.end, target.runs(read))
        finally:
            reader.close()


def expected(file, *, width=1000):
    rows = np.frombuffer(file.read_bytes(), dtype=np.uint8).reshape(-1, ROW)
    return rows[:, 100 : 100 + width]


@pytest.mark.parametrize("dest", [1000, 1100, 5000])
def test_rows_arrive_and_nothing_else_is_touched(file, dest):
    memory = np.full(64 * dest, 7, dtype=np.uint8)
    target = MemoryTarget([memory], digests=None)
    read = share(dest=dest)
    assert gathers(file.parent, target, read)
    found = memory.reshape(64, dest)
    assert (found[:, :1000] == expected(file)).all()
    assert (found[:, 1000:] == 7).all()


def test_more_rows_than_one_call_takes(tmp_path):
    count = 3 * gather.IOV_MAX + 5
    rows = np.random.default_rng(1).integers(0, 256, (count, ROW), dtype=np.uint8)
    (tmp_path / "f").write_bytes(rows.tobytes())
    memory = np.zeros(count * 8, dtype=np.uint8)
    target, read = MemoryTarget([memory], digests=None), share(count, dest=8, width=8)
    assert gathers(tmp_path, target, read)
    assert (memory.reshape(count, 8) == rows[:, 100:108]).all()


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40)),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 300)),
    pads=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    turned=st.booleans(),
    width=st.sampled_from(["U8", "BF16", "F32"]),
    base=st.integers(0, 4096),
)
def test_runs_are_what_the_move_says(sizes, gaps, pads, turned, width, base):
    outer, middle, inner = sizes
    near = 4096 + gaps[1]
    far = middle * near + gaps[0] * 4096
    row = inner + pads[0]
    loops = [(outer, far, middle * row + pads[1]), (middle, near, row), (inner, 1, 1)]
    if turned:  # as a transpose of the outer axes lies
        loops = [(outer, far, row), (middle, near, outer * row + pads[1]), (inner, 1, 1)]
    move = Move(3, 2, canonical(loops))
    piece = Piece(0, 0, move, width, width, 0, base)
    runs = runs_of(piece, 0)
    assert runs is not None
    itemsize = {"U8": 1, "BF16": 2, "F32": 4}[width]
    source, dest = (side * itemsize for side in sides(move))
    source += base
    found = {
        (int(begin) + i, int(place) + i)
        for begin, place in zip(runs.begins, runs.addresses, strict=True)
        for i in range(0, runs.nbytes, itemsize)
    }
    assert found == set(zip(source.tolist(), dest.tolist(), strict=True))
    assert len(runs.begins) * runs.nbytes == piece.nbytes
    assert runs.end == piece.end == max(source) + itemsize
    # In their order: what lies together is given to the kernel as one.
    assert runs.together == bool((np.diff(runs.addresses) == runs.nbytes).all())


def test_turned_axes_arrive_in_their_order(tmp_path):
    values = np.random.default_rng(3).integers(0, 256, (3, 5, ROW), dtype=np.uint8)
    (tmp_path / "f").write_bytes(values.tobytes())
    move = Move(0, 0, canonical([(3, 5 * ROW, 7), (5, ROW, 21), (7, 1, 1)]))
    piece = Piece(0, 0, move, "U8", "U8", 0, 0)
    memory = np.zeros(5 * 3 * 7, dtype=np.uint8)
    target = MemoryTarget([memory], digests=None)
    read = Read("f", piece.begin, piece.end, (piece,))
    assert gathers(tmp_path, target, read)
    assert (memory.reshape(5, 3, 7) == values[:, :, :7].transpose(1, 0, 2)).all()


def test_what_must_be_looked_at_or_lies_close_is_not_gathered():
    memory = np.zeros(1 << 16, dtype=np.uint8)
    read = share(4)
    assert MemoryTarget([memory], digests=None).runs(read) is not None
    assert MemoryTarget([memory], digests=StoredDigests([4 * ROW])).runs(read) is None
    cast = share(4, dtype="BOOL")
    assert MemoryTarget([memory], digests=None).runs(cast) is None
    for memory in (np.zeros(100, dtype=np.uint8), np.frombuffer(bytes(64000), dtype=np.uint8)):
        # Too small, or not to be written to: the kernel would not ask.
        assert MemoryTarget([memory], digests=None).runs(share()) is None
    close = Piece(0, 0, Move(0, 0, ((4, 4095, 9), (9, 1, 1))), "U8", "U8", 0, 0)
    assert runs_of(close, 0) is None


@pytest.mark.parametrize("end", [8 * ROW, 63 * ROW + 110])  # the latter within a page
def test_a_file_that_shrinks_is_an_error_and_kills_nobody(file, caplog, end):
    caplog.set_level(logging.INFO, logger="shardstate")
    memory = np.zeros(64000, dtype=np.uint8)
    target, read = MemoryTarget([memory], digests=None), share()
    with LocalStorage(file.parent) as storage:
        reader = storage.reader(2)
        assert reader.gather("f", read.begin, read.end, target.runs(read))
        os.truncate(file, end)  # what is mapped lies past the end now
        assert not reader.gather("f", read.begin, read.end, target.runs(read))
        assert "f: rows are read with what lies between them: [Errno 14] Bad address" in caplog.text
        with pytest.raises(TruncatedFile, match=f"ends at byte {end}"):
            reader.read_into("f", read.begin, [memoryview(bytearray(read.nbytes))])
        reader.close()


def test_a_file_that_was_shorter_when_it_was_mapped(file):
    read = share()
    target = MemoryTarget([np.zeros(64000, dtype=np.uint8)], digests=None)
    os.truncate(file, 8 * ROW)
    fd = os.open(file, os.O_RDONLY)
    mapped = gather.MappedFile(fd)
    with pytest.raises(OSError, match="Bad address"):
        mapped.gather(target.runs(read))
    mapped.close()
    os.close(fd)


def refusing(*_):
    ctypes.set_errno(errno.EPERM)
    return -1


@pytest.mark.parametrize(
    ("call", "why"), [(refusing, "Operation not permitted"), (None, "Function not implemented")]
)
def test_where_it_is_refused_rows_are_staged(checkpoint, monkeypatch, caplog, call, why):
    whole = shardstate.load(checkpoint, rank=1, tp=2, rules=RULES)
    caplog.set_level(logging.INFO, logger="shardstate")
    monkeypatch.setattr(gather, "_write", call)
    again = shardstate.load(checkpoint, rank=1, tp=2, rules=RULES)
    assert caplog.text.count("rows are read with what lies between them: [Errno") == 1
    assert why in caplog.text
    assert all((whole[name] == again[name]).all() for name in whole)


@pytest.fixture
def checkpoint(tmp_path):
    """An ordinary checkpoint with a matrix that is split by columns, in the page cache."""
    random = np.random.default_rng(2)
    tensors = {
        "down.weight": random.random((700, 4096), dtype=np.float32),
        "up.weight": random.random((64, 1024), dtype=np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


RULES = [
    {"match": "down.weight", "split": 1},
    {"match": "up.weight", "split": 0},
]


@pytest.mark.parametrize("direct", [None, True, False])
def test_loads_gather_what_the_page_cache_holds(checkpoint, monkeypatch, direct):
    gathered = []
    real = AdaptiveReader.gather

    def noted(*args):
        gathered.append(real(*args))
        return gathered[-1]

    monkeypatch.setattr(AdaptiveReader, "gather", noted)
    access = Access(reading=Reading(direct=direct))
    down = load_file(checkpoint / "model.safetensors")["down.weight"]
    for rank in range(2):
        found = shardstate.load(checkpoint, rank=rank, tp=2, rules=RULES, access=access)
        assert (found["down.weight"] == np.split(down, 2, axis=1)[rank]).all()
    assert any(gathered) == (direct is not True)
