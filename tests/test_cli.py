import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import shardstate
from checkpoints import (
    Stored,
    file_of,
    flip_bit,
    llama_tensors,
    safetensors_bytes,
    tree,
    write_llama,
    write_vllm_set,
    write_weights,
)
from shardstate.cli.main import run
from shardstate.storage.local import LocalStorage

KEYS = {
    "bytes", "bytes_wanted", "bytes_read", "bytes_cached", "bytes_meta", "seconds", "phases",
    "gbps", "peak_extra_bytes", "tensors", "files", "requests", "materialised",
    "materialised_bytes", "tensor_list", "file_list", "ranks", "topology", "layout", "stage",
    "kind", "committed", "bytes_by_dtype", "bytes_by_rank", "problems",
}  # fmt: skip
KINDS = {2: ("usage", "input"), 3: ("storage",), 4: ("bug",), 130: ("interrupted",)}
COMMAND = [sys.executable, "-c", "from shardstate.cli import main; main()"]


@pytest.fixture(autouse=True)
def _root_logger():
    # Each run takes the root logger for itself, which would outlive the test's stderr.
    root, own = logging.getLogger(), logging.getLogger("shardstate")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("cli") / "llama", files=2)


@pytest.fixture(scope="module")
def sharded(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "set"
    shardstate.shard(source, out, tp=2)
    return out


@pytest.fixture
def cli(capsys):
    """Runs a command in process; returns (status, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        status = run([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def fails(cli):
    """Runs a command that must fail, without and with --json; returns the error's object."""

    def call(expected, *arguments, says=()):
        status, out, err = cli(*arguments)
        assert (status, out) == (expected, ""), err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("shardstate: ")
        assert "Traceback" not in err
        for words in says:
            assert str(words) in err
        status, out, err_again = cli(*arguments, "--json")
        assert status == expected, err_again
        assert len(err_again.splitlines()) == 1
        answer = json.loads(out)
        assert list(answer) == ["error"]
        error = answer["error"]
        assert set(error) == {"kind", "message", "file", "tensor"}
        assert error["kind"] in KINDS[expected]
        assert " ".join(error["message"].split()) in err_again
        return error

    return call


@pytest.fixture
def succeeds(cli):
    """Runs a command with --json that must succeed; returns the object."""

    def call(*arguments):
        status, out, err = cli(*arguments, "--json")
        assert status == 0, err
        assert len(out.splitlines()) == 1
        answer = json.loads(out)
        assert set(answer) >= KEYS
        return answer

    return call


def one_file(path, content):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(content)
    return path


class TestCommandsThatSucceed:
    def test_inspect_describes_an_ordinary_checkpoint(self, source, succeeds):
        answer = succeeds("inspect", source)
        want = llama_tensors()
        assert answer["kind"] == "checkpoint"
        assert answer["bytes"] == sum(len(t.data) for t in want.values())
        assert answer["tensors"] == len(want)
        assert answer["files"] == 2
        assert answer["bytes_by_dtype"] == {"BF16": answer["bytes"]}
        assert (answer["topology"], answer["committed"]) == (None, None)
        assert answer["tensor_list"] is None

    def test_inspect_lists_tensors_where_they_lie(self, source, succeeds):
        answer = succeeds("inspect", source, "--tensors")
        want = llama_tensors()
        assert {entry["name"] for entry in answer["tensor_list"]} == set(want)
        for entry in answer["tensor_list"]:
            assert set(entry) == {"name", "dtype", "shape", "file", "begin", "end"}
            data = (source / entry["file"]).read_bytes()[entry["begin"] : entry["end"]]
            assert data == want[entry["name"]].data

    def test_inspect_describes_a_set(self, sharded, succeeds):
        answer = succeeds("inspect", sharded)
        assert answer["kind"] == "shardstate"
        assert answer["topology"] == {"tp": 2, "pp": 1, "dp": 1}
        assert (answer["layout"], answer["stage"]) == ("rules", "checkpoint")
        assert answer["committed"] is True
        assert answer["ranks"] == [0, 1]
        assert [file["rank"] for file in answer["file_list"]] == [0, 1]
        for file in answer["file_list"]:
            assert (sharded / file["name"]).stat().st_size == file["bytes"]
        assert sum(answer["bytes_by_rank"].values()) == answer["bytes"]

    def test_inspect_says_that_a_set_lacks_ranks(self, source, tmp_path, succeeds, cli):
        succeeds("shard", source, tmp_path / "set", "--tp", 4, "--ranks", "1,3")
        answer = succeeds("inspect", tmp_path / "set")
        assert (answer["committed"], answer["ranks"]) == (False, [1, 3])
        assert "NOT committed" in cli("inspect", tmp_path / "set")[1]

    def test_plan_gives_what_load_then_does(self, source, succeeds):
        planned = succeeds("plan", source, "--tp", 4, "--rank", 1)
        loaded = succeeds("load", source, "--tp", 4, "--rank", 1)
        for key in ("bytes", "bytes_wanted", "bytes_read", "requests", "tensors", "ranks"):
            assert loaded[key] == planned[key], key

    @pytest.mark.parametrize("command", ["inspect", "plan", "shard", "load", "verify"])
    def test_phases_add_up_to_the_seconds(self, command, source, sharded, tmp_path, succeeds):
        more = {
            "inspect": [source],
            "plan": [source, "--tp", 2, "--rank", 0],
            "shard": [source, tmp_path / "set", "--tp", 2],
            "load": [sharded, "--rank", 0],
            "verify": [sharded, "--full"],
        }[command]
        answer = succeeds(command, *more)
        assert sum(answer["phases"].values()) == pytest.approx(answer["seconds"], rel=0.01)
        assert ("write" in answer["phases"]) == (command == "shard")
        assert ("read" in answer["phases"]) == (command in ("load", "verify"))

    def test_shard_reads_each_byte_once_and_says_so(self, source, tmp_path, succeeds):
        answer = succeeds("shard", source, tmp_path / "set", "--tp", 4)
        whole = sum(len(t.data) for t in llama_tensors().values())
        assert answer["bytes_wanted"] == whole
        assert whole <= answer["bytes_read"] <= 1.05 * whole
        assert answer["committed"] is True
        assert answer["peak_extra_bytes"] <= 256 << 20

    def test_dry_run_gives_the_figures_and_writes_nothing(self, source, tmp_path, succeeds):
        out = tmp_path / "set"
        planned = succeeds("shard", source, out, "--tp", 2, "--dry-run")
        assert not out.exists()
        done = succeeds("shard", source, out, "--tp", 2)
        for key in ("bytes", "bytes_wanted", "bytes_read", "file_list", "bytes_by_rank", "set"):
            assert done[key] == planned[key], key

    def test_a_second_run_of_the_same_command_has_nothing_to_do(self, source, tmp_path, succeeds):
        succeeds("shard", source, tmp_path / "set", "--tp", 2)
        before = tree(tmp_path / "set")
        answer = succeeds("shard", source, tmp_path / "set", "--tp", 2)
        assert answer["bytes_read"] == 0
        assert answer["committed"] is True
        assert tree(tmp_path / "set") == before

    def test_load_of_a_set_reads_what_it_wants(self, sharded, succeeds):
        answer = succeeds("load", sharded, "--rank", 1, "--verify")
        assert answer["bytes_wanted"] == answer["bytes"]
        assert answer["bytes_read"] <= 1.05 * answer["bytes"]
        assert answer["problems"] == []

    def test_verify_finds_nothing_in_a_sound_set(self, source, sharded, succeeds):
        for more in ([], ["--full"], ["--against", source], ["--ranks", "1"]):
            answer = succeeds("verify", sharded, *more)
            assert answer["problems"] == []

    @pytest.mark.parametrize(
        ("command", "more"),
        [
            ("inspect", []),
            ("plan", ["--tp", "2", "--rank", "0"]),
            ("load", ["--tp", "2", "--rank", "1"]),
            ("verify", []),
        ],
    )
    def test_a_person_gets_text_and_with_quiet_nothing(self, command, more, source, cli):
        status, out, err = cli(command, source, *more)
        assert (status, err) == (0, "")
        assert out.strip()
        assert cli(command, source, *more, "--quiet") == (0, "", "")

    def test_quiet_sharding_prints_nothing(self, source, tmp_path, cli):
        assert cli("shard", source, tmp_path / "a", "--tp", 2, "--quiet") == (0, "", "")
        more = ("--tp", 2, "--ranks", 1, "--quiet")
        assert cli("shard", source, tmp_path / "b", *more) == (0, "", "")

    def test_markup_in_names_is_printed_as_it_is(self, tmp_path, cli):
        tensors = {"[bold]x[/bold].[/]": Stored("U8", (1,), b"1")}
        path = one_file(tmp_path / "[red]model", safetensors_bytes(tensors))
        status, out, _ = cli("inspect", path, "--tensors")
        assert status == 0
        assert "[bold]x[/bold].[/]" in out
        assert "[red]model" in out

    def test_a_set_is_readable_through_a_link(self, sharded, tmp_path, succeeds):
        (tmp_path / "link").symlink_to(sharded)
        assert succeeds("verify", tmp_path / "link", "--full")["problems"] == []

    def test_a_hub_cache_of_links_is_sharded_like_its_files(self, source, tmp_path, succeeds):
        # Hub caches name blobs by digest and link to them from a folder per revision.
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        blobs.mkdir()
        snapshot.mkdir()
        for number, file in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
            (blobs / str(number)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blobs / str(number))
        answer = succeeds("shard", snapshot, tmp_path / "set", "--tp", 2)
        assert answer["committed"] is True
        assert not any(path.is_symlink() for path in (tmp_path / "set").rglob("*"))

    def test_version_and_help(self, cli):
        assert cli("--version")[:2] == (0, f"shardstate, version {shardstate.__version__}\n")
        for command in ("inspect", "plan", "shard", "load", "verify"):
            status, out, _ = cli(command, "--help")
            assert status == 0
            assert "--json" in out


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["frobnicate"],
            ["reshard", "a", "b", "--tp", "2"],  # not built yet, so absent
            ["inspect", ".", "--frobnicate"],
            ["inspect"],
            ["inspect", "a", "b"],
            ["load", "."],
            ["load", ".", "--rank", "zero"],
            ["load", ".", "--rank", "-1"],
            ["shard", ".", "out"],
            ["shard", ".", "out", "--tp", "0"],
            ["shard", ".", "out", "--tp", "-2"],
            ["shard", ".", "out", "--tp", "2", "--dtype", "f17"],
            ["shard", ".", "out", "--tp", "2", "--layout", "sglang"],
            ["shard", ".", "out", "--tp", "2", "--pp", "0"],
            ["shard", ".", "out", "--tp", "2", "--engine-args", "{"],
            ["shard", ".", "out", "--tp", "2", "--engine-args", "[]"],
            ["load", ".", "--rank", "0", "--layout", "auto"],
            ["cache"],
            ["cache", "list"],
            ["cache", "prune", "."],
            ["shard", ".", "out", "--tp", "2", "--ranks", "a"],
            ["shard", ".", "out", "--tp", "2", "--ranks", ""],
            ["shard", ".", "out", "--tp", "2", "--threads", "0"],
            ["--frobnicate"],
        ],
        ids=" ".join,
    )
    def test_wrong_arguments_are_refused_before_anything(self, arguments, fails):
        assert fails(2, *arguments)["kind"] == "usage"

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--ranks", "0,4"], ["rank 4", "0 to 3"]),
            (["--ranks", "3-1"], ["rank"]),
            (["--max-part-size", "0"], ["size", "5GB"]),
            (["--max-part-size", "5XB"], ["5XB", "5GB"]),
            (["--max-part-size", "-1"], ["-1"]),
            (["--pattern", "weights-{part}.safetensors"], ["{rank}"]),
            (["--pattern", "weights-{rank}.safetensors"], ["{part}"]),
            (["--pattern", "a/{rank}-{part}.safetensors"], ["pattern"]),
            (["--pattern", "{rank}{part}.safetensors"], ["collide"]),
            (["--pattern", "{rank}-{part}.bin"], [".safetensors"]),
            (["--pattern", "{rank"], ["pattern"]),
            (["--pattern", "{rank}-{part}-{0}.safetensors"], ["pattern"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_wrong_values_write_nothing(self, more, says, source, tmp_path, fails):
        error = fails(2, "shard", source, tmp_path / "out", "--tp", 4, *more, says=says)
        assert error["kind"] == "usage"
        assert not (tmp_path / "out").exists()

    def test_no_command_is_an_error_of_one_short_line(self, fails):
        error = fails(2)
        assert error["kind"] == "usage"
        assert len(error["message"]) < 200

    def test_a_rank_out_of_range_is_told_with_the_range(self, source, sharded, fails):
        for path, more in ((source, ["--tp", 4]), (sharded, [])):
            for command in ("load", "plan"):
                error = fails(2, command, path, *more, "--rank", 4, says=["rank 4", "0 to"])
                assert error["kind"] == "usage"

    def test_verify_of_a_rank_out_of_range_is_no_damage(self, sharded, fails):
        assert fails(2, "verify", sharded, "--ranks", "7", says=["7"])["kind"] == "usage"

    def test_flags_must_agree_with_the_set(self, sharded, fails):
        for more in (["--tp", 4], ["--dtype", "f32"], ["--pattern", "x-{rank}-{part}.safetensors"]):
            assert fails(2, "load", sharded, "--rank", 0, *more)["kind"] == "usage"

    def test_an_ordinary_checkpoint_needs_tp(self, source, fails):
        error = fails(2, "load", source, "--rank", 0, says=["ordinary checkpoint", "--tp"])
        assert error["kind"] == "usage"

    def test_an_ordinary_checkpoint_cannot_be_verified_while_loading(self, source, fails):
        fails(2, "load", source, "--tp", 2, "--rank", 0, "--verify", says=["no digests"])

    def test_an_absurd_number_of_ranks_is_refused_at_once(self, source, tmp_path):
        limit = 3 << 30
        done = subprocess.run(
            [*COMMAND, "shard", source, tmp_path / "out", "--tp", "1000000000"],
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert not (tmp_path / "out").exists()

    def test_only_debug_shows_a_traceback(self, tmp_path, cli):
        assert "Traceback" not in cli("inspect", tmp_path)[2]
        assert "Traceback" in cli("inspect", tmp_path, "--debug")[2]

    def test_our_own_bug_exits_4_and_asks_for_a_report(self, source, fails, monkeypatch):
        def broken(*_args, **_kwargs):
            raise RuntimeError("two\nlines")

        monkeypatch.setattr("shardstate.api.inspect", broken)
        fails(4, "inspect", source, says=["RuntimeError", "bug", "--debug"])

    def test_ctrl_c_anywhere_exits_130(self, source, fails, monkeypatch):
        def interrupted(*_args, **_kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("shardstate.api.inspect", interrupted)
        assert fails(130, "inspect", source)["kind"] == "interrupted"


class TestPathsThatCannotBeUsed:
    def test_a_missing_path(self, tmp_path, fails):
        path = tmp_path / "nowhere"
        for command, more in (
            ("inspect", []),
            ("plan", ["--tp", 2, "--rank", 0]),
            ("load", ["--tp", 2, "--rank", 0]),
            ("shard", [tmp_path / "out", "--tp", 2]),
            ("verify", []),
        ):
            error = fails(2, command, path, *more, says=[path, "check the path"])
            assert error["kind"] == "input"
        assert not (tmp_path / "out").exists()

    def test_a_mistyped_path_is_told_at_once_and_not_taken_for_a_hub_id(
        self, source, fails, monkeypatch
    ):
        monkeypatch.chdir(source.parent)
        began = time.monotonic()
        fails(2, "inspect", "llama/typo", says=["llama/typo", "no such"])
        monkeypatch.setattr(
            "shardstate.storage.locate.importlib.util.find_spec", lambda _name: None
        )
        fails(2, "inspect", "hf://org/name", says=["hf://org/name", "shardstate[hub]"])
        fails(2, "inspect", "org/name", says=["org/name", "no such"])
        assert time.monotonic() - began < 1

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_an_address_of_an_unknown_kind_is_refused(self, command, fails):
        fails(2, command, "ftp://host/model", says=["ftp://host/model", "s3://"])

    @pytest.mark.parametrize("option", ["secret", "=secret"])
    def test_an_option_of_a_store_is_not_shown_if_it_is_wrong(self, option, fails):
        error = fails(2, "inspect", "s3://b/a", "--store-option", option, says=["KEY=VALUE"])
        assert "secret" not in str(error)

    @pytest.mark.parametrize("target", ["https://host/model", ""])
    def test_a_target_that_is_no_local_directory_is_refused(
        self, target, source, fails, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        fails(2, "shard", source, target, "--tp", 2)
        assert tree(tmp_path) == {}

    def test_an_empty_path(self, fails, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fails(2, "inspect", "")

    def test_a_file_instead_of_a_directory(self, source, tmp_path, fails):
        file = source / "config.json"
        for command, more in (("inspect", []), ("shard", [tmp_path / "out", "--tp", 2])):
            fails(2, command, file, *more, says=[file, "directory"])

    def test_an_empty_directory(self, tmp_path, fails):
        for command, more in (("inspect", []), ("verify", []), ("load", ["--tp", 1, "--rank", 0])):
            fails(2, command, tmp_path, *more, says=[tmp_path, "model.safetensors"])

    def test_a_directory_of_pickles_is_told_what_to_do(self, tmp_path, fails):
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        (tmp_path / "config.json").write_text("{}")
        fails(2, "inspect", tmp_path, says=["pytorch_model.bin", "safetensors", "convert"])

    @pytest.mark.parametrize("unreadable", [".", "model-00001-of-00002.safetensors", "config.json"])
    def test_what_may_not_be_read_exits_3(self, unreadable, tmp_path):
        path = write_llama(tmp_path / "llama", files=2)
        (path / unreadable).chmod(0)
        done = subprocess.run(
            [*COMMAND, "plan", path, "--tp", "2", "--rank", "0"],
            capture_output=True,
            text=True,
            preexec_fn=drop_capabilities,
        )
        (path / unreadable).chmod(0o700)
        assert done.returncode == 3, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "permission" in done.stderr.lower()
        assert str(path / unreadable) in done.stderr

    def test_a_target_that_may_not_be_written_exits_3(self, source, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        done = subprocess.run(
            [*COMMAND, "shard", source, tmp_path / "locked" / "set", "--tp", "2"],
            capture_output=True,
            text=True,
            preexec_fn=drop_capabilities,
        )
        assert done.returncode == 3, done.stderr
        assert "permission" in done.stderr.lower()

    def test_links_that_lead_nowhere_beside_the_weights_do_no_harm(self, tmp_path, succeeds, fails):
        path = write_llama(tmp_path / "llama")
        (path / "loop").symlink_to("loop")
        (path / "dangling").symlink_to("nothing")
        (path / "odd").symlink_to("config.json/below")
        os.mkfifo(path / "pipe")
        assert succeeds("inspect", path)["tensors"] == len(llama_tensors())
        answer = succeeds("shard", path, tmp_path / "set", "--tp", 2)
        assert answer["committed"] is True


class TestDamagedSources:
    def test_an_index_that_names_a_missing_file(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama", files=3)
        (path / "model-00002-of-00003.safetensors").unlink()
        for command, more in (("inspect", []), ("load", ["--tp", 2, "--rank", 0])):
            error = fails(2, command, path, *more, says=["index.json", "fetch it again"])
            assert error["file"] == "model-00002-of-00003.safetensors"

    def test_an_index_that_names_a_missing_tensor(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama", files=2)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        error = fails(2, "inspect", path, says=["ghost.weight", "model-00001-of-00002"])
        assert error["tensor"] == "ghost.weight"

    @pytest.mark.parametrize(
        "index",
        [b"", b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff\xfe",
         b'{"weight_map": {"a": "../a.safetensors"}}', b"[" * 100_000],
    )  # fmt: skip
    def test_an_index_that_is_none(self, index, tmp_path, fails):
        path = write_llama(tmp_path / "llama", files=2)
        (path / "model.safetensors.index.json").write_bytes(index)
        fails(2, "inspect", path, says=["model.safetensors.index.json"])

    def test_the_index_decides_which_files_count(self, source, tmp_path, succeeds):
        path = write_llama(tmp_path / "llama", files=2)
        (path / "consolidated.safetensors").write_bytes(safetensors_bytes(llama_tensors()))
        assert succeeds("inspect", path)["bytes"] == succeeds("inspect", source)["bytes"]

    @pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
    def test_a_truncated_file(self, keep, tmp_path, fails):
        path = write_llama(tmp_path / "llama")
        whole = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(whole[:keep])
        for command, more in (("inspect", []), ("shard", [tmp_path / "out", "--tp", 2])):
            error = fails(2, command, path, *more, says=["model.safetensors", "fetch it again"])
            assert error["file"] == "model.safetensors"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("header", "data", "says"),
        [
            (b"not json", b"", "header"),
            (b"{" + b" " * 20, b"", "JSON"),
            (b"\x80\x04pickle", b"", "header"),
            (b"[]", b"", "header"),
            (b'{"a": 1}', b"", "a"),
            (b'{"__metadata__": {"x": 1}}', b"", "JSON"),
            (b'{"a":' * 50_000, b"", "JSON"),
            ({"a": {"dtype": "F32", "shape": [2]}}, b"", "data_offsets"),
            ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "F99"),
            ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8, "takes 12"),
            ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"x" * 8, "a"),
            (
                {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
                b"",
                "overflows",
            ),
            ({"a": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 0]}}, b"", "a"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"x" * 8, "a"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"x" * 12, "gap"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 7, "trunc"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 9, "no tensor"),
            (
                {
                    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                    "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
                },
                b"x" * 6,
                "overlap",
            ),
            (
                {
                    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                    "b": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]},
                },
                b"x" * 10,
                "gap",
            ),
            (
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
                b"xx",
                "twice",
            ),
        ],
    )
    def test_a_header_that_lies(self, header, data, says, tmp_path, fails):
        path = one_file(tmp_path / "model", file_of(header, data))
        for command, more in (
            ("inspect", []),
            ("load", ["--tp", 1, "--rank", 0]),
            ("shard", [tmp_path / "out", "--tp", 1]),
        ):
            error = fails(2, command, path, *more, says=["model.safetensors", says])
            assert error["kind"] == "input"
            assert error["file"] == "model.safetensors"
        assert not (tmp_path / "out").exists()

    def test_a_length_prefix_beyond_the_file(self, tmp_path, fails):
        path = one_file(tmp_path / "model", (2**63).to_bytes(8, "little") + b"{}")
        fails(2, "inspect", path, says=["model.safetensors", str(2**63)])

    def test_an_error_names_the_directory_as_well_as_the_file(self, tmp_path, fails):
        path = one_file(tmp_path / "model", file_of(b"not json"))
        fails(2, "inspect", path, says=[path])

    @pytest.mark.parametrize("shape", [[0, 2**63 - 1], [1] * 70, [0] * 65])
    def test_a_shape_that_numpy_cannot_hold_is_no_bug_of_ours(self, shape, tmp_path, cli):
        nbytes = 0 if 0 in shape else 4
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}
        path = one_file(tmp_path / "model", file_of({"a": entry}, b"x" * nbytes))
        (tmp_path / "rules").write_text('[{"match": "a", "replicate": true}]')
        for command, more in (
            ("inspect", ["--tensors"]),
            ("load", ["--tp", 1, "--rank", 0, "--rules", tmp_path / "rules"]),
            ("shard", [tmp_path / "out", "--tp", 1, "--rules", tmp_path / "rules"]),
        ):
            status, _, err = cli(command, path, *more)
            assert status in (0, 2), f"{command}: {err}"

    @pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff", b"{" * 100_000, b'{"a":NaN'])
    def test_a_configuration_that_is_none(self, config, tmp_path, fails):
        path = write_llama(tmp_path / "llama")
        (path / "config.json").write_bytes(config)
        fails(2, "shard", path, tmp_path / "out", "--tp", 2, says=["config.json"])
        assert not (tmp_path / "out").exists()

    def test_a_directory_in_the_place_of_the_weights(self, tmp_path, fails):
        (tmp_path / "model.safetensors").mkdir()
        fails(2, "inspect", tmp_path)

    def test_the_same_tensor_in_two_files_without_an_index(self, tmp_path, fails):
        for name in ("a.safetensors", "b.safetensors"):
            write = safetensors_bytes({"x": Stored("U8", (1,), b"1")})
            (tmp_path / name).write_bytes(write)
        error = fails(2, "inspect", tmp_path, says=["a.safetensors", "b.safetensors", "x"])
        assert error["tensor"] == "x"

    def test_records_of_a_set_whose_manifest_is_damaged_are_not_taken_for_sound(
        self, source, tmp_path, fails
    ):
        shardstate.shard(source, tmp_path / "set", tp=2)
        flip_bit(tmp_path / "set" / "shardstate.json", 40)
        for command in ("inspect", "load --rank 0"):
            name, *more = command.split()
            error = fails(2, name, tmp_path / "set", *more, says=["shardstate.json", "damaged"])
            assert error["file"] == "shardstate.json"


class TestRules:
    def test_an_unknown_model_type_names_the_ways_out(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama")
        (path / "config.json").write_text('{"model_type": "unheard_of"}')
        fails(2, "shard", path, tmp_path / "out", "--tp", 2, says=["unheard_of", "--rules", "bert"])
        assert not (tmp_path / "out").exists()

    def test_a_missing_configuration_names_the_ways_out(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama")
        (path / "config.json").unlink()
        fails(2, "load", path, "--tp", 2, "--rank", 0, says=["config.json", "--rules"])

    def test_all_unmatched_names_are_listed(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama")
        extra = {f"odd.{i}.thing": Stored("U8", (1,), b"1") for i in range(30)}
        write_weights(path, llama_tensors() | extra)
        says = [*extra, "30 tensors", "--rules"]
        fails(2, "shard", path, tmp_path / "out", "--tp", 2, says=says)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["shard", "plan", "load"])
    def test_12_heads_over_7_ranks_name_what_would_work(self, command, tmp_path, fails):
        path = write_llama(tmp_path / "llama", heads=12, kv_heads=12)
        more = [tmp_path / "out", "--tp", 7] if command == "shard" else ["--tp", 7, "--rank", 0]
        error = fails(2, command, path, *more, says=["7 ranks", "12"])
        assert error["tensor"] in llama_tensors(heads=12)
        assert "tp 1, 2, 3, 4, 6, 12" in error["message"]
        assert not (tmp_path / "out").exists()

    def test_rules_of_ones_own(self, source, tmp_path, succeeds):
        (tmp_path / "rules.json").write_text('[{"match": "*", "replicate": true}]')
        answer = succeeds(
            "load", source, "--tp", 3, "--rank", 2, "--rules", tmp_path / "rules.json"
        )
        assert answer["bytes"] == sum(len(t.data) for t in llama_tensors().values())

    @pytest.mark.parametrize(
        "rules",
        ["", "{}", "[1]", '[{"match": "*"}]', '[{"match": "*", "split": 99}]',
         '[{"match": "*", "split": -1}]', '[{"match": "*", "replicate": false}]',
         '[{"match": "*", "kv_heads": "no_such_entry"}]', "[" * 100_000],
    )  # fmt: skip
    def test_rules_that_are_none(self, rules, source, tmp_path, fails):
        (tmp_path / "rules.json").write_text(rules)
        arguments = ("plan", source, "--tp", 2, "--rank", 0, "--rules", tmp_path / "rules.json")
        assert fails(2, *arguments)["kind"] == "input"

    def test_a_missing_rules_file(self, source, tmp_path, fails):
        for rules in (tmp_path / "nowhere.json", tmp_path):
            fails(2, "plan", source, "--tp", 2, "--rank", 0, "--rules", rules, says=[rules])


class TestTargets:
    @pytest.mark.parametrize("how", ["equal", "inside", "around", "link", "link inside", "dots"])
    @pytest.mark.parametrize("force", [[], ["--force"]])
    def test_a_target_that_touches_the_source(self, how, force, tmp_path, fails):
        path = write_llama(tmp_path / "models" / "llama")
        (tmp_path / "link").symlink_to(path)
        target = {
            "equal": path,
            "inside": path / "new" / "set",
            "around": path.parent,
            "link": tmp_path / "link",
            "link inside": tmp_path / "link" / "set",
            "dots": path.parent / "other" / ".." / "llama",
        }[how]
        before = tree(tmp_path)
        for source in (path, tmp_path / "link"):
            fails(2, "shard", source, target, "--tp", 2, *force, says=["source"])
        assert tree(tmp_path) == before

    def test_a_name_that_only_begins_like_the_source_is_no_part_of_it(self, tmp_path, succeeds):
        path = write_llama(tmp_path / "llama")
        assert succeeds("shard", path, tmp_path / "llama-tp2", "--tp", 2)["committed"] is True

    @pytest.mark.parametrize("force", [[], ["--force"]])
    def test_a_target_with_other_files_is_left_alone(self, force, source, tmp_path, fails):
        (tmp_path / "thesis.tex").write_text("years")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "b.txt").write_text("b")
        before = tree(tmp_path)
        fails(2, "shard", source, tmp_path, "--tp", 2, *force, says=["thesis.tex", "folder/b.txt"])
        assert tree(tmp_path) == before

    def test_a_target_that_is_a_file(self, source, tmp_path, fails):
        (tmp_path / "file").write_text("x")
        fails(2, "shard", source, tmp_path / "file", "--tp", 2, says=["directory"])
        fails(2, "shard", source, tmp_path / "file" / "below", "--tp", 2)
        assert tree(tmp_path) == {"file": b"x"}

    def test_a_directory_under_the_name_of_a_part_leaves_nothing_behind(
        self, source, tmp_path, cli
    ):
        (tmp_path / "model-rank-0-part-0.safetensors").mkdir()
        status, _, err = cli("shard", source, tmp_path, "--tp", 2)
        assert status in (2, 3)
        assert "model-rank-0-part-0.safetensors" in err
        assert [name for name in tree(tmp_path) if "new-" in name] == []

    def test_a_set_cannot_be_sharded_again(self, sharded, tmp_path, fails):
        fails(2, "shard", sharded, tmp_path / "out", "--tp", 4, says=["sharded already", "tp 2"])

    def test_vllms_own_set_cannot_be_sharded_again(self, tmp_path, fails):
        path = write_vllm_set(tmp_path / "set", tp=2)
        fails(2, "shard", path, tmp_path / "out", "--tp", 4, says=["sharded already"])

    def test_too_little_space_is_told_before_anything_is_written(
        self, source, tmp_path, fails, monkeypatch
    ):
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda _self: 1000)
        error = fails(3, "shard", source, tmp_path / "out", "--tp", 2, says=["1000", "free"])
        assert error["kind"] == "storage"
        assert not any((tmp_path / "out").rglob("*"))

    def test_companions_with_names_that_json_cannot_hold_do_not_spoil_the_set(
        self, tmp_path, cli, succeeds
    ):
        path = write_llama(tmp_path / "llama")
        (path / "two\nlines.txt").write_text("x")
        (path / "back\\slash.txt").write_text("x")
        # Either left out or refused at the start, but never a set that no one can read.
        status, _, err = cli("shard", path, tmp_path / "set", "--tp", 2)
        if status == 0:
            assert succeeds("verify", tmp_path / "set", "--full")["committed"] is True
        else:
            assert status == 2, err
            assert not any((tmp_path / "set").rglob("*"))

    def test_companions_with_names_that_are_no_text_do_not_spoil_the_set(
        self, tmp_path, cli, succeeds
    ):
        path = write_llama(tmp_path / "llama")
        Path(os.fsdecode(os.fsencode(path) + b"/\xff.txt")).write_text("x")
        status, _, err = cli("shard", path, tmp_path / "set", "--tp", 2)
        if status == 0:
            assert succeeds("verify", tmp_path / "set", "--full")["committed"] is True
        else:
            assert status == 2, err
            assert not any((tmp_path / "set").rglob("*"))


class TestDiskFull:
    @pytest.mark.parametrize("limit", [1000, 30_000])
    def test_a_limit_on_file_sizes_exits_3_and_leaves_no_half_file(self, limit, tmp_path):
        path = write_llama(tmp_path / "llama", vocab=1003)
        done = subprocess.run(
            [*COMMAND, "shard", path, tmp_path / "set", "--tp", "2", "--json"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 3, done.stderr
        assert json.loads(done.stdout)["error"]["kind"] == "storage"
        assert len(done.stderr.splitlines()) == 1
        assert [name for name in tree(tmp_path / "set") if "new-" in name] == []
        assert shardstate.shard(path, tmp_path / "set", tp=2).committed is True

    def test_a_full_disk_exits_3_and_the_same_command_goes_on_with_more_space(
        self, tmp_path, fails, succeeds
    ):
        path = write_llama(tmp_path / "llama", vocab=4003)  # 0.5 MB in weights
        (path / "tokenizer.model").write_bytes(bytes(700_000))
        with small_disk(tmp_path / "disk", "1m") as disk:
            error = fails(3, "shard", path, disk / "set", "--tp", 2, says=["disk", "full"])
            assert error["kind"] == "storage"
            left = tree(disk / "set")
            assert "shardstate.json" not in left
            assert [name for name in left if "new-" in name] == []
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
            assert succeeds("shard", path, disk / "set", "--tp", 2)["committed"] is True
            assert succeeds("verify", disk / "set", "--against", path)["problems"] == []
            assert [name for name in tree(disk / "set") if ".shardstate-" in name] == []

    def test_a_disk_that_is_too_small_is_told_before_writing(self, tmp_path, fails):
        path = write_llama(tmp_path / "llama", vocab=20003)
        with small_disk(tmp_path / "disk", "1m") as disk:
            fails(3, "shard", path, disk / "set", "--tp", 2, says=["free"])
            assert not any((disk / "set").rglob("*"))

    def test_few_file_descriptors_are_an_error_without_debris_or_enough(self, source, tmp_path):
        done = subprocess.run(
            [*COMMAND, "shard", source, tmp_path / "set", "--tp", "4", "--max-part-size", "1"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)),
        )
        assert done.returncode in (0, 3), done.stderr
        assert [name for name in tree(tmp_path / "set") if "new-" in name] == []


class TestProcesses:
    """What only a process of its own shows: signals, pipes, what is imported."""

    def test_exit_statuses_reach_the_shell(self, source, sharded, tmp_path):
        for arguments, status in (
            (["verify", sharded], 0),
            (["verify", tmp_path / "nowhere"], 2),
            (["frobnicate", "--json"], 2),
        ):
            done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
            assert done.returncode == status
            assert "Traceback" not in done.stderr
        assert json.loads(done.stdout)["error"]["kind"] == "usage"

    @pytest.mark.parametrize("arguments", [["--tensors"], ["--tensors", "--json"]])
    def test_a_reader_that_leaves_is_no_damage_and_no_noise(self, arguments, source):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [*COMMAND, "inspect", source, *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        assert done.returncode not in (1, 4, 120)
        assert done.stderr == ""

    def test_a_full_standard_output_is_told(self, source):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, "inspect", source, "--json"], stdout=full, stderr=subprocess.PIPE
            )
        assert done.returncode == 3
        assert b"Traceback" not in done.stderr

    def test_without_a_terminal_there_is_no_progress(self, source, tmp_path):
        done = subprocess.run(
            [*COMMAND, "shard", source, tmp_path / "set", "--tp", "2", "--json"],
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        assert json.loads(done.stdout)["committed"] is True

    def test_ctrl_c_while_sharding_is_prompt_quiet_and_clean(self, tmp_path):
        path = large_llama(tmp_path / "llama")
        process = subprocess.Popen(
            [*COMMAND, "shard", path, tmp_path / "set", "--tp", "2", "--json", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        began = time.monotonic()
        while not list(tmp_path.glob("set/.shardstate-new-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - began < 30
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate(timeout=30)
        took = time.monotonic() - sent
        assert process.returncode == 130
        assert json.loads(out)["error"]["kind"] == "interrupted"
        assert [line for line in err.splitlines() if line] == ["shardstate: interrupted"]
        assert took < 1
        left = [name for name in tree(tmp_path / "set") if not name.startswith(".shardstate-part")]
        assert [name for name in left if not name.startswith("model-rank-")] == []
        report = shardstate.shard(path, tmp_path / "set", tp=2)
        assert report.committed is True
        assert not list(tmp_path.glob("set/.shardstate-*"))

    def test_a_second_writer_is_told_to_wait(self, source, tmp_path):
        out = tmp_path / "set"
        with LocalStorage(out, create=True) as storage, storage.lock():
            done = subprocess.run(
                [*COMMAND, "shard", source, out, "--tp", "2", "--json"],
                capture_output=True,
                text=True,
                timeout=30,
            )
        assert done.returncode == 3
        error = json.loads(done.stdout)["error"]
        assert error["kind"] == "storage"
        assert "another process" in error["message"]
        assert str(out) in error["message"]
        assert tree(out) == {}


def large_llama(path):
    """Write a checkpoint of about 600 MB; its bytes need not differ."""
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "hidden_size": 2048,
            }
        )
    )
    shape = (2048, 2048)
    block = np.random.default_rng(0).bytes(2048 * 2048 * 2)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(36)]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in range(36)]
    write_weights(path, {name: Stored("BF16", shape, block) for name in names})
    return path


def drop_capabilities():
    """Let root obey the permissions of files like anyone else, in this process."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    header, none = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(28, 1)  # SECBIT_NOROOT, or root has them all again after exec
    if libc.capset(ctypes.byref(header), none):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def small_disk(path, size):
    """Mount a tmpfs of `size` at `path`, or skip the test."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)
