"""The write-back cache: what a start from an ordinary checkpoint leaves for the next one.

An entry is a set of `vllm` layout, in a directory named by all that decides its bytes: fingerprint
and identity of the source, engine, topology, and everything that the engine's configuration says.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch
from vllm.config import VllmConfig

from shardstate.api.planning import reads_of
from shardstate.api.writing import MAX_PART_SIZE, parse_size
from shardstate.cachedir import entry_path, mark_used, set_aside
from shardstate.checkpoint import Checkpoint, open_checkpoint
from shardstate.digest import digest_of
from shardstate.errors import InputError, ShardStateError, TargetBusy
from shardstate.inventory import Identity
from shardstate.manifest import SetInfo, Source
from shardstate.names import check_pattern, default_pattern
from shardstate.parts import plan_parts
from shardstate.storage import LocalStorage, Storage, revision_of
from shardstate.torch.aliases import equal_groups, filter_subtensors
from shardstate.torch.recorder import Recorder
from shardstate.torch.saving import write_rank
from shardstate.vllm.facts import describe_engine, placement_of
from shardstate.vllm.parallel import check_expressible, topology_of
from shardstate.vllm.weights import Weights

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_log = logging.getLogger("shardstate")

WRITE_THREADS = 1  # the engine has better things to do
_GRACE = 0.1  # seconds: this worker's loading ends before its writer wants the interpreter


@dataclass(frozen=True)
class Cache:
    """A directory of entries."""

    root: str

    def entry(
        self,
        weights: Weights,
        config: VllmConfig,
        model_config: ModelConfig,
        model: torch.nn.Module,
        reopen: Callable[[], Storage],
    ) -> Entry:
        """Return the entry of a model that would be loaded from `weights`; it may not be there.

        `reopen` opens what `weights` lie in once more.
        """
        check_expressible(config)
        checkpoint = Checkpoint(weights.storage, "checkpoint", catalog=weights.catalog)
        fingerprint = checkpoint.fingerprint()
        identity = _identity(weights.storage, weights.catalog.files)
        topology = topology_of(config)
        info = msgspec.structs.replace(
            describe_engine(config, model_config, pattern=default_pattern(topology)),
            engine_arguments=placement_of(config),
            source=Source(
                weights.storage.location,
                revision_of(weights.storage) or model_config.revision,
                fingerprint,
            ),
        )
        kind = type(model)
        key = digest_of(
            msgspec.json.encode(
                {
                    "info": msgspec.structs.replace(info, source=None),
                    "fingerprint": fingerprint,
                    "identity": identity,
                    "model": f"{kind.__module__}.{kind.__qualname__}",
                    "config": model_config.hf_config.to_json_string(use_diff=False),
                    # All that vLLM itself thinks changes what is computed.
                    "engine": config.compute_hash(),
                    "names": sorted((n, list(p.shape)) for n, p in model.named_parameters()),
                }
            )
        )
        return Entry(self.root, key, info, identity, reopen)


@dataclass(frozen=True)
class Entry:
    """One set of the cache, perhaps not written yet."""

    root: str
    key: str
    info: SetInfo
    identity: Identity
    reopen: Callable[[], Storage]

    @property
    def path(self) -> str:
        return entry_path(self.root, self.key)

    @contextlib.contextmanager
    def reading(self, rank: int) -> Iterator[Checkpoint | None]:
        """Yield the entry, if it holds `rank` whole; nobody removes it meanwhile."""
        with contextlib.ExitStack() as stack:
            checkpoint = None
            try:
                storage = stack.enter_context(LocalStorage(self.path))
                stack.enter_context(storage.hold())
                checkpoint = open_checkpoint(storage, pattern=None)
                if checkpoint.set_id != self.key or rank not in checkpoint.ranks:
                    checkpoint = None
                else:
                    checkpoint.rank_catalog(rank)
                    mark_used(self.path)
            except FileNotFoundError:
                checkpoint = None
            except (InputError, TargetBusy) as error:
                _log.info("shardstate: %s is not used: %s", self.path, error)
                checkpoint = None
            yield checkpoint

    def reject(self, reason: str) -> None:
        """Take an entry out of use that turned out to be damaged."""
        _log.warning("shardstate: %s is damaged and will be made again: %s", self.path, reason)
        set_aside(self.path)

    def keep(self, rank: int, recorder: Recorder, model: torch.nn.Module) -> threading.Thread:
        """Begin to write this worker's shard, in the background, by the plan just recorded.

        The model must be as its loading code left it. What goes wrong is logged: the engine can do
        without.
        """
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        plan = recorder.plan_of(filter_subtensors(state), literal_bytes=None)
        groups = equal_groups(state)
        pattern = check_pattern(self.info.pattern, self.info.shape)
        parts = plan_parts(
            plan.tensors,
            rank=rank,
            set_id=self.key,
            pattern=pattern,
            max_part_bytes=parse_size(MAX_PART_SIZE),
        )

        def write() -> None:
            time.sleep(_GRACE)
            try:
                reads = reads_of([plan], threads=WRITE_THREADS, in_dest_order=True)
                with (
                    contextlib.closing(self.reopen()) as stored,
                    LocalStorage(self.path, create=True) as target,
                ):
                    write_rank(
                        target,
                        set_id=self.key,
                        info=self.info,
                        rank=rank,
                        plan=plan,
                        parts=parts,
                        reads=reads,
                        source=stored,
                        aliases=groups,
                        threads=WRITE_THREADS,
                        progress=None,
                        check=lambda: self._check(stored),
                    )
                _log.info("shardstate: rank=%d cached in %s", rank, self.path)
            except TargetBusy as error:
                _log.info("shardstate: rank=%d not cached: %s", rank, error)
            except Exception as error:
                _log.warning("shardstate: rank=%d not cached: %s", rank, error)

        thread = threading.Thread(target=write, name="shardstate-cache", daemon=True)
        thread.start()
        return thread

    def _check(self, stored: Storage) -> None:
        found = _identity(stored, [str(name) for name, *_ in self.identity])
        if found != self.identity:
            raise ShardStateError(f"{stored.location}: its files changed while they were read")


def _identity(storage: Storage, files: tuple[str, ...] | list[str]) -> Identity:
    entries = storage.entries()
    return tuple((name, *entries[name].identity) for name in files if name in entries)
