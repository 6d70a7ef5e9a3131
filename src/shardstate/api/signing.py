"""Operations that sign: sign."""

from __future__ import annotations

import os
from typing import cast

from shardstate.api.planning import sizes_of
from shardstate.errors import InputError
from shardstate.manifest import Manifest
from shardstate.names import MANIFEST, SIGNATURE, record_rank
from shardstate.report import Phases, Report
from shardstate.signing import sign_manifest, signature_json, signing_key
from shardstate.storage import Access, writable_in_place
from shardstate.trust import own_digest
from shardstate.verify import verify_set


def sign(
    path: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str],
    access: Access | None = None,
) -> Report:
    """Sign a set with the private Ed25519 key in the file `key`; an older signature is replaced.

    Everything but the data is checked first: where `problems` are returned nothing was signed.
    """
    phases = Phases()
    private = signing_key(key)
    with phases("open"):
        storage = writable_in_place(path, access or Access())
    try:
        with phases("write"), storage.lock():
            names = storage.entries()
            if MANIFEST not in names and not any(record_rank(n) is not None for n in names):
                raise InputError(
                    f"{storage.location}: is no set of shardstate; shard it, then sign the set"
                )
            found = verify_set(storage, ranks=None, full=False, source=None, execute=_unused)
            report = Report(kind="shardstate", problems=tuple(found.problems) or None)
            report.bytes_meta, report.files = found.bytes_meta, len(found.files)
            report.tensors, report.bytes = found.tensors, found.bytes
            report.notes = tuple(found.notes) or None
            if not found.problems:
                manifest = cast(Manifest, found.manifest)
                signature = sign_manifest(found.manifest_bytes, private)
                storage.put(SIGNATURE, signature_json(signature))
                storage.sync()
                report.signed_by, report.digest = signature.key, own_digest(found.manifest_bytes)
                report.set, report.committed = manifest.set, True
                report.topology = sizes_of(manifest.info.shape)
                report.layout, report.stage = manifest.info.layout, manifest.info.stage
                report.dtype = manifest.info.dtype
    finally:
        storage.close()
    return phases.finish(report, main=None)


def _unused(*_: object) -> None:
    raise AssertionError("nothing is hashed without full")
