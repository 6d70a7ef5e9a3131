"""Addresses, options and credentials: what becomes of a PATH, without any server."""

import importlib.util

import pytest

from shardstate.errors import InputError, PathNotFound, UsageError
from shardstate.storage import Access, LocalStorage, location_of, storage_at, writable_at
from shardstate.storage.clients import endpoint_of, parse_address
from shardstate.storage.profiles import aws_options, azure_options, indirect_profile


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("az://container/a", "az://container/a"),
        ("https://user:secret@host:8000/a%20b", "https://host:8000/a b"),
        ("http://host/a", "http://host/a"),
    ],
)
def test_locations_have_no_credentials(text, url):
    assert location_of(text) == url
    assert "secret" not in repr(parse_address(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ftp://host/a", "expected a directory, s3://…"),
        ("s3://", "expected s3://BUCKET/folder"),
        ("s3://bucket/a//b", "expected s3://bucket/folder"),
        ("s3://bucket/../b", "expected s3://bucket/folder"),
        ("https://host/a?sig=secret", "has no [?] or #"),
        ("s3://key:secret@bucket/a", "has characters"),
    ],
)
def test_what_is_no_address_is_said_so(text, says):
    with pytest.raises(UsageError, match=says) as error:
        parse_address(text)
    assert "secret" not in str(error.value)


def test_local_paths(tmp_path):
    with LocalStorage(tmp_path) as storage:
        assert storage_at(tmp_path, Access()).location == storage.location
    with pytest.raises(PathNotFound, match="no such directory"):
        storage_at(tmp_path / "gone", Access())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is no directory"):
        storage_at(tmp_path / "file", Access())
    with pytest.raises(UsageError, match="empty"):
        storage_at("", Access())


def test_https_is_read_only():
    with pytest.raises(UsageError, match="can only be read"):
        writable_at("https://host/a", Access(), outputs=1)


def test_a_wrong_option_is_named_and_its_value_is_not():
    access = Access(options={"colour": "secret"})
    with pytest.raises(UsageError, match="'colour' is no option of this store") as error:
        storage_at("s3://bucket/a", access)
    assert "secret" not in str(error.value) + repr(access)


def test_endpoints_are_named_without_credentials():
    options = {"endpoint": "http://user:secret@host:1"}
    assert endpoint_of(parse_address("s3://b/a"), options) == "http://host:1"


@pytest.fixture
def aws(tmp_path):
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n"
        "[profile other]\nregion = eu-north-1\nendpoint_url = http://127.0.0.1:1\n"
        "[profile web]\nrole_arn = arn:x\nweb_identity_token_file = /token\n"
        "[profile sso]\nsso_session = mine\n"
    )
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = secret\n"
        "[other]\naws_access_key_id = two\naws_secret_access_key = secret\n"
    )
    return {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }


def test_the_default_profile_of_aws(aws):
    found = aws_options(aws)
    assert (found["region"], found["access_key_id"]) == ("eu-west-1", "one")


def test_a_named_profile_of_aws(aws):
    found = aws_options(aws | {"AWS_PROFILE": "other"})
    assert found["endpoint"] == "http://127.0.0.1:1"
    assert (found["region"], found["access_key_id"]) == ("eu-north-1", "two")


def test_web_identity_of_a_profile(aws):
    found = aws_options(aws | {"AWS_PROFILE": "web"})
    assert (found["role_arn"], found["web_identity_token_file"]) == ("arn:x", "/token")


def test_the_environment_is_stronger_than_the_profile(aws):
    found = aws_options(
        aws | {"AWS_ACCESS_KEY_ID": "env", "AWS_REGION": "r", "AWS_ENDPOINT_URL": "e"}
    )
    assert "access_key_id" not in found  # the client reads the variable itself
    assert (found["region"], found["endpoint"]) == ("r", "e")


def test_a_profile_that_is_not_there_is_said_so(aws):
    with pytest.raises(UsageError, match=r"neither .* has it"):
        aws_options(aws | {"AWS_PROFILE": "gone"})


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("sso_session = mine", "sso_session"),
        ("sso_start_url = u\naws_access_key_id = a", "sso_start_url"),
        ("role_arn = r\nsource_profile = other", "source_profile"),
        ("role_arn = r\nsource_profile = p\naws_access_key_id = a", "source_profile"),
        ("role_arn = r\ncredential_source = Environment", "credential_source"),
        ("credential_process = program", "credential_process"),
        ("credential_process = program\naws_access_key_id = a", None),
        ("role_arn = r\nweb_identity_token_file = /token", None),
        ("aws_access_key_id = a\naws_secret_access_key = b", None),
    ],
)
def test_profiles_that_say_where_to_ask(tmp_path, text, way):
    (tmp_path / "config").write_text(f"[profile p]\nregion = r\n{text}\n")
    variables = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_PROFILE": "p",
    }
    assert indirect_profile(variables) == (None if way is None else ("p", way))
    assert aws_options(variables)["region"] == "r"
    if way is not None:
        assert set(aws_options(variables)) == {"region"}
    assert indirect_profile(variables | {"AWS_ACCESS_KEY_ID": "a"}) is None


def test_a_profile_that_needs_boto3_says_so(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[default]\ncredential_process = program\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"by credential_process, which needs boto3: pip install"):
        storage_at("s3://bucket/a", Access())


def test_connection_strings_of_azure():
    text = "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=a==;EndpointSuffix=core.net"
    assert azure_options({"AZURE_STORAGE_CONNECTION_STRING": text}) == {
        "account_name": "me",
        "account_key": "a==",
        "endpoint": "https://me.blob.core.net",
    }
