"""Small checkpoints and sets for tests: random but seeded, written without shardstate."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1}


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str  # safetensors tag
    shape: tuple[int, ...]
    data: bytes


def file_of(header: Mapping[str, object] | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with exactly this header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_bytes(
    tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return a sound safetensors file that holds `tensors` in their order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    return file_of(header, b"".join(tensor.data for tensor in tensors.values()))


def read_header(path: Path) -> tuple[dict[str, dict[str, object]], int]:
    """Return the entries of a safetensors file's header, and where its data begins."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), begin


def tensors_of(path: Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file."""
    header, begin = read_header(path)
    header.pop("__metadata__", None)
    data = path.read_bytes()[begin:]
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def place_of(path: Path, tensor: str) -> tuple[int, int]:
    """Return [begin, end) of a tensor's bytes, from the start of its file."""
    header, begin = read_header(path)
    first, last = header[tensor]["data_offsets"]
    return begin + first, begin + last


def rank_tensors(path: Path, rank: int) -> dict[str, Stored]:
    """Return the tensors of one rank of a set in `path`, from all its parts."""
    found: dict[str, Stored] = {}
    for file in sorted(path.glob(f"model-rank-{rank}-part-*.safetensors")):
        found |= tensors_of(file)
    return found


def random_tensor(rng: np.random.Generator, dtype: str, *shape: int) -> Stored:
    """Return random bytes; every bit pattern may occur, NaN too."""
    return Stored(dtype, shape, rng.bytes(prod(shape) * ITEMSIZE[dtype]))


def llama_tensors(
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 4,
    inner: int = 48,
    layers: int = 2,
    vocab: int = 103,
    seed: int = 0,
    dtype: str = "BF16",
) -> dict[str, Stored]:
    """Return the tensors of a llama of that size."""
    rng = np.random.default_rng(seed)
    hidden, kv = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: random_tensor(rng, dtype, *shape) for name, shape in shapes.items()}


def write_weights(path: Path, tensors: Mapping[str, Stored], *, files: int = 1) -> None:
    """Write `tensors` into one file, or into several with the index that names them."""
    if files == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names = list(tensors)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        own = names[i * len(names) // files : (i + 1) * len(names) // files]
        (path / file).write_bytes(safetensors_bytes({name: tensors[name] for name in own}))
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_llama(path: Path, *, files: int = 1, companions: bool = True, **sizes: int | str) -> Path:
    """Write a llama checkpoint into the new directory `path`; `sizes` as of `llama_tensors`."""
    path.mkdir(parents=True)
    heads = int(sizes.get("heads", 8))
    head_dim = int(sizes.get("head_dim", 4))
    config = {
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.get("kv_heads", 2),
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
    }
    (path / "config.json").write_text(json.dumps(config))
    if companions:
        (path / "tokenizer.json").write_text(f'{{"seed": {sizes.get("seed", 0)}}}')
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    write_weights(path, llama_tensors(**sizes), files=files)
    return path


def write_vllm_set(path: Path, *, tp: int, parts: int = 1) -> Path:
    """Write a set as vLLM saves it: its names, and no mark of ours."""
    path.mkdir(parents=True)
    for rank in range(tp):
        rng = np.random.default_rng(rank)
        for part in range(parts):
            tensors = {f"layer.{part}.weight": random_tensor(rng, "F32", 3, 5)}
            name = f"model-rank-{rank}-part-{part}.safetensors"
            (path / name).write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    return path


def tree(path: Path) -> dict[str, bytes | str]:
    """Return everything below `path`: content of files, goals of links; folders end with "/"."""
    found: dict[str, bytes | str] = {}
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            item = Path(folder, name)
            key = str(item.relative_to(path))
            if item.is_symlink():
                found[key] = str(item.readlink())
            elif item.is_dir():
                found[key + "/"] = ""
            else:
                found[key] = item.read_bytes()
    return found


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def identities(path: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of files, which tell whether they were written again."""
    return {n: ((s := (path / n).stat()).st_ino, s.st_mtime_ns) for n in names}
