"""vLLM's parallel state: which worker this process is, and how to pretend that it is one.

The only module that asks vLLM for ranks. The offline part builds the model once per rank in one
process: groups are there, with ranks and sizes, but nobody to talk to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import GroupCoordinator

from shardstate.errors import UsageError
from shardstate.sharding import Topology
from shardstate.torch.ranks import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_GROUPS = (
    "_WORLD", "_INNER_DP_WORLD", "_TP", "_ETP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB",
    "_ENGRAM_DP", "_NODE_COUNT",
)  # fmt: skip


def topology_of(config: VllmConfig) -> Topology:
    """Return the topology that decides what each worker holds.

    Data-parallel workers hold the same, unless there are experts: these span them, whole ones with
    expert parallelism and slices of each without.
    """
    parallel = config.parallel_config
    dp = parallel.data_parallel_size if config.model_config.is_moe else 1
    return Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, dp)


def check_expressible(config: VllmConfig) -> None:
    """Raise `UsageError` where workers differ in more ways than a topology has."""
    size = config.parallel_config.prefill_context_parallel_size
    if size > 1 and config.model_config.is_moe:
        raise UsageError(
            f"prefill_context_parallel_size is {size}: experts span these workers, and sets have "
            f"only tp, pp and dp; load the checkpoint itself, without a cache"
        )


def place_of(config: VllmConfig) -> Place:
    """Return this worker's place in `topology_of(config)`."""
    topology = topology_of(config)
    return Place(
        parallel_state.get_tensor_model_parallel_rank(),
        topology.tp,
        parallel_state.get_pipeline_model_parallel_rank(),
        topology.pp,
        False,
        parallel_state.get_dp_group().rank_in_group if topology.dp > 1 else 0,
    )


def rank_of(config: VllmConfig) -> int:
    """Return this worker's global rank."""
    return place_of(config).index


@contextmanager
def as_worker(config: VllmConfig, rank: int) -> Iterator[None]:
    """Let vLLM believe that this process is worker `rank`, global, of `topology_of(config)`.

    Whatever would talk to another worker fails. The state before is restored.
    """
    topology = topology_of(config)
    tp, pp, dp = topology.tp, topology.pp, topology.dp
    ranks = torch.arange(topology.world).reshape(dp, pp, tp)

    def group(name: str, *axes: int) -> GroupCoordinator:
        """Return the group that spans `axes` of (dp, pp, tp) and holds `rank`."""
        others = [axis for axis in range(3) if axis not in axes]
        size = 1
        for axis in axes:
            size *= ranks.shape[axis]
        rows: list[list[int]] = ranks.permute(*others, *axes).reshape(-1, size).tolist()
        return _group(name, rows, rank)

    world = group("world", 0, 1, 2)
    made: dict[str, Any] = dict.fromkeys(_GROUPS)
    made |= {
        "_WORLD": world, "_INNER_DP_WORLD": group("inner_dp_world", 1, 2),
        "_TP": group("tp", 2), "_DCP": group("dcp"), "_PCP": group("pcp"),
        "_PP": group("pp", 1), "_DP": group("dp", 0), "_NODE_COUNT": 1,
    }  # fmt: skip
    made["_ETP"] = made["_TP"]
    if config.model_config.is_moe:
        made["_EP"] = group("ep", 0, 2)
        if config.parallel_config.enable_eplb:
            made["_EPLB"] = made["_EP"]
    parallel = config.parallel_config
    before = {name: getattr(parallel_state, name) for name in _GROUPS}
    own = parallel.rank, parallel.data_parallel_rank
    with ExitStack() as stack:
        stack.callback(lambda: _restore(before))
        stack.callback(lambda: _be(config, *own))
        _restore(made)
        _be(config, rank % (pp * tp), rank // (pp * tp))
        stack.enter_context(set_current_vllm_config(config, check_compile=False))
        yield


@dataclass(frozen=True)
class _Nobody:
    """What models ask of a process group while they are built."""

    world_size: int
    index: int

    def size(self) -> int:
        return self.world_size

    def rank(self) -> int:
        return self.index


def _be(config: VllmConfig, rank: int, dp_rank: int) -> None:
    config.parallel_config.rank = rank
    config.parallel_config.data_parallel_rank = dp_rank


def _restore(groups: dict[str, Any]) -> None:
    for name, value in groups.items():
        setattr(parallel_state, name, value)


def _group(name: str, rows: Sequence[Sequence[int]], rank: int) -> GroupCoordinator:
    """Return the group among `rows` that holds `rank`, without any process behind it."""
    made: Any = object.__new__(GroupCoordinator)
    made.unique_name = f"{name}:shardstate"
    made.rank, made.local_rank, made.device_index = rank, 0, 0
    made.group_ranks = rows
    made.ranks = next(row for row in rows if rank in row)
    made.world_size, made.rank_in_group = len(made.ranks), made.ranks.index(rank)
    made.device = torch.device("cpu")
    made.cpu_group = made.device_group = _Nobody(made.world_size, made.rank_in_group)
    made.device_communicator = made.mq_broadcaster = None
    made.use_device_communicator = made.use_custom_op_call = False
    made.use_cpu_custom_send_recv = False
    made.torch_distributed_backend = "gloo"
    made._pending_isends = deque()
    return made  # type: ignore[no-any-return]
