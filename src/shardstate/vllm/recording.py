"""What recording inside vLLM needs around the recorder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from shardstate.torch.recorder import RecordingError, Standin

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Registrations:
    """What building a model leaves in its configuration, to build it a second time.

    Layers register themselves by name, and a name that is there already is refused.
    """

    def __init__(self, config: VllmConfig) -> None:
        owners = [config.compilation_config]
        if config.quant_config is not None:
            owners.append(config.quant_config)
        self._before = [
            (owner, name, value, copy.copy(value))
            for owner in owners
            for name, value in vars(owner).items()
            if isinstance(value, dict | list | set)
        ]

    def restore(self) -> None:
        """Put everything back as it was; the containers stay the same objects."""
        for owner, name, value, before in self._before:
            current: Any = value
            current.clear()
            current.extend(before) if isinstance(value, list) else current.update(before)
            setattr(owner, name, value)


def check_whole(model: torch.nn.Module) -> None:
    """Raise `RecordingError` where a stand-in became a part of the model."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        lost = isinstance(tensor, Standin) or (
            tensor.numel() and not tensor.is_meta and tensor.untyped_storage().data_ptr() == 0
        )
        if lost:
            raise RecordingError(f"{name}: the loading code keeps the weight itself", tensor=name)
