"""What the client of object stores raises, and what becomes of it."""

import obstore
import obstore.exceptions
import pytest

from shardstate.errors import (
    ChangedFile,
    PathNotFound,
    ShardStateError,
    StorageError,
    Unreachable,
    UsageError,
)
from shardstate.storage.faults import EXCEPTIONS, diagnose, error_of

FOREIGN = {
    name: value
    for name, value in vars(obstore.exceptions).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}


def test_no_exception_of_the_client_is_unmapped():
    assert set(EXCEPTIONS) == set(FOREIGN)


@pytest.mark.parametrize("kind", [*FOREIGN.values(), FileNotFoundError, ValueError, TimeoutError])
def test_each_of_them_becomes_one_of_ours(kind):
    fault = diagnose(kind("https://host/secret?sig=abcdef"))
    error = error_of(fault, what="read bytes [0, 4)", where="s3://b/a", name="a")
    assert isinstance(error, ShardStateError)
    assert str(error).startswith("s3://b/a")
    assert "abcdef" not in str(error)


def status(number, code=""):
    return obstore.exceptions.GenericError(
        f"Server returned non-2xx status code: {number} X: <Error><Code>{code}</Code></Error>"
    )


@pytest.mark.parametrize(
    ("error", "kind", "cause", "advice"),
    [
        (status(503, "SlowDown"), "failed", "HTTP 503 SlowDown", "overloaded"),
        (status(429), "failed", "HTTP 429", "overloaded"),
        (status(404, "NoSuchKey"), "missing", "HTTP 404 NoSuchKey", "check the path"),
        (status(404, "NoSuchBucket"), "refused", "NoSuchBucket", "name of the bucket"),
        (status(403, "InvalidAccessKeyId"), "refused", "HTTP 403", "access key id"),
        (status(403, "SignatureDoesNotMatch"), "refused", "HTTP 403", "secret key"),
        (status(403, "RequestTimeTooSkewed"), "refused", "HTTP 403", "clock"),
        (status(403), "refused", "HTTP 403", "credentials"),
        (status(301, "PermanentRedirect"), "refused", "HTTP 301", "region"),
        (status(412), "changed", "HTTP 412", "again"),
    ],
)
def test_each_status_says_what_to_check(error, kind, cause, advice):
    fault = diagnose(error)
    assert fault.kind == kind
    assert cause in fault.cause
    assert advice in fault.advice


@pytest.mark.parametrize(
    ("text", "kind", "cause"),
    [
        ("InvalidCertificate(UnknownIssuer)", "refused", "certificate is not trusted"),
        ("InvalidMessage(InvalidContentType)", "refused", "does not speak it"),
        ("failed to lookup address information", "failed", "name of the host"),
        ("kind: ConnectionRefused", "failed", "connection refused"),
        ("hyper::Error(IncompleteMessage)", "failed", "was cut"),
        ("kind: Timeout, TimedOut", "failed", "no answer in time"),
        ("PUT http://169.254.169.254/latest/api/token", "refused", "no credentials"),
        ("source: NotPartial", "refused", "ignores byte ranges"),
    ],
)
def test_each_cause_has_its_own_text(text, kind, cause):
    fault = diagnose(obstore.exceptions.GenericError(text))
    assert fault.kind == kind
    assert cause in fault.cause


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", PathNotFound),
        ("changed", ChangedFile),
        ("usage", UsageError),
        ("refused", StorageError),
        ("failed", Unreachable),
    ],
)
def test_kinds_of_faults_are_kinds_of_errors(kind, expected):
    fault = diagnose(status(500))
    found = error_of(
        type(fault)(kind, fault.cause, fault.advice), what="list it", where="s3://b", name=None
    )
    assert type(found) is expected
