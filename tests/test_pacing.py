"""The choice of how to read: simulated disks, without a clock or a file."""

import heapq
import itertools

import pytest

from shardstate.storage.pacing import TRIAL_BYTES, Pacer, Way

READ = 1 << 20
WAYS = (Way(16, True), Way(8, True), Way(4, True), Way(2, False), Way(8, False))


def read_all(pacer, nbytes, rate_of, *, together=False):
    """Read so much from a disk that gives `rate_of(way)` bytes a second; return bytes by way.

    It serves one read after the other, or `together`: as many as are in flight end at once.
    """
    used = dict.fromkeys(pacer.ways, 0)
    flight, now, numbers = [], 0.0, itertools.count()
    begun, free = 0, 0.0  # `free`: when the disk can begin another read
    while begun < nbytes or flight:
        while begun < nbytes and len(flight) < pacer.way.threads:
            way = pacer.way
            if together:
                end = now + way.threads * READ / rate_of(way)
            else:
                end = free = max(free, now) + READ / rate_of(way)
            heapq.heappush(flight, (end, next(numbers), way, now))
            used[way] = used.get(way, 0) + READ
            begun += READ
        now, _, way, began = heapq.heappop(flight)
        pacer.done(way, READ, now - began, now)
    return used


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("best", WAYS)
def test_the_best_way_gets_all_but_some_hundred_megabytes(best, together):
    used = read_all(
        Pacer(WAYS), 4 << 30, lambda way: 3e9 if way == best else 1e9, together=together
    )
    others = sum(nbytes for way, nbytes in used.items() if way != best)
    assert others < 450 << 20


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_trial_tells_what_the_disk_gives(way, together):
    pacer = Pacer(WAYS)
    read_all(pacer, 1 << 30, lambda way: 1e8 * (10 + way.threads), together=together)
    assert pacer.known[way] == pytest.approx(1e8 * (10 + way.threads), rel=0.25)


def test_ways_that_trials_cannot_tell_apart_leave_the_first_one():
    pacer = Pacer(WAYS)
    read_all(pacer, 2 << 30, lambda way: 2.2e9 if way == Way(8, False) else 2e9)
    assert pacer.way == WAYS[0]


def test_a_way_that_does_not_keep_what_its_trial_promised_is_left_soon():
    pacer, promising = Pacer(WAYS), Way(8, False)
    read_all(pacer, 512 << 20, lambda way: 3e9 if way == promising else 2e9)
    assert pacer.way == promising
    used = read_all(pacer, 2 << 30, lambda way: 1e9 if way == promising else 2e9)
    assert used[promising] < 700 << 20
    assert pacer.way != promising


def test_a_hopeless_way_is_given_up_early():
    slow = Way(2, False)
    used = read_all(Pacer(WAYS), 1 << 30, lambda way: 0.2e9 if way == slow else 2e9)
    assert used[slow] <= TRIAL_BYTES // 4 + 3 * slow.threads * READ


def test_what_was_learnt_serves_the_next_execution():
    known = {}
    read_all(Pacer(WAYS, known), 1 << 30, lambda way: 1e8 * (1 + way.threads))
    assert known.keys() == set(WAYS)
    used = read_all(Pacer(WAYS, known), 1 << 30, lambda way: 1e8 * (1 + way.threads))
    assert used == {**dict.fromkeys(WAYS, 0), Way(16, True): 1 << 30}


def test_a_disk_that_changes_is_noticed():
    pacer = Pacer(WAYS)
    read_all(pacer, 1 << 30, lambda way: 2e9 if way.direct else 1e9)
    assert pacer.way.direct
    read_all(pacer, 24 << 30, lambda way: 1e9 if way.direct else 2e9)
    assert not pacer.way.direct


def test_the_choice_can_be_narrowed_at_any_time():
    pacer = Pacer(WAYS)
    read_all(pacer, 1 << 30, lambda way: 2e9 if way.direct else 1e9)
    buffered = [way for way in WAYS if not way.direct]
    pacer.choose_from(buffered)
    assert pacer.way in buffered
    used = read_all(pacer, 8 << 30, lambda way: 2e9 if way.direct else 1e9)
    assert {way for way, nbytes in used.items() if nbytes} <= set(buffered)


def test_a_single_way_is_never_on_trial():
    pacer = Pacer([Way(3, False)])
    assert read_all(pacer, 8 << 30, lambda _: 1e9) == {Way(3, False): 8 << 30}
