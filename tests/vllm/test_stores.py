"""Engines of two ranks whose weights lie in an object store, or on a hub: the same tokens."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "stores"))

import zoo
from hubserver import hub_server
from servers import seaweedfs

from test_engine import modes, shard, start


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "llama"
    zoo.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def expected(llama):
    return start(llama, "auto")[0]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def upload(server, folder, prefix):
    for name, data in files_of(folder).items():
        assert server.request("PUT", f"/bucket/{prefix}/{name}", data)[0] == 200


@pytest.mark.parametrize("layout", ["ordinary", "vllm"])
def test_from_a_store(layout, llama, expected, s3, tmp_path):
    source = llama
    if layout == "vllm":
        source = tmp_path / "set"
        shard(llama, source, "--tp", "2", "--layout", "vllm")
    upload(s3, source, layout)
    extra = {"source": f"s3://bucket/{layout}", "store_options": s3.options}
    if layout == "ordinary":
        extra["cache"] = str(tmp_path / "cache")
    tokens, log = start(llama, "shardstate", extra=extra)
    mode = "recorded" if layout == "ordinary" else "sharded"
    assert (tokens, modes(log)) == (expected, {"0": mode, "1": mode})
    assert s3.options["secret_access_key"] not in log.split("non-default args")[0]
    if layout == "ordinary":
        tokens, log = start(llama, "shardstate", extra=extra)
        assert (tokens, modes(log)) == (expected, {"0": "cached", "1": "cached"})


def test_from_the_hub_each_worker_brings_its_own_files(llama, expected, tmp_path):
    out = tmp_path / "set"
    shard(llama, out, "--tp", "2", "--layout", "vllm")
    with hub_server({"org/model": files_of(out), "org/plain": files_of(llama)}) as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub")}
        env |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # other tests here set them
        for name, mode in (("org/model", "sharded"), ("org/plain", "recorded")):
            extra = {"source": name}
            tokens, log = start(llama, "shardstate", extra=extra, env=env)
            assert (tokens, modes(log)) == (expected, {"0": mode, "1": mode})
    cached = {path.name for path in (tmp_path / "hub").rglob("model-rank-*")}
    assert cached == {f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)}


def test_sharding_from_a_store_for_an_engine_that_is_nowhere(llama, expected, s3, tmp_path):
    upload(s3, llama, "plain")
    options = [f"--store-option={key}={value}" for key, value in s3.options.items()]
    shard("s3://bucket/plain", tmp_path / "set", "--tp", "2", "--layout", "vllm", *options)
    shard(llama, tmp_path / "local", "--tp", "2", "--layout", "vllm")
    ranks = sorted((tmp_path / "set").glob("model-rank-*"))
    assert [file.read_bytes() for file in ranks] == [
        file.read_bytes() for file in sorted((tmp_path / "local").glob("model-rank-*"))
    ]
