"""What all tests share."""

import logging
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
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


@pytest.fixture(autouse=True)
def root_level():
    """The command line sets the level of the root logger, for good: not for the next test."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture
def memory_path():
    """A directory in memory, for tests that wait for hundreds of fsyncs and need no disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)
