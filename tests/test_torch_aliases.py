"""Which of several tensors over the same memory are stored."""

import random

import pytest
import torch
from hypothesis import given

from memories import shared_memory
from shardstate.torch import filter_subtensors
from shardstate.torch.aliases import alias_of, equal_groups

MEMORY = torch.arange(24, dtype=torch.float32)


def kept(tensors):
    return list(filter_subtensors(tensors))


def elements(tensor):
    """Return the addresses of the bytes of a tensor, by walking over its elements."""
    places = {tensor.data_ptr()} if tensor.numel() else set()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * tensor.element_size()
        places = {place + i * step for place in places for i in range(size)}
    return {place + i for place in places for i in range(tensor.element_size())}


def on_meta(tensors):
    """Return views of the same places as `tensors`, over meta storages."""
    storages = {}
    found = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        if key not in storages:
            nbytes = tensor.untyped_storage().nbytes()
            storages[key] = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(
            storages[key].untyped_storage(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        found[name] = meta
    return found


def test_tensors_of_their_own_are_all_kept_in_their_order():
    tensors = {name: torch.zeros(3) for name in "cab"}
    assert kept(tensors) == ["c", "a", "b"]
    assert all(filter_subtensors(tensors)[name] is tensors[name] for name in "cab")


def test_of_views_the_one_that_covers_the_others_is_kept():
    tensors = {"a": MEMORY[:6], "b": MEMORY[3:20], "c": MEMORY, "d": MEMORY.view(4, 6)[1]}
    assert kept(tensors) == ["c"]


def test_views_that_only_overlap_are_both_kept():
    assert kept({"a": MEMORY[:12], "b": MEMORY[6:]}) == ["a", "b"]


def test_of_equal_tensors_the_smaller_name_is_kept():
    assert kept({"b": MEMORY, "a": MEMORY, "c": MEMORY}) == ["a"]


def test_of_equal_memory_with_other_shapes_and_dtypes_the_smaller_name_is_kept():
    assert kept({"b": MEMORY, "a": MEMORY.view(torch.int16), "c": MEMORY.view(4, 6)}) == ["a"]


def test_empty_tensors_are_left_out():
    assert kept({"a": torch.zeros(0, 3), "b": torch.zeros(1), "c": MEMORY[:0]}) == ["b"]


def test_a_scalar_is_kept():
    assert kept({"a": torch.tensor(3.0)}) == ["a"]


def test_a_transposed_tie_is_left_to_what_is_contiguous():
    weight = torch.zeros(4, 6)
    assert kept({"a": weight.t(), "b": weight}) == ["b"]


def test_strided_tensors_whose_end_view_cannot_find_are_kept():
    # vLLM raises here: view size is not compatible with input tensor's size and stride
    columns = MEMORY.view(4, 6)[:, :3]
    with pytest.raises(RuntimeError, match="view"):
        columns.view(-1)
    assert kept({"a": columns}) == ["a"]
    assert kept({"a": columns, "b": MEMORY}) == ["b"]


def test_of_equal_strided_tensors_the_smaller_name_is_kept():
    columns = MEMORY.view(4, 6)[:, :3]
    assert kept({"b": columns, "a": MEMORY.view(4, 6)[:, :3]}) == ["a"]


def test_other_strides_from_one_address_are_no_tie():
    assert kept({"a": MEMORY.view(4, 6)[:, :3], "b": MEMORY.view(4, 6)[:3].t()}) == ["a", "b"]


def test_meta_tensors_are_told_apart_by_storage_and_offset():
    # All their pointers are 0, so that vLLM keeps one of them.
    whole = torch.empty(4, 6, device="meta")
    other = torch.empty(4, 6, device="meta")
    tensors = {"a": whole[1:], "b": whole, "c": other, "d": whole, "e": other[:, :2]}
    assert kept(tensors) == ["b", "c"]


@given(shared_memory())
def test_on_meta_the_choice_is_that_of_real_memory(tensors):
    # In memory the int16 view shares the storage too, so the groups are the same.
    assert kept(tensors) == kept(on_meta(tensors))


@given(shared_memory())
def test_what_is_kept_covers_all_memory(tensors):
    stored = set().union(*(elements(tensor) for tensor in filter_subtensors(tensors).values()))
    wanted = set().union(*(elements(tensor) for tensor in tensors.values()))
    assert wanted <= stored


@given(shared_memory())
def test_every_name_leads_to_one_that_is_stored(tensors):
    stored = alias_of(tensors)
    assert {name for name, tensor in tensors.items() if tensor.numel()} == set(stored)
    assert set(stored.values()) == set(filter_subtensors(tensors))


@given(shared_memory())
def test_the_choice_does_not_depend_on_the_order(tensors):
    names = list(tensors)
    random.Random(0).shuffle(names)
    assert set(kept(tensors)) == set(kept({name: tensors[name] for name in names}))


@given(shared_memory())
def test_groups_are_tensors_that_are_one_and_the_same(tensors):
    for first, *others in equal_groups(tensors):
        for other in others:
            assert tensors[first].data_ptr() == tensors[other].data_ptr()
            assert tensors[first].shape == tensors[other].shape
            assert tensors[first].stride() == tensors[other].stride()
            assert tensors[first].dtype == tensors[other].dtype


def test_groups_begin_with_the_name_that_is_stored():
    tensors = {"c": MEMORY, "a": MEMORY, "b": MEMORY, "d": torch.zeros(2), "e": MEMORY[:3]}
    assert equal_groups(tensors) == [("a", "b", "c")]


def test_thousands_of_nested_views_are_no_problem():
    memory = torch.zeros(1100)
    assert kept({f"v{i:04}": memory[: i + 1] for i in range(1100)}) == ["v1099"]
