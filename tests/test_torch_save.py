"""Saving modules: files, parts, patterns, ids, ties, ranks in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from multiprocessing import get_context

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import shardstate
from memories import DTYPES, all_bits, blank, module_of, noise
from shardstate.errors import InputError, LoadError, SetError, TargetBusy, UsageError
from shardstate.names import lock_name
from shardstate.storage import LocalStorage
from shardstate.torch import load_model, save_model

MIB = 1 << 20
spawn = get_context("spawn")


def rank_model(rank, generation=0):
    """Return the same names on every rank, with bits that tell rank and generation."""
    seed = 1000 * generation + rank
    return {
        "layer.weight": noise(64, 33, seed=seed),
        "layer.bias": noise(7, dtype=torch.bfloat16, seed=seed + 100),
        "generation": torch.tensor([generation, rank]),
    }


def saved_files(path):
    return sorted(file.name for file in path.glob("*.safetensors"))


def stored(path):
    """Read all rank files with safetensors itself."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def loaded(path, rank, like, **options):
    goals = blank(like)
    load_model(goals, path, rank=rank, **options)
    return goals


def leftovers(path):
    return [file.name for file in path.iterdir() if file.name.startswith(".shardstate")]


# Files


def test_a_module_is_stored_in_files_that_safetensors_reads(tmp_path):
    tensors = {
        f"layer.{i}.{str(dtype).split('.')[1]}": noise(3, 5, dtype=dtype, seed=i)
        for i, dtype in enumerate(DTYPES)
    }
    report = save_model(tensors, tmp_path)
    assert saved_files(tmp_path) == ["model-rank-0-part-0.safetensors"]
    assert all_bits(tensors) == all_bits(stored(tmp_path))
    assert report.committed
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == report.bytes
    assert len(tensors) == report.tensors
    assert leftovers(tmp_path) == []


def test_the_set_says_what_it_is(tmp_path):
    save_model(rank_model(0), tmp_path, save_id="one")
    found = shardstate.inspect(tmp_path)
    assert (
        found.kind,
        found.layout,
        found.stage,
        found.set,
    ) == ("shardstate", "rules", "model", "one")
    assert found.topology == {"tp": 1, "pp": 1, "dp": 1}
    assert shardstate.verify(tmp_path, full=True).problems == ()
    with safe_open(tmp_path / "model-rank-0-part-0.safetensors", "pt") as file:
        want = {"format": "pt", "shardstate": "1", "rank": "0", "part": "0", "set": "one"}
        assert want == file.metadata()


def test_the_same_module_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save_model(rank_model(0), tmp_path / name, save_id="one")
    assert [f.name for f in sorted((tmp_path / "a").iterdir())] == [
        f.name for f in sorted((tmp_path / "b").iterdir())
    ]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_core_loads_what_was_saved(tmp_path):
    tensors = {"a": noise(3, 5), "b": torch.tensor(7, dtype=torch.int32)}
    save_model(tensors, tmp_path)
    arrays = shardstate.load(tmp_path, rank=0, verify=True)
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: noise(6, 8).t(),
        lambda: noise(6, 8)[:, 1:4],
        lambda: noise(6, 8)[::2, ::3],
        lambda: noise(2, 3, 4, 5, dtype=torch.bfloat16).permute(3, 1, 0, 2),
        lambda: noise(4, 1).expand(4, 5),
        lambda: noise(40, dtype=torch.int8).as_strided((3, 4, 2), (2, 7, 1), 3),
        lambda: noise(8, dtype=torch.complex64).conj(),
        lambda: noise(8, dtype=torch.complex64).conj().imag,
    ],
    ids=[
        "transposed",
        "columns",
        "stepped",
        "permuted",
        "expanded",
        "any strides",
        "conjugated",
        "negated",
    ],
)
def test_tensors_that_are_not_contiguous_are_stored_as_their_values(make, tmp_path):
    tensor = make()
    save_model({"a": tensor}, tmp_path)
    assert all_bits({"a": tensor.resolve_conj().resolve_neg()}) == all_bits(stored(tmp_path))


def test_scalars_are_stored_and_empty_tensors_left_out(tmp_path):
    save_model({"a": torch.tensor(3.5), "b": torch.zeros(0, 4)}, tmp_path)
    assert all_bits({"a": torch.tensor(3.5)}) == all_bits(stored(tmp_path))


def test_a_rank_without_tensors_commits_all_the_same(tmp_path):
    save_model(rank_model(0), tmp_path, rank=0, tp=2, save_id="one")
    assert save_model({}, tmp_path, rank=1, tp=2, save_id="one").committed
    load_model({}, tmp_path, rank=1)


def test_parameters_buffers_and_subclasses_are_stored(tmp_path):
    class Special(torch.nn.Parameter):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].weight = Special(model[0].weight.detach())
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    save_model(model, tmp_path)
    assert all_bits(model.state_dict()) == all_bits(stored(tmp_path))
    assert "1.num_batches_tracked" in stored(tmp_path)


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Extra(torch.nn.Module):
        def get_extra_state(self):
            return {"scale": 1}

    with pytest.raises(InputError, match="_extra_state: no tensors"):
        save_model(Extra(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_bytes_or_type_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"layer\.weight: is on the meta device"):
        save_model({"layer.weight": torch.empty(3, device="meta")}, tmp_path)
    with pytest.raises(InputError, match=r"layer\.weight: dtype torch\.complex128"):
        save_model({"layer.weight": torch.zeros(3, dtype=torch.complex128)}, tmp_path)


# Parts and patterns


@pytest.mark.parametrize(("size", "parts"), [("5GB", 1), (4096, 3), ("4KiB", 3), ("1GB", 1)])
def test_parts_hold_at_most_their_size(size, parts, tmp_path):
    tensors = {f"layer.{i}": noise(512, seed=i) for i in range(6)}  # 2 KiB each
    save_model(tensors, tmp_path, max_part_size=size)
    assert [f"model-rank-0-part-{i}.safetensors" for i in range(parts)] == saved_files(tmp_path)
    assert all_bits(tensors) == all_bits(stored(tmp_path))
    assert all_bits(tensors) == all_bits(loaded(tmp_path, 0, tensors, verify=True))


def test_a_tensor_larger_than_a_part_has_one_of_its_own(tmp_path):
    tensors = {"a": noise(100), "b": noise(4096), "c": noise(100)}
    save_model(tensors, tmp_path, max_part_size=1000)
    assert len(saved_files(tmp_path)) == 3
    assert all_bits(tensors) == all_bits(stored(tmp_path))


def test_fewer_parts_leave_none_of_the_last_time(tmp_path):
    tensors = {f"layer.{i}": noise(512, seed=i) for i in range(6)}
    save_model(tensors, tmp_path, max_part_size=2048)
    assert len(saved_files(tmp_path)) == 6
    save_model(tensors, tmp_path, max_part_size=8192)
    assert len(saved_files(tmp_path)) == 2
    assert shardstate.verify(tmp_path, full=True).problems == ()


def test_an_own_pattern_names_the_files_and_is_known_when_loading(tmp_path):
    pattern = "w{part}-of-{rank}.safetensors"
    for rank in range(2):
        save_model(rank_model(rank), tmp_path, rank=rank, tp=2, save_id="one", pattern=pattern)
    assert saved_files(tmp_path) == ["w0-of-0.safetensors", "w0-of-1.safetensors"]
    assert all_bits(rank_model(1)) == all_bits(loaded(tmp_path, 1, rank_model(1)))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("model-{part}.safetensors", {"tp": 2}),
        ("model-{rank}.safetensors", {"tp": 2}),
        ("model-{rank}{part}.safetensors", {"tp": 2}),
        ("model-{rank}0{part}.safetensors", {"tp": 2}),
        ("model-{tp_rank}-{part}.safetensors", {"tp": 2, "pp": 2}),
        ("model-{pp_rank}-{part}.safetensors", {"tp": 2, "pp": 2}),
        ("model-{layer}-{rank}-{part}.safetensors", {"tp": 2}),
        ("a/{rank}-{part}.safetensors", {"tp": 2}),
        ("../{rank}-{part}.safetensors", {"tp": 2}),
        ("model-{rank}-{part}.bin", {"tp": 2}),
        ("model-{rank}-{part", {"tp": 2}),
    ],
)
def test_patterns_that_collide_or_lead_elsewhere_are_refused(pattern, sizes, tmp_path):
    with pytest.raises(UsageError, match="pattern"):
        save_model(rank_model(0), tmp_path / "set", **sizes, pattern=pattern, save_id="one")
    assert not (tmp_path / "set").exists()


def test_pipeline_ranks_have_names_of_stage_and_rank(tmp_path):
    for stage in range(2):
        for rank in range(2):
            save_model(
                rank_model(2 * stage + rank),
                tmp_path,
                rank=rank,
                tp=2,
                pp_rank=stage,
                pp=2,
                save_id="one",
            )
    assert [
        f"model-pp-{stage}-tp-{rank}-part-0.safetensors" for stage in range(2) for rank in range(2)
    ] == saved_files(tmp_path)
    assert shardstate.inspect(tmp_path).committed
    for stage in range(2):
        for rank in range(2):
            want = rank_model(2 * stage + rank)
            goals = loaded(tmp_path, rank, want, pp_rank=stage, pp=2, tp=2, verify=True)
            assert all_bits(want) == all_bits(goals)


# Ids


def test_several_ranks_need_a_common_id(tmp_path):
    with pytest.raises(ValueError, match="save_id is missing: 2 ranks"):
        save_model(rank_model(0), tmp_path / "set", rank=0, tp=2)
    with pytest.raises(ValueError, match="save_id is missing: 2 ranks"):
        save_model(rank_model(0), tmp_path / "set", pp_rank=0, pp=2)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("save_id", ["", "a b", "a/b", "ä", "x" * 65])
def test_ids_of_other_signs_are_refused(save_id, tmp_path):
    with pytest.raises(ValueError, match="expected 1 to 64"):
        save_model(rank_model(0), tmp_path / "set", save_id=save_id)


def test_an_id_that_is_there_already_is_refused_and_nothing_changed(tmp_path):
    save_model(rank_model(0), tmp_path, save_id="one")
    with pytest.raises(ValueError, match="one of rank 0 is there already"):
        save_model(rank_model(0, 1), tmp_path, save_id="one")
    assert all_bits(rank_model(0)) == all_bits(loaded(tmp_path, 0, rank_model(0), verify=True))


def test_a_single_rank_gets_a_new_id_each_time(tmp_path):
    ids = {save_model(rank_model(0), tmp_path).set for _ in range(3)}
    assert len(ids) == 3
    assert shardstate.inspect(tmp_path).set in ids


@pytest.mark.parametrize(
    "place", [{"rank": 2, "tp": 2}, {"rank": -1, "tp": 2}, {"pp_rank": 1, "pp": 1}, {"tp": 0}]
)
def test_places_out_of_range_are_refused(place, tmp_path):
    with pytest.raises(UsageError):
        save_model(rank_model(0), tmp_path / "set", **place, save_id="one")


# Several ranks, several generations


def test_the_last_rank_commits(tmp_path):
    first = save_model(rank_model(1), tmp_path, rank=1, tp=2, save_id="one")
    assert not first.committed
    assert first.notes == ("committed when ranks 0 are saved too",)
    assert not shardstate.inspect(tmp_path).committed
    last = save_model(rank_model(0), tmp_path, rank=0, tp=2, save_id="one")
    assert last.committed
    assert shardstate.inspect(tmp_path).committed
    assert shardstate.verify(tmp_path, full=True).problems == ()


def _save(path, rank, tp, save_id, generation, barrier):
    barrier.wait()
    report = save_model(rank_model(rank, generation), path, rank=rank, tp=tp, save_id=save_id)
    sys.exit(0 if report is not None else 1)


def test_ranks_that_finish_at_the_same_moment_commit(tmp_path):
    ranks = 2
    for generation in range(3):
        barrier = spawn.Barrier(ranks)
        processes = [
            spawn.Process(
                target=_save, args=(tmp_path, rank, ranks, f"g{generation}", generation, barrier)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [0] * ranks == [process.exitcode for process in processes]
        assert shardstate.inspect(tmp_path).committed
        assert shardstate.verify(tmp_path, full=True).problems == ()
        for rank in range(ranks):
            want = rank_model(rank, generation)
            assert all_bits(want) == all_bits(loaded(tmp_path, rank, want, verify=True))
        assert leftovers(tmp_path) == []


_RACE = """
import os, sys, torch
from shardstate.torch import save_model
path, rounds, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
for number in range(rounds):
    ready, go = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.close(go)
            os.read(ready, 1)  # all begin when the parent closes its end
            try:
                model = {"a": torch.full((3,), rank), "generation": torch.tensor(number)}
                save_model(model, path, rank=rank, tp=ranks, save_id=f"g{number}")
            except BaseException as error:
                print(f"round {number} rank {rank}: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(ready)
    os.close(go)
    for child in children:
        os.waitpid(child, 0)
    if not os.path.exists(f"{path}/shardstate.json"):
        print(f"round {number}: nobody committed")
"""


def test_four_ranks_in_a_race_always_commit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _RACE, str(tmp_path), "40", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    assert shardstate.verify(tmp_path, full=True).problems == ()
    goals = loaded(
        tmp_path, 3, {"a": torch.zeros(3, dtype=torch.int64), "generation": torch.tensor(0)}
    )
    assert [int(goals["generation"]), int(goals["a"][0])] == [39, 3]


def test_two_savers_of_one_rank_exclude_each_other(tmp_path):
    with LocalStorage(tmp_path) as storage, storage.lock(lock_name(0)):
        with pytest.raises(TargetBusy, match="another process is writing"):
            save_model(rank_model(0), tmp_path)
    with LocalStorage(tmp_path) as storage, storage.lock():
        with pytest.raises(TargetBusy, match="another process is writing"):
            save_model(rank_model(0), tmp_path)


def generations(path, ranks=2):
    """Return which generation each rank loads, or None where it is refused; never damage."""
    found = []
    for rank in range(ranks):
        goals = blank(rank_model(rank))
        try:
            load_model(goals, path, rank=rank, tp=ranks, verify=True)
        except (InputError, UsageError):
            found.append(None)
        else:
            generation, owner = goals["generation"].tolist()
            assert owner == rank
            assert all_bits(rank_model(rank, generation)) == all_bits(goals)
            found.append(generation)
    return found


def test_of_two_generations_never_a_mixture_loads(tmp_path):
    for generation, save_id in enumerate(("first", "second")):
        for rank in range(2):
            save_model(rank_model(rank, generation), tmp_path, rank=rank, tp=2, save_id=save_id)
            # One of two: the old set is gone, the new one not there.
            assert (generation, rank) == (0, 0) or generations(tmp_path) == (
                [generation] * 2 if rank else [None, None]
            )
    assert generations(tmp_path) == [1, 1]


def test_a_smaller_world_leaves_nothing_of_the_larger_one(tmp_path):
    for rank in range(4):
        save_model(rank_model(rank), tmp_path, rank=rank, tp=4, save_id="four")
    for rank in range(2):
        save_model(rank_model(rank, 1), tmp_path, rank=rank, tp=2, save_id="two")
    assert [f"model-rank-{rank}-part-0.safetensors" for rank in range(2)] == saved_files(tmp_path)
    assert generations(tmp_path) == [1, 1]
    assert shardstate.verify(tmp_path, full=True).problems == ()


def test_another_pattern_leaves_nothing_of_the_old_one(tmp_path):
    for generation, pattern in enumerate((None, "other-{rank}-{part}.safetensors")):
        for rank in range(2):
            save_model(
                rank_model(rank, generation),
                tmp_path,
                rank=rank,
                tp=2,
                save_id=f"g{generation}",
                pattern=pattern,
            )
    assert saved_files(tmp_path) == ["other-0-0.safetensors", "other-1-0.safetensors"]
    assert generations(tmp_path) == [1, 1]


_KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from crashing import die_at
from test_torch_save import rank_model
from shardstate.torch import save_model
for number in map(int, sys.stdin):
    child = os.fork()
    if not child:
        die_at(number)
        save_model(rank_model(1, 1), {path!r}, rank=1, tp=2, save_id="second")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_change_of_the_disk_no_mixture_loads(memory_path):
    path = memory_path / "set"
    script = _KILLED.format(tests=os.path.dirname(__file__), path=str(path))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        for die_at in range(1, 200):
            for generation, ranks in ((0, (0, 1)), (1, (0,))):
                for rank in ranks:
                    model, save_id = rank_model(rank, generation), f"{die_at}-{generation}"
                    if generation == 1:
                        save_id = "second"
                    save_model(model, path, rank=rank, tp=2, save_id=save_id)
            server.stdin.write(f"{die_at}\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            found = generations(path)
            if status == 0:
                assert found == [1, 1]
                break
            assert status == -signal.SIGKILL
            assert len(set(found) - {None}) <= 1, f"killed before change {die_at}: {found}"
            for rank in range(2):  # whoever tries again is done
                save_model(rank_model(rank, 2), path, rank=rank, tp=2, save_id=f"again{die_at}")
            assert generations(path) == [2, 2]
            assert shardstate.verify(path, full=True).problems == ()
            assert leftovers(path) == []
    assert die_at > 10


def test_records_of_two_generations_are_refused_by_name(tmp_path):
    for rank in range(2):
        save_model(rank_model(rank), tmp_path, rank=rank, tp=2, save_id="first")
    save_model(rank_model(0, 1), tmp_path, rank=0, tp=2, save_id="second")
    with pytest.raises(SetError, match="being replaced or was left half-replaced"):
        load_model(blank(rank_model(0)), tmp_path, rank=0)


# Ties


def tied(first="lm_head.weight", second="embed.weight"):
    weight = noise(5, 3)
    return module_of({first: weight, second: weight, "norm": noise(3, seed=1)})


def test_a_tie_is_stored_once_and_recorded(tmp_path):
    save_model(tied(), tmp_path)
    assert {"embed.weight", "norm"} == set(stored(tmp_path))
    record = json.loads((tmp_path / "shardstate.rank-0.json").read_bytes())
    assert record["aliases"] == [["embed.weight", "lm_head.weight"]]


def test_a_tie_survives_the_round_trip(tmp_path):
    save_model(tied(), tmp_path)
    model = tied()
    with torch.no_grad():
        model.embed.weight.zero_()
    load_model(model, tmp_path)
    assert model.embed.weight is model.lm_head.weight
    assert all_bits(tied().state_dict()) == all_bits(model.state_dict())


def test_a_tie_loads_into_a_model_that_keeps_both_apart(tmp_path):
    save_model(tied(), tmp_path)
    model = module_of(blank(tied().state_dict()))
    report = load_model(model, tmp_path)
    assert model.embed.weight is not model.lm_head.weight
    assert all_bits(tied().state_dict()) == all_bits(model.state_dict())
    assert report.tensors == 2


def test_a_tie_does_not_turn_into_a_cast_that_nobody_asked_for(tmp_path):
    save_model(tied(), tmp_path)
    goals = blank(tied().state_dict()) | {"lm_head.weight": torch.zeros(5, 3, dtype=torch.float64)}
    with pytest.raises(LoadError, match=r"lm_head\.weight: missing"):
        load_model(goals, tmp_path)
    load_model(goals, tmp_path, cast=True)
    assert torch.equal(
        goals["lm_head.weight"].nan_to_num(), tied().embed.weight.double().nan_to_num()
    )


def test_a_set_whose_saver_kept_another_name_loads_all_the_same(tmp_path):
    # The saver knew only one name of what the loader ties; its name is not the loader's choice.
    weight = noise(5, 3)
    save_model({"z.weight": weight}, tmp_path / "one")
    goal = torch.zeros(5, 3)
    goals = {"a.weight": goal, "z.weight": goal}
    load_model(goals, tmp_path / "one")
    assert all_bits({"z.weight": weight}) == all_bits({"z.weight": goal})
    # The saver kept a.weight for both; the loader has the other one alone.
    save_model({"a.weight": weight, "z.weight": weight}, tmp_path / "two")
    alone = {"z.weight": torch.zeros(5, 3)}
    report = load_model(alone, tmp_path / "two")
    assert all_bits({"z.weight": weight}) == all_bits(alone)
    assert report.notes == ("a.weight is z.weight in this model",)


def test_equal_tensors_that_were_stored_apart_load_into_a_tie(tmp_path):
    save_model({"a": noise(5, 3), "b": noise(5, 3)}, tmp_path)
    goal = torch.zeros(5, 3)
    report = load_model({"a": goal, "b": goal}, tmp_path)
    assert all_bits({"a": noise(5, 3)}) == all_bits({"a": goal})
    assert report.notes == ("b is a in this model, which was loaded instead",)


def test_different_tensors_do_not_load_into_a_tie(tmp_path):
    save_model({"a": noise(5, 3), "b": noise(5, 3, seed=1)}, tmp_path)
    goal = torch.zeros(5, 3)
    with pytest.raises(LoadError, match="b: stored apart from a"):
        load_model({"a": goal, "b": goal}, tmp_path)
    assert torch.equal(torch.zeros(5, 3), goal)
    report = load_model({"a": goal, "b": goal}, tmp_path, strict=False)
    assert all_bits({"a": noise(5, 3)}) == all_bits({"a": goal})
    assert report.notes == ("b: stored apart from a, and here in its memory",)


def test_a_tensor_stored_apart_does_not_load_into_the_middle_of_another(tmp_path):
    save_model({"a": noise(2), "b": noise(5)}, tmp_path)
    goal = torch.zeros(5)
    with pytest.raises(LoadError, match="a: stored apart from b"):
        load_model({"a": goal[1:3], "b": goal}, tmp_path)


# Memory


def test_memory_beyond_the_model_is_bounded(tmp_path):
    model = {
        "whole": torch.ones(80 * MIB, dtype=torch.int8),
        "transposed": torch.ones(2048, 20480, dtype=torch.int16).t(),
    }
    report = save_model(model, tmp_path)
    assert report.bytes == 160 * MIB
    assert report.peak_extra_bytes < 128 * MIB
    goals = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    for goal in goals.values():
        goal.fill_(2)
    report = load_model(goals, tmp_path)
    assert report.peak_extra_bytes < 128 * MIB
    assert all(torch.equal(model[name], goal) for name, goal in goals.items())


# torch.distributed

_GLOO = """
import sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from memories import all_bits, blank
from test_torch_save import rank_model
from shardstate.torch import load_model, save_model
path, rank = {path!r}, int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {meet!r}, rank=rank, world_size=2)
for generation in range(2):
    model = rank_model(rank, generation)
    saved = save_model(model, path)
    dist.barrier()
    goals = blank(model)
    report = load_model(goals, path, verify=True)
    assert all_bits(model) == all_bits(goals)
    assert report.committed and report.set == saved.set, report
    assert report.ranks == (rank,) and report.topology == {{"tp": 2, "pp": 1, "dp": 1}}, report
    other = blank(model)
    load_model(other, path, rank=1 - rank)
    assert all_bits(rank_model(1 - rank, generation)) == all_bits(other)
    dist.barrier()
ids = [None, None]
dist.all_gather_object(ids, saved.set)
assert ids[0] == ids[1], ids
staged = save_model(model, path + "-pp", pp=2)
dist.barrier()
goals = blank(model)
load_model(goals, path + "-pp", pp=2)
assert all_bits(model) == all_bits(goals)
try:
    save_model(model, path + "-bad", tp=2, pp=2)
except ValueError as error:
    assert "are not the 2 ranks" in str(error), error
else:
    raise AssertionError("two ranks are no tp 2 x pp 2")
try:
    save_model(model, path + "-bad", rank=rank)
except ValueError as error:
    assert "save_id is missing: 2 ranks" in str(error), error
else:
    raise AssertionError("an explicit rank needs an explicit id")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_of_torch_distributed_save_and_load(tmp_path):
    path = tmp_path / "set"
    script = textwrap.dedent(_GLOO).format(
        tests=os.path.dirname(__file__), path=str(path), meet=str(tmp_path / "meet")
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert [f"model-rank-{rank}-part-0.safetensors" for rank in range(2)] == saved_files(path)
    assert [f"model-pp-{stage}-tp-0-part-0.safetensors" for stage in range(2)] == saved_files(
        tmp_path / "set-pp"
    )
    assert generations(path) == [1, 1]


@pytest.mark.parametrize(
    "state",
    [
        {"__metadata__": torch.ones(2)},
        {0: torch.ones(2)},
        {"a\ud800": torch.ones(2)},
        {"a": torch.eye(2).to_sparse()},
    ],
    ids=["metadata", "number", "surrogate", "sparse"],
)
def test_what_no_file_can_hold_is_refused_before_anything_is_written(state, tmp_path):
    with pytest.raises(InputError, match=r"no name that a safetensors|has layout"):
        save_model(state, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_damaged_record_of_a_rank_that_is_gone_does_not_stand_in_the_way(tmp_path):
    for rank in range(4):
        save_model({"a": torch.ones(2)}, tmp_path / "set", rank=rank, tp=4, save_id="one")
    (tmp_path / "set" / "shardstate.rank-3.json").write_bytes(b"{")
    for rank in range(2):
        report = save_model({"a": torch.ones(2)}, tmp_path / "set", rank=rank, tp=2, save_id="two")
    assert report.committed
    assert shardstate.verify(tmp_path / "set", full=True).problems == ()
