"""Plain http: read by range, listed by what the folder's own files name, never written."""

import contextlib
import re
import ssl
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import unquote

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import shardstate
from checkpoints import write_llama
from shardstate.errors import InputError, StorageError
from shardstate.storage import Access, storage_at

QUICK = Access(timeout=2)


class Handler(SimpleHTTPRequestHandler):
    """Files with byte ranges, and a password where `login` asks for one."""

    protocol_version = "HTTP/1.1"
    login = ""
    ranges = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.login and self.headers.get("authorization") != self.login:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
        if not wanted or not self.ranges:
            super().do_GET()
            return
        path = self.translate_path(unquote(self.path))
        with open(path, "rb") as file:
            data = file.read()
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
        self.end_headers()
        self.wfile.write(data[begin:end])

    def date_time_string(self, timestamp=None):
        return "Tue, 24 Nov 2026 12:00:00 GMT"  # of all files, at all times


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_):
        pass  # clients that do not trust it leave


@contextlib.contextmanager
def server(folder, handler=Handler, tls=None):
    found = Server(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        found.socket = context.wrap_socket(found.socket, server_side=True)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{found.server_address[1]}"
    finally:
        found.shutdown()
        found.server_close()


def certificate(folder):
    """Write a certificate that nobody trusts, for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    raw = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(raw)


@pytest.fixture
def source(tmp_path):
    return write_llama(tmp_path / "www" / "llama", files=2)


def same_arrays(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert np.array_equal(found[name].view(np.uint8), array.view(np.uint8)), name


@pytest.mark.parametrize("files", [1, 2])
def test_an_ordinary_checkpoint(files, tmp_path, caplog):
    source = write_llama(tmp_path / "www" / "llama", files=files)
    with server(source.parent) as host:
        found = shardstate.load(f"http://{host}/llama", rank=1, tp=2, access=QUICK)
    same_arrays(found, shardstate.load(source, rank=1, tp=2))
    assert "nothing can be listed" in caplog.text


def test_a_set_with_and_without_its_manifest(source, tmp_path):
    out = tmp_path / "www" / "tp2"
    shardstate.shard(source, out, tp=2)
    with server(out.parent) as host:
        url = f"http://{host}/tp2"
        found = shardstate.load(url, rank=1, verify=True, access=QUICK)
        same_arrays(found, shardstate.load(out, rank=1))
        assert shardstate.verify(url, full=True, access=QUICK).problems == ()
        shardstate.copy(url, tmp_path / "copy", access=QUICK)
        (out / "shardstate.json").unlink()
        found = shardstate.load(url, rank=1, access=QUICK)
        same_arrays(found, shardstate.load(out, rank=1))
        names = set(storage_at(url, QUICK).entries())
        assert names == {
            p.name for p in out.iterdir() if "rank-" in p.name and "prov" not in p.name
        }


def test_signing_in(source):
    class Closed(Handler):
        login = "Basic dXNlcjpzZWNyZXQ="

    with server(source.parent, Closed) as host:
        shardstate.load(f"http://user:secret@{host}/llama", rank=0, tp=2, access=QUICK)
        with pytest.raises(StorageError, match="401") as error:
            shardstate.load(f"http://user:wrong@{host}/llama", rank=0, tp=2, access=QUICK)
    assert "wrong" not in str(error.value)


def test_a_server_without_byte_ranges_is_said_so(source):
    class Whole(Handler):
        ranges = False

    with server(source.parent, Whole) as host:
        with pytest.raises(StorageError, match="ignores byte ranges"):
            shardstate.load(f"http://{host}/llama", rank=0, tp=2, access=QUICK)


def test_a_certificate_that_is_not_trusted_and_one_that_is(source, tmp_path, monkeypatch):
    certificate(tmp_path)
    with server(source.parent, tls=tmp_path) as host:
        with pytest.raises(StorageError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            shardstate.load(f"https://{host}/llama", rank=0, tp=2, access=QUICK)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        found = shardstate.load(f"https://{host}/llama", rank=0, tp=2, access=QUICK)
    same_arrays(found, shardstate.load(source, rank=0, tp=2))


def test_nothing_there(source):
    with server(source.parent) as host:
        with pytest.raises(InputError, match="found nothing"):
            shardstate.open(f"http://{host}/nothing", access=QUICK)


def test_an_answer_that_never_ends_is_not_kept(source):
    sent = []

    class Endless(Handler):
        """Announces ten bytes, and sends chunks as long as somebody takes them."""

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            sent.append(0)
            while sent[-1] < 256 << 20:
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                sent[-1] += 1 << 16

    with server(source.parent, Endless) as host:
        with pytest.raises(StorageError, match=r"shardstate\.json"):
            shardstate.open(f"http://{host}/llama", access=QUICK)
    assert sent
    assert max(sent) < 32 << 20  # what lies in the buffers of sockets
