"""A set of any number of ranks is read as the source that it was made from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import carry_out, catalog_in_memory, stored
from shardstate.catalog import Catalog
from shardstate.errors import PlanError
from shardstate.plan import Plan, plan_shares
from shardstate.restore import plan_source
from shardstate.sharding import KvHeads, Rank, Replicate, Split, Vocabulary

TENSORS = [("q", "BF16", (8, 6)), ("kv", "F32", (4, 3)), ("v", "F16", (7, 4)), ("n", "I32", (5,))]
KINDS = [Split(0), KvHeads(2), Vocabulary(), Replicate()]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 7))
def test_the_source_comes_back_from_the_ranks(world: int, prefer: int) -> None:
    catalog, files = catalog_in_memory(TENSORS)
    contents: dict[str, bytes] = {}
    ranks: list[tuple[Plan, Catalog]] = []
    for index in range(world):
        plan = plan_shares(catalog, KINDS, rank=Rank(index, world), dtype="keep")
        held, content = stored(plan.tensors, carry_out(plan, files), f"rank{index}")
        contents[f"rank{index}"] = content
        ranks.append((plan, held))
    first = plan_source(ranks, prefer=prefer % world)
    whole = plan_shares(catalog, [Replicate()] * 4, rank=Rank(0, 1), dtype="keep")
    assert carry_out(first, contents) == carry_out(whole, files)
    preferred = {first.catalog.files[f] for f in first.catalog.file[first.source]}
    replicated = first.source[first.dest == 3]
    assert {first.catalog.files[first.catalog.file[r]] for r in replicated} == {
        f"rank{prefer % world}"
    }
    assert preferred <= set(contents)


def test_what_was_cast_comes_in_the_dtype_that_is_stored() -> None:
    catalog, files = catalog_in_memory([("t", "F32", (4, 2))])
    plan = plan_shares(catalog, [Replicate()], rank=Rank(0, 1), dtype="bf16")
    made = carry_out(plan, files)
    held, content = stored(plan.tensors, made, "rank0")
    first = plan_source([(plan, held)])
    assert first.tensors.dtypes == ("BF16",)
    assert carry_out(first, {"rank0": content}) == made


def test_a_rank_that_is_missing_leaves_a_hole_that_is_told() -> None:
    catalog, files = catalog_in_memory([("t", "F32", (4, 2))])
    plan = plan_shares(catalog, [Split(0)], rank=Rank(0, 2), dtype="keep")
    held, _ = stored(plan.tensors, carry_out(plan, files), "rank0")
    with pytest.raises(PlanError, match="t: 16 of 32 bytes are not defined"):
        plan_source([(plan, held)])
