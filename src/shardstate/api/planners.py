"""Who makes the plans of an ordinary checkpoint: one class for each layout, imported on use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from shardstate.api.planning import (
    RulesArgument,
    checked,
    checked_dtype,
    kinds_of,
    rules_of,
    set_plan,
)
from shardstate.checkpoint import Checkpoint
from shardstate.digest import digest_of
from shardstate.errors import UsageError
from shardstate.manifest import SetInfo, Sizes
from shardstate.names import DEFAULT_PATTERN, check_pattern
from shardstate.plan import Plan, plan_shares
from shardstate.report import Phases
from shardstate.sharding import Kind, Rank, Topology, describe, rules_json

_log = logging.getLogger("shardstate")

PLANNERS = {
    "rules": "shardstate.api.planners:RulesPlanner",
    "vllm": "shardstate.vllm.offline:VllmPlanner",
}


@dataclass(frozen=True)
class Made:
    """A rank's plan and how it came about."""

    plan: Plan
    topology: Topology
    kinds: Sequence[Kind] | None = None  # per row of the catalog, where rules made it
    aliases: Sequence[tuple[str, ...]] = ()  # names that are one tensor, the stored one first
    materialised: int = 0  # tensors that were read while planning, and bytes of them
    materialised_bytes: int = 0


class Planner(Protocol):
    """Makes the plans of an ordinary checkpoint's ranks."""

    topology: Topology
    info: SetInfo  # what the set will say of itself; its source is left out
    rules_digest: str

    def made(self, rank: int) -> Made:
        """Return the checked plan of one global rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the caller wants of a planner."""

    tp: int
    pp: int = 1
    rules: RulesArgument = None
    dtype: str = "keep"
    pattern: str | None = None
    engine_args: Mapping[str, Any] | None = None


def _has_vllm() -> bool:
    """Whether vLLM is installed; a mere folder of that name is none."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


@contextmanager
def quiet_vllm() -> Iterator[None]:
    """Let vLLM log errors only, to stderr, if it is imported or configured in this context.

    What the environment says of its log stays, and so does the environment: an engine that this
    process starts afterwards logs as ever.
    """
    quiet = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
    added = {key: value for key, value in quiet.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _import(planner: str) -> Any:
    """Import the module of "module:function"."""
    with quiet_vllm():
        return importlib.import_module(planner.partition(":")[0])


def _resolve(checkpoint: Checkpoint, layout: str, request: Request) -> str:
    """Return the layout that `layout` means: auto is vllm where vLLM knows the architecture."""
    if layout not in ("auto", *PLANNERS):
        raise UsageError(f"layout {layout!r}: expected auto, {' or '.join(PLANNERS)}")
    if layout != "auto":
        return layout
    if request.rules is not None:
        return "rules"
    if not _has_vllm():
        if request.pp > 1 or request.engine_args:
            return "vllm"  # which says that vLLM is missing
        return "rules"
    try:
        known = _import(PLANNERS["vllm"]).knows(checkpoint)
    except ImportError as error:
        _log.warning("shardstate: layout rules, because vLLM cannot be imported: %s", error)
        return "rules"
    return "vllm" if known else "rules"


def resolved_layout(checkpoint: Checkpoint, layout: str, request: Request, phases: Phases) -> str:
    """Return the layout that is meant; importing vLLM is a phase of its own."""
    if checkpoint.catalog is None:
        return layout
    with phases("import"):
        layout = _resolve(checkpoint, layout, request)
        load_planner(layout)
    if layout == "rules":
        phases.seconds["open"] += phases.seconds.pop("import")
    return layout


def load_planner(layout: str) -> Callable[[Checkpoint, Request], Planner]:
    """Import and return the planner of a layout that is resolved."""
    if layout == "vllm" and not _has_vllm():
        raise UsageError("layout vllm: needs vLLM, which is not installed here (shardstate[vllm])")
    planner = PLANNERS[layout]
    found = getattr(_import(planner), planner.partition(":")[2])
    return cast("Callable[[Checkpoint, Request], Planner]", found)


def planner_of(checkpoint: Checkpoint, layout: str, request: Request) -> Planner:
    """Return what plans the ranks of an ordinary checkpoint in `layout`, which is resolved."""
    checked_dtype(request.dtype)
    return load_planner(layout)(checkpoint, request)


class RulesPlanner:
    """Splits by rules; names stay those of the source."""

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        if request.pp != 1:
            raise UsageError("layout rules: has no pipeline stages (--pp needs --layout vllm)")
        if request.engine_args:
            raise UsageError("layout rules: has no engine arguments (they need --layout vllm)")
        assert checkpoint.catalog is not None
        self._catalog, self._dtype = checkpoint.catalog, request.dtype
        self.topology = Topology(request.tp)
        resolved, where = rules_of(checkpoint, request.rules)
        matched, self._kinds = kinds_of(checkpoint, resolved, where, request.tp)
        self.rules_digest = digest_of(rules_json(matched))
        self.info = SetInfo(
            topology=Sizes(request.tp),
            layout="rules",
            stage="checkpoint",
            pattern=check_pattern(request.pattern or DEFAULT_PATTERN, self.topology).text,
            dtype=request.dtype,
        )

    def made(self, rank: int) -> Made:
        place = Rank(rank, self.topology.tp)
        plan = plan_shares(self._catalog, self._kinds, rank=place, dtype=self._dtype)
        return Made(checked(plan), self.topology, self._kinds)


def rank_plan(
    checkpoint: Checkpoint, rank: int, *, tp: int | None, layout: str, request: Request
) -> Made:
    """Return the plan that makes `rank`, after checking the flags against what is there.

    `tp` is what the caller said; `request` says the rest.
    """
    checked_dtype(request.dtype)
    if checkpoint.catalog is not None:
        if tp is None:
            raise UsageError(
                f"{checkpoint.location}: is an ordinary checkpoint; say among how many ranks it is "
                f"shared (--tp N, or tp=N)"
            )
        return planner_of(checkpoint, layout, request).made(rank)
    if request.rules is not None or request.engine_args:
        what = "the rules" if request.rules is not None else "the engine arguments"
        raise UsageError(f"{checkpoint.location}: is sharded already; leave {what} out")
    pp = request.pp if request.pp != 1 else None
    plan = set_plan(checkpoint, rank, tp=tp, pp=pp, dtype=request.dtype)
    assert checkpoint.topology is not None
    return Made(plan, checkpoint.topology)


def by_rule(made: Made) -> tuple[Mapping[str, Any], ...] | None:
    """Return, for each way of sharing, how many tensors and bytes of the rank it makes."""
    if made.kinds is None:
        return None
    found: dict[str, list[int]] = {}
    row = made.plan.catalog.row
    for dest, name in enumerate(made.plan.tensors.names):
        kind = made.kinds[row[name]]
        entry = found.setdefault(describe(kind), [0, 0])
        entry[0] += 1
        entry[1] += made.plan.tensors.nbytes(dest)
    return tuple(
        {"rule": how, "tensors": count, "bytes": nbytes} for how, (count, nbytes) in found.items()
    )
