"""One literal set pins the format: the bytes below `golden/` never change within version 1."""

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

import shardstate
from shardstate.api import planning
from shardstate.storage import LocalStorage

GOLDEN = Path(__file__).parent / "golden"


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def at_golden_source(monkeypatch):
    """Let the source lie at `/golden/source`: its location is part of the records."""

    def storage(path, access):
        found = LocalStorage(path)
        if Path(path) == GOLDEN / "source":
            found.location = "/golden/source"
        return found

    monkeypatch.setattr(planning, "storage_at", storage)


@pytest.mark.parametrize("ranks", [None, [[1], [0]]])
def test_sharding_the_source_gives_the_golden_bytes(ranks, at_golden_source, tmp_path):
    for chosen in ranks or [None]:
        shardstate.shard(GOLDEN / "source", tmp_path / "tp2", tp=2, max_part_size=100, ranks=chosen)
    expected, actual = files_of(GOLDEN / "tp2"), files_of(tmp_path / "tp2")
    assert list(expected) == list(actual)
    assert [name for name in expected if expected[name] != actual[name]] == []


def test_the_golden_set_is_sound():
    report = shardstate.verify(GOLDEN / "tp2", against=GOLDEN / "source")
    assert report.problems == ()
    assert report.committed is True


def test_the_golden_set_loads():
    tensors = shardstate.load(GOLDEN / "tp2", rank=1, verify=True)
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    # Rows 3 and 4 of the source, then the row that fills up 5 rows to 2 × 3.
    expected = [[33, 34, 35, 36], [37, 38, 39, 40], [0, 0, 0, 0]]
    assert embedding.tolist() == expected
    assert tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float32).tolist() == [
        [48, 49, 50],
        [54, 55, 56],
        [60, 61, 62],
        [66, 67, 68],
    ]
    # One key/value head for two ranks: both hold it.
    other = shardstate.load(GOLDEN / "tp2", rank=0)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert tensors[name].tobytes() == other[name].tobytes()


def test_the_digests_are_those_that_the_format_describes():
    name = "model-rank-1-part-0.safetensors"
    raw = (GOLDEN / "tp2" / name).read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    assert length % 4096 == 0
    record = (GOLDEN / "tp2" / "shardstate.rank-1.json").read_bytes()
    header = blake3(raw[:length])
    assert f'"name":"{name}","bytes":{len(raw)},"header":"{header.hexdigest()}"'.encode() in record
    # Each tensor of this file is shorter than a block: digest of the digest of its bytes.
    with shardstate.open(GOLDEN / "tp2") as checkpoint:
        own = [t for t in checkpoint.rank_catalog(1) if t.file == name]
    digests = [blake3(blake3(raw[t.begin : t.end]).digest()).digest() for t in own]
    whole = blake3(header.digest() + b"".join(digests)).hexdigest()
    assert f'"digest":"{whole}"'.encode() in record
    for file in ("shardstate.json", "shardstate.rank-0.json", "shardstate.rank-0.provenance.json"):
        data = (GOLDEN / "tp2" / file).read_bytes()
        body, _, rest = data.rpartition(b',"digest":"')
        assert rest == blake3(body).hexdigest().encode() + b'"}\n'
