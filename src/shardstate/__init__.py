"""Gets the weights of large models into workers: sharded or ordinary, reading only their bytes."""

from shardstate.api import inspect, load, open, plan, shard, sign, verify  # noqa: A004
from shardstate.checkpoint import Checkpoint
from shardstate.errors import ShardStateError
from shardstate.report import Problem, Report

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Problem",
    "Report",
    "ShardStateError",
    "__version__",
    "inspect",
    "load",
    "open",
    "plan",
    "shard",
    "sign",
    "verify",
]
