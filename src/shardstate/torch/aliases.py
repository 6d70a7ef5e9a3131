"""Which of several tensors over the same memory are stored.

vLLM's `ShardedStateLoader._filter_subtensors` decides which names are in its files, and its loader
decides the same way which names it expects. The choice here is equal wherever that works.
It does not where `view(-1)` cannot find a tensor's end, nor on meta, where every pointer is 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a tensor lies in its storage."""

    name: str
    begin: int  # bytes: an address, or on meta from the storage's start
    end: int  # one past its last byte
    contiguous: bool
    view: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
    flat: bool  # one stride walks it all, so that vLLM's `view(-1)` works


def filter_subtensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors to store: of those that share memory, the ones that cover the others.

    Of equal ones the smaller name stays; empty tensors are left out. The order is that of
    `tensors`, group by group as vLLM has it.
    """
    return {name: tensors[name] for name, kept in alias_of(tensors).items() if name == kept}


def equal_groups(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Return the groups of names that are one and the same tensor: the stored name first."""
    shared = {name: tensors[name] for names in _storages(tensors) if names[1:] for name in names}
    groups: dict[object, list[str]] = defaultdict(list)
    for name, tensor in shared.items():
        extent = _extent(name, tensor)
        groups[_storage_key(tensor), extent.begin, extent.view].append(name)
    stored = alias_of(shared)
    return sorted(
        tuple(sorted(names, key=lambda name: (stored[name] != name, name)))
        for names in groups.values()
        if len(names) > 1
    )


def alias_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return, for each tensor that is not empty, the name under which its memory is stored."""
    stored: dict[str, str] = {}
    for names in _storages(tensors):
        if len(names) == 1:  # most have a storage of their own
            stored[names[0]] = names[0]
            continue
        group = [_extent(name, tensors[name]) for name in names]
        cover = {extent.name: _cover(extent, group) for extent in group}
        for extent in group:
            name = extent.name
            while name not in stored and cover[name] != name:
                name = cover[name]
            stored[extent.name] = stored.get(name, name)
    return stored


def _storages(tensors: Mapping[str, torch.Tensor]) -> Iterable[list[str]]:
    """Return the names of each storage's tensors, empty ones left out."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            groups[_storage_key(tensor)].append(name)
    return groups.values()


def _cover(extent: _Extent, group: list[_Extent]) -> str:
    """Return the first of `group` that is stored in place of `extent`, else its own name."""
    return next((other.name for other in group if _covers(other, extent)), extent.name)


def _covers(other: _Extent, extent: _Extent) -> bool:
    """Whether `other` is stored in place of `extent`; a strict order, so that it ends."""
    if other.contiguous:
        if extent.begin < other.begin or other.end < extent.end:
            return False
        larger = other.begin < extent.begin or extent.end < other.end
        return larger or not extent.contiguous or other.name < extent.name
    # vLLM keeps equal tensors of one stride both; where it fails, one of them is enough.
    equal = (other.begin, other.view) == (extent.begin, extent.view)
    return equal and not extent.flat and other.name < extent.name


def _storage_key(tensor: torch.Tensor) -> object:
    if tensor.is_meta:
        return "meta", tensor.untyped_storage()._cdata  # all that tells one from another
    # Without making an object of the storage, which takes longer than all the rest.
    return tensor.device, tensor.data_ptr() - tensor.storage_offset() * tensor.element_size()


def _extent(name: str, tensor: torch.Tensor) -> _Extent:
    width = tensor.element_size()
    begin = tensor.storage_offset() * width if tensor.is_meta else tensor.data_ptr()
    shape, strides = tuple(tensor.shape), tuple(int(s) for s in tensor.stride())
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    loops = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    flat = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(loops))
    return _Extent(
        name,
        int(begin),
        int(begin) + (last + 1) * width,
        tensor.is_contiguous(),
        (shape, strides, tensor.dtype),
        flat,
    )
