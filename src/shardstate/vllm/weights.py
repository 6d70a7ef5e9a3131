"""What is offered to a model's loading code: the weights that vLLM itself would choose."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from vllm.model_executor.model_loader.base_loader import _has_online_quant
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import filter_safetensors_files_by_weight_name

from shardstate.api.planning import reads_of
from shardstate.catalog import Catalog, catalog_of
from shardstate.checkpoint import (
    Checkpoint,
    check_unchanged,
    ordinary_files,
    ordinary_headers,
)
from shardstate.compose import compose_plans
from shardstate.engine import Progress, execute
from shardstate.errors import CatalogError, SetError, ShardStateError
from shardstate.manifest import MAX_JSON_BYTES
from shardstate.names import provenance_name
from shardstate.plan import Plan, bytes_wanted
from shardstate.provenance import parse_provenance
from shardstate.restore import plan_source
from shardstate.storage import Entry, LocalStorage, Reading, Storage
from shardstate.targets import MemoryTarget, Target
from shardstate.torch.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class Unrecordable(ShardStateError):
    """vLLM's own loader has to load this model; the message says why."""


@dataclass
class Weights:
    """Stored tensors in the order in which vLLM offers them, and the way to read them."""

    storage: Storage
    catalog: Catalog  # what the loading code is told of
    rows: list[int]  # of the catalog, in the order in which they are offered
    threads: int
    seen: Mapping[str, Entry]  # the files, as they were before the first byte was read
    first: Plan | None = None  # what makes the catalog's tensors out of what is stored
    progress: Progress | None = None
    bytes_read: int = 0
    bytes_wanted: int = 0
    requests: int = 0

    def offer(self, recorder: Recorder) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a stand-in for each."""
        for row in self.rows:
            yield self.catalog.names[row], recorder.offer(row)

    def check_unchanged(self) -> None:
        """Raise `ChangedFile` if a file is not there any more as it was."""
        check_unchanged(self.storage, self.seen, self.seen)

    def read(self, plan: Plan, target: Target) -> None:
        """Carry out a plan over the catalog."""
        if self.first is not None:
            plan = compose_plans(self.first, plan)
        counters = execute(
            reads_of(
                [plan],
                traits=self.storage.traits,
                threads=self.threads,
                direct=isinstance(target, MemoryTarget),
            ),
            storage=self.storage,
            target=target,
            threads=self.threads,
            progress=self.progress,
            fills_memory=False,
        )
        self.bytes_read += counters.bytes_read
        self.requests += counters.requests
        self.bytes_wanted += bytes_wanted([plan])


def check_recordable(model: torch.nn.Module, model_config: ModelConfig) -> None:
    """Raise `Unrecordable` for models whose loading needs values all the way."""
    multimodal = model_config.multimodal_config
    if model_config.quantization == "torchao":
        raise Unrecordable("torchao builds its tensors out of whole files")
    if multimodal is not None and multimodal.mm_encoder_only:
        raise Unrecordable("mm_encoder_only reads chosen files only")
    if _has_online_quant(model):
        raise Unrecordable("the weights are quantized while they are loaded")
    if any(True for _ in getattr(model, "secondary_weights", ())):
        raise Unrecordable("the model takes weights from a second checkpoint")


def ordinary_weights(
    default: DefaultModelLoader,
    model: torch.nn.Module,
    model_config: ModelConfig,
    *,
    threads: int,
    reading: Reading,
) -> Weights:
    """Return the weights of an ordinary checkpoint, as `default`, vLLM's own loader, chooses them.

    Raises `Unrecordable` where they are no safetensors files, or a tensor is in two of them.
    """
    default._init_ep_weight_filter(model_config)
    folder, files, use_safetensors, _ = default._prepare_weights(
        model_config.model,
        None,
        model_config.revision,
        getattr(model, "fall_back_to_pt_during_load", True),
        getattr(model, "allow_patterns_overrides", None),
    )
    if not use_safetensors:
        raise Unrecordable(f"{os.path.basename(files[0])} is no safetensors file")
    unused = getattr(model, "is_unused_checkpoint_weight", None)
    if unused is not None:
        files = filter_safetensors_files_by_weight_name(files, unused)
    names = [os.path.relpath(file, folder) for file in files]
    if nested := [name for name in names if os.path.basename(name) != name]:
        raise Unrecordable(f"{nested[0]} lies in a folder of its own")
    storage = LocalStorage(folder, reading=reading)
    entries = storage.entries()
    headers = ordinary_headers(storage, names)
    try:
        catalog = catalog_of(headers, weight_map=None)
    except CatalogError as error:
        storage.close()
        raise Unrecordable(str(error)) from None
    experts = default.local_expert_ids
    rows = [row for row in _order(catalog) if not should_skip_weight(catalog.names[row], experts)]
    seen = {name: entries[name] for name in names if name in entries}
    return Weights(storage, catalog, rows, threads, seen)


def remote_weights(
    storage: Storage,
    default: DefaultModelLoader,
    model: torch.nn.Module,
    model_config: ModelConfig,
    *,
    threads: int,
) -> Weights:
    """Return the weights of an ordinary checkpoint that no directory holds.

    The files are those that vLLM would choose: what the index names, else all safetensors files.
    Raises `Unrecordable` where there are none.
    """
    default._init_ep_weight_filter(model_config)
    names = storage.entries()
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if not safetensors:
        others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        raise Unrecordable(f"{others[0] if others else 'nothing there'} is no safetensors file")
    headers = ordinary_headers(storage, ordinary_files(storage, names).files)
    try:
        catalog = catalog_of(headers, weight_map=None)
    except CatalogError as error:
        raise Unrecordable(str(error)) from None
    experts = default.local_expert_ids
    unused = getattr(model, "is_unused_checkpoint_weight", None) or (lambda _name: False)
    rows = [
        row
        for row in _order(catalog)
        if not should_skip_weight(catalog.names[row], experts) and not unused(catalog.names[row])
    ]
    seen = {name: names[name] for name in catalog.files}
    return Weights(storage, catalog, rows, threads, seen)


def weights_of(
    storage: Storage,
    default: DefaultModelLoader,
    model: torch.nn.Module,
    model_config: ModelConfig,
    *,
    threads: int,
) -> Weights:
    """Return the weights of the ordinary checkpoint in `storage`, as vLLM would choose them.

    Of a directory, which `model_config` names, with a storage of their own.
    """
    if isinstance(storage, LocalStorage):
        return ordinary_weights(
            default, model, model_config, threads=threads, reading=storage.reading
        )
    return remote_weights(storage, default, model, model_config, threads=threads)


def restored_weights(checkpoint: Checkpoint, *, prefer: int, threads: int) -> Weights:
    """Return the weights that a `rules` set was made from, to be read from its rank files.

    What all ranks hold is read from rank `prefer`. Raises `SetError` where provenance is missing.
    """
    ranks: list[tuple[Plan, Catalog]] = []
    for rank in checkpoint.ranks:
        name, record = provenance_name(rank), checkpoint.record(rank)
        if record.provenance is None:
            raise SetError(
                f"{checkpoint.location}: says no more what its tensors came from; give the "
                f"checkpoint it was made from, or shard that with --layout vllm",
                file=name,
            )
        data = checkpoint.storage.read(name, limit=MAX_JSON_BYTES)
        plan = parse_provenance(data, file=name, set_id=record.set, rank=rank)
        ranks.append((plan, checkpoint.rank_catalog(rank)))
    world = checkpoint.topology.world if checkpoint.topology is not None else 0
    if len(ranks) != world:
        raise SetError(f"{checkpoint.location}: holds {len(ranks)} of its {world} ranks; finish it")
    first = plan_source(ranks, prefer=prefer if prefer < world else 0)
    source = ranks[0][0].catalog
    catalog = Catalog(
        first.tensors.names, first.tensors.dtypes, first.tensors.shapes,
        source.files, source.file_bytes, source.file, source.begin,
    )  # fmt: skip
    files = [name for _, held in ranks for name in held.files]
    seen = {name: checkpoint.seen[name] for name in files if name in checkpoint.seen}
    return Weights(checkpoint.storage, catalog, list(_order(catalog)), threads, seen, first)


def track(
    default: DefaultModelLoader,
    model: torch.nn.Module,
    model_config: ModelConfig,
    loaded: set[str] | None,
) -> None:
    """Raise `ValueError` for weights that vLLM's own loader would report as missing."""
    if model_config.quantization is None and loaded is not None:
        default.track_weights_loading(model, loaded, quantized=False)


def _order(catalog: Catalog) -> Iterator[int]:
    """Yield rows as vLLM reads them: files by the numbers in their names, tensors by name."""
    files = sorted(range(len(catalog.files)), key=lambda i: _natural(catalog.files[i]))
    place = {number: at for at, number in enumerate(files)}
    owner = cast("list[int]", catalog.file.tolist())
    yield from sorted(range(len(catalog)), key=lambda r: (place[owner[r]], catalog.names[r]))


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
