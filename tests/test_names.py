from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstate.catalog import is_file_name
from shardstate.errors import UsageError
from shardstate.names import (
    DEFAULT_PATTERN,
    MANIFEST,
    OURS,
    SIGNATURE,
    Pattern,
    check_pattern,
    default_pattern,
    is_companion,
    is_relative_path,
    note_name,
    note_place,
    provenance_name,
    provenance_rank,
    record_name,
    record_rank,
    temporary_name,
)
from shardstate.sharding import Topology

numbers = st.integers(0, 10**6)
pieces = st.sampled_from(
    [
        "{rank}",
        "{tp_rank}",
        "{pp_rank}",
        "{dp_rank}",
        "{part}",
        "{part}",
        "-",
        "-",
        "1",
        "11",
        "0",
        ".",
        "x",
        "{{",
        "}}",
        "(",
        "\\d",
    ]
)


def test_the_default_pattern_is_that_of_vllm() -> None:
    pattern = check_pattern(DEFAULT_PATTERN, Topology(8))
    assert pattern.name(3, 12) == "model-rank-3-part-12.safetensors"
    assert pattern.parse("model-rank-3-part-12.safetensors") == (3, 12)


@pytest.mark.parametrize(
    ("topology", "rank", "name"),
    [
        (Topology(2, pp=3), 3, "model-pp-1-tp-1-part-9.safetensors"),
        (Topology(2, dp=3), 3, "model-dp-1-rank-1-part-9.safetensors"),
        (Topology(2, pp=3, dp=2), 9, "model-dp-1-pp-1-tp-1-part-9.safetensors"),
    ],
)
def test_the_default_pattern_of_every_topology(topology: Topology, rank: int, name: str) -> None:
    pattern = check_pattern(default_pattern(topology), topology)
    assert pattern.name(rank, 9) == name
    assert pattern.parse(name) == (rank, 9)


topologies = st.builds(Topology, st.just(2), st.sampled_from([1, 1, 12]), st.sampled_from([1, 12]))


@given(st.lists(pieces, max_size=9), topologies, numbers, numbers)
def test_names_of_an_accepted_pattern_lead_back(
    texts: list[str], topology: Topology, rank: int, part: int
) -> None:
    try:
        pattern = check_pattern("".join(texts) + ".safetensors", topology)
    except UsageError:
        return
    rank %= topology.world
    assert (rank, part) == pattern.parse(pattern.name(rank, part))


@given(st.lists(pieces, max_size=9), topologies)
def test_names_of_an_accepted_pattern_differ(texts: list[str], topology: Topology) -> None:
    text = "".join(texts) + ".safetensors"
    some = [0, 1, 2, 10, 11, 110, 111]
    try:
        pattern = check_pattern(text, topology)
    except UsageError:
        return
    ranks = [rank for rank in some if rank < topology.world]
    names = Counter(pattern.name(rank, part) for rank in ranks for part in some)
    assert [name for name, count in names.items() if count > 1] == []
    assert all(is_file_name(name) for name in names)


@pytest.mark.parametrize(
    "name",
    [
        "model-rank-03-part-1.safetensors",
        "model-rank-3-part-1.safetensors.tmp",
        "xmodel-rank-3-part-1.safetensors",
        "model-rank--part-1.safetensors",
        "model-rank-3-part-1.safetensors\n",
        "model-rank-٣-part-1.safetensors",
        "model-rank-3-part-1xsafetensors",
        "",
    ],
)
def test_other_names_are_not_of_the_pattern(name: str) -> None:
    assert Pattern(DEFAULT_PATTERN).parse(name) is None


def test_a_number_that_a_pattern_says_twice_must_agree() -> None:
    pattern = check_pattern("{rank}-{tp_rank}-{part}.safetensors", Topology(2))
    assert pattern.parse("1-1-0.safetensors") == (1, 0)
    assert pattern.parse("1-2-0.safetensors") is None


def test_a_pattern_without_rank_means_rank_0() -> None:
    pattern = check_pattern("model-{part}.safetensors", Topology(1))
    assert pattern.parse("model-7.safetensors") == (0, 7)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model-{rank}.safetensors", "lacks {part}"),
        ("model-{part}.safetensors", "lacks {rank}"),
        ("{pp_rank}-{rank}-{part}.safetensors", "has {pp_rank}, and there is one pipeline stage"),
        ("{dp_rank}-{rank}-{part}.safetensors", "has {dp_rank}, and there is one replica"),
        ("{rank}{part}.safetensors", "two numbers with nothing but digits between"),
        ("{rank}10{part}.safetensors", "two numbers with nothing but digits between"),
        ("{rank}-{part}", 'must end with ".safetensors"'),
        ("{rank}/{part}.safetensors", "makes no plain file name"),
        ("../{rank}-{part}.safetensors", "makes no plain file name"),
        (".{rank}-{part}.safetensors", "makes no plain file name"),
        ("shardstate-{rank}-{part}.safetensors", "makes no plain file name"),
        ("{rank}-{part}\n.safetensors", "makes no plain file name"),
        ("{rank:03}-{part}.safetensors", "found {rank}"),
        ("{rank!r}-{part}.safetensors", "found {rank}"),
        ("{rank.real}-{part}.safetensors", "found {rank.real}"),
        ("{}-{part}.safetensors", "found {}"),
        ("{name}-{part}.safetensors", "{pp_rank}, {dp_rank}, {part}, found {name}"),
        ("{rank}-{part.safetensors", "expected '}'"),
        ("{rank}-{part}}.safetensors", "Single '}'"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)) as error:
        check_pattern(text, Topology(2))
    assert str(error.value).startswith(f"pattern {text!r}: ")


@given(numbers)
def test_names_of_records_and_provenance_lead_back(rank: int) -> None:
    assert rank == record_rank(record_name(rank))
    assert rank == provenance_rank(provenance_name(rank))
    assert record_rank(provenance_name(rank)) is None
    assert provenance_rank(record_name(rank)) is None


@pytest.mark.parametrize("rank", ["", "01", "-1", "1.5", "x", "1\n", "٣"])
def test_a_rank_is_a_plain_decimal(rank: str) -> None:
    assert record_rank(f"shardstate.rank-{rank}.json") is None
    assert provenance_rank(f"shardstate.rank-{rank}.provenance.json") is None


@given(numbers, numbers)
def test_names_of_notes_lead_back(rank: int, part: int) -> None:
    assert (rank, part) == note_place(note_name(rank, part))


@pytest.mark.parametrize(
    "name", ["part-1-2", f"{OURS}part-01-2", f"{OURS}part-1", f"{OURS}new-1-2"]
)
def test_other_names_are_no_notes(name: str) -> None:
    assert note_place(name) is None


@pytest.mark.parametrize("path", ["a", "a/b.json", "a/b/..c", ".x/y"])
def test_a_relative_path_stays_below(path: str) -> None:
    assert is_relative_path(path)


@pytest.mark.parametrize(
    "path", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a/\ud800"]
)
def test_a_path_that_could_lead_out_is_no_relative_path(path: str) -> None:
    assert not is_relative_path(path)


@given(st.text(max_size=300), numbers, numbers)
def test_temporary_names_are_marked_short_and_without_suffix(
    name: str, rank: int, part: int
) -> None:
    for made in (temporary_name(name), note_name(rank, part)):
        assert made.startswith(OURS)
        assert "." not in made[1:]
        assert is_file_name(made)
        assert not is_companion(made)


def test_temporary_names_differ() -> None:
    made = {temporary_name(str(i)) for i in range(1000)} | {note_name(1, 11), note_name(11, 1)}
    assert len(made) == 1002


@pytest.mark.parametrize(
    "path",
    ["config.json", "tokenizer.json", "sub/vocab.txt", "README.md", "x.gitignore", "modeling_x.py"],
)
def test_small_files_come_along(path: str) -> None:
    assert is_companion(path)


@pytest.mark.parametrize(
    "path",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "a.pt",
        "a.pth",
        "a.gguf",
        "a.h5",
        "a.msgpack",
        "onnx/model.onnx",
        "model.safetensors.index.json",
        ".gitattributes",
        ".git/config",
        ".cache/x/y.json",
        MANIFEST,
        SIGNATURE,
        record_name(0),
        "shardstate/x",
    ],
)
def test_weights_and_our_own_files_stay(path: str) -> None:
    assert not is_companion(path)
