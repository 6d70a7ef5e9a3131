"""Every exception that shardstate raises on purpose.

    ShardStateError                 what, where, expected, found, what to do next
    ├── UsageError (ValueError)     an argument or flag is wrong
    ├── InputError (ValueError)     what a path holds cannot be used
    │   ├── PathNotFound (FileNotFoundError)
    │   ├── HeaderError             a safetensors header is malformed or lies about its file
    │   ├── TruncatedFile           a file ends before the bytes that were planned
    │   ├── ChangedFile             a file became another, or vanished, while it was read
    │   ├── CatalogError            files that are whole but do not make one checkpoint
    │   ├── RulesError              a rules file, or a configuration that rules need, is wrong
    │   ├── NoRule                  no split rule matches a tensor's name
    │   ├── UnevenSplit             a tensor cannot be shared evenly by that many ranks
    │   ├── NotNested               strides that plans cannot intersect or compose
    │   ├── PlanError               a plan leaves elements undefined, or writes them twice
    │   ├── SetError                manifest, records and files of a set do not agree
    │   │   ├── DigestError         a file of a set has another digest than is recorded
    │   │   └── MisplacedError      a file of a set is another rank's
    │   ├── LoadError               stored tensors do not fit a module
    │   └── TargetError             the place to write to holds something else
    ├── DamageError (ValueError)    bytes differ from their recorded digests
    │   └── SignatureError          a set is not signed by the key that is required
    └── StorageError (OSError)      permission, disk full, I/O, network
        ├── OutOfMemory (MemoryError)   what is to be loaded does not fit here
        ├── TargetBusy              another process is writing there
        └── Unreachable             a store failed for too long; later it may work

`file` and `tensor` name what the error is about, where it is about one.
Errors survive pickling, so that they can cross from a worker process to its parent.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class ShardStateError(Exception):
    """Base of all errors of this library; `kind` is the word that `--json` prints."""

    kind: ClassVar[str] = "input"

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor

    def located(self, folder: str) -> Self:
        """Return this error with `folder` in front of a message that begins with `file`."""
        message = str(self)
        if self.file is not None and message.startswith(f"{self.file}:"):
            self.args = (f"{folder}/{message}", *self.args[1:])
        return self


class UsageError(ShardStateError, ValueError):
    """An argument or a flag is wrong, or contradicts what the path holds."""

    kind = "usage"


class InputError(ShardStateError, ValueError):
    """What a path holds cannot be used."""


class PathNotFound(InputError, FileNotFoundError):
    """There is nothing at that path."""


class HeaderError(InputError):
    """A safetensors header is malformed, or lies about its file."""


class TruncatedFile(InputError):
    """A file ends before the bytes that were planned."""


class ChangedFile(InputError):
    """A file became another one, or vanished, while it was read."""


class CatalogError(InputError):
    """Files that are whole, one by one, do not make one checkpoint."""


class RulesError(InputError):
    """A rules file, or a model configuration that rules refer to, is wrong."""


class NoRule(InputError):
    """No split rule matches the tensors `names`."""

    def __init__(self, message: str, *, names: tuple[str, ...] = ()) -> None:
        super().__init__(message, tensor=names[0] if names else None)
        self.names = names


class UnevenSplit(InputError):
    """`world` ranks cannot share axis `axis` of `tensor`: `size` elements in units of `unit`."""

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        axis: int = 0,
        size: int = 0,
        unit: int = 1,
        world: int = 1,
        works: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, tensor=tensor)
        self.axis, self.size, self.unit, self.world = axis, size, unit, world
        self.works = works  # world sizes that every tensor of the checkpoint allows


class NotNested(InputError):
    """Strides that do not nest like the axes of one array."""


class PlanError(InputError):
    """A plan leaves elements of a tensor undefined, or defines them twice."""


class SetError(InputError):
    """Manifest, records and files of a sharded checkpoint do not agree."""


class DigestError(SetError):
    """A file of a set has another digest than is recorded for it."""


class MisplacedError(SetError):
    """A file of a set is another rank's, under this rank's name."""


class LoadError(InputError):
    """Names, shapes or dtypes of stored tensors do not fit a module."""


class TargetError(InputError):
    """The place to write to holds something that must not be overwritten."""


class DamageError(ShardStateError, ValueError):
    """Stored bytes differ from their recorded digests; `report.problems` lists where."""

    def __init__(self, message: str, *, file: str | None = None, report: Any = None) -> None:
        super().__init__(message, file=file)
        self.report = report


class SignatureError(DamageError):
    """A set is not signed, or not by the key that is required."""


class StorageError(ShardStateError, OSError):
    """The storage refused or failed: permission, disk full, I/O."""

    kind = "storage"


class Unreachable(StorageError):
    """A store did not answer, broke off or was overloaded for too long; later it may work."""


class OutOfMemory(StorageError, MemoryError):
    """What is to be loaded does not fit into memory."""


class TargetBusy(StorageError):
    """Another process is writing to the same place."""
