"""Other readers of rank files, as explicit choices; the checks around them are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from shardstate.catalog import Catalog
from shardstate.checkpoint import Checkpoint
from shardstate.dtypes import DTYPES
from shardstate.errors import InputError, ShardStateError, UsageError

Backend = Callable[[Checkpoint, Catalog, Mapping[str, torch.Tensor]], None]


def _safetensors(
    checkpoint: Checkpoint, catalog: Catalog, goals: Mapping[str, torch.Tensor]
) -> None:
    """Fill `goals` by plain `safe_open`."""
    from safetensors import safe_open

    for file in catalog.files:
        with safe_open(f"{checkpoint.location}/{file}", framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in goals:
                    goals[name].copy_(opened.get_tensor(name))


def _runai(checkpoint: Checkpoint, catalog: Catalog, goals: Mapping[str, torch.Tensor]) -> None:
    """Fill `goals` by runai-model-streamer."""
    try:
        from runai_model_streamer import SafetensorsStreamer
    except ImportError:
        raise UsageError(
            "backend runai needs runai-model-streamer: pip install 'shardstate[runai]'"
        ) from None
    if packed := [t.name for t in catalog if DTYPES[t.dtype].packed]:
        raise UsageError(f"{packed[0]}: runai cannot read types below a byte; use native")
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"{checkpoint.location}/{file}" for file in catalog.files])
        for name, tensor in streamer.get_tensors():
            if name in goals:
                goals[name].copy_(tensor)


BACKENDS: Mapping[str, Backend] = MappingProxyType({"safetensors": _safetensors, "runai": _runai})


def fill(
    backend: str, checkpoint: Checkpoint, catalog: Catalog, goals: Mapping[str, torch.Tensor]
) -> None:
    """Fill `goals` from the files of `catalog`; what a backend raises comes out as `InputError`."""
    try:
        BACKENDS[backend](checkpoint, catalog, goals)
    except ShardStateError:
        raise
    except Exception as error:
        raise InputError(
            f"{checkpoint.location}: backend {backend} failed: {error}; try native"
        ) from error
