"""The entry point that vLLM calls in every process: registers the load format."""

from __future__ import annotations

import logging


def register() -> None:
    """Register `--load-format shardstate`, and let our lines appear among vLLM's."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from shardstate.vllm.loader import ShardedStateLoader

    if _LOAD_FORMAT_TO_MODEL_LOADER.get("shardstate") is not ShardedStateLoader:
        register_model_loader("shardstate")(ShardedStateLoader)
    ours, theirs = logging.getLogger("shardstate"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = False
