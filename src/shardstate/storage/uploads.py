"""Writing to an object store: an object is there when its upload is complete, and not before.

A large object goes up in parts while it is made. Its bytes must come nearly in order; what comes
early waits in memory, and who is too early waits itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from shardstate.errors import PathNotFound, StorageError
from shardstate.storage.faults import diagnose, error_of
from shardstate.storage.reading import ObjectReader
from shardstate.storage.tries import Stopped
from shardstate.storage.views import total

_MEMORY_BYTES = 96 << 20  # for parts on their way, of all outputs together
_SMALL_PART, _PART = 5 << 20, 8 << 20  # stores refuse smaller ones
_MOST_PARTS = 10_000  # that a store accepts for one object
_MOST_AT_ONCE = 8
_EARLY_BYTES = 32 << 20  # that came early, of all outputs together


class Uploads:
    """What the uploads to one folder share."""

    def __init__(self, client: Any, reader: ObjectReader, *, outputs: int) -> None:
        self.client, self.reader = client, reader
        share = _MEMORY_BYTES // outputs
        self._part = _PART if share >= 4 * _PART else _SMALL_PART
        # Beside those on their way one is being filled, and one is taken.
        self.at_once = max(1, min(_MOST_AT_ONCE, share // self._part - 2))
        self.early_bytes = _EARLY_BYTES // outputs

    def part_bytes(self, nbytes: int) -> int:
        """Return the size of the parts of an object."""
        least = -(-nbytes // _MOST_PARTS)
        return max(self._part, -(-least // (1 << 20)) << 20)

    def create(self, name: str, nbytes: int) -> ObjectOutput:
        """Return an output of exactly `nbytes` bytes."""
        return ObjectOutput(self, name, nbytes)

    def identity(self, name: str) -> object:
        """Return what changes when an object does; None where there is none."""
        try:
            return self.reader.entry(name).identity
        except PathNotFound:
            return None

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write a small object; repeating it changes nothing, so failures are repeated."""
        import obstore

        self.reader.forget(name)
        tries = self.reader.tries(f"write {len(data)} bytes", name)
        while True:
            tries.begin()
            try:
                obstore.put(self.client, name, bytes(data), use_multipart=False)
                return
            except Exception as error:
                tries.failed(_no_bucket(error))

    def remove(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        import obstore

        self.reader.forget(name)
        tries = self.reader.tries("remove it", name)
        while True:
            tries.begin()
            try:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self.client, name)
                return
            except Exception as error:
                tries.failed(error)


class _Discarded(Exception):
    """The upload is to be aborted."""


class ObjectOutput:
    """An object being written. Nobody sees it before `publish`."""

    def __init__(self, uploads: Uploads, name: str, nbytes: int) -> None:
        self._uploads, self._name, self._nbytes = uploads, name, nbytes
        self._part_bytes = uploads.part_bytes(nbytes)
        self._changed = threading.Condition()
        self._early: dict[int, bytes] = {}  # by where they begin
        self._early_bytes = 0
        self._at = 0  # all before has come
        self._busy = False  # whether a thread is passing bytes on
        self._filling = bytearray(min(self._part_bytes, nbytes))
        self._filled = 0  # bytes of it
        self._stopped = False
        self._error: Exception | None = None
        self._parts: queue.Queue[bytearray | memoryview | None] = queue.Queue()
        self._taken = threading.Event()
        self._thread: threading.Thread | None = None  # of an upload in parts
        self._done = False
        self._before: object = None  # identity of the object that is replaced

    def write(self, begin: int, views: Sequence[memoryview]) -> None:
        size = total(views)
        if not size:
            return
        with self._changed:
            room = max(self._uploads.early_bytes - size, 0)
            while begin != self._at or self._busy:
                if self._stopped or self._error is not None:
                    self._raise()
                if begin != self._at and self._early_bytes <= room:
                    self._early[begin] = b"".join(view.cast("B") for view in views)
                    self._early_bytes += size
                    return
                self._changed.wait()
            self._busy = True
        try:
            for view in views:
                self._pass_on(view.cast("B"))
            self._advance(size)
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _advance(self, size: int) -> None:
        """Count bytes that were passed on, and pass on what follows them."""
        while True:
            with self._changed:
                self._at += size
                following = self._early.pop(self._at, None)
                if following is None:
                    return
                size = len(following)
                self._early_bytes -= size
            self._pass_on(memoryview(following))

    def _pass_on(self, data: memoryview) -> None:
        while len(data):
            piece = data[: self._part_bytes - self._filled]
            self._filling[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == self._part_bytes:
                self._send(self._filling)
                self._filling, self._filled = bytearray(self._part_bytes), 0

    def _send(self, part: bytearray | memoryview | None) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._upload, name=f"shardstate-upload-{self._name}", daemon=True
            )
            self._thread.start()
        self._taken.clear()
        self._parts.put(part)
        # Until the client takes it: a part that lies here would be memory for nothing.
        while not self._taken.wait(0.1):
            if self._stopped or self._error is not None:
                self._raise()

    def _upload(self) -> None:
        """Pass the parts to the client, which aborts the upload if they end in an exception."""
        import obstore

        def parts() -> Iterator[bytearray | memoryview]:
            while True:
                try:
                    part = self._parts.get(timeout=0.1)
                except queue.Empty:
                    if self._stopped:
                        raise _Discarded from None
                    continue
                self._taken.set()
                if part is None:
                    return
                yield part
                del part

        try:
            self._before = self._uploads.identity(self._name)
            obstore.put(
                self._uploads.client,
                self._name,
                parts(),
                use_multipart=True,
                chunk_size=self._part_bytes,
                max_concurrency=self._uploads.at_once,
            )
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def publish(self) -> None:
        if self._at != self._nbytes:
            raise StorageError(
                f"{self._uploads.reader.where(self._name)}: {self._at} of {self._nbytes} bytes "
                f"were written",
                file=self._name,
            )
        self._uploads.reader.forget(self._name)
        if self._thread is None:
            self._uploads.put(self._name, memoryview(self._filling)[: self._filled])
        else:
            if self._filled:
                self._send(memoryview(self._filling)[: self._filled])
            self._send(None)
            self._thread.join()
            if self._error is not None and not self._arrived():
                self._raise()
        self._filling = bytearray()
        self._done = True

    def _arrived(self) -> bool:
        """Whether the object is there although the answer that said so got lost."""
        try:
            found = self._uploads.reader.entry(self._name)
        except (PathNotFound, StorageError):
            return False
        return found.nbytes == self._nbytes and found.identity != self._before

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def discard(self) -> None:
        self.stop()
        if self._thread is not None and not self._done:
            self._thread.join()
        self._early.clear()

    def _raise(self) -> None:
        """Raise why nothing more can be written."""
        if self._error is None or isinstance(self._error, _Discarded):
            raise Stopped
        where = self._uploads.reader.where(self._name)
        fault = diagnose(_no_bucket(self._error))
        what = f"write its {self._nbytes} bytes"
        raise error_of(fault, what=what, where=where, name=self._name) from None


def _no_bucket(error: Exception) -> Exception:
    """Return what a writer is told: an object that is to be made cannot be missing."""
    if isinstance(error, FileNotFoundError) and not isinstance(error, PathNotFound):
        text = str(error)
        if "<Code>" not in text:
            return RuntimeError(f"{text} <Code>NoSuchBucket</Code>")
    return error
