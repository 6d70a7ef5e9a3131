"""Gets the weights of large models into workers: sharded or ordinary, reading only their bytes."""

from shardstate.api import (
    Access,
    Reading,
    bench,
    copy,
    inspect,
    load,
    open,  # noqa: A004
    plan,
    shard,
    sign,
    verify,
)
from shardstate.checkpoint import Checkpoint
from shardstate.errors import ShardStateError
from shardstate.report import Problem, Report

__version__ = "0.1.0"

__all__ = [
    "Access",
    "Checkpoint",
    "Problem",
    "Reading",
    "Report",
    "ShardStateError",
    "__version__",
    "bench",
    "copy",
    "inspect",
    "load",
    "open",
    "plan",
    "shard",
    "sign",
    "verify",
]
