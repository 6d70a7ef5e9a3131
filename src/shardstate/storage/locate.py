"""From a PATH to the storage that it names: a directory, a store, a web folder, a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardstate.errors import InputError, PathNotFound, UsageError
from shardstate.storage.base import Storage, Writable
from shardstate.storage.clients import parse_address
from shardstate.storage.local import LocalStorage
from shardstate.storage.object import ObjectStorage
from shardstate.storage.web import WebStorage

TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to reach what is not local."""

    timeout: float = TIMEOUT_SECONDS  # seconds without a byte until it is an error
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may be secrets


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address with a scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def storage_at(path: str | os.PathLike[str], access: Access) -> Storage:
    """Return the storage at `path`, to be read. Errors say what is wrong with the path."""
    text = os.fspath(path)
    if is_address(text):
        address = parse_address(text)
        if address.scheme in ("https", "http"):
            return WebStorage(address, access.options, timeout=access.timeout)
        return ObjectStorage(address, access.options, timeout=access.timeout)
    _check_given(text)
    if not os.path.lexists(text):
        raise PathNotFound(f"{text}: there is no such directory; check the path", file=text)
    if not os.path.isdir(text):
        raise InputError(
            f"{text}: is no directory; give the directory that holds the checkpoint", file=text
        )
    return LocalStorage(text)


def writable_at(path: str | os.PathLike[str], access: Access, *, outputs: int) -> Writable:
    """Return the storage at `path`, to be written; a directory is made where there is none.

    `outputs` files are written at the same time, at most.
    """
    text = os.fspath(path)
    _check_given(text)
    if not is_address(text):
        return LocalStorage(text, create=True)
    address = parse_address(text)
    if address.scheme in ("https", "http"):
        raise UsageError(f"{address.url}: can only be read; write to s3://, gs:// or az://")
    return ObjectStorage(address, access.options, timeout=access.timeout, outputs=max(1, outputs))


def _check_given(text: str) -> None:
    if not text:
        raise UsageError("the path is empty; give a directory or an address")


def location_of(path: str | os.PathLike[str]) -> str:
    """Return the location of a path: absolute, without credentials."""
    text = os.fspath(path)
    _check_given(text)
    return parse_address(text).url if is_address(text) else os.path.abspath(text)
