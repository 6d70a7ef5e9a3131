"""AWS profiles that say where to ask for credentials: boto3 itself asks, a real server checks."""

import http.server
import json
import logging
import sys
import threading
from urllib.parse import parse_qs

import pytest
from servers import ACCESS_KEY, SECRET_KEY
from test_commands import same_arrays, upload

import shardstate
from checkpoints import write_llama
from shardstate.cli.main import run
from shardstate.errors import StorageError
from shardstate.storage import Access

ROLE = "arn:aws:iam::123456789012:role/reader"
ANSWER = f"""<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleResult><AssumedRoleUser><Arn>{ROLE}</Arn><AssumedRoleId>a:b</AssumedRoleId>
</AssumedRoleUser><Credentials><AccessKeyId>{ACCESS_KEY}</AccessKeyId>
<SecretAccessKey>{SECRET_KEY}</SecretAccessKey><SessionToken></SessionToken>
<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult>
</AssumeRoleResponse>"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", layers=1)


@pytest.fixture
def url(s3, checkpoint, folder, monkeypatch):
    upload(s3, checkpoint, folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    return f"s3://bucket/{folder}"


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Return what writes the profile that counts, and others beside it."""

    def write(text, others=""):
        (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\n{text}\n{others}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "mine")

    return write


@pytest.fixture
def program(tmp_path):
    """Return what makes a program that prints credentials, or fails with them in its text."""

    def make(*, works=True, key=ACCESS_KEY):
        text = json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": SECRET_KEY})
        file = tmp_path / "program.py"
        out = f"print({text!r})" if works else f"raise SystemExit({text!r})"
        file.write_text(out)
        return f"credential_process = {sys.executable} {file}"

    return make


@pytest.fixture
def sts(monkeypatch):
    """A server that gives the keys of the store to whoever takes on the role."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked.append((parse_qs(body), self.headers["Authorization"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/xml")
            self.end_headers()
            self.wfile.write(ANSWER.encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_address[1]}")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_program_gives_the_credentials(url, profile, program, checkpoint):
    profile(program())
    same_arrays(shardstate.load(url, rank=0, tp=1), shardstate.load(checkpoint, rank=0, tp=1))
    shardstate.shard(url, f"{url}-tp2", tp=2)
    assert shardstate.verify(f"{url}-tp2", full=True).problems == ()


def test_a_role_is_taken_on_with_the_keys_of_another_profile(url, profile, sts, capsys):
    keys = "aws_access_key_id = other\naws_secret_access_key = unseen"
    profile(f"role_arn = {ROLE}\nsource_profile = base", f"[profile base]\n{keys}")
    assert shardstate.load(url, rank=0, tp=1)
    assert sts
    log = logging.getLogger("botocore.parsers")
    assert run(["load", url, "--rank", "0", "--tp", "1", "--debug"]) == 0
    assert not log.isEnabledFor(logging.DEBUG)
    said = capsys.readouterr()
    assert SECRET_KEY not in said.err + said.out
    for fields, authorization in sts:
        assert fields["RoleArn"] == [ROLE]
        assert "Credential=other/" in authorization


def test_who_is_asked_is_asked_once(url, profile, tmp_path):
    asked = tmp_path / "asked"
    text = json.dumps({"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY})
    program = tmp_path / "counting.py"
    program.write_text(f"open({str(asked)!r}, 'a').write('x')\nprint({text!r})")
    profile(f"credential_process = {sys.executable} {program}")
    shardstate.shard(url, f"{url}-tp2", tp=2)
    assert asked.read_text() == "x"


def test_a_program_that_fails_is_one_error_without_its_text(url, profile, program, capsys):
    profile(program(works=False))
    assert run(["load", url, "--rank", "0", "--tp", "1"]) == 3
    text = capsys.readouterr().err
    assert f"{url}: profile 'mine' of AWS gets its credentials by credential_process" in text
    assert "aws sts get-caller-identity --profile mine" in text
    assert SECRET_KEY not in text
    assert text.count("\n") == 1


def test_credentials_that_the_store_refuses(url, profile, program):
    profile(program(key="nobody"))
    with pytest.raises(StorageError, match="InvalidAccessKeyId"):
        shardstate.open(url, access=Access(timeout=3))


def test_options_and_variables_are_stronger_than_the_profile(
    s3, url, profile, program, monkeypatch
):
    profile(program(works=False))
    shardstate.open(url, access=Access(options=s3.options)).close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    shardstate.open(url).close()
