"""What vLLM's loader refuses: damage, what no key signed, files that change, code of a model."""

import json
import os
import shutil
import signal

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_loader import expected, fill_cache, llama, loaded, loader, log, mode_of, offline, raw

import shardstate
from checkpoints import flip_bit, tree
from crashing import die_at
from shardstate.errors import ChangedFile, DamageError, SignatureError, UsageError
from shardstate.storage.adaptive import AdaptiveReader

__all__ = ["llama", "log", "offline"]  # fixtures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys")
    for seed, name in enumerate(("own", "other"), 1):
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))
        (path / name).write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
    return path


@pytest.fixture(params=["vllm", "rules"])
def signed(request, llama, keys, tmp_path):
    """A set of each layout: what vLLM loads as it is, and what it reads as a source."""
    out = tmp_path / "signed"
    shardstate.shard(llama, out, tp=2, layout=request.param)
    shardstate.sign(out, key=keys / "own")
    return out


def last_byte(path, rank):
    name = path / f"model-rank-{rank}-part-0.safetensors"
    return name, name.stat().st_size - 1


def test_a_signed_set_loads_and_says_that_it_was_verified(signed, llama, keys, log):
    assert raw(loaded(signed, 1, key=str(keys / "own"))) == expected(llama, 1)
    assert "verify=yes" in log.text


def test_what_the_key_did_not_sign_is_refused(signed, llama, offline, keys):
    for path in (signed, offline):
        with pytest.raises(SignatureError):
            loaded(path, 0, key=str(keys / "other"))
    with pytest.raises(UsageError, match="a key is required"):
        loaded(llama, 0, key=str(keys / "own"))


@pytest.mark.parametrize("how", ["verify", "key"])
def test_a_flipped_bit_is_found_before_the_model_is_used(how, signed, keys):
    flip_bit(*last_byte(signed, 0))
    more = {"verify": True} if how == "verify" else {"key": str(keys / "own")}
    with pytest.raises(DamageError, match=r"model-rank-0-part-0\.safetensors"):
        loaded(signed, 0, **more)


@pytest.mark.parametrize("more", [{"verify": True}, {"key": "/k"}])
def test_a_backend_that_hashes_nothing_is_refused(more):
    with pytest.raises(UsageError, match="verify and key need backend native"):
        loader(backend="safetensors", **more)


@pytest.mark.parametrize("layout", ["ordinary", "vllm", "rules"])
def test_a_file_that_is_overwritten_while_it_is_read_is_named(
    layout, llama, offline, tmp_path, monkeypatch
):
    path = tmp_path / "copy"
    if layout == "rules":
        shardstate.shard(llama, path, tp=2, layout="rules")
    else:
        shutil.copytree({"ordinary": llama, "vllm": offline}[layout], path)
    original, done = AdaptiveReader.read_into, []

    def read_into(self, name, begin, views, arrived=None):
        if name.endswith(".safetensors") and begin > 8 and not done:
            done.append(name)
            with open(path / name, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
        return original(self, name, begin, views, arrived)

    monkeypatch.setattr(AdaptiveReader, "read_into", read_into)
    with pytest.raises(ChangedFile) as error:
        loaded(path, 0)
    assert done[0] in str(error.value)


def test_a_worker_killed_at_any_change_of_the_cache_harms_nobody(llama, memory_path, log):
    """Kill -9 before the first, second, … write, fsync or rename of the cache's writer."""
    want = expected(llama, 0)
    for number in range(1, 300):
        cache = memory_path / "cache"
        if not (child := os.fork()):
            try:
                torch.set_num_threads(1)
                die_at(number)
                fill_cache(llama, 0, cache)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert fill_cache(llama, 0, cache) == want
        assert raw(loaded(llama, 0, cache=str(cache))) == want
        assert mode_of(log) == "cached"
        (entry,) = cache.iterdir()
        left = [name for name in os.listdir(entry) if name.startswith(".shardstate-new")]
        assert left == []
        shutil.rmtree(cache)
        if not status:
            break
        assert status == -signal.SIGKILL
    assert number > 10


def test_every_file_of_a_set_is_made_again_from_its_source(llama, offline, tmp_path):
    path = shutil.copytree(offline, tmp_path / "set")
    for name in sorted(os.listdir(offline)):
        os.truncate(path / name, (path / name).stat().st_size // 2)
        assert shardstate.verify(path, repair=llama).problems == (), name
        assert tree(path) == tree(offline), name


def test_code_of_a_model_is_not_run(llama, tmp_path, monkeypatch):
    """`auto_map` without vLLM's own flag: the loader imports nothing from the checkpoint."""
    path = shutil.copytree(llama, tmp_path / "evil")
    (path / "modeling_evil.py").write_text("raise SystemExit('code was run')")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "set"
    shardstate.shard(path, out, tp=2, layout="vllm")
    assert raw(loaded(path, 0)) == expected(llama, 0) == raw(loaded(out, 0))
    assert not (tmp_path / "pwned").exists()
