from __future__ import annotations

import json
from importlib.resources import files
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import share_of, shared_tensors
from shardstate.errors import NoRule, RulesError, UnevenSplit, UsageError
from shardstate.sharding import (
    MAX_RANKS,
    TABLES,
    Kind,
    KvHeads,
    Rank,
    Replicate,
    Rule,
    Split,
    Topology,
    Vocabulary,
    check_shares,
    describe,
    match_rules,
    parse_rules,
    rules_json,
    share,
)

worlds = st.sampled_from([1, 2, 3, 4, 8])
kinds = st.one_of(
    st.just(Replicate()),
    st.just(Vocabulary()),
    st.builds(Split, st.integers(0, 63), st.integers(1, 512)),
    st.builds(KvHeads, st.integers(1, 64), st.integers(0, 63)),
)


def assign(names, rules, *, where):
    return [rule.kind for rule in match_rules(names, rules, where=where)]


def parse(text: str, config: dict[str, Any] | None = None) -> tuple[Rule, ...]:
    return parse_rules(text.encode(), config=config, where="rules.json")


@given(worlds, st.data())
def test_every_rank_holds_its_share(world: int, data: st.DataObject) -> None:
    tensors, drawn = data.draw(shared_tensors(world))
    names, _, shapes = zip(*tensors, strict=True)
    check_shares(names, shapes, drawn, world=world)
    for shape, kind in zip(shapes, drawn, strict=True):
        whole = np.arange(1, prod(shape) + 1).reshape(shape)
        for rank in range(world):
            expected = share_of(whole, kind, rank, world)
            held = share(kind, shape, Rank(rank, world))
            assert all(0 <= b <= e <= n for (b, e), n in zip(held.box, shape, strict=True))
            actual = np.zeros(held.shape, dtype=int)
            actual[tuple(slice(e - b) for b, e in held.box)] = whole[
                tuple(slice(b, e) for b, e in held.box)
            ]
            assert expected.shape == held.shape
            assert expected.tolist() == actual.tolist()


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 4)), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), max_size=2),
    st.integers(1, 24),
)
def test_uneven_splits_are_refused_with_what_would_work(
    splits: list[tuple[int, int]], heads: list[int], world: int
) -> None:
    drawn: list[Kind] = [
        *(Split(0, unit) for _, unit in splits),
        *(KvHeads(count) for count in heads),
    ]
    shapes = [*((n * unit,) for n, unit in splits), *((count * 2,) for count in heads)]
    names = [str(i) for i in range(len(shapes))]

    def fits(world: int) -> bool:
        return all(n % world == 0 for n, _ in splits) and all(
            count % world == 0 or world % count == 0 for count in heads
        )

    if fits(world):
        check_shares(names, shapes, drawn, world=world)
        return
    with pytest.raises(UnevenSplit) as error:
        check_shares(names, shapes, drawn, world=world)
    assert tuple(n for n in range(1, 65) if fits(n)) == error.value.works
    assert error.value.world == world
    assert error.value.tensor in names


def test_an_uneven_split_says_what_where_and_what_to_do() -> None:
    with pytest.raises(UnevenSplit) as error:
        check_shares(["a", "b"], [(9, 2), (6,)], [Split(0), Split(0, 3)], world=2)
    expected = (
        "a: axis 0 of size 9 has 9 elements, which 2 ranks cannot share evenly; tp 1 would work"
    )
    assert expected == str(error.value)
    assert (error.value.axis, error.value.size, error.value.unit) == (0, 9, 1)


def test_an_uneven_split_counts_the_others() -> None:
    with pytest.raises(UnevenSplit, match=r"has 3 units of 2, .*\(and 1 more tensors like it\)"):
        check_shares(["a", "b"], [(6,), (9,)], [Split(0, 2), Split(0)], world=2)


def test_a_size_that_is_no_multiple_of_the_unit_is_the_rules_fault() -> None:
    with pytest.raises(UnevenSplit, match=r"a: axis 1 has 6 elements, .* unit 4; mend the rule"):
        check_shares(["a"], [(2, 6)], [Split(1, 4)], world=1)


def test_heads_that_do_not_divide_the_axis_are_the_rules_fault() -> None:
    with pytest.raises(UnevenSplit, match="a: axis 0 has 6 elements, which 4 heads cannot share"):
        check_shares(["a"], [(6,)], [KvHeads(4)], world=1)


@pytest.mark.parametrize("kind", [Split(2), KvHeads(1, 2), Vocabulary()])
def test_a_rule_for_an_axis_that_is_not_there_is_refused(kind: Kind) -> None:
    shape = () if kind == Vocabulary() else (4, 4)
    with pytest.raises(RulesError, match=r"a: its rule splits axis \d, and its shape is") as error:
        check_shares(["a"], [shape], [kind], world=1)
    assert error.value.tensor == "a"


def test_ranks_are_checked() -> None:
    with pytest.raises(UsageError, match="rank 4 is out of range; with tp 4 ranks are 0 to 3"):
        Rank(4, 4)
    with pytest.raises(UsageError, match="rank -1 is out of range"):
        Rank(-1, 4)
    with pytest.raises(UsageError, match="tp is 0; it must be from 1 to 65536"):
        Rank(0, 0)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
@pytest.mark.parametrize("size", [-1, 0, MAX_RANKS + 1])
def test_sizes_of_a_topology_are_checked(axis: str, size: int) -> None:
    with pytest.raises(UsageError, match=f"{axis} is {size}; it must be from 1 to {MAX_RANKS}"):
        Topology(**{"tp": 1, axis: size})


def test_the_world_is_the_product_of_the_topology() -> None:
    assert [Topology(8).world, Topology(4, 3, 2).world] == [8, 24]


@pytest.mark.parametrize(
    ("match", "name", "expected"),
    [
        ("weight", "a.weight", True),
        ("proj.weight", "q_proj.weight", False),
        ("q_proj.weight", "layers.0.q_proj.weight", True),
        ("layers.*.q_proj.weight", "model.layers.11.q_proj.weight", True),
        ("layers.*.q_proj.weight", "layers.q_proj.weight", False),
        ("*.weight", "weight", False),
        ("*", "anything", True),
        ("weight", "weight.x", False),
        ("a.b.c", "b.c", False),
    ],
)
def test_names_match_by_whole_components_from_the_right(
    match: str, name: str, expected: bool
) -> None:
    rule = Rule(match, Replicate())
    assert expected == rule.matches(name.split("."))
    if expected:
        assert assign([name], [rule], where="w") == [Replicate()]
    else:
        with pytest.raises(NoRule):
            assign([name], [rule], where="w")


def test_the_first_rule_that_matches_wins() -> None:
    rules = [Rule("q.weight", Split(0)), Rule("*", Replicate()), Rule("weight", Vocabulary())]
    expected = [Split(0), Replicate()]
    assert expected == assign(["a.q.weight", "k.weight"], rules, where="w")


def test_names_without_a_rule_are_all_listed() -> None:
    with pytest.raises(NoRule) as error:
        assign(["a", "b", "c"], [Rule("b", Replicate())], where="the table")
    assert error.value.names == ("a", "c")
    assert "no rule of the table matches 2 tensors: a, c;" in str(error.value)


@given(st.lists(st.builds(Rule, st.sampled_from(["a", "a.*.b", "*"]), kinds)))
def test_rules_survive_their_json(rules: list[Rule]) -> None:
    written = rules_json(rules)
    assert tuple(rules) == parse_rules(written, config=None, where="w")
    assert written == rules_json(parse_rules(written, config=None, where="w"))


def test_entries_of_the_configuration_stand_for_numbers() -> None:
    text = (
        '[{"match":"q","split":0,"unit":"head_dim"},{"match":"k","kv_heads":"num_key_value_heads"}]'
    )
    full = {"head_dim": 64, "num_key_value_heads": 4}
    derived = {"hidden_size": 256, "num_attention_heads": 4}
    expected = (Rule("q", Split(0, 64)), Rule("k", KvHeads(4)))
    assert expected == parse(text, full)
    assert expected == parse(text, derived)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("5", "rule 1: a rule is a JSON object"),
        ('{"match":"a"}', "give exactly one of"),
        ('{"match":"a","split":0,"replicate":true}', "give exactly one of"),
        ('{"match":"a","kv_heads":2,"vocabulary":true}', "give exactly one of"),
        ('{"match":"a","replicate":false}', '"replicate" can only be true, found False'),
        ('{"match":"a","vocabulary":1}', '"vocabulary" can only be true, found 1'),
        ('{"match":"a","split":-1}', "must be an axis, 0 or more, found -1"),
        ('{"match":"a","split":true}', "must be an axis, 0 or more, found True"),
        ('{"match":"a","split":"0"}', "must be an axis, 0 or more, found '0'"),
        ('{"match":"a","split":0,"unit":0}', '"unit" must be a positive number, found 0'),
        ('{"match":"a","split":0,"unit":2.0}', '"unit" must be a positive number, found 2.0'),
        ('{"match":"a","unit":2,"replicate":true}', '"unit" goes with "split" alone'),
        ('{"match":"a","kv_heads":true}', '"kv_heads" must be a positive number, found True'),
        ('{"match":"a","kv_heads":"heads"}', "found None \\('heads' in config.json\\)"),
        ('{"match":"a..b","replicate":true}', '"match" must be the end of a tensor name'),
        ('{"match":"","replicate":true}', '"match" must be the end of a tensor name'),
        ('{"replicate":true}', '"match" must be the end of a tensor name'),
        ('{"match":"a","replicate":true,"x":1}', r"unknown keys \['x'\]; known are"),
    ],
)
def test_a_wrong_rule_is_refused(entry: str, message: str) -> None:
    with pytest.raises(RulesError, match=message) as error:
        parse(f"[{entry}]", {"other": 1})
    assert error.value.file == "rules.json"


@pytest.mark.parametrize("text", ["", "{}", "[", '"a"', "[" * 100_000, "\xff", '["\xff"]'])
def test_what_is_no_list_of_rules_is_refused(text: str) -> None:
    with pytest.raises(RulesError, match=r"rules\.json: "):
        parse_rules(text.encode("latin-1"), config=None, where="rules.json")


def test_all_wrong_rules_are_listed() -> None:
    with pytest.raises(RulesError, match=r"rule 1: .*; rule 3: "):
        parse('[1,{"match":"a","replicate":true},2]')


def test_a_name_from_a_configuration_that_is_not_there_is_refused() -> None:
    with pytest.raises(RulesError, match=r"an entry of config\.json, and there is none"):
        parse('[{"match":"a","kv_heads":"heads"}]')


@pytest.mark.parametrize("table", sorted(set(TABLES.values())))
def test_the_built_in_tables_are_rules(table: str) -> None:
    data = files("shardstate").joinpath("tables", f"{table}.json").read_bytes()
    config = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    rules = parse_rules(data, config=config, where=table)
    assert len(rules) == len(json.loads(data))
    assert len({rule.match for rule in rules}) == len(rules)


@given(kinds)
def test_kinds_are_said_in_words(kind: Kind) -> None:
    words = describe(kind)
    axis = getattr(kind, "axis", None)
    assert (axis is not None) == (f"along axis {axis}" in words)
