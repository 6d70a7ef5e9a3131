from __future__ import annotations

import itertools
from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    carry_out,
    catalog_in_memory,
    elements,
    offsets,
    packed,
    share_of,
    shared_tensors,
    sides,
    stored,
)
from shardstate.catalog import Catalog, Tensors
from shardstate.compose import compose_plans, invert_plan
from shardstate.dtypes import CAST_NAMES, DTYPES, cast_array, numpy_dtype
from shardstate.errors import NotNested, PlanError
from shardstate.layout import Loop, Move, Region, Shape, canonical
from shardstate.plan import (
    Copy,
    Fill,
    Literal,
    Plan,
    bytes_wanted,
    check_plan,
    faults,
    make_plan,
    padding_boxes,
    plan_identity,
    plan_shares,
)
from shardstate.sharding import Kind, Rank, Replicate, Split, Vocabulary

worlds = st.sampled_from([1, 2, 3, 4, 8])
small = st.integers(0, 4)


def one_tensor(size: int, *, dtype: str = "U8") -> tuple[Catalog, dict[str, bytes]]:
    return catalog_in_memory([("t", dtype, (size,))])


def plan_of(*copies: Copy, source: int, dest: int, **rest: tuple[Fill | Literal, ...]) -> Plan:
    """Return a plan between two tensors of bytes."""
    catalog, _ = one_tensor(source)
    tensors = Tensors(("t",), ("U8",), ((dest,),))
    return make_plan(catalog, tensors, copies, **rest)  # type: ignore[arg-type]


def copy_of(source: int, dest: int, *loops: Loop) -> Copy:
    return Copy(0, 0, "U8", "U8", Move(source, dest, loops))


def tensor_bytes(catalog: Catalog, files: dict[str, bytes], name: str) -> bytes:
    tensor = catalog.tensor(catalog.row[name])
    return files[tensor.file][tensor.begin : tensor.end]


def bytes_read(plans: list[Plan]) -> set[tuple[int, int]]:
    """Return (source tensor, byte) of all that copies read."""
    found = set()
    for plan in plans:
        for copy in plan:
            width = DTYPES[copy.source_dtype].itemsize
            starts = sides(copy.move)[0] * width
            found |= {(copy.source, int(i) + k) for i in starts for k in range(width)}
    return found


@given(worlds, st.data())
def test_every_rank_gets_its_share_bit_for_bit(world: int, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, files = catalog_in_memory(tensors, files=data.draw(st.integers(1, 2)))
    for rank in range(world):
        plan = plan_shares(catalog, kinds, rank=Rank(rank, world), dtype="keep")
        assert faults(plan) == []
        made = carry_out(plan, files)
        for (name, dtype, shape), kind in zip(tensors, kinds, strict=True):
            whole = elements(tensor_bytes(catalog, files, name), dtype, shape)
            expected = share_of(whole, kind, rank, world)
            row = plan.tensors.row[name]
            assert expected.shape[:-1] == plan.tensors.shapes[row]
            assert dtype == plan.tensors.dtypes[row]
            assert packed(expected) == made[name]


@given(worlds, st.data())
def test_the_shares_of_all_ranks_give_the_tensor_back(world: int, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, files = catalog_in_memory(tensors)
    back = {name: bytearray(b"\x5a" * catalog.nbytes(i)) for i, name in enumerate(catalog.names)}
    for rank in range(world):
        plan = plan_shares(catalog, kinds, rank=Rank(rank, world), dtype="keep")
        shares, content = stored(plan.tensors, carry_out(plan, files), "rank")
        inverse = invert_plan(plan, shares)
        assert not inverse.fills
        done = carry_out(inverse, {"rank": content}, back)
        back = {name: bytearray(value) for name, value in done.items()}
    expected = {name: tensor_bytes(catalog, files, name) for name in catalog.names}
    assert expected == {name: bytes(value) for name, value in back.items()}


@given(worlds, st.sampled_from(["bf16", "f16", "f32"]), st.data())
def test_shares_are_cast_where_they_are_plain_floats(
    world: int, dtype: str, data: st.DataObject
) -> None:
    some = ("F64", "F32", "F16", "BF16", "I32", "F8_E4M3", "F4")
    tensors, kinds = data.draw(shared_tensors(world, dtypes=some))
    catalog, files = catalog_in_memory(tensors)
    rank = data.draw(st.integers(0, world - 1))
    kept = carry_out(plan_shares(catalog, kinds, rank=Rank(rank, world), dtype="keep"), files)
    plan = plan_shares(catalog, kinds, rank=Rank(rank, world), dtype=dtype)
    assert faults(plan) == []
    for name, value in carry_out(plan, files).items():
        before = catalog.dtypes[catalog.row[name]]
        goal = CAST_NAMES[dtype] if DTYPES[before].floating else before
        assert goal == plan.tensors.dtypes[plan.tensors.row[name]]
        expected = np.frombuffer(kept[name], numpy_dtype(before))
        if DTYPES[before].floating:
            expected = cast_array(expected, str(goal))
        assert expected.tobytes() == value


@given(worlds, st.data())
def test_wide_elements_come_first_then_file_order(world: int, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, _ = catalog_in_memory(tensors)
    plan = plan_shares(catalog, kinds, rank=Rank(0, world), dtype="keep")
    expected = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].bits)
    assert [name for name, _, _ in expected] == list(plan.tensors.names)


@pytest.mark.parametrize(
    ("dtype", "shape", "kind"),
    [
        ("F4", (4, 3), Split(1)),
        ("F4", (6,), Split(0)),
        ("F6_E2M3", (4, 4), Split(1)),
        ("F4", (3, 2), Split(1)),
        ("F4", (2, 1), Vocabulary()),
    ],
)
def test_a_share_that_cuts_a_byte_is_refused(dtype: str, shape: Shape, kind: Kind) -> None:
    world = 3 if kind == Split(1) and shape[1] == 3 else 2
    if shape == (2, 1):
        world = 4
    catalog, _ = catalog_in_memory([("the.name", dtype, shape)])
    for rank in range(world):
        with pytest.raises(NotNested, match=r"the\.name: a share of \d-bit elements") as error:
            plan_shares(catalog, [kind], rank=Rank(rank, world), dtype="keep")
        assert error.value.tensor == "the.name"


@given(worlds, st.integers(0, 9), st.data())
def test_padding_is_told_as_boxes(world: int, rows: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["F32", "BF16", "F4", "F6_E3M2"]))
    columns = data.draw(st.integers(1, 2)) * 4
    catalog, _ = catalog_in_memory([("t", dtype, (rows, columns))])
    each = -(-rows // world)
    for rank in range(world):
        plan = plan_shares(catalog, [Vocabulary()], rank=Rank(rank, world), dtype="keep")
        held = min(max(rows - rank * each, 0), each)
        expected = {"t": [[[held, each], [0, columns]]]} if held < each else {}
        assert expected == padding_boxes(plan.fills, plan.tensors)


@given(worlds, st.data())
def test_the_identity_copies_every_byte(world: int, data: st.DataObject) -> None:
    tensors, _ = data.draw(shared_tensors(world))
    catalog, files = catalog_in_memory(tensors, files=2)
    plan = plan_identity(catalog)
    assert faults(plan) == []
    expected = {name: tensor_bytes(catalog, files, name) for name in catalog.names}
    assert expected == carry_out(plan, files)
    assert sum(map(len, expected.values())) == bytes_wanted([plan])


@given(worlds, st.data())
def test_bytes_wanted_are_the_union_of_what_is_read(world: int, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, _ = catalog_in_memory(tensors)
    ranks = data.draw(st.lists(st.integers(0, world - 1), max_size=4))
    plans = [plan_shares(catalog, kinds, rank=Rank(r, world), dtype="keep") for r in ranks]
    assert len(bytes_read(plans)) == bytes_wanted(plans)


loops = st.lists(st.tuples(st.integers(1, 3), small, small), max_size=2)
moves = st.builds(lambda s, d, n: Move(s, d, canonical(n)), small, small, loops)


@given(st.lists(moves, max_size=4), st.sampled_from([("F32", "U8"), ("F32", "F32"), ("U8", "U8")]))
def test_bytes_wanted_are_right_for_any_copies(found: list[Move], tags: tuple[str, str]) -> None:
    catalog, _ = one_tensor(25, dtype="F32")
    tensors = Tensors(("t",), ("F32",), ((25,),))
    copies = [Copy(0, 0, tags[i % 2], tags[i % 2], move) for i, move in enumerate(found)]
    plan = make_plan(catalog, tensors, copies)
    assert len(bytes_read([plan])) == bytes_wanted([plan])


@given(
    st.lists(moves, max_size=4),
    st.lists(
        st.tuples(small, st.lists(st.tuples(st.integers(1, 3), small), max_size=2)), max_size=2
    ),
    st.lists(st.tuples(small, st.binary(max_size=3)), max_size=2),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_a_plan_without_faults_defines_each_byte_once(
    copies: list[Move],
    fills: list[tuple[int, list[tuple[int, int]]]],
    literals: list[tuple[int, bytes]],
    source: int,
    dest: int,
) -> None:
    plan = plan_of(
        *(Copy(0, 0, "U8", "U8", move) for move in copies),
        source=source,
        dest=dest,
        fills=tuple(Fill(0, "U8", Region(at, tuple(n)), b"\0") for at, n in fills),
        literals=tuple(Literal(0, at, value) for at, value in literals),
    )
    written = Counter(i for move in copies for i in sides(move)[1].tolist())
    written += Counter(i for at, n in fills for i in offsets(at, n).tolist())
    written += Counter(at + i for at, value in literals for i in range(len(value)))
    reads = {i for move in copies for i in sides(move)[0].tolist()}
    sound = written == Counter(range(dest)) and reads <= set(range(source))
    found = faults(plan)
    assert sound == (not found)


@given(worlds, st.data())
def test_a_plan_that_lost_a_copy_has_a_fault(world: int, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, _ = catalog_in_memory(tensors)
    plan = plan_shares(catalog, kinds, rank=Rank(0, world), dtype="keep")
    for i, copy in enumerate(plan):
        rest = [other for j, other in enumerate(plan) if j != i]
        broken = make_plan(catalog, plan.tensors, rest, plan.fills)
        nbytes = copy.move.size * DTYPES[copy.dest_dtype].itemsize
        name, whole = plan.tensors.names[copy.dest], plan.tensors.nbytes(copy.dest)
        assert [f"{name}: {nbytes} of {whole} bytes are not defined"] == faults(broken)


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        ([copy_of(0, 0, (8, 1, 1))], []),
        ([copy_of(0, 0, (4, 1, 1)), copy_of(0, 4, (4, 1, 1))], []),
        ([copy_of(0, 0, (4, 2, 2)), copy_of(1, 1, (4, 2, 2))], []),
        ([copy_of(0, 0, (7, 1, 1))], ["t: 1 of 8 bytes are not defined"]),
        ([], ["t: 8 of 8 bytes are not defined"]),
        ([copy_of(0, 1, (8, 1, 1))], ["t: writes past its end"]),
        ([copy_of(0, 0, (9, 0, 1))], ["t: writes past its end"]),
        ([copy_of(1, 0, (8, 1, 1))], ["t: reads past t"]),
        ([copy_of(0, 0, (8, 1, 1)), copy_of(0, 3, (2, 1, 1))], ["t: elements are written twice"]),
        ([copy_of(0, 0, (4, 1, 2)), copy_of(0, 2, (4, 1, 1))], ["t: elements are written twice"]),
        ([copy_of(0, 0, (8, 1, 0))], ["t: elements are written twice"]),
        ([copy_of(0, 0, (4, 1, 1), (2, 0, 2))], ["t: elements are written twice"]),
        ([copy_of(0, 0, (2, 1 << 62, 4), (4, 1, 1))], ["t: reads past t"]),
        ([copy_of(0, 0, (8, 1 << 62, 1))], ["t: reads past t"]),
        (
            # 8 elements to those who count them in 64 bits.
            [copy_of(0, 0, ((2**64 + 8) // 3, 0, 3), (3, 0, 1))],
            ["t: writes past its end"],
        ),
        (
            [copy_of(0, 0, (1 << 62, 1, 1), (4, 1, 1))],
            ["t: reads past t", "t: writes past its end"],
        ),
    ],
)
def test_faults_name_what_is_wrong(copies: list[Copy], expected: list[str]) -> None:
    plan = plan_of(*copies, source=8, dest=8)
    assert expected == faults(plan)
    if expected:
        with pytest.raises(PlanError, match=f"the plan has {len(expected)} faults: t: "):
            check_plan(plan)
    else:
        check_plan(plan)


def test_strides_need_not_nest() -> None:
    even, third = copy_of(0, 0, (2, 1, 2)), copy_of(0, 1, (2, 1, 3))
    assert faults(plan_of(even, third, copy_of(0, 3), source=8, dest=5)) == []
    assert len(faults(plan_of(even, third, copy_of(0, 2), source=8, dest=5))) == 1


def test_fills_and_literals_count_as_written() -> None:
    fill = Fill(0, "U8", Region(2, ((3, 1),)), b"\0")
    literal = Literal(0, 5, b"abc")
    one = copy_of(0, 0, (2, 1, 1))
    whole = plan_of(one, source=2, dest=8, fills=(fill,), literals=(literal,))
    assert faults(whole) == []
    short = plan_of(one, source=2, dest=8, fills=(fill,))
    assert faults(short) == ["t: 3 of 8 bytes are not defined"]
    twice = plan_of(one, source=2, dest=8, fills=(fill, fill), literals=(literal,))
    assert faults(twice) == ["t: elements are written twice"]


@given(worlds, worlds, st.data())
def test_shares_of_one_topology_compose_to_those_of_another(
    before: int, after: int, data: st.DataObject
) -> None:
    rows = before * after * data.draw(st.integers(0, 2))
    columns = before * after * 4
    dtype = data.draw(st.sampled_from(["F32", "BF16", "F4", "U8"]))
    kinds = st.sampled_from([Split(0), Split(1), Vocabulary(), Replicate()])
    pairs = data.draw(st.lists(st.tuples(kinds, kinds), min_size=1, max_size=3))
    tensors = [(str(i), dtype, (rows, columns)) for i in range(len(pairs))]
    catalog, files = catalog_in_memory(tensors)
    firsts = []
    for rank in range(before):
        plan = plan_shares(catalog, [a for a, _ in pairs], rank=Rank(rank, before), dtype="keep")
        shares, content = stored(plan.tensors, carry_out(plan, files), "rank")
        firsts.append((invert_plan(plan, shares), content))
    rank = data.draw(st.integers(0, after - 1))
    second = plan_shares(catalog, [b for _, b in pairs], rank=Rank(rank, after), dtype="keep")
    expected = carry_out(second, files)
    actual = {name: bytearray(len(value)) for name, value in expected.items()}
    for first, content in firsts:
        done = carry_out(compose_plans(first, second), {"rank": content}, actual)
        actual = {name: bytearray(value) for name, value in done.items()}
    assert expected == {name: bytes(value) for name, value in actual.items()}


@given(worlds, worlds, st.integers(0, 9), st.sampled_from(["F32", "BF16", "F4"]))
def test_padding_goes_on_through_composition(
    before: int, after: int, rows: int, dtype: str
) -> None:
    catalog, files = catalog_in_memory([("t", dtype, (rows, 4))])
    for rank in range(before):
        first = plan_shares(catalog, [Vocabulary()], rank=Rank(rank, before), dtype="keep")
        middle, content = stored(first.tensors, carry_out(first, files), "rank")
        for then in range(after):
            second = plan_shares(middle, [Vocabulary()], rank=Rank(then, after), dtype="keep")
            plan = compose_plans(first, second)
            assert faults(plan) == []
            assert carry_out(second, {"rank": content}) == carry_out(plan, files)


@given(st.sampled_from(["bf16", "f16", "f32"]), st.booleans(), st.integers(0, 5))
def test_one_cast_goes_through_composition(dtype: str, early: bool, rows: int) -> None:
    catalog, files = catalog_in_memory([("t", "F64", (rows, 4))])
    casts = [dtype, "keep"] if early else ["keep", dtype]
    first = plan_shares(catalog, [Vocabulary()], rank=Rank(0, 3), dtype=casts[0])
    middle, content = stored(first.tensors, carry_out(first, files), "rank")
    second = plan_shares(middle, [Split(1)], rank=Rank(1, 2), dtype=casts[1])
    plan = compose_plans(first, second)
    assert faults(plan) == []
    assert carry_out(second, {"rank": content}) == carry_out(plan, files)


def test_two_casts_of_the_same_elements_are_refused() -> None:
    catalog, _ = catalog_in_memory([("t", "F64", (4,))])
    first = plan_shares(catalog, [Replicate()], rank=Rank(0, 1), dtype="f16")
    middle, _ = stored(first.tensors, {"t": bytes(8)}, "rank")
    second = plan_shares(middle, [Replicate()], rank=Rank(0, 1), dtype="bf16")
    with pytest.raises(PlanError, match="t: was cast from F64 to F16 and would be cast again"):
        compose_plans(first, second)


@given(
    st.sampled_from(["F64", "F32", "F16", "BF16"]),
    st.sampled_from(["bf16", "f16", "f32"]),
    st.binary(min_size=64, max_size=64),
)
def test_a_stop_at_f32_is_no_cast_of_its_own(tag: str, goal: str, raw: bytes) -> None:
    values = np.frombuffer(raw, dtype=numpy_dtype(tag))
    with np.errstate(invalid="ignore"):
        values = values[values == values]  # NaN loses its payload on the way
    catalog, files = catalog_in_memory([("t", tag, values.shape)])
    files = {name: files[name][: -values.nbytes] + values.tobytes() for name in files}
    first = plan_shares(catalog, [Replicate()], rank=Rank(0, 1), dtype="f32")
    middle, content = stored(first.tensors, carry_out(first, files), "rank")
    second = plan_shares(middle, [Replicate()], rank=Rank(0, 1), dtype=goal)
    composed = compose_plans(first, second)
    assert carry_out(composed, files) == carry_out(second, {"rank": content})


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.data())
def test_literals_go_on_through_composition(values: list[int], data: st.DataObject) -> None:
    tensors = Tensors(("t",), ("F16",), ((2, 4),))
    first = make_plan(one_tensor(0)[0], tensors, (), (), [Literal(0, 4, bytes(values))])
    middle, content = stored(tensors, {"t": bytes(4) + bytes(values) + bytes(4)}, "m")
    kind = data.draw(st.sampled_from([Split(0), Split(1), Replicate()]))
    dtype = data.draw(st.sampled_from(["keep", "f32"]))
    second = plan_shares(middle, [kind], rank=Rank(data.draw(st.integers(0, 1)), 2), dtype=dtype)
    expected = carry_out(second, {"m": content})
    plan = compose_plans(first, second)
    zeros = {name: bytearray(len(value)) for name, value in expected.items()}
    assert expected == carry_out(plan, {}, zeros)
    assert not len(plan)


def test_a_literal_whose_destination_has_gaps_is_cut() -> None:
    tensors = Tensors(("t",), ("U8",), ((6,),))
    first = make_plan(one_tensor(0)[0], tensors, (), (), [Literal(0, 0, b"abcdef")])
    spread = Copy(0, 0, "U8", "U8", Move(0, 1, ((3, 2, 5), (2, 1, 1))))
    middle, _ = stored(tensors, {"t": b"abcdef"}, "m")
    second = make_plan(middle, Tensors(("t",), ("U8",), ((13,),)), [spread])
    expected = (Literal(0, 1, b"ab"), Literal(0, 6, b"cd"), Literal(0, 11, b"ef"))
    assert expected == compose_plans(first, second).literals


def test_plans_that_count_in_different_units_compose_as_bytes() -> None:
    catalog, files = one_tensor(6, dtype="F32")
    swapped = [Move(0, 3, ((3, 1, 1),)), Move(3, 0, ((3, 1, 1),))]
    tensors = Tensors(("t",), ("F32",), ((6,),))
    first = make_plan(catalog, tensors, [Copy(0, 0, "F32", "F32", move) for move in swapped])
    middle, _ = stored(tensors, carry_out(first, files), "m")
    second = make_plan(middle, tensors, [Copy(0, 0, "U8", "U8", Move(0, 0, ((24, 1, 1),)))])
    plan = compose_plans(first, second)
    assert carry_out(first, files) == carry_out(plan, files)
    assert {"U8"} == {copy.source_dtype for copy in plan}


def test_tensors_that_only_one_plan_has_are_left_out() -> None:
    first = plan_identity(catalog_in_memory([("a", "U8", (2,)), ("b", "U8", (2,))])[0])
    second = plan_identity(catalog_in_memory([("b", "U8", (2,)), ("c", "U8", (2,))])[0])
    plan = compose_plans(first, second)
    assert [(first.catalog.names[c.source], plan.tensors.names[c.dest]) for c in plan] == [
        ("b", "b")
    ]
    assert faults(plan) == ["c: 2 of 2 bytes are not defined"]


def test_what_does_not_nest_is_named() -> None:
    first = plan_of(copy_of(0, 0, (9999, 1, 3)), source=9999, dest=3 * 9999)
    second = plan_of(copy_of(0, 0, (9999, 2, 1)), source=2 * 9999, dest=9999)
    with pytest.raises(
        NotNested, match=r"^t: strides 3 and 2 do not nest.*; shard from the source"
    ):
        compose_plans(first, second)


def test_a_cast_has_no_inverse() -> None:
    catalog, _ = catalog_in_memory([("t", "F32", (4,))])
    plan = plan_shares(catalog, [Replicate()], rank=Rank(0, 1), dtype="bf16")
    with pytest.raises(PlanError, match="t: was cast from F32 to BF16, which cannot be undone"):
        invert_plan(plan, stored(plan.tensors, {"t": bytes(8)}, "rank")[0])


def test_a_plan_prints_its_size() -> None:
    catalog, _ = catalog_in_memory([("a", "U8", (1 << 20,)), ("b", "F32", (3, 2))], files=2)
    plan = plan_shares(catalog, [Split(0), Vocabulary()], rank=Rank(1, 2), dtype="keep")
    expected = "2 copies, 1 fills, 0.5 MiB in 2 tensors from 2 files"
    assert expected == str(plan)


@given(st.lists(moves, max_size=4))
def test_copies_come_back_as_views(found: list[Move]) -> None:
    copies = [Copy(0, 0, "U8", "U8", move) for move in found]
    plan = plan_of(*copies, source=99, dest=99)
    assert copies == list(plan)
    assert len(copies) == len(plan)


def test_what_is_empty_is_left_out() -> None:
    empty = Region(0, ((0, 1),))
    plan = plan_of(
        copy_of(0, 0, (0, 1, 1)),
        source=0,
        dest=0,
        fills=(Fill(0, "U8", empty, b"\0"),),
        literals=(Literal(0, 0, b""),),
    )
    assert [list(plan), list(plan.fills), list(plan.literals)] == [[], [], []]
    assert faults(plan) == []
    assert bytes_wanted([plan]) == bytes_wanted([]) == prod([0])


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # of three source tensors
            st.integers(0, 20),
            st.lists(st.tuples(st.integers(2, 4), st.integers(0, 9)), max_size=3),
        ),
        max_size=6,
    )
)
def test_bytes_wanted_is_the_union_of_all_elements_that_copies_read(drawn):
    catalog = catalog_of_bytes(3, 200)
    copies, touched = [], set()
    for row, offset, loops in drawn:
        strides, size = [], 1
        for n, source in reversed(loops):
            strides.append((n, source, size))
            size *= n
        copies.append(Copy(row, 0, "U8", "U8", Move(offset, 0, canonical(reversed(strides)))))
        for steps in itertools.product(*(range(n) for n, _ in loops)):
            at = offset + sum(i * s for i, (_, s) in zip(steps, loops, strict=True))
            touched.add((row, at))
    tensors = Tensors(("made",), ("U8",), ((64,),))
    assert bytes_wanted([make_plan(catalog, tensors, copies)]) == len(touched)
    halves = [make_plan(catalog, tensors, part) for part in (copies[::2], copies[1::2])]
    assert bytes_wanted(halves) == len(touched)


def catalog_of_bytes(count, nbytes):
    """Return a catalog of flat tensors of bytes, one after the other in one file."""
    return Catalog(
        tuple(f"t{i}" for i in range(count)),
        ("U8",) * count,
        ((nbytes,),) * count,
        ("model.safetensors",),
        (count * nbytes,),
        np.zeros(count, dtype=np.int32),
        np.arange(count, dtype=np.int64) * nbytes,
    )
