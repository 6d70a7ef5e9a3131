"""What vLLM's own default loader makes of a checkpoint, rank by rank, in one process."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, XLMRobertaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype


def pretend_torchvision() -> None:
    """Let vLLM's vision models be imported without torchvision: only their processors call it."""
    inner = ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")
    for name in ("", *(f".{name}" for name in (*inner, "io", "ops"))):
        module = ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.__path__ = []
        module.__getattr__ = lambda _: MagicMock()  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        parent, _, own = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def loosen() -> None:
    """Let models be built here that this machine could not run."""
    if importlib.util.find_spec("torchvision") is None:
        pretend_torchvision()
    # vLLM starts a Python to look at each model class, for seconds; a fork needs no such care.
    registry._run_in_subprocess = lambda function: function()
    # Without AMX; nothing is computed here.
    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda *_: (True, None))
    for experts in ("Fp8", "Int4", "Int8", "Mxfp4"):
        getattr(cpu_moe, f"CPUExperts{experts}")._supports_current_device = staticmethod(
            lambda: True
        )
    # jina-embeddings-v3 brings this class along, and vLLM looks at the name.
    jina = type("XLMRobertaFlashConfig", (XLMRobertaConfig,), {"model_type": "xlm-roberta-flash"})
    AutoConfig.register("xlm-roberta-flash", jina)


loosen()

CPU = torch.device("cpu")
# Every group of vLLM 0.32; all that is not listed in `groups_of` is None.
GROUPS = (
    *("_WORLD", "_INNER_DP_WORLD", "_NODE_COUNT", "_TP", "_ETP", "_ENGRAM_DP"),
    *("_DCP", "_PP", "_DP", "_EP", "_EPLB", "_PCP"),
)


class Members:
    """What vLLM asks a process group while it builds a model: how many, and which am I."""

    def __init__(self, size: int, rank: int) -> None:
        self.size = lambda: size
        self.rank = lambda: rank


def engine_config(folder: Path, *, tp: int, pp: int = 1, **engine_args: Any) -> VllmConfig:
    """Return what vLLM's engine makes of a checkpoint folder and these arguments."""
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "mp" if tp * pp > 1 else None,
    }
    return EngineArgs(
        **arguments | {"tensor_parallel_size": tp, "pipeline_parallel_size": pp} | engine_args
    ).create_engine_config()


def group_of(name: str, rank: int, ranks: Sequence[int]) -> GroupCoordinator:
    """Return a group that knows its members and can talk to none of them."""
    group: GroupCoordinator = object.__new__(GroupCoordinator)
    members = Members(len(ranks), list(ranks).index(rank))
    group.__dict__ |= {
        "unique_name": f"{name}:0",
        "rank": rank,
        "ranks": list(ranks),
        "group_ranks": [list(ranks)],
        "world_size": len(ranks),
        "rank_in_group": list(ranks).index(rank),
        "local_rank": rank,
        "device_index": rank,
        "device": CPU,
        "cpu_group": members,
        "device_group": members,
        "torch_distributed_backend": "gloo",
        "use_device_communicator": False,
        "device_communicator": None,
        "mq_broadcaster": None,
        "use_custom_op_call": False,
        "use_cpu_custom_send_recv": False,
        "_pending_isends": deque(),
    }
    return group


def groups_of(config: VllmConfig, rank: int) -> dict[str, Any]:
    """Return the values of `GROUPS` that worker `rank` of dp x pp x tp has."""
    parallel = config.parallel_config
    tp, pp, dp = (
        getattr(parallel, f"{axis}_parallel_size") for axis in ("tensor", "pipeline", "data")
    )
    inner = tp * pp
    replica, stage, own = rank // inner, rank // tp % pp, rank % tp
    first = replica * inner + stage * tp
    members: dict[str, Sequence[int]] = {
        "_WORLD": range(dp * inner),
        "_INNER_DP_WORLD": range(replica * inner, (replica + 1) * inner),
        "_TP": range(first, first + tp),
        "_PP": range(replica * inner + own, (replica + 1) * inner, tp),
        "_DP": range(rank % inner, dp * inner, inner),
        "_PCP": (rank,),
        "_DCP": (rank,),
    }
    if config.model_config.is_moe:
        members["_EP"] = [r for r in range(dp * inner) if r // tp % pp == stage]
    groups: dict[str, Any] = {
        name: group_of(name.strip("_").lower(), rank, ranks) for name, ranks in members.items()
    }
    return dict.fromkeys(GROUPS) | groups | {"_ETP": groups["_TP"], "_NODE_COUNT": 1}


@contextmanager
def as_worker(config: VllmConfig, rank: int) -> Iterator[None]:
    """Make vLLM believe, for a while, that this process is worker `rank` of those of `config`."""
    old = {name: getattr(parallel_state, name) for name in GROUPS}
    parallel = config.parallel_config
    before = parallel.rank, parallel.data_parallel_rank
    try:
        parallel.data_parallel_rank, parallel.rank = divmod(rank, parallel.world_size)
        for name, group in groups_of(config, rank).items():
            setattr(parallel_state, name, group)
        with set_current_vllm_config(config):
            yield
    finally:
        parallel.rank, parallel.data_parallel_rank = before
        for name, group in old.items():
            setattr(parallel_state, name, group)


def forget_layers(config: VllmConfig) -> None:
    """Let another model be built with `config`, which refuses layer names that it has seen."""
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()


@contextmanager
def nan_memory() -> Iterator[None]:
    """Let memory that nobody writes hold NaN, or the greatest integer, instead of chance."""
    old = torch.are_deterministic_algorithms_enabled()
    old_fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
    finally:
        torch.use_deterministic_algorithms(old)
        torch.utils.deterministic.fill_uninitialized_memory = old_fill


def build(config: VllmConfig, device: torch.device = CPU) -> torch.nn.Module:
    """Return the model of the worker that `as_worker` plays, its parameters not loaded."""
    forget_layers(config)
    with nan_memory(), set_default_torch_dtype(config.model_config.dtype), device:
        return initialize_model(config)


def default_state(config: VllmConfig, rank: int) -> dict[str, torch.Tensor]:
    """Return the state of worker `rank` after vLLM's own loading, before it processes weights."""
    with as_worker(config, rank):
        model = build(config)
        with set_default_torch_dtype(config.model_config.dtype):
            DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
    return model.state_dict()


def run_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a fork of this process, or raise with its traceback."""
    with tempfile.TemporaryFile() as answer:
        if (child := os.fork()) == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                try:
                    result = (True, function(*arguments))
                except BaseException:
                    result = (False, traceback.format_exc())
                torch.save(result, answer)  # pickle alone cannot take 8-bit floats
                answer.flush()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"the child ended with status {os.waitstatus_to_exitcode(status)}")
        answer.seek(0)
        worked, value = torch.load(answer, weights_only=False)
    if not worked:
        raise RuntimeError(f"in the child:\n{value}")
    return value
