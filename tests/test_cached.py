"""The write-through cache of remote storages, before a directory that counts its reads."""

import os
import subprocess
import sys

import pytest

from shardstate.api import cache_list
from shardstate.errors import InputError, TruncatedFile
from shardstate.storage import LocalStorage
from shardstate.storage.cached import CachedStorage, RangeCache


class Far(LocalStorage):
    """A storage whose reads are counted."""

    def __init__(self, path):
        super().__init__(path)
        self.reads = []

    def read_into(self, name, begin, views):
        self.reads.append((name, begin, sum(view.nbytes for view in views)))
        super().read_into(name, begin, views)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "far").mkdir()
    content = os.urandom(100_000)
    (tmp_path / "far" / "a").write_bytes(content)
    return content


@pytest.fixture
def far(tmp_path, data):
    with Far(tmp_path / "far") as storage:
        yield storage


def cached(far, tmp_path, max_bytes=10**9):
    return CachedStorage(far, RangeCache(str(tmp_path / "cache"), max_bytes=max_bytes))


def read(storage, begin, *sizes):
    parts = [bytearray(size) for size in sizes]
    storage.read_into("a", begin, [memoryview(part) for part in parts])
    return b"".join(parts)


def ranges(tmp_path):
    return sorted(path for path in (tmp_path / "cache").rglob("*-*") if path.is_file())


def test_what_was_read_once_is_not_read_again(far, data, tmp_path):
    storage = cached(far, tmp_path)
    assert read(storage, 10, 500, 0, 1500) == data[10:2010]
    assert read(storage, 10, 2000) == data[10:2010]
    assert read(storage, 100, 7) == data[100:107]
    assert far.reads == [("a", 10, 2000)]
    assert read(cached(far, tmp_path), 2000, 10) == data[2000:2010]
    assert len(far.reads) == 1
    assert storage.read("a", limit=10**6) == data
    assert len(far.reads) == 2


def test_another_version_is_another_file(far, data, tmp_path):
    read(cached(far, tmp_path), 0, 1000)
    far.remove("a")
    (tmp_path / "far" / "a").write_bytes(bytes(100_000))
    assert read(cached(far, tmp_path), 0, 1000) == bytes(1000)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_damage_is_found_on_use_and_mended(far, data, tmp_path, caplog, harm):
    read(cached(far, tmp_path), 0, 5000)
    (path,) = ranges(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes({"flip": raw, "cut": raw[:4000], "empty": b""}[harm])
    storage = cached(far, tmp_path)
    assert read(storage, 0, 5000) == data[:5000]
    assert "is damaged" in caplog.text
    assert len(far.reads) == 2
    assert read(storage, 0, 5000) == data[:5000]
    assert len(far.reads) == 2


def test_it_is_bounded_and_drops_what_was_used_longest_ago(far, data, tmp_path):
    storage = cached(far, tmp_path, max_bytes=20_000)
    for i in range(50):
        read(storage, 1000 * i, 1000)
        os.utime(ranges(tmp_path)[0])
    size = sum(path.stat().st_size for path in ranges(tmp_path))
    assert size <= 20_000 * 17 / 16 + 1032
    far.reads.clear()
    assert read(storage, 49_000, 1000) == data[49_000:50_000]
    assert far.reads == []


def test_a_cache_that_cannot_be_written_is_said_once(far, data, tmp_path, caplog):
    storage = cached(far, tmp_path)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"no folder")
    for _ in range(3):
        assert read(storage, 0, 100) == data[:100]
    assert caplog.text.count("nothing more is cached") == 1


def test_reading_past_the_end_is_what_the_storage_says(far, tmp_path):
    storage = cached(far, tmp_path)
    with pytest.raises(TruncatedFile, match="ends at byte"):
        read(storage, 99_999, 2)
    with pytest.raises(InputError, match="more than the 10"):
        storage.read("a", limit=10)


def test_the_commands_for_caches_know_it(far, tmp_path):
    read(cached(far, tmp_path), 0, 5000)
    report = cache_list(tmp_path / "cache")
    assert (report.files, report.bytes) == (1, 5032)


def test_processes_share_it(data, far, tmp_path):
    code = (
        "import sys, random; from shardstate.storage import LocalStorage\n"
        "from shardstate.storage.cached import CachedStorage, RangeCache\n"
        "far, cache, seed = sys.argv[1:]\n"
        "data = open(far + '/a', 'rb').read(); rng = random.Random(int(seed))\n"
        "s = CachedStorage(LocalStorage(far), RangeCache(cache, max_bytes=60_000))\n"
        "for _ in range(300):\n"
        "    b = rng.randrange(60) * 1000; part = bytearray(2000)\n"
        "    s.read_into('a', b, [memoryview(part)]); assert part == data[b : b + 2000]\n"
    )
    arguments = [str(tmp_path / "far"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *arguments, str(seed)]) for seed in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p not in ranges(tmp_path)]
    assert left == []
