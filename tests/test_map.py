"""Map mode: arrays and tensors over a private mapping."""

import gc

import numpy as np
import pytest
import torch

import shardstate
from checkpoints import write_llama, write_vllm_set
from shardstate import torch as shardstate_torch
from shardstate.errors import UsageError


@pytest.fixture
def sharded(tmp_path):
    write_llama(tmp_path / "source")
    shardstate.shard(tmp_path / "source", tmp_path / "set", tp=2)
    return tmp_path / "set"


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_mapped_arrays_equal_those_that_are_read(sharded):
    for rank in range(2):
        read, mapped = (shardstate.load(sharded, rank=rank, map=flag) for flag in (False, True))
        assert list(read) == list(mapped)
        for name, array in read.items():
            assert (array.dtype, array.shape) == (mapped[name].dtype, mapped[name].shape)
            assert array.tobytes() == mapped[name].tobytes()


def test_writing_never_reaches_the_file(sharded):
    before = contents(sharded)
    for array in shardstate.load(sharded, rank=0, map=True).values():
        array[...] = 1
    for tensor in shardstate_torch.load(sharded, rank=0, map=True).values():
        tensor.fill_(1)
        assert torch.all(tensor == 1)
    assert contents(sharded) == before


def test_tensors_outlive_the_call_and_the_file(sharded):
    expected = {n: a.tobytes() for n, a in shardstate.load(sharded, rank=1).items()}
    tensors = shardstate_torch.load(sharded, rank=1, map=True)
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    gc.collect()
    assert expected == {
        n: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()
    }


def test_torch_tensors_equal_the_arrays(sharded):
    arrays = shardstate.load(sharded, rank=0)
    for name, tensor in shardstate_torch.load(sharded, rank=0, verify=True).items():
        assert tuple(tensor.shape) == arrays[name].shape
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert raw.tobytes() == arrays[name].tobytes()


def test_vllms_own_files_can_be_mapped(tmp_path):
    write_vllm_set(tmp_path / "set", tp=2)
    read, mapped = (shardstate.load(tmp_path / "set", rank=1, map=flag) for flag in (False, True))
    assert {n: a.tobytes() for n, a in read.items()} == {n: a.tobytes() for n, a in mapped.items()}


def test_what_cannot_be_mapped_is_refused(sharded, tmp_path):
    with pytest.raises(UsageError, match="map takes the files of a set as they are"):
        shardstate.load(tmp_path / "source", rank=0, tp=2, map=True)
    with pytest.raises(UsageError, match="leave verify out"):
        shardstate.load(sharded, rank=0, map=True, verify=True)


def test_aliases_share_one_array(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    shardstate_torch.save_model({"b": weight, "a": weight, "c": weight[1:]}, tmp_path / "set")
    for flag in (False, True):
        arrays = shardstate.load(tmp_path / "set", rank=0, map=flag)
        assert sorted(arrays) == ["a", "b"]
        assert arrays["a"] is arrays["b"]
        assert np.array_equal(arrays["a"], weight.numpy())
        tensors = shardstate_torch.load(tmp_path / "set", rank=0, map=flag)
        assert tensors["a"] is tensors["b"]
