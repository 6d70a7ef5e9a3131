"""Targets over the memory of torch tensors: the host's directly, a device's through buffers.

The device path is proven here only up to the device's own copy: there is no GPU where this is
tested, and `stage=True` drives all the rest on the CPU. `tests/gpu/` runs where CUDA is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from shardstate.coalesce import Piece, Read
from shardstate.dtypes import DTYPES
from shardstate.targets import MemoryTarget, StoredDigests, Target
from shardstate.targets.base import moved
from shardstate.torch.tensors import bytes_of

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def target_for(
    goals: Sequence[torch.Tensor], digests: StoredDigests | None, *, stage: bool = False
) -> Target:
    """Return what fills `goals`, the tensors of a plan in its order.

    `stage` forces the way that device memory takes, for tests without a device.
    """
    if stage or not lies_in_host(goals):
        return StagedTarget(goals, digests)
    return MemoryTarget([bytes_of(goal).numpy() for goal in goals], digests=digests)


def lies_in_host(goals: Iterable[torch.Tensor]) -> bool:
    """Return whether bytes can be read straight into these tensors."""
    return all(goal.device.type == "cpu" for goal in goals)


class StagedTarget(Target):
    """Fills tensors on a device through two pinned buffers a thread, on a stream of its own.

    What a piece brings is put in order on the host; one asynchronous, perhaps strided, copy takes
    it to its place. While that runs the other buffer is filled.
    """

    def __init__(self, goals: Sequence[torch.Tensor], digests: StoredDigests | None) -> None:
        self._memory = [bytes_of(goal) for goal in goals]
        # What the caller still does to these tensors must not come after what we do.
        for device in {memory.device for memory in self._memory if memory.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._digests = digests
        self._local = threading.local()

    def accept(self, read: Read, staged: np.ndarray | None) -> None:
        for piece in read.pieces:
            self._copy(piece, moved(piece, read, staged))
            if self._digests is not None and staged is not None:
                arrived = staged[piece.begin - read.begin : piece.end - read.begin]
                self._digests.update(piece, piece.begin, arrived)
        for lane in self._lanes.values():
            lane.finish()  # nobody calls again after the last read

    def stop(self) -> None:
        if self._digests is not None:
            self._digests.stop()

    @property
    def _lanes(self) -> dict[torch.device, _Lane]:
        lanes: dict[torch.device, _Lane] = self._local.__dict__.setdefault("lanes", {})
        return lanes

    def _copy(self, piece: Piece, values: np.ndarray) -> None:
        memory = self._memory[piece.dest]
        unit = _UNITS[DTYPES[piece.dest_dtype].itemsize]
        sizes = [loop[0] for loop in piece.move.loops]
        strides = [loop[2] for loop in piece.move.loops]
        goal = memory.view(unit).as_strided(
            sizes, strides, int(memory.view(unit).storage_offset()) + piece.move.dest
        )
        lane = self._lanes.setdefault(memory.device, _Lane(memory.device))
        buffer = lane.buffer(len(values))
        buffer.numpy()[:] = values
        lane.copy(goal, buffer.view(unit).view(sizes))


class _Lane:
    """Two buffers of one thread, and the stream that empties them; only buffers without CUDA."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` bytes that no copy reads any more."""
        self._turn ^= 1
        if (event := self._events[self._turn]) is not None:
            event.synchronize()
        if len(self._buffers[self._turn]) < nbytes:
            pinned = self._stream is not None
            self._buffers[self._turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers[self._turn][:nbytes]

    def copy(self, goal: torch.Tensor, values: torch.Tensor) -> None:
        """Begin to copy the current buffer to its place."""
        if self._stream is None:
            goal.copy_(values)
            return
        with torch.cuda.stream(self._stream):
            goal.copy_(values, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._events[self._turn] = event

    def finish(self) -> None:
        """Wait until all copies are there."""
        if self._stream is not None:
            self._stream.synchronize()
