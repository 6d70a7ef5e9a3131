"""Plans for vLLM's own tensors of each rank, without GPU and without engine.

The model is built on the meta device once per rank, its own loading code runs on stand-ins, and
what that does is the plan.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import Any, cast

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype

from shardstate.api.planners import Made, Request, quiet_vllm
from shardstate.checkpoint import Checkpoint
from shardstate.digest import digest_of
from shardstate.errors import InputError, ShardStateError, UsageError
from shardstate.garbage import without_collection
from shardstate.names import check_pattern, default_pattern
from shardstate.plan import check_plan
from shardstate.torch.aliases import equal_groups, filter_subtensors
from shardstate.torch.recorder import LITERAL_BYTES, Recorder
from shardstate.vllm.facts import DTYPES, describe_engine
from shardstate.vllm.parallel import as_worker, check_expressible, topology_of
from shardstate.vllm.recording import Registrations
from shardstate.vllm.remote import local_configuration
from shardstate.vllm.weights import (
    Unrecordable,
    Weights,
    check_recordable,
    track,
    weights_of,
)

# What the command line says in another way, and what decides no layout.
_OURS = {
    "model": "SRC",
    "tensor_parallel_size": "--tp",
    "pipeline_parallel_size": "--pp",
    "dtype": "--dtype",
    "load_format": "nothing",
    "model_weights": "SRC",
}


class VllmPlanner:
    """Records the ranks of one checkpoint for one engine configuration."""

    rules_digest = digest_of(b"")

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        if request.rules is not None:
            raise UsageError("layout vllm: vLLM's own code shares the tensors; leave the rules out")
        self._checkpoint = checkpoint
        arguments = dict(request.engine_args or {})
        # vLLM reads configurations from directories only.
        self._folder = local_configuration(checkpoint.storage)
        self._config = _config_of(
            self._folder.name, request.tp, request.pp, request.dtype, arguments
        )
        check_expressible(self._config)
        self.topology = topology_of(self._config)
        pattern = request.pattern or default_pattern(self.topology)
        check_pattern(pattern, self.topology)
        info = describe_engine(self._config, self._config.model_config, pattern=pattern)
        self.info = msgspec.structs.replace(info, engine_arguments=arguments)

    def made(self, rank: int) -> Made:
        """Return the plan of a global rank.

        `InputError` where the model's loading code cannot be followed to the end.
        """
        location = self._checkpoint.location
        if not 0 <= rank < self.topology.world:
            raise UsageError(
                f"rank {rank} is out of range; expected 0 to {self.topology.world - 1}"
            )
        before = Registrations(self._config)
        # All that vLLM imported is no garbage of ours: going through it takes most of a second.
        gc.freeze()
        try:
            with as_worker(self._config, rank), without_collection():
                return self._recorded()
        except Unrecordable as error:
            raise InputError(f"{location}: cannot be sharded without an engine: {error}") from None
        except ShardStateError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise InputError(
                f"{location}: vLLM's loading code refuses it: {type(error).__name__}: {text}"
            ) from error
        finally:
            before.restore()
            gc.collect()
            gc.unfreeze()

    def _recorded(self) -> Made:
        model_config = self._config.model_config
        default = DefaultModelLoader(LoadConfig(load_format="auto", use_tqdm_on_load=False))
        assert self._checkpoint.catalog is not None
        stored = self._checkpoint.storage
        threads = stored.traits.read_threads
        nothing = Weights(stored, self._checkpoint.catalog, [], threads, {})
        recorder = Recorder(nothing.catalog, nothing.read, offline=True)
        with recorder, set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
            model = initialize_model(self._config)
        check_recordable(model, model_config)
        weights = weights_of(stored, default, model, model_config, threads=threads)
        with closing(weights.storage) if weights.storage is not stored else nullcontext():
            recorder.redirect(weights.catalog, weights.read)
            with recorder:
                loaded = cast(Any, model).load_weights(weights.offer(recorder))
        track(default, model, model_config, loaded)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        plan = recorder.plan_of(filter_subtensors(state), literal_bytes=LITERAL_BYTES)
        check_plan(plan)
        return Made(
            plan,
            self.topology,
            aliases=equal_groups(state),
            materialised=recorder.materialised.tensors,
            materialised_bytes=recorder.materialised.nbytes,
        )


def knows(checkpoint: Checkpoint) -> bool:
    """Whether this vLLM has a model of its own for what a checkpoint's configuration names."""
    names = (checkpoint.config() or {}).get("architectures") or []
    return any(name in ModelRegistry.get_supported_archs() for name in names)


def _config_of(
    location: str, tp: int, pp: int, dtype: str, engine_args: Mapping[str, Any]
) -> VllmConfig:
    for key in engine_args:
        if key in _OURS:
            raise UsageError(f"engine arguments: {key} is what {_OURS[key]} says; leave it out")
        if key not in EngineArgs.__dataclass_fields__:
            raise UsageError(f"engine arguments: vLLM's EngineArgs knows no {key}")
    given = {"skip_tokenizer_init": True, "enforce_eager": True, **engine_args}
    try:
        args = EngineArgs(
            model=location,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            dtype=DTYPES.get(dtype, "auto"),  # type: ignore[arg-type]
            **given,
        )
        with quiet_vllm():
            return args.create_engine_config()
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(f"{location}: vLLM cannot serve it that way: {text}") from error
