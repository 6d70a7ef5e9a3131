"""`copy` between directories: what comes along, what stays, what is compared."""

import json

import pytest

import shardstate
from checkpoints import flip_bit, identities, tree, write_llama, write_vllm_set
from shardstate.cli.main import run
from shardstate.errors import DigestError, InputError, SetError, TargetError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("source") / "llama", files=2)


@pytest.fixture
def stored(source, tmp_path):
    shardstate.shard(source, tmp_path / "tp4", tp=4, max_part_size="20kB")
    return tmp_path / "tp4"


def test_a_set_comes_whole_and_byte_by_byte(stored, tmp_path):
    report = shardstate.copy(stored, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(stored)
    assert report.ranks == (0, 1, 2, 3)
    assert report.bytes_read == report.bytes_written == report.bytes_wanted
    assert shardstate.verify(tmp_path / "copy", full=True).problems == ()


def test_an_ordinary_checkpoint_comes_with_its_small_files(source, tmp_path):
    report = shardstate.copy(source, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)
    assert report.kind == "checkpoint"


def test_a_set_of_vllm(tmp_path):
    write_vllm_set(tmp_path / "set", tp=2, parts=2)
    shardstate.copy(tmp_path / "set", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(tmp_path / "set")


def test_only_some_ranks(stored, tmp_path):
    shardstate.copy(stored, tmp_path / "copy", ranks=[0, 3])
    names = set(tree(tmp_path / "copy"))
    assert {n for n in names if "rank-1" in n or "rank-2" in n} == set()
    assert {"shardstate.json", "config.json", "1_Pooling/config.json"} <= names
    for rank in (0, 3):
        loaded = shardstate.load(tmp_path / "copy", rank=rank, verify=True)
        assert list(loaded) == list(shardstate.load(stored, rank=rank))
    shardstate.copy(stored, tmp_path / "copy", ranks=[1, 2])
    assert tree(tmp_path / "copy") == tree(stored)


def test_what_is_there_and_matches_is_left_alone(stored, tmp_path):
    shardstate.copy(stored, tmp_path / "copy")
    names = [name for name in tree(stored) if not name.endswith("/")]
    before = identities(tmp_path / "copy", names)
    report = shardstate.copy(stored, tmp_path / "copy")
    assert identities(tmp_path / "copy", names) == before
    assert report.bytes_written == report.bytes_read == 0
    assert report.notes == (f"{len(names)} of {len(names)} files were there already",)


def test_what_is_damaged_or_missing_is_brought_again(stored, tmp_path):
    shardstate.copy(stored, tmp_path / "copy")
    flip_bit(tmp_path / "copy" / "model-rank-1-part-0.safetensors", 5000)
    (tmp_path / "copy" / "model-rank-2-part-0.safetensors").unlink()
    (tmp_path / "copy" / "shardstate.rank-0.provenance.json").write_bytes(b"{}")
    report = shardstate.copy(stored, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(stored)
    sizes = [(stored / f"model-rank-{r}-part-0.safetensors").stat().st_size for r in (1, 2)]
    assert report.bytes_written == sum(sizes)


def test_an_interrupted_copy_has_no_manifest_and_goes_on(stored, tmp_path):
    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardstate.copy(stored, tmp_path / "copy", progress=progress)
    assert not (tmp_path / "copy" / "shardstate.json").exists()
    assert not list((tmp_path / "copy").glob("shardstate.rank-?.json"))
    shardstate.copy(stored, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(stored)


def test_damage_of_the_source_does_not_arrive(stored, tmp_path):
    flip_bit(stored / "model-rank-1-part-0.safetensors", 5000)
    with pytest.raises(DigestError, match=r"model-rank-1-part-0.* after 4 tries.* damaged"):
        shardstate.copy(stored, tmp_path / "copy")
    assert not (tmp_path / "copy" / "model-rank-1-part-0.safetensors").exists()
    assert not (tmp_path / "copy" / "shardstate.json").exists()


def test_another_set_needs_force(source, stored, tmp_path):
    shardstate.shard(source, tmp_path / "tp8", tp=8)
    with pytest.raises(TargetError, match="--force replaces it"):
        shardstate.copy(stored, tmp_path / "tp8")
    shardstate.copy(stored, tmp_path / "tp8", force=True)
    assert tree(tmp_path / "tp8") == tree(stored)


def test_files_of_others_are_left_alone(source, stored, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "thesis.txt").write_text("precious")
    for path in (source, stored):
        with pytest.raises(TargetError, match=r"thesis\.txt"):
            shardstate.copy(path, tmp_path / "copy", force=True)
    assert tree(tmp_path / "copy") == {"thesis.txt": b"precious"}


def test_other_weights_need_force(source, tmp_path):
    other = write_llama(tmp_path / "other", files=2, seed=1)
    shardstate.copy(source, tmp_path / "copy")
    with pytest.raises(TargetError, match="holds another model-00001"):
        shardstate.copy(other, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)
    shardstate.copy(other, tmp_path / "copy", force=True)
    assert tree(tmp_path / "copy") == tree(other)


def test_what_cannot_be_copied(source, stored, tmp_path):
    with pytest.raises(InputError, match="has no ranks"):
        shardstate.copy(source, tmp_path / "copy", ranks=[0])
    with pytest.raises(TargetError, match="lies inside the source"):
        shardstate.copy(source, source / "copy")
    (stored / "shardstate.json").unlink()
    with pytest.raises(SetError, match="incomplete"):
        shardstate.copy(stored, tmp_path / "copy")


def test_the_command(stored, tmp_path, capsys):
    assert run(["copy", str(stored), str(tmp_path / "copy"), "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert "of rank 1, wrote" in out
    assert "digests compared" in out
    assert run(["copy", str(stored), str(tmp_path / "copy"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"] == [0, 1, 2, 3]
    assert list(report["phases"]) == ["open", "write"]
