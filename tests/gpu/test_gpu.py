"""Loading into parameters on a GPU; skipped where there is none, which says what stays unproven."""

import pytest
import torch

from memories import DTYPES, all_bits, module_of, noise
from shardstate.errors import DamageError
from shardstate.torch import load_model, save_model
from shardstate.torch.staging import StagedTarget, target_for

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: pinned buffers and the asynchronous copy to a device are not proven "
    "here; test_torch_load.py drives all the rest of that path on the CPU",
)


def on_gpu(tensors):
    return {name: noise(*t.shape, dtype=t.dtype, seed=99).cuda() for name, t in tensors.items()}


@pytest.mark.parametrize("verify", [False, True])
def test_every_dtype_and_shape_arrives_bit_for_bit(verify, tmp_path):
    tensors = {
        f"{str(dtype).split('.')[1]}.{len(shape)}": noise(*shape, dtype=dtype, seed=i)
        for i, dtype in enumerate(DTYPES)
        for shape in ((), (7,), (3, 5), (2, 3, 4))
    }
    save_model(tensors, tmp_path)
    goals = on_gpu(tensors)
    assert isinstance(target_for(list(goals.values()), None), StagedTarget)
    load_model(goals, tmp_path, verify=verify)
    assert all_bits(tensors) == all_bits(goals)


def test_strided_padded_and_cast_parameters_arrive(tmp_path):
    stored = {"a": noise(40, 30), "b": torch.arange(12.0).view(3, 4), "c": torch.arange(12.0)}
    save_model(stored, tmp_path)
    goals = {
        "a": torch.zeros(30, 40, device="cuda").t(),
        "b": torch.zeros(4, 6, device="cuda"),
        "c": torch.zeros(12, dtype=torch.bfloat16, device="cuda"),
    }
    load_model(goals, tmp_path, cast=True)
    want = stored | {"c": stored["c"].bfloat16()}
    assert all_bits(want) == all_bits(goals | {"b": goals["b"][:3, :4]})


def test_many_pieces_arrive_through_two_buffers_a_thread(tmp_path):
    stored = {"a": noise(64 << 20, dtype=torch.uint8), "b": noise(3000, 5001, seed=1)}
    save_model(stored, tmp_path)
    goals = {
        "a": torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"),
        "b": torch.zeros(5001, 3000, device="cuda").t(),
    }
    report = load_model(goals, tmp_path, verify=True)
    assert all_bits(stored) == all_bits(goals)
    assert report.peak_extra_bytes < 256 << 20


def test_parameters_on_host_and_device_are_filled_in_one_load(tmp_path):
    stored = {"host": noise(100, 3), "device": noise(100, 3, seed=1)}
    save_model(stored, tmp_path)
    goals = {"host": torch.zeros(100, 3), "device": torch.zeros(100, 3, device="cuda")}
    load_model(goals, tmp_path)
    assert all_bits(stored) == all_bits(goals)


def test_a_tie_on_the_gpu_survives_the_round_trip(tmp_path):
    weight = noise(50, 30).cuda()
    save_model(module_of({"a": weight, "b": weight}), tmp_path)
    model = module_of({"a": (zeros := torch.zeros(50, 30, device="cuda")), "b": zeros})
    load_model(model, tmp_path)
    assert all_bits({"a": weight, "b": weight}) == all_bits(model.state_dict())


def test_a_flipped_bit_is_found(tmp_path):
    save_model({"a": noise(100)}, tmp_path)
    file = tmp_path / "model-rank-0-part-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match="a: block 0"):
        load_model({"a": torch.zeros(100, device="cuda")}, tmp_path, verify=True)


def test_strided_tensors_on_the_gpu_are_saved(tmp_path):
    tensors = {"a": noise(300, 500).cuda().t(), "b": noise(70).cuda()[::2]}
    save_model(tensors, tmp_path)
    goals = {name: torch.zeros(t.shape) for name, t in tensors.items()}
    load_model(goals, tmp_path)
    assert all_bits(tensors) == all_bits(goals)
