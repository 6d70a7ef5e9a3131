"""What an engine and a set must agree on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

import vllm
from shardstate.checkpoint import Checkpoint
from shardstate.errors import SetError
from shardstate.manifest import SetInfo, Sizes
from shardstate.vllm.parallel import check_expressible, topology_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_log = logging.getLogger("shardstate")

ENGINE = "vllm"
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# Engine arguments that decide which experts a worker holds, and leave names and shapes as they are.
_PLACEMENT = ("enable_expert_parallel", "expert_placement_strategy", "enable_eplb")


def engine_version() -> str:
    """Return vLLM's version without its build."""
    return vllm.__version__.split("+")[0]


def platform() -> str:
    """Return what vLLM runs on: cpu, cuda, …"""
    return str(current_platform._enum.name).lower()


def describe_engine(config: VllmConfig, model_config: ModelConfig, *, pattern: str) -> SetInfo:
    """Return what a set says that is made for the engine of `config`; its source is left out."""
    topology = topology_of(config)
    names = {name: dtype for dtype, name in DTYPES.items()}
    return SetInfo(
        topology=Sizes(topology.tp, topology.pp, topology.dp),
        layout="vllm",
        stage="model",
        pattern=pattern,
        dtype=names[_dtype_name(model_config)],
        quantization=model_config.quantization,
        platform=platform(),
        engine=ENGINE,
        engine_version=engine_version(),
    )


def placement_of(config: VllmConfig) -> dict[str, Any]:
    """Return the engine's own values of the arguments that place experts."""
    return {key: getattr(config.parallel_config, key) for key in _PLACEMENT}


def _dtype_name(model_config: ModelConfig) -> str:
    return str(model_config.dtype).removeprefix("torch.")


def check_engine(
    checkpoint: Checkpoint, config: VllmConfig, model_config: ModelConfig, *, strict: bool
) -> None:
    """Raise `SetError` that lists where a set and the engine differ; shapes are compared later.

    Without `strict` another version of the engine, or another stage, is only logged.
    """
    check_expressible(config)
    topology, info = checkpoint.topology, checkpoint.info
    assert topology is not None
    own = topology_of(config)
    sizes = {"tp": (topology.tp, own.tp), "pp": (topology.pp, own.pp), "dp": (topology.dp, own.dp)}
    if checkpoint.kind == "vllm" and not config.model_config.is_moe:
        del sizes["dp"]
    pairs: dict[str, tuple[Any, Any]] = dict(sizes)
    if info is not None:
        pairs["stage"] = info.stage, "model"
        if info.engine is not None:
            engine = f"{info.engine} {info.engine_version}"
            pairs["engine"] = engine, f"{ENGINE} {engine_version()}"
            pairs["quantization"] = info.quantization, model_config.quantization
            defaults = EngineArgs.__dataclass_fields__
            for key, value in placement_of(config).items():
                pairs[key] = info.engine_arguments.get(key, defaults[key].default), value
        if info.dtype != "keep":
            pairs["dtype"] = DTYPES[info.dtype], _dtype_name(model_config)
    wrong = {key: f"{key} {a} (the engine has {b})" for key, (a, b) in pairs.items() if a != b}
    if not strict:
        for text in (wrong.pop(key, None) for key in ("engine", "stage")):
            if text is not None:
                _log.warning("shardstate: %s is a set for %s", checkpoint.location, text)
    if info is not None and info.platform not in (None, platform()):
        _log.warning(
            "shardstate: %s was made for platform %s, and this is %s; names, shapes and dtypes are "
            "compared", checkpoint.location, info.platform, platform(),
        )  # fmt: skip
    if wrong:
        raise SetError(
            f"{checkpoint.location}: is a set for {', '.join(wrong.values())}; "
            f"start the engine that way, or shard the source for this one"
        )
