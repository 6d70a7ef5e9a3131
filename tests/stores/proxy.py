"""A proxy on loopback that does to connections what networks do: delay, cut, corrupt, refuse."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Rule = Callable[[bytes, int], str | None]  # head of a request, its number → what happens to it


@dataclass
class Proxy:
    """Passes requests on to `target`, one connection a client; `rule` says what befalls each.

    None lets it pass. "503" and "429" answer so; "cut" ends the answer's body half-way, "corrupt"
    flips a byte of it, "reset" closes at once, "hang" never answers, "stall" stops half-way,
    "lost" does what is asked and never says so, "trickle" sends a byte at a time, and
    "skewed" says that the clock is wrong.
    """

    target: int
    rule: Rule = lambda _head, _number: None
    strip: bytes | None = None  # a header that is left out
    requests: list[bytes] = field(default_factory=list)  # first lines
    body_bytes: int = 0  # of all answers
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._stopped.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            reader = client.makefile("rb")
            while not self._stopped.is_set():
                head = _head(reader)
                if not head:
                    return
                with self._lock:
                    number = len(self.requests)
                    self.requests.append(head.split(b"\r\n", 1)[0])
                if not self._answer(client, reader, head, self.rule(head, number)):
                    return

    def _answer(self, client: socket.socket, reader, head: bytes, fate: str | None) -> bool:
        body = reader.read(_length(head))
        if fate == "reset":
            return False
        if fate == "hang":
            self._stopped.wait(30)
            return False
        if fate in ("503", "429"):
            client.sendall(f"HTTP/1.1 {fate} Slow Down\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        if fate == "skewed":
            text = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
            status = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(text)
            client.sendall(status + text)
            return True
        if self.strip is not None:
            head = re.sub(rb"(?im)^" + self.strip + rb":[^\r]*\r\n", b"", head)
        with socket.create_connection(("127.0.0.1", self.target), 30) as server:
            server.sendall(re.sub(rb"(?im)^connection:[^\r]*\r\n", b"", head) + body)
            answer = server.makefile("rb")
            found = _head(answer)
            if not found:
                return False
            if head.startswith(b"HEAD") or re.match(rb"HTTP/1.. (204|304)", found):
                client.sendall(found)
                return True
            if re.search(rb"(?i)transfer-encoding: *chunked", found):
                content = _chunked(answer)
                found = re.sub(rb"(?i)transfer-encoding: *chunked", b"", found).replace(
                    b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(content)
                )
                found = found.replace(b"\r\n\r\nContent-Length", b"\r\nContent-Length")
            else:
                content = answer.read(_length(found))
        if fate == "lost":
            return False
        with self._lock:
            self.body_bytes += len(content)
        half = len(content) // 2
        if fate == "corrupt" and content:
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if fate in ("cut", "stall"):
            client.sendall(found + content[:half])
            if fate == "stall":
                self._stopped.wait(30)
            return False
        if fate == "trickle":
            client.sendall(found)
            give_up = time.monotonic() + 30
            for i in range(len(content)):
                if time.monotonic() > give_up or self._stopped.wait(0.05):
                    return False
                client.sendall(content[i : i + 1])
            return True
        client.sendall(found + content)
        return True


def _head(reader) -> bytes:
    lines = []
    while True:
        line = reader.readline(65536)
        if not line:
            return b""
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)


def _length(head: bytes) -> int:
    found = re.search(rb"(?im)^content-length: *(\d+)", head)
    return int(found[1]) if found else 0


def _chunked(reader) -> bytes:
    parts = []
    while size := int(reader.readline().split(b";")[0], 16):
        parts.append(reader.read(size))
        reader.readline()
    reader.readline()
    return b"".join(parts)


@contextlib.contextmanager
def proxy(target: int, rule: Rule | None = None, *, strip: bytes | None = None) -> Iterator[Proxy]:
    """Yield a running proxy before the server at port `target`; it ends with the context."""
    found = Proxy(target, strip=strip)
    if rule is not None:
        found.rule = rule
    try:
        yield found
    finally:
        found.close()


def some(share: float, *fates: str, seed: int = 0) -> Rule:
    """Return a rule by which a share of all requests fails, each in one of these ways."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def rule(_head: bytes, _number: int) -> str | None:
        with lock:
            return chance.choice(fates) if chance.random() < share else None

    return rule


def first(count: int, fate: str, *, method: bytes = b"GET", containing: bytes = b"") -> Rule:
    """Return a rule by which the first requests of a kind fail."""
    left = count
    lock = threading.Lock()

    def rule(head: bytes, _number: int) -> str | None:
        nonlocal left
        with lock:
            if left and head.startswith(method) and containing in head:
                left -= 1
                return fate
            return None

    return rule
