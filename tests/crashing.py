"""Runs `shardstate` in children that kill -9 themselves before their k-th write, fsync or rename.

As a script it is a server of forks: one line of JSON with a request in, one with the child's
status out. A process that did nothing but import is forked in milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DIED = -signal.SIGKILL
# Every call that changes a disk, or waits for it; `tests/fuzz/kill.py` finds them by strace.
CHANGES = (
    "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir",
    "truncate", "ftruncate", "posix_fallocate", "pwrite", "pwritev", "write", "writev", "sendfile",
    "copy_file_range", "fsync", "fdatasync", "utime", "chmod", "fchmod",
)  # fmt: skip


class Server:
    """Carries out command lines in processes of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, arguments: Sequence[str | Path], *, die_at: int) -> int:
        """Return the exit status; `DIED` if there was a `die_at`-th change, counted from 1."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": [str(a) for a in arguments], "die_at": die_at}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def crash_server() -> Iterator[Server]:
    """Yield a server; it ends with the context."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process)


def die_at(number: int) -> None:
    """Let this process kill itself before its `number`-th change of a disk, counted from 1."""
    count = 0

    def counted(name: str, original):
        def call(*args, **kwargs):
            nonlocal count
            creates = name != "open" or (args[1] if len(args) > 1 else 0) & os.O_CREAT
            if creates:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in (*CHANGES, "open"):
        setattr(os, name, counted(name, getattr(os, name)))


def _serve() -> None:
    from shardstate.cli.main import run

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            die_at(request["die_at"])
            os._exit(run(request["arguments"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
