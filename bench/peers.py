"""What else gets tensors into parameters that exist: the ways that users could pick instead.

Each takes the files and the goals, {name: tensor}, and fills those whose names it finds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

Goals = Mapping[str, torch.Tensor]
Take = Callable[[str, torch.Tensor], None]


def copy_into(goals: Goals) -> Take:
    """Return what copies a tensor to the goal of its name."""

    def take(name: str, tensor: torch.Tensor) -> None:
        goals[name].copy_(tensor)

    return take


def by_safe_open(files: Sequence[Path], take: Take) -> None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                take(name, opened.get_tensor(name))


def by_load_file(files: Sequence[Path], take: Take) -> None:
    for file in files:
        for name, tensor in load_file(file).items():
            take(name, tensor)


def by_runai(files: Sequence[Path], take: Take) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([os.fspath(file) for file in files])
        for name, tensor in streamer.get_tensors():
            take(name, tensor)


def by_fastsafetensors(files: Sequence[Path], take: Take) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [os.fspath(file) for file in files]})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        take(name, buffers.get_tensor(name))
    buffers.close()
    loader.close()


PEERS: Mapping[str, Callable[[Sequence[Path], Take], None]] = {
    "safe_open + copy_": by_safe_open,
    "load_file + copy_": by_load_file,
    "runai-model-streamer": by_runai,
    "fastsafetensors": by_fastsafetensors,
}
