import contextlib
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import shardstate
from checkpoints import (
    Stored,
    file_of,
    flip_bit,
    llama_tensors,
    place_of,
    read_header,
    safetensors_bytes,
    tensors_of,
    tree,
    write_llama,
    write_vllm_set,
    write_weights,
)
from shardstate import ShardStateError
from shardstate.cli.main import run
from shardstate.digest import BLOCK_BYTES, digest_of, rank_file_digest
from shardstate.errors import DamageError
from shardstate.manifest import seal

KINDS = {"header", "size", "missing", "extra", "digest", "rank", "stale", "source"}
R0, R1 = "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"
NORM = "model.norm.weight"  # every rank holds it whole


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("verify") / "llama", layers=1)


@pytest.fixture(scope="module")
def sound(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "set"
    shardstate.shard(source, out, tp=2)
    return out


@pytest.fixture
def copy(sound, tmp_path):
    """A set of two ranks to be damaged."""
    return shutil.copytree(sound, tmp_path / "set")


@pytest.fixture(scope="module")
def large_source(tmp_path_factory):
    """Its two largest tensors take three blocks on each of two ranks, the last not whole."""
    path = tmp_path_factory.mktemp("verify") / "large"
    return write_llama(path, layers=1, vocab=2 * 74_001, head_dim=8, seed=2)


@pytest.fixture(scope="module")
def large(large_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "set"
    shardstate.shard(large_source, out, tp=2)
    return out


def found(path, **options):
    """Return the problems as `verify` reports them, after checking what each must be like."""
    problems = shardstate.verify(path, **options).problems
    for problem in problems:
        assert problem.kind in KINDS
        assert problem.problem
        assert not os.path.isabs(problem.file)
        assert (problem.begin is None) == (problem.end is None)
        if problem.begin is not None:
            assert 0 <= problem.begin < problem.end
    return problems


def kinds(problems):
    return sorted((problem.kind, problem.file) for problem in problems)


def reseal(path, change):
    """Change a JSON file of a set and give it a digest that fits, as a forger would."""
    content = json.loads(path.read_bytes())
    del content["digest"]
    change(content)
    path.write_bytes(seal(content))


def forge(path, rank, file, offset):
    """Flip a bit of a rank file and make record and manifest agree with it."""
    flip_bit(path / file, offset)
    header, begin = read_header(path / file)
    del header["__metadata__"]
    raw = (path / file).read_bytes()
    order = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    blocks = [
        [digest_of(raw[begin + at : min(begin + at + BLOCK_BYTES, begin + last)])
         for at in range(first, last, BLOCK_BYTES)]
        for first, last in (entry["data_offsets"] for entry in order)
    ]  # fmt: skip
    record = path / f"shardstate.rank-{rank}.json"
    digest = rank_file_digest(digest_of(raw[:begin]), blocks)

    def change_record(content):
        entry = next(entry for entry in content["files"] if entry["name"] == file)
        entry["blocks"], entry["digest"] = blocks, digest

    def change_manifest(content):
        for entry in content["files"]:
            if entry["name"] == file:
                entry["digest"] = digest
            if entry["name"] == record.name:
                entry["digest"] = digest_of(record.read_bytes())

    reseal(record, change_record)
    reseal(path / "shardstate.json", change_manifest)


class TestEachKindOfProblem:
    def test_none_in_a_sound_set(self, source, sound):
        for options in ({}, {"full": True}, {"against": source}, {"ranks": [1], "full": True}):
            assert found(sound, **options) == ()

    def test_header_when_one_is_no_header(self, copy):
        raw = bytearray((copy / R0).read_bytes())
        raw[8:12] = b"oops"
        (copy / R0).write_bytes(raw)
        (problem,) = found(copy)
        assert (problem.kind, problem.file) == ("header", R0)

    def test_digest_when_a_header_is_sound_and_another(self, copy):
        raw = (copy / R1).read_bytes()
        (copy / R1).write_bytes(raw.replace(b'"format":"pt"', b'"format":"tp"'))
        (problem,) = found(copy)
        assert (problem.kind, problem.file, problem.begin) == ("digest", R1, 0)
        assert problem.end == read_header(copy / R1)[1]

    @pytest.mark.parametrize("by", [-5000, -1, 1, 4096])
    def test_size_when_a_file_is_shorter_or_longer(self, by, copy):
        size = (copy / R0).stat().st_size
        os.truncate(copy / R0, size + by)
        (problem,) = found(copy)
        assert (problem.kind, problem.file) == ("size", R0)
        assert (problem.begin, problem.end) == (min(size, size + by), max(size, size + by))
        assert str(size) in problem.problem
        assert str(size + by) in problem.problem

    @pytest.mark.parametrize("keep", [0, 5, 100])
    def test_size_when_even_the_header_is_cut(self, keep, copy):
        os.truncate(copy / R0, keep)
        (problem,) = found(copy, full=True)
        assert (problem.kind, problem.file) == ("size", R0)

    @pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json"])
    def test_size_and_digest_of_companions(self, name, copy):
        size = (copy / name).stat().st_size
        flip_bit(copy / name, size // 2)
        assert kinds(found(copy)) == [("digest", name)]
        os.truncate(copy / name, size - 1)
        assert kinds(found(copy)) == [("size", name)]

    def test_missing_whatever_file_it_is(self, sound, tmp_path):
        names = [name for name in tree(sound) if not name.endswith("/")]
        for i, name in enumerate(names):
            if name == "shardstate.json":
                continue
            path = shutil.copytree(sound, tmp_path / str(i))
            (path / name).unlink()
            (problem,) = [p for p in found(path) if p.kind != "extra"]
            assert (problem.kind, problem.file) == ("missing", name)

    def test_missing_folder_of_a_companion(self, copy):
        shutil.rmtree(copy / "1_Pooling")
        assert kinds(found(copy)) == [("missing", "1_Pooling/config.json")]

    def test_extra_files_that_match_the_pattern_or_carry_the_mark(self, copy):
        unmarked = safetensors_bytes({"x": Stored("U8", (1,), b"1")})
        (copy / "model-rank-0-part-7.safetensors").write_bytes(unmarked)
        (copy / "model-rank-9-part-0.safetensors").write_bytes(b"no header at all")
        shutil.copy(copy / R0, copy / "backup.safetensors")
        assert kinds(found(copy)) == [
            ("extra", "backup.safetensors"),
            ("extra", "model-rank-0-part-7.safetensors"),
            ("extra", "model-rank-9-part-0.safetensors"),
        ]

    def test_other_files_are_a_note_and_no_problem(self, copy):
        (copy / "README.md").write_text("hello")
        (copy / "lora.safetensors").write_bytes(safetensors_bytes({"x": Stored("U8", (1,), b"1")}))
        (copy / ".shardstate-new-0").write_bytes(b"")
        report = shardstate.verify(copy, full=True)
        assert report.problems == ()
        assert "README.md" in " ".join(report.notes)
        assert "lora.safetensors" in " ".join(report.notes)

    def test_stale_file_of_another_set_that_no_record_lists(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5)
        shardstate.shard(other, tmp_path / "tp4", tp=4)
        name = "model-rank-3-part-0.safetensors"
        shutil.copy(tmp_path / "tp4" / name, copy / name)
        assert kinds(found(copy)) == [("stale", name)]

    def test_stale_file_of_another_set_in_the_place_of_one(self, copy, source, tmp_path):
        shardstate.shard(source, tmp_path / "f32", tp=2, dtype="f32")
        shutil.copy(tmp_path / "f32" / R1, copy / R1)
        (problem,) = found(copy)
        assert problem.file == R1
        assert problem.kind in ("stale", "size")

    def test_stale_file_of_the_same_size(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        shardstate.shard(other, tmp_path / "set5", tp=2)
        shutil.copy(tmp_path / "set5" / R1, copy / R1)
        assert kinds(found(copy)) == [("stale", R1)]

    def test_stale_record_of_another_set(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        shardstate.shard(other, tmp_path / "set5", tp=2)
        name = "shardstate.rank-1.json"
        shutil.copy(tmp_path / "set5" / name, copy / name)
        assert ("stale", name) in kinds(found(copy))

    def test_stale_record_of_a_rank_beyond_the_set(self, copy, source, tmp_path):
        shardstate.shard(source, tmp_path / "tp4", tp=4)
        name = "shardstate.rank-3.json"
        shutil.copy(tmp_path / "tp4" / name, copy / name)
        assert kinds(found(copy)) == [("stale", name)]

    def test_rank_when_files_are_swapped(self, copy):
        (copy / R0).rename(copy / "x")
        (copy / R1).rename(copy / R0)
        (copy / "x").rename(copy / R1)
        assert kinds(found(copy)) == [("rank", R0), ("rank", R1)]

    def test_rank_when_records_are_swapped(self, copy):
        names = [f"shardstate.rank-{rank}.json" for rank in range(2)]
        (copy / names[0]).rename(copy / "x")
        (copy / names[1]).rename(copy / names[0])
        (copy / "x").rename(copy / names[1])
        problems = kinds(found(copy))
        assert [("rank", name) for name in names] == [p for p in problems if p[1] in names]

    def test_rank_when_parts_are_swapped(self, source, tmp_path):
        shardstate.shard(source, tmp_path, tp=1, max_part_size=3000)
        names = [f"model-rank-0-part-{part}.safetensors" for part in range(2)]
        (tmp_path / names[0]).rename(tmp_path / "x")
        (tmp_path / names[1]).rename(tmp_path / names[0])
        (tmp_path / "x").rename(tmp_path / names[1])
        assert kinds(found(tmp_path)) == [("rank", name) for name in names]

    def test_digest_of_a_flipped_bit_with_the_tensor_and_its_place(self, copy):
        begin, end = place_of(copy / R1, NORM)
        flip_bit(copy / R1, begin + 3, bit=7)
        assert found(copy) == ()  # only --full reads data
        (problem,) = found(copy, full=True)
        assert (problem.kind, problem.file, problem.tensor) == ("digest", R1, NORM)
        assert (problem.begin, problem.end) == (begin, end)

    def test_source_when_data_was_forged_with_its_digests(self, copy, source):
        begin, _ = place_of(copy / R0, NORM)
        forge(copy, 0, R0, begin + 5)
        assert found(copy, full=True) == ()
        (problem,) = found(copy, against=source)
        assert (problem.kind, problem.file, problem.tensor) == ("source", R0, NORM)
        assert (problem.begin, problem.end) == (begin + 5, begin + 6)

    def test_source_when_padding_is_not_zero(self, copy, source):
        # 103 rows on 2 ranks: the last row of rank 1 is padding.
        begin, end = place_of(copy / R1, "lm_head.weight")
        forge(copy, 1, R1, end - 1)
        assert found(copy, full=True) == ()
        (problem,) = found(copy, against=source)
        assert (problem.kind, problem.file) == ("source", R1)
        assert problem.tensor == "lm_head.weight"
        assert begin <= problem.begin <= end - 1 < problem.end <= end


class TestAllProblemsAreCollected:
    def test_of_every_kind_at_once(self, copy, source):
        begin, _ = place_of(copy / R1, NORM)
        flip_bit(copy / R1, begin)
        os.truncate(copy / R0, 4000)
        (copy / "config.json").unlink()
        flip_bit(copy / "tokenizer.json", 2)
        flip_bit(copy / "shardstate.rank-0.provenance.json", 50)
        shutil.copy(copy / R1, copy / "model-rank-5-part-0.safetensors")
        problems = found(copy, against=source)
        assert {(p.kind, p.file, p.tensor) for p in problems} == {
            ("digest", R1, NORM),
            ("source", R1, NORM),
            ("size", R0, None),
            ("missing", "config.json", None),
            ("digest", "tokenizer.json", None),
            ("digest", "shardstate.rank-0.provenance.json", None),
            ("extra", "model-rank-5-part-0.safetensors", None),
        }

    def test_with_a_damaged_manifest(self, copy):
        flip_bit(copy / "shardstate.json", 100)
        flip_bit(copy / "config.json", 5)
        begin, _ = place_of(copy / R0, NORM)
        flip_bit(copy / R0, begin)
        assert kinds(found(copy, full=True)) == [
            ("digest", "config.json"),
            ("digest", R0),
            ("digest", "shardstate.json"),
        ]

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 50, b"null\n"])
    @pytest.mark.parametrize("name", ["shardstate.json", "shardstate.rank-0.json"])
    def test_with_a_manifest_or_record_that_is_none(self, name, content, copy):
        (copy / name).write_bytes(content)
        flip_bit(copy / "config.json", 5)
        problems = kinds(found(copy, full=True))
        assert ("digest", name) in problems
        assert ("digest", "config.json") in problems

    def test_with_all_records_damaged(self, copy):
        for rank in range(2):
            flip_bit(copy / f"shardstate.rank-{rank}.json", 200)
        flip_bit(copy / "config.json", 5)
        assert kinds(found(copy, full=True)) == [
            ("digest", "config.json"),
            ("digest", "shardstate.rank-0.json"),
            ("digest", "shardstate.rank-1.json"),
        ]

    def test_with_manifest_and_all_records_damaged(self, copy, capsys):
        for name in ("shardstate.json", "shardstate.rank-0.json", "shardstate.rank-1.json"):
            flip_bit(copy / name, 200)
        assert {p.file for p in found(copy, full=True)} >= {
            "shardstate.json", "shardstate.rank-0.json", "shardstate.rank-1.json"
        }  # fmt: skip
        assert run(["verify", str(copy), "--quiet"]) == 1

    def test_and_the_exit_status_is_1(self, copy, capsys):
        flip_bit(copy / "shardstate.json", 100)
        assert run(["verify", str(copy), "--json"]) == 1
        answer = json.loads(capsys.readouterr().out)
        assert [p["file"] for p in answer["problems"]] == ["shardstate.json"]
        assert set(answer["problems"][0]) == {"file", "tensor", "problem", "kind", "begin", "end"}
        assert run(["verify", str(copy)]) == 1
        assert "shardstate.json" in capsys.readouterr().out

    def test_but_records_without_a_manifest_are_no_set(self, copy, capsys):
        (copy / "shardstate.json").unlink()
        assert run(["verify", str(copy), "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "input"


class TestFlippedBits:
    def test_anywhere_in_any_file_are_found(self, sound, tmp_path):
        rng = np.random.default_rng(7)
        path = shutil.copytree(sound, tmp_path / "set")
        names = [name for name in tree(sound) if not name.endswith("/")]
        for name in names:
            size = (path / name).stat().st_size
            for offset in {0, size - 1, *rng.integers(size, size=25).tolist()}:
                bit = int(rng.integers(8))
                flip_bit(path / name, offset, bit)
                problems = found(path, full=True)
                assert name in {problem.file for problem in problems}, (name, offset, bit)
                flip_bit(path / name, offset, bit)
        assert found(path, full=True) == ()

    def test_a_thousand_of_a_thousand_are_found(self, sound, tmp_path):
        """Each kind of file gets its share; the place of each bit is random."""
        rng = np.random.default_rng(11)
        path = shutil.copytree(sound, tmp_path / "set")
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
        (tmp_path / "key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        shardstate.sign(path, key=tmp_path / "key")
        headers = {name: read_header(path / name)[1] for name in (R0, R1)}
        places = {  # what is flipped → (file, first byte, end)
            "data": [(n, begin, (path / n).stat().st_size) for n, begin in headers.items()],
            "header": [(n, 0, begin) for n, begin in headers.items()],
            "manifest": ["shardstate.json"],
            "record": ["shardstate.rank-0.json", "shardstate.rank-1.json"],
            "provenance": [f"shardstate.rank-{rank}.provenance.json" for rank in range(2)],
            "companion": ["config.json", "tokenizer.json", "1_Pooling/config.json"],
            "signature": ["shardstate.json.sig"],
        }
        found_of = dict.fromkeys(places, 0)
        for number in range(1000):
            kind = list(places)[number % len(places)]
            place = places[kind][int(rng.integers(len(places[kind])))]
            place = (place, 0, (path / place).stat().st_size) if isinstance(place, str) else place
            name, begin, end = place
            offset, bit = int(rng.integers(begin, end)), int(rng.integers(8))
            flip_bit(path / name, offset, bit)
            assert name in {p.file for p in found(path, full=True)}, (kind, name, offset, bit)
            found_of[kind] += 1
            flip_bit(path / name, offset, bit)
        assert sum(found_of.values()) == 1000
        assert min(found_of.values()) >= 142
        assert found(path, full=True, key=tmp_path / "key") == ()

    def test_outside_of_data_are_found_without_full(self, sound, tmp_path):
        rng = np.random.default_rng(8)
        path = shutil.copytree(sound, tmp_path / "set")
        for name in [name for name in tree(sound) if not name.endswith("/")]:
            size = (path / name).stat().st_size
            if name.endswith(".safetensors"):
                size = read_header(path / name)[1]
            for offset in rng.integers(size, size=20).tolist():
                flip_bit(path / name, offset)
                assert name in {problem.file for problem in found(path)}, (name, offset)
                flip_bit(path / name, offset)

    def test_in_data_are_located_to_the_tensor_and_its_block(self, large, tmp_path):
        rng = np.random.default_rng(9)
        path = shutil.copytree(large, tmp_path / "set")
        file = path / R1
        assert max(len(t.data) for t in tensors_of(file).values()) > 2 * BLOCK_BYTES
        places = [(name, *place_of(file, name)) for name in tensors_of(file)]
        wanted = set()
        for name, begin, end in places:
            edges = {begin, end - 1}
            if end - begin > BLOCK_BYTES:
                edges |= {begin + BLOCK_BYTES - 1, begin + BLOCK_BYTES}
                edges |= set(rng.integers(begin, end, size=3).tolist())
            for offset in edges:
                flip_bit(file, offset)
                first = begin + (offset - begin) // BLOCK_BYTES * BLOCK_BYTES
                wanted.add((R1, name, first, min(first + BLOCK_BYTES, end)))
        problems = found(path, full=True)
        assert {(p.file, p.tensor, p.begin, p.end) for p in problems} == wanted
        assert len(problems) == len(wanted)
        assert {p.kind for p in problems} == {"digest"}

    def test_are_found_by_load_with_verify(self, large, tmp_path, capsys):
        path = shutil.copytree(large, tmp_path / "set")
        tensor = "lm_head.weight"
        begin, _ = place_of(path / R0, tensor)
        flip_bit(path / R0, begin + BLOCK_BYTES + 1)
        assert run(["load", str(path), "--rank", "0", "--verify", "--json"]) == 1
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 1
        (problem,) = json.loads(out)["problems"]
        assert problem["kind"] == "digest"
        assert (problem["file"], problem["tensor"]) == (R0, tensor)
        assert problem["begin"] == begin + BLOCK_BYTES
        assert len(err.splitlines()) == 1
        assert tensor in err
        # The other rank is sound, and without verify data is not looked at.
        assert run(["load", str(path), "--rank", "1", "--verify"]) == 0
        assert run(["load", str(path), "--rank", "0"]) == 0
        with pytest.raises(DamageError) as error:
            shardstate.load(path, rank=0, verify=True)
        assert [asdict(p) for p in error.value.report.problems] == [problem]

    def test_are_all_found_by_load_with_verify(self, copy):
        names = list(tensors_of(copy / R0))
        for name in names:
            flip_bit(copy / R0, place_of(copy / R0, name)[1] - 1)
        with pytest.raises(DamageError) as error:
            shardstate.load(copy, rank=0, verify=True)
        assert {p.tensor for p in error.value.report.problems} == set(names)


class TestAgainst:
    def modified(self, source, tmp_path, change):
        """Return a copy of the source with `change` made to its tensors."""
        path = shutil.copytree(source, tmp_path / "modified")
        tensors = tensors_of(path / "model.safetensors")
        change(tensors)
        write_weights(path, tensors)
        return path

    def test_the_source_itself_or_a_copy_in_other_files_agrees(self, sound, source, tmp_path):
        other = write_llama(tmp_path / "three", layers=1, files=3)
        assert found(sound, against=source) == ()
        assert found(sound, against=other) == ()

    def test_names_each_tensor_of_the_source_that_was_modified(self, sound, source, tmp_path):
        changed = {NORM, "model.layers.0.mlp.down_proj.weight"}

        def change(tensors):
            for name in changed:
                data = bytearray(tensors[name].data)
                data[-1] ^= 1
                tensors[name] = tensors[name]._replace(data=bytes(data))

        problems = found(sound, against=self.modified(source, tmp_path, change))
        # Each rank holds the norm; the end of the down projection is on the last rank alone.
        assert {(p.kind, p.file, p.tensor) for p in problems} == {
            ("source", R0, NORM),
            ("source", R1, NORM),
            ("source", R1, "model.layers.0.mlp.down_proj.weight"),
        }
        for problem in problems:
            assert problem.end == place_of(sound / problem.file, problem.tensor)[1]
            assert problem.end - problem.begin == 1

    def test_names_tensors_that_the_source_lacks_or_holds_otherwise(self, sound, source, tmp_path):
        def change(tensors):
            del tensors[NORM]
            weight = tensors["lm_head.weight"]
            tensors["lm_head.weight"] = weight._replace(shape=weight.shape[::-1])
            weight = tensors["model.embed_tokens.weight"]
            tensors["model.embed_tokens.weight"] = weight._replace(dtype="F16")

        problems = found(sound, against=self.modified(source, tmp_path, change))
        assert {p.tensor for p in problems} == {
            NORM, "lm_head.weight", "model.embed_tokens.weight"
        }  # fmt: skip
        assert {p.kind for p in problems} == {"source"}

    def test_checks_casts(self, source, tmp_path):
        shardstate.shard(source, tmp_path / "set", tp=2, dtype="f32")
        assert found(tmp_path / "set", against=source) == ()

        def change(tensors):
            tensors[NORM] = tensors[NORM]._replace(data=bytes(len(tensors[NORM].data)))

        modified = self.modified(source, tmp_path, change)
        problems = found(tmp_path / "set", against=modified)
        assert {p.tensor for p in problems} == {NORM}

    def test_finds_damage_of_the_set_too(self, copy, source):
        begin, _ = place_of(copy / R0, NORM)
        flip_bit(copy / R0, begin)
        assert {(p.kind, p.tensor) for p in found(copy, against=source)} == {
            ("digest", NORM), ("source", NORM)
        }  # fmt: skip

    def test_locates_differences_of_large_tensors(self, large, large_source, tmp_path):
        copy = shutil.copytree(large_source, tmp_path / "source")
        begin, end = place_of(copy / "model.safetensors", "lm_head.weight")
        half = (end - begin) // 2  # rank 1 holds the second half of the rows
        flip_bit(copy / "model.safetensors", begin + half + BLOCK_BYTES + 10)
        (problem,) = found(large, against=copy)
        place = place_of(large / R1, "lm_head.weight")[0] + BLOCK_BYTES + 10
        assert (problem.file, problem.tensor) == (R1, "lm_head.weight")
        assert problem.begin == place
        assert problem.end == place + 1

    def test_something_else_is_bad_input(self, sound, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        for other in (tmp_path / "nowhere", tmp_path / "empty", sound):
            assert run(["verify", str(sound), "--against", str(other)]) == 2
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "model.safetensors").write_bytes(file_of(b"oops"))
        assert run(["verify", str(sound), "--against", str(damaged)]) == 2


class TestRanks:
    def test_limit_what_is_checked(self, copy):
        begin, _ = place_of(copy / R1, NORM)
        flip_bit(copy / R1, begin)
        flip_bit(copy / "shardstate.rank-1.provenance.json", 9)
        assert found(copy, full=True, ranks=[0]) == ()
        assert len(found(copy, full=True, ranks=[1])) == 2
        assert len(found(copy, full=True, ranks=[0, 1])) == 2

    def test_need_not_have_the_files_of_the_others(self, copy):
        for name in (R1, "shardstate.rank-1.json", "shardstate.rank-1.provenance.json"):
            (copy / name).unlink()
        assert found(copy, full=True, ranks=[0]) == ()

    def test_do_not_make_the_others_look_unlisted_when_the_manifest_is_damaged(self, copy):
        flip_bit(copy / "shardstate.json", 100)
        assert kinds(found(copy, ranks=[0])) == [("digest", "shardstate.json")]

    def test_beyond_the_set_are_wrong_usage(self, sound):
        with pytest.raises(ShardStateError, match="2"):
            shardstate.verify(sound, ranks=[2])

    def test_are_what_the_figures_count(self, sound):
        one = shardstate.verify(sound, full=True, ranks=[1])
        both = shardstate.verify(sound, full=True)
        assert one.ranks == (1,)
        assert both.ranks == (0, 1)
        assert one.bytes * 2 == both.bytes
        assert both.bytes_read == both.bytes
        assert shardstate.verify(sound).bytes_read == 0


class TestForgedRecords:
    """Records with a digest that fits, and content that no writer makes."""

    def sealed(self, path, change):
        record = path / "shardstate.rank-0.json"
        reseal(record, change)

        def change_manifest(content):
            entry = next(entry for entry in content["files"] if entry["name"] == record.name)
            entry["bytes"], entry["digest"] = (
                record.stat().st_size, digest_of(record.read_bytes())
            )  # fmt: skip

        reseal(path / "shardstate.json", change_manifest)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c["files"][0]["blocks"].append(["0" * 64]),
            lambda c: c["files"][0]["blocks"].pop(),
            lambda c: c["files"][0]["blocks"][0].append("0" * 64),
            lambda c: c["files"][0]["blocks"][0].pop(),
            lambda c: c["files"].append({**c["files"][0], "name": "../../etc/passwd"}),
            lambda c: c["files"].pop(),
            lambda c: c["companions"].append({**c["companions"][0], "name": "/etc/passwd"}),
            lambda c: c["companions"].append({**c["companions"][0], "name": "a/../../b"}),
            lambda c: c.update(topology={"tp": 1, "pp": 1, "dp": 1}),
            lambda c: c.update(rank=-1),
        ],
        ids=[
            "blocks of one tensor more", "blocks of one tensor less", "one block more",
            "one block less", "a part outside", "no parts", "an absolute companion",
            "a companion outside", "another topology", "a negative rank",
        ],
    )  # fmt: skip
    def test_are_found_and_crash_nothing(self, change, copy, source):
        self.sealed(copy, change)
        self.crashes_nothing(copy)
        assert found(copy, against=source)

    def test_with_padding_of_unknown_tensors_crash_nothing(self, copy):
        self.sealed(copy, lambda content: content.update(padding={"no.such": [[[0, 1]]]}))
        self.crashes_nothing(copy)

    def crashes_nothing(self, path):
        for use, options in (
            (shardstate.verify, {}),
            (shardstate.inspect, {}),
            (shardstate.load, {"rank": 0}),
            (shardstate.load, {"rank": 0, "verify": True}),
        ):
            with contextlib.suppress(ShardStateError):
                use(path, **options)

    def test_a_version_of_the_future_says_so(self, copy):
        reseal(copy / "shardstate.json", lambda content: content.update(version=2))
        with pytest.raises(ShardStateError, match=r"version 2.*newer"):
            shardstate.load(copy, rank=0)

    def test_unknown_keys_are_ignored(self, copy):
        self.sealed(copy, lambda content: content.update(news="from a later minor version"))
        assert found(copy, full=True) == ()


class TestLoadingWithoutVerify:
    """Size, header, rank and set of what is opened are always checked."""

    @pytest.mark.parametrize("by", [-1, 1, -10_000])
    def test_a_file_of_another_size_is_refused(self, by, copy):
        os.truncate(copy / R0, (copy / R0).stat().st_size + by)
        with pytest.raises(ShardStateError, match=R0):
            shardstate.load(copy, rank=0)
        assert shardstate.load(copy, rank=1)

    def test_swapped_files_are_refused(self, copy):
        shutil.copy(copy / R1, copy / R0)
        with pytest.raises(ShardStateError, match=R0):
            shardstate.load(copy, rank=0)

    def test_a_file_of_another_set_is_refused(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        shardstate.shard(other, tmp_path / "set5", tp=2)
        shutil.copy(tmp_path / "set5" / R0, copy / R0)
        assert (copy / R0).stat().st_size == (copy / R1).stat().st_size
        with pytest.raises(ShardStateError, match=R0):
            shardstate.load(copy, rank=0)

    def test_a_record_of_another_set_is_refused(self, copy, tmp_path):
        other = write_llama(tmp_path / "other", seed=5, layers=1)
        shardstate.shard(other, tmp_path / "set5", tp=2)
        for name in (R0, "shardstate.rank-0.json"):
            shutil.copy(tmp_path / "set5" / name, copy / name)
        with pytest.raises(ShardStateError, match="half-replaced"):
            shardstate.load(copy, rank=0)

    def test_a_flipped_bit_in_a_header_is_refused(self, copy):
        begin = read_header(copy / R0)[1]
        for offset in (0, 9, 60, begin - 1):  # the last one is in the padding
            flip_bit(copy / R0, offset)
            with pytest.raises(ShardStateError, match=R0):
                shardstate.load(copy, rank=0)
            flip_bit(copy / R0, offset)
        assert shardstate.load(copy, rank=0)

    def test_a_flipped_bit_in_record_or_manifest_is_refused(self, copy):
        for name in ("shardstate.json", "shardstate.rank-0.json"):
            for offset in (1, 100, (copy / name).stat().st_size - 5):
                flip_bit(copy / name, offset)
                with pytest.raises(ShardStateError, match=name):
                    shardstate.load(copy, rank=0)
                flip_bit(copy / name, offset)

    def test_provenance_and_companions_are_never_needed(self, copy):
        for name in list(tree(copy)):
            needed = name.startswith(("model-rank", "shardstate")) and "provenance" not in name
            if not needed and not name.endswith("/"):
                (copy / name).unlink()
        for rank in range(2):
            assert shardstate.load(copy, rank=rank, verify=True)

    def test_a_file_that_is_cut_while_it_is_read_is_an_error(self, copy, monkeypatch):
        original, begin = os.preadv, read_header(copy / R0)[1]

        def preadv(fd, views, at, flags=0):
            return 0 if at >= begin else original(fd, views, at, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(ShardStateError, match=f"{R0}: ends at byte {begin}"):
            shardstate.load(copy, rank=0)


class TestSetsThatNothingVouchesFor:
    def test_vllms_own_is_checked_for_structure(self, tmp_path):
        path = write_vllm_set(tmp_path / "set", tp=3, parts=2)
        report = shardstate.verify(path)
        assert (report.kind, report.problems, report.files) == ("vllm", (), 6)
        assert "nothing vouches for the bytes" in " ".join(report.notes)

    def test_vllms_own_says_so_when_it_is_inspected_or_loaded(self, tmp_path, capsys):
        path = write_vllm_set(tmp_path / "set", tp=2)
        for arguments in (["inspect", path], ["load", path, "--rank", "1"], ["verify", path]):
            assert run([str(a) for a in arguments]) == 0
            captured = capsys.readouterr()
            assert "vouches for" in captured.out + captured.err

    @pytest.mark.parametrize("parts", [1, 2])
    def test_damage_to_the_structure_of_vllms_own_is_found(self, parts, tmp_path, capsys):
        path = write_vllm_set(tmp_path / "set", tp=3, parts=parts)
        os.truncate(path / R0, 100)
        (path / R1).unlink()
        problems = found(path)
        assert ("missing", R1) in kinds(problems)
        assert {p.kind for p in problems if p.file == R0} <= {"header", "size"}
        assert [p for p in problems if p.file == R0]
        assert run(["verify", str(path)]) == 1

    def test_an_ordinary_checkpoint_is_checked_for_structure(self, tmp_path, capsys):
        path = write_llama(tmp_path / "llama", files=3)
        report = shardstate.verify(path)
        assert (report.kind, report.problems) == ("checkpoint", ())
        assert "nothing vouches for the bytes" in " ".join(report.notes)
        for i in (1, 3):
            name = f"model-0000{i}-of-00003.safetensors"
            os.truncate(path / name, (path / name).stat().st_size - 1)
        problems = found(path)
        assert [p.file for p in problems] == [
            "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
        ]  # fmt: skip
        assert {p.kind for p in problems} <= {"header", "size"}
        assert run(["verify", str(path)]) == 1

    def test_all_problems_of_an_ordinary_checkpoint_are_collected(self, tmp_path):
        path = write_llama(tmp_path / "llama", files=3)
        (path / "model-00001-of-00003.safetensors").unlink()
        (path / "model-00002-of-00003.safetensors").write_bytes(file_of(b"oops"))
        assert {p.file for p in found(path)} == {
            "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
        }  # fmt: skip

    def test_an_index_that_names_a_missing_tensor_is_a_problem(self, tmp_path):
        path = write_llama(tmp_path / "llama", files=2)
        tensors = tensors_of(path / "model-00002-of-00002.safetensors")
        name = next(iter(tensors))
        del tensors[name]
        (path / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(tensors))
        (problem,) = found(path)
        assert (problem.kind, problem.tensor) == ("missing", name)


def test_verifying_never_writes(copy, source):
    before = tree(copy)
    stamp = os.stat(copy).st_mtime_ns
    flip_bit(copy / R0, 5000)
    shardstate.verify(copy, against=source)
    flip_bit(copy / R0, 5000)
    assert tree(copy) == before
    assert os.stat(copy).st_mtime_ns == stamp


def test_sizes_agree_with_the_tensors_of_all_ranks(sound):
    report = shardstate.verify(sound)
    want = sum(len(t.data) for r in (R0, R1) for t in tensors_of(sound / r).values())
    assert report.bytes == want
    assert report.tensors == 2 * len(llama_tensors(layers=1))
