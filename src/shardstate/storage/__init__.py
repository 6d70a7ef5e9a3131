"""Storages: bytes by name and range. Today: a local directory."""

from shardstate.storage.base import Entry, Output, Storage, Writable
from shardstate.storage.local import LocalStorage

__all__ = ["Entry", "LocalStorage", "Output", "Storage", "Writable"]
