"""Writes the seeds of the corpus: one small sound input of each kind."""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def unsealed(path):
    content = json.loads(path.read_bytes())
    del content["digest"]
    if "set" in content and path.name.endswith("provenance.json"):
        content["set"] = "s"
    return json.dumps(content, separators=(",", ":")).encode()


def main():
    import shardstate
    from checkpoints import llama_tensors, safetensors_bytes, write_llama

    corpus = HERE / "corpus"
    with tempfile.TemporaryDirectory() as folder:
        source = write_llama(Path(folder) / "llama", layers=1, vocab=9, inner=8, files=2)
        made = Path(folder) / "set"
        shardstate.shard(source, made, tp=2, rules=TWO)
        small = {n: t for n, t in list(llama_tensors(vocab=2).items())[:3] if len(t.data) < 4000}
        blob = safetensors_bytes(small, {"format": "pt"})
        seeds = {
            "file": blob,
            "header": blob[8 : 8 + int.from_bytes(blob[:8], "little")],
            "manifest": unsealed(made / "shardstate.json"),
            "record": unsealed(made / "shardstate.rank-0.json"),
            "provenance": unsealed(made / "shardstate.rank-0.provenance.json"),
            "index": (source / "model.safetensors.index.json").read_bytes(),
            "rules": json.dumps(RULES).encode(),
            "config": (source / "config.json").read_bytes(),
            "notes": json.dumps(NOTE).encode(),
        }
    for name, data in seeds.items():
        (corpus / name).mkdir(parents=True, exist_ok=True)
        (corpus / name / "seed").write_bytes(data)


TWO = [{"match": "down_proj.weight", "split": 1}, {"match": "*", "replicate": True}]
RULES = [
    {"match": "self_attn.q_proj.weight", "split": 0, "unit": "head_dim"},
    {"match": "k_proj.weight", "kv_heads": "num_attention_heads"},
    {"match": "lm_head.weight", "vocabulary": True},
    {"match": "down_proj.weight", "split": 1},
    {"match": "*", "replicate": True},
]
NOTE = {
    "version": 1,
    "set": "s",
    "source": [["model.safetensors", 5, 1, 2]],
    "file": {
        "name": "model-rank-0-part-0.safetensors",
        "bytes": 4096,
        "header": "0" * 64,
        "digest": "0" * 64,
        "blocks": [["0" * 64], []],
    },
    "files": ["model-rank-0-part-0.safetensors"],
    "algorithm": "ed25519",
    "manifest": "0" * 64,
    "key": "0" * 64,
    "signature": "0" * 128,
}


if __name__ == "__main__":
    main()
