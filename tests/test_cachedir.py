"""What the cache holds, and that nothing in use is removed."""

import os

import pytest

from shardstate import api
from shardstate.cachedir import list_entries, prune
from shardstate.errors import PathNotFound, UsageError
from shardstate.storage import LocalStorage

OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def cache(tmp_path):
    for name, used in ((OLD, 1000), (NEW, 2000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-rank-0-part-0.safetensors").write_bytes(bytes(100))
        os.utime(tmp_path / name, (used, used))
    (tmp_path / "notes.txt").write_text("not an entry")
    return tmp_path


def test_the_entry_used_last_comes_first(cache):
    assert [(entry.name, entry.nbytes) for entry in list_entries(cache)] == [(NEW, 100), (OLD, 100)]
    report = api.cache_list(cache)
    assert (report.kind, report.files, report.bytes) == ("cache", 2, 200)


def test_the_entry_used_longest_ago_goes_first(cache):
    report = api.cache_prune(cache, max_size=150)
    assert report.notes == (f"removed {OLD} (100 bytes)",)
    assert sorted(os.listdir(cache)) == [NEW, "notes.txt"]
    api.cache_prune(cache, max_size=0)
    assert os.listdir(cache) == ["notes.txt"]


def test_what_is_read_or_written_stays(cache):
    with LocalStorage(cache / OLD) as storage, storage.hold():
        left, gone = prune(str(cache), max_bytes=0)
    assert ([e.name for e in left], [e.name for e in gone]) == ([OLD], [NEW])


def test_what_was_set_aside_goes(cache):
    os.rename(cache / OLD, cache / f".shardstate-aside-{OLD}-1")
    prune(str(cache), max_bytes=1000)
    assert sorted(os.listdir(cache)) == [NEW, "notes.txt"]


def test_bad_input_is_told(tmp_path):
    with pytest.raises(PathNotFound):
        api.cache_list(tmp_path / "nothing")
    with pytest.raises(UsageError, match="expected bytes"):
        api.cache_prune(tmp_path, max_size="much")
