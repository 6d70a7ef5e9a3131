"""Reads of local files: cached or not, past the page cache or through it, alone or with others."""

import errno
import fcntl
import logging
import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstate.buffers import HUGE_BYTES, staging_buffer
from shardstate.errors import StorageError, TruncatedFile
from shardstate.storage import LocalStorage, Reading, adaptive, residency, views
from shardstate.storage.adaptive import readers_of
from shardstate.storage.direct import DirectFile, alignment_of
from shardstate.storage.residency import probe_of
from shardstate.storage.tries import Stopped

SIZE = (6 << 20) + 1234  # no multiple of anything


@pytest.fixture
def content():
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, content):
    content.tofile(tmp_path / "a")
    drop(tmp_path / "a")
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch):
    monkeypatch.setattr(adaptive, "_learnt", {})


def drop(path):
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path):
    """Return how many bytes of a file are in the page cache, as a mapping of our own says."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return residency._by_mincore(fd)(0, SIZE)
    finally:
        os.close(fd)


def alignment_on(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return alignment_of(fd)
    finally:
        os.close(fd)


needs_direct = pytest.mark.skipif(
    alignment_on("/usr/bin/env") is None, reason="no O_DIRECT on this file system"
)


def memory(nbytes, address):
    """Return memory whose address is `address` modulo a page."""
    room = np.zeros(nbytes + 8192, dtype=np.uint8)
    first = (address - room.ctypes.data) % 4096
    return room[first : first + nbytes]


@pytest.mark.parametrize("wish", [None, True, False])
@pytest.mark.parametrize("begin", [0, 1, 511, 512, 4096, 1 << 20, SIZE - 700])
@pytest.mark.parametrize("nbytes", [1, 512, 5000, (1 << 20) + 7, (5 << 20) + 1])
def test_any_range_into_memory_anywhere(folder, content, wish, begin, nbytes):
    nbytes = min(nbytes, SIZE - begin)
    with LocalStorage(folder, reading=Reading(direct=wish)) as storage:
        reader = storage.reader(2)
        for address in (0, 64, begin % 4096, 3000):
            goal = memory(nbytes, address)
            reader.read_into("a", begin, [goal.data])
            assert np.array_equal(goal, content[begin : begin + nbytes])
        several = [memory(n, 64) for n in (nbytes // 3, 0, nbytes - nbytes // 3)]
        reader.read_into("a", begin, [view.data for view in several])
        assert np.array_equal(np.concatenate(several), content[begin : begin + nbytes])
        reader.close()


@pytest.mark.parametrize("wish", [None, True, False])
@pytest.mark.parametrize("state", ["cached", "dropped", "sure"])
def test_what_has_arrived_is_told_while_it_is_there(folder, content, wish, state):
    begin, nbytes = 4096, SIZE - 5000
    goal = np.zeros(nbytes, dtype=np.uint8)
    told = []

    def arrived(count):
        at = told[-1] if told else 0
        assert np.array_equal(goal[at:count], content[begin + at : begin + count])
        told.append(count)

    with LocalStorage(folder, reading=Reading(direct=wish)) as storage:
        reader = storage.reader(2)
        if state == "dropped":
            drop(folder / "a")
        else:
            (folder / "a").read_bytes()
        if state == "sure":
            for _ in range(5):
                reader.read_into("a", 0, [memoryview(bytearray(4096))])
        views = [goal[: nbytes // 3].data, goal[nbytes // 3 :].data]
        reader.read_into("a", begin, views, arrived)
        reader.close()
    assert told == sorted(told)
    assert told[-1] == nbytes
    assert len(told) > 2
    assert reader.read_into("a", 0, [], arrived) == 0


def test_what_is_cached_is_told(folder, content):
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        goal = np.empty(SIZE, dtype=np.uint8)
        with open(folder / "a", "rb") as file:
            file.read()
        assert reader.read_into("a", 0, [goal.data]) == SIZE
        assert reader.limit == 2
        reader.close()
        drop(folder / "a")
        reader = storage.reader(2)
        half = SIZE // 2 // 4096 * 4096
        assert reader.read_into("a", half, [goal[half:].data]) <= 4096  # the page of the probe
        reader.close()
        assert np.array_equal(goal, content)


@needs_direct
def test_past_the_page_cache_leaves_nothing_there(folder):
    goal = np.empty(2 << 20, dtype=np.uint8)
    for wish in (True, False):
        drop(folder / "a")
        with LocalStorage(folder, reading=Reading(direct=wish)) as storage:
            reader = storage.reader(2)
            reader.read_into("a", 2 << 20, [goal.data])
            reader.close()
        assert (resident(folder / "a") < 1 << 20) == wish


@needs_direct
def test_cached_parts_come_from_the_page_cache_and_the_others_past_it(folder, content, monkeypatch):
    cut = 3 << 20
    with open(folder / "a", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        file.read(cut)
    direct = []
    original = DirectFile.read_into

    def noted(self, begin, views, rooms):
        direct.append(begin)
        return original(self, begin, views, rooms)

    monkeypatch.setattr(DirectFile, "read_into", noted)
    goal = np.empty(SIZE, dtype=np.uint8)
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        cached = reader.read_into("a", 0, [goal.data])
        reader.close()
    assert np.array_equal(goal, content)
    assert cached == cut
    assert min(direct) == cut


def test_what_is_cached_is_read_there_where_the_file_system_cannot_say_so(
    folder, content, monkeypatch
):
    with open(folder / "a", "rb") as file:
        file.read()
    original = os.preadv

    def preadv(fd, views, at, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return original(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(DirectFile, "read_into", None)
    goal = np.empty(SIZE, dtype=np.uint8)
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        reader.read_into("a", 0, [goal.data])
        reader.close()
    assert np.array_equal(goal, content)


def test_what_was_resident_before_is_told_from_what_was_read_ahead(folder):
    with open(folder / "a", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(2 << 20)
        resident = residency.Resident(probe_of(file.fileno()), SIZE)
        assert resident(5, 1 << 20)
        file.read()
        found = [resident(at, min(at + (1 << 20), SIZE)) for at in range(0, SIZE, 1 << 20)]
        assert found == [True, True, *[False] * (len(found) - 2)]
        assert not resident((2 << 20) - 1, (2 << 20) + 1)
        later = residency.Resident(probe_of(file.fileno()), SIZE)
        assert later(0, SIZE)


def test_a_reader_that_is_told_to_stop_does_not_go_on(folder):
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        reader.stop()
        with pytest.raises(Stopped):
            reader.read_into("a", 0, [memoryview(bytearray(SIZE))])
        reader.close()


@given(sizes=st.lists(st.integers(0, 40), max_size=8), most=st.integers(1, 30))
def test_views_part_into_the_first_bytes_and_the_rest(sizes, most):
    content = bytes(i % 251 for i in range(sum(sizes)))
    memory, at = [], 0
    for size in sizes:
        memory.append(memoryview(bytearray(content[at : at + size])))
        at += size
    first = views.first_of(memory, most)
    rest = views.rest_of(memory, views.total(first))
    assert views.total(first) == min(most, len(content))
    assert b"".join(map(bytes, first + rest)) == content


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_staging_memory_begins_a_page_and_a_huge_one_where_it_fills_one(nbytes):
    memory = staging_buffer(nbytes)
    assert memory.nbytes == nbytes
    assert memory.ctypes.data % (HUGE_BYTES if nbytes >= HUGE_BYTES else 4096) == 0
    memory[:] = 7


@pytest.mark.parametrize("make", [residency._by_cachestat, residency._by_mincore])
def test_both_probes_see_the_same(folder, make):
    with open(folder / "a", "rb") as file:
        try:
            probe = make(file.fileno())
            assert probe(0, SIZE) < SIZE // 2
        except OSError:
            pytest.skip("this kernel has no such call")
        file.read()
        assert probe(0, SIZE) == SIZE
        assert probe(5000, 5001) == 1
        assert probe(4096, 8192) == 4096


def test_a_probe_that_sees_nothing_is_not_believed(folder, monkeypatch):
    """As on overlay file systems, whose pages belong to another inode."""
    monkeypatch.setattr(residency, "_by_cachestat", lambda _fd: lambda _begin, _end: 0)
    with open(folder / "a", "rb") as file:
        file.read()
        assert probe_of(file.fileno())(0, SIZE) == SIZE
        monkeypatch.setattr(residency, "_by_mincore", lambda _fd: lambda _begin, _end: 0)
        assert probe_of(file.fileno()) is None


@pytest.mark.parametrize("how", ["no alignment", "no open", "EINVAL"])
def test_where_o_direct_is_refused_the_page_cache_serves_and_the_log_says_so(
    folder, content, monkeypatch, caplog, how
):
    caplog.set_level(logging.INFO, logger="shardstate")
    if how == "no alignment":
        monkeypatch.setattr(adaptive, "alignment_of", lambda _fd: None)
    elif how == "no open":
        monkeypatch.setattr(adaptive, "alignment_of", lambda _fd: (512, 512))
        real = os.open

        def refuse(path, flags, *rest, **more):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "refused")
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    else:

        def refuse(*_):
            raise OSError(errno.EINVAL, "refused")

        monkeypatch.setattr(DirectFile, "read_into", refuse)
    with LocalStorage(folder, reading=Reading(direct=True)) as storage:
        reader = storage.reader(2)
        goal = np.empty(SIZE, dtype=np.uint8)
        for _ in range(2):
            reader.read_into("a", 0, [goal.data])
            assert np.array_equal(goal, content)
        reader.close()
    assert caplog.text.count("is read through the page cache") == 1


@pytest.mark.parametrize("wish", [True, False])
def test_a_file_that_ends_early_is_an_error(folder, wish):
    with LocalStorage(folder, reading=Reading(direct=wish)) as storage:
        reader = storage.reader(2)
        for begin in (0, SIZE - 100, SIZE, SIZE + 9999):
            goal = np.empty(SIZE - begin + 1 if begin < SIZE else 10, dtype=np.uint8)
            with pytest.raises(TruncatedFile, match="a: ends at byte"):
                reader.read_into("a", begin, [goal.data])
        reader.close()


@needs_direct
def test_an_error_of_the_device_is_not_taken_for_a_refusal(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "the device failed")

    monkeypatch.setattr(DirectFile, "read_into", fail)
    with LocalStorage(folder, reading=Reading(direct=True)) as storage:
        reader = storage.reader(2)
        with pytest.raises(StorageError, match="the device failed"):
            reader.read_into("a", 0, [memoryview(bytearray(10))])
        reader.close()


def hold_shared(path, ready, done):
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        ready.set()
        done.wait(30)


def test_while_others_read_the_same_file_all_go_through_the_page_cache(folder, monkeypatch):
    monkeypatch.setattr(adaptive, "_LOOK_SECONDS", 0)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    goal = np.empty(1 << 20, dtype=np.uint8)
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        reader.read_into("a", 0, [goal.data])
        assert readers_of(storage.descriptor("a")) == 1
        other = context.Process(target=hold_shared, args=(folder / "a", ready, done))
        other.start()
        assert ready.wait(30)
        assert readers_of(storage.descriptor("a")) == 2
        drop(folder / "a")
        reader.read_into("a", 4 << 20, [goal.data])
        assert not any(way.direct for way in reader._pacer.ways)
        done.set()
        other.join()
        drop(folder / "a")
        reader.read_into("a", 4 << 20, [goal.data])
        assert any(way.direct for way in reader._pacer.ways)
        reader.close()
        assert readers_of(storage.descriptor("a")) == 0


def test_a_number_of_threads_that_the_caller_gave_stays(folder):
    with LocalStorage(folder, reading=Reading(threads=5)) as storage:
        reader = storage.reader(2)
        assert (reader.threads, reader.limit) == (5, 5)
        reader.read_into("a", 1 << 20, [memoryview(bytearray(1 << 20))])
        assert reader.limit == 5
        reader.close()
    with LocalStorage(folder) as storage:
        reader = storage.reader(2)
        assert reader.threads == adaptive.MOST_THREADS
        reader.close()


def test_nothing_stays_open(folder):
    before = set(os.listdir("/proc/self/fd"))
    for wish in (None, True, False):
        drop(folder / "a")
        with LocalStorage(folder, reading=Reading(direct=wish)) as storage:
            reader = storage.reader(2)
            reader.read_into("a", 0, [memoryview(bytearray(3 << 20))])
            reader.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_another_thread_has_asked_in_part_is_asked_in_whole():
    resident = residency.Resident(lambda begin, end: end - begin, 256 << 20)
    resident._seen = {cell: True for cell in range(128) if cell != 63}
    assert resident(62 << 20, 66 << 20)
