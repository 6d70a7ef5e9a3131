"""`copy` to, from and between stores, on a network that fails."""

import re
import threading
import time

import pytest
from proxy import Proxy, first, proxy, some
from test_commands import files, objects, upload

import shardstate
from checkpoints import tree, write_llama
from shardstate.engine import MEMORY_BYTES
from shardstate.errors import DigestError
from shardstate.storage import Access

SMALL = {"heads": 16, "kv_heads": 4, "head_dim": 32, "inner": 2048, "vocab": 8192, "layers": 2}
WIDE = rb"(?s)model-rank.*bytes=\d+-\d{5}"  # not of a header alone
LARGE = {"heads": 32, "kv_heads": 8, "head_dim": 64, "inner": 8192, "vocab": 4000, "layers": 4}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    shardstate.shard(write_llama(folder / "llama", **SMALL), folder / "tp4", tp=4)
    return folder / "tp4"


@pytest.fixture
def access(s3):
    return Access(timeout=10, options=s3.options)


def test_push_pull_and_store_to_store(on_disk, s3, access, folder, tmp_path):
    one, other = f"s3://bucket/{folder}", f"s3://bucket/{folder}-again"
    shardstate.copy(on_disk, one, access=access)
    assert objects(s3, folder) == files(on_disk)
    shardstate.copy(one, other, access=access)
    assert objects(s3, f"{folder}-again") == files(on_disk)
    shardstate.copy(other, tmp_path / "back", access=access)
    assert tree(tmp_path / "back") == tree(on_disk)
    report = shardstate.copy(on_disk, other, access=access)
    assert report.bytes_written == 0


def test_ranks_bring_only_what_a_node_needs(on_disk, s3, access, folder, tmp_path):
    upload(s3, on_disk, folder)
    with proxy(s3.port) as between:
        there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
        report = shardstate.copy(f"s3://bucket/{folder}", tmp_path / "c", ranks=[2], access=there)
        small = sum(len(data) for name, data in files(on_disk).items() if "part" not in name)
        assert between.body_bytes <= 1.01 * report.bytes + 3 * small + (64 << 10)
    loaded = shardstate.load(tmp_path / "c", rank=2, verify=True)
    assert list(loaded) == list(shardstate.load(on_disk, rank=2))


def test_what_the_network_corrupts_is_read_again(on_disk, s3, access, folder, tmp_path):
    upload(s3, on_disk, folder)
    hit = []

    def rule(head, _number):
        if re.search(WIDE, head) and len(hit) < 3:
            hit.append(head)
            return "corrupt"
        return None

    with proxy(s3.port, rule) as between:
        there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
        shardstate.copy(f"s3://bucket/{folder}", tmp_path / "copy", access=there)
        assert len(hit) == 3
        between.rule = lambda head, _number: "corrupt" if re.search(WIDE, head) else None
        with pytest.raises(DigestError, match="after 4 tries"):
            shardstate.copy(f"s3://bucket/{folder}", tmp_path / "other", access=there)
    assert tree(tmp_path / "copy") == tree(on_disk)
    assert not (tmp_path / "other" / "shardstate.json").exists()


def test_500_mb_in_bounded_memory_with_failing_requests_and_a_restarted_server(
    s3, access, folder, tmp_path
):
    """One request in ten fails, and the server is killed and started again in the middle."""
    source = write_llama(tmp_path / "llama", **LARGE)
    stored, copy = tmp_path / "set", tmp_path / "copy"
    shardstate.shard(source, stored, tp=2, max_part_size="130MB")
    assert sum(file.stat().st_size for file in stored.glob("*.safetensors")) > 500e6
    url = f"s3://bucket/{folder}"
    pushed = shardstate.copy(stored, url, access=access)
    assert pushed.peak_extra_bytes <= MEMORY_BYTES
    sharded = shardstate.shard(source, f"{url}-tp8", tp=8, access=access)
    assert sharded.peak_extra_bytes <= MEMORY_BYTES
    loaded = shardstate.api.load_rank(f"{url}-tp8", rank=3, access=access)[1]
    assert loaded.peak_extra_bytes <= MEMORY_BYTES
    with proxy(s3.port, some(0.1, "503", "cut", "reset")) as between:
        there = Access(timeout=30, options=access.options | {"endpoint": between.endpoint})
        restart = threading.Thread(target=restart_when, args=(s3, between, 40))
        restart.start()
        pulled = shardstate.copy(url, copy, access=there)
        restart.join()
    assert pulled.peak_extra_bytes <= MEMORY_BYTES
    assert shardstate.verify(copy, full=True).problems == ()


def test_pushing_while_requests_fail(s3, access, folder, tmp_path):
    """Also the last one of an upload, which nothing but another upload can mend."""
    on_disk = tmp_path / "set"
    shardstate.shard(write_llama(tmp_path / "llama", **SMALL), on_disk, tp=1)
    fates = some(0.1, "503", "reset")
    lost = first(1, "lost", method=b"POST", containing=b"uploadId")
    refused = first(1, "reset", method=b"POST", containing=b"uploadId")
    rules = (lost, refused, fates)
    with proxy(s3.port, lambda h, n: next((f for r in rules if (f := r(h, n))), None)) as between:
        there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
        shardstate.copy(on_disk, f"s3://bucket/{folder}", access=there)
        ends = [line for line in between.requests if re.match(rb"POST .*uploadId=", line)]
        assert len(ends) >= 3
    assert objects(s3, folder) == files(on_disk)
    assert s3.uploads() == []


def restart_when(s3, between: Proxy, requests: int) -> None:
    """Kill the server after so many requests, and start it again."""
    give_up = time.monotonic() + 60
    while len(between.requests) < requests and time.monotonic() < give_up:
        time.sleep(0.02)
    s3.kill()
    time.sleep(0.5)
    s3.start()
