"""The load format `shardstate`: any checkpoint, sharded or not, into a model of vLLM."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from shardstate.api.checking import check_data
from shardstate.api.loading import log_loaded
from shardstate.checkpoint import Checkpoint, find_parts, open_checkpoint
from shardstate.engine import Progress
from shardstate.errors import DamageError, InputError, ShardStateError, UsageError
from shardstate.garbage import without_collection
from shardstate.names import MANIFEST, record_rank
from shardstate.report import Phases, Report
from shardstate.signing import checking_key
from shardstate.storage import Access, LocalStorage, Storage, is_address, storage_at
from shardstate.storage.hub import HubStorage
from shardstate.torch.loading import load_place
from shardstate.torch.recorder import Recorder
from shardstate.torch.saving import save_model
from shardstate.trust import require_signature
from shardstate.vllm.cache import Cache, Entry
from shardstate.vllm.facts import check_engine
from shardstate.vllm.parallel import place_of, rank_of
from shardstate.vllm.recording import Registrations, check_whole
from shardstate.vllm.settings import parse_settings
from shardstate.vllm.weights import (
    Unrecordable,
    Weights,
    check_recordable,
    restored_weights,
    track,
    weights_of,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

_log = logging.getLogger("shardstate")


class RecordingFailed(ShardStateError):
    """The model is half-filled: it has to be built anew before vLLM's own loader fills it."""


class ShardedStateLoader(BaseModelLoader):
    """Loads each worker's tensors from a sharded set, an ordinary checkpoint or the cache.

    `model_loader_extra_config` may have the keys of `shardstate.vllm.settings.Settings`.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.settings = parse_settings(load_config.model_loader_extra_config or {})

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the model from the hub, where it is not local."""
        location = self._location(model_config)
        if not is_address(location):
            self._default().download_model(self._at_source(model_config))

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Build and load a model; where recording fails half-way, build it anew and fall back."""
        before = Registrations(vllm_config)
        try:
            return super().load_model(vllm_config, model_config, prefix)
        except RecordingFailed as error:
            reason = str(error)
        before.restore()
        gc.collect()
        with closing(self._storage(model_config)) as storage:
            self._refuse_remote(storage, reason)
        _fell_back(reason, rank_of(vllm_config))
        return self._default().load_model(vllm_config, self._at_source(model_config), prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load the weights into a model that was built and not yet processed.

        Raises `RecordingFailed` (from `load_model`: handled) where it must be built anew.
        """
        config = get_current_vllm_config()
        phases = Phases()
        public = None if self.settings.key is None else checking_key(self.settings.key)
        storage = self._storage(model_config)
        try:
            if _is_set(storage, self.settings.pattern):
                checkpoint = open_checkpoint(storage, pattern=self.settings.pattern)
                if public is not None:
                    require_signature(checkpoint, public)
                if checkpoint.stage == "checkpoint":
                    rank = rank_of(config)
                    if self._verify:
                        # Pieces of any rank are read in any order, so all are hashed beforehand.
                        with phases("verify"):
                            check_data(checkpoint, threads=self._threads(storage))
                    weights = restored_weights(
                        checkpoint, prefer=rank, threads=self._threads(storage)
                    )
                    self._record(model, model_config, config, weights, phases, None)
                else:
                    self._load_set(model, model_config, config, checkpoint, phases)
                return
            if public is not None:
                raise UsageError(
                    f"{storage.location}: is no set of shardstate and cannot be signed, and a key "
                    f"is required; leave key out, or shard it and sign that"
                )
            self._load_ordinary(model, self._at_source(model_config), config, phases, storage)
        except InputError as error:
            raise error.located(storage.location) from None
        finally:
            storage.close()

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the checkpoint's tensors, with bytes: for reloading weights in place."""
        with closing(self._storage(model_config)) as storage:
            is_set = _is_set(storage, self.settings.pattern)
            if not is_set:
                at_source = self._at_source(model_config)
                yield from self._default().get_all_weights(at_source, model)
                return
            checkpoint = open_checkpoint(storage, pattern=self.settings.pattern)
            if checkpoint.stage != "checkpoint":
                raise UsageError(
                    f"{storage.location}: its tensors are vLLM's own, which cannot be loaded into "
                    f"a model that is in use; give weights_path of what they were made from"
                )
            weights = restored_weights(checkpoint, prefer=0, threads=self._threads(storage))
            recorder = Recorder(weights.catalog, weights.read, offline=False)
            for name, standin in weights.offer(recorder):
                yield name, standin * 1

    @staticmethod
    def save_model(
        model: torch.nn.Module,
        path: str,
        pattern: str | None = None,
        max_size: int | None = None,
    ) -> None:
        """Save what this worker's model holds now: kernel stage, once an engine runs.

        All workers call it. For sets that any engine can load, `shardstate shard --layout vllm`.
        """
        place = place_of(get_current_vllm_config())
        save_model(
            model,
            path,
            rank=place.rank,
            tp=place.tp,
            pp_rank=place.pp_rank,
            pp=place.pp,
            pattern=pattern,
            max_part_size=max_size if max_size is not None else "5GB",
            stage="kernel",
        )

    # The ways to load

    def _load_set(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        config: VllmConfig,
        checkpoint: Checkpoint,
        phases: Phases,
        mode: str = "sharded",
    ) -> None:
        check_engine(checkpoint, config, model_config, strict=self.settings.strict)
        place, settings = place_of(config), self.settings
        if checkpoint.kind == "vllm":
            _log.warning(
                "shardstate: nothing vouches for the bytes of %s, which vLLM saved after it had "
                "processed the weights", checkpoint.location,
            )  # fmt: skip
        verify = self._verify and checkpoint.kind == "shardstate"
        with _progress_bar(self.load_config, rank_of(config)) as progress:
            report = load_place(
                model,
                checkpoint,
                place,
                rules=None,
                strict=settings.strict,
                cast=False,
                allow_padding=None,
                verify=verify,
                backend=settings.backend,
                threads=self._threads(checkpoint.storage),
                progress=progress,
                phases=phases,
            )
        way = f"layout={report.layout} set={report.set}"
        log_loaded(report, rank=rank_of(config), verify=verify, way=way, mode=mode)

    def _load_ordinary(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        config: VllmConfig,
        phases: Phases,
        storage: Storage,
    ) -> None:
        default = self._default()
        threads = self._threads(storage)
        try:
            check_recordable(model, model_config)
            weights = weights_of(storage, default, model, model_config, threads=threads)
        except Unrecordable as error:
            self._refuse_remote(storage, str(error))
            _fell_back(str(error), rank_of(config))
            default.load_weights(model, model_config)
            return
        with closing(weights.storage):
            entry = None
            if self.settings.cache is not None:
                entry = Cache(self.settings.cache).entry(
                    weights, config, model_config, model, partial(self._storage, model_config)
                )
                if self._load_cached(model, model_config, config, entry, phases):
                    return
            self._record(model, model_config, config, weights, phases, entry)

    def _load_cached(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        config: VllmConfig,
        entry: Entry,
        phases: Phases,
    ) -> bool:
        """Load from the cache, if this worker's shard is there."""
        with entry.reading(rank_of(config)) as checkpoint:
            if checkpoint is None:
                return False
            try:
                self._load_set(model, model_config, config, checkpoint, phases, mode="cached")
            except (InputError, DamageError) as error:
                entry.reject(str(error))
                raise RecordingFailed(f"the cached shard cannot be used: {error}") from error
        return True

    def _record(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        config: VllmConfig,
        weights: Weights,
        phases: Phases,
        entry: Entry | None,
    ) -> None:
        """Let the model's own loading code run on stand-ins, then read what it asked for."""
        rank, default = rank_of(config), self._default()
        report = Report(kind="checkpoint", layout="vllm", stage="model")
        recorder = Recorder(weights.catalog, weights.read, offline=False)
        with phases("open"):
            pass
        with phases("record"):
            try:
                with recorder, without_collection():
                    loaded = cast(Any, model).load_weights(weights.offer(recorder))
                check_whole(model)
            except ShardStateError as error:
                if not isinstance(error, InputError) or error.file is not None:
                    raise  # the storage, or what it holds, not the recording
                raise RecordingFailed(str(error)) from error
            except Exception as error:
                raise RecordingFailed(f"{type(error).__name__}: {error}") from error
        with phases("read"), _progress_bar(self.load_config, rank) as progress:
            weights.progress = progress
            report.bytes = recorder.flush()
            weights.check_unchanged()
        with phases("check"):
            track(default, model, model_config, loaded)
        made = recorder.materialised
        report.materialised, report.materialised_bytes = made.tensors, made.nbytes
        report.bytes_read, report.requests = weights.bytes_read, weights.requests
        report.bytes_wanted = weights.bytes_wanted
        phases.finish(report, main="read")
        way = (
            "layout=vllm"
            if not made.operations
            else f"layout=vllm opaque={','.join(sorted(made.operations))}"
        )
        verified = self._verify and "verify" in phases.seconds
        log_loaded(report, rank=rank, verify=verified, way=way, mode="recorded")
        if entry is not None:
            entry.keep(rank, recorder, model)

    # What it loads from

    @property
    def _verify(self) -> bool:
        """Whether digests are compared; a signature vouches for nothing else."""
        return self.settings.verify or self.settings.key is not None

    def _threads(self, storage: Storage) -> int:
        return self.settings.threads or storage.traits.read_threads

    @staticmethod
    def _refuse_remote(storage: Storage, reason: str) -> None:
        """Raise where vLLM's own loader would have to read what it cannot: an object store."""
        if not isinstance(storage, LocalStorage | HubStorage):
            raise UsageError(
                f"{storage.location}: {reason}, and vLLM's own loader, which could load it, reads "
                f"directories and hub ids only: bring it here first (shardstate copy)"
            )

    def _default(self) -> DefaultModelLoader:
        """Return vLLM's own loader for the same configuration."""
        return DefaultModelLoader(
            dataclasses.replace(self.load_config, load_format="auto", model_loader_extra_config={})
        )

    def _location(self, model_config: ModelConfig) -> str:
        if self.settings.source is not None and model_config.runner_type != "draft":
            return self.settings.source
        return model_config.model_weights or model_config.model

    def _at_source(self, model_config: ModelConfig) -> ModelConfig:
        """Return a configuration whose model is where the weights are."""
        location = self._location(model_config)
        if location == model_config.model:
            return model_config
        changed = copy.copy(model_config)
        changed.model, changed.model_weights, changed.revision = location, "", None
        return changed

    def _storage(self, model_config: ModelConfig) -> Storage:
        """Return the storage that holds the weights: a directory, a store or the hub."""
        location, load_config = self._location(model_config), self.load_config
        ignored = load_config.ignore_patterns
        settings, access = self.settings, Access()
        access = Access(
            timeout=settings.timeout or access.timeout,
            options=settings.store_options or {},
            hub_cache=load_config.download_dir,
            ignore_patterns=(ignored,) if isinstance(ignored, str) else tuple(ignored or ()),
            reading=settings.reading,
        )
        revision = self._at_source(model_config).revision
        here = is_address(location) or os.path.exists(location) or location.startswith(("/", "."))
        if not here:
            pinned = "@" in location or revision is None
            location = f"hf://{location}" if pinned else f"hf://{location}@{revision}"
        return storage_at(location, access)


def _is_set(storage: Storage, pattern: str | None) -> bool:
    names = storage.entries()
    if MANIFEST in names or any(record_rank(name) is not None for name in names):
        return True
    return find_parts(names, pattern) is not None


@contextmanager
def _progress_bar(load_config: LoadConfig, rank: int) -> Iterator[Progress | None]:
    """Yield what shows a bar with GB/s, on rank 0 and where the configuration wants it."""
    if rank or not load_config.use_tqdm_on_load:
        yield None
        return
    with tqdm(desc="Loading weights (shardstate)", unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _fell_back(reason: str, rank: int) -> None:
    _log.warning(
        "shardstate: rank=%d mode=fallback reason=%r: vLLM's own loader reads the whole checkpoint",
        rank,
        reason,
    )
