"""The hub's file and range routes on loopback, for huggingface_hub itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_BYTES = 10_000  # larger files are kept elsewhere, as on the hub
TOKEN = "hf_testtoken"


@dataclass
class Hub:
    """Repositories by name; each has one commit."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    body_bytes: int = 0
    down: bool = False
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repository: str) -> str:
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def fetched(self) -> set[str]:
        """Return the names of files whose bytes were asked for."""
        return {path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET"}


class Server(ThreadingHTTPServer):
    """A server that lets many clients in at once: each new one waits seconds otherwise."""

    request_queue_size = 128
    daemon_threads = True


@contextlib.contextmanager
def hub_server(repositories: Mapping[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Yield a running hub; it ends with the context."""
    hub = Hub(dict(repositories))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.down:
                self.close_connection = True
                return
            parts = path.strip("/").split("/")
            if parts[0] == "cdn":
                name = "/".join(parts[1:3])
                self.send_file(hub.repositories[name]["/".join(parts[4:])], {})
                return
            name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
            if name not in hub.repositories or (
                name in hub.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
            ):
                self.fail(404, "RepoNotFound")
                return
            if parts[0] == "api":
                self.api(name, parts[4:])
            else:
                self.resolve(name, parts[3], "/".join(parts[4:]))

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def api(self, name: str, rest: list[str]) -> None:
            commit = hub.commit(name)
            if rest[:1] == ["revision"] and rest[1] not in ("main", commit):
                self.fail(404, "RevisionNotFound")
                return
            entries = []
            for file, data in hub.repositories[name].items():
                entry = {"type": "file", "path": file, "rfilename": file, "size": len(data)}
                entry |= {"blobId": git_id(data), "oid": git_id(data)}
                if len(data) > LFS_BYTES:
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
                    entry["lfs"]["oid"] = digest
                entries.append(entry)
            found = {"id": name, "sha": commit, "siblings": entries}
            if rest[:1] == ["tree"]:
                found = entries
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def resolve(self, name: str, revision: str, file: str) -> None:
            commit = hub.commit(name)
            if revision not in ("main", commit):
                self.fail(404, "RevisionNotFound")
                return
            if file not in hub.repositories[name]:
                self.fail(404, "EntryNotFound")
                return
            data = hub.repositories[name][file]
            headers = {"X-Repo-Commit": commit}
            if len(data) <= LFS_BYTES:
                self.send_file(data, {**headers, "ETag": f'"{git_id(data)}"'})
                return
            # Another host, as a content network is.
            self.send_response(302)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Location", f"http://localhost:{hub.port}/cdn/{name}/{commit}/{file}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_file(self, data: bytes, headers: Mapping[str, str]) -> None:
            wanted = self.headers.get("range")
            size = len(data)
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last or size - 1) + 1, size)
                data = data[begin:end]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            else:
                self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            if "ETag" not in headers:
                self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                hub.body_bytes += len(data)
                self.wfile.write(data)

    server = Server(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def git_id(data: bytes) -> str:
    """Return what git calls a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
