"""Signing keys as files."""

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def write_key(path, key, encoding=PEM, format_=serialization.PrivateFormat.PKCS8, how=PLAIN):
    path.write_bytes(key.private_bytes(encoding, format_, how))
    return path


def write_public(path, key):
    format_ = serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(PEM, format_))
    return path


def write_pairs(path):
    """Write two keys to `path`: `own` and `other`, each with its public one."""
    for seed, name in enumerate(("own", "other"), 1):
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))
        write_key(path / name, key)
        write_public(path / f"{name}.pub", key)
    return path
