"""One decoder layer of Llama-70B shape on one GPU: seconds and peak memory of each step.

    python -m tests.benchmarks.layer_70b [--samples 128 --seqlen 2048 --wave 2] [--pattern unstructured|2:4]

Random bf16 weights and activations; the layer is pruned as a worker prunes it: every wave goes through
the dense layer while the Hessians of its four inputs accumulate, the seven projections are solved, every
wave goes through the pruned layer. `--hidden` and `--intermediate` make it smaller, for a trial without
a GPU (`--device cpu`).
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig

from shardprune.model.checkpoint import SINGLE
from shardprune.model.skeleton import Skeleton
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSpec
from shardprune.solvers.allocation.allocation import Share
from shardprune.storage.folder import Folder
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import write_tensors

STREAM = "calibration"


def make_checkpoint(folder: str, config: LlamaConfig) -> None:
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in Skeleton(config, "cpu", torch.bfloat16).tensors().items():
        norm = len(shape) == 1
        tensors[name] = (
            torch.ones(shape).bfloat16() if norm else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        )
    write_tensors(Folder(folder, "out"), SINGLE, tensors, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=28672)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--wave", type=int, default=2)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--no-error", action="store_true", help="do not measure the output errors")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        num_hidden_layers=1,
        max_position_embeddings=args.seqlen,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, config)
        worker = PruneWorker(
            WorkerSpec(
                model=folder,
                out=f"{folder}/out",
                fingerprint="benchmark",
                shard=0,
                replica=0,
                layers=range(1),
                method=args.method,
                pattern=args.pattern,
                sparse=None,
                rebuilding=None,
                scoring=None,
                widths=None,
                measure_error=not args.no_error,
                weights="resident",
                activations="device",
                activation_bytes=0,
                device=args.device,
                dtype="bfloat16" if args.device == "cuda" else "float32",
                threads=torch.get_num_threads(),
                finished=frozenset(),
            )
        )
        waves = range(args.samples // args.wave)
        for wave in waves:
            hidden = torch.randn(args.wave, args.seqlen, args.hidden, device=args.device, dtype=worker.skeleton.dtype)
            worker.put(STREAM, wave, hidden)
        worker.layers.get(0, "dense")
        inputs = worker.skeleton.family.inputs
        steps: dict[str, Callable[[], object]] = {
            "accumulate": lambda: [worker.accumulate(STREAM, wave, 0, False) for wave in waves],
            **{
                f"solve {', '.join(name.rpartition('.')[2] for name in names)}": (
                    lambda group=group, names=names: worker.solve(0, group, dict.fromkeys(names, Share(args.sparsity)))
                )
                for group, names in enumerate(inputs)
            },
            "write": lambda: worker.write(0, LayerRecord(0)),
            "propagate": lambda: (
                worker.finish(0),
                [worker.propagate(STREAM, wave, 0, "latest", False) for wave in waves],
            ),
        }
        seconds = {}
        for label, step in steps.items():
            started = time.perf_counter()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[label] = round(time.perf_counter() - started, 3)
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        print(f"hidden {args.hidden}, intermediate {args.intermediate}, {args.samples} x {args.seqlen} tokens, {name}")
        print(f"{args.method} {args.pattern}")
        for label, value in seconds.items():
            print(f"{label:32s} {value:8.3f} s")
        print(f"{'all':32s} {sum(seconds.values()):8.3f} s, peak memory {worker.usage()['peak_bytes'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
