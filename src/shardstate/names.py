"""Names of the files of a set: the pattern of rank files, records, companions, temporary files."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardstate.catalog import is_file_name
from shardstate.digest import digest_of
from shardstate.errors import UsageError
from shardstate.sharding import Topology

MANIFEST = "shardstate.json"
SIGNATURE = "shardstate.json.sig"
CONFIG = "config.json"
DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
OURS = ".shardstate-"  # temporary files, notes and locks begin with this
REPLACING = ".shardstate-replacing"  # lists what a set that is being replaced consists of

COMPANION_BYTES = 64 << 20  # a larger file of the source is left out, with a warning
_NOT_COMPANIONS = (
    *(f"*.{s}" for s in ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx"]),
    "*.index.json",
    ".git*",
    ".cache",
    "shardstate*",
    ".shardstate*",
)
_PATH_CHARACTERS = 1024  # of a companion's relative path
_FIELDS = ("rank", "tp_rank", "pp_rank", "dp_rank", "part")


@dataclass(frozen=True, slots=True)
class Pattern:
    """The template of rank-file names; its fields are decimal.

    `{rank}` = `{tp_rank}`, `{pp_rank}`, `{dp_rank}` and `{part}`; the global rank counts them as
    places of `tp` and `pp`.
    """

    text: str
    tp: int = 1
    pp: int = 1

    def name(self, rank: int, part: int) -> str:
        """Return the file name of one part of one global rank."""
        own, stage, replica = rank, 0, 0
        if "{dp_rank}" in self.text:
            replica, own = divmod(own, self.pp * self.tp)
        if "{pp_rank}" in self.text:
            stage, own = divmod(own, self.tp)
        return self.text.format(rank=own, tp_rank=own, pp_rank=stage, dp_rank=replica, part=part)

    def fields(self, name: str) -> tuple[int, int, int, int] | None:
        """Return (dp_rank, pp_rank, tp_rank, part) of a name that this pattern makes, else None.

        Ranks that the pattern does not show are 0.
        """
        pieces, seen = [], set()
        for literal, field, _, _ in string.Formatter().parse(self.text):
            pieces.append(re.escape(literal))
            if field:
                group = "rank" if field == "tp_rank" else field
                pieces.append(f"(?P={group})" if group in seen else f"(?P<{group}>0|[1-9][0-9]*)")
                seen.add(group)
        found = re.fullmatch("".join(pieces), name)
        if found is None:
            return None
        groups = found.groupdict()
        dp, pp, tp = (int(groups.get(each) or 0) for each in ("dp_rank", "pp_rank", "rank"))
        return dp, pp, tp, int(groups["part"])

    def parse(self, name: str) -> tuple[int, int] | None:
        """Return (global rank, part) of a name that this pattern makes, else None."""
        found = self.fields(name)
        if found is None:
            return None
        dp, pp, tp, part = found
        return (dp * self.pp + pp) * self.tp + tp, part


def default_pattern(topology: Topology) -> str:
    """Return vLLM's name of rank files for a topology; for dp, which it has no name for, ours."""
    text = DEFAULT_PATTERN if topology.pp == 1 else PIPELINE_PATTERN
    return text if topology.dp == 1 else text.replace("model-", "model-dp-{dp_rank}-")


def check_pattern(text: str, topology: Topology) -> Pattern:
    """Return the pattern, or raise `UsageError` if two ranks or parts could get one name."""

    def fault(why: str) -> UsageError:
        default = default_pattern(topology)
        return UsageError(f"pattern {text!r}: {why}; the default is {default!r}")

    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise fault(str(error)) from None
    fields = [field for _, field, _, _ in parsed if field is not None]
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in _FIELDS or spec or conversion):
            known = ", ".join(f"{{{known}}}" for known in _FIELDS)
            raise fault(f"knows {known}, found {{{field}}}")
    if "part" not in fields:
        raise fault("lacks {part}, so that the parts of a rank would share one name")
    if topology.tp > 1 and not {"rank", "tp_rank"} & set(fields):
        raise fault("lacks {rank}, so that ranks would share one name")
    axes = ("pp_rank", topology.pp, "pipeline stage"), ("dp_rank", topology.dp, "replica")
    for field, size, what in axes:
        if (size > 1) != (field in fields):
            lacks = f"lacks {{{field}}}, so that {what}s would share one name"
            raise fault(lacks if size > 1 else f"has {{{field}}}, and there is one {what}")
    # Between two numbers there must be something that is no digit, else 1|11 and 11|1 are one name.
    for number, (literal, _, _, _) in enumerate(parsed):
        between = number and parsed[number - 1][1] is not None and parsed[number][1] is not None
        if between and not re.search(r"[^0-9]", literal):
            raise fault("has two numbers with nothing but digits between, so that names collide")
    name = text.format(rank=0, tp_rank=0, pp_rank=0, dp_rank=0, part=0)
    if not is_file_name(name) or name.startswith((".", "shardstate")):
        raise fault("makes no plain file name that could hold weights")
    if not name.endswith(".safetensors"):
        raise fault('must end with ".safetensors"')
    return Pattern(text, topology.tp, topology.pp)


def record_name(rank: int) -> str:
    """Return the name of a rank's record."""
    return f"shardstate.rank-{rank}.json"


def provenance_name(rank: int) -> str:
    """Return the name of a rank's provenance."""
    return f"shardstate.rank-{rank}.provenance.json"


def record_rank(name: str) -> int | None:
    """Return the rank whose record has this name, else None."""
    found = re.fullmatch(r"shardstate\.rank-(0|[1-9][0-9]*)\.json", name)
    return int(found[1]) if found else None


def provenance_rank(name: str) -> int | None:
    """Return the rank whose provenance has this name, else None."""
    found = re.fullmatch(r"shardstate\.rank-(0|[1-9][0-9]*)\.provenance\.json", name)
    return int(found[1]) if found else None


def note_name(rank: int, part: int) -> str:
    """Return the name of the note that says that a part is finished."""
    return f"{OURS}part-{rank}-{part}"


def note_place(name: str) -> tuple[int, int] | None:
    """Return the (rank, part) whose note has this name, else None."""
    found = re.fullmatch(re.escape(OURS) + r"part-(0|[1-9][0-9]*)-(0|[1-9][0-9]*)", name)
    return (int(found[1]), int(found[2])) if found else None


COMMIT_LOCK = f"{OURS}lock-commit"  # of whoever publishes the manifest


def lock_name(rank: int) -> str:
    """Return the name of the lock of whoever saves a rank."""
    return f"{OURS}lock-{rank}"


def temporary_name(name: str) -> str:
    """Return the name under which `name` is written before it is renamed; it has no suffix."""
    return f"{OURS}new-{digest_of(name.encode())[:24]}"


def is_companion(path: str) -> bool:
    """Whether a file of the source, by its relative path, comes along with a set."""
    return not any(
        fnmatchcase(component, glob) for component in path.split("/") for glob in _NOT_COMPANIONS
    )


def is_relative_path(path: str) -> bool:
    """Whether a companion may have this name: components that a record can hold."""
    return len(path) <= _PATH_CHARACTERS and all(map(is_file_name, path.split("/")))
