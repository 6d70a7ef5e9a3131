"""`verify --repair`: makes just the damaged files again."""

import json
import os
import shutil

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519

import shardstate
from checkpoints import (
    Stored,
    flip_bit,
    identities,
    place_of,
    safetensors_bytes,
    tree,
    write_llama,
    write_vllm_set,
)
from shardstate.cli.main import run
from shardstate.errors import InputError, PathNotFound, SetError, TargetBusy, UsageError
from shardstate.storage import LocalStorage
from shardstate.torch import save_model
from signers import write_key, write_public
from test_verify import forge, reseal

MANIFEST, SIGNATURE = "shardstate.json", "shardstate.json.sig"
RECORD0, RECORD1 = "shardstate.rank-0.json", "shardstate.rank-1.json"
R0, R1 = "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("repair") / "llama", layers=1)


@pytest.fixture(scope="module", params=["one part", "parts", "cast"])
def sound(request, source, tmp_path_factory):
    """A set of two ranks; each rank file is padded, and one tensor too."""
    out = tmp_path_factory.mktemp("repair") / "set"
    more = {"one part": {}, "parts": {"max_part_size": 6000}, "cast": {"dtype": "f32"}}
    shardstate.shard(source, out, tp=2, **more[request.param])
    return out


@pytest.fixture(scope="module")
def simple(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("repair") / "set"
    shardstate.shard(source, out, tp=2)
    return out


@pytest.fixture
def copy(simple, tmp_path):
    return shutil.copytree(simple, tmp_path / "set")


def damage(path, how):
    match how:
        case "flip":
            flip_bit(path, path.stat().st_size // 2, 3)
        case "last bit":
            flip_bit(path, path.stat().st_size - 1, 7)
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "longer":
            os.truncate(path, path.stat().st_size + 1)
        case "empty":
            os.truncate(path, 0)
        case "gone":
            path.unlink()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory with a key and its public one."""
    path, key = tmp_path_factory.mktemp("keys"), ed25519.Ed25519PrivateKey.generate()
    write_key(path / "key", key)
    write_public(path / "key.pub", key)
    return path


HOW = ["flip", "last bit", "cut", "longer", "empty", "gone"]


class TestEachFile:
    @pytest.mark.parametrize("how", HOW)
    def test_is_made_again_from_the_recorded_source_and_nothing_else_is(self, how, sound, tmp_path):
        names = [name for name in tree(sound) if not name.endswith("/")]
        path = shutil.copytree(sound, tmp_path / "set")
        for name in names:
            damage(path / name, how)
            others = [other for other in names if other != name]
            before = identities(path, others)
            report = shardstate.verify(path, repair=True)
            assert report.problems == (), name
            assert report.notes[0].startswith(f"{name} was made again from ")
            assert report.bytes_written == (sound / name).stat().st_size
            assert tree(path) == tree(sound), name
            assert identities(path, others) == before

    def test_is_made_again_from_another_copy(self, sound, tmp_path):
        names = [name for name in tree(sound) if not name.endswith("/")]
        path = shutil.copytree(sound, tmp_path / "set")
        for i, name in enumerate(names):
            damage(path / name, HOW[i % len(HOW)])
            assert shardstate.verify(path, repair=sound).problems == (), name
            assert tree(path) == tree(sound), name

    def test_of_many_damaged_ones_at_once(self, sound, source, tmp_path):
        names = [name for name in tree(sound) if not name.endswith("/")]
        path = shutil.copytree(sound, tmp_path / "set")
        for name in names:
            if "rank-1" in name and name.endswith(".json") and "prov" not in name:
                continue  # a record cannot be made without its rank files, nor they without it
            if name != "shardstate.rank-0.json":
                damage(path / name, "flip")
        report = shardstate.verify(path, repair=source)
        assert report.problems == ()
        assert tree(path) == tree(sound)

    def test_swapped_files_are_put_right(self, copy, simple):
        (copy / R0).rename(copy / "x")
        (copy / R1).rename(copy / R0)
        (copy / "x").rename(copy / R1)
        assert shardstate.verify(copy, repair=True).problems == ()
        assert tree(copy) == tree(simple)

    def test_a_stale_file_is_replaced(self, copy, simple, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        shardstate.shard(other, tmp_path / "set5", tp=2)
        for name in (R1, "shardstate.rank-1.json", "config.json"):
            shutil.copy(tmp_path / "set5" / name, copy / name)
        assert shardstate.verify(copy, repair=simple).problems == ()
        assert tree(copy) == tree(simple)

    def test_what_nothing_lists_is_left_and_told(self, copy):
        (copy / "model-rank-9-part-0.safetensors").write_bytes(
            safetensors_bytes({"x": Stored("U8", (1,), b"1")})
        )
        damage(copy / R0, "flip")
        (problem,) = shardstate.verify(copy, repair=True).problems
        assert (problem.kind, problem.file) == ("extra", "model-rank-9-part-0.safetensors")

    def test_nothing_is_written_where_nothing_is_wrong(self, copy):
        before = identities(copy, os.listdir(copy))
        report = shardstate.verify(copy, repair="/nowhere")
        assert report.problems == ()
        assert identities(copy, os.listdir(copy)) == before

    def test_by_the_command_line(self, copy, simple, source, capsys):
        damage(copy / R0, "flip")
        assert run(["verify", str(copy), "--repair", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["problems"] == []
        assert f"{R0} was made again from {source}" in answer["notes"]
        damage(copy / R0, "flip")
        assert run(["verify", "--repair", str(simple), str(copy)]) == 0
        assert f"{R0} was made again from {simple}" in capsys.readouterr().out
        damage(copy / R0, "flip")
        assert run(["verify", str(copy), "--full"]) == 1
        assert "verify --repair" in capsys.readouterr().out
        assert tree(copy) != tree(simple)


class TestTheManifest:
    """It is a function of the records: lost or damaged, it needs neither source nor copy."""

    @pytest.mark.parametrize("how", HOW)
    def test_of_a_saved_module_is_made_again_from_the_records(self, how, tmp_path):
        path = tmp_path / "set"
        save_model({"a": torch.arange(5000.0), "b": torch.zeros(3)}, path)
        before, others = tree(path), identities(path, [R0, RECORD0])
        damage(path / MANIFEST, how)
        report = shardstate.verify(path, repair=True)
        assert report.problems == ()
        assert report.notes == (f"{MANIFEST} was made again from the records",)
        assert report.bytes_written == len(before[MANIFEST])
        assert tree(path) == before
        assert identities(path, [R0, RECORD0]) == others

    def test_comes_first_and_the_rest_of_the_repair_goes_on(self, copy, simple):
        for name in (R1, "config.json", "shardstate.rank-0.provenance.json"):
            damage(copy / name, "flip")
        damage(copy / MANIFEST, "gone")
        report = shardstate.verify(copy, repair=True, ranks=[1])
        assert (report.problems, tree(copy)[R1]) == ((), tree(simple)[R1])
        assert shardstate.verify(copy, repair=True).problems == ()
        assert tree(copy) == tree(simple)

    def test_by_the_command_line_as_verify_says(self, copy, simple, tmp_path, capsys):
        for how, status in (("gone", 2), ("cut", 1), ("flip", 1)):
            damage(copy / MANIFEST, how)
            assert run(["verify", str(copy)]) == status
            said = capsys.readouterr()
            assert "from the records" in said.out + said.err
            assert "(verify --repair)" in said.out + said.err
            assert run(["verify", str(copy), "--repair"]) == 0
            assert f"{MANIFEST} was made again from the records" in capsys.readouterr().out
            assert tree(copy) == tree(simple)
        damage(copy / MANIFEST, "gone")
        with pytest.raises(SetError, match=r"\(verify --repair\)"):
            shardstate.copy(copy, tmp_path / "elsewhere")

    @pytest.mark.parametrize("how", ["gone", "flip"])
    def test_a_signature_that_fits_stays_valid(self, how, copy, keys):
        shardstate.sign(copy, key=keys / "key")
        before = tree(copy)
        damage(copy / MANIFEST, how)
        report = shardstate.verify(copy, repair=True, key=keys / "key.pub")
        assert report.problems == ()
        assert report.signed_by is not None
        assert tree(copy) == before

    def test_a_signature_that_does_not_fit_stays_and_is_told(self, copy, simple, keys):
        reseal(copy / MANIFEST, lambda c: c["source"].update(location="/elsewhere"))
        shardstate.sign(copy, key=keys / "key")
        signature = tree(copy)[SIGNATURE]
        damage(copy / MANIFEST, "gone")
        (problem,) = shardstate.verify(copy, repair=True).problems
        assert (problem.kind, problem.file) == ("stale", SIGNATURE)
        (problem,) = shardstate.verify(copy, repair=True, key=keys / "key.pub").problems
        assert (problem.kind, problem.file) == ("digest", MANIFEST)
        assert "is not what key" in problem.problem
        assert tree(copy) == {**tree(simple), SIGNATURE: signature}

    @pytest.mark.parametrize(
        ("how", "says"), [("gone", "is missing; write that rank"), ("flip", "is damaged; write")]
    )
    def test_where_a_record_lacks_too_wants_a_copy(self, how, says, copy, simple, source):
        damage(copy / RECORD1, how)
        damage(copy / MANIFEST, "gone")
        before = tree(copy)
        for repair in (True, source):
            with pytest.raises(SetError, match=f"{MANIFEST} is missing.*: {RECORD1} {says}") as e:
                shardstate.verify(copy, repair=repair)
            assert str(e.value).endswith("or name another copy of the set (--repair COPY)")
        assert tree(copy) == before
        report = shardstate.verify(copy, repair=simple)
        assert report.problems == ()
        assert report.notes[0] == f"{MANIFEST} was made again from {simple}"
        assert tree(copy) == tree(simple)
        damage(copy / RECORD1, how)
        damage(copy / MANIFEST, "flip")
        report = shardstate.verify(copy, repair=True)
        assert {MANIFEST, RECORD1} <= {p.file for p in report.problems}
        assert report.notes[0].startswith(f"{MANIFEST} was not made again: {RECORD1} {says}")

    def test_of_records_that_are_not_of_one_set_is_not_made(self, copy, source, tmp_path):
        other = tmp_path / "other"
        shardstate.shard(source, other, tp=2, dtype="f32")
        damage(copy / MANIFEST, "gone")
        damage(copy / RECORD1, "gone")
        with pytest.raises(SetError, match="is no copy of this set"):
            shardstate.verify(copy, repair=other)
        shutil.copy(other / RECORD1, copy)
        before = tree(copy)
        with pytest.raises(SetError, match="records are of 2 sets, expected one"):
            shardstate.verify(copy, repair=True)
        for name in (RECORD0, RECORD1):
            damage(copy / name, "flip")
        with pytest.raises(SetError, match="records are of 0 sets, expected one"):
            shardstate.verify(copy, repair=True)
        assert tree(copy).keys() == before.keys()


class TestWhatCannotBeMade:
    def test_from_another_source_is_refused_before_anything_is_written(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        damage(copy / R0, "flip")
        before = tree(copy)
        with pytest.raises(UsageError, match="it is another model, or was changed"):
            shardstate.verify(copy, repair=other)
        assert tree(copy) == before

    def test_from_a_copy_of_another_set_stays_damaged(self, copy, source, tmp_path):
        shardstate.shard(source, tmp_path / "tp2f32", tp=2, dtype="f32")
        damage(copy / R0, "flip")
        before = tree(copy)
        report = shardstate.verify(copy, repair=tmp_path / "tp2f32")
        assert [p.file for p in report.problems] == [R0]
        assert "is no copy of this set" in report.notes[0]
        assert tree(copy) == before

    def test_from_a_copy_that_is_damaged_too_stays_damaged(self, copy, simple, tmp_path):
        other = shutil.copytree(simple, tmp_path / "other")
        flip_bit(other / R0, place_of(other / R0, NORM)[0])
        damage(copy / R0, "last bit")
        damage(copy / R1, "last bit")
        before = tree(copy)
        report = shardstate.verify(copy, repair=other)
        assert [p.file for p in report.problems] == [R0]
        assert any("that copy is damaged too" in note for note in report.notes)
        assert tree(copy) == {**before, R1: tree(simple)[R1]}

    def test_from_a_source_whose_bytes_changed_behind_its_fingerprint_stays_damaged(
        self, copy, tmp_path
    ):
        # The fingerprint samples: a flipped bit between the samples shows in the digests.
        source = write_llama(tmp_path / "large", layers=1, vocab=5001, seed=3)
        path = tmp_path / "large-set"
        shardstate.shard(source, path, tp=2)
        begin, end = place_of(source / "model.safetensors", "lm_head.weight")
        samples = [begin + k for k in range(5000, end - begin, 4099)]
        damage(path / R0, "flip")
        for offset in samples:
            flip_bit(source / "model.safetensors", offset)
            try:
                report = shardstate.verify(path, repair=True)
            except UsageError:
                flip_bit(source / "model.safetensors", offset)
                continue
            break
        flip_bit(source / "model.safetensors", offset)
        assert [p.file for p in report.problems] == [R0]
        assert any("the source has changed" in note for note in report.notes)
        assert shardstate.verify(path, repair=True).problems == ()

    def test_a_forged_set_is_not_mended(self, copy, source):
        forge(copy, 0, R0, place_of(copy / R0, NORM)[0])
        report = shardstate.verify(copy, repair=True, against=source)
        assert {p.kind for p in report.problems} == {"source"}

    def test_without_its_source_says_so(self, copy, tmp_path):
        for name in ("shardstate.json", "shardstate.rank-0.json", "shardstate.rank-1.json"):
            reseal(copy / name, lambda c: c["source"].update(location=str(tmp_path / "gone")))
        damage(copy / R0, "flip")
        with pytest.raises(PathNotFound, match=r"gone: the recorded source of .* is not there"):
            shardstate.verify(copy, repair=True)

    def test_with_all_that_describes_it_damaged_wants_a_copy(self, copy, simple, source):
        for name in ("shardstate.json", "shardstate.rank-0.json", "shardstate.rank-1.json"):
            damage(copy / name, "flip")
        with pytest.raises(InputError, match="name another copy"):
            shardstate.verify(copy, repair=True)
        report = shardstate.verify(copy, repair=simple)
        assert "shardstate.json" in {p.file for p in report.problems}

    def test_with_rules_of_ones_own_provenance_wants_a_copy(self, source, tmp_path):
        path = tmp_path / "set"
        shardstate.shard(source, path, tp=2, rules=[{"match": "*", "replicate": True}])
        whole = shutil.copytree(path, tmp_path / "whole")
        name = "shardstate.rank-0.provenance.json"
        damage(path / name, "flip")
        report = shardstate.verify(path, repair=True)
        assert [p.file for p in report.problems] == [name]
        assert "another copy" in report.notes[0]
        assert shardstate.verify(path, repair=whole).problems == ()

    def test_a_saved_module_is_mended_from_a_copy(self, tmp_path):
        path = tmp_path / "set"
        save_model({"a": torch.arange(5000.0), "b": torch.zeros(3)}, path)
        whole = shutil.copytree(path, tmp_path / "whole")
        damage(path / R0, "flip")
        with pytest.raises(UsageError, match="no source is recorded"):
            shardstate.verify(path, repair=True)
        assert shardstate.verify(path, repair=whole).problems == ()
        assert tree(path) == tree(whole)

    def test_what_is_no_set_or_is_in_use_is_refused(self, copy, source, tmp_path):
        for path in (source, write_vllm_set(tmp_path / "vllm", tp=1)):
            with pytest.raises(UsageError, match="is no set of shardstate"):
                shardstate.verify(path, repair=True)
        damage(copy / R0, "flip")
        with pytest.raises(UsageError, match="cannot be repaired from itself"):
            shardstate.verify(copy, repair=copy)
        with pytest.raises(UsageError, match="was saved by vLLM"):
            shardstate.verify(copy, repair=tmp_path / "vllm")
        with LocalStorage(copy) as storage, storage.hold():
            with pytest.raises(TargetBusy):
                shardstate.verify(copy, repair=True)


def test_each_problem_says_which_rank_to_make_again_from_where(copy, source):
    damage(copy / R1, "flip")
    damage(copy / "config.json", "flip")
    said = {p.file: p.problem for p in shardstate.verify(copy, full=True).problems}
    assert f"make it again from {source} (verify --repair)" in said["config.json"]
    assert f"make rank 1 again from {source} (verify --repair)" in said[R1]
