"""How many requests to a store are in flight: stores whose answers take as long as we say."""

import threading
import time

import numpy as np
import pytest

from shardstate.catalog import Tensors, catalog_of
from shardstate.coalesce import plan_reads
from shardstate.digest import BLOCK_BYTES
from shardstate.engine import MEMORY_BYTES, STAGING_BYTES, execute
from shardstate.header import Header
from shardstate.layout import Move
from shardstate.plan import Copy, make_plan, plan_identity
from shardstate.storage import Reading, paced
from shardstate.storage.base import PlainReader
from shardstate.storage.paced import PacedReader, reader_of
from shardstate.targets import MemoryTarget, allocate

SECONDS = 0.002  # of an answer, where nothing slows it down


class Store:
    """Answers of one connection take `seconds(how many are on their way)`; they hold nothing."""

    def __init__(self, location, seconds=lambda _busy: SECONDS):
        self.location, self._seconds = location, seconds
        self._lock = threading.Lock()
        self.busy = self.most = 0
        self.bytes_busy = self.most_bytes = 0
        self.reading = Reading()

    def read_into(self, name, begin, views):
        nbytes = sum(view.nbytes for view in views)
        with self._lock:
            self.busy += 1
            self.bytes_busy += nbytes
            self.most, self.most_bytes = (
                max(self.most, self.busy),
                max(self.most_bytes, self.bytes_busy),
            )
            busy = self.busy
        time.sleep(self._seconds(busy))
        with self._lock:
            self.busy -= 1
            self.bytes_busy -= nbytes

    def reader(self, threads):
        return reader_of(self, threads, self.reading)

    def expect(self, files):
        pass

    def interrupt(self, on=True):
        pass


def catalog_of_one(nbytes):
    header = Header(("a",), ("U8",), ((nbytes,),), (0,), (nbytes,), {}, 0)
    return catalog_of([("f", nbytes, header)], weight_map=None)


def columns(nbytes):
    """Return the plan of the first half of each row, which has to be staged."""
    row = 1 << 20
    rows, half = nbytes // row, row // 2
    header = Header(("a",), ("U8",), ((rows, row),), (0,), (nbytes,), {}, 0)
    return make_plan(
        catalog_of([("f", nbytes, header)], weight_map=None),
        Tensors(("a",), ("U8",), ((rows, half),)),
        [Copy(0, 0, "U8", "U8", Move(0, 0, ((rows, row, half), (half, 1, 1))))],
    )


def load(store, nbytes, *, threads, plan=None):
    plan = plan or plan_identity(catalog_of_one(nbytes))
    arrays = allocate(plan.tensors)
    execute(
        plan_reads(
            [plan],
            in_dest_order=False,
            piece_bytes=BLOCK_BYTES,
            read_bytes=BLOCK_BYTES,
            max_gap_bytes=1 << 20,
        ),
        storage=store,
        target=MemoryTarget([a.reshape(-1).view(np.uint8) for a in arrays.values()], digests=None),
        threads=threads,
        progress=None,
        fills_memory=True,
    )


class Clock(threading.local):
    """Tells each thread what its answers took, without what a busy machine adds."""

    def __init__(self):
        self.now = time.perf_counter()

    def perf_counter(self):
        return self.now

    def takes(self, seconds):
        self.now += seconds
        return seconds


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        (lambda _busy: SECONDS, 8),  # a connection gives so much, however many there are
        (lambda busy: SECONDS * busy, 4),  # all of them share what there is: nothing to gain
        (lambda busy: SECONDS if busy <= 2 else 50 * SECONDS, 2),  # more of them are slowed down
    ],
)
def test_a_store_is_asked_for_as_much_at_once_as_it_serves_best(seconds, limit, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paced, "time", clock)
    store = Store(f"s3://bucket-{limit}", lambda busy: clock.takes(seconds(busy)))
    readers = []
    store.reader = lambda threads: readers.append(PacedReader(store, threads)) or readers[-1]
    load(store, 1200 << 20, threads=4)
    assert readers[0].limit == limit
    load(store, 64 << 20, threads=4)
    assert readers[1].limit == limit  # what was learnt is kept
    assert store.most <= 8


def test_what_memory_does_not_allow_is_not_credited(monkeypatch):
    """Twice as many requests are asked for, and half of them wait for staging memory."""
    most, clock = STAGING_BYTES // BLOCK_BYTES, Clock()
    monkeypatch.setattr(paced, "time", clock)
    store = Store("s3://bucket-credited", lambda busy: clock.takes(SECONDS * busy))
    readers = []
    store.reader = lambda threads: readers.append(PacedReader(store, threads)) or readers[-1]
    load(store, 0, threads=most, plan=columns(2400 << 20))
    assert most - 2 <= store.most <= most + 2
    known = {way.threads: rate for way, rate in readers[0]._pacer.known.items()}
    assert known[2 * most] < 1.3 * known[most]


def test_a_number_that_a_caller_gives_is_kept():
    store = Store("s3://bucket-fixed")
    store.reading = Reading(threads=3)
    reader = store.reader(16)
    assert isinstance(reader, PlainReader)
    assert reader.threads == reader.limit == 3
    load(store, 600 << 20, threads=16)
    assert store.most == 3


def test_what_is_staged_keeps_to_its_budget_with_any_number_of_requests():
    # Long answers: as many as may are on their way, on a busy machine too.
    store = Store("s3://bucket-staged", lambda _busy: 10 * SECONDS)
    store.reading = Reading(threads=64)
    load(store, 0, threads=64, plan=columns(512 << 20))
    assert store.most_bytes <= STAGING_BYTES < MEMORY_BYTES
    assert 10 < store.most < 20
    direct = Store("s3://bucket-direct", lambda _busy: 10 * SECONDS)
    direct.reading = Reading(threads=64)
    load(direct, 512 << 20, threads=64)
    assert direct.most > store.most  # what goes straight to its place takes none
