"""One engine in a process of its own environment, which need not have shardprune.

    python benchmarks/clients/engine.py ENGINE PLACE TOKENS NEW

reads TOKENS (JSON) and prints JSON in its last line: the logits of the last one [vocabulary] or their logarithms of
probabilities, the NEW tokens that it writes greedily, and the CPU seconds of writing them with one thread.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

VOCABULARY = 2**20  # tokens, more than any has

Tokens = list[int]
Logits = list[float]
Model = tuple[Callable[[Tokens], Logits], Callable[[Tokens, int], Tokens]]


def of_transformers(place: str) -> Model:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()

    def logits(tokens: Tokens) -> Logits:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0, -1].float().tolist()

    def write(tokens: Tokens, new: int) -> Tokens:
        with torch.inference_mode():
            found = model.generate(torch.tensor([tokens]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return found[0, len(tokens) :].tolist()

    return logits, write


def of_ctranslate2(place: str) -> Model:
    import ctranslate2
    import numpy

    model = ctranslate2.Generator(place, device="cpu", intra_threads=1, inter_threads=1)
    names = json.loads(Path(place, "vocabulary.json").read_text())

    def logits(tokens: Tokens) -> Logits:
        return numpy.array(model.forward_batch([tokens]))[0, -1].tolist()

    def write(tokens: Tokens, new: int) -> Tokens:
        start = [names[token] for token in tokens]
        (found,) = model.generate_batch(
            [start], max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return found.sequences_ids[0]

    return logits, write


def of_openvino(place: str) -> Model:
    import numpy
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(f"{place}/openvino_model.xml", "CPU", exact)
    names = {name for port in model.inputs for name in port.names}
    request = model.create_infer_request()

    def step(tokens: Tokens, seen: int) -> Logits:
        given = {
            "input_ids": numpy.array([tokens]),
            "attention_mask": numpy.ones((1, seen + len(tokens)), dtype="int64"),
            "position_ids": numpy.arange(seen, seen + len(tokens))[None],
            "beam_idx": numpy.zeros(1, dtype="int32"),
        }
        found = request.infer({name: value for name, value in given.items() if name in names})
        return found["logits"][0, -1].tolist()

    def logits(tokens: Tokens) -> Logits:
        request.reset_state()
        return step(tokens, 0)

    def write(tokens: Tokens, new: int) -> Tokens:
        written, last = [], logits(tokens)
        while True:
            written.append(last.index(max(last)))
            if len(written) == new:
                return written
            last = step(written[-1:], len(tokens) + len(written) - 1)

    return logits, write


def of_llama_cpp(place: str) -> Model:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = f"{place}/model.gguf"
    asked.n_ctx, asked.n_parallel, asked.verbosity = 1024, 1, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(asked)
    given = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def complete(tokens: Tokens, new: int, likeliest: int) -> list[dict]:
        found = server.handle_completions({"prompt": tokens, "n_predict": new, "n_probs": likeliest, **given})
        return found["choices"][0]["logprobs"]["content"]

    def logits(tokens: Tokens) -> Logits:
        (first,) = complete(tokens, 1, VOCABULARY)
        found = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
        return [found[token] for token in range(len(found))]

    def write(tokens: Tokens, new: int) -> Tokens:
        return [entry["id"] for entry in complete(tokens, new, 1)]

    return logits, write


def of_vllm(place: str) -> Model:
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.update(here)
    from vllm import LLM, SamplingParams

    model = LLM(place, dtype="float32", max_model_len=1024, max_logprobs=-1, enforce_eager=True)

    def complete(tokens: Tokens, new: int, likeliest: int | None) -> object:
        asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=likeliest, detokenize=False)
        (found,) = model.generate({"prompt_token_ids": tokens}, asked, use_tqdm=False)
        return found.outputs[0]

    def logits(tokens: Tokens) -> Logits:
        (found,) = complete(tokens, 1, -1).logprobs
        return [found[token].logprob for token in range(len(found))]

    def write(tokens: Tokens, new: int) -> Tokens:
        return list(complete(tokens, new, None).token_ids)

    return logits, write


# What reads an output as it is.
OF_CHECKPOINTS = ("transformers", "vllm")
# By that or the format of an export: the package of the engine, and the loader of a model.
ENGINES = {
    "transformers": ("transformers", of_transformers),
    "vllm": ("vllm", of_vllm),
    "torchao": ("torchao", of_transformers),
    "ctranslate2": ("ctranslate2", of_ctranslate2),
    "openvino": ("openvino", of_openvino),
    "gguf": ("xllamacpp", of_llama_cpp),
}


def main() -> None:
    engine, place, given, new = sys.argv[1:]
    package, load = ENGINES[engine]
    if importlib.util.find_spec(package) is None:
        sys.exit(f"{package} is not installed")
    tokens = json.loads(given)
    logits, write = load(place)
    found = logits(tokens)
    write(tokens, 2)  # warms up
    started = time.process_time()
    written = write(tokens, int(new))
    print(json.dumps({"logits": found, "written": written, "cpu": time.process_time() - started}))


if __name__ == "__main__":
    main()
