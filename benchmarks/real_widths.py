"""One decoder layer at a large model's width, pruned through the command: its worker's peak memory beside the plan.

    python -m benchmarks.real_widths llama-70b [--method sparsegpt|wanda] [--limit 10]
    python -m benchmarks.real_widths qwen3-235b [--method sparsegpt|wanda] [--experts 48] [--limit 10]

Random weights and few tokens: a layer's memory does not depend on how many there are. The checkpoint stores bfloat16,
the computation is in float32 on the CPU, in one process, so that its peak is the run's. Where the plan needs more than
`--limit` GiB, nothing runs. `--scale 8` divides the widths, for a trial.

Seconds are the process's CPU time by step, beside a floor: the operations of the step's matrix products, at the rate of
one large product in the same process.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from benchmarks.streamed_memory import write_random
from shardprune import Recipe, prune
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter
from shardprune.shard import forward_worker
from shardprune.shard.ledger import Kind, Ledger

VOCABULARY = 1024
GIB = 2**30
LARGE = 4096  # rows of the product that gives the rate


class Products(TorchDispatchMode):
    """Counts the operations of matrix products: a multiplication and an addition for each term."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            first, second = (args if name.endswith("mm") and len(args) == 2 else args[1:3])[:2]
            self.operations += 2 * first.numel() * second.shape[-1]
        return func(*args, **(kwargs or {}))


class CpuLedger(Ledger):
    """A worker's ledger that also has the CPU seconds and the operations of its verbs, `spent`."""

    spent: ClassVar[dict[str, list[float]]] = defaultdict(lambda: [0.0, 0.0])

    def begin(self) -> Any:
        self._products = Products()
        started = super().begin()
        self._cpu = time.process_time()
        self._products.__enter__()
        return started

    def end(self, verb: str, kind: Kind, layer: int | None, started: Any, received: int) -> None:
        self._products.__exit__(None, None, None)
        self.spent[verb][0] += time.process_time() - self._cpu
        self.spent[verb][1] += self._products.operations
        super().end(verb, kind, layer, started, received)


def rate_of_products() -> float:
    """Return the operations of a large float32 product in a CPU second, the most of three."""
    matrix = torch.randn(LARGE, LARGE)
    taken = []
    for _ in range(3):
        started = time.process_time()
        matrix @ matrix
        taken.append(time.process_time() - started)
    return 2 * LARGE**3 / min(taken)


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
        with patch.object(forward_worker, "Ledger", CpuLedger):
            result = prune(Recipe.checked({**shared, **places, **placed, "report": False}), Reporter(quiet=True))
        (worker,) = result.workers
        print(f"weights {total / GIB:.2f} GiB in bfloat16; zeros {result.sparsity.achieved:.4f}")
        print(f"measured peak {worker.peak_bytes / GIB:.2f} GiB")
    rate = rate_of_products()
    print(f"a large product: {rate / 1e9:.0f} GFLOP in a CPU second")
    print("| step | CPU s | GFLOP of products | floor s |\n|---|---|---|---|")
    for verb, (seconds, operations) in sorted(CpuLedger.spent.items(), key=lambda item: -item[1][0]):
        if seconds >= 0.05:
            print(f"| {verb} | {seconds:.1f} | {operations / 1e9:,.0f} | {operations / rate:.1f} |")


if __name__ == "__main__":
    main()
