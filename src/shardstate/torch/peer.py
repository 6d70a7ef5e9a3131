"""What `bench` measures beside the engine: `safe_open` and `copy_`, as vLLM's loader does it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from safetensors import safe_open

from shardstate.raw import Span

_ALIGN = 64


def read_by_safetensors(spans: Sequence[Span], names: frozenset[str], memory: np.ndarray) -> float:
    """Copy the tensors called `names` of the files of `spans` into `memory`; return the seconds."""
    room = torch.from_numpy(memory)
    began, at = time.perf_counter(), 0
    for path in dict.fromkeys(span.path for span in spans):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in names:
                    continue
                tensor = opened.get_tensor(name)
                goal = room[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                goal.copy_(tensor)
                at += -(-tensor.nbytes // _ALIGN) * _ALIGN
    return time.perf_counter() - began
