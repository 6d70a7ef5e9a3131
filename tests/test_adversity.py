"""Files that change while they are read, storages that fail, no memory or space, Ctrl-C, crowds."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import shardstate
from checkpoints import place_of, rank_tensors, tensors_of, tree, write_llama
from crashing import CHANGES
from shardstate import ShardStateError
from shardstate.api import checking, load_rank, planning, repairing, writing
from shardstate.checkpoint import open_checkpoint
from shardstate.cli.main import run
from shardstate.errors import ChangedFile, InputError, StorageError, TruncatedFile
from shardstate.storage import LocalStorage
from shardstate.storage.adaptive import AdaptiveReader
from shardstate.torch import load_model
from test_cli import COMMAND, drop_capabilities, small_disk

R0 = "model-rank-0-part-0.safetensors"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("faults") / "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint whose files have the same sizes, and other bytes."""
    return write_llama(tmp_path_factory.mktemp("faults") / "other", seed=1)


@pytest.fixture(scope="module")
def sound(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "set"
    shardstate.shard(source, out, tp=2)
    return out


def change(path, how, other):
    """Do to a file what others do while it is read."""
    time.sleep(0.02)  # a clock of the kernel must tell both times apart
    match how:
        case "shrinks":
            os.truncate(path, path.stat().st_size // 2)
        case "vanishes":
            path.unlink()
        case "is replaced":
            shutil.copy(other, path.with_name("new"))
            path.with_name("new").replace(path)
        case "is overwritten":
            data = other.read_bytes()
            with path.open("r+b") as file:
                file.write(data)
        case "grows":
            with path.open("ab") as file:
                file.write(bytes(100))


@pytest.fixture
def after_reads(monkeypatch):
    """Lets something happen before the k-th read of weights; counts from 1."""

    def arrange(number, what):
        for name in ("READ_BYTES", "LONG_READ_BYTES"):  # several reads of small files
            monkeypatch.setattr(planning, name, 4096)
        original, left, lock = AdaptiveReader.read_into, [number], threading.Lock()

        def read_into(self, name, begin, views, arrived=None):
            if name.endswith(".safetensors") and begin > 8:
                with lock:
                    left[0] -= 1
                    if not left[0]:
                        what()
            return original(self, name, begin, views, arrived)

        monkeypatch.setattr(AdaptiveReader, "read_into", read_into)
        return left

    return arrange


HOW = ["shrinks", "vanishes", "is replaced", "is overwritten", "grows"]


class TestAFileThatChangesWhileItIsRead:
    """Never a mixture: an error that names the file."""

    def refused(self, load, file, how, other, after_reads, at):
        left = after_reads(at, lambda: change(file, how, other))
        with pytest.raises((ChangedFile, TruncatedFile)) as error:
            load()
        assert left[0] <= 0
        assert file.name in str(error.value)
        assert error.value.file is not None

    @pytest.mark.parametrize("at", [1, 3])
    @pytest.mark.parametrize("how", HOW)
    def test_load_of_a_set(self, how, at, sound, other, after_reads, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        shardstate.shard(other, tmp_path / "other", tp=2)
        new = tmp_path / "other" / R0
        assert new.stat().st_size == (path / R0).stat().st_size

        def load():
            load_rank(path, rank=0, threads=1)

        self.refused(load, path / R0, how, new, after_reads, at)

    @pytest.mark.parametrize("how", HOW)
    def test_load_of_an_ordinary_checkpoint(self, how, source, other, after_reads, tmp_path):
        path = shutil.copytree(source, tmp_path / "llama")

        def load():
            shardstate.load(path, rank=1, tp=2)

        self.refused(load, path / WEIGHTS, how, other / WEIGHTS, after_reads, 2)

    @pytest.mark.parametrize("how", HOW)
    def test_load_model(self, how, sound, source, other, after_reads, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        shardstate.shard(other, tmp_path / "other", tp=2)
        model = {
            name: torch.zeros(t.shape, dtype=torch.bfloat16)
            for name, t in rank_tensors(path, 0).items()
        }

        def load():
            load_model(model, path, rank=0, tp=2)

        self.refused(load, path / R0, how, tmp_path / "other" / R0, after_reads, 2)

    @pytest.mark.parametrize("how", HOW)
    def test_shard_commits_nothing(self, how, source, other, after_reads, tmp_path):
        path = shutil.copytree(source, tmp_path / "llama")

        def shard():
            shardstate.shard(path, tmp_path / "set", tp=2, threads=1)

        self.refused(shard, path / WEIGHTS, how, other / WEIGHTS, after_reads, 4)
        assert "shardstate.json" not in tree(tmp_path / "set")

    def test_the_process_survives_a_truncation(self, tmp_path):
        """In a process of its own: a SIGBUS would kill it."""
        path = write_llama(tmp_path / "llama", vocab=100_003)
        script = f"""
import os, sys, threading
import shardstate
from shardstate.storage.adaptive import AdaptiveReader
original, count = AdaptiveReader.read_into, [0]
def read_into(self, name, begin, views, arrived=None):
    count[0] += 1
    if count[0] == 2:
        os.truncate({str(path / WEIGHTS)!r}, 100_000)
    return original(self, name, begin, views, arrived)
AdaptiveReader.read_into = read_into
try:
    shardstate.load({str(path)!r}, rank=0, tp=1)
except shardstate.ShardStateError as error:
    print(type(error).__name__, error)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("TruncatedFile")
        assert WEIGHTS in done.stdout


class FailingStorage:
    """A storage, by its public interface, whose k-th call of one kind fails."""

    def __init__(self, storage, call, number):
        self._storage, self._call, self.left = storage, call, number

    def __getattr__(self, name):
        found = getattr(self._storage, name)
        if name != self._call:
            return found

        def failing(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise StorageError(f"{args[0] if args else 'all'}: the device failed", file="x")
            return found(*args, **kwargs)

        return failing


class TestAStorageThatFails:
    def each(self, call, use, monkeypatch, *, create=False):
        """Let the first, second, … call fail until `use` succeeds; yield after each failure."""
        for number in range(1, 500):
            made = []

            def storage_at(path, access, made=made, number=number):
                made.append(FailingStorage(LocalStorage(path, create=create), call, number))
                return made[-1]

            with monkeypatch.context() as patch:
                for module in (planning, checking):
                    patch.setattr(module, "storage_at", storage_at)
                try:
                    use()
                except StorageError as error:
                    said = str(error)
                else:
                    return
            assert "the device failed" in said
            yield number

    @pytest.mark.parametrize("call", ["read_into", "read", "size", "entries"])
    def test_load_says_so_at_once(self, call, sound, source, monkeypatch):
        want = {n: a.tobytes() for n, a in shardstate.load(sound, rank=0).items()}
        for path in (sound, source):
            failures = 0
            for _ in self.each(
                call, lambda path=path: shardstate.load(path, rank=0, tp=2), monkeypatch
            ):
                failures += 1
            assert failures or (call, path) == ("read", source)
        assert {n: a.tobytes() for n, a in shardstate.load(sound, rank=0).items()} == want

    @pytest.mark.parametrize("call", ["read_into", "read", "size", "entries"])
    def test_verify_does_not_call_it_damage(self, call, sound, monkeypatch):
        failures = list(self.each(call, lambda: shardstate.verify(sound, full=True), monkeypatch))
        assert failures

    @pytest.mark.parametrize("call", ["read_into", "read", "size"])
    def test_shard_leaves_what_the_next_run_takes_up(
        self, call, source, sound, monkeypatch, tmp_path
    ):
        def shard():
            shardstate.shard(source, tmp_path / "set", tp=2, threads=1)

        for _ in self.each(call, shard, monkeypatch):
            left = tree(tmp_path / "set") if (tmp_path / "set").exists() else {}
            assert "shardstate.json" not in left
            assert [name for name in left if "shardstate-new" in name] == []
        assert tree(tmp_path / "set") == tree(sound)

    @pytest.mark.parametrize("call", ["create", "put", "remove", "sync", "entries", "walk"])
    def test_a_target_that_fails_leaves_no_set_and_the_next_run_is_done(
        self, call, source, sound, monkeypatch, tmp_path
    ):
        out = tmp_path / "set"
        for number in range(1, 200):
            with monkeypatch.context() as patch:

                def failing(path, access, *, outputs, number=number):
                    return FailingStorage(LocalStorage(path, create=True), call, number)

                patch.setattr(writing, "writable_at", failing)
                try:
                    shardstate.shard(source, out, tp=2, threads=1)
                except StorageError as error:
                    said = str(error)
                else:
                    break
            assert "the device failed" in said
            if (out / "shardstate.json").exists():
                assert shardstate.verify(out, full=True).problems == ()
            assert shardstate.shard(source, out, tp=2).committed is True
            assert tree(out) == tree(sound)
            shutil.rmtree(out)
        assert number > 1 or call == "walk"

    def test_repair_writes_nothing_unsound(self, source, sound, monkeypatch, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        os.truncate(path / R0, 5000)
        before = tree(path)
        for number in range(1, 100):
            with monkeypatch.context() as patch:

                def open_path(path, *, access, number=number):
                    storage = FailingStorage(LocalStorage(path), "read_into", number)
                    return open_checkpoint(storage, pattern=None)

                patch.setattr(repairing, "open_path", open_path)
                try:
                    assert shardstate.verify(path, repair=source).problems == ()
                except StorageError:
                    assert tree(path) == before
                    continue
            break
        assert number > 3
        assert tree(path) == tree(sound)


class TestNoMemory:
    def test_load_says_how_much_did_not_fit(self, tmp_path):
        path = write_llama(tmp_path / "llama", vocab=1_000_003)  # two tensors of 64 MB
        script = f"""
import resource, sys
import shardstate
from shardstate.cli.main import run
kib = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])
limit = (kib << 10) + (80 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(run(["load", {str(path)!r}, "--rank", "0", "--tp", "1", "--json", "--threads", "1"]))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        error = json.loads(done.stdout)["error"]
        assert error["kind"] == "storage"
        assert f"{path}: rank 0 takes 1280" in error["message"]
        assert "memory ran out" in error["message"]


class TestNoSpace:
    def test_no_inodes_exits_3_and_the_same_command_goes_on_with_more(self, source, tmp_path):
        with small_disk(tmp_path / "disk", "16m,nr_inodes=7") as disk:
            command = [*COMMAND, "shard", source, disk / "set", "--tp", "2", "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 3, done.stderr
            assert "the disk is full" in json.loads(done.stdout)["error"]["message"]
            left = tree(disk / "set")
            assert "shardstate.json" not in left
            assert [name for name in left if "new-" in name] == []
            subprocess.run(["mount", "-o", "remount,nr_inodes=1000", disk], check=True)
            assert subprocess.run(command, capture_output=True).returncode == 0
            assert shardstate.verify(disk / "set", against=source).problems == ()

    def test_a_read_only_file_system_exits_3_and_loads(self, source, tmp_path):
        with small_disk(tmp_path / "disk", "16m") as disk:
            shardstate.shard(source, disk / "set", tp=2)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            for out in (disk / "set", disk / "new"):
                done = subprocess.run(
                    [*COMMAND, "shard", source, out, "--tp", "4", "--force", "--json"],
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 3, done.stderr
                message = json.loads(done.stdout)["error"]["message"]
                assert "the file system is read-only: choose another place" in message
            assert shardstate.verify(disk / "set", against=source).problems == ()
            assert shardstate.load(disk / "set", rank=1)

    @pytest.mark.parametrize("limit", [4096, 9000, 20_000])
    def test_a_limit_on_file_sizes_stops_a_repair_and_leaves_the_set(self, limit, sound, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        os.truncate(path / R0, 4100)
        before = tree(path)
        done = subprocess.run(
            [*COMMAND, "verify", path, "--repair", sound, "--json"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 3, done.stderr
        assert "ulimit -f" in json.loads(done.stdout)["error"]["message"]
        assert tree(path) == before

    def test_a_set_that_may_not_be_written_is_neither_signed_nor_repaired(self, sound, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        os.truncate(path / R0, 4100)
        path.chmod(0o555)
        done = subprocess.run(
            [*COMMAND, "verify", path, "--repair", sound, "--json"],
            capture_output=True,
            text=True,
            preexec_fn=drop_capabilities,
        )
        path.chmod(0o755)
        assert done.returncode == 3, done.stderr
        assert "check the permissions" in json.loads(done.stdout)["error"]["message"]


class TestCtrlC:
    def test_before_any_change_of_the_disk_leaves_what_the_next_run_takes_up(
        self, source, sound, memory_path, monkeypatch
    ):
        out, done = memory_path / "set", tree(sound)
        for number in range(1, 500):
            count = [0]

            def interrupting(name, original, count=count, number=number):
                def call(*args, **kwargs):
                    count[0] += 1
                    if count[0] == number:
                        raise KeyboardInterrupt
                    return original(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                for name in {*CHANGES} - {"unlink", "rmdir", "write", "writev"}:
                    patch.setattr(os, name, interrupting(name, getattr(os, name)))
                try:
                    shardstate.shard(source, out, tp=2, threads=1)
                except KeyboardInterrupt:
                    left = tree(out) if out.exists() else {}
                    if "shardstate.json" in left:
                        assert shardstate.verify(out, full=True).problems == ()
                    assert shardstate.shard(source, out, tp=2).committed is True
                    assert tree(out) == done
                    shutil.rmtree(out)
                    continue
            break
        assert number > 20
        assert tree(out) == done

    @pytest.mark.parametrize("command", ["load", "verify", "repair", "shard", "sign"])
    def test_by_the_clock_exits_130_or_is_done(self, command, source, sound, tmp_path, key):
        """A real signal, at many moments of one command; no error but the one for Ctrl-C."""
        arguments = {
            "load": ["load", sound, "--rank", "0", "--verify"],
            "verify": ["verify", sound, "--full"],
            "repair": ["verify", tmp_path / "copy", "--repair", sound],
            "shard": ["shard", source, tmp_path / "set", "--tp", "2"],
            "sign": ["sign", tmp_path / "copy", "--key", key],
        }[command]
        statuses = set()
        for number in range(1, 25):
            for name in ("copy", "set"):
                shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(sound, tmp_path / "copy")
            if command == "repair":
                os.truncate(tmp_path / "copy" / R0, 5000)
            statuses.add(_interrupted([*map(str, arguments), "--quiet"], number * 0.0015))
            assert shardstate.verify(sound, full=True).problems == ()
            if command == "shard" and (tmp_path / "set" / "shardstate.json").exists():
                assert shardstate.verify(tmp_path / "set", full=True).problems == ()
            if number % 6:
                continue
            # An interrupt right after a temporary file was made may leave it to the next run.
            assert run([*map(str, arguments), "--quiet"]) == 0
            left = [p.name for p in tmp_path.glob("*/.shardstate-*")]
            assert left == []
        assert statuses <= {0, 130}
        assert 130 in statuses


def _interrupted(arguments, seconds):
    """Run a command that gets Ctrl-C after so many seconds; return its exit status.

    In a process of its own: an interrupt inside Python's logging leaves that locked for ever.
    """
    if not (child := os.fork()):
        status = 4
        try:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            status = run(arguments)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        except KeyboardInterrupt:  # between its last line and ours
            status = 130
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def key(tmp_path):
    found = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    path = tmp_path / "key"
    path.write_bytes(found.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


class TestCrowds:
    def test_fifty_loads_at_once_are_all_right(self, sound, source):
        want = [{n: t.data for n, t in rank_tensors(sound, rank).items()} for rank in range(2)]
        fds = len(os.listdir("/proc/self/fd"))

        def load(number):
            path = source if number % 5 == 0 else sound
            rank = number % 2
            verify = number % 3 == 0 and path == sound
            arrays = shardstate.load(path, rank=rank, tp=2, verify=verify)
            return {n: a.tobytes() for n, a in arrays.items()} == want[rank]

        with ThreadPoolExecutor(50) as pool:
            assert all(pool.map(load, range(100)))
        assert len(os.listdir("/proc/self/fd")) <= fds

    def test_fifty_loads_at_once_that_fail_all_say_so(self, sound, tmp_path):
        path = shutil.copytree(sound, tmp_path / "set")
        begin, _ = place_of(path / R0, "model.norm.weight")
        data = bytearray((path / R0).read_bytes())
        data[begin] ^= 1
        (path / R0).write_bytes(data)

        def load(_):
            with pytest.raises(ShardStateError, match=r"model\.norm\.weight"):
                shardstate.load(path, rank=0, verify=True)
            return True

        with ThreadPoolExecutor(50) as pool:
            assert all(pool.map(load, range(50)))

    def test_two_processes_sharding_to_one_target_make_one_set(self, source, sound, tmp_path):
        for number in range(3):
            out = tmp_path / str(number)
            command = [*COMMAND, "shard", source, out, "--tp", "2", "--json"]
            both = [
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for _ in range(2)
            ]
            answers = [json.loads(each.communicate(timeout=60)[0]) for each in both]
            assert {each.returncode for each in both} <= {0, 3}
            assert 0 in {each.returncode for each in both}
            for answer in answers:
                assert answer.get("committed") or "another process" in answer["error"]["message"]
            assert tree(out) == tree(sound)

    def test_a_reader_during_force_gets_one_set_or_an_error(self, source, other, tmp_path):
        out = tmp_path / "set"
        shardstate.shard(source, out, tp=2)
        want = [
            {n: t.data for n, t in tensors_of(path / WEIGHTS).items() if t.shape == (32,)}
            for path in (source, other)
        ]
        writer = multiprocessing.get_context("spawn").Process(
            target=_replace_again_and_again, args=(str(out), str(source), str(other), 8)
        )
        writer.start()
        seen, refused = set(), 0
        while writer.is_alive():
            for rank in range(2):
                try:
                    arrays = shardstate.load(out, rank=rank)
                except (InputError, StorageError):
                    refused += 1
                    continue
                whole = {n: a.tobytes() for n, a in arrays.items() if a.shape == (32,)}
                seen.add(want.index(whole))
        writer.join()
        assert writer.exitcode == 0
        assert seen or refused
        assert shardstate.verify(out, against=other).problems == ()


def _replace_again_and_again(out, first, second, times):
    for number in range(times):
        shardstate.shard(second if number % 2 else first, out, tp=2, force=True)
