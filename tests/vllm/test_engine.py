"""Real engines of two ranks: every way to load gives the same tokens, and says which way it was."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zoo
import zoo_quantized

START = Path(__file__).with_name("start_engine.py")


def start(path, load_format, *, tp=2, extra=None, env=None):
    """Start an engine in a process of its own; return its tokens and all that it logged."""
    found = subprocess.run(
        [sys.executable, START, path, load_format, str(tp), json.dumps(extra or {})],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",  # as by default; other tests here set it to ERROR
            **(env or {}),
        },
        check=False,
    )
    log = found.stdout + found.stderr
    answer = re.search(r"^RESULT (.*)$", found.stdout, re.MULTILINE)
    # A worker's own error stands far above what the processes over it print about its end.
    causes = "\n".join(line for line in log.splitlines() if " ERROR " in line)
    assert answer is not None, causes[:6000] or log[-6000:]
    return json.loads(answer[1]), log


def modes(log):
    """Return rank → mode, as the summary lines say."""
    return dict(re.findall(r"shardstate: rank=(\d+) mode=(\w+)", log))


def shard(source, out, *arguments):
    subprocess.run(
        [sys.executable, "-m", "shardstate", "shard", source, out, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "llama"
    zoo.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def expected(llama):
    return start(llama, "auto")[0]


def test_an_ordinary_checkpoint_is_recorded_then_cached(llama, expected, tmp_path):
    extra = {"cache": str(tmp_path / "cache")}
    tokens, log = start(llama, "shardstate", extra=extra)
    assert (tokens, modes(log)) == (expected, {"0": "recorded", "1": "recorded"})
    assert log.count("cached in") == 2
    assert "Loading weights (shardstate)" in log
    tokens, log = start(llama, "shardstate", extra=extra)
    assert (tokens, modes(log)) == (expected, {"0": "cached", "1": "cached"})


def test_an_offline_set_loads_here_and_in_vllm_itself(llama, expected, tmp_path):
    out = tmp_path / "set"
    shard(llama, out, "--tp", "2", "--layout", "vllm")
    tokens, log = start(out, "shardstate", extra={"verify": True})
    assert (tokens, modes(log)) == (expected, {"0": "sharded", "1": "sharded"})
    tokens, log = start(out, "sharded_state")
    assert (tokens, modes(log)) == (expected, {})


def test_a_rules_set_is_read_as_its_source(llama, expected, tmp_path):
    out = tmp_path / "set"
    shard(llama, out, "--tp", "4", "--layout", "rules")
    tokens, log = start(llama, "shardstate", extra={"source": str(out)})
    assert (tokens, modes(log)) == (expected, {"0": "recorded", "1": "recorded"})


def test_where_recording_fails_the_model_is_built_anew(llama, expected):
    here = str(Path(__file__).parent)
    env = {"PYTHONPATH": here, "WORKER_CLS": "breaking_worker.BreakingWorker"}
    tokens, log = start(llama, "shardstate", env=env)
    assert (tokens, modes(log)) == (expected, {"0": "fallback", "1": "fallback"})
    assert "broken on purpose" in log


def test_a_worker_killed_while_it_loads_ends_the_start_and_harms_no_cache(
    llama, expected, tmp_path
):
    extra = {"cache": str(tmp_path / "cache")}
    env = {"PYTHONPATH": str(Path(__file__).parent), "WORKER_CLS": "breaking_worker.DyingWorker"}
    began = time.monotonic()
    with pytest.raises(AssertionError, match="initialization failed"):
        start(llama, "shardstate", extra=extra, env=env)
    assert time.monotonic() - began < 120  # nobody waits for it
    tokens, log = start(llama, "shardstate", extra=extra)
    assert tokens == expected
    assert modes(log)["1"] == "recorded"


def test_an_int8_model_that_vllm_cannot_save_survives(tmp_path):
    source, out = tmp_path / "int8", tmp_path / "set"
    zoo_quantized.make("ct_w8a8_int8", source)
    expected, _ = start(source, "auto")
    shard(source, out, "--tp", "2", "--layout", "vllm")
    tokens, log = start(out, "shardstate")
    assert (tokens, modes(log)) == (expected, {"0": "sharded", "1": "sharded"})


def test_the_trained_encoder_gives_the_same_embeddings(tmp_path):
    source, out = tmp_path / "minilm", tmp_path / "set"
    zoo.make("minilm", source)
    expected, _ = start(source, "auto", tp=1)
    recorded, log = start(source, "shardstate", tp=1)
    assert (recorded, modes(log)) == (expected, {"0": "recorded"})
    shard(source, out, "--tp", "1", "--layout", "vllm", "--dtype", "bf16")
    sharded, log = start(out, "shardstate", tp=1)
    assert (sharded, modes(log)) == (expected, {"0": "sharded"})
