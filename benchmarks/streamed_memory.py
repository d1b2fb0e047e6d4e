"""Resident memory of a worker that streams the weights of a model larger than itself.

    python -m benchmarks.streamed_memory [--gigabytes 2] [--dtype float32] [--weights streamed] [--backend ray]

Makes a Llama of that many gigabytes of random weights, layer by layer, prunes it with SparseGPT,
and prints the peak resident memory of the worker's process, as `result.json` has it.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig

from shardprune import Recipe, prune
from shardprune.model.checkpoint import INDEX
from shardprune.model.skeleton import Skeleton
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import write_tensors

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 4096, 4096
REBUILT = {"rebuild": "barber", "rebuild_threshold": 0.1, "allocation": "owl"}


def make_model(folder: Path, gigabytes: float, dtype: torch.dtype) -> int:
    """Write a random Llama of that many gigabytes; return the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=512,
    )
    sizes = [int(np.prod(shape)) for shape in Skeleton(config, "cpu").layer_tensors(0).values()]
    layer_bytes = dtype.itemsize * sum(sizes)
    config.num_hidden_layers = int(gigabytes * 1e9 / layer_bytes) + 1
    config.dtype = dtype
    return write_random(config, folder, dtype)


def write_random(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> int:
    """Write a random model, one layer after the other; return the bytes of its weights."""
    config.save_pretrained(folder)
    skeleton = Skeleton(config, "cpu")
    frame = {name: shape for name, shape in skeleton.tensors().items() if ".layers." not in name}
    groups = [frame, *(skeleton.layer_tensors(index) for index in range(skeleton.layers))]
    target, placed, total = Folder(str(folder), "out"), {}, 0
    for number, shapes in enumerate(groups):
        tensors = {
            name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)).to(dtype)
            for name, shape in shapes.items()
        }
        write_tensors(target, f"model-{number}.safetensors", tensors, {})
        placed |= dict.fromkeys(tensors, f"model-{number}.safetensors")
        total += sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
    target.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32", help="of the stored weights; computing is in float32")
    parser.add_argument("--weights", default="streamed")
    parser.add_argument("--backend", default="ray")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--granularity", help="rebuild masks too, with pairs within this; shares by OWL")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = make_model(folder / "model", args.gigabytes, getattr(torch, args.dtype))
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (args.samples, args.seqlen))
        np.save(folder / "tokens.npy", tokens)
        result = prune(
            Recipe.checked(
                {
                    "model": str(folder / "model"),
                    "out": str(folder / "out"),
                    "method": "sparsegpt",
                    "sparsity": 0.5,
                    "calibration": str(folder / "tokens.npy"),
                    "samples": args.samples,
                    "seqlen": args.seqlen,
                    "eval": (str(folder / "tokens.npy"),),
                    "weights": args.weights,
                    "backend": args.backend,
                    "threads": args.threads,
                    **(REBUILT | {"rebuild_granularity": args.granularity} if args.granularity else {}),
                }
            )
        )
    peak = max(worker.peak_bytes for worker in result.workers)
    layers = result.workers[-1].layers[1] + 1
    print(f"weights {total / 2**30:.2f} GiB in {layers} {args.dtype} layers, {args.weights}, {args.backend}")
    print(f"peak resident memory of the worker {peak / 2**30:.2f} GiB, prune {result.seconds['prune']:.1f} s")


if __name__ == "__main__":
    main()
