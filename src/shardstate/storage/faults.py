"""What the client of object stores raises, as one of ours: the one place that knows its exceptions.

Foreign texts hold signed addresses, so none of them is passed on: status, error code and cause are
picked out of them by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardstate.errors import (
    ChangedFile,
    PathNotFound,
    ShardStateError,
    StorageError,
    Unreachable,
    UsageError,
)


class SlowAnswer(Exception):
    """An answer trickles; the text says how."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed request."""

    kind: str  # "missing", "changed", "refused" (trying again is useless), "failed", "usage"
    cause: str  # HTTP status and code, or what happened to the connection
    advice: str  # what to check


# What obstore raises beside built-in exceptions, by name; a test proves that none is missing.
# `None`: the text decides.
EXCEPTIONS: dict[str, str | None] = {
    "BaseError": None,
    "GenericError": None,
    "NotFoundError": "missing",
    "InvalidPathError": "usage",
    "JoinError": "failed",
    "NotSupportedError": "refused",
    "AlreadyExistsError": "refused",
    "PreconditionError": "changed",
    "NotModifiedError": "changed",
    "PermissionDeniedError": None,
    "UnauthenticatedError": None,
    "UnknownConfigurationKeyError": "usage",
}

_RETRIED = {408, 425, 429}  # and all of 500 to 599
_CREDENTIALS = "check the credentials (environment, profile, --store-option) and what they may do"
_BUCKET = "check the name of the bucket or container, the region and the endpoint"
_SERVER = "check the endpoint, and the state of the server"
_BUSY = "the server is overloaded or down: check its state, or try again later with fewer --threads"

# Error codes of the stores → advice; the code itself is in the cause.
_CODES = {
    "NoSuchBucket": _BUCKET,
    "ContainerNotFound": _BUCKET,
    "InvalidBucketName": _BUCKET,
    "PermanentRedirect": "check the region and the endpoint: the bucket lives elsewhere",
    "AuthorizationHeaderMalformed": "check the region: the bucket lives in another one",
    "IllegalLocationConstraintException": "check the region: the bucket lives in another one",
    "InvalidAccessKeyId": "check the access key id: the server does not know it",
    "SignatureDoesNotMatch": "check the secret key: the signature made with it is wrong",
    "AuthenticationFailed": "check the account key or token, and the clock of this machine",
    "RequestTimeTooSkewed": "check the clock of this machine: it differs from the server's",
    "RequestExpired": "check the clock of this machine: it differs from the server's",
    "ExpiredToken": "the session token has expired: get new credentials",
    "InvalidToken": "check the session token: the server does not accept it",
    "AccessDenied": "check what these credentials may do with the bucket",
}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}

# Traces of the client's texts → (cause, advice, whether trying again may help); first match wins.
_TRACES: tuple[tuple[str, str, str, bool], ...] = (
    (
        r"169\.254\.169\.254|/latest/api/token|metadata\.google\.internal|metadata/identity",
        "no credentials were found: not in the environment, a profile or --store-option, and no "
        "metadata service of a cloud answered",
        "set them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
        "AZURE_STORAGE_ACCOUNT_KEY), or --store-option skip_signature=true for what is public",
        False,
    ),
    (
        r"kind: Builder|builder error",
        "plain http is not allowed",
        "give the endpoint with https://, or with http:// where that is meant",
        False,
    ),
    (
        r"InvalidCertificate|UnknownIssuer|certificate",
        "TLS failed: the server's certificate is not trusted",
        "check the endpoint's name and SSL_CERT_FILE, the certificates that are trusted here",
        False,
    ),
    (
        r"InvalidContentType|HandshakeFail|InvalidMessage|corrupt message|AlertReceived|rustls|Tls",
        "TLS failed: the server does not speak it there",
        "check the endpoint: https:// or http://, and the port",
        False,
    ),
    (
        r"failed to lookup address|dns error",
        "the name of the host is not known",
        "check the endpoint and the name service",
        True,
    ),
    (r"ConnectionRefused", "nothing answers there (connection refused)", _SERVER, True),
    (r"ConnectionReset|BrokenPipe", "the connection was reset", _SERVER, True),
    (r"IncompleteMessage|Interrupted|UnexpectedEof", "the connection was cut", _SERVER, True),
    (r"kind: Connect", "no connection could be made", _SERVER, True),
    (r"TimedOut|kind: Timeout", "no answer in time", _SERVER, True),
    (r"Parse\(|InvalidHeader", "the answer is no valid HTTP", _SERVER, True),
    (
        r"NotPartial|NoContentRange|RangeNotSupported",
        "the server ignores byte ranges",
        "serve the files with a server that answers range requests",
        False,
    ),
    (r"Body|Decode|kind: Request|error sending request", "the answer broke off", _SERVER, True),
    (
        r"MissingAccount|Account must be specified",
        "no storage account is named",
        "set AZURE_STORAGE_ACCOUNT_NAME, or --store-option account_name=NAME",
        False,
    ),
)


def diagnose(error: Exception) -> Fault:
    """Return what `error`, of the client or of Python, says."""
    text = str(error)
    if isinstance(error, SlowAnswer):
        advice = "check the network between here and the server, or use fewer --threads"
        return Fault("failed", f"the answer trickles: {text}", advice)
    named = EXCEPTIONS.get(type(error).__name__)
    status = _first(r"status(?: code)?: (\d{3})", text)
    code = _first(r"<Code>(\w+)</Code>", text) or _first(r'\\?"code\\?":\s*\\?"(\w+)', text)
    if status is not None:
        return _by_status(int(status), code)
    if isinstance(error, FileNotFoundError):
        return Fault("missing", "not found", "check the path")
    if named == "changed":
        return Fault("changed", "412", "read it again")
    if named == "usage" or isinstance(error, (ValueError, TypeError)):
        key = _first(r"Configuration key: '([\w-]+)'", text)
        what = f"{key!r} is no option of this store" if key else "a value is not valid"
        return Fault("usage", what, "check the address and each --store-option")
    for trace, cause, advice, again in _TRACES:
        if re.search(trace, text):
            return Fault("failed" if again else "refused", cause, advice)
    if isinstance(error, TimeoutError):
        return Fault("failed", "no answer in time", _SERVER)
    kind = "refused" if named is None else named
    return Fault(kind, f"the client says {type(error).__name__}", _SERVER)


def _by_status(status: int, code: str | None) -> Fault:
    cause = f"HTTP {status}{f' {code}' if code else ''}"
    if code in _CLOCK:
        return Fault("refused", cause, _CODES[str(code)])
    if status >= 500 or status in _RETRIED:
        return Fault("failed", cause, _BUSY)
    advice = _CODES.get(code or "")
    if status == 404 and advice is None:
        return Fault("missing", cause, "check the path")
    if status == 412:
        return Fault("changed", cause, "read it again")
    if advice is None:
        advice = _CREDENTIALS if status in (401, 403) else _BUCKET
    return Fault("refused", cause, advice)


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def error_of(fault: Fault, *, what: str, where: str, name: str | None) -> ShardStateError:
    """Return our exception for a fault that ended an operation.

    `what` is the operation with its byte range, `where` the address.
    """
    message = f"{where}: cannot {what}: {fault.cause}"
    match fault.kind:
        case "missing":
            return PathNotFound(f"{message}; {fault.advice}", file=name)
        case "changed":
            return ChangedFile(
                f"{where}: changed since it was opened: it is being replaced, or was; "
                f"read it again when that is done",
                file=name,
            )
        case "usage":
            return UsageError(f"{message}; {fault.advice}")
        case "failed":
            return Unreachable(f"{message}; {fault.advice}", file=name)
        case _:
            return StorageError(f"{message}; {fault.advice}", file=name)
