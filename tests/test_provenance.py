from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import carry_out, catalog_in_memory, shared_tensors
from shardstate.catalog import Tensors
from shardstate.errors import SetError
from shardstate.layout import Move, Region
from shardstate.manifest import seal
from shardstate.plan import Copy, Fill, Literal, Plan, bytes_wanted, make_plan, plan_shares
from shardstate.provenance import parse_provenance, provenance_json
from shardstate.sharding import Rank

Change = Callable[[dict[str, Any]], object]


def small_plan() -> Plan:
    """Return a plan with two copies, a fill and a literal: 4 × 3 float32, and 2 bytes of int4."""
    catalog, _ = catalog_in_memory([("s", "F32", (3, 3)), ("q", "F4", (4,))])
    tensors = Tensors(("t", "p"), ("F32", "F4"), ((4, 3), (4,)))
    return make_plan(
        catalog,
        tensors,
        [
            Copy(0, 0, "F32", "F32", Move(3, 0, ((6, 1, 1),))),
            Copy(1, 1, "U8", "U8", Move(0, 0, ((2, 1, 1),))),
        ],
        [Fill(0, "F32", Region(6, ((3, 1),)), bytes(4))],
        [Literal(0, 36, bytes(range(12)))],
    )


def parse(data: bytes) -> Plan:
    return parse_provenance(data, file="p.json", set_id="s", rank=3)


def written(plan: Plan) -> bytes:
    return provenance_json(plan, set_id="s", rank=3)


def changed(change: Change) -> bytes:
    content = json.loads(written(small_plan()))
    del content["digest"]
    change(content)
    return seal(content)


@given(st.sampled_from([1, 2, 3, 4]), st.sampled_from(["keep", "bf16"]), st.data())
def test_a_plan_survives_its_json(world: int, dtype: str, data: st.DataObject) -> None:
    tensors, kinds = data.draw(shared_tensors(world))
    catalog, files = catalog_in_memory(tensors, files=2)
    rank = Rank(data.draw(st.integers(0, world - 1)), world)
    plan = plan_shares(catalog, kinds, rank=rank, dtype=dtype)
    found = parse(written(plan))
    assert list(plan) == list(found)
    assert plan.fills == found.fills
    assert list(catalog) == list(found.catalog)
    assert (catalog.files, catalog.file_bytes) == (found.catalog.files, found.catalog.file_bytes)
    assert plan.tensors == found.tensors
    assert carry_out(plan, files) == carry_out(found, files)
    assert written(plan) == written(found)


def test_fills_and_literals_survive() -> None:
    plan = small_plan()
    found = parse(written(plan))
    assert plan.fills == found.fills
    assert plan.literals == found.literals
    assert bytes_wanted([plan]) == bytes_wanted([found])


def test_keys_come_in_the_order_of_the_format() -> None:
    expected = [
        "version", "set", "rank", "source", "tensors", "copies", "fills", "literals", "opaque",
        "digest",
    ]  # fmt: skip
    data = written(small_plan())
    assert expected == list(json.loads(data))
    assert b" " not in data


def test_a_bit_flipped_anywhere_is_refused() -> None:
    data = written(small_plan())
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        with pytest.raises(SetError, match=r"^p\.json: .*(digest|damaged)"):
            parse(bytes(broken))


def test_unknown_keys_of_version_1_are_ignored() -> None:
    def grow(content: dict[str, Any]) -> None:
        for table in (content, content["source"], content["copies"], content["fills"]):
            table["later"] = [1, 2]

    assert list(small_plan()) == list(parse(changed(grow)))


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(SetError, match="has format version 2, this shardstate reads 1"):
        parse(changed(lambda c: c.update(version=2)))


@pytest.mark.parametrize(("set_id", "rank"), [("t", 3), ("s", 2)])
def test_provenance_of_another_rank_or_set_is_refused(set_id: str, rank: int) -> None:
    data = provenance_json(small_plan(), set_id=set_id, rank=rank)
    message = f"is the provenance of rank {rank} of set {set_id}, expected rank 3 of s"
    with pytest.raises(SetError, match=message):
        parse(data)


def put(*path: str | int, value: Any) -> Change:
    """Return the change that sets one entry."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["copies"]["dest"].pop(), "columns of different lengths"),
        (lambda c: c["source"]["tensors"]["begin"].append(0), "columns of different lengths"),
        (lambda c: c["fills"]["value"].append("00"), "columns of different lengths"),
        (lambda c: c["literals"]["data"].clear(), "columns of different lengths"),
        (put("copies", "source", 0, value=2), "a source refers to a row that is not there"),
        (put("copies", "dest", 0, value=2), "a dest refers to a row that is not there"),
        (put("fills", "dest", 0, value=9), "a dest refers to a row that is not there"),
        (put("literals", "dest", 0, value=9), "a dest refers to a row that is not there"),
        (put("source", "tensors", "file", 0, value=1), "a file refers to a row that is not there"),
        (put("source", "tensors", "name", 1, value="s"), "names a tensor twice"),
        (put("tensors", "name", 1, value="t"), "names a tensor twice"),
        (put("tensors", "dtype", 0, value="F7"), r"unknown dtypes \['F7'\]"),
        (put("copies", "source_dtype", 0, value="f32"), r"unknown dtypes \['f32'\]"),
        (put("fills", "dtype", 0, value=""), r"unknown dtypes \[''\]"),
        (put("tensors", "dtype", 0, value="F" * 17), "dtype"),
        (put("tensors", "shape", 0, value=[1 << 62, 4]), "t is too large"),
        (put("tensors", "shape", 1, value=[3]), r"p does not fill whole bytes of F4: \[3\]"),
        (
            put("source", "tensors", "shape", 1, value=[5]),
            r"q does not fill whole bytes of F4: \[5\]",
        ),
        (put("copies", "source_offset", 0, value=-1), "source_offset"),
        (put("copies", "source_offset", 0, value=4), "t: reads past s"),
        (put("copies", "source_offset", 0, value=2**63 - 1), "t: reads past s"),
        (put("copies", "dest_offset", 0, value=1), "t: elements are written twice"),
        (put("copies", "dest_offset", 0, value=2**63 - 1), "t: writes past its end"),
        (put("copies", "loops", 0, value=[[6, 1, 0]]), "t: elements are written twice"),
        (put("copies", "loops", 0, value=[[6, 2**62, 1]]), "t: reads past s"),
        (put("copies", "loops", 0, value=[[2**62, 0, 2**62]]), "t: writes past its end"),
        (put("copies", "loops", 0, value=[[5, 1, 1]]), "t: 4 of 48 bytes are not defined"),
        (put("copies", "loops", 0, value=[[6, 1]]), "loops"),
        (put("copies", "loops", 0, value=[[6, -1, 1]]), "loops"),
        (put("fills", "loops", 0, value=[[3, 0]]), "t: elements are written twice"),
        (put("fills", "loops", 0, value=[[2, 1]]), "t: 4 of 48 bytes are not defined"),
        (put("fills", "offset", 0, value=5), "t: elements are written twice"),
        (put("fills", "value", 0, value="0000"), "a fill of F32 has 2 bytes, expected 4"),
        (put("fills", "value", 0, value="0g"), "value"),
        (put("fills", "value", 0, value="000"), "value"),
        (put("fills", "value", 0, value="00000000\n"), "value"),
        (put("literals", "begin", 0, value=37), "t: writes past its end"),
        (put("literals", "begin", 0, value=35), "t: elements are written twice"),
        (put("copies", "source_dtype", 0, value="I32"), "t: casts I32 to F32"),
        (put("copies", "dest_dtype", 0, value="F16"), "t: 12 of 48 bytes are not defined"),
        (put("source", "files", 0, "name", value="../s"), r"'\.\./s', which is no plain file name"),
        (put("source", "tensors", "begin", 0, value=1 << 40), "s: ends past its file"),
        (put("opaque", value=[]), "opaque"),
        (lambda c: c.pop("copies"), "copies"),
    ],
)
def test_what_is_unsound_is_refused(change: Change, message: str) -> None:
    with pytest.raises(SetError, match=message) as error:
        parse(changed(change))
    assert str(error.value).startswith("p.json: ")
    assert error.value.file == "p.json"


@given(st.data())
def test_no_number_makes_anything_but_a_plan_or_an_error(data: st.DataObject) -> None:
    number = st.sampled_from([0, 1, 2, 3, 4, 6, 12, 2**31, 2**32 + 1, 2**61, 2**62, 2**63 - 1])
    loop = st.lists(number, min_size=3, max_size=3)

    def scramble(content: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            table, column, value = data.draw(
                st.sampled_from(
                    [
                        ("copies", "source_offset", number),
                        ("copies", "dest_offset", number),
                        ("copies", "loops", st.lists(loop, max_size=3)),
                        ("fills", "offset", number),
                        ("fills", "loops", st.lists(loop.map(lambda x: x[:2]), max_size=3)),
                        ("literals", "begin", number),
                        ("tensors", "shape", st.lists(number, max_size=3)),
                    ]
                )
            )
            content[table][column][0] = data.draw(value)

    changed_json = changed(scramble)
    try:
        plan = parse(changed_json)
    except SetError:
        return
    assert sum(copy.move.size for copy in plan) <= 18
