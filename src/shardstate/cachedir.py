"""The directory of the write-back cache: what is there, and what may go.

An entry is a directory named by 64 hex digits that holds one set. When it was last used is its
modification time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass

from shardstate.errors import StorageError, TargetBusy
from shardstate.names import MANIFEST, OURS
from shardstate.storage import LocalStorage
from shardstate.storage.oserrors import mapped_errors

_KEY = re.compile(r"[0-9a-f]{64}")
_ASIDE = f"{OURS}aside-"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry."""

    name: str
    nbytes: int  # of all its files
    used: float  # seconds since the epoch
    committed: bool  # all ranks are there


def entry_path(root: str, key: str) -> str:
    """Return the directory of an entry."""
    return os.path.join(root, key)


def mark_used(path: str) -> None:
    """Note that an entry was read; a cache that may only be read keeps no such note."""
    with contextlib.suppress(OSError):
        os.utime(path)


def set_aside(path: str) -> None:
    """Take an entry out of use at once; `prune` removes it."""
    root, name = os.path.split(path)
    with contextlib.suppress(OSError):
        os.rename(path, os.path.join(root, f"{_ASIDE}{name}-{os.getpid()}"))


def list_entries(root: str) -> list[CacheEntry]:
    """Return the entries of a cache, the one used last first."""
    found = []
    with mapped_errors("list", root, name=root):
        names = sorted(os.listdir(root))
    for name in names:
        if not _KEY.fullmatch(name):
            continue
        path = entry_path(root, name)
        try:
            used = os.stat(path).st_mtime
            nbytes = _size(path)
        except FileNotFoundError:
            continue  # another process removed it
        found.append(CacheEntry(name, nbytes, used, os.path.exists(os.path.join(path, MANIFEST))))
    return sorted(found, key=lambda entry: (-entry.used, entry.name))


def prune(root: str, *, max_bytes: int) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove what was used longest ago until at most `max_bytes` are left; return (left, gone).

    An entry that is being read or written stays.
    """
    entries = list_entries(root)
    for name in os.listdir(root):
        if name.startswith(_ASIDE):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    total = sum(entry.nbytes for entry in entries)
    gone: list[CacheEntry] = []
    for entry in reversed(entries):
        if total <= max_bytes:
            break
        if _remove(entry_path(root, entry.name)):
            total -= entry.nbytes
            gone.append(entry)
    return [entry for entry in entries if entry not in gone], gone


def _remove(path: str) -> bool:
    try:
        with LocalStorage(path) as storage, storage.lock():
            root, name = os.path.split(path)
            aside = os.path.join(root, f"{_ASIDE}{name}-{os.getpid()}")
            with mapped_errors("remove", path):
                os.rename(path, aside)
    except TargetBusy:
        return False
    except FileNotFoundError:
        return True
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise StorageError(f"{aside}: cannot remove it: {error.strerror}", file=aside) from None
    return True


def _size(path: str) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
