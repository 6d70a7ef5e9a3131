"""Loading into a module's own parameters and buffers: what fits, what does not, and from where."""

import importlib.util
import logging
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import shardstate
from checkpoints import flip_bit, place_of, write_llama
from memories import DTYPES, all_bits, bits, blank, module_of, noise
from shardstate.errors import (
    CatalogError,
    DamageError,
    LoadError,
    SetError,
    UsageError,
)
from shardstate.torch import filter_subtensors, load_model, save_model
from shardstate.torch.staging import StagedTarget, target_for

FILE = "model-rank-0-part-0.safetensors"


def load(goals, path, **options):
    """Load without a warning, and return the report."""
    return load_model(goals, path, **options)


def save_as_vllm(path, *ranks, parts=1):
    """Write rank files as vLLM does: its names, and no mark of ours."""
    path.mkdir(exist_ok=True)
    for rank, tensors in enumerate(ranks):
        names = list(tensors)
        for part in range(parts):
            own = names[part * len(names) // parts : (part + 1) * len(names) // parts]
            file = path / f"model-rank-{rank}-part-{part}.safetensors"
            save_file({name: tensors[name] for name in own}, file)


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="shardstate")

    def of(level):
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    return of


# Into which memory


def test_every_dtype_and_shape_arrives_bit_for_bit(tmp_path):
    tensors = {
        f"{str(dtype).split('.')[1]}.{len(shape)}": noise(*shape, dtype=dtype, seed=i)
        for i, dtype in enumerate(DTYPES)
        for shape in ((), (7,), (3, 5), (2, 3, 4))
    }
    save_model(tensors, tmp_path)
    goals = blank(tensors)
    report = load(goals, tmp_path, verify=True)
    assert all_bits(tensors) == all_bits(goals)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == report.bytes
    assert len(tensors) == report.tensors
    assert report.problems == ()


STRIDED = {
    "transposed": lambda: noise(9, 6).t(),
    "columns": lambda: noise(6, 20)[:, 3:12],
    "stepped": lambda: noise(12, 27)[::2, ::3],
    "permuted": lambda: noise(9, 1, 6).permute(2, 0, 1)[:, :, 0],
    "offset": lambda: noise(100)[46:].view(6, 9),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_parameters_are_filled_in_place_and_nothing_beside_them(kind, verify, tmp_path):
    stored = noise(6, 9, seed=5)
    save_model({"a": stored}, tmp_path)
    goal, untouched = STRIDED[kind](), STRIDED[kind]()
    load({"a": goal}, tmp_path, verify=verify)
    assert bits(stored) == bits(goal)
    untouched.copy_(stored)
    whole = untouched.untyped_storage().tolist()
    assert whole == goal.untyped_storage().tolist()


def test_scalars_empty_tensors_and_buffers_are_loaded(tmp_path):
    class Small(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(float(value)))
            self.register_buffer("steps", torch.tensor(value))
            self.register_buffer("nothing", torch.zeros(0, 3))

    save_model(Small(7), tmp_path)
    model = Small(1)
    report = load(model, tmp_path)
    assert all_bits(Small(7).state_dict()) == all_bits(model.state_dict())
    assert report.notes is None
    assert isinstance(model.scale, torch.nn.Parameter)


def test_parameter_subclasses_keep_their_class_and_grad_flag(tmp_path):
    class Packed(torch.nn.Parameter):
        def __new__(cls, data):
            return super().__new__(cls, data, requires_grad=False)

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    model = torch.nn.Linear(3, 4)
    model.weight = Packed(noise(4, 3))
    save_model(model, tmp_path)
    goal = torch.nn.Linear(3, 4)
    goal.weight = Packed(torch.zeros(4, 3))
    weight = goal.weight
    load(goal, tmp_path)
    assert weight is goal.weight
    assert type(goal.weight) is Packed
    assert goal.bias.requires_grad
    assert all_bits(model.state_dict()) == all_bits(goal.state_dict())


def test_non_persistent_buffers_are_filled_where_stored_and_not_missed_where_not(tmp_path):
    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    save_model({"weight": noise(3)}, tmp_path / "without")
    save_model({"weight": noise(3), "cache": noise(2)}, tmp_path / "with")
    model = Cached()
    load(model, tmp_path / "without")
    assert torch.equal(torch.zeros(2), model.cache)
    load(model, tmp_path / "with")
    assert bits(noise(2)) == bits(model.cache)


def test_a_parameter_inside_a_non_persistent_buffer_is_missed(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("arena", torch.zeros(8), persistent=False)
    model.weight = torch.nn.Parameter(model.arena[2:5], requires_grad=False)
    save_model({"other": noise(2)}, tmp_path)
    with pytest.raises(LoadError, match="weight: missing"):
        load(model, tmp_path)
    save_model({"weight": noise(3)}, tmp_path)
    load(model, tmp_path)
    assert bits(noise(3)) == bits(model.arena[2:5])


def test_parameters_that_cannot_be_written_are_refused(tmp_path):
    save_model({"a": noise(4, 5)}, tmp_path)
    with pytest.raises(LoadError, match="a: is on the meta device; materialise"):
        load({"a": torch.empty(4, 5, device="meta")}, tmp_path)
    with pytest.raises(LoadError, match="a: is a view that cannot be written to"):
        load({"a": torch.zeros(4, 1).expand(4, 5)}, tmp_path)


# Padding


def padded(tmp_path, *, tp=1):
    """Save tensors smaller than the parameters that are returned."""
    stored = {"lora.weight": noise(3, 5), "whole": noise(4, seed=1)}
    for rank in range(tp):
        save_model(stored, tmp_path, rank=rank, tp=tp, save_id="one")
    return stored, {"lora.weight": torch.full((4, 8), 7.0), "whole": torch.zeros(4)}


def check_corner(stored, goals):
    assert bits(stored["lora.weight"]) == bits(goals["lora.weight"][:3, :5])
    assert torch.equal(torch.full((4, 3), 7.0), goals["lora.weight"][:, 5:])
    assert torch.equal(torch.full((1, 8), 7.0), goals["lora.weight"][3:])


def test_a_smaller_tensor_fills_the_corner_with_one_warning(messages, tmp_path):
    stored, goals = padded(tmp_path)
    report = load(goals, tmp_path, verify=True)
    check_corner(stored, goals)
    text = "lora.weight: stored [3, 5] fills the corner of [4, 8]"
    assert messages(logging.WARNING) == [f"shardstate: {text}"]
    assert report.notes == (text,)


def test_a_smaller_tensor_fills_the_corner_of_a_strided_parameter(tmp_path):
    stored, goals = padded(tmp_path)
    goals["lora.weight"] = torch.full((8, 4), 7.0).t()
    load(goals, tmp_path)
    check_corner(stored, goals)


def test_padding_is_refused_where_it_is_not_allowed_and_nothing_is_loaded(tmp_path):
    _, goals = padded(tmp_path)
    before = all_bits(goals)
    with pytest.raises(LoadError, match=r"lora\.weight: stored shape \[3, 5\] is smaller"):
        load(goals, tmp_path, allow_padding=False)
    assert before == all_bits(goals)


@pytest.mark.parametrize("backend", ["native", "safetensors"])
def test_a_set_for_other_ranks_is_refused_and_not_half_loaded(backend, tmp_path):
    # vLLM 0.32 loads TP 2 files at TP 1 with nothing but warnings.
    stored, goals = padded(tmp_path, tp=2)
    before = all_bits(goals)
    with pytest.raises(UsageError, match="is a set for tp 2, pp 1, and the model is one of tp 1"):
        load(goals, tmp_path, rank=0, tp=1, backend=backend)
    with pytest.raises(UsageError, match="is a set for tp 2"):
        load(goals, tmp_path, rank=0, tp=4, allow_padding=False, backend=backend)
    assert before == all_bits(goals)
    load(goals, tmp_path, rank=0, tp=1, allow_padding=True, backend=backend)
    check_corner(stored, goals)


def test_unmarked_files_pad_where_tp_is_not_given_or_equals_the_ranks_found(tmp_path):
    stored, goals = padded(tmp_path / "ours")
    save_as_vllm(tmp_path / "theirs", stored, stored)
    load(goals, tmp_path / "theirs", rank=1)
    check_corner(stored, goals)
    load(goals, tmp_path / "theirs", rank=1, tp=2)
    before = all_bits(goals)
    for allowed in (None, False):
        with pytest.raises(UsageError, match="is a set for tp 2, pp 1, and the model is one of"):
            load(goals, tmp_path / "theirs", rank=0, tp=1, allow_padding=allowed)
    with pytest.raises(LoadError, match="is smaller than the model's"):
        load(goals, tmp_path / "theirs", rank=0, allow_padding=False)
    assert before == all_bits(goals)
    load(goals, tmp_path / "theirs", rank=0, tp=1, allow_padding=True)
    check_corner(stored, goals)


def test_a_rank_that_is_not_there_is_refused(tmp_path):
    _, goals = padded(tmp_path, tp=2)
    with pytest.raises(UsageError, match="rank 2 is out of range"):
        load(goals, tmp_path, rank=2)


# What does not fit


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    stored = {
        "larger": noise(4, 5),
        "flatter": noise(6),
        "unexpected": noise(2, 2),
        "wider": noise(3, dtype=torch.float64),
        "whole": noise(3, dtype=torch.int32),
        "fine": noise(3),
    }
    save_model(stored, tmp_path, max_part_size=40)
    goals = {
        "larger": torch.zeros(4, 4),
        "flatter": torch.zeros(2, 3),
        "missing": torch.zeros(7, 1),
        "wider": torch.zeros(3),
        "whole": torch.zeros(3),
        "fine": torch.zeros(3),
    }
    with pytest.raises(LoadError) as caught:
        load(goals, tmp_path)
    message = str(caught.value)
    for part in (
        f"{tmp_path}: 6 tensors do not fit the model: ",
        "larger: stored shape [4, 5], the model's is [4, 4]",
        "flatter: stored shape [6], the model's is [2, 3]",
        "wider: stored as F64, the model's is F32 (cast=True converts)",
        "whole: stored as I32, the model's is F32;",
        "missing: missing, the model's shape is [7, 1]",
        "unexpected: unexpected, the stored shape is [2, 2]",
        "; looked at model-rank-0-part-0.safetensors, model-rank-0-part-1.safetensors",
    ):
        assert part in message
    assert "fine" not in message
    assert all(torch.equal(torch.zeros_like(goal), goal) for goal in goals.values())


def test_without_strict_names_are_notes_and_shapes_still_errors(tmp_path):
    save_model({"a": noise(3), "b": noise(2)}, tmp_path)
    goals = {"a": torch.zeros(3), "c": torch.ones(4)}
    report = load(goals, tmp_path, strict=False)
    assert bits(noise(3)) == bits(goals["a"])
    assert torch.equal(torch.ones(4), goals["c"])
    assert report.notes == (
        "c: missing, the model's shape is [4]",
        "b: unexpected, the stored shape is [2]",
    )
    assert report.tensors == 1
    with pytest.raises(LoadError, match="a: stored shape"):
        load({"a": torch.zeros(2)}, tmp_path, strict=False)


@pytest.mark.parametrize("backend", ["native", "safetensors"])
@pytest.mark.parametrize("goal", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_equal_those_of_torch_and_happen_only_when_asked_for(stored, goal, backend, tmp_path):
    tensors = {"a": noise(64, 33, dtype=stored), "b": noise(33, 64, dtype=stored, seed=1)}
    save_model(tensors, tmp_path)
    goals = {"a": torch.zeros(64, 33, dtype=goal), "b": torch.zeros(64, 33, dtype=goal).t()}
    if stored != goal:
        with pytest.raises(LoadError, match="cast=True converts"):
            load(goals, tmp_path, backend=backend)
    load(goals, tmp_path, cast=True, backend=backend)
    for name, tensor in tensors.items():
        want, number = tensor.to(goal), ~tensor.isnan()
        assert bits(want[number]) == bits(goals[name][number])
        assert goals[name][~number].isnan().all()


def test_casts_are_between_plain_floats_only(tmp_path):
    save_model({"a": noise(4, dtype=torch.int32)}, tmp_path)
    for dtype in (torch.float32, torch.int64, torch.float8_e4m3fn):
        with pytest.raises(LoadError, match="a: stored as I32"):
            load({"a": torch.zeros(4, dtype=dtype)}, tmp_path, cast=True)


def test_one_line_says_what_was_loaded(messages, tmp_path):
    save_model({"a": noise(4)}, tmp_path)
    load({"a": torch.zeros(4)}, tmp_path)
    (line,) = messages(logging.INFO)
    assert line.startswith("shardstate: rank=0 mode=sharded backend=native bytes=16 wanted=16 ")
    assert messages(logging.WARNING) == []


# Damage


@pytest.mark.parametrize("shape", [(50,), (10, 5)], ids=["contiguous", "transposed"])
def test_a_flipped_bit_is_found_where_asked_for(shape, tmp_path):
    save_model({"a": noise(10, 5), "b": noise(50, seed=1)}, tmp_path)
    begin, _ = place_of(tmp_path / FILE, "b")
    flip_bit(tmp_path / FILE, begin + 17)
    goals = {"a": torch.zeros(5, 10).t(), "b": torch.zeros(50)}
    load(goals, tmp_path)
    with pytest.raises(DamageError, match=f"{FILE}: b: block 0 has digest") as caught:
        load(goals, tmp_path, verify=True)
    (problem,) = caught.value.report.problems
    assert ("b", "digest", begin) == (problem.tensor, problem.kind, problem.begin)


@pytest.mark.parametrize("name", ["shardstate.json", "shardstate.rank-0.json", FILE])
def test_damage_of_what_describes_the_set_is_always_found(name, tmp_path):
    save_model({"a": noise(10, 5)}, tmp_path)
    for offset in (20, 60):
        flip_bit(tmp_path / name, offset)
        with pytest.raises((SetError, shardstate.ShardStateError)):
            load({"a": torch.zeros(10, 5)}, tmp_path)
        flip_bit(tmp_path / name, offset)
    load({"a": torch.zeros(10, 5)}, tmp_path, verify=True)


def test_a_truncated_file_is_refused(tmp_path):
    save_model({"a": noise(10, 5)}, tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-1])
    with pytest.raises(SetError, match="truncated"):
        load({"a": torch.zeros(10, 5)}, tmp_path)


@pytest.mark.parametrize("options", [{"verify": True}, {"verify": True, "backend": "safetensors"}])
def test_verification_that_cannot_be_is_refused(options, tmp_path):
    save_as_vllm(tmp_path, {"a": noise(3)})
    with pytest.raises(UsageError, match="leave verify out"):
        load({"a": torch.zeros(3)}, tmp_path, **options)


# Sources


def test_files_of_vllm_load_and_nothing_vouches_for_them(tmp_path):
    ranks = [{"a": noise(3, seed=rank), "b": noise(2, 5, seed=rank)} for rank in range(2)]
    save_as_vllm(tmp_path, *ranks, parts=2)
    for rank, tensors in enumerate(ranks):
        goals = blank(tensors)
        report = load(goals, tmp_path, rank=rank)
        assert all_bits(tensors) == all_bits(goals)
        assert report.kind == "vllm"
        text = f"nothing vouches for the bytes of {tmp_path}, taken for a set of 2 ranks"
        assert report.notes == (text,)


def test_files_of_vllm_with_pipeline_stages_load(tmp_path):
    for stage in range(2):
        for rank in range(2):
            file = tmp_path / f"model-pp-{stage}-tp-{rank}-part-0.safetensors"
            save_file({f"layer.{stage}": noise(3, seed=2 * stage + rank)}, file)
    goals = {"layer.1": torch.zeros(3)}
    load(goals, tmp_path, rank=0, pp_rank=1)
    assert bits(noise(3, seed=2)) == bits(goals["layer.1"])


def test_files_of_vllm_with_an_own_pattern_load(tmp_path):
    save_file({"a": noise(3)}, tmp_path / "mine-0-0.safetensors")
    goals = {"a": torch.zeros(3)}
    load(goals, tmp_path, pattern="mine-{rank}-{part}.safetensors")
    assert bits(noise(3)) == bits(goals["a"])


def test_a_stale_extra_part_is_named(tmp_path):
    tensors = {"a": noise(3), "b": noise(4), "c": noise(5)}
    save_as_vllm(tmp_path, tensors, parts=3)
    save_as_vllm(tmp_path, tensors, parts=2)  # of the last time part 2 is left
    with pytest.raises(CatalogError, match=r"c.*part-1.*part-2|part-2.*part-1") as caught:
        load(blank(tensors), tmp_path)
    assert "model-rank-0-part-2.safetensors" in str(caught.value)


def test_a_hole_in_the_part_numbers_is_named(tmp_path):
    tensors = {"a": noise(3), "b": noise(4), "c": noise(5)}
    save_as_vllm(tmp_path, tensors, parts=3)
    (tmp_path / "model-rank-0-part-1.safetensors").unlink()
    with pytest.raises(CatalogError, match=r"model-rank-0-part-1\.safetensors is missing"):
        load(blank(tensors), tmp_path)


def test_a_rank_between_the_others_that_is_missing_is_named(tmp_path):
    save_as_vllm(tmp_path, *[{"a": noise(3)}] * 3)
    (tmp_path / "model-rank-1-part-0.safetensors").unlink()
    with pytest.raises(CatalogError, match=r"model-rank-1-part-0\.safetensors is missing"):
        load({"a": torch.zeros(3)}, tmp_path, rank=0)


def test_an_extra_file_beside_a_marked_set_does_not_count(tmp_path):
    save_model({"a": noise(3)}, tmp_path)
    save_file({"b": noise(3)}, tmp_path / "model-rank-0-part-1.safetensors")
    goals = {"a": torch.zeros(3)}
    load(goals, tmp_path)
    assert bits(noise(3)) == bits(goals["a"])


def test_marked_files_without_their_record_are_refused(tmp_path):
    save_model({"a": noise(3)}, tmp_path)
    (tmp_path / "shardstate.json").unlink()
    (tmp_path / "shardstate.rank-0.json").unlink()
    with pytest.raises(SetError, match="no record lists it"):
        load({"a": torch.zeros(3)}, tmp_path)


def test_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="there is no such directory"):
        load({}, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected model\.safetensors"):
        load({}, tmp_path)


# Un-sharded

RULES = [
    {"match": "*.column.weight", "split": 0},
    {"match": "*.row.weight", "split": 1},
    {"match": "norm", "replicate": True},
]


def ordinary(path):
    """Write an ordinary checkpoint, and return what a rank's split module should hold."""
    path.mkdir()
    whole = {
        "layer.column.weight": noise(8, 6),
        "layer.row.weight": noise(6, 8, seed=1),
        "norm": noise(6, seed=2),
    }
    save_file(whole, path / "model.safetensors")

    def share(rank, tp):
        size = 8 // tp
        return {
            "layer.column.weight": whole["layer.column.weight"][rank * size :][:size],
            "layer.row.weight": whole["layer.row.weight"][:, rank * size :][:, :size],
            "norm": whole["norm"],
        }

    return share


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_ordinary_checkpoint_loads_into_a_split_module(tp, tmp_path):
    share = ordinary(tmp_path / "source")
    for rank in range(tp):
        want = share(rank, tp)
        model = module_of(blank(want))
        report = load(model, tmp_path / "source", rank=rank, tp=tp, rules=RULES)
        assert all_bits(want) == all_bits(model.state_dict())
        assert report.kind == "checkpoint"
        assert sum(t.numel() * t.element_size() for t in want.values()) == report.bytes
        assert report.bytes == report.bytes_wanted


def test_an_ordinary_checkpoint_loads_into_strided_and_cast_parameters(tmp_path):
    share = ordinary(tmp_path / "source")
    want = share(1, 2)
    goals = {
        name: noise(*reversed(tensor.shape), dtype=torch.float64, seed=9).t()
        if tensor.dim() == 2
        else torch.zeros(tensor.shape, dtype=torch.float64)
        for name, tensor in want.items()
    }
    load(goals, tmp_path / "source", rank=1, tp=2, rules=RULES, cast=True)
    for name, tensor in want.items():
        assert torch.equal(tensor.double().nan_to_num(), goals[name].nan_to_num())


def test_only_the_bytes_of_the_rank_are_read(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    save_file({"layer.column.weight": noise(4096, 256)}, path / "model.safetensors")
    report = load({"layer.column.weight": torch.zeros(1024, 256)}, path, rank=2, tp=4, rules=RULES)
    assert report.bytes == 1 << 20
    assert report.bytes_read == 1 << 20


def test_built_in_rules_shard_a_llama(tmp_path):
    source = write_llama(tmp_path / "source", files=2, dtype="BF16")
    shardstate.shard(source, tmp_path / "set", tp=2)
    for rank in range(2):
        want = load_file(tmp_path / "set" / f"model-rank-{rank}-part-0.safetensors")
        goals = blank(want)
        load(goals, source, rank=rank, tp=2)
        assert all_bits(want) == all_bits(goals)
        again = blank(want)
        load(again, tmp_path / "set", rank=rank, verify=True)
        assert all_bits(want) == all_bits(again)


def test_an_ordinary_checkpoint_needs_tp_and_no_padding(tmp_path):
    share = ordinary(tmp_path / "source")
    with pytest.raises(UsageError, match="ordinary checkpoint; say among how many ranks"):
        load(share(0, 2), tmp_path / "source", rank=0, rules=RULES)
    with pytest.raises(LoadError, match="is smaller than the model's"):
        load(share(0, 1), tmp_path / "source", rank=0, tp=2, rules=RULES)
    with pytest.raises(UsageError, match="reads whole rank files"):
        load(share(0, 2), tmp_path / "source", rank=0, tp=2, rules=RULES, backend="safetensors")


# Backends

BACKENDS = [
    "native",
    "safetensors",
    pytest.param(
        "runai",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("runai_model_streamer") is None,
            reason="runai-model-streamer is not installed (pip install 'shardstate[runai]')",
        ),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_with_the_same_checks(backend, tmp_path):
    dtypes = DTYPES
    if backend == "runai":  # what its own tables know
        dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    stored = {str(dtype): noise(4, 6, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)}
    stored |= {"scalar": torch.tensor(2.5), "small": noise(3, 2)}
    save_model(stored, tmp_path, max_part_size=100)
    goals = blank(stored) | {"small": torch.zeros(4, 4)}
    goals["scalar"] = torch.tensor([1.0, 2.0])[0]
    goals[str(dtypes[0])] = torch.zeros(6, 4, dtype=dtypes[0]).t()
    load(goals, tmp_path, backend=backend)
    assert all_bits(stored) == all_bits(goals | {"small": goals["small"][:3, :2]})
    with pytest.raises(LoadError, match="missing"):
        load(goals | {"other": torch.zeros(2)}, tmp_path, backend=backend)
    with pytest.raises(LoadError, match="is smaller"):
        load(goals, tmp_path, backend=backend, allow_padding=False)
    load({"scalar": torch.tensor(0.0)}, tmp_path, backend=backend, strict=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_fills_what_a_tie_left_out(backend, tmp_path):
    weight = noise(3, 4)
    save_model({"a": weight, "b": weight}, tmp_path)
    goals = blank({"a": weight, "b": weight})
    load(goals, tmp_path, backend=backend)
    assert bits(weight) == bits(goals["a"]) == bits(goals["b"])


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(UsageError, match="backend 'fast': expected native, safetensors or runai"):
        load({}, tmp_path, backend="fast")


def test_runai_that_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "runai_model_streamer", None)
    save_model({"a": noise(3)}, tmp_path)
    with pytest.raises(UsageError, match=r"pip install 'shardstate\[runai\]'"):
        load({"a": torch.zeros(3)}, tmp_path, backend="runai")


# Staging


def staged(monkeypatch):
    """Force the way that device memory takes; return the targets that were made."""
    made = []

    def forced(goals, digests):
        made.append(target_for(goals, digests, stage=True))
        return made[-1]

    monkeypatch.setattr("shardstate.torch.loading.target_for", forced)
    return made


STAGED = {
    "as stored": lambda shape, dtype: noise(*shape, dtype=dtype, seed=8),
    "transposed": lambda shape, dtype: noise(*shape[::-1], dtype=dtype, seed=8).permute(
        tuple(reversed(range(len(shape))))
    ),
    "padded": lambda shape, dtype: noise(*[n + 3 for n in shape], dtype=dtype, seed=8),
    "every other": lambda shape, dtype: noise(*[2 * n for n in shape], dtype=dtype, seed=8)[
        tuple(slice(None, None, 2) for _ in shape)
    ],
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", STAGED)
def test_the_way_through_buffers_gives_what_the_direct_one_does(
    kind, verify, monkeypatch, tmp_path
):
    shapes = ((), (7,), (5, 3), (2, 3, 4))
    stored = {
        f"{str(dtype).split('.')[1]}.{len(shape)}": noise(*shape, dtype=dtype, seed=i)
        for i, dtype in enumerate(DTYPES)
        for shape in shapes
    }
    save_model(stored, tmp_path, max_part_size=600)

    def goals():
        return {name: STAGED[kind](t.shape, t.dtype) for name, t in stored.items()}

    direct, buffered = goals(), goals()
    load(direct, tmp_path, verify=verify)
    made = staged(monkeypatch)
    load(buffered, tmp_path, verify=verify)
    assert [StagedTarget] == [type(target) for target in made]
    for name in stored:
        assert direct[name].untyped_storage().tolist() == buffered[name].untyped_storage().tolist()


@pytest.mark.parametrize("goal", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_through_buffers_equal_direct_ones(stored, goal, monkeypatch, tmp_path):
    tensors = {"a": noise(64, 33, dtype=stored), "b": noise(33, 64, dtype=stored, seed=1)}
    save_model(tensors, tmp_path)

    def goals():
        return {"a": torch.zeros(64, 33, dtype=goal), "b": torch.zeros(64, 33, dtype=goal).t()}

    direct, buffered = goals(), goals()
    load(direct, tmp_path, cast=True)
    staged(monkeypatch)
    load(buffered, tmp_path, cast=True)
    assert all_bits(direct) == all_bits(buffered)


def test_large_tensors_go_through_buffers_piece_by_piece(monkeypatch, tmp_path):
    stored = {"a": noise(3 << 20), "b": noise(1500, 2001, seed=1), "c": noise(5, seed=2)}
    save_model(stored, tmp_path)
    staged(monkeypatch)
    goals = {"a": torch.zeros(3 << 20), "b": torch.zeros(2001, 1500).t(), "c": torch.zeros(5)}
    report = load(goals, tmp_path, verify=True)
    assert all(bits(stored[name]) == bits(goals[name]) for name in stored)
    assert report.peak_extra_bytes < 128 << 20


def test_an_ordinary_checkpoint_goes_through_buffers(monkeypatch, tmp_path):
    share = ordinary(tmp_path / "source")
    staged(monkeypatch)
    for rank in range(2):
        goals = blank(share(rank, 2))
        load(goals, tmp_path / "source", rank=rank, tp=2, rules=RULES)
        assert all_bits(share(rank, 2)) == all_bits(goals)


def test_a_flipped_bit_is_found_on_the_way_through_buffers(monkeypatch, tmp_path):
    save_model({"a": noise(10, 5), "b": noise(50, seed=1)}, tmp_path)
    flip_bit(tmp_path / FILE, place_of(tmp_path / FILE, "a")[0])
    staged(monkeypatch)
    with pytest.raises(DamageError, match="a: block 0"):
        load({"a": torch.zeros(5, 10).t(), "b": torch.zeros(50)}, tmp_path, verify=True)


# transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 32,
}
KV = {"num_key_value_heads": 2}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 101}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
ARCHITECTURES = {
    "llama": ("Llama", "ForCausalLM", KV),
    "mistral": ("Mistral", "ForCausalLM", KV),
    "mixtral": ("Mixtral", "ForCausalLM", KV | EXPERTS),
    "qwen2": ("Qwen2", "ForCausalLM", KV),
    "qwen3": ("Qwen3", "ForCausalLM", KV | {"head_dim": 8}),
    "gemma2": ("Gemma2", "ForCausalLM", KV | {"head_dim": 8}),
    "phi3": ("Phi3", "ForCausalLM", KV | {"pad_token_id": 0}),
    "gpt2": ("GPT2", "LMHeadModel", SMALL),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", {}),
    "opt": ("OPT", "ForCausalLM", OPT),
    "bloom": ("Bloom", "ForCausalLM", SMALL | {"hidden_size": 32}),
    "bert": ("Bert", "ForMaskedLM", {}),
    "t5": ("T5", "ForConditionalGeneration", T5),
}
ONE_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tiny(name, *, tie, dtype, seed):
    family, kind, extra = ARCHITECTURES[name]
    sizes = {} if extra is T5 or extra is SMALL else SIZES
    config = getattr(transformers, f"{family}Config")(
        **sizes | extra | {"tie_word_embeddings": tie}
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}{kind}")(config).to(dtype)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_transformers_survive_the_round_trip(name, tie, tmp_path):
    dtype = ONE_DTYPE[sorted(ARCHITECTURES).index(name) % len(ONE_DTYPE)]
    model = tiny(name, tie=tie, dtype=dtype, seed=1)
    save_model(model, tmp_path, max_part_size=20_000)
    other = tiny(name, tie=tie, dtype=dtype, seed=2)
    assert all_bits(model.state_dict()) != all_bits(other.state_dict())
    pointers = {key: tensor.data_ptr() for key, tensor in other.state_dict().items()}
    load(other, tmp_path, verify=True)
    assert all_bits(model.state_dict()) == all_bits(other.state_dict())
    assert pointers == {key: tensor.data_ptr() for key, tensor in other.state_dict().items()}
    if tie:
        assert len(filter_subtensors(model.state_dict())) < len(model.state_dict())


def test_verify_leaves_out_what_is_not_loaded(tmp_path):
    save_model({"a": torch.ones(4, 4), "b": torch.ones(3)}, tmp_path / "set")
    goal = {"a": torch.zeros(4, 4)}
    report = load_model(goal, tmp_path / "set", strict=False, verify=True)
    assert torch.equal(goal["a"], torch.ones(4, 4))
    assert report.problems == ()
    assert report.notes is not None
    assert "b: unexpected" in report.notes[0]


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(4, dtype=torch.complex64).conj(),
        torch.zeros(4).as_strided((3, 2), (1, 1)),
        torch.zeros(6).unfold(0, 3, 1),
        torch.zeros(1).expand(4),
    ],
    ids=["conjugated", "overlapping", "unfolded", "expanded"],
)
def test_memory_that_cannot_hold_the_elements_is_refused(view, tmp_path):
    save_model({"a": torch.ones(view.shape, dtype=view.dtype)}, tmp_path / "set")
    with pytest.raises(LoadError, match="a: is a view that cannot be written to"):
        load_model({"a": view}, tmp_path / "set")


def test_a_rank_is_counted_among_those_of_the_set(tmp_path):
    for stage in range(2):
        for rank in range(2):
            save_model(
                {"a": torch.full((2,), 10.0 * stage + rank)},
                tmp_path / "set",
                rank=rank, tp=2, pp_rank=stage, pp=2, save_id="s",
            )  # fmt: skip
    goal = {"a": torch.zeros(4)}
    report = load_model(goal, tmp_path / "set", rank=0, tp=1, pp_rank=1, pp=2, allow_padding=True)
    assert goal["a"].tolist() == [10, 10, 0, 0]
    assert any("is made for tp 2, and the model is one of 1" in note for note in report.notes)


def test_a_stale_part_beside_a_marked_set_is_named(tmp_path):
    save_model({"a": torch.ones(2)}, tmp_path / "set")
    name = "model-rank-0-part-{}.safetensors"
    (tmp_path / "set" / name.format(2)).write_bytes(
        (tmp_path / "set" / name.format(0)).read_bytes()
    )
    report = load_model({"a": torch.zeros(2)}, tmp_path / "set")
    assert report.notes == (
        "model-rank-0-part-2.safetensors is there and no record lists it: "
        "it was not loaded; remove it",
    )
