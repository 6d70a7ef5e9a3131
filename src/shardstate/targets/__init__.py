"""Where the engine puts bytes: memory of tensors, rank files, digests, a comparison."""

from shardstate.targets.base import Direct, Target
from shardstate.targets.check import CompareTarget, DigestTarget
from shardstate.targets.files import FilesTarget
from shardstate.targets.hashing import StoredDigests
from shardstate.targets.memory import MemoryTarget, allocate

__all__ = [
    "CompareTarget",
    "DigestTarget",
    "Direct",
    "FilesTarget",
    "MemoryTarget",
    "StoredDigests",
    "Target",
    "allocate",
]
