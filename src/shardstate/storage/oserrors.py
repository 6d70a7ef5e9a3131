"""Errors of the operating system, as errors of this library that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from shardstate.errors import InputError, PathNotFound, StorageError

_ADVICE = {
    errno.EACCES: "check the permissions of the path and who runs this",
    errno.EPERM: "check the permissions of the path and who runs this",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "the disk is full: free some space or choose another place, then run it again",
    errno.EDQUOT: "the quota is used up: free some space, then run it again",
    errno.EFBIG: "a limit on file sizes was reached (ulimit -f): raise it or use smaller parts",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the device failed: check its health (dmesg), then try again",
    errno.ELOOP: "a link is in the way, and nothing is written through links: remove it",
}


@contextlib.contextmanager
def mapped_errors(operation: str, path: str, *, name: str | None = None) -> Iterator[None]:
    """Turn an OSError of the operating system into one of ours, that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (StorageError, InputError)):
            raise
        cause = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise PathNotFound(
                f"{path}: cannot {operation}: {cause}; check the path", file=name
            ) from error
        advice = _ADVICE.get(error.errno or 0, "check the file system, then try again")
        raise StorageError(f"{path}: cannot {operation}: {cause}; {advice}", file=name) from error
