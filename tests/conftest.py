"""What all tests share."""

import sys
from importlib.util import find_spec
from pathlib import Path

from hypothesis import settings

# tests/vllm needs the real thing: `make test-vllm` has it in a venv of its own. (The folder itself
# passes for a package of that name, but for one without an origin.)
_vllm = find_spec("vllm")
collect_ignore = [] if _vllm is not None and _vllm.origin is not None else ["vllm"]

# tests/stores needs servers: `make test-stores` installs them.
if not (Path(sys.executable).parent / "weed").exists():
    collect_ignore.append("stores")

# Two busy cores make any deadline a coin toss.
settings.register_profile("shardstate", deadline=None)
settings.load_profile("shardstate")
