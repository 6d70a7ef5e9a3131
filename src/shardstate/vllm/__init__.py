"""shardstate inside vLLM: the load format `shardstate`, and sharding without an engine."""

from shardstate.vllm.loader import ShardedStateLoader

__all__ = ["ShardedStateLoader"]
