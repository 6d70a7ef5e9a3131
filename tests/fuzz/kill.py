"""Kills writers, by strace, at each system call that changes a disk or waits for it.

The tests do the same in process (`tests/crashing.py`), for the calls of Python's `os` that they
know of; here nothing has to be known. After each kill: no set, the old one or the new one; what
loads is whole; the same command once more makes what an undisturbed run makes.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

CALLS = (
    "write,pwrite64,pwritev,pwritev2,writev,sendfile,copy_file_range",
    "fsync,fdatasync,sync_file_range",
    "rename,renameat,renameat2,link,linkat",
    "unlink,unlinkat,rmdir,mkdir,mkdirat",
    "truncate,ftruncate,fallocate,flock",
)
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
CLI = [sys.executable, "-c", "from shardstate.cli import main; main()"]
SAVE = """
import sys, torch
from shardstate.torch import save_model
path, rank, generation = sys.argv[1], int(sys.argv[2]), sys.argv[3]
g = torch.Generator().manual_seed(rank + 10 * len(generation))
save_model({"a": torch.randn(300, generator=g), "b": torch.zeros(5)}, path, rank=rank, tp=2,
           max_part_size=800, save_id=generation)
"""


def killed(command, calls, number):
    """Run a command that dies at the `number`-th of `calls` of a thread; return whether it did."""
    trace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"]
    trace += ["-e", f"inject={calls}:signal=KILL:when={number}", *map(str, command)]
    done = subprocess.run(trace, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode in (0, 1):
        return False
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr.decode()
    return True


def scenarios(folder):
    """Yield (name, the directory before, command, the directory after)."""
    import shardstate
    from checkpoints import write_llama
    from shardstate.cli.commands import cli

    source = write_llama(folder / "llama", layers=1)
    other = write_llama(folder / "other", layers=1, seed=1)
    empty, new, old = folder / "empty", folder / "new", folder / "old"
    empty.mkdir()
    shardstate.shard(source, new, tp=2, max_part_size=6000)
    shardstate.shard(other, old, tp=2)
    shard = ["--tp", "2", "--max-part-size", "6000", "--threads", "1", "--quiet"]
    yield "shard", empty, [*CLI, "shard", source, "OUT", *shard], new
    yield "shard --force", old, [*CLI, "shard", source, "OUT", *shard, "--force"], new
    broken = shutil.copytree(new, folder / "broken")
    for file in ("model-rank-0-part-1.safetensors", "config.json", "shardstate.rank-1.json"):
        os.truncate(broken / file, 100)
    yield "verify --repair", broken, [*CLI, "verify", "OUT", "--repair", source, "--quiet"], new
    saved, again = folder / "saved", folder / "again"
    for path, generations in ((saved, ("one",)), (again, ("one", "second"))):
        for generation in generations:
            for rank in ("0", "1"):
                command = [sys.executable, "-c", SAVE, path, rank, generation]
                subprocess.run(command, check=True)
    half = shutil.copytree(saved, folder / "half")
    subprocess.run([sys.executable, "-c", SAVE, half, "0", "second"], check=True)
    yield "save, second rank", half, [sys.executable, "-c", SAVE, "OUT", "1", "second"], again
    if "copy" in cli.commands:
        yield "copy", empty, [*CLI, "copy", new, "OUT", "--threads", "1", "--quiet"], new


def state(path):
    """Return what a directory holds, temporary files and notes left out."""
    from checkpoints import tree

    return {n: d for n, d in tree(path).items() if ".shardstate-" not in n and not n.endswith("/")}


def sound(out, before, after):
    """Assert that what loads is of one set, whole, and that a manifest tells the truth."""
    import shardstate

    allowed = []
    for path in (before, after):
        try:
            ranks = [shardstate.load(path, rank=rank, verify=True) for rank in range(2)]
        except shardstate.ShardStateError:
            continue
        allowed.append([{n: a.tobytes() for n, a in each.items()} for each in ranks])
    for rank in range(2):
        try:
            arrays = shardstate.load(out, rank=rank)
        except (shardstate.ShardStateError, OSError):
            continue
        found = {n: a.tobytes() for n, a in arrays.items()}
        if before.name != "broken":  # its damage is what `load` alone does not look for
            assert found in [each[rank] for each in allowed], f"rank {rank} is a mixture"


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--only", default="")
    options = arguments.parse_args()
    if shutil.which("strace") is None:
        sys.exit("strace is not installed: apt-get install strace")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for what, before, command, after in scenarios(folder):
            if options.only not in what:
                continue
            want, kills, out = state(after), 0, folder / "out"
            arguments = [out if each == "OUT" else each for each in command]
            for calls in CALLS:
                number = 0
                while True:
                    number += 1
                    shutil.rmtree(out, ignore_errors=True)
                    shutil.copytree(before, out)
                    if not killed(arguments, calls, number):
                        break
                    kills += 1
                    sound(out, before, after)
                    again = subprocess.run(
                        [*map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True
                    )
                    finished = "there already" in again.stderr  # a save that was killed at its end
                    assert again.returncode == 0 or finished, again.stderr
                    if not finished:
                        assert state(out) == want, f"{what}: {calls} {number}"
                assert state(out) == want
            print(f"{what}: killed {kills} times", flush=True)


if __name__ == "__main__":
    main()
