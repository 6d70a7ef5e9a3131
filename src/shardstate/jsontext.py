"""JSON text that may be hostile: what is wrong with it beside what its type checks tell.

The JSON decoders in use take the last of two equal keys and nest as deep as the stack reaches.
Two readers of one text could so see two things; here such text is refused before it is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

MAX_DEPTH = 64  # configurations nest 5 deep, files of a set 6
_DIGITS = 400  # of one number: what a float needs at most, and no quadratic conversion
_SHOWN = 80  # characters of a text from a file that an error quotes

# Possessive, so that the length of a string costs no stack.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (_DIGITS + 1))


class _Twice(ValueError):
    """A key that one object has twice."""


def json_fault(data: bytes, *, constants: bool = False) -> str | None:
    """Return what is wrong with JSON text in words, or None: UTF-8, depth, repeated keys, numbers.

    `constants` lets NaN and Infinity pass, which configurations hold though JSON has none. Takes
    time and memory linear in `data`.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start}"
    bare = _STRING.sub(b"", data)
    if found := _LONG_NUMBER.search(bare):
        return f"has a number of more than {_DIGITS} digits: {found[0][:20].decode()}…"
    brackets = np.frombuffer(bare.translate(None, _NO_BRACKETS), dtype=np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    depth = int(np.cumsum(steps).max(initial=0))
    if depth > MAX_DEPTH:
        return f"nests {depth} deep, expected at most {MAX_DEPTH}"
    try:
        json.loads(text, object_pairs_hook=_once, parse_constant=None if constants else _refused)
    except _Twice as error:
        return f"has the key {shown(str(error))} twice in one object"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return None


def shown(text: str) -> str:
    """Return `text` as an error quotes it: in quotes, escaped, cut where it is long."""
    if len(text) <= _SHOWN:
        return repr(text)
    return f"{text[:_SHOWN]!r}… ({len(text)} characters)"


def first_repeated(names: Sequence[str]) -> str | None:
    """Return the first of `names` that was there before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice(first_repeated([key for key, _ in pairs]))
    return found


def _refused(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON number")
