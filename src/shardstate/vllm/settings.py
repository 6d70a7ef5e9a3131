"""What `--model-loader-extra-config` may say for the load format `shardstate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shardstate.errors import UsageError
from shardstate.storage import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys, and their defaults."""

    pattern: str | None = None  # names of rank files; None: what the set says, or vLLM's
    source: str | None = None  # a PATH that overrides the target model's
    timeout: float | None = None  # seconds without a byte of a store until it is an error
    store_options: Mapping[str, str] | None = None  # of object stores; may be secrets
    cache: str | None = None  # a directory that keeps shards for the next start
    verify: bool = False  # compare digests while reading a set of ours
    key: str | None = None  # a file with the Ed25519 key that must have signed the set
    strict: bool = True  # missing and unexpected names, another engine version: an error
    threads: int | None = None  # that read at once
    direct: bool | None = None  # past the page cache, or through it; None: choose while reading
    chunk_bytes: int | None = None  # the most that one request asks for; None: choose
    backend: str = "native"  # or "safetensors", "runai": read whole rank files their way

    @property
    def reading(self) -> Reading:
        """How local files are read."""
        return Reading(threads=self.threads, direct=self.direct, chunk_bytes=self.chunk_bytes)


_KINDS: Mapping[str, tuple[type, str]] = {
    "pattern": (str, "a text"),
    "source": (str, "a text"),
    "cache": (str, "a text"),
    "timeout": (float, "seconds, more than 0"),
    "store_options": (dict, "an object of texts"),
    "verify": (bool, "true or false"),
    "key": (str, "a text"),
    "strict": (bool, "true or false"),
    "threads": (int, "a number, 1 or more"),
    "direct": (bool, "true or false"),
    "chunk_bytes": (int, "a number, 1 or more"),
    "backend": (str, "native, safetensors or runai"),
}


def parse_settings(config: object) -> Settings:
    """Return what an extra config says; `UsageError`, a `ValueError`, lists what is allowed."""
    allowed = ", ".join(f"{name} ({what})" for name, (_, what) in _KINDS.items())
    where = "model_loader_extra_config of load format shardstate"
    if not isinstance(config, Mapping):
        raise UsageError(f"{where}: is a {type(config).__name__}, expected a dict of {allowed}")
    if unknown := sorted(
        str(key) for key in set(config) - {each.name for each in fields(Settings)}
    ):
        raise UsageError(f"{where}: unknown {', '.join(unknown)}; allowed are {allowed}")
    given: dict[str, Any] = {}
    for name, value in config.items():
        kind, what = _KINDS[name]
        wrong = not isinstance(value, (int, float) if kind is float else kind)
        wrong |= kind in (int, float) and isinstance(value, bool)
        if not wrong and kind is dict:
            wrong = not all(isinstance(text, str) for item in value.items() for text in item)
        low = not wrong and ((kind is int and value < 1) or (kind is float and value <= 0))
        if value is not None and (wrong or low):
            shown = f"a {type(value).__name__}" if kind is dict else repr(value)
            raise UsageError(f"{where}: {name} is {shown}, expected {what}; allowed are {allowed}")
        if value is not None:
            given[name] = value
    settings = Settings(**given)
    if settings.backend not in ("native", "safetensors", "runai"):
        raise UsageError(
            f"{where}: backend is {settings.backend!r}, expected {_KINDS['backend'][1]}"
        )
    if settings.backend != "native" and (settings.verify or settings.key is not None):
        raise UsageError(
            f"{where}: verify and key need backend native, which hashes what it reads; found "
            f"backend {settings.backend!r}"
        )
    return settings
