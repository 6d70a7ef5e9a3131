"""What vLLM needs as a directory of a checkpoint that lies elsewhere: its small files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

from shardstate.commit import companions_of
from shardstate.names import COMPANION_BYTES
from shardstate.storage import LocalStorage, Storage

_UNNEEDED = ("tokenizer", "vocab", "merges")  # large, and no part of how weights are loaded


@dataclass(frozen=True)
class Folder:
    """A directory; a temporary one goes with the last reference to it."""

    name: str
    temporary: tempfile.TemporaryDirectory[str] | None = None


def local_configuration(storage: Storage) -> Folder:
    """Return a directory with the configuration of what `storage` holds: itself, if it is one."""
    if isinstance(storage, LocalStorage):
        return Folder(storage.location)
    temporary = tempfile.TemporaryDirectory(prefix="shardstate-config-")
    for name in companions_of(storage):
        if "/" in name or name.startswith(_UNNEEDED):
            continue
        with open(os.path.join(temporary.name, name), "wb") as file:
            file.write(storage.read(name, limit=COMPANION_BYTES))
    return Folder(temporary.name, temporary)
