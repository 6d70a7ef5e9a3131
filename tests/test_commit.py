import contextlib
import fcntl
import json
import os
import re
import shutil

import pytest

import shardstate
from checkpoints import (
    Stored,
    flip_bit,
    identities,
    rank_tensors,
    tensors_of,
    tree,
    write_llama,
    write_vllm_set,
)
from crashing import DIED, crash_server
from shardstate import ShardStateError
from shardstate.commit import SetWriter
from shardstate.errors import StorageError, TargetError
from shardstate.storage.local import LocalStorage

PART = 6000  # bytes; makes several parts a rank
TAGS = {"bfloat16": "BF16", "float32": "F32", "uint8": "U8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("commit") / "llama")


@pytest.fixture(scope="module")
def other_source(tmp_path_factory):
    """Another model, with another companion and none in a folder."""
    path = write_llama(tmp_path_factory.mktemp("commit") / "other", seed=1)
    shutil.rmtree(path / "1_Pooling")
    (path / "merges.txt").write_text("a b")
    return path


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory):
    """What an undisturbed run makes, by number of ranks."""
    made = {}
    for tp in (2, 4):
        out = tmp_path_factory.mktemp("commit") / f"tp{tp}"
        shardstate.shard(source, out, tp=tp, max_part_size=PART)
        made[tp] = out
    return made


@pytest.fixture(scope="module")
def crashes():
    with crash_server() as server:
        yield server


def loaded(path, rank):
    """Return what `load` gives for a rank, in the form of `rank_tensors`; None if it refuses."""
    try:
        arrays = shardstate.load(path, rank=rank)
    except ShardStateError:
        return None
    return {
        name: Stored(TAGS[str(array.dtype)], array.shape, array.tobytes())
        for name, array in arrays.items()
    }


def interrupt_after(monkeypatch, notes):
    """Let the next run end as by Ctrl-C once that many parts are finished."""
    original, left = SetWriter.note, [notes]

    def note(self, part, entry):
        original(self, part, entry)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SetWriter, "note", note)


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    """A run of tp 2 that ended after three finished parts: (directory, names of these parts)."""
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            shardstate.shard(source, out, tp=2, max_part_size=PART, threads=1)
    finished = [name for name in tree(out) if name.endswith(".safetensors")]
    assert len(finished) == 3
    assert "shardstate.json" not in tree(out)
    return out, finished


class TestTheSameInputGivesTheSameBytes:
    def test_on_every_run(self, source, clean, tmp_path):
        for threads in (1, 3, 16):
            out = tmp_path / str(threads)
            shardstate.shard(source, out, tp=4, max_part_size=PART, threads=threads)
            assert tree(out) == tree(clean[4])

    def test_whatever_the_order_of_the_ranks(self, source, clean, tmp_path):
        for ranks in ([2], [0, 3], [1]):
            report = shardstate.shard(source, tmp_path, tp=4, max_part_size=PART, ranks=ranks)
            assert report.committed is (ranks == [1])
            assert ("shardstate.json" in tree(tmp_path)) == (ranks == [1])
        assert tree(tmp_path) == tree(clean[4])

    def test_with_force_over_itself(self, source, clean, tmp_path):
        for _ in range(2):
            shardstate.shard(source, tmp_path, tp=4, max_part_size=PART, force=True)
            assert tree(tmp_path) == tree(clean[4])

    def test_ranks_that_are_there_are_left_alone(self, source, tmp_path):
        shardstate.shard(source, tmp_path, tp=2, ranks=[0])
        name = "model-rank-0-part-0.safetensors"
        before = identities(tmp_path, [name, "shardstate.rank-0.json"])
        shardstate.shard(source, tmp_path, tp=2)
        assert identities(tmp_path, [name, "shardstate.rank-0.json"]) == before

    def test_nothing_in_it_names_a_time_or_a_version(self, clean):
        for name, data in tree(clean[4]).items():
            if name.startswith("shardstate") and isinstance(data, bytes):
                assert shardstate.__version__.encode() not in data
                assert re.search(rb"20\d\d-\d\d-\d\d", data) is None


class TestACrash:
    def test_before_any_change_leaves_nothing_that_loads_wrong(
        self, source, clean, crashes, memory_path
    ):
        want = {rank: rank_tensors(clean[2], rank) for rank in range(2)}
        done = tree(clean[2])
        command = ["--tp", 2, "--max-part-size", PART, "--threads", 1, "--quiet"]
        states = set()
        for k in range(1, 1000):
            out = memory_path / "set"
            status = crashes.run(["shard", source, out, *command], die_at=k)
            assert status in (0, DIED)
            left = tree(out) if out.exists() else {}
            states.add(frozenset(left))
            if "shardstate.json" in left:
                assert shardstate.verify(out, full=True).problems == ()
            for rank in range(2):
                assert loaded(out, rank) in (None, want[rank])
            report = shardstate.shard(source, out, tp=2, max_part_size=PART)
            assert report.committed is True
            assert tree(out) == done
            if not status:
                break
            shutil.rmtree(out)
        assert status == 0
        assert len(states) > 50

    @pytest.mark.parametrize("tp", [1, 2, 4])
    def test_while_another_set_is_replaced_never_mixes_the_two(
        self, tp, source, other_source, clean, crashes, memory_path
    ):
        new, old = memory_path / "new", memory_path / "old"
        shardstate.shard(source, new, tp=2)
        shardstate.shard(other_source, old, tp=tp)
        want = [
            [rank_tensors(path, rank) for path, size in ((old, tp), (new, 2)) if rank < size]
            for rank in range(max(tp, 2))
        ]
        done, out = tree(new), memory_path / "set"
        command = ["--tp", 2, "--force", "--threads", 1, "--quiet"]
        for k in range(1, 1000):
            shutil.copytree(old, out)
            status = crashes.run(["shard", source, out, *command], die_at=k)
            assert status in (0, DIED)
            if (out / "shardstate.json").exists():
                # Files of the old set that nothing lists any more may wait for their removal.
                problems = shardstate.verify(out, full=True).problems
                assert {problem.kind for problem in problems} <= {"stale"}
            for rank, allowed in enumerate(want):
                assert loaded(out, rank) in (None, *allowed)
            # The same command once more must do, whatever the moment of the crash was.
            assert shardstate.shard(source, out, tp=2, force=True).committed is True
            left = {name: data for name, data in tree(out).items() if not name.endswith("/")}
            assert left == {name: data for name, data in done.items() if not name.endswith("/")}
            shutil.rmtree(out)
            if not status:
                break
        assert status == 0

    def test_of_one_of_several_writers_is_made_good_by_its_next_run(
        self, source, clean, crashes, memory_path
    ):
        begun, out = memory_path / "begun", memory_path / "set"
        shardstate.shard(source, begun, tp=4, max_part_size=PART, ranks=[0, 1, 3])
        before = tree(begun)
        more = ["--tp", 4, "--max-part-size", PART, "--ranks", 2, "--threads", 1, "--quiet"]
        for k in range(1, 1000):
            shutil.copytree(begun, out)
            status = crashes.run(["shard", source, out, *more], die_at=k)
            left = tree(out)
            assert {name: left[name] for name in before} == before
            report = shardstate.shard(source, out, tp=4, max_part_size=PART, ranks=[2])
            assert report.committed is True
            assert tree(out) == tree(clean[4])
            shutil.rmtree(out)
            if not status:
                break
        assert status == 0


class TestResume:
    def test_keeps_what_is_finished(self, source, clean, interrupted):
        out, finished = interrupted
        before = identities(out, finished)
        report = shardstate.shard(source, out, tp=2, max_part_size=PART)
        assert identities(out, finished) == before
        assert tree(out) == tree(clean[2])
        assert any("kept" in note for note in report.notes)
        whole = sum(len(t.data) for t in tensors_of(source / "model.safetensors").values())
        assert 0 < report.bytes_read < whole

    def test_of_some_ranks_keeps_what_is_finished_of_them(self, source, clean, interrupted):
        out, finished = interrupted
        own = [name for name in finished if "rank-1" in name]
        before = identities(out, own)
        shardstate.shard(source, out, tp=2, max_part_size=PART, ranks=[1])
        shardstate.shard(source, out, tp=2, max_part_size=PART, ranks=[0])
        assert identities(out, own) == before
        assert tree(out) == tree(clean[2])

    @pytest.mark.parametrize("how", ["touched", "replaced"])
    def test_begins_again_when_the_source_is_not_the_same_file(self, how, clean, tmp_path, source):
        copy = tmp_path / "llama"
        shutil.copytree(source, copy)
        out = tmp_path / "set"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                shardstate.shard(copy, out, tp=2, max_part_size=PART, threads=1)
        finished = [name for name in tree(out) if name.endswith(".safetensors")]
        before = identities(out, finished)
        weights = copy / "model.safetensors"
        if how == "touched":
            os.utime(weights, ns=(1, 1))
        else:
            status = weights.stat()
            shutil.copy(weights, tmp_path / "again")
            os.utime(tmp_path / "again", ns=(status.st_atime_ns, status.st_mtime_ns))
            (tmp_path / "again").replace(weights)
        shardstate.shard(copy, out, tp=2, max_part_size=PART)
        after = identities(out, finished)
        assert [name for name in finished if after[name] == before[name]] == []
        assert shardstate.verify(out, against=copy).problems == ()

    @pytest.mark.parametrize("damage", ["truncate", "header", "remove", "note", "note gone"])
    def test_makes_damaged_parts_again_and_only_these(self, damage, source, clean, interrupted):
        out, finished = interrupted
        victim = finished[1]
        rank, part = re.findall(r"\d+", victim)
        note = out / f".shardstate-part-{rank}-{part}"
        match damage:
            case "truncate":
                os.truncate(out / victim, (out / victim).stat().st_size - 1)
            case "header":
                flip_bit(out / victim, 20)
            case "remove":
                (out / victim).unlink()
            case "note":
                flip_bit(note, 30)
            case "note gone":
                note.unlink()
        others = [name for name in finished if name != victim]
        before = identities(out, others)
        shardstate.shard(source, out, tp=2, max_part_size=PART)
        assert identities(out, others) == before
        assert tree(out) == tree(clean[2])

    def test_does_not_take_the_notes_of_another_split_into_parts(self, source, interrupted):
        out, _ = interrupted
        with pytest.raises(TargetError, match="--force"):
            shardstate.shard(source, out, tp=2, max_part_size=PART + 1000)
        report = shardstate.shard(source, out, tp=2, max_part_size=PART + 1000, force=True)
        assert report.committed is True
        assert shardstate.verify(out, against=source).problems == ()
        assert [name for name in tree(out) if ".shardstate-" in name] == []

    def test_an_interrupted_set_is_not_taken_for_one(self, interrupted):
        out, _ = interrupted
        for rank in range(2):
            assert loaded(out, rank) is None
        for use in (shardstate.inspect, shardstate.verify):
            with pytest.raises(ShardStateError, match="interrupted"):
                use(out)

    def test_goes_on_after_a_companion_of_the_source_has_changed(self, tmp_path, source, crashes):
        # The id of the set is the same: companions are no part of it.
        copy, out = tmp_path / "llama", tmp_path / "set"
        shutil.copytree(source, copy)
        for k in range(1, 1000):
            crashes.run(["shard", copy, out, "--tp", 1, "--threads", 1], die_at=k)
            if (out / "tokenizer.json").exists():
                break
            shutil.rmtree(out, ignore_errors=True)
        assert not (out / "shardstate.rank-0.json").exists()
        (copy / "tokenizer.json").write_text("mended")
        assert shardstate.shard(copy, out, tp=1).committed is True
        assert (out / "tokenizer.json").read_text() == "mended"


class TestForce:
    def test_leaves_nothing_of_the_set_it_replaces(self, source, other_source, clean, tmp_path):
        shardstate.shard(other_source, tmp_path / "a", tp=4, max_part_size=PART)
        shardstate.shard(source, tmp_path / "a", tp=2, max_part_size=PART, force=True)
        assert tree(tmp_path / "a") == tree(clean[2])

    def test_removes_the_folders_of_companions_that_went(self, source, other_source, tmp_path):
        shardstate.shard(source, tmp_path / "a", tp=2)
        shardstate.shard(other_source, tmp_path / "a", tp=2, force=True)
        shardstate.shard(other_source, tmp_path / "b", tp=2)
        assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def test_replaces_a_set_whose_companions_and_their_folder_are_gone(
        self, source, other_source, tmp_path
    ):
        shardstate.shard(source, tmp_path, tp=2)
        shutil.rmtree(tmp_path / "1_Pooling")
        (tmp_path / "tokenizer.json").unlink()
        report = shardstate.shard(other_source, tmp_path, tp=2, force=True)
        assert report.committed is True
        assert shardstate.verify(tmp_path, against=other_source).problems == ()

    def test_replaces_a_set_with_another_pattern(self, source, clean, tmp_path):
        shardstate.shard(source, tmp_path, tp=4, pattern="weights_{part}_of_{rank}.safetensors")
        shardstate.shard(source, tmp_path, tp=2, max_part_size=PART, force=True)
        assert tree(tmp_path) == tree(clean[2])

    def test_replaces_an_interrupted_set_with_another_pattern(self, source, clean, tmp_path):
        pattern = "weights_{part}_of_{rank}.safetensors"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                shardstate.shard(source, tmp_path, tp=2, pattern=pattern, threads=1)
        # Marked as ours, though no record tells the pattern.
        shardstate.shard(source, tmp_path, tp=2, max_part_size=PART, force=True)
        assert tree(tmp_path) == tree(clean[2])

    def test_replaces_vllms_own_set(self, source, clean, tmp_path):
        write_vllm_set(tmp_path / "set", tp=4, parts=2)
        with pytest.raises(TargetError, match="--force"):
            shardstate.shard(source, tmp_path / "set", tp=2, max_part_size=PART)
        shardstate.shard(source, tmp_path / "set", tp=2, max_part_size=PART, force=True)
        assert tree(tmp_path / "set") == tree(clean[2])

    @pytest.mark.parametrize(
        "name", ["shardstate.json", "shardstate.rank-0.json", "model-rank-0-part-0.safetensors"]
    )
    def test_repairs_a_damaged_set(self, name, source, clean, tmp_path):
        shutil.copytree(clean[2], tmp_path / "set")
        os.truncate(tmp_path / "set" / name, (tmp_path / "set" / name).stat().st_size // 2)
        with pytest.raises(TargetError, match="--force") as error:
            shardstate.shard(source, tmp_path / "set", tp=2, max_part_size=PART)
        assert error.value.file == name
        shardstate.shard(source, tmp_path / "set", tp=2, max_part_size=PART, force=True)
        assert tree(tmp_path / "set") == tree(clean[2])

    def test_is_needed_to_replace_another_set(self, source, other_source, clean, tmp_path):
        shutil.copytree(clean[4], tmp_path / "set")
        for model, tp in ((source, 2), (other_source, 4)):
            with pytest.raises(TargetError, match=r"tp 4, expected .* --force"):
                shardstate.shard(model, tmp_path / "set", tp=tp, max_part_size=PART)
        assert tree(tmp_path / "set") == tree(clean[4])

    def test_does_not_cover_files_that_belong_to_no_set(self, source, clean, tmp_path):
        out = tmp_path / "set"
        shutil.copytree(clean[4], out)
        (out / "notes.txt").write_text("mine")
        (out / "1_Pooling" / "mine.bin").write_text("mine")
        before = tree(out)
        for force in (False, True):
            for tp in (2, 4):
                with pytest.raises(TargetError) as error:
                    shardstate.shard(source, out, tp=tp, max_part_size=PART, force=force)
                assert "notes.txt" in str(error.value)
                assert "1_Pooling/mine.bin" in str(error.value)
        assert tree(out) == before

    @pytest.mark.parametrize("what", ["link to a file", "link to a folder", "dangling", "fifo"])
    def test_does_not_overlook_what_is_no_regular_file(self, what, source, tmp_path):
        out = tmp_path / "set"
        out.mkdir()
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "f").write_text("mine")
        match what:
            case "link to a file":
                (out / "mine").symlink_to(tmp_path / "outside" / "f")
            case "link to a folder":
                (out / "mine").symlink_to(tmp_path / "outside")
            case "dangling":
                (out / "mine").symlink_to("nowhere")
            case "fifo":
                os.mkfifo(out / "mine")
        for force in (False, True):
            with pytest.raises(TargetError, match="mine"):
                shardstate.shard(source, out, tp=2, force=force)
        assert os.listdir(out) == ["mine"]

    def test_of_some_ranks_hides_the_other_ranks_until_they_follow(self, source, clean, tmp_path):
        out = tmp_path / "set"
        shutil.copytree(clean[4], out)
        flip_bit(out / "model-rank-2-part-0.safetensors", -1 % 8192)
        more = {"tp": 4, "max_part_size": PART, "force": True}
        assert shardstate.shard(source, out, ranks=[2], **more).committed is True
        assert tree(out) == tree(clean[4])

    def test_of_some_ranks_of_another_model_never_loads_a_mixture(
        self, source, other_source, tmp_path
    ):
        shardstate.shard(source, tmp_path / "a", tp=2)
        shardstate.shard(other_source, tmp_path / "b", tp=2)
        shardstate.shard(other_source, tmp_path / "a", tp=2, ranks=[0], force=True)
        for rank in range(2):
            with pytest.raises(ShardStateError, match="half-replaced"):
                shardstate.load(tmp_path / "a", rank=rank)
        with pytest.raises(ShardStateError):
            shardstate.verify(tmp_path / "a")
        shardstate.shard(other_source, tmp_path / "a", tp=2, ranks=[1], force=True)
        left = {n: d for n, d in tree(tmp_path / "a").items() if not n.endswith("/")}
        assert left == tree(tmp_path / "b")


class TestLinksInTheTarget:
    """Nothing is written through a link, whatever lies in the target."""

    @pytest.fixture
    def outside(self, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "precious").write_text("precious")
        return tmp_path / "outside"

    def planted(self, source, out, outside, name, goal):
        before = tree(outside)
        (out / name).symlink_to(outside / goal)
        for force in (False, True):
            with contextlib.suppress(ShardStateError):
                shardstate.shard(source, out, tp=2, force=force)
            assert tree(outside) == before

    @pytest.mark.parametrize(
        "name",
        [
            "model-rank-0-part-0.safetensors",
            "shardstate.json",
            "shardstate.rank-0.json",
            "shardstate.rank-1.provenance.json",
            "tokenizer.json",
            ".shardstate-part-0-0",
        ],
    )
    @pytest.mark.parametrize("goal", ["precious", "nothing yet"])
    def test_under_the_name_of_a_file(self, name, goal, source, outside, tmp_path):
        (tmp_path / "set").mkdir()
        self.planted(source, tmp_path / "set", outside, name, goal)

    def test_under_a_temporary_name(self, source, outside, clean, crashes, tmp_path):
        # The names are known beforehand, so that an enemy could plant links under all of them.
        names = set()
        for k in range(1, 100, 7):
            crashes.run(["shard", source, tmp_path / "try", "--tp", 2, "--threads", 1], die_at=k)
            names |= {name for name in tree(tmp_path / "try") if ".shardstate-new-" in name}
        assert names
        before = tree(outside)
        out = tmp_path / "set"
        (out / "1_Pooling").mkdir(parents=True)
        for name in names:
            (out / name).symlink_to(outside / "precious")
        shardstate.shard(source, out, tp=2, max_part_size=PART)
        assert tree(outside) == before
        assert tree(out) == tree(clean[2])

    def test_under_the_name_of_a_companions_folder(self, source, outside, tmp_path):
        out = tmp_path / "set"
        out.mkdir()
        before = tree(outside)
        (out / "1_Pooling").symlink_to(outside)
        with pytest.raises(ShardStateError, match="1_Pooling"):
            shardstate.shard(source, out, tp=2)
        assert tree(outside) == before

    def test_in_the_place_of_a_companions_folder_of_the_set_that_is_replaced(
        self, source, other_source, outside, tmp_path
    ):
        out = tmp_path / "set"
        shardstate.shard(source, out, tp=2)
        (out / "1_Pooling").rename(outside / "folder")
        (out / "1_Pooling").symlink_to(outside / "folder")
        before = tree(outside)
        for model in (source, other_source):
            with contextlib.suppress(ShardStateError):
                shardstate.shard(model, out, tp=2, force=True)
            assert tree(outside) == before

    def test_the_target_itself_may_be_one(self, source, clean, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "set").symlink_to(tmp_path / "disk")
        shardstate.shard(source, tmp_path / "set", tp=2, max_part_size=PART)
        assert tree(tmp_path / "disk") == tree(clean[2])


class TestWhatLoads:
    def test_a_marked_file_without_a_record_does_not(self, clean, tmp_path):
        out = tmp_path / "set"
        shutil.copytree(clean[2], out)
        for name in list(tree(out)):
            if name.startswith("shardstate"):
                (out / name).unlink()
        for rank in range(2):
            with pytest.raises(ShardStateError, match="no record lists it"):
                shardstate.load(out, rank=rank)

    def test_a_marked_file_between_vllms_own_does_not(self, source, tmp_path):
        write_vllm_set(tmp_path / "vllm", tp=2)
        shardstate.shard(source, tmp_path / "set", tp=2)
        name = "model-rank-1-part-0.safetensors"
        shutil.copy(tmp_path / "set" / name, tmp_path / "vllm" / name)
        with pytest.raises(ShardStateError, match=name):
            shardstate.load(tmp_path / "vllm", rank=1)

    def test_a_rank_of_a_set_without_manifest_does_when_all_records_agree(self, clean, tmp_path):
        shutil.copytree(clean[2], tmp_path / "set")
        (tmp_path / "set" / "shardstate.json").unlink()
        assert loaded(tmp_path / "set", 1) == rank_tensors(clean[2], 1)

    def test_a_rank_without_record_is_told_how_to_make_it(self, source, tmp_path):
        shardstate.shard(source, tmp_path, tp=2, ranks=[0])
        assert loaded(tmp_path, 0) is not None
        with pytest.raises(ShardStateError, match=r"rank 1.*--ranks 1"):
            shardstate.load(tmp_path, rank=1)

    def test_no_rank_does_when_any_record_is_unreadable(self, source, tmp_path):
        shardstate.shard(source, tmp_path, tp=4, ranks=[0, 1])
        flip_bit(tmp_path / "shardstate.rank-1.json", 60)
        with pytest.raises(ShardStateError, match=r"shardstate\.rank-1\.json"):
            shardstate.load(tmp_path, rank=0)


class TestOrder:
    def test_of_changes_keeps_the_set_whole_through_a_power_failure(
        self, source, other_source, tmp_path, monkeypatch
    ):
        """Names may reach the disk in any order between two syncs of their directory."""
        shardstate.shard(other_source, tmp_path, tp=1)
        events = []

        def record(name):
            original = getattr(os, name)

            def call(*args, **kwargs):
                if name == "fsync":
                    path = os.readlink(f"/proc/self/fd/{args[0]}")
                    events.append(("sync", os.path.basename(path)))
                elif name == "rename":
                    events.append(("rename", args[1]))
                else:
                    events.append(("remove", args[0]))
                return original(*args, **kwargs)

            monkeypatch.setattr(os, name, call)

        for name in ("fsync", "rename", "unlink"):
            record(name)
        shardstate.shard(source, tmp_path, tp=1, force=True, threads=1)
        synced = ("sync", tmp_path.name)
        steps = [
            ("remove", "shardstate.json"),
            ("remove", "shardstate.rank-0.json"),
            ("rename", "model-rank-0-part-0.safetensors"),
            ("rename", "tokenizer.json"),
            ("rename", "shardstate.rank-0.provenance.json"),
            ("rename", "shardstate.rank-0.json"),
            ("rename", "shardstate.json"),
        ]
        places = [events.index(step) for step in steps]
        assert places == sorted(places)
        for place, following in zip(places, [*places[1:], len(events)], strict=True):
            assert synced in events[place:following]
        for i, (what, name) in enumerate(events):
            if what == "rename":
                # What is renamed was synced right before, under its temporary name.
                kind, temporary = events[i - 1]
                assert (kind, temporary[:16]) == ("sync", ".shardstate-new-"), name


class TestLocks:
    @pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
    def test_a_locked_target_is_refused_and_left_alone(self, kind, source, clean, tmp_path):
        out = tmp_path / "set"
        shutil.copytree(clean[2], out)
        fd = os.open(out, os.O_RDONLY)
        fcntl.flock(fd, kind)
        for force in (False, True):
            with pytest.raises(StorageError, match="another process is writing there"):
                shardstate.shard(source, out, tp=4, force=force)
        os.close(fd)
        assert tree(out) == tree(clean[2])
        assert shardstate.shard(source, out, tp=4, force=True).committed is True

    def test_reading_needs_no_lock(self, source, clean, tmp_path):
        out = tmp_path / "set"
        shutil.copytree(clean[2], out)
        with LocalStorage(out) as storage, storage.lock():
            assert loaded(out, 0) == rank_tensors(clean[2], 0)
            assert shardstate.verify(out, full=True).problems == ()

    def test_a_lock_does_not_outlive_a_crash(self, source, crashes, tmp_path):
        crashes.run(["shard", source, tmp_path / "set", "--tp", 2], die_at=9)
        assert shardstate.shard(source, tmp_path / "set", tp=2).committed is True


class TestSpace:
    def test_is_checked_before_a_set_is_touched(self, source, clean, tmp_path, monkeypatch):
        out = tmp_path / "set"
        shutil.copytree(clean[4], out)
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda _self: 5000)
        with pytest.raises(StorageError, match="5000 are free"):
            shardstate.shard(source, out, tp=2, force=True)
        assert tree(out) == tree(clean[4])

    def test_counts_only_what_a_resumed_run_still_writes(
        self, source, clean, interrupted, monkeypatch
    ):
        out, finished = interrupted
        sizes = {p.name: p.stat().st_size for p in clean[2].glob("*.safetensors")}
        rest = sum(size for name, size in sizes.items() if name not in finished)
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda _self: rest - 1)
        with pytest.raises(StorageError, match=f"{rest} bytes"):
            shardstate.shard(source, out, tp=2, max_part_size=PART)
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda _self: rest + (1 << 20))
        shardstate.shard(source, out, tp=2, max_part_size=PART)
        assert tree(out) == tree(clean[2])


def test_a_write_that_fails_discards_what_is_unfinished(source, tmp_path, monkeypatch):
    original, left = os.pwritev, [6]

    def failing(fd, views, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return original(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(StorageError, match="the disk is full"):
        shardstate.shard(source, tmp_path, tp=2, max_part_size=PART)
    assert [name for name in tree(tmp_path) if "new-" in name or name == "shardstate.json"] == []
    monkeypatch.undo()
    assert shardstate.shard(source, tmp_path, tp=2, max_part_size=PART).committed is True


@pytest.mark.parametrize("name", ["rename", "fsync", "truncate"])
def test_an_operation_that_fails_leaves_no_temporary_file(name, source, tmp_path, monkeypatch):
    original, left = getattr(os, name), [3]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(StorageError, match="Input/output error"):
        shardstate.shard(source, tmp_path, tp=2, max_part_size=PART)
    assert [entry for entry in tree(tmp_path) if "new-" in entry] == []


def test_short_writes_are_continued(source, clean, tmp_path, monkeypatch):
    original = os.pwritev

    def short(fd, views, offset):
        view = next(view for view in views if view.nbytes)
        return original(fd, [view.cast("B")[: max(1, view.nbytes // 2)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    shardstate.shard(source, tmp_path, tp=2, max_part_size=PART)
    assert tree(tmp_path) == tree(clean[2])


def test_short_reads_are_continued(source, clean, tmp_path, monkeypatch):
    original = os.preadv

    def short(fd, views, offset, flags=0):
        view = next(view for view in views if view.nbytes)
        return original(fd, [view.cast("B")[: max(1, view.nbytes // 2)]], offset, flags)

    monkeypatch.setattr(os, "preadv", short)
    shardstate.shard(source, tmp_path, tp=2, max_part_size=PART)
    assert tree(tmp_path) == tree(clean[2])


def test_the_manifest_lists_everything_but_itself(clean):
    manifest = json.loads((clean[4] / "shardstate.json").read_text())
    listed = [entry["name"] for entry in manifest["files"]]
    files = [name for name in tree(clean[4]) if not name.endswith("/")]
    assert listed == sorted(set(files) - {"shardstate.json"})
    for entry in manifest["files"]:
        assert entry["bytes"] == (clean[4] / entry["name"]).stat().st_size


class TestACompleteSet:
    def test_sharding_again_writes_nothing_and_claims_no_speed(self, source, tmp_path):
        shardstate.shard(source, tmp_path / "set", tp=2)
        before = tree(tmp_path / "set")
        report = shardstate.shard(source, tmp_path / "set", tp=2)
        assert tree(tmp_path / "set") == before
        assert (report.bytes_written, report.bytes_read, report.gbps) == (0, 0, None)

    @pytest.mark.parametrize("name", ["model-rank-1-part-0.safetensors", "config.json"])
    def test_a_damaged_one_is_told(self, source, tmp_path, name):
        shardstate.shard(source, tmp_path / "set", tp=2)
        path = tmp_path / "set" / name
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
        with pytest.raises(ShardStateError, match=f"{name} is damaged or missing; --force"):
            shardstate.shard(source, tmp_path / "set", tp=2)

    def test_what_a_killed_run_left_is_no_reason_to_lack_space(self, source, tmp_path, monkeypatch):
        (tmp_path / "set").mkdir()
        left = tmp_path / "set" / ".shardstate-new-0123"
        left.write_bytes(b"half a part")
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 0 if left.exists() else 1 << 40)
        assert shardstate.shard(source, tmp_path / "set", tp=2).committed

    def test_pipeline_stages_have_no_place_in_a_pattern_of_ranks_alone(self, source, tmp_path):
        pattern = "m-{pp_rank}-{rank}-{part}.safetensors"
        with pytest.raises(ShardStateError, match="there is one pipeline stage"):
            shardstate.shard(source, tmp_path / "set", tp=2, pattern=pattern)

    def test_a_file_name_with_a_huge_number_is_one_hole(self, tmp_path):
        for name in (
            "model-rank-0-part-400000000.safetensors",
            "model-pp-65535-tp-65535-part-0.safetensors",
        ):
            path = tmp_path / name
            path.mkdir()
            (path / name).write_bytes(b"")
            with pytest.raises(ShardStateError, match="is missing between the files"):
                shardstate.open(path)
