"""Hub ids, through huggingface_hub itself, against its routes on loopback."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hubserver import TOKEN, hub_server

import shardstate
from checkpoints import tree, write_llama
from shardstate.cli.main import run
from shardstate.errors import PathNotFound, StorageError, Unreachable, UsageError
from shardstate.storage import Access, LocalStorage, storage_at
from shardstate.storage.adaptive import AdaptiveReader

SIZES = {"heads": 8, "kv_heads": 4, "head_dim": 16, "inner": 512, "vocab": 4096, "layers": 2}
QUICK = Access(timeout=3)


def files(folder):
    return {name: data for name, data in tree(folder).items() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", files=2, **SIZES)


@pytest.fixture(scope="module")
def on_disk(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "tp4"
    shardstate.shard(source, out, tp=4)
    return out


@pytest.fixture
def hub(source, on_disk, tmp_path, monkeypatch):
    """A hub that huggingface_hub takes for the real one; its cache is the test's own."""
    from huggingface_hub import constants

    repositories = {
        "org/llama": files(source),
        "org/llama-tp4": files(on_disk),
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"1" * 100},
    }
    with hub_server(repositories) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield server


def same_arrays(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert np.array_equal(found[name].view(np.uint8), array.view(np.uint8)), name


@pytest.mark.parametrize("path", ["org/llama", "hf://org/llama", "org/llama@main"])
def test_a_rank_of_an_ordinary_checkpoint_reads_only_its_ranges(hub, source, path):
    found = shardstate.load(path, rank=1, tp=4, access=QUICK)
    same_arrays(found, shardstate.load(source, rank=1, tp=4))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert hub.body_bytes < 0.7 * size


def test_a_rank_of_a_set_brings_its_own_files_into_the_hubs_cache(hub, on_disk, tmp_path):
    found = shardstate.load("org/llama-tp4", rank=2, verify=True, access=QUICK)
    same_arrays(found, shardstate.load(on_disk, rank=2))
    assert {name for name in hub.fetched() if name.startswith("model-")} == {
        "model-rank-2-part-0.safetensors"
    }
    snapshot = tmp_path / "cache/models--org--llama-tp4/snapshots" / hub.commit("org/llama-tp4")
    link = snapshot / "model-rank-2-part-0.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == (on_disk / link.name).read_bytes()


def test_the_local_cache_comes_first_and_serves_offline(hub, on_disk, monkeypatch):
    from huggingface_hub import constants

    first = shardstate.load("org/llama-tp4", rank=2, access=QUICK)
    hub.body_bytes = 0
    same_arrays(shardstate.load("org/llama-tp4", rank=2, access=QUICK), first)
    assert hub.body_bytes == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    same_arrays(shardstate.load("org/llama-tp4", rank=2, access=QUICK), first)
    assert hub.requests == []
    with pytest.raises(shardstate.ShardStateError, match=r"rank-1"):
        shardstate.load("org/llama-tp4", rank=1, access=QUICK)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        shardstate.load("org/llama", rank=0, tp=2, access=QUICK)


def test_what_the_local_cache_has_is_read_as_a_local_disk_is(hub, on_disk, capsys):
    with contextlib.closing(storage_at("org/llama-tp4", QUICK)) as storage:
        assert storage.traits.remote
        for name in storage.entries():
            storage.fetched([name])
        assert storage.traits == LocalStorage.traits
        storage.expect({"model-rank-2-part-0.safetensors": 1})
        assert isinstance(storage.reader(2), AdaptiveReader)
    assert run(["bench", "org/llama-tp4", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "measured where the hub's cache has it" in report["notes"][0]
    assert {each["state"] for each in report["measured"]} >= {"warm"}


def test_a_hub_that_is_gone_leaves_the_local_cache_and_says_so(hub, caplog):
    first = shardstate.load("org/llama-tp4", rank=2, access=QUICK)
    hub.down = True
    quick = Access(timeout=1)
    same_arrays(shardstate.load("org/llama-tp4", rank=2, access=quick), first)
    assert "the local cache has commit" in caplog.text
    with pytest.raises(Unreachable, match="check HF_ENDPOINT"):
        shardstate.load("org/llama", rank=0, tp=2, access=quick)


def test_sharding_from_the_hub_names_the_commit(hub, source, tmp_path):
    shardstate.shard("org/llama", tmp_path / "out", tp=2, access=QUICK)
    manifest = json.loads((tmp_path / "out" / "shardstate.json").read_text())
    assert manifest["source"]["location"] == "hf://org/llama"
    assert manifest["source"]["revision"] == hub.commit("org/llama")
    assert shardstate.verify(tmp_path / "out", against=source).problems == ()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()


def test_copying_ranks_from_the_hub(hub, on_disk, tmp_path):
    shardstate.copy("org/llama-tp4", tmp_path / "out", ranks=[3], access=QUICK)
    assert shardstate.load(tmp_path / "out", rank=3, verify=True)
    assert "model-rank-0-part-0.safetensors" not in hub.fetched()
    shardstate.copy("org/llama", tmp_path / "all", access=QUICK)


def test_a_pinned_commit(hub):
    commit = hub.commit("org/llama")
    assert shardstate.open(f"org/llama@{commit}", access=QUICK).catalog is not None
    with pytest.raises(PathNotFound, match="no such revision"):
        shardstate.open("org/llama@nonesuch", access=QUICK)


def test_private_and_missing_repositories(hub, monkeypatch):
    with pytest.raises(PathNotFound, match="no such repository, or it is private"):
        shardstate.open("org/nothing", access=QUICK)
    hub.private.add("org/llama")
    with pytest.raises(PathNotFound, match="HF_TOKEN"):
        shardstate.open("org/llama", access=QUICK)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = shardstate.load("org/llama", rank=1, tp=4, access=QUICK)
    assert found
    assert TOKEN not in repr(storage_at("org/llama", QUICK))


def test_pickles_are_refused(hub, capsys):
    assert run(["load", "org/pickles", "--rank", "0", "--tp", "2"]) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error
    assert "convert" in error


def test_ignored_files_are_not_seen(hub):
    access = Access(timeout=3, ignore_patterns=("tokenizer*",))
    assert "tokenizer.json" not in storage_at("org/llama", access).entries()


def test_what_exists_here_wins_and_typing_errors_ask_nobody(hub, tmp_path, source):
    hub.requests.clear()
    (tmp_path / "org").mkdir()
    with pytest.raises(PathNotFound, match="no such directory"):
        shardstate.open("org/llama", access=QUICK)
    for text in ("llama", "a/b/c", "../x/y", "/a/b"):
        with pytest.raises(PathNotFound):
            shardstate.open(text, access=QUICK)
    assert hub.requests == []


def test_the_hub_is_not_written_to(hub, source):
    with pytest.raises(UsageError, match="can only be read"):
        shardstate.shard(source, "hf://org/new", tp=2)


def test_a_gated_repository(hub, monkeypatch):
    from huggingface_hub import HfApi, errors

    class Answer:
        status_code = 403

    def gated(*_args, **_kwargs):
        error = errors.GatedRepoError.__new__(errors.GatedRepoError)
        error.response = Answer()
        raise error

    monkeypatch.setattr(HfApi, "model_info", gated)
    with pytest.raises(StorageError, match="gated; accept its terms"):
        shardstate.open("org/llama", access=QUICK)


def test_links_of_the_hubs_cache_are_followed_as_a_directory(hub, tmp_path, source):
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download("org/llama"))
    assert any(os.path.islink(folder / name) for name in os.listdir(folder))
    same_arrays(shardstate.load(folder, rank=0, tp=2), shardstate.load(source, rank=0, tp=2))
