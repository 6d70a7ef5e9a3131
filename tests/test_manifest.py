from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstate.digest import digest_of
from shardstate.errors import SetError
from shardstate.manifest import (
    FileEntry,
    Manifest,
    PartEntry,
    Record,
    Sealed,
    SetInfo,
    Sizes,
    SmallFile,
    Source,
    manifest_json,
    manifest_of,
    parse_manifest,
    parse_record,
    record_json,
    seal,
    set_id,
    unseal,
)
from shardstate.names import DEFAULT_PATTERN, default_pattern, provenance_name, record_name
from shardstate.names import PIPELINE_PATTERN as PIPELINE
from shardstate.sharding import Topology

A, B = digest_of(b"a"), digest_of(b"b")
digests = st.binary(max_size=4).map(digest_of)
sizes = st.integers(0, 2**63 - 1)
words = st.none() | st.text(max_size=4)


@st.composite
def infos(draw: st.DrawFn) -> SetInfo:
    source = st.builds(Source, location=st.text(max_size=4), revision=words, fingerprint=digests)
    topology = Topology(*(draw(st.integers(1, n)) for n in (3, 2, 2)))
    by_hand = "".join(f"-{{{axis}_rank}}" for axis in ("pp", "dp") if getattr(topology, axis) > 1)
    return SetInfo(
        topology=Sizes(topology.tp, topology.pp, topology.dp),
        layout=draw(st.sampled_from(["rules", "vllm"])),
        stage=draw(st.sampled_from(["checkpoint", "model", "kernel"])),
        pattern=draw(
            st.sampled_from(
                [default_pattern(topology), f"{{part}}-{{tp_rank}}{by_hand}.safetensors"]
            )
        ),
        dtype=draw(st.sampled_from(["keep", "bf16"])),
        quantization=draw(words),
        platform=draw(words),
        engine=draw(words),
        engine_version=draw(words),
        engine_arguments=draw(st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2)),
        source=draw(st.none() | source),
    )


def part_name(info: SetInfo, rank: int, part: int) -> str:
    stage, own = divmod(rank, info.topology.tp)
    replica, stage = divmod(stage, info.topology.pp)
    return info.pattern.format(rank=own, tp_rank=own, pp_rank=stage, dp_rank=replica, part=part)


@st.composite
def record_sets(draw: st.DrawFn) -> list[Record]:
    """Draw the records of all ranks of one set."""
    info = draw(infos())
    companions = draw(
        st.lists(
            st.builds(SmallFile, st.sampled_from(["c.json", "a/b.txt", "z"]), sizes, digests),
            unique_by=lambda c: c.name,
        )
    )
    found = []
    for rank in range(info.shape.world):
        blocks = st.lists(st.lists(digests, max_size=2).map(tuple), max_size=2).map(tuple)
        files = tuple(
            PartEntry(part_name(info, rank, i), *draw(st.tuples(sizes, digests, digests, blocks)))
            for i in range(draw(st.integers(0, 2)))
        )
        names = st.text(max_size=3)
        found.append(
            Record(
                set="x",
                rank=rank,
                info=info,
                files=files,
                aliases=tuple(draw(st.lists(st.lists(names).map(tuple), max_size=2))),
                padding=draw(st.dictionaries(names, st.just([[(0, 1), (2, 3)]]), max_size=1)),
                replica_of=draw(st.dictionaries(names, st.integers(0, 3), max_size=1)),
                provenance=draw(st.none() | st.builds(Sealed, sizes, digests)),
                companions=tuple(companions),
            )
        )
    return found


def record(rank: int = 0, *, tp: int = 2, **changes: Any) -> Record:
    info = SetInfo(
        topology=Sizes(tp),
        layout="rules",
        stage="checkpoint",
        pattern=DEFAULT_PATTERN,
        dtype="keep",
        source=Source("/src", None, A),
    )
    files = (PartEntry(part_name(info, rank, 0), 5000, A, B, ((A, B), ())),)
    whole = Record(set="s", rank=rank, info=info, files=files, provenance=Sealed(9, A))
    return msgspec.structs.replace(whole, **changes)


def manifest(tp: int = 2) -> Manifest:
    return manifest_of([(r, record_json(r)) for r in (record(i, tp=tp) for i in range(tp))])


def resealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a file of a set after `change`, with a digest that is right again."""
    content = json.loads(data)
    del content["digest"]
    change(content)
    return seal(content)


@given(record_sets())
def test_records_survive_their_json(records: list[Record]) -> None:
    for each in records:
        data = record_json(each)
        assert each == parse_record(data, file="r", rank=each.rank)
        assert data == record_json(parse_record(data, file="r", rank=each.rank))


@given(record_sets(), st.randoms())
def test_the_manifest_is_a_function_of_the_records(records: list[Record], random: Any) -> None:
    pairs = [(each, record_json(each)) for each in records]
    made = manifest_of(pairs)
    random.shuffle(pairs)
    assert manifest_json(made) == manifest_json(manifest_of(pairs))
    assert made == parse_manifest(manifest_json(made), file="m")
    names = [entry.name for entry in made.files]
    assert sorted(set(names)) == names
    expected = {record_name(each.rank) for each in records}
    expected |= {file.name for each in records for file in each.files}
    expected |= {file.name for each in records for file in each.companions}
    expected |= {provenance_name(each.rank) for each in records if each.provenance}
    assert expected == set(names)


def test_literal_bytes_of_a_manifest() -> None:
    body = (
        '{"version":1,"set":"s","topology":{"tp":1,"pp":1,"dp":1},"layout":"rules",'
        f'"stage":"checkpoint","pattern":"{DEFAULT_PATTERN}","dtype":"keep","quantization":null,'
        '"platform":null,"engine":null,"engine_version":null,"engine_arguments":{},'
        f'"source":{{"location":"/src","revision":null,"fingerprint":"{A}"}},"files":['
        f'{{"name":"model-rank-0-part-0.safetensors","bytes":5000,"digest":"{B}","rank":0}}]'
    )
    info = record(tp=1).info
    entry = FileEntry("model-rank-0-part-0.safetensors", 5000, B, 0)
    expected = f'{body},"digest":"{digest_of(body.encode())}"}}\n'.encode()
    assert expected == manifest_json(Manifest("s", info, (entry,)))


def test_keys_of_a_record_come_in_the_order_of_the_format() -> None:
    head = ["version", "set", "rank"]
    info = ["topology", "layout", "stage", "pattern", "dtype", "quantization", "platform"]
    engine = ["engine", "engine_version", "engine_arguments", "source"]
    rest = ["files", "aliases", "padding", "replica_of", "provenance", "companions", "digest"]
    assert [*head, *info, *engine, *rest] == list(json.loads(record_json(record())))
    assert b" " not in record_json(record())


@pytest.mark.parametrize("kind", ["manifest", "record"])
def test_a_bit_flipped_anywhere_is_refused(kind: str) -> None:
    data = manifest_json(manifest()) if kind == "manifest" else record_json(record())
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        with pytest.raises(SetError, match=r"^f: .*(digest|damaged)") as error:
            parse_manifest(bytes(broken), file="f")
        assert error.value.file == "f"


def test_a_file_that_ends_early_or_late_is_refused() -> None:
    data = record_json(record())
    for broken in (*(data[:end] for end in range(0, len(data), 7)), data + b"\n", data + data):
        with pytest.raises(SetError, match=r"^f: "):
            parse_record(broken, file="f", rank=0)


def test_what_is_sealed_and_no_json_is_refused() -> None:
    for raw in (b"", b"{", b"[1", b'{"version":1,"set":"\xff"', b'{"version":' + b"[" * 100_000):
        data = raw + b',"digest":"' + digest_of(raw).encode() + b'"}\n'
        with pytest.raises(SetError, match="it is no file of this format version"):
            parse_manifest(data, file="f")


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3))
def test_unknown_keys_of_version_1_are_ignored(extra: dict[str, int]) -> None:
    def grow(content: dict[str, Any]) -> None:
        content.update({f"x-{key}": value for key, value in extra.items()})
        content["topology"]["ep"] = 1
        content["files"][0]["mode"] = "0644"

    assert manifest() == parse_manifest(resealed(manifest_json(manifest()), grow), file="f")
    assert record() == parse_record(resealed(record_json(record()), grow), file="f", rank=0)


@pytest.mark.parametrize("version", [0, 2, 10**30])
def test_another_version_is_refused_before_anything_else(version: int) -> None:
    data = seal({"version": version, "whatever": []})
    with pytest.raises(SetError, match=r"^f: .*format version"):
        parse_manifest(data, file="f")


def test_a_newer_version_says_what_to_do() -> None:
    with pytest.raises(SetError, match=r"has format version 2, .*; install a newer shardstate"):
        unseal(seal({"version": 2}), file="f")


WRONG_NAMES = ["", ".", "..", "/x", "../x", "a/../x", "a//b", "a/", "a\0", "a\\b", ".shardstate-x"]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_lead_out_are_refused(name: str) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["files"][0]["name"] = name

    with pytest.raises(SetError, match="which is no name of a file below"):
        parse_manifest(resealed(manifest_json(manifest()), rename), file="f")
    with pytest.raises(SetError, match="which is no name of a file below"):
        parse_record(resealed(record_json(record()), rename), file="f", rank=0)
    companion = record(companions=(SmallFile(name, 1, A),))
    with pytest.raises(SetError, match="which is no name of a file below"):
        parse_record(record_json(companion), file="f", rank=0)


def test_rank_files_lie_in_no_folder() -> None:
    data = record_json(record())
    with pytest.raises(SetError, match="'a/b', which is no name"):
        parse_record(resealed(data, lambda c: c["files"][0].update(name="a/b")), file="f", rank=0)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(set="a b"), "set"),
        (lambda c: c.update(set="a\n"), "set"),
        (lambda c: c.update(set="a" * 65), "set"),
        (lambda c: c.update(layout="other"), "layout is 'other', expected one of"),
        (lambda c: c.update(stage="other"), "stage is 'other', expected one of"),
        (lambda c: c.update(pattern="x"), "pattern 'x': lacks {part}"),
        (lambda c: c.update(topology={"tp": 0}), "tp"),
        (lambda c: c.update(topology={"tp": 1 << 21}), "tp"),
        (lambda c: c.update(topology={"tp": 2.5}), "tp"),
        (lambda c: c["source"].update(fingerprint=A.upper()), "fingerprint"),
        (lambda c: c["files"][0].update(bytes=-1), "bytes"),
        (lambda c: c["files"][0].update(bytes=1 << 63), "bytes"),
        (lambda c: c["files"][0].update(digest=A[1:]), "digest"),
        (lambda c: c["files"][0].update(digest=A + "\n"), "digest"),
        (lambda c: c["files"][0].pop("name"), "name"),
        (lambda c: c["files"].append(c["files"][0]), "lists a file twice"),
        (lambda c: c.pop("files"), "files"),
        (lambda c: c.pop("set"), "set"),
    ],
)
def test_entries_are_checked(change: Change, message: str) -> None:
    with pytest.raises(SetError, match=message) as error:
        parse_manifest(resealed(manifest_json(manifest()), change), file="the.file")
    assert str(error.value).startswith("the.file: ")
    with pytest.raises(SetError, match=message) as error:
        parse_record(resealed(record_json(record()), change), file="the.file", rank=0)
    assert str(error.value).startswith("the.file: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["topology"].update(tp=3), r"of ranks \[0, 1\], expected 0 to 2"),
        (lambda c: c["topology"].update(tp=1), r"of ranks \[0, 1\], expected 0 to 0"),
        (
            lambda c: c["topology"].update(tp=1 << 16, pp=1 << 16) or c.update(pattern=PIPELINE),
            "expected 0 to 4294967295",
        ),
        (lambda c: c["topology"].update(tp=1 << 20), "<= 65536"),
        (lambda c: [f.update(rank=None) for f in c["files"]], r"of ranks \[\], expected 0 to 1"),
        (
            lambda c: c.update(files=[f for f in c["files"] if f["name"] != record_name(1)]),
            r"does not list shardstate\.rank-1\.json",
        ),
    ],
)
def test_a_manifest_lists_every_rank(change: Change, message: str) -> None:
    with pytest.raises(SetError, match=message):
        parse_manifest(resealed(manifest_json(manifest()), change), file="f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(rank=1), "is the record of rank 1 of 2, expected rank 0"),
        (lambda c: c["topology"].update(tp=1, pp=1) or c.update(rank=3), "rank 3 of 1, expected"),
        (
            lambda c: c["files"][0].update(name="model-rank-1-part-0.safetensors"),
            "its part 0 is model-rank-1-part-0.safetensors, expected model-rank-0-part-0",
        ),
    ],
)
def test_a_record_is_of_its_rank(change: Change, message: str) -> None:
    with pytest.raises(SetError, match=message):
        parse_record(resealed(record_json(record()), change), file="f", rank=0)


def test_a_rank_outside_the_topology_has_no_record() -> None:
    with pytest.raises(SetError, match="is the record of rank 2 of 2"):
        parse_record(record_json(record(2)), file="f", rank=2)


def test_records_of_two_sets_make_no_manifest() -> None:
    dtype = msgspec.structs.replace(record().info, dtype="bf16")
    print_ = msgspec.structs.replace(record().info, source=Source("/src", None, B))
    for other in (record(1, set="t"), record(1, info=dtype), record(1, info=print_)):
        with pytest.raises(SetError, match="of rank 0 and rank 1 are not of one set"):
            manifest_of([(other, b"1"), (record(), b"0")])


def test_the_place_of_the_source_may_differ_and_comes_from_the_lowest_rank() -> None:
    moved = msgspec.structs.replace(record().info, source=Source("/other", "main", A))
    assert record().info.agrees(moved)
    made = manifest_of([(record(1, info=moved), b"1"), (record(), b"0")])
    assert made.info.source == Source("/src", None, A)


def test_companions_that_differ_make_no_manifest() -> None:
    one, two = (
        record(i, companions=(SmallFile("c", 1, digest),)) for i, digest in enumerate([A, B])
    )
    with pytest.raises(SetError, match="c: rank 0 and rank 1 recorded different content"):
        manifest_of([(one, b""), (two, b"")])


def test_a_set_has_another_id_where_its_bytes_would_differ() -> None:
    info = record().info
    base: dict[str, Any] = {
        "info": info, "fingerprint": A, "max_part_bytes": 5, "rules_digest": A
    }  # fmt: skip
    replace = msgspec.structs.replace
    others = [
        {**base, "fingerprint": B},
        {**base, "max_part_bytes": 6},
        {**base, "rules_digest": B},
        *(
            {**base, "info": replace(info, **change)}
            for change in (
                {"topology": Sizes(3)},
                {"layout": "vllm"},
                {"stage": "model"},
                {"pattern": "{part}-{rank}.safetensors"},
                {"dtype": "bf16"},
            )
        ),
    ]
    ids = [set_id(**each) for each in (base, *others)]
    assert len(ids) == len(set(ids))
    elsewhere = replace(info, source=Source("/elsewhere", "v2", B))
    assert ids[0] == set_id(**{**base, "info": elsewhere})


def twice(data: bytes, first: bytes, second: bytes) -> bytes:
    """Return a sealed file in which `second` follows `first` before the digest."""
    raw = data[: data.rindex(b',"digest":"')].replace(first, first + second, 1)
    return raw + b',"digest":"' + digest_of(raw).encode() + b'"}\n'


def test_a_key_that_comes_twice_is_refused() -> None:
    # Another reader could take the other one.
    data = twice(manifest_json(manifest()), b'"layout":"rules",', b'"layout":"vllm",')
    with pytest.raises(SetError, match="f: has the key 'layout' twice in one object"):
        parse_manifest(data, file="f")


def test_json_that_nests_too_deep_is_refused() -> None:
    deep = b'"later":' + b"[" * 80 + b"]" * 80 + b","
    data = twice(manifest_json(manifest()), b'"version":1,', deep)
    with pytest.raises(SetError, match="f: nests 81 deep, expected at most 64"):
        parse_manifest(data, file="f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "shardstate.json", "rank": None}, "a name that none may have"),
        ({"name": "shardstate.json.sig", "rank": None}, "a name that none may have"),
        ({"name": "evil.safetensors", "rank": None}, "a name that none may have"),
        ({"name": ".git/config", "rank": None}, "a name that none may have"),
        ({"name": "a/pytorch_model.bin", "rank": None}, "a name that none may have"),
        ({"name": "config.json", "rank": 0}, "lists 'config.json' for rank 0, whose files are"),
        (
            {"name": "model-rank-1-part-7.safetensors", "rank": 0},
            "lists 'model-rank-1-part-7.safetensors' for rank 0, whose files are model-rank-0-part",
        ),
    ],
)
def test_a_manifest_lists_files_under_the_names_of_their_ranks(
    change: dict[str, Any], message: str
) -> None:
    def add(content: dict[str, Any]) -> None:
        content["files"].append({"bytes": 1, "digest": A, **change})

    with pytest.raises(SetError, match=message):
        parse_manifest(resealed(manifest_json(manifest()), add), file="f")


def test_no_file_lies_below_another() -> None:
    companions = (SmallFile("a", 1, A), SmallFile("a/b", 1, A))
    with pytest.raises(SetError, match="lists 'a/b' below another file"):
        parse_record(record_json(record(companions=companions)), file="f", rank=0)


def test_a_record_brings_no_weights_as_companions() -> None:
    for name in ("shardstate.rank-1.json", "model-rank-1-part-0.safetensors", "x.pt"):
        companions = (SmallFile(name, 1, A),)
        with pytest.raises(SetError, match="as a companion, a name that none may have"):
            parse_record(record_json(record(companions=companions)), file="f", rank=0)
