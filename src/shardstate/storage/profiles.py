"""Credentials and endpoints that users keep in environment variables and configuration files.

The client reads the usual variables itself; here is what it does not: profiles of AWS, connection
strings of Azure, the emulator's address of Google Cloud.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from shardstate.errors import UsageError

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
_KEY_OPTIONS = ("access_key_id", "secret_access_key", "session_token")
_INDIRECT = ("sso_session", "sso_start_url", "credential_process", "source_profile")


def aws_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the client's options that the environment's variables and the AWS profile give."""
    found = _profile(environment)
    if "AWS_ACCESS_KEY_ID" in environment or "AWS_WEB_IDENTITY_TOKEN_FILE" in environment:
        for option in (*_KEY_OPTIONS, "web_identity_token_file", "role_arn", "role_session_name"):
            found.pop(option, None)
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["endpoint"] = endpoint
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region:
        found["region"] = region
    return found


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
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
    has_keys = "AWS_ACCESS_KEY_ID" in environment or "aws_access_key_id" in merged
    indirect = [key for key in _INDIRECT if key in merged]
    if indirect and not has_keys and "web_identity_token_file" not in merged:
        raise UsageError(
            f"profile {profile!r} of AWS gets its credentials by {indirect[0]}, which is not "
            f'supported; run eval "$(aws configure export-credentials --format env)" first'
        )
    return {_PROFILE_KEYS[key]: value for key, value in merged.items() if key in _PROFILE_KEYS}


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
