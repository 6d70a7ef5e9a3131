"""What a caller decides of how local files are read is kept to, from the command line down."""

import json

import numpy as np
import pytest

import shardstate
from checkpoints import write_llama
from shardstate import Access, Reading
from shardstate.cli.main import run
from shardstate.storage.adaptive import AdaptiveReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("reading") / "checkpoint"
    return write_llama(made, files=2, head_dim=32, inner=512, vocab=1003)


@pytest.fixture
def asked(monkeypatch):
    """The wishes, and the sizes of reads, that arrive at the reader."""
    found = {"readings": set(), "sizes": []}
    real = AdaptiveReader.read_into

    def read_into(reader, name, begin, views, arrived=None):
        found["readings"].add((reader._storage.reading, reader.threads))
        found["sizes"].append(sum(view.nbytes for view in views))
        return real(reader, name, begin, views, arrived)

    monkeypatch.setattr(AdaptiveReader, "read_into", read_into)
    return found


@pytest.mark.parametrize("direct", [True, False])
def test_options_of_the_command_line_arrive(folder, asked, capsys, direct):
    flags = ["--direct" if direct else "--no-direct", "--chunk-bytes", "64KiB", "--threads", "3"]
    assert run(["load", str(folder), "--rank", "0", "--tp", "2", "--json", *flags]) == 0
    wish = Reading(threads=3, direct=direct, chunk_bytes=64 << 10)
    assert asked["readings"] == {(wish, 3)}
    # A read takes two more pieces where those overlap.
    assert max(asked["sizes"]) <= 3 * (64 << 10)
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_read"] == sum(asked["sizes"])


@pytest.mark.parametrize("direct", [True, False, None])
@pytest.mark.parametrize("chunk_bytes", [None, 4096, 100_000, 1 << 30])
def test_the_result_is_the_same(folder, direct, chunk_bytes):
    access = Access(reading=Reading(direct=direct, chunk_bytes=chunk_bytes))
    for rank in range(2):
        expected = shardstate.load(folder, rank=rank, tp=2)
        found = shardstate.load(folder, rank=rank, tp=2, access=access)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert np.array_equal(array.view(np.uint8), expected[name].view(np.uint8)), name


def test_what_was_cached_is_told(folder, capsys):
    for file in folder.glob("*.safetensors"):
        file.read_bytes()
    assert run(["load", str(folder), "--rank", "1", "--tp", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_cached"] == report["bytes_read"] > 0


def test_a_size_that_is_none_is_refused(folder, capsys):
    assert run(["load", str(folder), "--rank", "0", "--tp", "2", "--chunk-bytes", "x"]) == 2
    assert "size 'x'" in capsys.readouterr().err
