"""Operations on the directory of the write-back cache: list, prune."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shardstate.api.planning import local_path
from shardstate.api.writing import parse_size
from shardstate.cachedir import CacheEntry, list_entries, prune
from shardstate.report import Phases, Report


def cache_list(path: str | os.PathLike[str]) -> Report:
    """Return the entries of a cache as `file_list`, the one used last first."""
    phases = Phases()
    with phases("open"):
        report = _described(list_entries(local_path(path)))
    return phases.finish(report, main=None)


def cache_prune(path: str | os.PathLike[str], *, max_size: int | str) -> Report:
    """Remove what was used longest ago until at most `max_size` is left.

    Return what is left; `notes` names what is gone. Entries in use stay.
    """
    phases = Phases()
    limit = 0 if max_size in (0, "0") else parse_size(max_size)
    with phases("open"):
        left, gone = prune(local_path(path), max_bytes=limit)
        report = _described(left)
        report.notes = tuple(f"removed {each.name} ({each.nbytes} bytes)" for each in gone) or None
    return phases.finish(report, main=None)


def _described(entries: Sequence[CacheEntry]) -> Report:
    report = Report(kind="cache", bytes=sum(entry.nbytes for entry in entries))
    report.files = len(entries)
    report.file_list = tuple(
        {
            "name": entry.name,
            "bytes": entry.nbytes,
            "rank": None,
            "used": entry.used,
            "committed": entry.committed,
        }
        for entry in entries
    )
    return report
