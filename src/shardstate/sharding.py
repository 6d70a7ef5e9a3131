"""Ranks, topology and split rules: which rank owns which box of which tensor.

A rule says how tensors of one kind are shared. Rules are data: a JSON list, the first that matches
wins, and a name is matched by whole components from the right.

    {"match": "layers.*.self_attn.q_proj.weight", "split": 0, "unit": 64}

`match` is the end of the name, `*` one whole component. Exactly one kind:

    "replicate": true    every rank holds the whole tensor
    "split": AXIS        rank r of n holds the r-th n-th of the axis; "unit" (default 1) is the
                         number of elements that must stay together, as those of one head
    "kv_heads": N        as split of axis 0 ("split" may name another) in N heads; with more ranks
                         than heads, ranks / N neighbours hold the same head
    "vocabulary": true   ceil(rows / n) rows of axis 0 on each rank; zero rows fill the last ranks

`unit` and `kv_heads` may name an entry of the model's configuration instead of being a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import msgspec

from shardstate.errors import NoRule, RulesError, UnevenSplit, UsageError
from shardstate.jsontext import json_fault
from shardstate.layout import Box, Shape

# model_type of a configuration → the built-in table (`tables/NAME.json`).
TABLES: Mapping[str, str] = {
    "bert": "bert",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
}


MAX_RANKS = 1 << 16  # of one parallel axis: more than anybody has, and few enough to list


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the parallel axes that a set is made for."""

    tp: int
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name, size in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)):
            if not 1 <= size <= MAX_RANKS:
                raise UsageError(f"{name} is {size}; it must be from 1 to {MAX_RANKS}")

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, slots=True)
class Rank:
    """One worker's place among `world` tensor-parallel workers."""

    index: int
    world: int

    def __post_init__(self) -> None:
        Topology(self.world)  # refuses none
        if not 0 <= self.index < self.world:
            raise UsageError(
                f"rank {self.index} is out of range; with tp {self.world} "
                f"ranks are 0 to {self.world - 1}"
            )


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Split:
    """Equal shares of `axis`, in whole units of `unit` elements."""

    axis: int
    unit: int = 1


@dataclass(frozen=True, slots=True)
class KvHeads:
    """`axis` holds `heads` heads; with more ranks than heads, neighbours hold the same one."""

    heads: int
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Shares of ceil(rows / world) rows of axis 0; zero rows fill up the last ones."""


Kind = Replicate | Split | KvHeads | Vocabulary


@dataclass(frozen=True, slots=True)
class Rule:
    """How the tensors whose name ends with the components of `match` are shared."""

    match: str
    kind: Kind

    def matches(self, components: Sequence[str]) -> bool:
        """Whether the last of `components` are those of `match`; `*` stands for any one."""
        wanted = self.match.split(".")
        return len(wanted) <= len(components) and all(
            want in ("*", have)
            for want, have in zip(reversed(wanted), reversed(components), strict=False)
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of one tensor: `box` of the source, in the leading corner of `shape`."""

    box: Box  # in elements of the source tensor
    shape: Shape  # of the rank's tensor; larger than the box where it is padded with zeros


def parse_rules(data: bytes, *, config: Mapping[str, Any] | None, where: str) -> tuple[Rule, ...]:
    """Return the rules of a JSON file, with names of configuration entries replaced by numbers.

    `where` is the file's name, for errors. Raises `RulesError` that lists every fault.
    """
    if (wrong := json_fault(data)) is not None:
        raise RulesError(f"{where}: {wrong}; mend the rules", file=where)
    try:
        entries = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RulesError(f"{where}: not JSON: {error}", file=where) from None
    if not isinstance(entries, list):
        raise RulesError(f"{where}: a rules file is a JSON list of rules", file=where)
    rules, faults = [], []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_rule(entry, config))
        except RulesError as error:
            faults.append(f"rule {number}: {error}")
    if faults:
        raise RulesError(f"{where}: {'; '.join(faults)}", file=where)
    return tuple(rules)


def match_rules(names: Iterable[str], rules: Sequence[Rule], *, where: str) -> list[Rule]:
    """Return the first of `rules` that matches each of `names`.

    `NoRule` lists all names that none matches; `where` says in errors whose rules they are.
    """
    # By the last component first: a model has tens of thousands of names and few endings.
    found: list[Rule] = []
    unmatched: list[str] = []
    endings: dict[str, list[Rule]] = {}
    for name in names:
        components = name.split(".")
        last = components[-1]
        if last not in endings:
            endings[last] = [r for r in rules if r.match.rsplit(".", 1)[-1] in ("*", last)]
        for rule in endings[last]:
            if rule.matches(components):
                found.append(rule)
                break
        else:
            unmatched.append(name)
    if unmatched:
        raise NoRule(
            f"no rule of {where} matches {len(unmatched)} tensor"
            f"{'s' if len(unmatched) > 1 else ''}: {', '.join(unmatched)}; "
            f"give rules that name them (--rules FILE)",
            names=tuple(unmatched),
        )
    return found


def check_shares(
    names: Sequence[str], shapes: Sequence[Shape], kinds: Sequence[Kind], *, world: int
) -> None:
    """Raise `UnevenSplit` if some tensor cannot be shared by `world` ranks.

    The error names the first such tensor, how many more there are, and the world sizes that work
    for all tensors together.
    """
    uneven: list[tuple[str, int, int, int, str]] = []  # name, axis, size, unit, what it has
    parts = 0  # gcd of what plain splits have: world sizes that work divide it
    heads: set[int] = set()
    for name, shape, kind in zip(names, shapes, kinds, strict=True):
        match kind:
            case Replicate():
                continue
            case Vocabulary():
                axis, unit = 0, 1
            case Split(axis, unit):
                pass
            case KvHeads(count, axis):
                unit = 1
        if axis >= len(shape):
            raise RulesError(
                f"{name}: its rule splits axis {axis}, and its shape is {list(shape)}; "
                f"mend the rule",
                tensor=name,
            )
        size = shape[axis]
        match kind:
            case Split():
                if size % unit:
                    raise UnevenSplit(
                        f"{name}: axis {axis} has {size} elements, which is no multiple of its "
                        f"rule's unit {unit}; mend the rule",
                        tensor=name,
                        axis=axis,
                        size=size,
                        unit=unit,
                        world=world,
                    )
                parts = gcd(parts, size // unit)
                if (size // unit) % world:
                    what = f"{size // unit} units of {unit}" if unit > 1 else f"{size} elements"
                    uneven.append((name, axis, size, unit, what))
            case KvHeads(count):
                if size % count:
                    raise UnevenSplit(
                        f"{name}: axis {axis} has {size} elements, which {count} heads cannot "
                        f"share; mend the rule or the configuration",
                        tensor=name,
                        axis=axis,
                        size=size,
                        unit=size // count or 1,
                        world=world,
                    )
                heads.add(count)
                if world % count and count % world:
                    what = f"{count} heads of {size // count}"
                    uneven.append((name, axis, size, size // count, what))
    if not uneven:
        return
    name, axis, size, unit, what = uneven[0]
    limit = min(parts or max(heads, default=1), MAX_RANKS)
    works = tuple(
        n
        for n in range(1, limit + 1)
        if parts % n == 0 and all(n % count == 0 or count % n == 0 for count in heads)
    )
    more = f" (and {len(uneven) - 1} more tensors like it)" if len(uneven) > 1 else ""
    raise UnevenSplit(
        f"{name}: axis {axis} of size {size} has {what}, which {world} ranks cannot share "
        f"evenly{more}; tp {', '.join(map(str, works))} would work",
        tensor=name,
        axis=axis,
        size=size,
        unit=unit,
        world=world,
        works=works,
    )


def describe(kind: Kind) -> str:
    """Return a rule's kind in words, as tables show it."""
    match kind:
        case Replicate():
            return "replicated"
        case Split(axis, _):
            return f"split along axis {axis}"
        case KvHeads(heads, axis):
            return f"split along axis {axis} by {heads} key/value heads"
        case Vocabulary():
            return "split by vocabulary rows"


def share(kind: Kind, shape: Shape, rank: Rank) -> Share:
    """Return what `rank` holds of a tensor of `shape`, which passed `check_shares`."""
    whole = tuple((0, n) for n in shape)
    match kind:
        case Replicate():
            return Share(whole, shape)
        case Split(axis, _):
            begin, size = rank.index * (shape[axis] // rank.world), shape[axis] // rank.world
        case KvHeads(heads, axis):
            size = shape[axis] // min(heads, rank.world)
            begin = rank.index * heads // rank.world * (shape[axis] // heads)
        case Vocabulary():
            axis, size = 0, -(-shape[0] // rank.world)
            begin = min(rank.index * size, shape[0])
    end = min(begin + size, shape[axis])
    box = (*whole[:axis], (begin, end), *whole[axis + 1 :])
    return Share(box, (*shape[:axis], size, *shape[axis + 1 :]))


def _rule(entry: object, config: Mapping[str, Any] | None) -> Rule:
    """Return one rule from its JSON object."""
    if not isinstance(entry, dict):
        raise RulesError("a rule is a JSON object")
    known = {"match", "replicate", "split", "unit", "vocabulary", "kv_heads"}
    if unknown := sorted(set(entry) - known):
        raise RulesError(f"unknown keys {unknown}; known are {sorted(known)}")
    match = entry.get("match")
    if not isinstance(match, str) or not match or "" in match.split("."):
        raise RulesError(f'"match" must be the end of a tensor name, found {match!r}')
    for flag in ("replicate", "vocabulary"):
        if flag in entry and entry[flag] is not True:
            raise RulesError(f'"{flag}" can only be true, found {entry[flag]!r}')
    kinds = {"replicate", "vocabulary", "kv_heads"} & set(entry) or {"split"} & set(entry)
    if len(kinds) != 1 or ("split" in entry and kinds & {"replicate", "vocabulary"}):
        raise RulesError(
            f'{match}: give exactly one of "replicate", "split", "vocabulary" and "kv_heads"'
        )
    if "unit" in entry and kinds != {"split"}:
        raise RulesError(f'{match}: "unit" goes with "split" alone')
    axis = entry.get("split", 0)
    if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis < 64:
        raise RulesError(f'{match}: "split" must be an axis, 0 or more, found {axis!r}')
    match kinds.pop():
        case "replicate":
            return Rule(match, Replicate())
        case "vocabulary":
            return Rule(match, Vocabulary())
        case "kv_heads":
            return Rule(match, KvHeads(_number(match, "kv_heads", entry["kv_heads"], config), axis))
        case _:
            return Rule(match, Split(axis, _number(match, "unit", entry.get("unit", 1), config)))


def _number(match: str, key: str, value: object, config: Mapping[str, Any] | None) -> int:
    """Return `value`, or the configuration's entry of that name; a positive int either way."""
    found = value
    if isinstance(value, str):
        if config is None:
            raise RulesError(
                f'{match}: "{key}" is {value!r}, an entry of config.json, and there is none'
            )
        found = _config_entry(config, value)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found < 2**63:
        origin = f" ({value!r} in config.json)" if found is not value else ""
        raise RulesError(f'{match}: "{key}" must be a positive number, found {found!r}{origin}')
    return found


def _config_entry(config: Mapping[str, Any], name: str) -> object:
    """Return an entry of a model configuration, as transformers derives absent ones."""
    found: object = config.get(name)
    if found is None and name == "num_key_value_heads":
        return config.get("num_attention_heads")
    if found is None and name == "head_dim":
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise RulesError(f"hidden_size {hidden} is no multiple of {heads} attention heads")
            return hidden // heads
    return found


def rules_json(rules: Sequence[Rule]) -> bytes:
    """Return the canonical JSON of resolved `rules`, whose digest goes into a set's id."""
    entries: list[dict[str, object]] = []
    for rule in rules:
        match rule.kind:
            case Replicate():
                kind: dict[str, object] = {"replicate": True}
            case Split(axis, unit):
                kind = {"split": axis, "unit": unit}
            case KvHeads(heads, axis):
                kind = {"split": axis, "kv_heads": heads}
            case Vocabulary():
                kind = {"vocabulary": True}
        entries.append({"match": rule.match, **kind})
    return msgspec.json.encode(entries)
