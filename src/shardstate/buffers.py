"""Staging memory."""

from __future__ import annotations

import mmap

import numpy as np

PAGE_BYTES = mmap.PAGESIZE


def staging_buffer(nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of page-aligned memory of their own, as uint8."""
    return np.frombuffer(
        mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8
    )[:nbytes]
