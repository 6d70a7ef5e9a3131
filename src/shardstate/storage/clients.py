"""Addresses of object stores, and the client for each. obstore is imported here, on use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from shardstate.errors import ShardStateError, UsageError
from shardstate.storage.faults import diagnose
from shardstate.storage.profiles import (
    aws_options,
    azure_options,
    google_options,
    indirect_profile,
    profile_credentials,
)

SCHEMES = ("s3", "gs", "az", "https", "http")
_CLIENT_OPTIONS = {
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "randomize_addresses",
    "root_certificate",
    "user_agent",
}
_TRUST = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
_CONNECT_SECONDS = 10.0
CLOUDS = {"s3": "Amazon S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store and a folder in it are."""

    scheme: str
    bucket: str  # or container; for https the host
    prefix: str  # without slashes at its ends
    login: str = field(default="", repr=False)  # user:password of an https address
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # of each request

    @property
    def url(self) -> str:
        """The address without credentials."""
        return f"{self.scheme}://{self.bucket}{f'/{self.prefix}' if self.prefix else ''}"


def parse_address(text: str) -> Address:
    """Return the parts of an address; `UsageError` if it is none that is supported."""
    shown = re.sub(r"//[^/@]*@", "//", text.split("?")[0])
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise UsageError(
            f"{shown}: expected a directory, {', '.join(f'{s}://…' for s in SCHEMES)} or a hub id "
            f"(org/name, hf://org/name)"
        )
    login = ""
    if scheme in ("https", "http"):
        parts = urlsplit(text)
        if parts.query or parts.fragment:
            raise UsageError(
                f"{shown}: an address of a folder has no ? or #; sign in with user:password@, "
                f"or use the store's own scheme"
            )
        login = parts.netloc.rpartition("@")[0]
        rest = parts.netloc.rpartition("@")[2] + parts.path
    bucket, _, prefix = rest.partition("/")
    prefix = unquote(prefix) if scheme in ("https", "http") else prefix
    prefix = prefix.strip("/")
    bad = [part for part in prefix.split("/") if part in ("", ".", "..")] if prefix else []
    if not bucket or bad:
        raise UsageError(f"{shown}: expected {scheme}://{'bucket' if bucket else 'BUCKET'}/folder")
    if re.search(r"[\x00-\x1f\x7f\\]", prefix + bucket) or (login == "" and "@" in bucket):
        raise UsageError(f"{shown}: has characters that no address of a store has")
    return Address(scheme, bucket, prefix, login)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one try may take."""

    idle_seconds: float | None  # without a byte
    seconds: float  # in all
    retry_seconds: float  # the client tries again itself for so long; 0: never


def endpoint_of(address: Address, options: Mapping[str, str]) -> str:
    """Return what to call the server of `address` in messages."""
    if address.scheme in ("https", "http"):
        return f"{address.scheme}://{address.bucket}"
    settings = _settings(address, options)
    named = settings.get("endpoint") or settings.get("base_url")
    if named is None and settings.get("use_emulator") == "true":
        return "the emulator of Azure"
    region = settings.get("region")
    where = f"{CLOUDS[address.scheme]}{f', region {region}' if region else ''}"
    return re.sub(r"//[^/@]*@", "//", named) if named else where


def _settings(address: Address, options: Mapping[str, str]) -> dict[str, str]:
    """Return the store's own options: those given, then those of the environment."""
    given: dict[str, str] = {}
    for key, value in options.items():
        name = key.strip().lower()
        for prefix in ("aws_", "azure_storage_", "azure_", "google_"):
            name = name.removeprefix(prefix)
        name = {"endpoint_url": "endpoint", "default_region": "region"}.get(name, name)
        given[name] = value
    match address.scheme:
        case "s3":
            # The usual default of servers that are not Amazon's; Amazon's answer names the right
            # one.
            return {"region": "us-east-1"} | aws_options(os.environ) | given
        case "gs":
            return google_options(os.environ) | given
        case "az":
            return azure_options(os.environ) | given
        case _:
            return given


def connect(address: Address, options: Mapping[str, str], limits: Limits) -> Any:
    """Return obstore's client for the folder of `address`; `UsageError` for a wrong option."""
    from obstore import store as stores

    settings: Any = _settings(address, options)
    client: dict[str, Any] = {
        "user_agent": "shardstate",
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, limits.seconds)),
        "timeout": timedelta(seconds=limits.seconds),
    }
    if limits.idle_seconds is not None:
        client["read_timeout"] = timedelta(seconds=limits.idle_seconds)
    trusted = next((os.environ[name] for name in _TRUST if os.environ.get(name)), None)
    if trusted is not None:
        try:
            with open(trusted, "rb") as file:
                client["root_certificate"] = file.read()
        except OSError as error:
            raise UsageError(
                f"{trusted}: cannot read the certificates that are trusted: {error.strerror}"
            ) from None
    for key in [key for key in settings if key in _CLIENT_OPTIONS]:
        value = settings.pop(key)
        client[key] = value == "true" if value in ("true", "false") else value
    named = settings.get("endpoint") or settings.get("base_url") or f"{address.scheme}://"
    if named.startswith("http://") or settings.get("use_emulator") == "true":
        client["allow_http"] = True
    retry = {
        "max_retries": 20 if limits.retry_seconds else 0,
        "retry_timeout": timedelta(seconds=limits.retry_seconds),
        "backoff": {"max_backoff": timedelta(seconds=5)},
    }
    common: dict[str, Any] = {"client_options": client, "retry_config": retry}
    prefix = address.prefix or None
    try:
        match address.scheme:
            case "s3":
                given = {"access_key_id", "skip_signature"} & settings.keys()
                if not given and (found := indirect_profile(os.environ)) is not None:
                    common["credential_provider"] = profile_credentials(
                        *found, where=address.url, seconds=limits.seconds
                    )
                return stores.S3Store(address.bucket, prefix=prefix, config=settings, **common)
            case "gs":
                return stores.GCSStore(address.bucket, prefix=prefix, config=settings, **common)
            case "az":
                return stores.AzureStore(address.bucket, prefix=prefix, config=settings, **common)
            case _:
                if settings:
                    raise UsageError(
                        f"{address.url}: knows no --store-option {', '.join(sorted(settings))}"
                    )
                headers = dict(address.headers)
                if address.login:
                    headers["authorization"] = basic(address.login)
                client["default_headers"] = headers
                return stores.HTTPStore(address.url, **common)
    except ShardStateError:
        raise
    except Exception as error:
        fault = diagnose(error)
        raise UsageError(f"{address.url}: {fault.cause}; {fault.advice}") from None


def basic(login: str) -> str:
    """Return the header of a user and a password."""
    import base64

    return f"Basic {base64.b64encode(unquote(login).encode()).decode()}"
