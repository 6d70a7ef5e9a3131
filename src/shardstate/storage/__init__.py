"""Storages: bytes by name and range. Today: a local directory."""

from shardstate.storage.base import Entry, Output, PlainReader, Reader, Reading, Storage, Writable
from shardstate.storage.local import LocalStorage

__all__ = [
    "Entry",
    "LocalStorage",
    "Output",
    "PlainReader",
    "Reader",
    "Reading",
    "Storage",
    "Writable",
]
