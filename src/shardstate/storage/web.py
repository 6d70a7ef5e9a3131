"""A folder behind plain https: files are read by range, and nothing can be listed.

What is seen is what something names: the manifest, records, the index, or the usual names.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardstate.errors import PathNotFound, UsageError
from shardstate.names import CONFIG, MANIFEST, SIGNATURE, record_name
from shardstate.storage.base import Entry, Reader, Reading, Traits, for_each
from shardstate.storage.clients import Address
from shardstate.storage.paced import reader_of
from shardstate.storage.reading import ObjectReader

_log = logging.getLogger("shardstate")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_JSON_BYTES = 256 << 20


class WebStorage:
    """Files under one address of a web server, to be read only."""

    def __init__(
        self, address: Address, options: Mapping[str, str], *, timeout: float, reading: Reading
    ) -> None:
        self.location = address.url
        self._reading = reading
        self._reader = ObjectReader(
            address, options, timeout=timeout, pinned=True, chunk_bytes=reading.chunk_bytes
        )
        self._named: dict[str, Entry] | None = None  # by what the folder's own files say
        self._read: tuple[str, bytes] | None = None  # the last of these: who opens it asks again

    @property
    def traits(self) -> Traits:
        return self._reader.traits

    def entries(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self._all().items() if "/" not in name}

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        for name, entry in self._all().items():
            folders = name.split("/")[:-1]
            if all(wanted("/".join(folders[: i + 1])) for i in range(len(folders))):
                yield entry

    def _all(self) -> dict[str, Entry]:
        if self._named is None:
            seen = for_each(self, self._entry, list(dict.fromkeys(self._names())))
            found = {entry.name: entry for entry in seen if entry is not None}
            self._named = dict(sorted(found.items()))
            _log.warning(
                "shardstate: nothing can be listed at %s: only the files that %s are seen",
                self.location,
                "its manifest lists" if MANIFEST in found else "its index or their names tell",
            )
        return self._named

    def _names(self) -> Iterator[str]:
        if (listed := self._json(MANIFEST)) is not None:
            yield from (MANIFEST, SIGNATURE)
            yield from _texts(entry.get("name") for entry in _objects(listed.get("files")))
            return
        if (record := self._json(record_name(0))) is not None:
            yield from self._named_by_records(record)
            return
        if (index := self._json(_INDEX)) is not None:
            yield _INDEX
            weights = index.get("weight_map")
            yield from sorted({*_texts((weights if isinstance(weights, dict) else {}).values())})
        yield from (_SINGLE, CONFIG)

    def _named_by_records(self, first: Mapping[str, Any]) -> Iterator[str]:
        sizes = first.get("topology")
        world = 1
        for size in (sizes if isinstance(sizes, dict) else {}).values():
            world *= size if isinstance(size, int) and 0 < size < 1 << 16 else 1
        for rank in range(min(world, 1 << 16)):
            record = self._json(record_name(rank)) if rank else first
            if record is not None:
                yield record_name(rank)
                yield from _texts(file.get("name") for file in _objects(record.get("files")))

    def _json(self, name: str) -> dict[str, Any] | None:
        """Return an object that names files, roughly: whoever opens the set checks it."""
        try:
            data = self._reader.read(name, limit=_MAX_JSON_BYTES)
        except PathNotFound:
            return None
        self._read = name, data
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _entry(self, name: str) -> Entry | None:
        try:
            return self._reader.entry(name)
        except PathNotFound:
            return None

    def size(self, name: str) -> int:
        return self._reader.entry(name).nbytes

    def read(self, name: str, *, limit: int) -> bytes:
        known, self._read = self._read, None
        if known is not None and known[0] == name and len(known[1]) <= limit:
            return known[1]
        return self._reader.read(name, limit=limit)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        self._reader.read_into(name, begin, views)

    def map(self, name: str) -> np.ndarray:
        raise UsageError(
            f"{self.location}: only files on a local disk can be mapped; leave map out"
        )

    def reader(self, threads: int) -> Reader:
        return reader_of(self, threads, self._reading)

    def expect(self, files: Mapping[str, int]) -> None:
        pass

    def interrupt(self, on: bool = True) -> None:
        self._reader.health.interrupt(on)

    def close(self) -> None:
        self.interrupt()


def _objects(value: object) -> Iterator[Mapping[str, Any]]:
    yield from (each for each in value if isinstance(each, dict)) if isinstance(value, list) else ()


def _texts(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str) and not value.startswith(("/", "..")) and value:
            yield value
