"""Signing, refusing and repairing sets on a real store, as on disk."""

import json
import shutil

import pytest
from test_commands import files, flags, objects, same_arrays, upload

import shardstate
from checkpoints import flip_bit, place_of, write_llama
from shardstate.cli.main import run
from shardstate.errors import DamageError, SetError, SignatureError, UsageError
from shardstate.signing import checking_key
from shardstate.storage import Access
from signers import write_pairs
from test_verify import forge, reseal

MANIFEST, SIGNATURE = "shardstate.json", "shardstate.json.sig"
R1, RECORD1 = "model-rank-1-part-0.safetensors", "shardstate.rank-1.json"
PROVENANCE = "shardstate.rank-0.provenance.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory with two keys: `own` and `other`, each with its public one."""
    return write_pairs(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", layers=1)


@pytest.fixture(scope="module")
def stored(source, s3):
    """The same checkpoint in a bucket."""
    upload(s3, source, "source-of-signed")
    return "s3://bucket/source-of-signed"


@pytest.fixture(scope="module")
def unsigned(stored, s3, tmp_path_factory):
    """A set on disk that was made from the store."""
    out = tmp_path_factory.mktemp("unsigned") / "set"
    shardstate.shard(stored, out, tp=2, access=Access(timeout=10, options=s3.options))
    return out


@pytest.fixture(scope="module")
def sound(unsigned, keys, tmp_path_factory):
    """The same, signed."""
    out = shutil.copytree(unsigned, tmp_path_factory.mktemp("signed") / "set")
    shardstate.sign(out, key=keys / "own")
    return out


@pytest.fixture
def access(s3):
    return Access(timeout=10, options=s3.options)


@pytest.fixture
def url(s3, sound, folder):
    """A signed set in a bucket."""
    upload(s3, sound, folder)
    return f"s3://bucket/{folder}"


def problems(path, **options):
    return [(p.kind, p.file) for p in shardstate.verify(path, **options).problems]


class TestSigning:
    def test_on_a_store_gives_what_it_gives_on_disk(
        self, s3, unsigned, sound, keys, access, folder, capsys
    ):
        upload(s3, unsigned, folder)
        url = f"s3://bucket/{folder}"
        own = checking_key(keys / "own.pub")
        assert run(["sign", url, "--key", str(keys / "own"), "--json", *flags(access)]) == 0
        assert json.loads(capsys.readouterr().out)["signed_by"] == own
        assert objects(s3, folder) == files(sound)
        report = shardstate.verify(url, key=keys / "own.pub", full=True, access=access)
        assert (report.problems, report.signed_by) == ((), own)
        shardstate.sign(url, key=keys / "other", access=access)
        assert problems(url, key=keys / "other.pub", access=access) == []
        assert problems(url, key=keys / "own.pub", access=access) == [("digest", SIGNATURE)]

    def test_a_damaged_set_is_not_signed(self, s3, unsigned, keys, access, folder):
        upload(s3, unsigned, folder)
        s3.request("PUT", f"/bucket/{folder}/config.json", b"{}")
        before = objects(s3, folder)
        report = shardstate.sign(f"s3://bucket/{folder}", key=keys / "own", access=access)
        assert [p.file for p in report.problems] == ["config.json"]
        assert objects(s3, folder) == before

    @pytest.mark.parametrize("rank", [0, 1])
    def test_what_the_key_signed_is_loaded(self, url, sound, keys, access, rank, tmp_path):
        expected = shardstate.load(sound, rank=rank)
        cached = Access(timeout=10, options=access.options, cache=str(tmp_path / "cache"))
        for way in (access, cached, cached):
            found = shardstate.load(url, rank=rank, key=keys / "own.pub", access=way)
            same_arrays(found, expected)
        arguments = ["--rank", str(rank), "--key", str(keys / "own.pub"), "--quiet"]
        assert run(["load", url, *arguments, *flags(access)]) == 0

    def test_a_copy_to_and_from_a_store_stays_signed(self, url, sound, keys, access, tmp_path):
        shardstate.copy(url, f"{url}-copy", access=access)
        shardstate.copy(f"{url}-copy", tmp_path / "back", access=access)
        assert files(tmp_path / "back") == files(sound)
        assert problems(f"{url}-copy", key=keys / "own.pub", access=access) == []

    @pytest.mark.parametrize("store", ["az", "gs"])
    def test_on_other_stores(self, unsigned, keys, azure, google, folder, store):
        token = {"base_url": google.endpoint, "bearer_token": "of the tests"}
        bucket, options = ("bucket", azure.options) if store == "az" else ("open", token)
        there, url = Access(timeout=10, options=options), f"{store}://{bucket}/{folder}"
        shardstate.copy(unsigned, url, access=there)
        shardstate.sign(url, key=keys / "own", access=there)
        assert problems(url, key=keys / "own.pub", full=True, access=there) == []
        assert problems(url, key=keys / "other.pub", access=there) == [("digest", SIGNATURE)]
        found = shardstate.load(url, rank=1, key=keys / "own.pub", access=there)
        same_arrays(found, shardstate.load(unsigned, rank=1))

    def test_replacing_a_signed_set_removes_the_signature(self, url, source, keys, access):
        shardstate.shard(source, url, tp=4, force=True, access=access)
        assert problems(url, key=keys / "own.pub", access=access) == [("missing", SIGNATURE)]


class TestWhereAKeyIsRequired:
    def refused(self, url, key, access, kind, file, capsys):
        assert (kind, file) in problems(url, key=key, access=access)
        with pytest.raises(SignatureError, match=file):
            shardstate.load(url, rank=0, key=key, access=access)
        more = ["--key", str(key), *flags(access)]
        assert run(["verify", url, *more, "--quiet"]) == 1
        assert run(["load", url, "--rank", "0", *more, "--quiet"]) == 1
        assert f"{url}/{file}: " in capsys.readouterr().err

    def test_an_unsigned_set_is_refused(self, s3, unsigned, keys, access, folder, capsys):
        upload(s3, unsigned, folder)
        url = f"s3://bucket/{folder}"
        self.refused(url, keys / "own.pub", access, "missing", SIGNATURE, capsys)

    def test_a_set_that_another_key_signed_is_refused(self, url, keys, access, capsys):
        self.refused(url, keys / "other.pub", access, "digest", SIGNATURE, capsys)

    def test_a_changed_manifest_is_refused(self, s3, sound, keys, access, folder, tmp_path, capsys):
        copy = shutil.copytree(sound, tmp_path / "copy")
        forge(copy, 1, R1, place_of(copy / R1, NORM)[0])
        upload(s3, copy, folder)
        url = f"s3://bucket/{folder}"
        self.refused(url, keys / "own.pub", access, "digest", MANIFEST, capsys)

    def test_data_are_hashed_while_they_are_loaded(
        self, s3, url, sound, keys, access, folder, tmp_path
    ):
        damage(s3, folder, sound, R1, "flip")
        with pytest.raises(DamageError, match="block 0 has digest"):
            shardstate.load(url, rank=1, key=keys / "own.pub", access=access)

    def test_what_is_no_set_is_refused(self, stored, keys, access):
        with pytest.raises(UsageError, match="is no set of shardstate"):
            shardstate.load(stored, rank=0, tp=2, key=keys / "own.pub", access=access)


def damage(server, folder, sound, name, how):
    """Damage an object of a set, past the client under test."""
    data = bytearray((sound / name).read_bytes())
    match how:
        case "flip":
            data[-1] ^= 1
        case "cut":
            del data[len(data) // 2 :]
    method = "DELETE" if how == "gone" else "PUT"
    assert server.request(method, f"/bucket/{folder}/{name}", bytes(data))[0] in (200, 204)


DAMAGED = {R1: "flip", RECORD1: "gone", PROVENANCE: "cut", "config.json": "flip", MANIFEST: "cut"}


class TestRepair:
    """From the recorded source and from copies, here and there; the signature stays valid."""

    @pytest.mark.parametrize("how", ["flip", "cut", "gone"])
    @pytest.mark.parametrize("name", [R1, RECORD1, PROVENANCE, "config.json", MANIFEST])
    def test_on_the_store_from_the_recorded_source_there(
        self, s3, url, sound, stored, keys, access, folder, name, how
    ):
        damage(s3, folder, sound, name, how)
        report = shardstate.verify(url, repair=True, key=keys / "own.pub", access=access)
        assert report.problems == ()
        origin = "the records" if name == MANIFEST else stored
        assert report.notes[0] == f"{name} was made again from {origin}"
        assert report.signed_by == checking_key(keys / "own.pub")
        assert objects(s3, folder) == files(sound)
        assert s3.uploads() == []

    @pytest.mark.parametrize("kind", ["source", "copy"])
    @pytest.mark.parametrize("place", ["disk", "store"])
    def test_on_the_store_from_what_is_named(
        self, s3, url, sound, source, stored, access, folder, kind, place
    ):
        upload(s3, sound, f"{folder}-copy")
        named = {
            ("source", "disk"): source,
            ("source", "store"): stored,
            ("copy", "disk"): sound,
            ("copy", "store"): f"s3://bucket/{folder}-copy",
        }[kind, place]
        for name, how in DAMAGED.items():
            # No source tells what a record was whose rank files are damaged as well.
            if kind == "copy" or name != RECORD1:
                damage(s3, folder, sound, name, how)
        assert run(["verify", url, "--repair", str(named), "--quiet", *flags(access)]) == 0
        assert objects(s3, folder) == files(sound)

    @pytest.mark.parametrize("copy", [False, True])
    def test_on_disk_from_the_store(self, s3, url, sound, access, copy, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        flip_bit(path / R1, place_of(path / R1, NORM)[0])
        for name in ("config.json", PROVENANCE, MANIFEST):
            (path / name).unlink()
        report = shardstate.verify(path, repair=url if copy else True, access=access)
        assert report.problems == ()
        assert files(path) == files(sound)

    def test_what_cannot_be_made_is_told_and_nothing_changes(
        self, s3, url, sound, stored, access, folder, capsys
    ):
        damage(s3, folder, sound, MANIFEST, "gone")
        assert run(["verify", url, *flags(access)]) == 2
        assert "verify --repair" in capsys.readouterr().err
        damage(s3, folder, sound, RECORD1, "gone")
        before = objects(s3, folder)
        with pytest.raises(SetError, match=f"cannot be made again: {RECORD1} is missing"):
            shardstate.verify(url, repair=stored, access=access)
        with pytest.raises(UsageError, match="cannot be repaired from itself"):
            shardstate.verify(url, repair=f"{url}/", access=access)
        assert objects(s3, folder) == before

    def test_a_signature_that_does_not_fit_stays_and_is_told(
        self, s3, sound, keys, access, folder, tmp_path
    ):
        copy = shutil.copytree(sound, tmp_path / "copy")
        reseal(copy / MANIFEST, lambda c: c["source"].update(location="/elsewhere"))
        shardstate.sign(copy, key=keys / "own")
        (copy / MANIFEST).unlink()
        upload(s3, copy, folder)
        url = f"s3://bucket/{folder}"
        assert problems(url, repair=True, access=access) == [("stale", SIGNATURE)]
        key = keys / "own.pub"
        assert problems(url, repair=True, key=key, access=access) == [("digest", MANIFEST)]
        assert objects(s3, folder) == files(sound) | {SIGNATURE: files(copy)[SIGNATURE]}
