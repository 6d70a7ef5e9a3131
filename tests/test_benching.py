"""`bench`: this engine, a peer and the raw limits, on the user's own files."""

import json
import shutil
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from checkpoints import write_llama
from shardstate import Access, Reading, api, plot
from shardstate.cli.main import run
from shardstate.errors import UsageError
from shardstate.plot import Bar, bars_svg
from shardstate.raw import Setting, Span, drop, read_spans, resident, room_for, touched
from shardstate.storage.adaptive import AdaptiveReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench") / "checkpoint"
    return write_llama(made, files=2, head_dim=32, inner=512, vocab=1003)


def test_all_ways_are_measured_warm_and_cold(folder, tmp_path, capsys):
    picture = tmp_path / "bench.svg"
    assert run(["bench", str(folder), "--rounds", "2", "--json", "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {(each["state"], each["name"]) for each in report["measured"]}
    assert {("warm", "shardstate"), ("warm", "safetensors")} <= names
    assert ("warm", "raw buffered 2 × 4 MiB") in names
    for each in report["measured"]:
        assert 0 < each["gbps_min"] <= each["gbps"] <= each["gbps_max"]
        assert each["gbps"] == pytest.approx(report["bytes"] / each["seconds"] / 1e9)
    assert any(note.startswith("warm: ") for note in report["notes"])
    assert ("cold", "shardstate") in names or any("cold was not" in n for n in report["notes"])
    drawn = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "shardstate" in drawn
    assert "warm" in drawn


def test_what_a_person_reads(folder, capsys):
    assert run(["bench", str(folder), "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert "shardstate" in text
    assert "of the best raw setting here" in text


def test_no_more_is_read_than_asked_for(folder):
    whole = api.bench(folder, rounds=1).bytes
    assert 0 < api.bench(folder, rounds=1, max_size=whole // 2).bytes <= whole // 2
    # The first ones, and not small ones of every file, which a hub would have to send whole.
    assert api.bench(folder, rounds=1, max_size=whole // 4).files == 1


def test_the_caller_decides_how_the_engine_reads(folder, monkeypatch):
    sizes = []
    real = AdaptiveReader.read_into

    def read_into(reader, name, begin, views, arrived=None):
        sizes.append(sum(view.nbytes for view in views))
        return real(reader, name, begin, views, arrived)

    monkeypatch.setattr(AdaptiveReader, "read_into", read_into)
    access = Access(reading=Reading(threads=3, chunk_bytes=64 << 10))
    api.bench(folder, rounds=1, access=access)
    assert 0 < max(sizes) <= 3 * (64 << 10)


def test_where_the_cache_keeps_the_files_cold_is_not_claimed(folder):
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("there is no memory file system here")
    with tempfile.TemporaryDirectory(dir=shared) as there:
        shutil.copytree(folder, Path(there) / "a")
        report = api.bench(Path(there) / "a", rounds=1)
    assert {each["state"] for each in report.measured} == {"warm"}
    assert any("cold was not measured: 100% stays" in note for note in report.notes)


def test_bad_arguments(folder, capsys):
    with pytest.raises(UsageError, match="rounds is 0"):
        api.bench(folder, rounds=0)
    assert run(["bench", str(folder), "--max-size", "1", "--rounds", "1"]) == 2
    assert "small enough" in capsys.readouterr().err
    assert run(["bench", str(folder / "nowhere")]) == 2


@pytest.mark.parametrize("setting", [Setting(1, 4096, False), Setting(3, 1 << 20, False)])
def test_raw_reads_bring_all_bytes(folder, setting):
    files = sorted(folder.glob("*.safetensors"))
    spans = [Span(str(file), 0, file.stat().st_size) for file in files]
    memory = touched(room_for(spans))
    read_spans(spans, setting, memory)
    at = 0
    for file in files:
        data = file.read_bytes()
        assert memory[at : at + len(data)].tobytes() == data
        at += -(-len(data) // 4096) * 4096
    assert resident(spans) == 1
    drop(spans)
    assert resident(spans) < 1


def test_bars_are_drawn_to_scale():
    groups = [("warm", [Bar("a & b", 2, 1, 3, own=True), Bar("c", 1, 1, 1)])]
    root = ElementTree.fromstring(bars_svg(groups, unit="GB/s"))
    bars = [each for each in root if each.tag.endswith("rect")][1:]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert "a & b" in "".join(root.itertext())
    assert plot.bars_svg([], unit="s").endswith("</svg>\n")
