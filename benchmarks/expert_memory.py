"""Peak memory of a worker that removes experts, beside the plan.

    python -m benchmarks.expert_memory [--gigabytes 1] [--layers 2] [--weights streamed] [--backend local]
        [--merge] [--propagate pruned] [--router-kd 2] [--reconstruct 2]

Makes a mixture of experts whose layers have that many gigabytes of random weights in float32, removes a quarter of the
experts, and prints the peak resident memory of the worker's process, as `result.json` has it, and what `shardprune
plan` says of the same run on a CPU.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig

from benchmarks.streamed_memory import write_random
from shardprune import ExpertsRecipe, experts
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter

EXPERTS, KEPT, VOCABULARY = 32, 24, 1024
RATIO = 2  # of the hidden size and an expert's neurons


def config_of(gigabytes: float, layers: int) -> Qwen3MoeConfig:
    """Return the config of a mixture whose layers have that many gigabytes in float32."""
    hidden = 64 * max(1, round((gigabytes * 1e9 / (4 * 3 * EXPERTS / RATIO)) ** 0.5 / 64))
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        moe_intermediate_size=hidden // RATIO,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        dtype=torch.float32,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of a layer's weights")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--weights", default="streamed")
    parser.add_argument("--backend", default="local")
    parser.add_argument("--merge", action="store_true", help="merge experts instead of removing some")
    parser.add_argument("--propagate", default="dense", choices=("dense", "pruned"))
    parser.add_argument("--router-kd", type=int, default=0, help="steps of training routers, with 8 samples or more")
    parser.add_argument("--reconstruct", type=int, default=0, help="steps of training all that stays")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_random(config_of(args.gigabytes, args.layers), folder / "model", torch.float32)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (args.samples, args.seqlen))
        np.save(folder / "tokens.npy", tokens)
        shared = {
            "model": str(folder / "model"),
            "calibration": str(folder / "tokens.npy"),
            "samples": args.samples,
            "seqlen": args.seqlen,
            "weights": args.weights,
            "shards": 1,
            "replicas": 1,
            "router_kd": args.router_kd,
            "reconstruct": args.reconstruct,
        }
        foreseen = {"keep_experts": KEPT, "merge_experts": args.merge, "propagate_experts": args.propagate}
        planned = plan(PlanRecipe.checked({**shared, **foreseen, "hardware": "cpu"}))
        placed = {"out": str(folder / "out"), "backend": args.backend, "threads": args.threads, "report": False}
        asked = {"keep": KEPT, "merge": args.merge, "propagate": args.propagate}
        result = experts(ExpertsRecipe.checked({**shared, **placed, **asked}), Reporter(quiet=True))
    predicted = planned.plans[0].candidate.worst[0].device.peak
    measured = max(worker.peak_bytes for worker in result.workers)
    print(f"weights {total / 1e9:.2f} GB in {args.layers} layers of {EXPERTS} experts, {args.weights}, {args.backend}")
    print(f"a worker's peak: planned {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
