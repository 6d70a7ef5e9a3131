"""The engine against real files: counters, errors, interruption, bounded memory."""

import os
import signal
import threading
import time

import numpy as np
import pytest

import shardstate
from shardstate.api import planning
from shardstate.catalog import Tensors, catalog_of
from shardstate.coalesce import plan_reads
from shardstate.digest import BLOCK_BYTES
from shardstate.engine import STAGING_BYTES, execute
from shardstate.errors import OutOfMemory, StorageError, TruncatedFile
from shardstate.header import PREFIX_BYTES, Header, parse_header, serialise_header
from shardstate.layout import Move, Region
from shardstate.plan import Copy, Fill, Literal, make_plan, plan_identity
from shardstate.storage import LocalStorage, locate
from shardstate.targets import (
    CompareTarget,
    DigestTarget,
    MemoryTarget,
    StoredDigests,
    allocate,
    files,
)
from storages import BufferedStorage

LIMITS = {"piece_bytes": BLOCK_BYTES, "read_bytes": 2 * BLOCK_BYTES, "max_gap_bytes": 1 << 18}


def write(path, tensors):
    """Write {name: (tag, array)} as one safetensors file; return its catalog."""
    rows = [(name, tag, array.shape, array.nbytes) for name, (tag, array) in tensors.items()]
    header = serialise_header(rows, metadata={}, align=8)
    path.write_bytes(header + b"".join(array.tobytes() for _, array in tensors.values()))
    size = path.stat().st_size
    parsed = parse_header(header[PREFIX_BYTES:], file=path.name, file_bytes=size)
    return catalog_of([(path.name, size, parsed)], weight_map=None)


def memory_of(tensors, *, digests=False):
    """Return fresh arrays and the target that fills them."""
    arrays = allocate(tensors)
    sizes = [tensors.nbytes(row) for row in range(len(tensors))]
    views = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
    return arrays, MemoryTarget(views, digests=StoredDigests(sizes) if digests else None)


def run(plan, storage, target, *, threads=3, in_dest_order=False, progress=None):
    reads = plan_reads([plan], in_dest_order=in_dest_order, **LIMITS)
    return execute(
        reads,
        storage=storage,
        target=target,
        threads=threads,
        progress=progress,
        fills_memory=isinstance(target, MemoryTarget),
    )


@pytest.fixture
def big(tmp_path):
    """A file with tensors smaller and larger than a block, of odd sizes."""
    random = np.random.default_rng(0)
    tensors = {
        f"t{i}": ("U8", random.integers(0, 256, size, dtype=np.uint8))
        for i, size in enumerate((5, BLOCK_BYTES, 3 * BLOCK_BYTES + 17, 0, 1000, BLOCK_BYTES - 1))
    }
    return {name: array for name, (_, array) in tensors.items()}, write(tmp_path / "f", tensors)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("digests", [False, True])
def test_what_is_stored_arrives(big, tmp_path, threads, digests):
    arrays, catalog = big
    with LocalStorage(tmp_path) as storage:
        found, target = memory_of(catalog, digests=digests)
        counters = run(plan_identity(catalog), storage, target, threads=threads)
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in found.items()
    }
    assert counters.bytes_read == sum(array.nbytes for array in arrays.values())
    if digests:
        other = DigestTarget([catalog])
        with LocalStorage(tmp_path) as storage:
            run(plan_identity(catalog), storage, other, threads=threads)
        for row, name in enumerate(catalog.names):
            assert target._digests.blocks(row) == other.blocks(0, row)
            assert len(other.blocks(0, row)) == -(-arrays[name].nbytes // BLOCK_BYTES)


def test_transposes_casts_fills_and_literals(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6) / 3
    catalog = write(tmp_path / "f", {"a": ("F32", values)})
    tensors = Tensors(("t", "p"), ("F16", "F32"), ((6, 4), (3, 6)))
    plan = make_plan(
        catalog,
        tensors,
        [
            Copy(0, 0, "F32", "F16", Move(0, 0, ((6, 1, 4), (4, 6, 1)))),
            # Every second row into the top, as interleaved halves lie.
            Copy(0, 1, "F32", "F32", Move(6, 0, ((2, 12, 6), (6, 1, 1)))),
        ],
        [Fill(1, "F32", Region(12, ((4, 1),)), np.float32(7).tobytes())],
        [Literal(1, 64, np.array([1.5, 2.5], np.float32).tobytes())],
    )
    with LocalStorage(tmp_path) as storage:
        found, target = memory_of(tensors)
        run(plan, storage, target)
    assert found["t"].tobytes() == values.T.astype(np.float16).tobytes()
    expected = np.concatenate([values[1], values[3], [7, 7, 7, 7, 1.5, 2.5]]).astype(np.float32)
    assert found["p"].tobytes() == expected.tobytes()


def test_a_comparison_names_the_bytes_that_differ(big, tmp_path):
    _, catalog = big
    other = tmp_path / "other"
    other.mkdir()
    raw = bytearray((tmp_path / "f").read_bytes())
    tensor = catalog.tensor(catalog.row["t2"])
    for offset in (3, BLOCK_BYTES + 5, BLOCK_BYTES + 9):
        raw[tensor.begin + offset] ^= 1
    (other / "f").write_bytes(raw)
    with LocalStorage(tmp_path) as source, LocalStorage(other) as stored:
        target = CompareTarget(stored, [(catalog, catalog)])
        run(plan_identity(catalog), source, target)
    found = sorted((d.dest, d.begin, d.end) for d in target.differences)
    assert found == [
        (catalog.row["t2"], 3, 4),
        (catalog.row["t2"], BLOCK_BYTES + 5, BLOCK_BYTES + 10),
    ]


def test_the_first_error_stops_everything(big, tmp_path):
    _, catalog = big
    os.truncate(tmp_path / "f", 2 * BLOCK_BYTES)
    before = threading.active_count()
    with LocalStorage(tmp_path) as storage:
        with pytest.raises(TruncatedFile, match=r"f: ends at byte"):
            run(plan_identity(catalog), storage, memory_of(catalog, digests=True)[1], threads=4)
    assert threading.active_count() == before


def test_memory_that_runs_out_is_an_error_that_says_where(tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write(source / "model.safetensors", {"a": ("BF16", np.zeros((4096, 4096), np.uint16))})

    def moved(*_):
        raise MemoryError

    monkeypatch.setattr(files, "moved", moved)
    with pytest.raises(OutOfMemory, match=r"model\.safetensors: memory ran out at bytes") as error:
        shardstate.shard(source, out, tp=2, rules=[{"match": "a", "split": 1}])
    assert error.value.file == "model.safetensors"
    assert list(out.iterdir()) == []


class FailingStorage(BufferedStorage):
    """The second large read fails while the first, whose bytes others wait for, is under way."""

    reads = 0

    def read_into(self, name, begin, views):
        if sum(view.nbytes for view in views) > 64 << 10:
            self.reads += 1
            if self.reads == 2:
                time.sleep(0.2)
                raise StorageError(f"{name}: the disk is gone")
            super().read_into(name, begin, views)
            time.sleep(0.5)
        else:
            super().read_into(name, begin, views)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_while_sharding_stops_everything(tmp_path, monkeypatch, failing):
    write(tmp_path / "model.safetensors", {"a": ("BF16", np.zeros((8192, 4096), np.uint16))})
    monkeypatch.setattr(FailingStorage, "reads", 2 - failing)
    monkeypatch.setattr(locate, "LocalStorage", FailingStorage)
    (tmp_path / "out").mkdir()
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "model.safetensors").rename(source / "model.safetensors")
    before = threading.active_count()
    with pytest.raises(StorageError, match="the disk is gone"):
        shardstate.shard(source, tmp_path / "out", tp=8, rules=[{"match": "a", "split": 1}])
    assert threading.active_count() == before
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("threads", [1, 4, 32, 256])
def test_memory_keeps_to_its_budget_with_any_number_of_threads(threads):
    tensors = Tensors(("a",), ("U8",), ((1 << 30,),))
    catalog = catalog_of(
        [("f", 1 << 30, Header(("a",), ("U8",), ((1 << 30,),), (0,), (1 << 30,), {}, 0))],
        weight_map=None,
    )
    assert len(tensors) == len(catalog)
    reads = planning.reads_of([plan_identity(catalog)], threads=threads)
    assert threads * max(read.nbytes for read in reads) <= STAGING_BYTES


class SlowStorage(BufferedStorage):
    """Each read takes a while, as on a store far away."""

    def read_into(self, name, begin, views):
        time.sleep(0.04)
        super().read_into(name, begin, views)


def test_an_interrupt_stops_within_a_second_and_leaves_no_thread(tmp_path):
    catalog = write(tmp_path / "f", {"a": ("U8", np.zeros(40 * BLOCK_BYTES, dtype=np.uint8))})
    before = threading.active_count()
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    with SlowStorage(tmp_path) as storage:
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(plan_identity(catalog), storage, memory_of(catalog)[1], threads=2)
        assert time.monotonic() - began < 1.3
    timer.join()
    assert threading.active_count() == before


def test_progress_is_told_often_and_ends_at_the_total(tmp_path):
    catalog = write(tmp_path / "f", {"a": ("U8", np.zeros(16 * BLOCK_BYTES, dtype=np.uint8))})
    calls = []
    with SlowStorage(tmp_path) as storage:
        began = time.monotonic()
        run(
            plan_identity(catalog),
            storage,
            memory_of(catalog)[1],
            threads=1,
            progress=lambda done, total: calls.append((done, total)),
        )
        seconds = time.monotonic() - began
    assert calls[-1] == (16 * BLOCK_BYTES, 16 * BLOCK_BYTES)
    assert len(calls) >= 5 * seconds


def test_memory_beyond_the_destination_is_bounded(tmp_path):
    catalog = write(tmp_path / "f", {"a": ("U8", np.ones((512, 512 << 10), dtype=np.uint8))})
    # A column split: 256 MiB pass through staging memory, and an eighth of them arrives.
    tensors = Tensors(("a",), ("U8",), ((512, 64 << 10),))
    plan = make_plan(
        catalog,
        tensors,
        [Copy(0, 0, "U8", "U8", Move(0, 0, ((512, 512 << 10, 64 << 10), (64 << 10, 1, 1))))],
    )
    reads = plan_reads([plan], in_dest_order=False, **LIMITS | {"max_gap_bytes": 1 << 20})
    with LocalStorage(tmp_path) as storage:
        found, target = memory_of(tensors)
        counters = execute(
            reads, storage=storage, target=target, threads=4, progress=None, fills_memory=True
        )
    assert found["a"].min() == 1
    assert counters.peak_extra_bytes < 80 << 20
