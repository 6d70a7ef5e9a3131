"""Each operation: open, plan, execute. Owns every default; the command line only calls this."""

from shardstate.api.benching import bench
from shardstate.api.caching import cache_list, cache_prune
from shardstate.api.checking import verify
from shardstate.api.copying import copy
from shardstate.api.loading import inspect, load, load_rank, plan
from shardstate.api.planning import open_path as open  # noqa: A004
from shardstate.api.signing import sign
from shardstate.api.writing import MAX_PART_SIZE, parse_size, shard
from shardstate.storage import TIMEOUT_SECONDS, Access, Reading

CACHE_SIZE = "100GB"  # `Access` has it in bytes

__all__ = [
    "CACHE_SIZE",
    "MAX_PART_SIZE",
    "TIMEOUT_SECONDS",
    "Access",
    "Reading",
    "bench",
    "cache_list",
    "cache_prune",
    "copy",
    "inspect",
    "load",
    "load_rank",
    "open",
    "parse_size",
    "plan",
    "shard",
    "sign",
    "verify",
]
