"""Ranks and sizes where the caller gives none: those of the process group."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch

from shardstate.errors import UsageError
from shardstate.sharding import Topology


@dataclass(frozen=True, slots=True)
class Place:
    """One worker's place; `group` where it comes from torch.distributed."""

    rank: int  # tensor-parallel
    tp: int
    pp_rank: int
    pp: int
    group: bool
    dp_rank: int = 0  # where experts span data-parallel workers

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def index(self) -> int:
        """The global rank."""
        return (self.dp_rank * self.pp + self.pp_rank) * self.tp + self.rank


def in_group() -> bool:
    """Whether a process group is initialised."""
    distributed = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())


def place_of(*, rank: int | None, tp: int | None, pp_rank: int | None, pp: int | None) -> Place:
    """Return the place that the arguments say, completed by the process group, else rank 0 of 1.

    `UsageError` where they contradict each other or the group.
    """
    group = in_group() and rank is None and pp_rank is None
    if group:
        world, own = torch.distributed.get_world_size(), torch.distributed.get_rank()
        stages = pp or 1
        width = tp or world // stages
        if width * stages != world:
            raise UsageError(
                f"tp {width} × pp {stages} are not the {world} ranks of the process group; "
                f"give rank and pp_rank if others save elsewhere"
            )
        return Place(own % width, width, own // width, stages, True)
    if tp is None and in_group():
        tp = torch.distributed.get_world_size() // (pp or 1)
    place = Place(rank or 0, 1 if tp is None else tp, pp_rank or 0, 1 if pp is None else pp, False)
    Topology(place.tp, place.pp)
    for name, value, size in (("rank", place.rank, place.tp), ("pp_rank", place.pp_rank, place.pp)):
        if not 0 <= value < size:
            raise UsageError(f"{name} {value} is out of range; expected 0 to {size - 1}")
    return place


def broadcast_id() -> str:
    """Return rank 0's random id, on all ranks of the process group."""
    found = [secrets.token_hex(16)]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
