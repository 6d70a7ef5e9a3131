"""`load`: the tensors of one rank as torch tensors."""

from __future__ import annotations

import os

import numpy as np
import torch

from shardstate.api.loading import load_rank
from shardstate.api.planning import RulesArgument
from shardstate.dtypes import DTYPES

_TORCH = {
    dtype.numpy: getattr(torch, dtype.torch)
    for dtype in DTYPES.values()
    if dtype.torch is not None and not dtype.packed and hasattr(torch, dtype.torch)
}


def load(
    path: str | os.PathLike[str],
    *,
    rank: int,
    tp: int | None = None,
    rules: RulesArgument = None,
    dtype: str = "keep",
    pattern: str | None = None,
    verify: bool = False,
    map: bool = False,  # noqa: A002
) -> dict[str, torch.Tensor]:
    """Return the tensors of one rank on the CPU: `shardstate.load` for torch.

    The tensors lie over the memory of the arrays; nothing is copied. Alias names share one tensor.
    """
    arrays, _ = load_rank(
        path,
        rank=rank,
        tp=tp,
        rules=rules,
        dtype=dtype,
        pattern=pattern,
        verify=verify,
        map=map,
    )
    made = {id(array): _tensor(array) for array in arrays.values()}
    return {name: made[id(array)] for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over the memory of a contiguous array."""
    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(_TORCH[array.dtype.name]).view(array.shape)
