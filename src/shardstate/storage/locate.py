"""From a PATH to the storage that it names: a directory, a store, a web folder, a hub id.

What is not local is imported on use: most commands never need it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from shardstate.errors import InputError, PathNotFound, UsageError
from shardstate.storage.base import Reading, Storage, Writable
from shardstate.storage.local import LocalStorage

if TYPE_CHECKING:
    from shardstate.storage.cached import RangeCache

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
TIMEOUT_SECONDS = 60.0
CACHE_BYTES = 100_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to reach what is not local, and how to read what is."""

    timeout: float = TIMEOUT_SECONDS  # seconds without a byte until it is an error
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may be secrets
    cache: str | None = None  # a directory that keeps what was read from elsewhere
    cache_bytes: int = CACHE_BYTES  # that it holds, at most about
    hub_cache: str | None = None  # None: where huggingface_hub has its own
    ignore_patterns: tuple[str, ...] = ()  # files of a hub repository that are not seen
    reading: Reading = field(default_factory=Reading)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address with a scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """Return repository and revision of `org/name[@revision]`, perhaps after `hf://`, else None."""
    found = _ID.fullmatch(text.removeprefix("hf://"))
    return (found[1], found[2]) if found and ".." not in text else None


def is_hub_id(text: str) -> bool:
    """Whether a path that does not exist here can be meant for the hub."""
    return (
        parse_hub_id(text) is not None
        and not text.startswith("hf://")
        and not os.path.isdir(text.split("/", maxsplit=1)[0])
        and importlib.util.find_spec("huggingface_hub") is not None
    )


def storage_at(path: str | os.PathLike[str], access: Access) -> Storage:
    """Return the storage at `path`, to be read. Errors say what is wrong with the path."""
    text = os.fspath(path)
    if text.startswith("hf://"):
        return _hub(text, access)
    if is_address(text):
        return _store(text, access)
    _check_given(text)
    if not os.path.lexists(text):
        if is_hub_id(text):
            return _hub(text, access)
        raise PathNotFound(f"{text}: there is no such directory; check the path", file=text)
    if not os.path.isdir(text):
        raise InputError(
            f"{text}: is no directory; give the directory that holds the checkpoint", file=text
        )
    return LocalStorage(text, reading=access.reading)


def _store(text: str, access: Access) -> Storage:
    from shardstate.storage.cached import CachedStorage
    from shardstate.storage.clients import parse_address
    from shardstate.storage.object import ObjectStorage
    from shardstate.storage.web import WebStorage

    address = parse_address(text)
    kind = WebStorage if address.scheme in ("https", "http") else ObjectStorage
    found = kind(address, access.options, timeout=access.timeout, reading=access.reading)
    cache = _cache(access)
    return found if cache is None else CachedStorage(found, cache, reading=access.reading)


def _hub(text: str, access: Access) -> Storage:
    from shardstate.storage.hub import HubStorage

    found = parse_hub_id(text)
    if found is None:
        raise UsageError(f"{text}: expected hf://org/name, or hf://org/name@revision")
    return HubStorage(
        *found,
        timeout=access.timeout,
        cache=access.hub_cache,
        ignored=access.ignore_patterns,
        ranges=_cache(access),
        reading=access.reading,
    )


def _cache(access: Access) -> RangeCache | None:
    if access.cache is None:
        return None
    from shardstate.storage.cached import RangeCache

    return RangeCache(access.cache, max_bytes=access.cache_bytes)


def revision_of(storage: Storage) -> str | None:
    """Return the commit that a storage of the hub holds; None for any other."""
    from shardstate.storage.hub import HubStorage

    return storage.revision if isinstance(storage, HubStorage) else None


def fetched(storage: Storage, names: Iterable[str]) -> Storage:
    """Return the storage itself; of one of the hub, its local cache, with these files in it."""
    from shardstate.storage.hub import HubStorage

    return storage.fetched(names) if isinstance(storage, HubStorage) else storage


def writable_at(path: str | os.PathLike[str], access: Access, *, outputs: int) -> Writable:
    """Return the storage at `path`, to be written; a directory is made where there is none.

    `outputs` files are written at the same time, at most.
    """
    text = os.fspath(path)
    _check_given(text)
    if not is_address(text):
        return LocalStorage(text, create=True)
    if text.startswith("hf://"):
        raise UsageError(f"{text}: can only be read; write to a directory, s3://, gs:// or az://")
    from shardstate.storage.clients import parse_address
    from shardstate.storage.object import ObjectStorage

    address = parse_address(text)
    if address.scheme in ("https", "http"):
        raise UsageError(f"{address.url}: can only be read; write to s3://, gs:// or az://")
    return ObjectStorage(address, access.options, timeout=access.timeout, outputs=max(1, outputs))


def _check_given(text: str) -> None:
    if not text:
        raise UsageError("the path is empty; give a directory or an address")


def writable_in_place(path: str | os.PathLike[str], access: Access) -> Writable:
    """Return the storage at `path`, where something is already that is to be changed a little."""
    if is_address(path):
        return writable_at(path, access, outputs=1)
    return cast(Writable, storage_at(path, access))


def location_of(path: str | os.PathLike[str]) -> str:
    """Return the location of a path: absolute, without credentials."""
    text = os.fspath(path)
    _check_given(text)
    if text.startswith("hf://"):
        return text
    if not is_address(text):
        return os.path.abspath(text)
    from shardstate.storage.clients import parse_address

    return parse_address(text).url
