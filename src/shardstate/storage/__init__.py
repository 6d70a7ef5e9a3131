"""Storages: bytes by name and range, in a local directory, an object store or behind https."""

from shardstate.storage.base import (
    Arrived,
    Entry,
    Output,
    PlainReader,
    Reader,
    Reading,
    Runs,
    Storage,
    Traits,
    Writable,
    for_each,
)
from shardstate.storage.local import LocalStorage
from shardstate.storage.locate import (
    TIMEOUT_SECONDS,
    Access,
    fetched,
    is_address,
    location_of,
    revision_of,
    storage_at,
    writable_at,
    writable_in_place,
)

__all__ = [
    "TIMEOUT_SECONDS",
    "Access",
    "Arrived",
    "Entry",
    "LocalStorage",
    "Output",
    "PlainReader",
    "Reader",
    "Reading",
    "Runs",
    "Storage",
    "Traits",
    "Writable",
    "fetched",
    "for_each",
    "is_address",
    "location_of",
    "revision_of",
    "storage_at",
    "writable_at",
    "writable_in_place",
]
