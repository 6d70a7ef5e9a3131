"""What makes a set trusted beyond its digests: a signature, or a digest known from elsewhere."""

from __future__ import annotations

import re

from shardstate.checkpoint import Checkpoint
from shardstate.digest import digest_of
from shardstate.errors import InputError, PathNotFound, SetError, SignatureError, UsageError
from shardstate.findings import Verification
from shardstate.names import MANIFEST, SIGNATURE
from shardstate.report import Problem, Report
from shardstate.signing import MAX_SIGNATURE_BYTES, parse_signature, signature_problem
from shardstate.storage import Storage

_SEALED = 64 + len('"}\n')  # the manifest's own digest, from the end


def own_digest(manifest: bytes) -> str:
    """Return the digest that a manifest ends with."""
    return manifest[-_SEALED:-3].decode(errors="replace")


def checked_digest(text: str) -> str:
    """Return a digest as it is compared, or raise `UsageError`."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise UsageError(f"digest {text[:80]!r}: expected 64 hex digits")
    return text.lower()


def check_trust(
    storage: Storage, found: Verification, *, key: str | None, digest: str | None
) -> str | None:
    """Add what is wrong with the signature of a set, and with its manifest's digest.

    `key` must have signed it, where one is given. `digest` is that of the whole manifest or the one
    that it ends with: both stand for the same bytes. Return the key, if it did sign the set; whose
    signature it claims to be is a note.
    """
    manifest, data = found.manifest_bytes, _signature(storage)
    if data is not None:
        found.files.append((SIGNATURE, len(data), None))
        found.bytes_meta += len(data)
        try:
            signature = parse_signature(data, file=SIGNATURE)
        except SetError as error:
            if key is None:
                text = f"{str(error).removeprefix(f'{SIGNATURE}: ')}, and sign it again"
                found.add("digest", SIGNATURE, text)
        else:
            if key is None and found.manifest and signature.manifest != digest_of(manifest):
                text = f"is of another {MANIFEST}; sign the set again, or remove it"
                found.add("stale", SIGNATURE, text)
            if key is None:
                found.notes.append(f"says it is signed by key {signature.key}: --key FILE checks")
    problem = None if key is None else signature_problem(manifest, data, key)
    if problem is not None:
        found.problems.append(problem)
    if digest is not None and digest not in (digest_of(manifest), _sound(found)):
        found_is = _sound(found) or digest_of(manifest)
        text = f"has digest {found_is}, expected {digest}; it is another set, or changed"
        found.add("digest", MANIFEST, text)
    return key if problem is None else None


def require_signature(checkpoint: Checkpoint, key: str) -> None:
    """Raise `SignatureError` unless `key` signed the set; `UsageError` for what is no set."""
    if checkpoint.kind != "shardstate":
        raise UsageError(
            f"{checkpoint.location}: is no set of shardstate and cannot be signed; leave the key "
            f"out, or shard it and sign that"
        )
    problem: Problem | None
    if checkpoint.manifest is None:
        text = "is missing: what is not committed is not signed; finish the set, then sign it"
        problem = Problem(MANIFEST, None, text, "missing")
    else:
        signature = _signature(checkpoint.storage)
        problem = signature_problem(checkpoint.manifest_bytes, signature, key)
    if problem is not None:
        raise SignatureError(
            f"{checkpoint.location}/{problem.file}: {problem.problem}",
            file=problem.file,
            report=Report(problems=(problem,)),
        )


def _sound(found: Verification) -> str | None:
    """Return the digest that a manifest ends with, if it is that of its bytes."""
    return own_digest(found.manifest_bytes) if found.manifest is not None else None


def _signature(storage: Storage) -> bytes | None:
    """Return the bytes of the signature file; None where there is none."""
    try:
        return storage.read(SIGNATURE, limit=MAX_SIGNATURE_BYTES)
    except PathNotFound:
        return None
    except InputError as error:
        return str(error).encode()  # no regular file, or too large: unsound in any case
