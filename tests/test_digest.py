from __future__ import annotations

from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shardstate.digest import (
    BLOCK_BYTES,
    SAMPLE_BYTES,
    SAMPLES,
    block_count,
    digest_of,
    fingerprint,
    rank_file_digest,
    sample_ranges,
    tensor_digest,
)

EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # BLAKE3 of nothing


def test_digests_are_blake3_in_lower_case_hex() -> None:
    assert digest_of(b"") == EMPTY
    abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert abc == digest_of(memoryview(b"abc"))


@given(st.lists(st.binary(max_size=8), max_size=4))
def test_a_tensor_hashes_the_raw_digests_of_its_blocks(blocks: list[bytes]) -> None:
    expected = blake3(b"".join(blake3(block).digest() for block in blocks)).hexdigest()
    assert expected == tensor_digest(digest_of(block) for block in blocks)


def test_an_empty_tensor_has_no_block() -> None:
    assert tensor_digest([]) == EMPTY
    assert tensor_digest([digest_of(b"a")]) != digest_of(b"a")


def test_a_rank_file_hashes_its_header_and_its_tensors() -> None:
    a, b, c = (blake3(text).digest() for text in (b"a", b"b", b"c"))
    tensors = blake3(a + b).digest() + blake3(c).digest()
    expected = blake3(blake3(b"header").digest() + tensors).hexdigest()
    assert expected == rank_file_digest(digest_of(b"header"), [[a.hex(), b.hex()], [c.hex()]])


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2), (5 * BLOCK_BYTES, 5)],
)
def test_blocks_are_4_mib(nbytes: int, expected: int) -> None:
    assert expected == block_count(nbytes)
    assert BLOCK_BYTES == 4 << 20


@given(st.integers(8, 10**6), st.integers(0, 10**12))
def test_samples_lie_evenly_over_the_data(data_begin: int, data_bytes: int) -> None:
    found = list(sample_ranges(data_begin, data_begin + data_bytes))
    size = min(SAMPLE_BYTES, data_bytes)
    assert [size] * SAMPLES == [end - begin for begin, end in found]
    assert (data_begin, data_begin + data_bytes) == (found[0][0], found[-1][1])
    steps = {b[0] - a[0] for a, b in pairwise(found)}
    assert max(steps) - min(steps) <= 1


def test_a_fingerprint_hashes_each_item_after_its_length() -> None:
    items = [b"{}", b"a.safetensors", (9).to_bytes(8, "little"), b"head", b"one", b""]
    expected = blake3(b"".join(len(i).to_bytes(8, "little") + i for i in items)).hexdigest()
    assert expected == fingerprint(b"{}", [("a.safetensors", 9, b"head", [b"one", b""])])


@given(st.data())
def test_no_two_sources_run_together(data: st.DataObject) -> None:
    part = st.binary(max_size=3)
    file = st.tuples(
        st.text("ab", max_size=2), st.integers(0, 300), part, st.lists(part, max_size=2)
    )
    source = st.tuples(part, st.lists(file, max_size=2))
    a, b = data.draw(source), data.draw(source)
    # A file has 16 samples always, so that lists of other lengths cannot be confused.
    same_shape = [len(f[3]) for f in a[1]] == [len(f[3]) for f in b[1]]
    assert (a == b) == (fingerprint(*a) == fingerprint(*b)) or not same_shape
