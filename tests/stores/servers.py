"""Real servers of object stores on loopback, each started and ended by the tests that use it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

START_SECONDS = 60
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret-that-must-not-show"
ACCOUNT = "devstoreaccount1"
# Azurite's well-known key.
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def _program(name: str) -> str:
    """Return a program that pip installed, here or (WEED) elsewhere."""
    return os.environ.get(name.upper()) or str(Path(sys.executable).parent / name)


def free_port(*, pair: bool = False) -> int:
    """Return a port that nobody listens on; with `pair`, 10000 above it as well."""
    for _ in range(200):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if not pair:
                return port
            port = 10_000 + port % 20_000
            with contextlib.suppress(OSError), socket.socket() as first:
                first.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
                return port
    raise RuntimeError("no free port")


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `port` answers; fail with the server's log if it ends or does not come up."""
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@dataclass
class SeaweedFS:
    """`weed server` with its S3 gateway; can be killed and started again on the same ports."""

    folder: Path
    port: int = field(default_factory=lambda: free_port(pair=True))
    filer: int = field(default_factory=lambda: free_port(pair=True))
    process: subprocess.Popen[bytes] | None = None
    _others: list[int] = field(default_factory=lambda: [free_port(pair=True) for _ in range(2)])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
        }

    def start(self) -> None:
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        config = self.folder / "s3.json"
        identities = [
            {"name": "tests", "credentials": keys, "actions": actions},
            {"name": "anonymous", "actions": [f"{each}:open" for each in actions]},
        ]
        config.write_text(json.dumps({"identities": identities}))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        log = self.folder / "log"
        command = [
            _program("weed"), "server", f"-dir={data}", "-ip=127.0.0.1",
            f"-master.port={self._others[0]}", f"-volume.port={self._others[1]}",
            f"-filer.port={self.filer}", f"-filer.localSocket={self.folder}/f.sock",
            "-s3", f"-s3.port={self.port}", f"-s3.config={config}", "-s3.port.iceberg=0",
            "-s3.port.lance=0", "-s3.iam=false", f"-s3.localSocket={self.folder}/s.sock",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=512", "-volume.max=100",
        ]  # fmt: skip
        with log.open("ab") as out:
            # A group of its own: what it starts ends with it.
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        wait_for(self.port, self.process, log)
        self._wait_until_it_writes(log)

    def _wait_until_it_writes(self, log: Path) -> None:
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            with contextlib.suppress(OSError, http.client.HTTPException):
                for bucket in ("bucket", "open"):
                    self.request("PUT", f"/{bucket}")
                if self.request("PUT", "/bucket/.started", b"1")[0] == 200:
                    self.request("DELETE", "/bucket/.started")
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the server does not take objects:\n{log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it as by kill -9, at once."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def request(self, method: str, path: str, body: bytes = b"", headers=None) -> tuple[int, bytes]:
        """Send a signed request, past the client under test; return status and body."""
        return s3_request(self.port, method, path, body, headers or {})

    def uploads(self) -> list[str]:
        """Return the uploads to the bucket that are neither complete nor aborted."""
        text = self.request("GET", "/bucket?uploads=")[1].decode()
        return text.split("<UploadId>")[1:]


def s3_request(
    port: int, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Send one request with a signature of version 4."""
    date = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name, _, query = path.partition("?")
    digest = hashlib.sha256(body).hexdigest()
    signed = {
        "host": f"127.0.0.1:{port}",
        "x-amz-content-sha256": digest,
        "x-amz-date": date,
    }
    names = ";".join(signed)
    lines = "".join(f"{key}:{value}\n" for key, value in signed.items())
    canonical = f"{method}\n{name}\n{query}\n{lines}\n{names}\n{digest}"
    scope = f"{date[:8]}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), "sha256").digest()
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={names}, "
        f"Signature={signature}"
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(
            method, path, body, {**signed, "authorization": authorization, **headers}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[SeaweedFS]:
    """Yield a running server; it ends with the context."""
    server = SeaweedFS(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Azurite:
    """Microsoft's emulator of Azure Blob."""

    port: int

    @property
    def options(self) -> dict[str, str]:
        return {
            "account_name": ACCOUNT,
            "account_key": ACCOUNT_KEY,
            "endpoint": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
        }

    def request(self, method: str, path: str, body: bytes = b"", headers=None) -> tuple[int, bytes]:
        """Send a signed request, past the client under test; return status and body."""
        name, _, query = path.partition("?")
        sent = {
            **(headers or {}),
            "x-ms-date": format_datetime(datetime.now(UTC), usegmt=True),
            "x-ms-version": "2021-08-06",
        }
        lines = "".join(f"{key}:{sent[key]}\n" for key in sorted(sent))
        resource = f"/{ACCOUNT}/{ACCOUNT}{name}"
        resource += "".join(
            f"\n{part.replace('=', ':')}" for part in sorted(query.split("&")) if part
        )
        length = str(len(body)) if body else ""
        text = f"{method}\n\n\n{length}\n\n\n\n\n\n\n\n\n{lines}{resource}"
        key = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), "sha256").digest()
        sent["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(key).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"/{ACCOUNT}{path}", body, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Azurite]:
    """Yield a running emulator with a container `bucket`; it ends with the context."""
    port = free_port()
    script = Path(__file__).parent / "node_modules" / "azurite" / "dist/src/blob/main.js"
    log = folder / "log"
    command = [
        "node", str(script), "--blobHost", "127.0.0.1", "--blobPort", str(port),
        "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        wait_for(port, process, log)
        server = Azurite(port)
        status, body = server.request("PUT", "/bucket?restype=container")
        assert status == 201, body
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
