"""A repository of the Hugging Face hub, one commit of it.

What lies in the hub's local cache is read there. Of the rest, small files and files of which nearly
all is wanted are fetched into that cache by huggingface_hub; of other files only ranges are read.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from shardstate.errors import (
    InputError,
    PathNotFound,
    ShardStateError,
    StorageError,
    Unreachable,
    UsageError,
)
from shardstate.storage.base import Entry, PlainReader, Reader, Reading, Traits
from shardstate.storage.cached import RangeCache, cache_key
from shardstate.storage.clients import Address
from shardstate.storage.local import LocalStorage
from shardstate.storage.oserrors import mapped_errors
from shardstate.storage.paced import reader_of
from shardstate.storage.reading import FAR, ObjectReader

_log = logging.getLogger("shardstate")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHOLE_SHARE = 0.9  # of a file: whoever wants that much fetches it whole, for the next time
_FETCH_THREADS = 4


class HubStorage:
    """Files of one commit of a repository, to be read only."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        *,
        timeout: float,
        cache: str | None,
        ignored: Sequence[str],
        ranges: RangeCache | None,
        reading: Reading,
    ) -> None:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise UsageError(
                f"hf://{repository}: needs huggingface_hub: pip install 'shardstate[hub]'"
            )
        self._repository, self._cache, self._timeout = repository, cache, timeout
        self._reading = reading
        self._kept = ranges  # what keeps ranges of files that are not fetched whole
        self._lock = threading.Lock()
        self.location = f"hf://{repository}"
        self._asked = revision or "main"
        self.revision, self._entries = self._resolved(self._asked)
        ignored = tuple(ignored)
        if ignored:
            self._entries = {
                name: entry
                for name, entry in self._entries.items()
                if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
            }
        self._here: LocalStorage | None = None  # the snapshot of that commit in the local cache
        self._ranges: ObjectReader | None = None
        self._expected: frozenset[str] = frozenset()

    @property
    def traits(self) -> Traits:
        """Those of a local disk where all weights are in the local cache."""
        weights = [name for name in self._entries if name.endswith(".safetensors")]
        here = self._local(weights)
        if here is not None:
            return here.traits
        return replace(FAR, chunk_bytes=self._reading.chunk_bytes or FAR.chunk_bytes)

    def _resolved(self, revision: str) -> tuple[str, dict[str, Entry]]:
        """Return the commit and its files: by the hub, or by the cache where it is complete."""
        import huggingface_hub
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return self._cached(revision, "HF_HUB_OFFLINE is set")
        try:
            with _mapped("look it up", self.location):
                found = huggingface_hub.HfApi().model_info(
                    self._repository, revision=revision, files_metadata=True, timeout=self._timeout
                )
        except Unreachable as error:
            commit, entries = self._cached(revision, str(error))
            _log.warning("shardstate: %s; the local cache has commit %s", error, commit)
            return commit, entries
        entries = {}
        for each in found.siblings or ():
            version = each.lfs.sha256 if each.lfs is not None else each.blob_id
            size = each.lfs.size if each.lfs is not None else each.size
            entries[each.rfilename] = Entry(each.rfilename, size or 0, (version or "", size or 0))
        return str(found.sha), dict(sorted(entries.items()))

    def _cached(self, revision: str, why: str) -> tuple[str, dict[str, Entry]]:
        """Return the commit of a revision that the local cache holds, and its files."""
        root = self._folder()
        commit = revision
        if not _COMMIT.fullmatch(revision):
            try:
                with open(os.path.join(root, "refs", revision), encoding="utf-8") as ref:
                    commit = ref.read().strip()
            except OSError:
                commit = ""
        snapshot = os.path.join(root, "snapshots", commit)
        if not commit or not os.path.isdir(snapshot):
            raise Unreachable(
                f"{self.location}@{revision}: is not in the local cache {root}, and {why}; "
                f"fetch it while the hub can be reached, or check HF_HUB_CACHE"
            )
        with LocalStorage(snapshot) as storage:
            return commit, {entry.name: entry for entry in storage.walk()}

    def _folder(self) -> str:
        """Return the folder of the local cache that is this repository's."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self._repository, repo_type="model")
        return os.path.join(self._cache or constants.HF_HUB_CACHE, name)

    def _note_revision(self) -> None:
        """Tell the local cache which commit was asked for by a name, for when there is no hub."""
        if self._asked == self.revision:
            return
        name = os.path.join(self._folder(), "refs", self._asked)
        with mapped_errors("note the commit", name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
            with open(name, "w", encoding="utf-8") as ref:
                ref.write(self.revision)

    def entries(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self._entries.items() if "/" not in name}

    def walk(self, wanted: Callable[[str], bool] = lambda _name: True) -> Iterator[Entry]:
        for name, entry in self._entries.items():
            folders = name.split("/")[:-1]
            if all(wanted("/".join(folders[: i + 1])) for i in range(len(folders))):
                yield entry

    def size(self, name: str) -> int:
        return self._entry(name).nbytes

    def read(self, name: str, *, limit: int) -> bytes:
        entry = self._entry(name)
        if entry.nbytes > limit:
            raise InputError(
                f"{self.location}/{name}: has {entry.nbytes} bytes, more than the {limit} that a "
                f"file of this kind may have",
                file=name,
            )
        return self._fetched(name).read(name, limit=limit)

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        entry = self._entry(name)
        here = self._snapshot(name)
        if here is not None:
            here.read_into(name, begin, views)
        elif self._kept is None or begin + sum(v.nbytes for v in views) > entry.nbytes:
            self._reader().read_into(name, begin, views)
        else:
            key = cache_key(self.location, entry)
            self._kept.read_into(key, begin, views, partial(self._reader().read_into, name))

    def reader(self, threads: int) -> Reader:
        here = self._local(self._expected)
        if here is not None:
            return here.reader(min(threads, here.traits.read_threads))
        if self._kept is not None or any(self._snapshot(name) for name in self._expected):
            return PlainReader(self, self._reading.threads or threads)  # it is not all the hub's
        return reader_of(self, threads, self._reading)

    def expect(self, files: Mapping[str, int]) -> None:
        """Fetch files of which nearly all is about to be read."""
        self._expected = frozenset(files)
        whole = [n for n, nbytes in files.items() if nbytes >= _WHOLE_SHARE * self.size(n)]
        self._fetch(whole)

    def fetched(self, names: Iterable[str]) -> LocalStorage:
        """Return the local cache's folder of this commit, with these files in it."""
        names = frozenset(names)
        self._fetch(names)
        here = self._local(names)
        assert here is not None, "there are names, and each was fetched"
        return here

    def _fetch(self, names: Iterable[str]) -> None:
        absent = [name for name in names if self._snapshot(name) is None]
        with ThreadPoolExecutor(max(1, min(_FETCH_THREADS, len(absent)))) as pool:
            for _ in pool.map(self._fetched, absent):
                pass

    def _local(self, names: Iterable[str]) -> LocalStorage | None:
        """Return the local cache's folder of this commit, if it has all of these files."""
        found = [self._snapshot(name) for name in names]
        return found[0] if found and all(each is not None for each in found) else None

    def map(self, name: str) -> np.ndarray:
        self._entry(name)
        return self._fetched(name).map(name)

    def interrupt(self, on: bool = True) -> None:
        if self._ranges is not None:
            self._ranges.health.interrupt(on)

    def close(self) -> None:
        self.interrupt()
        if self._here is not None:
            self._here.close()

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise PathNotFound(
                f"{self.location}@{self.revision}: has no file {name}; check the name", file=name
            )
        return self._entries[name]

    def _snapshot(self, name: str) -> LocalStorage | None:
        """Return the local cache's folder of this commit, if it has the file."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            self._repository, name, cache_dir=self._cache, revision=self.revision
        )
        if not isinstance(path, str):
            return None
        with self._lock:
            if self._here is None:
                folder = path.removesuffix(name).rstrip("/")
                self._here = LocalStorage(folder, reading=self._reading)
            return self._here

    def _fetched(self, name: str) -> LocalStorage:
        """Return the local cache's folder of this commit, after fetching a file into it."""
        here = self._snapshot(name)
        if here is not None:
            return here
        from huggingface_hub import hf_hub_download

        with _mapped(f"fetch {name}", self.location, name=name):
            hf_hub_download(
                self._repository,
                name,
                revision=self.revision,
                cache_dir=self._cache,
                etag_timeout=self._timeout,
            )
        self._note_revision()
        here = self._snapshot(name)
        if here is None or here.size(name) != self._entries[name].nbytes:
            raise StorageError(
                f"{self.location}/{name}: was fetched, and the local cache holds another size than "
                f"the {self._entries[name].nbytes} bytes of the hub; remove it there",
                file=name,
            )
        return here

    def _reader(self) -> ObjectReader:
        with self._lock:
            if self._ranges is None:
                self._ranges = self._new_reader()
            return self._ranges

    def _new_reader(self) -> ObjectReader:
        from huggingface_hub import constants, get_token

        scheme, _, rest = constants.ENDPOINT.partition("://")
        host, _, folder = rest.partition("/")
        path = f"{folder}/{self._repository}/resolve/{self.revision}".lstrip("/")
        token = get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        reader = ObjectReader(
            Address(scheme, host, path, headers=tuple(headers.items())),
            {},
            timeout=self._timeout,
            pinned=True,
            immutable=True,
        )
        for entry in self._entries.values():
            reader.learn(entry)
        return reader


@contextmanager
def _mapped(operation: str, where: str, *, name: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of ours, that say what to do."""
    try:
        yield
    except ShardStateError:
        raise
    except Exception as error:
        raise _ours(error, f"{where}: cannot {operation}", name) from None


def _ours(error: Exception, what: str, name: str | None) -> ShardStateError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.GatedRepoError():
            return StorageError(
                f"{what}: it is gated; accept its terms on the hub, and set HF_TOKEN", file=name
            )
        case errors.RepositoryNotFoundError():
            return PathNotFound(
                f"{what}: there is no such repository, or it is private; check the name, and "
                f"HF_TOKEN",
                file=name,
            )
        case errors.RevisionNotFoundError():
            return PathNotFound(f"{what}: there is no such revision; check it", file=name)
        case errors.RemoteEntryNotFoundError():
            return PathNotFound(f"{what}: there is no such file; check its name", file=name)
        case errors.HFValidationError():
            return UsageError(f"{what}: it is no valid name of a repository")
        case errors.HfHubHTTPError() if status is not None and status < 500 and status != 429:
            return StorageError(f"{what}: HTTP {status}; check HF_TOKEN and HF_ENDPOINT", file=name)
    cause = f"HTTP {status}" if status is not None else f"no answer ({type(error).__name__})"
    return Unreachable(
        f"{what}: {cause}; check HF_ENDPOINT and the network, or set HF_HUB_OFFLINE=1", file=name
    )
