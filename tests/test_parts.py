from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from shardstate.catalog import Tensors
from shardstate.digest import digest_of
from shardstate.header import PREFIX_BYTES, parse_header
from shardstate.names import DEFAULT_PATTERN, Pattern
from shardstate.parts import ALIGN_BYTES, PartFile, plan_parts


def parts_of(sizes: list[int], limit: int) -> tuple[Tensors, list[PartFile]]:
    names = tuple(f"t{i}" for i in range(len(sizes)))
    tensors = Tensors(names, ("U8",) * len(sizes), tuple((size,) for size in sizes))
    pattern = Pattern(DEFAULT_PATTERN)
    return tensors, plan_parts(tensors, rank=5, set_id="id", pattern=pattern, max_part_bytes=limit)


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 20))
def test_parts_hold_all_tensors_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    _, parts = parts_of(sizes, limit)
    assert list(range(len(sizes))) == [row for part in parts for row in part.rows]
    assert list(range(len(parts))) == [part.part for part in parts]
    for part in parts:
        held = [sizes[row] for row in part.rows]
        assert sum(held) <= limit or max(held) > limit
        assert sum(map(bool, held)) == 1 or max(held, default=0) <= limit
        assert part.nbytes == len(part.header) + sum(held)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 20))
def test_a_part_ends_only_where_the_next_tensor_does_not_fit(sizes: list[int], limit: int) -> None:
    _, parts = parts_of(sizes, limit)
    for part, following in pairwise(parts):
        held = sum(sizes[row] for row in part.rows)
        assert held + sizes[following.rows[0]] > limit


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 20))
def test_a_header_describes_its_part(sizes: list[int], limit: int) -> None:
    tensors, parts = parts_of(sizes, limit)
    for part in parts:
        header = parse_header(part.header[PREFIX_BYTES:], file=part.name, file_bytes=part.nbytes)
        assert {tensors.names[row] for row in part.rows} == set(header.names)
        begins = dict(zip(header.names, header.begins, strict=True))
        assert [begins[tensors.names[row]] for row in part.rows] == list(part.begins)
        expected = {"format": "pt", "shardstate": "1", "rank": "5", "part": str(part.part)}
        assert {**expected, "set": "id"} == header.metadata
        assert header.data_begin % ALIGN_BYTES == 0
        assert digest_of(part.header) == part.header_digest
        assert f"model-rank-5-part-{part.part}.safetensors" == part.name


def test_a_rank_without_tensors_has_one_empty_part() -> None:
    _, parts = parts_of([], 1)
    assert [part.rows for part in parts] == [()]
    assert deserialize(parts[0].header) == []


def test_literal_bytes_of_a_part() -> None:
    _, [part] = parts_of([3], 10)
    raw = (
        b'{"__metadata__":{"format":"pt","shardstate":"1","rank":"5","part":"0","set":"id"},'
        b'"t0":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    )
    expected = b"\xf8\x0f\0\0\0\0\0\0" + raw.ljust(4088)
    assert expected == part.header
    assert (part.begins, part.nbytes) == ((4096,), 4099)
