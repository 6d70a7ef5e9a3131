from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import offsets, pairs, sides
from shardstate.errors import NotNested
from shardstate.layout import (
    Box,
    Loop,
    Move,
    Region,
    Shape,
    box_move,
    canonical,
    compose,
    intersect,
    inverse,
    overlap,
    runs,
    strides_of,
    subtract,
    union_size,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """Draw a box of `shape`, often empty, often whole."""
    edges = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple((begin, end) for begin, end in edges)


@st.composite
def box_moves(draw: st.DrawFn) -> tuple[Shape, Box, Shape, Shape]:
    """Draw the arguments of `box_move`: a box, and a destination with room for it."""
    source = draw(shapes)
    box = draw(boxes(source))
    before = tuple(draw(st.integers(0, 2)) for _ in box)
    dest = tuple(
        at + end - begin + draw(st.integers(0, 2))
        for at, (begin, end) in zip(before, box, strict=True)
    )
    return source, box, dest, before


@st.composite
def views(draw: st.DrawFn, shape: Shape, *, order: bool = True) -> tuple[Move, np.ndarray]:
    """Draw a strided, transposed view of a row-major array, made contiguous; and its elements."""
    view = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    loops, offset = [], 0
    for axis, (size, stride) in enumerate(zip(shape, strides_of(shape), strict=True)):
        begin = draw(st.integers(0, max(size - 1, 0)))
        step = draw(st.sampled_from([1, 1, 2, 3]))
        count = draw(st.integers(0, len(range(begin, size, step))))
        index = [slice(None)] * len(shape)
        index[axis] = slice(begin, begin + count * step, step)
        view = view[tuple(index)]
        offset += begin * stride
        loops.append((count, stride * step))
    axes = draw(st.permutations(range(len(shape)))) if order else list(range(len(shape)))
    view = view.transpose(axes)
    dest = strides_of(view.shape)
    walked = [(*loops[axis], d) for axis, d in zip(axes, dest, strict=True)]
    return Move(offset if view.size else 0, 0, canonical(walked)), view


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Draw any region at all: its strides may not nest, and it may touch an element twice."""
    loop = st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 1, 2, 3, 4, 6, 8, 12]))
    return Region(draw(st.integers(0, 12)), tuple(draw(st.lists(loop, max_size=3))))


@st.composite
def box_regions(draw: st.DrawFn, shape: Shape) -> Region:
    box = draw(boxes(shape))
    return box_move(shape, box, shape, tuple(begin for begin, _ in box)).dest_region


def members(*regions: Region) -> list[int]:
    """Return the elements that regions touch, each as often as it is touched, sorted."""
    return sorted(i for r in regions for i in offsets(r.offset, r.loops).tolist())


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_strides_are_those_of_numpy(shape: Shape) -> None:
    array = np.empty(shape, dtype=np.uint8)
    assert array.strides == strides_of(shape)


@given(regions())
def test_a_region_has_the_size_and_the_end_of_its_elements(region: Region) -> None:
    found = members(region)
    assert len(found) == region.size
    assert max(found, default=region.offset - 1) + 1 == region.end


@given(box_moves())
def test_a_box_moves_as_numpy_slices(arguments: tuple[Shape, Box, Shape, Shape]) -> None:
    source_shape, box, dest_shape, at = arguments
    source = np.arange(int(np.prod(source_shape, dtype=int))).reshape(source_shape)
    expected = np.full(dest_shape, -1)
    into = tuple(slice(b, b + e - s) for b, (s, e) in zip(at, box, strict=True))
    expected[into] = source[tuple(slice(*axis) for axis in box)]
    move = box_move(source_shape, box, dest_shape, at)
    actual = np.full(expected.size, -1)
    reads, writes = sides(move)
    actual[writes] = source.reshape(-1)[reads]
    assert expected.reshape(-1).tolist() == actual.tolist()
    assert actual[actual >= 0].size == move.size


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=4), st.randoms())
def test_the_canonical_form_does_the_same(loops: list[Loop], random: object) -> None:
    found = canonical(loops)
    assert pairs(Move(3, 5, tuple(loops))) == pairs(Move(3, 5, found))
    assert found == canonical(found)
    assert all(size > 1 for size, _, _ in found) or found == ((0, 0, 0),)
    assert found == canonical(reversed(loops)) or len({loop[2] for loop in loops}) < len(loops)


@given(shapes.flatmap(views), st.data())
def test_cutting_and_shuffling_loops_leaves_the_canonical_form(
    view: tuple[Move, np.ndarray], data: st.DataObject
) -> None:
    loops: list[Loop] = []
    for size, source, dest in view[0].loops:
        inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [1]))
        loops += [(size // inner, source * inner, dest * inner), (inner, source, dest), (1, 7, 7)]
    assert view[0].loops == canonical(data.draw(st.permutations(loops)))


@given(shapes.flatmap(views))
def test_a_view_moves_as_numpy_walks_it(view: tuple[Move, np.ndarray]) -> None:
    move, array = view
    expected = sorted(zip(array.reshape(-1).tolist(), range(array.size), strict=True))
    assert expected == pairs(move)


@given(shapes.flatmap(views))
def test_the_inverse_goes_back_and_its_inverse_is_the_move(view: tuple[Move, np.ndarray]) -> None:
    move, _ = view
    assert sorted((d, s) for s, d in pairs(move)) == pairs(inverse(move))
    assert move == inverse(inverse(move))


def test_the_inverse_of_a_broadcast_takes_index_0() -> None:
    move = Move(4, 10, canonical([(3, 0, 2), (2, 1, 1)]))
    assert pairs(inverse(move)) == [(10, 4), (11, 5)]


def test_the_inverse_of_nothing_is_nothing() -> None:
    empty = Move(0, 0, canonical([(0, 0, 1), (2, 1, 0)]))
    assert inverse(empty).size == 0


@given(st.data())
def test_boxes_compose_as_index_maps(data: st.DataObject) -> None:
    middle = data.draw(shapes)
    first_box, second_box = data.draw(boxes(middle)), data.draw(boxes(middle))
    sizes = [tuple(end - begin for begin, end in box) for box in (first_box, second_box)]
    first = inverse(box_move(middle, first_box, sizes[0], (0,) * len(middle)))
    second = box_move(middle, second_box, sizes[1], (0,) * len(middle))
    source_of = {b: a for a, b in pairs(first)}
    expected = sorted((source_of[b], c) for b, c in pairs(second) if b in source_of)
    assert expected == pairs(*compose(first, second))


@given(st.data())
def test_views_compose_as_index_maps(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    first, _ = data.draw(views(shape))
    second, _ = data.draw(views(data.draw(st.permutations(shape)).copy()).filter(bool))
    first = inverse(first) if data.draw(st.booleans()) else first
    source_of = {b: a for a, b in pairs(first)}
    expected = sorted((source_of[b], c) for b, c in pairs(second) if b in source_of)
    assert expected == pairs(*compose(first, second))


@given(st.data())
def test_a_broadcast_composes_as_an_index_map(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(boxes(shape))
    first = box_move(shape, box, shape, tuple(begin for begin, _ in box))
    inner, view = data.draw(views(shape, order=False))
    copies = data.draw(st.integers(0, 3))
    second = Move(
        inner.source, inner.dest, canonical([*inner.loops, (copies, 0, max(view.size, 1))])
    )
    source_of = {b: a for a, b in pairs(first)}
    expected = sorted((source_of[b], c) for b, c in pairs(second) if b in source_of)
    assert expected == pairs(*compose(first, second))


@given(st.data())
def test_boxes_intersect_as_sets(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    a, b = data.draw(box_regions(shape)), data.draw(box_regions(shape))
    assert sorted({*members(a)} & {*members(b)}) == members(*intersect(a, b))


@given(regions(), regions())
def test_any_regions_intersect_as_sets(a: Region, b: Region) -> None:
    found = intersect(a, b)
    assert {*members(a)} & {*members(b)} == {*members(*found)}


@given(st.data())
def test_what_is_left_of_a_move_is_what_the_region_does_not_touch(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    move, _ = data.draw(views(shape, order=False))
    size = max(move.dest_region.end, 1)
    other = data.draw(st.one_of(regions(), box_regions((size,))))
    left = subtract(move, other)
    taken = {*members(other)}
    assert pairs(*left) == [pair for pair in pairs(move) if pair[1] not in taken]


@given(st.data())
def test_the_union_of_boxes_has_the_size_of_the_set(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    found = data.draw(st.lists(box_regions(shape), max_size=4))
    assert len({*members(*found)}) == union_size(found)


@given(st.lists(regions(), max_size=3))
def test_the_union_of_any_regions_has_the_size_of_the_set(found: list[Region]) -> None:
    assert len({*members(*found)}) == union_size(found)


@given(st.data())
def test_boxes_overlap_where_their_sets_do(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    found = data.draw(st.lists(box_regions(shape), max_size=4))
    touched = members(*found)
    both = overlap(found)
    assert (len({*touched}) < len(touched)) == (both is not None)
    if both is not None:
        i, j = both
        assert i != j
        assert {*members(found[i])} & {*members(found[j])}


@given(st.lists(regions(), max_size=3))
def test_regions_overlap_where_an_element_is_touched_twice(found: list[Region]) -> None:
    touched = members(*found)
    assert (len({*touched}) < len(touched)) == (overlap(found) is not None)


def test_a_region_that_touches_an_element_twice_overlaps_itself() -> None:
    assert overlap([Region(9, ((2, 1),)), Region(0, ((3, 1), (2, 2)))]) == (1, 1)
    assert overlap([Region(0, ((4, 0),))]) == (0, 0)


def test_what_lies_between_hides_no_overlap() -> None:
    column, other, last = (Region(at, ((4, 10),)) for at in (0, 1, 2))
    assert overlap([column, other, last]) is None
    assert overlap([column, other, last, Region(30, ((1, 1),))]) == (0, 3)


@given(st.data())
def test_runs_of_a_box_are_the_fewest_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    region = data.draw(box_regions(shape))
    found = list(runs(region))
    elements = members(region)
    starts = [i for n, i in enumerate(elements) if not n or elements[n - 1] != i - 1]
    assert starts == [begin for begin, _ in found]
    assert elements == [i for begin, end in found for i in range(begin, end)]


@given(regions())
def test_runs_cover_any_region(region: Region) -> None:
    found = list(runs(region))
    assert members(region) == sorted(i for begin, end in found for i in range(begin, end))


def test_what_would_fall_into_too_many_parts_is_refused() -> None:
    first = Move(0, 0, ((5000, 5000, 3), (5000, 1, 15000)))
    second = Move(0, 0, ((5000, 2, 5000), (5000, 10000, 1)))
    with pytest.raises(NotNested, match="strides 15000 and 10000 do not nest"):
        compose(first, second)
    with pytest.raises(NotNested, match="do not nest"):
        subtract(first, second.source_region)
    with pytest.raises(NotNested, match="do not nest"):
        union_size([first.dest_region, second.source_region])


def test_what_is_far_apart_needs_no_nesting() -> None:
    far = Region(75 * 10**6, ((5000, 2), (5000, 10000)))
    move = Move(0, 0, ((5000, 5000, 3), (5000, 1, 15000)))
    assert subtract(move, far) == [move]
    assert intersect(move.dest_region, far) == []
