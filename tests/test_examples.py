"""The examples run, in seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardstate
from checkpoints import rank_tensors, tree, write_llama
from memories import noise

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_an_ordinary_checkpoint_becomes_a_set_that_loads(dtype, tmp_path):
    source, out = write_llama(tmp_path / "llama", files=2, dtype=dtype), tmp_path / "out"
    saved = run("save_sharded_state.py", source, out, "--tp", 2, "--max-part-size", "10kB")
    assert (saved.returncode, saved.stderr) == (0, "")
    assert saved.stdout.startswith("rank 0: 21 tensors, ")
    assert saved.stdout.endswith("; the set is committed\n")
    assert shardstate.verify(out, full=True).problems == ()
    shardstate.shard(source, tmp_path / "set", tp=2)
    for rank in range(2):
        assert rank_tensors(tmp_path / "set", rank) == rank_tensors(out, rank)
        loaded = run("load_sharded_state.py", out, "--rank", rank, "--verify")
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.startswith(f"rank {rank} of {{'tp': 2, 'pp': 1, 'dp': 1}}: shardstate")
        assert "21 tensors, " in loaded.stdout
        assert f"shardstate: rank={rank} mode=sharded backend=native " in loaded.stderr


def test_a_model_without_a_table_is_split_by_rules(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    save_file({"up": noise(8, 4), "scale": torch.tensor(2.0)}, source / "model.safetensors")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"match": "up", "split": 0}, {"match": "*", "replicate": True}]))
    saved = run("save_sharded_state.py", source, tmp_path / "out", "--tp", 4, "--rules", rules)
    assert saved.returncode == 0, saved.stderr
    assert shardstate.inspect(tmp_path / "out").topology["tp"] == 4
    assert rank_tensors(tmp_path / "out", 3)["up"].data == noise(8, 4)[6:].numpy().tobytes()


def test_what_does_not_work_is_one_line(tmp_path):
    before = tree(tmp_path)
    for found in (
        run("save_sharded_state.py", tmp_path / "nowhere", tmp_path / "out"),
        run("load_sharded_state.py", tmp_path / "nowhere"),
    ):
        assert found.returncode == 1
        assert "there is no such directory" in found.stderr
        assert found.stderr.count("\n") == 1
    assert before == tree(tmp_path)
