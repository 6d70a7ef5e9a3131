"""The recorder against the same loading code run on real tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memories import bits, noise
from reference import catalog_in_memory
from shardstate.api.planning import reads_of
from shardstate.engine import execute
from shardstate.errors import PlanError
from shardstate.plan import faults
from shardstate.storage import PlainReader
from shardstate.targets import MemoryTarget, allocate
from shardstate.torch.recorder import Recorder, RecordingError, Standin


class Files:
    """Files in memory, as the engine reads them."""

    def __init__(self, contents):
        self.contents = contents
        self.bytes_read = 0

    def reader(self, threads):
        return PlainReader(self, threads)

    def expect(self, files):
        pass

    def interrupt(self, on=True):
        pass

    def read_into(self, name, begin, views):
        for view in views:
            view[:] = self.contents[name][begin : begin + view.nbytes]
            begin += view.nbytes
            self.bytes_read += view.nbytes


class Source:
    """Stored tensors, real and as stand-ins."""

    def __init__(self, tensors):
        self.catalog, self.raw = catalog_in_memory(
            [(name, tag, shape) for name, (tag, shape) in tensors.items()]
        )
        contents = {name: bytearray(data) for name, data in self.raw.items()}
        for row, tensor in enumerate(self.catalog):
            values = noise(*tensor.shape, dtype=torch.float32, seed=row).nan_to_num(1, 2, 3)
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32}[tensor.dtype]
            made = (values.clamp(-1e9, 1e9)).to(dtype).contiguous().view(-1).view(torch.uint8)
            contents[tensor.file][tensor.begin : tensor.end] = made.numpy().tobytes()
        self.files = Files({name: bytes(data) for name, data in contents.items()})

    def read(self, plan, target):
        execute(
            reads_of([plan], threads=1),
            storage=self.files,
            target=target,
            threads=1,
            progress=None,
            fills_memory=False,
        )

    def real(self):
        found = {}
        for tensor in self.catalog:
            raw = np.frombuffer(self.files.contents[tensor.file], np.uint8)
            flat = torch.from_numpy(raw[tensor.begin : tensor.end].copy())
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32}[tensor.dtype]
            found[tensor.name] = flat.view(dtype).view(tensor.shape)
        return found


def compare(tensors, build, load):
    """Check that `load` on stand-ins, in memory and offline, does what it does on real tensors."""
    source = Source(tensors)
    expected = build()
    load(expected, source.real())
    got = build()
    recorder = Recorder(source.catalog, source.read, offline=False)
    with recorder:
        load(got, {name: recorder.offer(i) for i, name in enumerate(source.catalog.names)})
    recorder.flush()
    assert {k: bits(v) for k, v in got.items()} == {k: bits(v) for k, v in expected.items()}
    offline = Recorder(source.catalog, source.read, offline=True)
    with offline:
        made = build()
        load(made, {name: offline.offer(i) for i, name in enumerate(source.catalog.names)})
    plan = offline.plan_of(made, literal_bytes=4096)
    assert faults(plan) == []
    arrays = allocate(plan.tensors)
    source.read(
        plan, MemoryTarget([a.reshape(-1).view(np.uint8) for a in arrays.values()], digests=None)
    )
    assert {k: a.tobytes() for k, a in arrays.items()} == {
        k: bits(v)[2] for k, v in expected.items()
    }
    return recorder, plan


ONE = {"w": ("F32", (8, 6))}


@pytest.mark.parametrize(
    "move",
    [
        lambda p, w: p.copy_(w),
        lambda p, w: p.t().copy_(w.t()),
        lambda p, w: p.copy_(w.clone()),
        lambda p, w: p.copy_(w.t().contiguous().t()),
        lambda p, w: p.copy_(w.view(2, 4, 6).transpose(0, 1).reshape(8, 6)),
        lambda p, w: p.copy_(torch.cat([w[4:], w[:4]])),
        lambda p, w: p.copy_(torch.cat([w[:, 3:], torch.zeros(8, 3)], dim=1)),
        lambda p, w: p.copy_(torch.stack([w[0], w[1]]).repeat(4, 1)),
        lambda p, w: p.copy_(torch.nn.functional.pad(w[2:, 1:], (1, 0, 0, 2), value=7.0)),
        lambda p, w: p.copy_(w[3].expand(8, 6)),
        lambda p, w: (p.copy_(w), p[5:].fill_(2.5)),
        lambda p, w: (p.fill_(2.5), p[:5].copy_(w[:5])),
        lambda p, w: (p.copy_(w), p[2:4].copy_(w[6:8])),
        lambda p, w: [p[i].copy_(x) for i, x in enumerate(w.unbind(0))],
        lambda p, w: p.copy_(w.to(torch.bfloat16)),
        lambda p, w: p.copy_(w.to(torch.bfloat16).float()),
        lambda p, w: p.view(torch.uint8).copy_(w.view(torch.uint8)),
        lambda p, w: p.copy_(w.new_zeros(8, 6).index_add(0, torch.tensor([1]), w[:1])),
        lambda p, w: p.copy_(-w.exp().clamp(max=9)),
        lambda p, w: (p.copy_(w), p.copy_(p * 2)),
        lambda p, w: (p.copy_(w), p.mul_(2)),
        lambda p, w: p.copy_(w if w[0, 0].item() > 0 else w.flip(0)),
        lambda p, w: (w.zero_(), p.copy_(w)),
        lambda p, w: p.__setitem__((slice(None), slice(0, 3)), w[:, 3:]) or p[:, 3:].zero_(),
    ],
)
def test_loading_code_does_what_it_does_on_real_tensors(move):
    def build():
        return {"p": torch.zeros(8, 6)}

    def load(state, weights):
        move(state["p"], weights["w"])

    compare(ONE, build, load)


@pytest.mark.parametrize("big", [False, True])
def test_movement_without_arithmetic_reads_nothing(big):
    rows = 4096 if big else 8
    tensors = {"w": ("BF16", (rows, 6)), "v": ("F32", (rows, 6))}

    def build():
        return {"p": torch.empty(12, rows, dtype=torch.bfloat16), "one": torch.ones(())}

    def load(state, weights):
        p = state["p"]
        p[:6].copy_(weights["w"].clone().t().contiguous())
        p[6:].copy_(torch.cat([weights["v"]], dim=1).to(torch.bfloat16).t())

    recorder, plan = compare(tensors, build, load)
    assert recorder.materialised.tensors == 0
    assert plan.opaque == {}


def test_loading_code_may_run_in_inference_mode():
    """There whole operations arrive that elsewhere are taken apart before."""

    def build():
        return {"p": torch.zeros(8, 6), "q": torch.zeros(6, 8)}

    def load(state, weights):
        @torch.inference_mode()
        def merged():
            w = weights["w"]
            return torch.matmul(w.narrow(0, 0, 6).to("cpu"), w.reshape(6, 8).contiguous())

        state["p"].copy_(weights["w"])
        state["q"].copy_(merged().clamp(-9, 9))

    compare(ONE, build, load)


def test_what_was_computed_is_opaque():
    def build():
        return {"p": torch.empty(8, 6), "q": torch.empty(8, 6)}

    def load(state, weights):
        state["p"].copy_(weights["w"])
        state["q"].copy_(weights["w"].exp().clamp(max=3))

    recorder, plan = compare(ONE, build, load)
    assert recorder.materialised.tensors == 1
    assert recorder.materialised.nbytes == 8 * 6 * 4
    assert set(plan.opaque) == {plan.tensors.row["q"]}


def test_what_nothing_defines_is_an_error():
    source = Source(ONE)
    recorder = Recorder(source.catalog, source.read, offline=True)
    with recorder:
        made = torch.empty(8, 6)
        made[:7].copy_(recorder.offer(0)[:7])
    with pytest.raises(PlanError, match="p: the loading code does not write all of it"):
        recorder.plan_of({"p": made}, literal_bytes=4096)


def test_values_that_code_makes_are_limited():
    source = Source(ONE)
    recorder = Recorder(source.catalog, source.read, offline=True)
    with recorder:
        small, large = torch.arange(8), torch.arange(8192)
    assert len(recorder.plan_of({"p": small}, literal_bytes=4096).literals) == 1
    with pytest.raises(PlanError, match="p: 65536 bytes of it are set by the model's code"):
        recorder.plan_of({"p": large}, literal_bytes=4096)


def test_large_constants_take_no_memory_and_become_fills():
    source = Source(ONE)
    recorder = Recorder(source.catalog, source.read, offline=True)
    with recorder:
        made = torch.full((1 << 20, 1 << 10), 2.0)
        assert made.is_meta
        made[1:].zero_()
    plan = recorder.plan_of({"p": made}, literal_bytes=4096)
    assert faults(plan) == []
    assert sorted(fill.value for fill in plan.fills) == [bytes(4), np.float32(2).tobytes()]


def test_a_standin_has_no_address_and_views_have_no_attributes():
    source = Source(ONE)
    recorder = Recorder(source.catalog, source.read, offline=False)
    weight = recorder.offer(0)
    weight.shard_id = "q"
    assert weight.device.type == "cpu"
    assert isinstance(weight.detach(), Standin)
    assert not hasattr(weight.detach(), "shard_id")
    assert bits(torch.from_numpy(weight[2:4].numpy())) == bits(source.real()["w"][2:4])
    with pytest.raises(RecordingError, match="no address"):
        weight.data_ptr()
    with pytest.raises(IndexError):
        weight[9]
    with pytest.raises(RuntimeError):
        torch.zeros(3, 3).copy_(weight)


@settings(max_examples=60)
@given(st.data())
def test_any_views_into_any_views(data):
    """Random chains of views, on both sides, later writes over earlier ones."""
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    steps = data.draw(st.lists(st.tuples(*[st.integers(0, 5)] * 6), min_size=1, max_size=4))
    cast = data.draw(st.booleans())

    def build():
        return {"p": torch.zeros(rows, columns, dtype=torch.bfloat16 if cast else torch.float32)}

    def load(state, weights):
        for a, b, c, d, how, turn in steps:
            target = state["p"][min(a, rows - 1) :, min(b, columns - 1) :: 1 + turn % 2]
            height, width = target.shape
            piece = weights["w"].view(12, 12)[c % 4 :: 1 + how % 2, d % 4 :][:height, :width]
            if how == 5:
                target.fill_(c)
            elif tuple(piece.shape) == (height, width):
                target.copy_(piece.clone() if how == 4 else piece)

    compare({"w": ("F32", (12, 12))}, build, load)
