"""One folder of an object store: S3 and compatible, Google Cloud Storage, Azure Blob."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardstate.errors import UsageError
from shardstate.storage.base import Entry, Reader, Reading, Traits
from shardstate.storage.clients import Address, Limits, connect
from shardstate.storage.paced import reader_of
from shardstate.storage.reading import ObjectReader, entry_of
from shardstate.storage.uploads import ObjectOutput, Uploads


class ObjectStorage:
    """Objects under one address; names are what follows it.

    To be read (`outputs` 0), or to be written as well: then `outputs` says how many are written at
    the same time, and versions are not pinned, since others may write beside.
    """

    def __init__(
        self,
        address: Address,
        options: Mapping[str, str],
        *,
        timeout: float,
        outputs: int = 0,
        reading: Reading | None = None,
    ) -> None:
        self.location = address.url
        self._reading = reading or Reading()
        self._reader = ObjectReader(
            address,
            options,
            timeout=timeout,
            pinned=not outputs,
            chunk_bytes=self._reading.chunk_bytes,
        )
        self._uploads: Uploads | None = None
        if outputs:
            # Each part of an upload has as long as an answer may fail to come; the client repeats.
            limits = Limits(None, max(timeout, 1.0), max(timeout, 1.0))
            client = connect(address, options, limits)
            self._uploads = Uploads(client, self._reader, outputs=outputs)

    @property
    def traits(self) -> Traits:
        return self._reader.traits

    def entries(self) -> dict[str, Entry]:
        import obstore

        listed = self._listed(lambda: obstore.list_with_delimiter(self._reader.client)["objects"])
        found = [self._entry(meta) for meta in listed]
        return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        import obstore

        listed = self._listed(
            lambda: [meta for page in obstore.list(self._reader.client) for meta in page]
        )
        for meta in sorted(listed, key=lambda meta: str(meta["path"])):
            folders = str(meta["path"]).split("/")[:-1]
            if all(wanted("/".join(folders[: i + 1])) for i in range(len(folders))):
                yield self._entry(meta)

    def _listed(self, call: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        tries = self._reader.tries("list it", None)
        while True:
            tries.begin()
            try:
                found = call()
                tries.advance()
                self._reader.took(tries.seconds)
                return [meta for meta in found if meta["path"]]  # "" marks the folder itself
            except Exception as error:
                tries.failed(error)

    def _entry(self, meta: Mapping[str, Any]) -> Entry:
        entry = entry_of(meta, str(meta["path"]))
        self._reader.learn(entry)
        return entry

    def strays(self) -> list[str]:
        return []

    def size(self, name: str) -> int:
        return self._reader.entry(name).nbytes

    def read(self, name: str, *, limit: int) -> bytes:
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

    def __enter__(self) -> ObjectStorage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, name: str, nbytes: int) -> ObjectOutput:
        return self._writer().create(name, nbytes)

    def put(self, name: str, data: bytes | memoryview) -> None:
        self._writer().put(name, data)

    def remove(self, name: str) -> None:
        self._writer().remove(name)

    def sync(self) -> None:
        pass  # what a store has acknowledged is durable

    def free_bytes(self) -> int | None:
        return None

    @contextlib.contextmanager
    def lock(self, name: str | None = None) -> Iterator[None]:
        yield  # stores have none

    def _writer(self) -> Uploads:
        if self._uploads is None:
            raise UsageError(f"{self.location}: was opened for reading only")
        return self._uploads
