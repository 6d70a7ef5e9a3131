"""torch tensors as the rest of the library sees them: dtype tags, bytes, places in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from shardstate.catalog import Catalog
from shardstate.dtypes import DTYPES
from shardstate.errors import InputError, TruncatedFile, UsageError
from shardstate.layout import Loop, Shape, strides_of
from shardstate.plan import Plan, plan_identity
from shardstate.storage import Entry, LocalStorage, PlainReader

TAGS = {
    getattr(torch, dtype.torch): tag
    for tag, dtype in DTYPES.items()
    if dtype.torch is not None and hasattr(torch, dtype.torch)
}


def tag_of(name: str, tensor: torch.Tensor) -> str:
    """Return the safetensors tag of a tensor's dtype; `InputError` where there is none."""
    tag = TAGS.get(tensor.dtype)
    if tag is None:
        raise InputError(f"{name}: dtype {tensor.dtype} has no safetensors type", tensor=name)
    return tag


def stored_shape(tensor: torch.Tensor) -> Shape:
    """Return the shape as headers say it: packed pairs of 4-bit elements count as two."""
    shape = tuple(tensor.shape)
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return (*shape[:-1], 2 * shape[-1]) if shape else shape
    return shape


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether each element has memory of its own that holds its value as it is."""
    if tensor.is_neg() or tensor.is_conj():
        return False
    if tensor.is_contiguous():
        return True
    reach = 0  # from the first element to the last, of the axes seen so far
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((int(stride), size) for stride, size in axes if size > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def check_plain(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for names or tensors that no safetensors file can hold."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise InputError(f"{name!r}: is no name that a safetensors file can hold")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{name!r}: is no name that a safetensors file can hold") from None
        if tensor.layout != torch.strided:
            advice = "store its parts, or tensor.to_dense()"
            raise InputError(f"{name}: has layout {tensor.layout}; {advice}", tensor=name)
        if hasattr(tensor, "to_local"):
            raise InputError(
                f"{name}: is a distributed tensor; give its local part (tensor.to_local())",
                tensor=name,
            )
        if tensor.is_nested:
            raise InputError(f"{name}: is a nested tensor; give its values", tensor=name)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes from a tensor's first element to its last, as flat uint8 over its memory."""
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
        return tensor.reshape(-1).view(torch.uint8)
    width = tensor.element_size()
    begin = int(tensor.storage_offset()) * width
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw.set_(tensor.untyped_storage())
    return raw[begin : begin + extent_of(tensor) * width]


def extent_of(tensor: torch.Tensor) -> int:
    """Return the elements from a tensor's first to its last, gaps included."""
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((n - 1) * int(s) for n, s in pairs) + 1


def loops_of(tensor: torch.Tensor) -> list[Loop]:
    """Return row-major elements → those of `tensor`, as loops."""
    if tensor.is_contiguous():
        return [(tensor.numel(), 1, 1)]
    rows = strides_of(tuple(tensor.shape))
    return [
        (n, row, int(stride))
        for n, row, stride in zip(tensor.shape, rows, tensor.stride(), strict=True)
    ]


class TensorStorage:
    """Tensors as a storage, a file each: what the engine reads when a module is saved.

    A file holds a tensor's elements row-major, whatever its strides. They are put in order, and
    from a device copied to the host, piece by piece.
    """

    location = "memory"
    traits = LocalStorage.traits

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        # Other threads, on other streams, read them: what the caller began must be done.
        for device in {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(name, self.size(name), ()) for name in self._tensors}

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        return (entry for name, entry in self.entries().items() if wanted(name))

    def size(self, name: str) -> int:
        return self._tensors[name].numel() * self._tensors[name].element_size()

    def read(self, name: str, *, limit: int) -> bytes:
        data = bytearray(min(limit, self.size(name)))
        self.read_into(name, 0, [memoryview(data)])
        return bytes(data)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        tensor, size = self._tensors[name], self.size(name)
        for view in views:
            end = begin + view.nbytes
            if end > size:
                raise TruncatedFile(f"{name}: ends at byte {size}, {end} were planned")
            goal = np.frombuffer(view, dtype=np.uint8)
            for raw in _raw_bytes(tensor, begin, end):
                goal[: len(raw)] = raw.cpu().numpy()
                goal = goal[len(raw) :]
            begin = end

    def reader(self, threads: int) -> PlainReader:
        return PlainReader(self, threads)

    def map(self, name: str) -> np.ndarray:
        raise UsageError(f"{name}: lies in memory already")

    def expect(self, files: Mapping[str, int]) -> None:
        pass

    def interrupt(self, on: bool = True) -> None:
        pass

    def close(self) -> None:
        self._tensors.clear()


def _raw_bytes(tensor: torch.Tensor, begin: int, end: int) -> Iterator[torch.Tensor]:
    """Yield bytes `[begin, end)` of the row-major elements of `tensor`, in order, as flat uint8."""
    if tensor.is_contiguous():
        yield bytes_of(tensor)[begin:end]
        return
    width = tensor.element_size()
    if width == 1:
        tensor = tensor.view(torch.uint8)  # not all types can be copied
    at = begin // width * width
    for run in _runs(tensor, begin // width, -(-end // width)):
        raw = bytes_of(run.contiguous())
        yield raw[max(begin - at, 0) : end - at]
        at += len(raw)


def _runs(tensor: torch.Tensor, begin: int, end: int) -> Iterator[torch.Tensor]:
    """Yield views that hold the row-major elements `[begin, end)` of `tensor` in that order."""
    if begin == end:
        return
    if tensor.dim() < 2:
        yield tensor.reshape(-1)[begin:end]
        return
    row = tensor[0].numel()
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # all within one row
        yield from _runs(tensor[last], begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from _runs(tensor[first - 1], begin - (first - 1) * row, row)
    if first < last:
        yield tensor[first:last]
    if last * row < end:
        yield from _runs(tensor[last], 0, end - last * row)


def plan_tensors(tensors: Mapping[str, torch.Tensor]) -> Plan:
    """Return the plan that stores `tensors` row-major, in the order of rank files.

    Item size first, largest first, then name: every rank of a model has the same order.
    """
    tags = {name: tag_of(name, tensor) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-DTYPES[tags[name]].bits, name))
    shapes = tuple(stored_shape(tensors[name]) for name in names)
    dtypes = tuple(tags[name] for name in names)
    catalog = Catalog(
        tuple(names),
        dtypes,
        shapes,
        tuple(names),
        tuple(tensors[name].numel() * tensors[name].element_size() for name in names),
        np.arange(len(names), dtype=np.int32),
        np.zeros(len(names), dtype=np.int64),
    )
    return plan_identity(catalog)
