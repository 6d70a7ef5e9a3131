"""One contract that every storage passes, and what only local directories do."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from shardstate.errors import (
    InputError,
    PathNotFound,
    ShardStateError,
    StorageError,
    TargetBusy,
    TruncatedFile,
)
from shardstate.names import temporary_name
from shardstate.storage import LocalStorage
from shardstate.storage.oserrors import mapped_errors


class StorageContract:
    """Subclasses give `storage`, and `put` and `get`, which bypass the storage under test."""

    def put(self, name, data):
        raise NotImplementedError

    def get(self, name):
        raise NotImplementedError

    def test_entries_are_the_files_of_the_root_by_name(self, storage):
        self.put("b", b"12")
        self.put("a", b"1")
        self.put("below/c", b"123")
        assert [(e.name, e.nbytes) for e in storage.entries().values()] == [("a", 1), ("b", 2)]

    def test_walk_finds_files_in_folders_too(self, storage):
        self.put("a", b"1")
        self.put("below/deeper/c", b"123")
        assert [(e.name, e.nbytes) for e in storage.walk()] == [("a", 1), ("below/deeper/c", 3)]

    def test_identity_changes_with_the_content(self, storage):
        self.put("a", b"1")
        before = storage.entries()["a"].identity
        self.put("a", b"22")
        assert before != storage.entries()["a"].identity

    def test_reads_fill_all_views_one_after_the_other(self, storage):
        self.put("a", bytes(range(100)))
        first, second = bytearray(3), bytearray(5)
        storage.read_into("a", 10, [memoryview(first), memoryview(b""), memoryview(second)])
        assert (bytes(range(10, 13)), bytes(range(13, 18))) == (bytes(first), bytes(second))

    def test_more_views_than_one_call_takes(self, storage):
        self.put("a", bytes(i % 251 for i in range(5000)))
        views = [bytearray(1) for _ in range(5000)]
        storage.read_into("a", 0, [memoryview(view) for view in views])
        assert bytes(i % 251 for i in range(5000)) == b"".join(views)

    def test_reading_past_the_end_raises(self, storage):
        self.put("a", b"1234")
        with pytest.raises(TruncatedFile, match="a: ends at byte 4, 6 more were planned") as error:
            storage.read_into("a", 2, [memoryview(bytearray(8))])
        assert error.value.file == "a"

    def test_what_is_not_there_is_said_so(self, storage):
        for call in (
            lambda: storage.size("gone"),
            lambda: storage.read("gone", limit=10),
            lambda: storage.read_into("gone", 0, [memoryview(bytearray(1))]),
        ):
            with pytest.raises(PathNotFound, match="gone"):
                call()

    def test_small_files_have_a_limit(self, storage):
        self.put("a", b"1234")
        assert storage.read("a", limit=4) == b"1234"
        with pytest.raises(InputError, match="has 4 bytes, more than the 3"):
            storage.read("a", limit=3)

    def test_put_replaces_a_file_whole(self, storage):
        self.put("a", b"old and longer")
        storage.put("a", b"new")
        assert self.get("a") == b"new"
        assert storage.read("a", limit=10) == b"new"

    def test_put_makes_folders(self, storage):
        storage.put("below/deeper/a", b"1")
        assert self.get("below/deeper/a") == b"1"

    def test_an_output_is_invisible_until_published(self, storage):
        output = storage.create("a", 4)
        output.write(2, [memoryview(b"34")])
        output.write(0, [memoryview(b"1"), memoryview(b"2")])
        assert "a" not in storage.entries()
        output.publish()
        assert self.get("a") == b"1234"
        output.discard()
        assert self.get("a") == b"1234"

    def test_a_discarded_output_leaves_nothing(self, storage):
        output = storage.create("below/a", 4)
        output.write(0, [memoryview(b"1234")])
        output.discard()
        assert list(storage.walk()) == []

    def test_remove_is_content_with_nothing_to_remove(self, storage):
        self.put("a", b"1")
        storage.remove("a")
        storage.remove("a")
        storage.sync()
        assert storage.entries() == {}

    def test_many_threads_read_one_file(self, storage):
        data = os.urandom(1 << 20)
        self.put("a", data)
        found = [bytearray(1 << 16) for _ in range(16)]
        threads = [
            threading.Thread(target=storage.read_into, args=("a", i << 16, [memoryview(found[i])]))
            for i in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert data == b"".join(found)


class TestLocalStorage(StorageContract):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path):
        self.root = tmp_path

    @pytest.fixture
    def storage(self, tmp_path):
        with LocalStorage(tmp_path) as storage:
            yield storage

    def put(self, name, data):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def get(self, name):
        return (self.root / name).read_bytes()

    def test_the_lock_excludes_others(self, storage):
        with storage.lock(), pytest.raises(TargetBusy, match="another process is writing"):
            with storage.lock():
                pass
        with storage.lock():
            pass

    def test_locks_with_names_exclude_the_same_name_and_the_lock_on_everything(self, storage):
        with storage.lock(".shardstate-lock-0"), storage.lock(".shardstate-lock-1"):
            for name in (None, ".shardstate-lock-0"):
                with pytest.raises(TargetBusy), storage.lock(name):
                    pass
        assert storage.entries() == {}

    def test_links_to_files_are_followed_for_reading(self, storage, tmp_path_factory):
        blob = tmp_path_factory.mktemp("blobs") / "b"
        blob.write_bytes(b"1234")
        (self.root / "a").symlink_to(blob)
        (self.root / "dangling").symlink_to(self.root / "nowhere")
        (self.root / "folder").symlink_to(blob.parent)
        assert list(storage.entries()) == ["a"]
        assert [entry.name for entry in storage.walk()] == ["a"]
        assert storage.read("a", limit=10) == b"1234"

    def test_nothing_is_written_through_a_link(self, storage, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "a").write_bytes(b"precious")
        (self.root / "a").symlink_to(elsewhere / "a")
        (self.root / temporary_name("b")).symlink_to(elsewhere / "b")
        (self.root / "folder").symlink_to(elsewhere)
        storage.put("a", b"new")
        storage.put("b", b"new")
        assert (elsewhere / "a").read_bytes() == b"precious"
        assert not (elsewhere / "b").exists()
        assert not (self.root / "a").is_symlink()
        with pytest.raises(ShardStateError, match="folder/a"):
            storage.put("folder/a", b"new")
        assert (elsewhere / "a").read_bytes() == b"precious"

    def test_a_pipe_or_folder_is_no_file(self, storage):
        os.mkfifo(self.root / "pipe")
        (self.root / "folder").mkdir()
        assert storage.entries() == {}
        for name in ("pipe", "folder"):
            with pytest.raises(InputError, match="is no regular file"):
                storage.size(name)

    def test_modes_follow_the_umask(self, storage):
        before = os.umask(0o027)
        try:
            storage.put("a", b"1")
        finally:
            os.umask(before)
        assert stat.S_IMODE((self.root / "a").stat().st_mode) == 0o640

    def test_a_lock_outlives_nobody(self, storage):
        code = (
            "import sys; from shardstate.storage import LocalStorage\n"
            "with LocalStorage(sys.argv[1]).lock(): print('held', flush=True); input()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with other:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(TargetBusy), storage.lock():
                pass
            other.kill()
            other.wait()
        with storage.lock():
            pass

    def test_a_directory_that_was_replaced_cannot_be_locked(self, storage):
        self.root.rename(self.root.parent / "moved")
        self.root.mkdir()
        with pytest.raises(TargetBusy, match="was replaced"), storage.lock():
            pass

    def test_nothing_stays_open(self, tmp_path):
        (tmp_path / "a").write_bytes(b"1")
        before = len(os.listdir("/proc/self/fd"))
        with LocalStorage(tmp_path) as storage:
            storage.size("a")
            storage.create("b", 1).discard()
            list(storage.walk())
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_becomes_one_of_ours(number):
    with pytest.raises((StorageError, PathNotFound), match=r"/there: cannot read: .*; .*"):
        with mapped_errors("read", "/there"):
            raise OSError(number, os.strerror(number))
