"""Every small model of the zoo: our parameters are those of vLLM's own loader, byte for byte."""

import pytest
import torch
import zoo
import zoo_quantized
from vllm.config.load import LoadConfig
from zoo_check import as_worker, build, default_state, engine_config, run_forked

import shardstate
from shardstate.torch.aliases import filter_subtensors
from shardstate.vllm import ShardedStateLoader

NAMES = [*zoo.ARCHITECTURES, *zoo_quantized.QUANTIZED]


def make(name, folder):
    (zoo if name in zoo.ARCHITECTURES else zoo_quantized).make(name, folder)
    return folder


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(name, folder, tp, pp, engine):
    """Return what differs from vLLM's own loader: in the engine's way, and offline."""
    found = []
    for rank in range(tp * pp * engine.get("data_parallel_size", 1)):
        config = engine_config(folder, tp=tp, pp=pp, **engine)
        expected = default_state(config, rank)
        with as_worker(config, rank):
            model = build(config)
            loader = ShardedStateLoader(LoadConfig(load_format="shardstate"))
            loader.load_weights(model, config.model_config)
        got = model.state_dict()
        found += [f"rank {rank}: {k}" for k in expected if raw(got[k]) != raw(expected[k])]
        left = zoo.UNWRITTEN.get(name)
        if left is None:
            arrays = shardstate.load(
                folder, rank=rank, tp=tp, pp=pp, layout="vllm", engine_args={**BASE, **engine}
            )
            kept = filter_subtensors(expected)
            found += [f"rank {rank} offline lacks {k}" for k in set(kept) - set(arrays)]
            found += [
                f"rank {rank} offline: {k}"
                for k in kept
                if k in arrays and arrays[k].tobytes() != raw(expected[k])
            ]
    return found


BASE = {"max_model_len": 128}


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_of_vllms_own_loader(name, tmp_path):
    folder = make(name, tmp_path / "model")
    workers = zoo.workers(name) if name in zoo.ARCHITECTURES else 2
    engine = zoo.engine_args(name) if name in zoo.ARCHITECTURES else {}
    assert run_forked(differences, name, folder, workers, 1, engine) == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_with_expert_parallelism(name, tmp_path):
    folder = make(name, tmp_path / "model")
    engine = {**zoo.engine_args(name), "enable_expert_parallel": True}
    assert run_forked(differences, name, folder, 2, 1, engine) == []


@pytest.mark.parametrize(
    ("name", "expert_parallel"),
    [("mixtral", False), ("mixtral", True), ("qwen3_moe", False), ("gpt_oss", True)],
)
def test_experts_span_data_parallel_workers(name, expert_parallel, tmp_path):
    folder = make(name, tmp_path / "model")
    more = {"data_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    engine = {**zoo.engine_args(name), **more}
    assert run_forked(differences, name, folder, 2, 1, engine) == []


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_with_pipeline_stages(name, tmp_path):
    folder = make(name, tmp_path / "model")
    assert run_forked(differences, name, folder, 2, 2, zoo.engine_args(name)) == []


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon_new", "gpt_oss", "llama4", "gpt2"])
def test_each_rank_reads_its_own_bytes(name, tmp_path):
    folder = make(name, tmp_path / "model")

    def figures():
        report = shardstate.plan(
            folder, rank=1, tp=2, layout="vllm", engine_args={**BASE, **zoo.engine_args(name)}
        )
        whole = shardstate.inspect(folder).bytes
        return report.materialised, report.bytes_wanted / whole

    materialised, share = run_forked(figures)
    assert materialised == 0
    assert share < 0.75
