"""Ranged reads from an object store, straight into memory, of one version of each object."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shardstate.errors import ChangedFile, InputError, PathNotFound, ShardStateError, TruncatedFile
from shardstate.storage.base import Entry, Traits
from shardstate.storage.clients import Address, Limits, connect, endpoint_of
from shardstate.storage.faults import SlowAnswer
from shardstate.storage.tries import Health, Tries

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

_More = TypeVar("_More")

# By how long a small request takes, seconds; measured, see `docs/benchmarks.md`. In the time of a
# request a store that is far away sends much, so that reading over gaps is cheaper there.
_TRAITS = Traits(
    read_threads=16, write_threads=8, max_gap_bytes=1 << 20, remote=True, chunk_bytes=8 << 20
)
NEAR = replace(_TRAITS, read_threads=8, max_gap_bytes=256 << 10)
MIDDLE = _TRAITS
FAR = replace(_TRAITS, read_threads=32, max_gap_bytes=2 << 20)
_NEAR_SECONDS, _FAR_SECONDS = 0.008, 0.025

# What the client hands over at a time: large enough to cost nothing, small enough that a broken
# answer loses little and that memory is threads × this.
_CHUNK_BYTES = 256 << 10
_SMALL_BYTES = 64 << 10  # what costs little beside the request itself
_STALL_SHARE, _TRY_SHARE = 0.25, 0.4  # of the time-out, for one try: without a byte, and in all


class ObjectReader:
    """Objects of one folder of a store. All methods may be called from several threads.

    With `pinned`, the version of an object that is seen first is the one that is read to the end:
    every request names its ETag, every answer is compared with it, and another one is an error.
    What is `immutable` at its address needs none of that.
    """

    def __init__(
        self,
        address: Address,
        options: Mapping[str, str],
        *,
        timeout: float,
        pinned: bool,
        immutable: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        self.address = address
        self.health = Health()
        self._latency: float | None = None  # seconds of the fastest small request
        self.timeout = timeout
        self._pinned, self._immutable = pinned, immutable
        self._chunk_bytes = chunk_bytes  # the most that one request asks for; None: no wish
        self._endpoint = endpoint_of(address, options)
        self._lock = threading.Lock()
        self._known: dict[str, Entry] = {}
        self._idle = max(0.05, _STALL_SHARE * timeout)
        self._try = max(0.1, _TRY_SHARE * timeout)
        self.client = connect(address, options, Limits(self._idle, self._try, 0))

    def took(self, seconds: float) -> None:
        """Note how long a small request took."""
        self._latency = min(self._latency or seconds, seconds)

    @property
    def traits(self) -> Traits:
        """What the store is good at, by its fastest answer to a small request so far."""
        if self._latency is None or _NEAR_SECONDS <= self._latency < _FAR_SECONDS:
            found = MIDDLE
        else:
            found = NEAR if self._latency < _NEAR_SECONDS else FAR
        return replace(found, chunk_bytes=self._chunk_bytes) if self._chunk_bytes else found

    def where(self, name: str = "") -> str:
        """Return the address of an object, and its server, for messages."""
        path = f"{self.address.url}/{name}" if name else self.address.url
        return path if self._endpoint in path else f"{path} at {self._endpoint}"

    def tries(self, what: str, name: str | None) -> Tries:
        """Return the tries of an operation on an object, or on the folder."""
        return Tries(
            self.health,
            what=what,
            where=self.where(name or ""),
            name=name,
            timeout=self.timeout,
        )

    def learn(self, entry: Entry) -> Entry:
        """Take note of what is there, and return it: where versions are pinned, the first one."""
        with self._lock:
            return self._known.setdefault(entry.name, entry)

    def forget(self, name: str) -> None:
        """Drop what is known of an object: it was replaced or removed from here."""
        with self._lock:
            self._known.pop(name, None)

    def entry(self, name: str) -> Entry:
        """Return size and identity of an object."""
        if (known := self._seen(name)) is not None:
            return known
        import obstore

        return self._look(name, lambda: (obstore.head(self.client, name), None))[0]

    def _seen(self, name: str) -> Entry | None:
        with self._lock:
            return self._known.get(name) if self._pinned else None

    def _look(
        self, name: str, ask: Callable[[], tuple[Mapping[str, Any], _More]]
    ) -> tuple[Entry, _More]:
        """Return what an object is, by the metadata that `ask` gives, and what came with them."""
        tries = self.tries("look at it", name)
        while True:
            tries.begin()
            try:
                meta, more = ask()
                found = entry_of(meta, name)
                break
            except Exception as error:
                tries.failed(error)
        self.took(tries.seconds)
        tries.advance()
        if self.learn(found) != found and self._pinned:
            raise self._changed(name)
        return found, more

    def _get(self, name: str) -> tuple[Mapping[str, Any], GetResult]:
        import obstore

        answer = obstore.get(self.client, name)
        return answer.meta, answer

    def read(self, name: str, *, limit: int) -> bytes:
        """Return a whole small object; one of which nothing is known yet with one request."""
        entry, answer = self._seen(name), None
        if entry is None:
            entry, answer = self._look(name, lambda: self._get(name))
        if entry.nbytes > limit:
            raise InputError(
                f"{self.where(name)}: has {entry.nbytes} bytes, more than the {limit} that a file "
                f"of this kind may have",
                file=name,
            )
        data = bytearray(entry.nbytes)
        goals = _Goals([memoryview(data)])
        if answer is not None:
            # What breaks off, or is more than was announced, is asked for again below.
            with contextlib.suppress(Exception):
                for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                    goals.take(chunk)
        # Of the same version only where that is pinned.
        at = goals.filled if self._pinned or goals.filled == entry.nbytes else 0
        self.read_into(name, at, [memoryview(data)[at:]])
        return bytes(data)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        """Fill `views` with the object's bytes from `begin` on; a broken answer is taken up."""
        goals = _Goals(views)
        total = goals.nbytes
        if not total:
            return
        entry = self.entry(name)
        if begin + total > entry.nbytes:
            at = max(begin, entry.nbytes)
            raise TruncatedFile(
                f"{self.where(name)}: {name}: ends at byte {entry.nbytes}, {begin + total - at} "
                f"more were planned; it was truncated: fetch it again",
                file=name,
            )
        tries = self.tries(f"read bytes [{begin}, {begin + total})", name)
        while goals.filled < total:
            tries.begin()
            try:
                for chunk in self._chunks(entry, begin + goals.filled, begin + total):
                    goals.take(chunk)
                    tries.advance()
                if tries.number == 1 and total <= _SMALL_BYTES:
                    self.took(tries.seconds)
                if goals.filled < total:
                    raise ConnectionError("Interrupted")
            except Exception as error:
                if tries.seconds > 0.95 * self._try and not isinstance(error, ShardStateError):
                    error = SlowAnswer(f"fewer than {_CHUNK_BYTES} bytes in {self._try:.3g} s")
                tries.failed(self._told(error, entry))

    def _chunks(self, entry: Entry, begin: int, end: int) -> Iterator[Any]:
        import obstore

        options: GetOptions = {"range": (begin, end)}
        etag = str(entry.identity[0])
        if etag and not self._immutable and not etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = f'"{etag}"'
        answer = obstore.get(self.client, entry.name, options=options)
        found = entry_of(answer.meta, entry.name)
        other = found.identity != entry.identity and bool(found.identity[0] or not etag)
        if found.nbytes != entry.nbytes or (other and not self._immutable):
            raise self._changed(entry.name)
        yield from answer.stream(min_chunk_size=_CHUNK_BYTES)

    def _told(self, error: Exception, entry: Entry) -> Exception:
        """Return what to say of a failure: an object that was there and is gone was replaced."""
        gone = isinstance(error, FileNotFoundError) and not isinstance(error, PathNotFound)
        if gone and self._pinned:
            return self._changed(entry.name)
        return error

    def _changed(self, name: str) -> InputError:
        return ChangedFile(
            f"{self.where(name)}: changed since it was opened: it is being replaced, or was; read "
            f"it again when that is done",
            file=name,
        )


def entry_of(meta: Mapping[str, Any], name: str) -> Entry:
    """Return what an object's metadata say. The ETag comes first: it names the version."""
    # Listings of Azure have it without quotes, answers with them.
    etag = (meta["e_tag"] or "").strip('"')
    changed = etag or meta["last_modified"].isoformat(timespec="seconds")
    return Entry(name, meta["size"], (etag, meta["size"], changed))


class _Goals:
    """Memory that is filled from its first byte to its last, piece by piece."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [np.frombuffer(view, dtype=np.uint8) for view in views if view.nbytes]
        self.nbytes = sum(len(view) for view in self._views)
        self.filled = 0
        self._number = self._at = 0  # of the view that comes next, and what of it is filled

    def take(self, chunk: Any) -> None:
        """Fill what follows with `chunk`; numpy lets other threads work meanwhile."""
        data = np.frombuffer(chunk, dtype=np.uint8)
        if len(data) > self.nbytes - self.filled:
            raise ConnectionError("Interrupted")  # more than was asked for
        self.filled += len(data)
        while len(data):
            view = self._views[self._number]
            part = data[: len(view) - self._at]
            view[self._at : self._at + len(part)] = part
            self._at += len(part)
            data = data[len(part) :]
            if self._at == len(view):
                self._number, self._at = self._number + 1, 0
