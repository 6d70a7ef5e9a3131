"""Credentials and endpoints that users keep in environment variables and configuration files.

The client reads the usual variables itself; here is what it does not: profiles of AWS, connection
strings of Azure, the emulator's address of Google Cloud.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from shardstate.errors import StorageError, UsageError

_PROFILE_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
    "web_identity_token_file": "web_identity_token_file",
    "role_arn": "role_arn",
    "role_session_name": "role_session_name",
}
_FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HOME")
# By profile and files, for as long as the process lives; they renew themselves.
_providers: dict[tuple[str | None, ...], Callable[[], Any]] = {}
_CREDENTIALS = (
    "access_key_id",
    "secret_access_key",
    "session_token",
    "web_identity_token_file",
    "role_arn",
    "role_session_name",
)


def aws_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the client's options that the environment's variables and the AWS profile give."""
    _, merged = _profile(environment)
    indirect = _way_of(merged) is not None
    found = {_PROFILE_KEYS[key]: value for key, value in merged.items() if key in _PROFILE_KEYS}
    if _has_credentials(environment) or indirect:
        for option in _CREDENTIALS:
            found.pop(option, None)
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["endpoint"] = endpoint
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region:
        found["region"] = region
    return found


def indirect_profile(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the profile of AWS if it says whom to ask for credentials, and by what; else None."""
    if _has_credentials(environment):
        return None
    profile, merged = _profile(environment)
    way = _way_of(merged)
    return None if way is None else (profile, way)


def _way_of(profile: Mapping[str, str]) -> str | None:
    """Return by what a profile gets its credentials, if not by what it says itself.

    In the order of AWS's own tools: a role, then single sign-on, keys, and a program.
    """
    if "role_arn" in profile:
        ways = ["source_profile", "credential_source"]
    else:
        ways = ["sso_session", "sso_start_url"]
    if not {"aws_access_key_id", "web_identity_token_file"} & profile.keys():
        ways.append("credential_process")
    return next((way for way in ways if way in profile), None)


def profile_credentials(profile: str, way: str, *, where: str, seconds: float) -> Callable[[], Any]:
    """Return what gives the client the credentials of an indirect profile, and renews them.

    Each request that this takes may last so many seconds; `where` they are for is what errors name:
    `UsageError` without boto3, `StorageError` where there are none to be had.
    """
    what = f"{where}: profile {profile!r} of AWS gets its credentials by {way}"
    if importlib.util.find_spec("boto3") is None:
        raise UsageError(
            f"{what}, which needs boto3: pip install 'shardstate[aws]', or run "
            f'eval "$(aws configure export-credentials --format env)" first'
        )
    key = (profile, *(os.environ.get(name) for name in _FILES))
    try:
        if key not in _providers:  # whoever is asked for a code, is asked once
            _providers[key] = _provider(profile, seconds)
        return _providers[key]
    except Exception as error:
        # Not its text: that of a program may say anything, secrets too.
        raise StorageError(
            f"{what}, and there were none ({type(error).__name__}); run "
            f"aws sts get-caller-identity --profile {profile} to see why"
        ) from None


def _provider(profile: str, seconds: float) -> Callable[[], Any]:
    import boto3
    import botocore.session
    from botocore.config import Config
    from obstore.auth.boto3 import Boto3CredentialProvider

    limits = Config(connect_timeout=seconds, read_timeout=seconds, retries={"max_attempts": 1})
    session = botocore.session.Session(profile=profile)
    session.set_default_client_config(limits)
    # botocore renews what has less than ten minutes to live: so long is what it gives good for.
    provider = Boto3CredentialProvider(
        boto3.Session(botocore_session=session), ttl=timedelta(minutes=10)
    )
    provider()  # what is wrong with it shows here, and not as a refusal of the store
    return provider


def _has_credentials(environment: Mapping[str, str]) -> bool:
    return "AWS_ACCESS_KEY_ID" in environment or "AWS_WEB_IDENTITY_TOKEN_FILE" in environment


def _profile(environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the name of the profile that counts, and what the files of AWS say of it."""
    home = Path(environment.get("HOME") or os.path.expanduser("~")) / ".aws"
    files = (
        (environment.get("AWS_CONFIG_FILE") or str(home / "config"), "profile "),
        (environment.get("AWS_SHARED_CREDENTIALS_FILE") or str(home / "credentials"), ""),
    )
    name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE")
    profile = name or "default"
    merged: dict[str, str] = {}
    known = False
    for file, prefix in files:
        parser = configparser.RawConfigParser(default_section="\0", strict=False)
        try:
            with open(file, encoding="utf-8") as text:
                parser.read_file(text)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, configparser.Error):
            raise UsageError(
                f"{file}: cannot be read as a configuration of AWS; mend it, or name another one "
                f"(AWS_CONFIG_FILE, AWS_SHARED_CREDENTIALS_FILE)"
            ) from None
        for section in (f"{prefix}{profile}", profile if profile == "default" else ""):
            if section and parser.has_section(section):
                known = True
                merged |= dict(parser.items(section))
                break
    if name and not known:
        raise UsageError(
            f"AWS_PROFILE is {name!r}, and neither {files[0][0]} nor {files[1][0]} has it"
        )
    return profile, merged


def azure_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the client's options that Azure's own names of variables give."""
    found: dict[str, str] = {}
    names = {
        "AZURE_STORAGE_ACCOUNT": "account_name",
        "AZURE_STORAGE_KEY": "account_key",
        "AZURE_STORAGE_SAS_TOKEN": "sas_key",
    }
    text = environment.get("AZURE_STORAGE_CONNECTION_STRING")
    if text:
        fields = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
        if fields.get("UseDevelopmentStorage", "").lower() == "true":
            found["use_emulator"] = "true"
        for field, option in (
            ("AccountName", "account_name"),
            ("AccountKey", "account_key"),
            ("SharedAccessSignature", "sas_key"),
            ("BlobEndpoint", "endpoint"),
        ):
            if field in fields:
                found[option] = fields[field]
        if "endpoint" not in found and {"EndpointSuffix", "AccountName"} <= set(fields):
            scheme = fields.get("DefaultEndpointsProtocol", "https")
            host = f"{fields['AccountName']}.blob.{fields['EndpointSuffix']}"
            found["endpoint"] = f"{scheme}://{host}"
    own = {option: environment[name] for name, option in names.items() if name in environment}
    return found | own


def google_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the client's options that name an emulator of Google Cloud Storage, if one is."""
    host = environment.get("STORAGE_EMULATOR_HOST")
    if not host:
        return {}
    url = host if "://" in host else f"http://{host}"
    # Without a token of any kind the client would ask a metadata service for one.
    return {"base_url": url.rstrip("/"), "bearer_token": "emulator"}
