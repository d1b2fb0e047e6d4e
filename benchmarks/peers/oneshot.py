"""llm-compressor's run, as a process of an environment in which it is installed: nothing of shardprune is imported.

python oneshot.py MODEL TOKENS OUT THREADS BATCH
"""

import json
import sys
import time

import numpy
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    place, file, out, threads, batch = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tokens = numpy.load(file)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    rows = {"input_ids": tokens.tolist(), "attention_mask": numpy.ones_like(tokens).tolist()}
    recipe = SparseGPTModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        batch_size=int(batch),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    layers = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if ".layers." in name}
    save_file(layers, out)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
