"""`load_model`: one rank into a module's own parameters and buffers, wherever they lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from shardstate.api.loading import check_blocks, log_loaded, raise_damage, stored_digests
from shardstate.api.planners import Made, Request, rank_plan
from shardstate.api.planning import (
    RulesArgument,
    describe_checkpoint,
    extra_notes,
    open_path,
    reads_of,
    sizes_of,
    write_counted,
    write_planned,
)
from shardstate.catalog import Tensors, placeless
from shardstate.checkpoint import Checkpoint
from shardstate.compose import compose_plans
from shardstate.dtypes import DTYPES
from shardstate.engine import Progress, execute
from shardstate.errors import LoadError, UsageError
from shardstate.garbage import without_collection
from shardstate.layout import Move, canonical
from shardstate.plan import Copy, Plan, make_plan
from shardstate.report import Phases, Report
from shardstate.signing import checking_key
from shardstate.storage import Access
from shardstate.torch.aliases import alias_of, equal_groups
from shardstate.torch.backends import BACKENDS, fill
from shardstate.torch.ranks import Place, in_group, place_of
from shardstate.torch.staging import lies_in_host, target_for
from shardstate.torch.tensors import check_plain, is_writable, loops_of, stored_shape, tag_of
from shardstate.trust import require_signature

_log = logging.getLogger("shardstate")


def load_model(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tp: int | None = None,
    pp_rank: int | None = None,
    pp: int | None = None,
    pattern: str | None = None,
    rules: RulesArgument = None,
    strict: bool = True,
    cast: bool = False,
    allow_padding: bool | None = None,
    verify: bool = False,
    key: str | os.PathLike[str] | None = None,
    backend: str = "native",
    progress: Progress | None = None,
    access: Access | None = None,
) -> Report:
    """Load one rank into the parameters and buffers of `model`; return a report, log one line.

    `rank` is the tensor-parallel rank. Ranks and sizes that are not given are those of the process
    group, if one is initialised, else rank 0 of what the set says. From an ordinary checkpoint,
    `tp` says among how many ranks it is shared, by `rules` or a built-in table.

    Names, shapes and dtypes are compared before a byte moves; one `LoadError` lists all that does
    not fit. `strict=False` turns missing and unexpected names into notes of the report. A stored
    tensor smaller than its parameter goes into the leading corner, with a warning, where the set is
    known to be made for the same topology; `allow_padding` True allows it anywhere, False nowhere.
    `cast` converts between plain float dtypes. `verify` compares digests while reading: damage is
    raised (`DamageError`) after the last byte, and the parameters must not be used then. `key`, a
    file with an Ed25519 key, does so too and wants the set signed by it (`SignatureError`).

    `backend`: "native"; "safetensors" or "runai" read whole rank files their way.
    """
    if backend != "native" and backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: expected native, {' or '.join(BACKENDS)}")
    phases = Phases()
    public = checking_key(key) if key is not None else None
    verify = verify or public is not None
    with open_path(path, pattern=pattern, access=access) as checkpoint:
        if public is not None:
            require_signature(checkpoint, public)
        place = _place(checkpoint, rank=rank, tp=tp, pp_rank=pp_rank, pp=pp)
        _check_arguments(checkpoint, place, tp, allow_padding, verify, backend)
        report = load_place(
            model,
            checkpoint,
            place,
            rules=rules,
            strict=strict,
            cast=cast,
            allow_padding=allow_padding,
            verify=verify,
            backend=backend,
            threads=checkpoint.storage.traits.read_threads,
            progress=progress,
            phases=phases,
        )
    log_loaded(report, rank=place.index, verify=verify, way=f"backend={backend}")
    return report


def load_place(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    place: Place,
    *,
    rules: RulesArgument,
    strict: bool,
    cast: bool,
    allow_padding: bool | None,
    verify: bool,
    backend: str,
    threads: int,
    progress: Progress | None,
    phases: Phases,
) -> Report:
    """Do what `load_model` does for a checkpoint that is open; arguments were checked.

    `phases` began before it was opened. Nothing is logged.
    """
    with phases("open"):
        report = describe_checkpoint(checkpoint)
        index = _index(checkpoint, place)
    with phases("plan"), without_collection():
        width = place.tp if checkpoint.catalog is not None else None
        request = Request(tp=place.tp, rules=rules)
        made = rank_plan(checkpoint, index, tp=width, layout="rules", request=request)
        padding = checkpoint.catalog is None if allow_padding is None else allow_padding
        fit = _fit(model, checkpoint, made.plan.tensors, index, cast, padding)
        fit.notes += [*_other_topology(checkpoint, place), *extra_notes(checkpoint, index)]
        _refuse(fit, checkpoint, made, strict=strict)
        plan = compose_plans(made.plan, fit.plan)
        reads = reads_of(
            [plan],
            traits=checkpoint.storage.traits,
            threads=threads,
            direct=lies_in_host(fit.goals.values()),
            hashed=verify,
        )
        write_planned(report, [plan], reads, checkpoint)
        report.bytes = sum(fit.plan.catalog.nbytes(copy.source) for copy in fit.plan)
        report.tensors = len(fit.plan)
        report.ranks, report.topology = (index,), sizes_of(made.topology)
        report.notes = tuple(fit.notes) or None
    with phases("read"):
        if backend == "native":
            digests = stored_digests(made.plan.catalog) if verify else None
            counters = execute(
                reads,
                storage=checkpoint.storage,
                target=target_for(list(fit.goals.values()), digests),
                threads=threads,
                progress=progress,
                fills_memory=False,
            )
            write_counted(report, counters)
            if digests is not None:
                report.problems = check_blocks(checkpoint, digests, index)
                report.hashing = digests.seconds
        else:
            fill(backend, checkpoint, made.plan.catalog, fit.goals)
        checkpoint.check_unchanged(made.plan.catalog.files)
        for goal, twin in fit.twins:
            goal.copy_(twin)
    phases.finish(report, main="read")
    raise_damage(report)
    return report


@dataclass
class _Fit:
    """How stored tensors go into a module."""

    state: dict[str, torch.Tensor]  # its parameters and buffers by name
    plan: Plan = field(init=False)  # stored tensors → memory of parameters
    goals: dict[str, torch.Tensor] = field(default_factory=dict)  # stored name → what it fills
    twins: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # ← the other
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)  # stored apart, one memory in the module
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _place(
    checkpoint: Checkpoint,
    *,
    rank: int | None,
    tp: int | None,
    pp_rank: int | None,
    pp: int | None,
) -> Place:
    """Return the place to load: the arguments', the group's, or what the set says."""
    if checkpoint.topology is not None and not in_group():
        tp = checkpoint.topology.tp if tp is None else tp
        pp = checkpoint.topology.pp if pp is None else pp
    return place_of(rank=rank, tp=tp, pp_rank=pp_rank, pp=pp)


def _index(checkpoint: Checkpoint, place: Place) -> int:
    """Return the global rank of `place` among those of the set, or of the model."""
    topology = checkpoint.topology
    if topology is None:
        return place.index
    return (place.dp_rank * topology.pp + place.pp_rank) * topology.tp + place.rank


def _other_topology(checkpoint: Checkpoint, place: Place) -> list[str]:
    """Return a note, and log it, where allow_padding let a set for other ranks in."""
    topology = checkpoint.topology
    if topology is None or topology.tp == place.tp:
        return []
    text = f"{checkpoint.location} is made for tp {topology.tp}, and the model is one of {place.tp}"
    _log.warning("shardstate: %s", text)
    return [text]


def _check_arguments(
    checkpoint: Checkpoint,
    place: Place,
    tp: int | None,
    allow_padding: bool | None,
    verify: bool,
    backend: str,
) -> None:
    """Raise `UsageError` where the arguments contradict what the path holds."""
    location, topology = checkpoint.location, checkpoint.topology
    if topology is None:
        if backend != "native":
            raise UsageError(
                f"{location}: backend {backend} reads whole rank files, and this is an ordinary "
                f"checkpoint; leave backend out, or shard it first"
            )
        if tp is None and not place.group:
            raise UsageError(
                f"{location}: is an ordinary checkpoint; say among how many ranks it is shared "
                f"(tp=N)"
            )
    elif place.pp != topology.pp or (place.tp != topology.tp and allow_padding is not True):
        raise UsageError(
            f"{location}: is a set for tp {topology.tp}, pp {topology.pp}, and the model is one of "
            f"tp {place.tp}, pp {place.pp}; shard the source again for that"
        )
    if verify and (checkpoint.kind != "shardstate" or backend != "native"):
        raise UsageError(
            f"{location}: digests are verified for shardstate's own sets and by the native backend "
            f"only; leave verify out"
        )


def _fit(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    stored: Tensors,
    index: int,
    cast: bool,
    padding: bool,
) -> _Fit:
    """Compare what is stored with the module, and return the plan from one to the other."""
    state, optional = _state_of(model)
    equal = {name: group[0] for group in equal_groups(state) for name in group}
    covers = alias_of(state)
    ties = _ties_of(checkpoint, index)
    fit = _Fit(state)
    # The saver may have kept another name of a tie than this module has.
    owns = {name: _name_in(state, name, ties.get(name, ())) for name in stored.names}
    loaded: dict[str, str] = {}  # the first name of equal parameters → the stored name they get
    for name, own in owns.items():
        if own is not None:
            loaded.setdefault(equal.get(own, own), name)
    copies: list[Copy] = []
    for row, (name, own) in enumerate(owns.items()):
        if own is None:
            fit.unexpected.append(name)
            continue
        cover = covers.get(own, own)
        first = loaded[equal.get(own, own)]
        if first == name:
            first = loaded.get(equal.get(cover, cover), name)
        if first != name:
            if cover == own or _same_bytes(checkpoint, index, name, first):
                fit.notes.append(f"{name} is {first} in this model, which was loaded instead")
            else:
                fit.clashes.append(f"{name}: stored apart from {first}, and here in its memory")
            continue
        if own != name:
            fit.notes.append(f"{name} is {own} in this model")
        problem = _misfit(name, stored, row, state[own], cast, padding)
        if problem is not None:
            fit.faults.append(problem)
            continue
        shape, tag = stored.shapes[row], stored.dtypes[row]
        if shape != stored_shape(state[own]):
            text = f"{name}: stored {list(shape)} fills the corner of {list(state[own].shape)}"
            fit.notes.append(text)
            _log.warning("shardstate: %s", text)
        packed = DTYPES[tag].packed
        goal = _corner(state[own], shape)
        units = ("U8", "U8") if packed else (tag, tag_of(name, goal))
        loops = loops_of(goal)
        copies.append(Copy(row, len(fit.goals), *units, Move(0, 0, canonical(loops))))
        fit.goals[name] = goal
    fit.plan = make_plan(
        placeless(stored),
        Tensors(
            tuple(fit.goals),
            tuple(tag_of(name, goal) for name, goal in fit.goals.items()),
            tuple(stored_shape(goal) for goal in fit.goals.values()),
        ),
        copies,
    )
    _find_missing(fit, ties, optional, set(loaded), equal, cast)
    if checkpoint.kind == "vllm":
        fit.notes.append(
            f"nothing vouches for the bytes of {checkpoint.location}, "
            f"taken for a set of {len(checkpoint.parts)} ranks"
        )
    return fit


def _ties_of(checkpoint: Checkpoint, index: int) -> dict[str, tuple[str, ...]]:
    """Return by name the alias groups that the saver recorded."""
    if checkpoint.kind != "shardstate":
        return {}
    return {name: group for group in checkpoint.record(index).aliases for name in group}


def _name_in(state: Mapping[str, object], name: str, others: Sequence[str]) -> str | None:
    """Return the first of `name` and its other names that a module has, or None."""
    return next((each for each in (name, *others) if each in state), None)


def _same_bytes(checkpoint: Checkpoint, index: int, *names: str) -> bool:
    """Whether records prove that two stored tensors of one rank are equal."""
    if checkpoint.kind != "shardstate":
        return False
    catalog = checkpoint.rank_catalog(index)
    blocks = {
        catalog.names[row]: (catalog.dtypes[row], catalog.shapes[row], each)
        for entry in checkpoint.record(index).files
        for row, each in zip(
            np.flatnonzero(catalog.file == catalog.files.index(entry.name)).tolist(),
            entry.blocks,
            strict=True,
        )
    }
    return len({blocks[name] for name in names}) == 1


def _corner(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the leading corner of `tensor` that has the stored shape `shape`."""
    if DTYPES[tag_of("", tensor)].packed and shape:
        shape = (*shape[:-1], shape[-1] // 2)  # torch counts pairs
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            tensor = tensor.narrow(axis, 0, size)
    return tensor


def _state_of(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return parameters and buffers by name, and which of them a checkpoint may leave out."""
    if not isinstance(model, torch.nn.Module):
        check_plain(model)
        return {name: tensor.detach() for name, tensor in model.items()}, set()
    state = {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    others = {name: buffer.detach() for name, buffer in model.named_buffers() if name not in state}
    check_plain(state | others)
    return state | others, set(others)


def _misfit(
    name: str, stored: Tensors, row: int, parameter: torch.Tensor, cast: bool, padding: bool
) -> str | None:
    """Return why a stored tensor cannot go into its parameter, or None."""
    shape, goal = stored.shapes[row], stored_shape(parameter)
    tag, goal_tag = stored.dtypes[row], tag_of(name, parameter)
    if parameter.is_meta:
        return f"{name}: is on the meta device; materialise the model first (to_empty)"
    if not is_writable(parameter):
        return f"{name}: is a view that cannot be written to; make it contiguous first"
    if len(shape) != len(goal) or any(size > n for size, n in zip(shape, goal, strict=True)):
        return f"{name}: stored shape {list(shape)}, the model's is {list(goal)}"
    if shape != goal and DTYPES[tag].packed and shape[-1] % 2:
        return f"{name}: stored shape {list(shape)} ends inside a byte of the model's {list(goal)}"
    if shape != goal and not padding:
        return (
            f"{name}: stored shape {list(shape)} is smaller than the model's {list(goal)} "
            f"(allow_padding=True fills its corner)"
        )
    plain = DTYPES[tag].floating and DTYPES[goal_tag].floating
    if tag != goal_tag and not (cast and plain):
        hint = " (cast=True converts)" if plain else ""
        return f"{name}: stored as {tag}, the model's is {goal_tag}{hint}"
    return None


def _find_missing(
    fit: _Fit,
    ties: Mapping[str, tuple[str, ...]],
    optional: set[str],
    loaded: set[str],
    equal: Mapping[str, str],
    cast: bool,
) -> None:
    """Find the parameters that nothing stored fills; a tie that was recorded fills them too."""
    expected = {name: tensor for name, tensor in fit.state.items() if name not in optional}
    for name, kept in alias_of(expected).items():
        if name != kept or equal.get(name, name) in loaded:
            continue
        # The saver tied what this model keeps apart.
        goal = fit.state[name]
        twin = next((each for each in ties.get(name, ()) if each in fit.goals), None)
        other = _name_in(fit.state, twin, ties[twin]) if twin is not None else None
        if (
            twin is None
            or other is None
            or goal.shape != fit.state[other].shape
            or (goal.dtype != fit.state[other].dtype and not cast)
        ):
            fit.missing.append(name)
        else:
            source = fit.goals[twin]
            fit.twins.append((_corner(goal, stored_shape(source)), source))


def _refuse(fit: _Fit, checkpoint: Checkpoint, made: Made, *, strict: bool) -> None:
    """Raise one `LoadError` with all that does not fit; names are notes where not `strict`."""
    shapes = {name: list(stored_shape(tensor)) for name, tensor in fit.state.items()}
    stored = dict(zip(made.plan.tensors.names, made.plan.tensors.shapes, strict=True))
    names = [f"{name}: missing, the model's shape is {shapes[name]}" for name in fit.missing]
    names += [
        f"{name}: unexpected, the stored shape is {list(stored[name])}" for name in fit.unexpected
    ]
    names += fit.clashes
    if not strict:
        fit.notes += names
        names = []
    if faults := [*fit.faults, *names]:
        files = ", ".join(made.plan.catalog.files)
        raise LoadError(
            f"{checkpoint.location}: {len(faults)} tensors do not fit the model: "
            f"{'; '.join(faults)}; looked at {files}",
            tensor=faults[0].split(":")[0],
        )
