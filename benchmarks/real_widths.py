"""One decoder layer at a large model's width, pruned through the command: its worker's peak memory beside the plan.

    python -m benchmarks.real_widths llama-70b [--method sparsegpt|wanda] [--limit 10]
    python -m benchmarks.real_widths qwen3-235b [--method sparsegpt|wanda] [--experts 48] [--limit 10]

Random weights and few tokens: a layer's memory does not depend on how many there are. The checkpoint stores bfloat16,
the computation is in float32 on the CPU, in one process, so that its peak is the run's. Where the plan needs more than
`--limit` GiB, nothing runs. `--scale 8` divides the widths, for a trial.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from benchmarks.streamed_memory import write_random
from shardprune import Recipe, prune
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter

VOCABULARY = 1024
GIB = 2**30


def config_of(model: str, scale: int, experts: int) -> PretrainedConfig:
    """Return the config of one decoder layer of a model, its widths divided by `scale`, with so many experts."""
    common = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "max_position_embeddings": 512, "dtype": torch.bfloat16}
    if model == "llama-70b":
        widths = {"hidden_size": 8192 // scale, "intermediate_size": 28672 // scale}
        return LlamaConfig(**common, **widths, num_attention_heads=64 // scale, num_key_value_heads=8 // scale)
    return Qwen3MoeConfig(
        **common,
        hidden_size=4096 // scale,
        moe_intermediate_size=1536 // scale,
        num_attention_heads=64 // scale,
        num_key_value_heads=4,
        head_dim=128 // scale,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("llama-70b", "qwen3-235b"))
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--experts", type=int, default=128, help="of Qwen3's layer, whose widths stay")
    parser.add_argument("--weights", default="streamed")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="divide the widths by this")
    parser.add_argument("--limit", type=float, default=10.0, help="GiB that the plan may need")
    parser.add_argument("--folder", help="where the checkpoint is made, instead of the system's folder for such")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        config = config_of(args.model, args.scale, args.experts)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
        shared = {
            "method": args.method,
            "sparsity": 0.5,
            "samples": args.samples,
            "seqlen": args.seqlen,
            "dtype": "float32",
            "weights": args.weights,
            "shards": 1,
            "replicas": 1,
        }
        planned = plan(PlanRecipe.checked({**shared, "model": str(folder / "config.json"), "hardware": "cpu"}))
        predicted = planned.plans[0].candidate.worst[0].device.peak
        print(f"{args.model}, {args.method}: the plan's peak of the worker {predicted / GIB:.2f} GiB")
        if predicted > args.limit * GIB:
            raise SystemExit(f"more than {args.limit:g} GiB: nothing is run")
        total = write_random(config, folder / "model", torch.bfloat16)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (args.samples, args.seqlen))
        np.save(folder / "tokens.npy", tokens)
        places = {name: str(folder / name) for name in ("model", "out")}
        placed = {"calibration": str(folder / "tokens.npy"), "backend": "local", "threads": args.threads}
        result = prune(Recipe.checked({**shared, **places, **placed, "report": False}), Reporter(quiet=True))
        (worker,) = result.workers
        print(f"weights {total / GIB:.2f} GiB in bfloat16; zeros {result.sparsity.achieved:.4f}")
        print(f"measured peak {worker.peak_bytes / GIB:.2f} GiB; busy seconds {worker.busy_seconds:.1f}")


if __name__ == "__main__":
    main()
