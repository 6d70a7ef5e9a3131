"""The load format inside vLLM, without an engine: what it accepts, refuses, and falls back from."""

import logging
from types import SimpleNamespace

import pytest
import torch
import zoo
from safetensors.torch import load_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from zoo_check import as_worker, build, default_state, engine_config

import shardstate
from shardstate.errors import LoadError, SetError, UsageError
from shardstate.torch.recorder import Recorder
from shardstate.vllm import ShardedStateLoader
from shardstate.vllm.plugin import register

register()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "llama"
    zoo.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def offline(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("loader") / "set"
    shardstate.shard(llama, out, tp=2, layout="vllm")
    return out


def loader(**extra):
    config = LoadConfig(load_format="shardstate", model_loader_extra_config=extra)
    found = get_model_loader(config)
    assert isinstance(found, ShardedStateLoader)
    return found


def raw(state):
    return {
        k: v.detach().contiguous().view(-1).view(torch.uint8).tolist() for k, v in state.items()
    }


def loaded(path, rank, *, tp=2, engine=None, **extra):
    """Return the state that the loader makes of `path` for one rank."""
    config = engine_config(str(path), tp=tp, **(engine or {}))
    with as_worker(config, rank):
        model = build(config)
        for tensor in model.state_dict().values():
            tensor.view(torch.uint8).fill_(0x5A) if tensor.dim() else None
        loader(**extra).load_weights(model, config.model_config)
        return model.state_dict()


def expected(path, rank, tp=2):
    return raw(default_state(engine_config(str(path), tp=tp), rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_kind_of_checkpoint_gives_the_parameters_of_vllms_own_loader(
    rank, llama, offline, tmp_path
):
    rules = tmp_path / "rules"
    shardstate.shard(llama, rules, tp=2, layout="rules")
    for path in (llama, offline, rules):
        assert raw(loaded(path, rank)) == expected(llama, rank), path
    assert raw(loaded(llama, rank, source=str(offline))) == expected(llama, rank)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"frobnicate": 1}, "unknown frobnicate; allowed are pattern"),
        ({"verify": "yes"}, "verify is 'yes', expected true or false"),
        ({"threads": 0}, "threads is 0, expected a number, 1 or more"),
        ({"threads": True}, "threads is True"),
        ({"backend": "magic"}, "backend is 'magic', expected native"),
        ({"source": 3}, "source is 3, expected a text"),
    ],
)
def test_a_wrong_configuration_is_a_value_error_that_lists_what_is_allowed(extra, told):
    with pytest.raises(ValueError, match=told):
        loader(**extra)


def test_a_set_for_another_engine_is_refused_with_both_sides(offline):
    with pytest.raises(SetError, match=r"tp 2 \(the engine has 1\)"):
        loaded(offline, 0, tp=1)
    with pytest.raises(LoadError, match=r"BF16.*F16"):
        loaded(offline, 0, engine={"dtype": "float16"})


def test_another_version_of_the_engine_is_refused_unless_told(offline, monkeypatch, llama):
    monkeypatch.setattr("shardstate.vllm.facts.engine_version", lambda: "0.99.0")
    with pytest.raises(SetError, match=r"engine vllm 0.32.0 \(the engine has vllm 0.99.0\)"):
        loaded(offline, 0)
    assert raw(loaded(offline, 0, strict=False)) == expected(llama, 0)


def test_pickled_weights_go_through_vllms_own_loader(llama, tmp_path, caplog):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = {k: v for file in llama.glob("*.safetensors") for k, v in load_file(file).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    with caplog.at_level(logging.INFO, logger="shardstate"):
        logging.getLogger("shardstate").propagate = True
        assert raw(loaded(folder, 1)) == expected(llama, 1)
    assert "mode=fallback reason='pytorch_model.bin is no safetensors file'" in caplog.text


def test_a_weight_that_is_missing_stays_an_error(llama, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "lacking"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = {k: v for file in llama.glob("*.safetensors") for k, v in load_file(file).items()}
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        loaded(folder, 0)
    with pytest.raises(shardstate.ShardStateError, match=r"model\.norm\.weight"):
        shardstate.shard(folder, tmp_path / "out", tp=2, layout="vllm")


def test_vllms_own_copy_counter_sees_every_copy(llama):
    """Its mode, nested in ours, counts the elements that loading would copy."""
    catalog = shardstate.open(llama).catalog
    recorder = Recorder(catalog, lambda *_: pytest.fail("nothing is to be read"), offline=False)
    weight = recorder.offer(0)
    goal = torch.empty(weight.shape, dtype=weight.dtype)
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    with recorder, CopyCounter() as counter:
        goal.copy_(weight)
        empty.copy_(weight)
        goal[:1].copy_(weight[:1])
    assert counter.copied_numel == 2 * weight.numel() + weight[:1].numel()


def test_the_source_is_not_for_a_draft_model(llama):
    found = loader(source="/elsewhere")
    target = SimpleNamespace(runner_type="generate", model=str(llama), model_weights="")
    draft = SimpleNamespace(runner_type="draft", model=str(llama), model_weights="")
    assert found._location(target) == "/elsewhere"
    assert found._location(draft) == str(llama)


def test_weights_are_reloaded_from_ordinary_checkpoints_only(llama, offline, tmp_path):
    config = engine_config(str(llama), tp=2)
    rules = tmp_path / "rules"
    shardstate.shard(llama, rules, tp=2, layout="rules")
    with as_worker(config, 0):
        model = build(config)
        found = dict(loader().get_all_weights(config.model_config, model))
        source = dict(loader(source=str(rules)).get_all_weights(config.model_config, model))
        assert raw(source) == raw(found)
        with pytest.raises(UsageError, match="cannot be loaded into a model that is in use"):
            next(loader(source=str(offline)).get_all_weights(config.model_config, model))


def test_engine_arguments_are_checked(llama, tmp_path):
    for args, told in (
        ({"tensor_parallel_size": 4}, "is what --tp says"),
        ({"frobnicate": 1}, "knows no frobnicate"),
    ):
        with pytest.raises(UsageError, match=told):
            shardstate.plan(llama, rank=0, tp=2, layout="vllm", engine_args=args)
    with pytest.raises(UsageError, match="leave the rules out"):
        shardstate.plan(llama, rank=0, tp=2, layout="vllm", rules=[])


def test_auto_takes_vllm_where_it_knows_the_architecture(llama):
    assert shardstate.plan(llama, rank=0, tp=2).layout == "vllm"
    report = shardstate.plan(llama, rank=3, tp=2, pp=2)
    assert (report.layout, report.topology) == ("vllm", {"tp": 2, "pp": 2, "dp": 1})


def test_an_interrupted_cache_is_not_used(llama, tmp_path):
    config = engine_config(str(llama), tp=2)
    with as_worker(config, 0):
        model = build(config)
        first = loader(cache=str(tmp_path))
        first.load_weights(model, config.model_config)
    for thread in __import__("threading").enumerate():
        if thread.name == "shardstate-cache":
            thread.join()
    (entry,) = tmp_path.iterdir()
    assert raw(loaded(llama, 0, cache=str(tmp_path))) == expected(llama, 0)
    (entry / "shardstate.rank-0.json").unlink()
    assert raw(loaded(llama, 0, cache=str(tmp_path))) == expected(llama, 0)
