"""Servers that all tests of this folder share; `make test-stores` installs them."""

from __future__ import annotations

import itertools

import pytest
from proxy import proxy
from servers import azurite, seaweedfs

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory):
    with azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def google(s3):
    """The XML interface of Google Cloud Storage is that of S3, with tokens for signatures."""
    with proxy(s3.port, strip=b"authorization") as server:
        yield server


@pytest.fixture
def folder():
    """A folder of a bucket that no other test uses."""
    return f"folder-{next(_numbers)}"


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch, tmp_path):
    """Keep tests from the machine's credentials, and from metadata services of clouds."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "HF_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
