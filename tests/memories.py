"""Tensors for tests: random bits of any dtype, views of shared memory, and comparisons by bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from hypothesis import strategies as st

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return random bits; every pattern may occur, NaN too (booleans are 0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (prod(shape) * width,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return all that makes two tensors one and the same in a file."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def all_bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def blank(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors of the same shapes and dtypes with other bits."""
    return {
        name: noise(*tensor.shape, dtype=tensor.dtype, seed=99) for name, tensor in tensors.items()
    }


def module_of(parameters: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module with these parameters; one tensor under two names is a tie."""
    made: dict[int, torch.nn.Parameter] = {}
    root = torch.nn.Module()
    for name, tensor in parameters.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        parameter = made.setdefault(id(tensor), torch.nn.Parameter(tensor, requires_grad=False))
        module.register_parameter(last, parameter)
    return root


@st.composite
def shared_memory(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors over a few pieces of memory: views, equal ones, empty ones, any strides."""
    bases = [torch.arange(24, dtype=torch.float32) for _ in range(draw(st.integers(1, 2)))]
    bases.append(bases[0].view(torch.int16))
    names = draw(st.permutations("abcdefgh"))[: draw(st.integers(1, 8))]
    return {name: draw(_view(draw(st.sampled_from(bases)))) for name in names}


@st.composite
def _view(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    kind = draw(st.sampled_from(("whole", "rows", "same rows", "flat", "any", "expanded")))
    if kind == "whole":
        return base.view((draw(st.sampled_from((1, 4, 6, 24))), -1))
    if kind == "rows":
        begin = draw(st.integers(0, 24))
        return base[begin : draw(st.integers(begin, 24))]
    if kind == "same rows":  # so that equal ones are found
        return base[6 : draw(st.sampled_from((6, 12, 18)))].view(draw(_half()))
    if kind == "flat":
        return base[draw(st.integers(0, 4)) :: draw(st.integers(1, 3))]
    if kind == "expanded":
        return base[: draw(st.integers(1, 3))].unsqueeze(0).expand(2, -1)
    sizes: Sequence[int] = draw(st.lists(st.integers(0, 3), max_size=3))
    strides = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    return base.as_strided(sizes, strides, draw(st.integers(0, 4)))


def _half() -> st.SearchStrategy[tuple[int, ...]]:
    return st.sampled_from(((-1,), (-1, 2), (-1, 3)))
