"""Signatures and known digests: what a set has to show where a key is required."""

import json
import shutil
import subprocess

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

import shardstate
from checkpoints import flip_bit, place_of, tree, write_llama, write_vllm_set
from shardstate.cli.main import run
from shardstate.digest import digest_of
from shardstate.errors import (
    DamageError,
    InputError,
    PathNotFound,
    SignatureError,
    TargetBusy,
    UsageError,
)
from shardstate.manifest import seal
from shardstate.signing import checking_key, parse_signature
from shardstate.storage import LocalStorage
from shardstate.torch import load_model
from signers import PEM, write_key, write_pairs
from test_verify import forge, reseal

R0 = "model-rank-0-part-0.safetensors"
NORM = "model.norm.weight"
SSH = serialization.Encoding.OpenSSH


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory with two keys: `own` and `other`, each with its public one."""
    return write_pairs(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("signing") / "llama", layers=1)


@pytest.fixture(scope="module")
def unsigned(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("signing") / "set"
    shardstate.shard(source, out, tp=2)
    return out


@pytest.fixture(scope="module")
def sound(unsigned, keys, tmp_path_factory):
    out = shutil.copytree(unsigned, tmp_path_factory.mktemp("signing") / "signed")
    shardstate.sign(out, key=keys / "own")
    return out


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "set")


def problems(path, **options):
    return [(p.kind, p.file) for p in shardstate.verify(path, **options).problems]


class TestSigning:
    def test_a_signed_set_passes_with_either_half_of_the_key(self, sound, keys):
        for name in ("own", "own.pub"):
            report = shardstate.verify(sound, key=keys / name, full=True)
            assert report.problems == ()
            assert report.signed_by == checking_key(keys / "own.pub")
        assert shardstate.load(sound, rank=1, key=keys / "own.pub")[NORM].shape == (32,)

    def test_the_signature_is_the_only_file_that_is_added(self, sound, unsigned):
        assert {**tree(unsigned), "shardstate.json.sig": tree(sound)["shardstate.json.sig"]} == (
            tree(sound)
        )

    def test_literal_bytes_of_a_signature(self, unsigned, keys, tmp_path):
        path = shutil.copytree(unsigned, tmp_path / "set")
        report = shardstate.sign(path, key=keys / "own")
        manifest = (path / "shardstate.json").read_bytes()
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
        expected = {
            "version": 1,
            "algorithm": "ed25519",
            "manifest": digest_of(manifest),
            "key": key.public_key().public_bytes_raw().hex(),
            "signature": key.sign(manifest).hex(),
        }
        assert (path / "shardstate.json.sig").read_bytes() == seal(expected)
        assert (report.signed_by, report.digest) == (
            expected["key"], json.loads(manifest)["digest"]
        )  # fmt: skip

    def test_openssl_agrees(self, sound, keys, tmp_path):
        said = parse_signature((sound / "shardstate.json.sig").read_bytes(), file="s")
        (tmp_path / "raw").write_bytes(bytes.fromhex(said.signature))
        arguments = ["-pubin", "-inkey", keys / "own.pub", "-in", sound / "shardstate.json"]
        done = subprocess.run(
            ["openssl", "pkeyutl", "-verify", "-rawin", "-sigfile", tmp_path / "raw", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def test_again_with_another_key_replaces_the_signature(self, copy, keys):
        shardstate.sign(copy, key=keys / "other")
        assert problems(copy, key=keys / "other.pub") == []
        assert problems(copy, key=keys / "own") == [("digest", "shardstate.json.sig")]
        assert shardstate.verify(copy, key=keys / "own").signed_by is None

    def test_a_signature_is_only_claimed_where_no_key_is_required(self, sound):
        report = shardstate.verify(sound)
        assert report.signed_by is None
        assert "says it is signed by key" in report.notes[0]

    def test_a_damaged_set_is_not_signed(self, unsigned, keys, tmp_path):
        path = shutil.copytree(unsigned, tmp_path / "set")
        flip_bit(path / "config.json", 4)
        before = tree(path)
        assert [p.file for p in shardstate.sign(path, key=keys / "own").problems] == ["config.json"]
        assert run(["sign", str(path), "--key", str(keys / "own"), "--quiet"]) == 1
        assert tree(path) == before

    def test_waits_for_no_writer(self, copy, keys):
        with LocalStorage(copy) as storage, storage.lock():
            with pytest.raises(TargetBusy):
                shardstate.sign(copy, key=keys / "own")

    def test_what_is_no_set_cannot_be_signed(self, source, keys, tmp_path):
        with pytest.raises(InputError, match="is no set of shardstate"):
            shardstate.sign(source, key=keys / "own")
        with pytest.raises(InputError, match="is no set of shardstate"):
            shardstate.sign(write_vllm_set(tmp_path / "vllm", tp=1), key=keys / "own")

    def test_sharding_a_signed_set_again_leaves_it_signed(self, source, copy, keys):
        shardstate.shard(source, copy, tp=2)
        assert problems(copy, key=keys / "own") == []

    def test_replacing_a_signed_set_removes_the_signature(self, source, copy, keys):
        shardstate.shard(source, copy, tp=4, force=True)
        assert problems(copy, key=keys / "own") == [("missing", "shardstate.json.sig")]


class TestWhereAKeyIsRequired:
    """Each way of loading and checking refuses what the key did not sign."""

    def refused(self, path, key, kind, file):
        found = shardstate.verify(path, key=key).problems
        assert (kind, file) in [(p.kind, p.file) for p in found]
        with pytest.raises(SignatureError) as error:
            shardstate.load(path, rank=0, key=key)
        assert file in str(error.value)
        assert isinstance(error.value, DamageError)
        with pytest.raises(SignatureError):
            load_model({NORM: torch.empty(32, dtype=torch.bfloat16)}, path, key=key)
        assert run(["verify", str(path), "--key", str(key), "--quiet"]) == 1
        assert run(["load", str(path), "--rank", "0", "--key", str(key), "--quiet"]) == 1

    def test_an_unsigned_set_is_refused(self, unsigned, keys):
        self.refused(unsigned, keys / "own.pub", "missing", "shardstate.json.sig")

    def test_a_set_that_another_key_signed_is_refused(self, sound, keys):
        self.refused(sound, keys / "other.pub", "digest", "shardstate.json.sig")

    def test_a_manifest_that_was_changed_with_its_digest_is_refused(self, copy, keys):
        reseal(copy / "shardstate.json", lambda c: c["source"].update(location="/elsewhere"))
        assert problems(copy) == [("stale", "shardstate.json.sig")]
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json")

    def test_weights_that_were_changed_with_all_digests_are_refused(self, copy, keys):
        forge(copy, 0, R0, place_of(copy / R0, NORM)[0])
        (copy / "shardstate.json.sig").unlink()
        assert problems(copy, full=True) == []  # digests alone detect no tampering
        self.refused(copy, keys / "own.pub", "missing", "shardstate.json.sig")

    def test_the_signature_of_another_set_is_refused(self, copy, source, keys, tmp_path):
        shardstate.shard(source, tmp_path / "other", tp=4)
        shardstate.sign(tmp_path / "other", key=keys / "own")
        shutil.copy(tmp_path / "other" / "shardstate.json.sig", copy)
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json")

    def test_a_forged_key_id_does_not_help(self, copy, keys):
        shardstate.sign(copy, key=keys / "other")
        own = checking_key(keys / "own.pub")
        reseal(copy / "shardstate.json.sig", lambda c: c.update(key=own))
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json")

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"null"])
    def test_a_signature_that_is_none_is_refused(self, content, copy, keys):
        (copy / "shardstate.json.sig").write_bytes(content)
        assert problems(copy) == [("digest", "shardstate.json.sig")]
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json.sig")

    def test_a_signature_that_is_huge_or_no_file_is_refused(self, copy, keys):
        name = copy / "shardstate.json.sig"
        name.write_bytes(bytes(1 << 20))
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json.sig")
        name.unlink()
        name.mkdir()
        self.refused(copy, keys / "own.pub", "digest", "shardstate.json.sig")

    def test_an_uncommitted_set_is_refused(self, copy, keys):
        (copy / "shardstate.json").unlink()
        with pytest.raises(SignatureError, match="not committed"):
            shardstate.load(copy, rank=0, key=keys / "own.pub")

    def test_what_is_no_set_is_refused(self, source, keys, tmp_path):
        vllm = write_vllm_set(tmp_path / "vllm", tp=1)
        for path in (source, vllm):
            with pytest.raises(UsageError, match="is no set of shardstate"):
                shardstate.load(path, rank=0, tp=1, key=keys / "own.pub")
            with pytest.raises(UsageError, match="is no set of shardstate"):
                shardstate.verify(path, key=keys / "own.pub")

    def test_data_are_hashed_while_they_are_loaded(self, copy, keys):
        flip_bit(copy / R0, place_of(copy / R0, NORM)[0])
        with pytest.raises(DamageError, match="block 0 has digest"):
            shardstate.load(copy, rank=0, key=keys / "own.pub")
        with pytest.raises(UsageError, match="map"):
            shardstate.load(copy, rank=0, key=keys / "own.pub", map=True)


class TestAKnownDigest:
    def test_either_digest_of_the_manifest_is_taken(self, unsigned):
        data = (unsigned / "shardstate.json").read_bytes()
        own = json.loads(data)["digest"]
        assert shardstate.inspect(unsigned).digest == own
        for digest in (own, own.upper(), digest_of(data)):
            assert problems(unsigned, digest=digest) == []

    def test_another_one_is_a_problem(self, unsigned):
        assert problems(unsigned, digest="0" * 64) == [("digest", "shardstate.json")]
        arguments = ["verify", str(unsigned), "--digest", "0" * 64, "--quiet"]
        assert run(arguments) == 1

    def test_a_damaged_manifest_is_not_excused_by_the_digest_it_ends_with(self, unsigned, tmp_path):
        path = shutil.copytree(unsigned, tmp_path / "set")
        own = json.loads((path / "shardstate.json").read_bytes())["digest"]
        flip_bit(path / "shardstate.json", 30)
        assert len(problems(path, digest=own)) == 2

    @pytest.mark.parametrize("digest", ["", "0" * 63, "g" * 64, "0" * 64 + "\n"])
    def test_what_is_no_digest_is_wrong_usage(self, digest, unsigned):
        with pytest.raises(UsageError, match="expected 64 hex digits"):
            shardstate.verify(unsigned, digest=digest)


class TestKeys:
    def test_openssh_keys_do_as_well(self, unsigned, tmp_path):
        key = ed25519.Ed25519PrivateKey.generate()
        private = write_key(tmp_path / "k", key, PEM, serialization.PrivateFormat.OpenSSH)
        public = tmp_path / "k.pub"
        public.write_bytes(key.public_key().public_bytes(SSH, serialization.PublicFormat.OpenSSH))
        path = shutil.copytree(unsigned, tmp_path / "set")
        shardstate.sign(path, key=private)
        assert problems(path, key=public) == []

    def test_what_is_no_key_of_that_kind_is_refused(self, unsigned, keys, tmp_path):
        other = write_key(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
        locked = write_key(
            tmp_path / "locked",
            ed25519.Ed25519PrivateKey.generate(),
            how=serialization.BestAvailableEncryption(b"x"),
        )
        (tmp_path / "text").write_text("no key")
        for path, error, says in (
            (other, InputError, "is a key of another kind; expected an Ed25519 key"),
            (locked, UsageError, "is encrypted"),
            (tmp_path / "text", InputError, "is no key; expected an Ed25519 key"),
            (tmp_path / "nowhere", PathNotFound, "check the path"),
        ):
            with pytest.raises(error, match=says):
                shardstate.verify(unsigned, key=path)
            with pytest.raises(error, match=says):
                shardstate.sign(unsigned, key=path)
        with pytest.raises(UsageError, match="is a public key; signing takes the private one"):
            shardstate.sign(unsigned, key=keys / "own.pub")

    def test_another_algorithm_is_refused(self, copy):
        reseal(copy / "shardstate.json.sig", lambda c: c.update(algorithm="none"))
        assert problems(copy) == [("digest", "shardstate.json.sig")]
