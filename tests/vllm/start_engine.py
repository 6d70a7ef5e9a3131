"""Start vLLM on a checkpoint and print what it generates: PATH LOAD_FORMAT TP EXTRA_CONFIG.

WORKER_CLS in the environment is the class of its workers."""

import json
import os
import sys


def main():
    path, load_format, tp, extra = sys.argv[1:]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join("01"[: int(tp)]))
    with open(os.path.join(path, "config.json")) as file:
        encoder = "Bert" in json.load(file)["architectures"][0]
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        load_format=load_format,
        model_loader_extra_config=json.loads(extra),
        tensor_parallel_size=int(tp),
        skip_tokenizer_init=not encoder,  # pooling needs one, and the encoder brings its own
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64 if encoder else 128,
        **({"runner": "pooling"} if encoder else {}),
        **({"worker_cls": os.environ["WORKER_CLS"]} if "WORKER_CLS" in os.environ else {}),
    )
    prompt = {"prompt_token_ids": [1, 5, 9, 33, 7]}
    if encoder:
        result = llm.embed(prompt)[0].outputs.embedding
    else:
        sampling = SamplingParams(max_tokens=12, temperature=0, detokenize=False)
        result = list(llm.generate(prompt, sampling)[0].outputs[0].token_ids)
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
