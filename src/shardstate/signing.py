"""Signatures of manifests: Ed25519 over the bytes of `shardstate.json`.

The manifest holds the digest of every file of its set, so whoever trusts it trusts the set.
Digests alone detect damage: whoever changes a file on purpose can change its digests too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import msgspec

from shardstate.digest import digest_of
from shardstate.errors import InputError, SetError, UsageError
from shardstate.jsontext import shown
from shardstate.manifest import VERSION, Digest, decode, seal, unseal
from shardstate.names import MANIFEST, SIGNATURE
from shardstate.report import Problem
from shardstate.storage.oserrors import mapped_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "ed25519"
MAX_SIGNATURE_BYTES = 64 << 10
_MAX_KEY_BYTES = 64 << 10

_Signed = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]


class Signature(msgspec.Struct, frozen=True):
    """`shardstate.json.sig`."""

    algorithm: str
    manifest: Digest  # of the bytes that were signed: tells a stale signature without any key
    key: Digest  # the public key, 32 bytes in hex
    signature: _Signed


def signature_json(signature: Signature) -> bytes:
    """Return the bytes of `shardstate.json.sig`."""
    return seal({"version": VERSION, **msgspec.structs.asdict(signature)})


def parse_signature(data: bytes, *, file: str) -> Signature:
    """Return what a signature file says; whether it is right is another question."""
    found = decode(unseal(data, file=file), Signature, file=file)
    if found.algorithm != ALGORITHM:
        raise SetError(
            f"{file}: is signed by {shown(found.algorithm)}, this shardstate knows {ALGORITHM}; "
            f"install a newer shardstate",
            file=file,
        )
    return found


def sign_manifest(manifest: bytes, key: Ed25519PrivateKey) -> Signature:
    """Return the signature of a manifest's bytes; the same key always gives the same one."""
    public = key.public_key().public_bytes_raw().hex()
    return Signature(ALGORITHM, digest_of(manifest), public, key.sign(manifest).hex())


def signing_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Return the private key of a file: PEM (PKCS #8) or OpenSSH, not encrypted."""
    key = _load(path)
    if isinstance(key, bytes):
        raise UsageError(f"{os.fspath(path)}: is a public key; signing takes the private one")
    return key


def checking_key(path: str | os.PathLike[str]) -> str:
    """Return the public key of a file, in hex; of a private key the one that belongs to it."""
    key = _load(path)
    return (key if isinstance(key, bytes) else key.public_key().public_bytes_raw()).hex()


def signature_problem(manifest: bytes, signature: bytes | None, key: str) -> Problem | None:
    """Return why `signature`, the bytes of its file, is none of `key` over `manifest`, or None."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if signature is None:
        text = f"is missing: the set is not signed, expected a signature by key {key}; sign it"
        return Problem(SIGNATURE, None, f"{text} (shardstate sign), or do not use it", "missing")
    try:
        found = parse_signature(signature, file=SIGNATURE)
    except SetError as error:
        return Problem(SIGNATURE, None, str(error).removeprefix(f"{SIGNATURE}: "), "digest")
    if found.key != key:
        text = f"is by key {found.key}, expected {key}: somebody else signed; do not use the set"
        return Problem(SIGNATURE, None, text, "digest")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(
            bytes.fromhex(found.signature), manifest
        )
    except (InvalidSignature, ValueError):
        text = (
            f"is not what key {key} signed: it has digest {digest_of(manifest)}, signed was "
            f"{found.manifest}; it was changed or replaced: copy the set again from whom you trust"
        )
        return Problem(MANIFEST, None, text, "digest")
    return None


def _load(path: str | os.PathLike[str]) -> Ed25519PrivateKey | bytes:
    """Return the private key in a file, or the 32 bytes of the public one."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    where = os.fspath(path)
    with mapped_errors("read the key", where, name=where), open(where, "rb") as file:
        data = file.read(_MAX_KEY_BYTES)
    expected = "expected an Ed25519 key, PEM or OpenSSH"
    try:
        key: object
        if data.startswith(b"-----BEGIN OPENSSH PRIVATE KEY"):
            key = serialization.load_ssh_private_key(data, password=None)
        elif b"PRIVATE KEY-----" in data:
            key = serialization.load_pem_private_key(data, password=None)
        elif data.startswith(b"ssh-"):
            key = serialization.load_ssh_public_key(data)
        else:
            key = serialization.load_pem_public_key(data)
    except TypeError:
        raise UsageError(
            f"{where}: is encrypted; give it in the clear, from a file that only you may read"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{where}: is no key; {expected}", file=where) from None
    if isinstance(key, Ed25519PrivateKey):
        return key
    if isinstance(key, Ed25519PublicKey):
        return key.public_bytes_raw()
    raise InputError(f"{where}: is a key of another kind; {expected}", file=where)
