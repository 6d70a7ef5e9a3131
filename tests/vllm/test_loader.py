"""The load format inside vLLM, without an engine: what it accepts, refuses, and falls back from."""

import logging
import os
import re
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import zoo
from safetensors.torch import load_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.model_loader.sharded_state_loader import (
    ShardedStateLoader as VllmLoader,
)
from zoo_check import as_worker, build, default_state, engine_config, run_forked

import shardstate
from shardstate.errors import LoadError, SetError, UsageError
from shardstate.torch.recorder import Recorder
from shardstate.vllm import ShardedStateLoader
from shardstate.vllm.loader import RecordingFailed
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
    for path in (llama, offline):
        how = {"direct": True, "chunk_bytes": 4096, "threads": 3}
        assert raw(loaded(path, rank, **how)) == expected(llama, rank), path


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"frobnicate": 1}, "unknown frobnicate; allowed are pattern"),
        ({"verify": "yes"}, "verify is 'yes', expected true or false"),
        ({"threads": 0}, "threads is 0, expected a number, 1 or more"),
        ({"threads": True}, "threads is True"),
        ({"direct": "yes"}, "direct is 'yes', expected true or false"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0, expected a number, 1 or more"),
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
    with pytest.raises(SetError, match=r"dtype bfloat16 \(the engine has float16\)"):
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


def test_vllm_chooses_the_dtype_and_the_set_says_it(tmp_path):
    source = tmp_path / "minilm"
    zoo.make("minilm", source)
    assert shardstate.inspect(source).bytes_by_dtype.keys() >= {"F32"}
    report = shardstate.shard(source, tmp_path / "set", tp=1, layout="vllm")
    assert report.dtype == "f16"
    assert report.bytes_by_dtype["F16"] > 0.99 * report.bytes
    with pytest.raises(SetError, match=r"dtype float16 \(the engine has bfloat16\)"):
        loaded(tmp_path / "set", 0, tp=1, engine={"dtype": "bfloat16"})


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_set_whose_experts_span_data_parallel_workers(expert_parallel, tmp_path):
    source, out = tmp_path / "mixtral", tmp_path / "set"
    zoo.make("mixtral", source)
    engine = {"data_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    report = shardstate.shard(source, out, tp=2, layout="vllm", engine_args=engine)
    assert report.topology == {"tp": 2, "pp": 1, "dp": 2}
    assert (out / "model-dp-1-rank-0-part-0.safetensors").exists()
    assert shardstate.verify(out, full=True, against=source).problems == ()
    for rank in range(4):
        config = engine_config(str(source), tp=2, **engine)
        assert raw(loaded(out, rank, engine=engine)) == raw(default_state(config, rank))
    with pytest.raises(SetError, match=r"dp 2 \(the engine has 1\)"):
        loaded(out, 0, engine={"enable_expert_parallel": expert_parallel})


def test_what_vllm_itself_saved(llama, tmp_path, caplog):
    for rank in range(2):
        config = engine_config(str(llama), tp=2)
        with as_worker(config, rank):
            model = build(config)
            loader().load_weights(model, config.model_config)
            VllmLoader.save_model(model, str(tmp_path))
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    logging.getLogger("shardstate").propagate = True
    for rank in range(2):
        assert raw(loaded(tmp_path, rank)) == expected(llama, rank)
    assert "nothing vouches for the bytes" in caplog.text
    with pytest.raises(SetError, match=r"tp 2 \(the engine has 1\)"):
        loaded(tmp_path, 0, tp=1)
    with pytest.raises(LoadError, match=r"stored as BF16, the model's is F16"):
        loaded(tmp_path, 0, engine={"dtype": "float16"})
    part = tmp_path / "model-rank-1-part-0.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(shardstate.ShardStateError, match=part.name):
        loaded(tmp_path, 1)


def test_what_an_engine_processed_is_not_loaded_unless_told(llama, tmp_path, caplog):
    config = engine_config(str(llama), tp=1)
    with as_worker(config, 0):
        model = build(config)
        loader().load_weights(model, config.model_config)
        ShardedStateLoader.save_model(model, str(tmp_path))
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(SetError, match=r"stage kernel \(the engine has model\)"):
        loaded(tmp_path, 0, tp=1)
    logging.getLogger("shardstate").propagate = True
    assert raw(loaded(tmp_path, 0, tp=1, strict=False)) == expected(llama, 0, tp=1)
    assert "stage kernel (the engine has model)" in caplog.text


def test_the_places_that_vllm_knows_are_honoured(llama, tmp_path, monkeypatch):
    """`model_weights` overrides the model; a hub's id, revision and folder lead to its cache."""
    config = engine_config(str(llama), tp=2)
    config.model_config.model_weights, config.model_config.model = str(llama), "/nowhere"
    hub = tmp_path / "hub"
    snapshot = hub / "models--some--llama" / "snapshots" / ("5" * 40)
    shutil.copytree(llama, snapshot)
    (hub / "models--some--llama" / "refs").mkdir()
    (hub / "models--some--llama" / "refs" / "stable").write_text("5" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with as_worker(config, 1):
        model = build(config)
        loader().load_weights(model, config.model_config)
        assert raw(model.state_dict()) == expected(llama, 1)
        config.model_config.model_weights, config.model_config.model = "", "some/llama"
        config.model_config.revision = "stable"
        model = build(config)
        found = ShardedStateLoader(LoadConfig(load_format="shardstate", download_dir=str(hub)))
        found.load_weights(model, config.model_config)
        assert raw(model.state_dict()) == expected(llama, 1)


# -- the cache ----------------------------------------------------------------------------------


def fill_cache(path, rank, cache, *, wait=True, engine=None):
    """Load one rank with a cache, and let its writer finish."""
    state = loaded(path, rank, cache=str(cache), engine=engine)
    for thread in threading.enumerate():
        if wait and thread.name == "shardstate-cache":
            thread.join()
    return raw(state)


def mode_of(caplog):
    """Return how the last load went."""
    return re.findall(r"shardstate: rank=\d+ mode=(\w+)", caplog.text)[-1]


@pytest.fixture
def log(caplog):
    logging.getLogger("shardstate").propagate = True
    caplog.set_level(logging.INFO, logger="shardstate")
    return caplog


def test_a_start_leaves_a_shard_for_the_next(llama, tmp_path, log):
    for rank in range(2):
        assert fill_cache(llama, rank, tmp_path) == expected(llama, rank)
        assert mode_of(log) == "recorded"
    (entry,) = tmp_path.iterdir()
    assert shardstate.verify(entry, full=True).problems == ()
    for rank in range(2):
        assert raw(loaded(llama, rank, cache=str(tmp_path))) == expected(llama, rank)
        assert mode_of(log) == "cached"
    fill_cache(llama, 0, tmp_path, engine={"dtype": "float16"})
    assert mode_of(log) == "recorded"


def test_a_changed_source_is_another_entry(llama, tmp_path, log):
    source = tmp_path / "llama"
    shutil.copytree(llama, source)
    fill_cache(source, 0, tmp_path / "cache")
    (file,) = source.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fill_cache(source, 0, tmp_path / "cache") == expected(source, 0)
    assert mode_of(log) == "recorded"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_unfinished_entry_is_not_used(llama, tmp_path, log):
    fill_cache(llama, 0, tmp_path)
    (entry,) = tmp_path.iterdir()
    (entry / "shardstate.rank-0.json").unlink()
    assert fill_cache(llama, 0, tmp_path) == expected(llama, 0)
    assert mode_of(log) == "recorded"
    assert raw(loaded(llama, 0, cache=str(tmp_path))) == expected(llama, 0)
    assert mode_of(log) == "cached"


def test_a_damaged_entry_is_made_again(llama, tmp_path, log):
    fill_cache(llama, 0, tmp_path)
    (entry,) = tmp_path.iterdir()
    part = entry / "model-rank-0-part-0.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(RecordingFailed, match="the cached shard cannot be used"):
        loaded(llama, 0, cache=str(tmp_path), verify=True)
    assert fill_cache(llama, 0, tmp_path) == expected(llama, 0)
    assert mode_of(log) == "recorded"


def die_while_caching(path, cache, after):
    """Load with a cache in a process that ends at once after so many bytes were cached."""
    if after is not None:
        real = os.pwritev
        written = [0]

        def pwritev(*arguments):
            written[0] += 1
            if written[0] > after:
                os._exit(9)
            return real(*arguments)

        os.pwritev = pwritev
    fill_cache(path, 0, cache)
    os._exit(9)


@pytest.mark.parametrize("after", [0, 1, None])
def test_a_worker_that_dies_while_it_writes_harms_nobody(after, llama, tmp_path, log):
    with pytest.raises(RuntimeError, match="status 9"):
        run_forked(die_while_caching, llama, tmp_path, after)
    assert fill_cache(llama, 0, tmp_path) == expected(llama, 0)
    assert mode_of(log) == ("recorded" if after is not None else "cached")
    assert raw(loaded(llama, 0, cache=str(tmp_path))) == expected(llama, 0)
    assert mode_of(log) == "cached"
    (entry,) = tmp_path.iterdir()
    fill_cache(llama, 1, tmp_path)
    assert shardstate.verify(entry, full=True).problems == ()


def test_engines_that_start_together_share_a_cache(llama, tmp_path):
    """Two of each rank at once; nobody waits, and what is left is one whole set."""

    def start(rank):
        assert fill_cache(llama, rank, tmp_path) == expected(llama, rank)
        os._exit(0)

    children = []
    for rank in (0, 1, 0, 1):
        if not (child := os.fork()):
            try:
                torch.set_num_threads(1)
                start(rank)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    (entry,) = tmp_path.iterdir()
    assert shardstate.verify(entry, full=True).problems == ()
