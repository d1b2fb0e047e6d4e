"""One decoder layer of Llama-70B shape on one GPU: seconds and peak memory of each step.

    python -m benchmarks.layer_70b [--samples 128 --seqlen 2048 --wave 2] [--pattern unstructured|2:4] [--repeat 3]

Random bf16 weights and activations; the layer is pruned as a worker prunes it: every wave goes through the dense layer
while the Hessians of its four inputs accumulate, the seven projections are solved, every wave goes through the pruned
layer while its file is written (`written` is the rest of that; in a run it goes on beside the next layer). With
`--warmup`, the default on a GPU, a small layer goes first, so that the CUDA context, cuBLAS handles and the lazy
loading of kernels fall into no figure. The layer is pruned `--repeat` times, and each step's least seconds are printed.
`--hidden` and `--intermediate` make it smaller, for a trial without a GPU (`--device cpu`).
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from transformers import LlamaConfig

from shardprune.model.checkpoint import SINGLE
from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.shard.memory import peak_bytes
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSettings, WorkerSpec
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.pattern import parse_pattern
from shardprune.storage.folder import Folder
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import write_tensors

STREAM = "calibration"
# The layer that goes first.
SMALL = {"hidden": 1024, "intermediate": 2048, "heads": 8, "kv_heads": 2, "samples": 4, "seqlen": 256, "wave": 2}


def llama(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        num_hidden_layers=1,
        max_position_embeddings=args.seqlen,
        dtype="bfloat16",
    )


def make_checkpoint(folder: str, config: LlamaConfig, device: str) -> None:
    """Write random weights, drawn on the device: a CPU's thread takes ten seconds for those of a layer."""
    config.save_pretrained(folder)
    torch.manual_seed(0)
    tensors = {}
    for name, shape in Skeleton(config, "cpu", torch.bfloat16).tensors().items():
        drawn = torch.randn(shape, device=device).mul_(0.02)
        tensors[name] = (torch.ones(shape) if len(shape) == 1 else drawn).bfloat16().cpu()
    write_tensors(Folder(folder, "out"), SINGLE, tensors, {})


def worker_of(folder: str, out: str, args: argparse.Namespace) -> PruneWorker:
    """Start the worker that prunes the one layer of a checkpoint."""
    cuda = args.device == "cuda"
    zeroing = Zeroing(args.method, parse_pattern(args.pattern), args.sparsity, "uniform", outlier_m=5.0, spread=0.08)
    return PruneWorker(
        WorkerSpec(
            settings=WorkerSettings(
                model=folder,
                device=args.device,
                dtype="bfloat16" if cuda else "float32",
                threads=torch.get_num_threads(),
                streamed=False,
                activations="device",
            ),
            out=out,
            fingerprint="benchmark",
            shard=0,
            replica=0,
            layers=range(1),
            job=PruningJob(zeroing, None, None, measure_error=not args.no_error),
            widths=None,
            activation_bytes=0,
            finished=frozenset(),
        )
    )


def give_waves(worker: PruneWorker, args: argparse.Namespace) -> range:
    """Give a worker random waves, and read its layer; return the waves' numbers."""
    waves = range(args.samples // args.wave)
    for wave in waves:
        hidden = torch.randn(args.wave, args.seqlen, args.hidden, device=args.device, dtype=worker.skeleton.dtype)
        worker.put(STREAM, wave, hidden)
    worker.layers.get(0, "dense")
    return waves


def prune_layer(folder: str, out: str, args: argparse.Namespace) -> dict[str, float]:
    """Prune the layer of a checkpoint once; return the seconds of each step."""
    cuda = args.device == "cuda"
    if cuda:  # what an earlier layer left is none of this one's peak
        gc.collect()
        torch.cuda.empty_cache()
    with closing(worker_of(folder, out, args)) as worker:
        waves = give_waves(worker, args)
        steps: dict[str, Callable[[], object]] = {
            "accumulate": lambda: [worker.accumulate(STREAM, wave, 0, False) for wave in waves],
            **{
                f"solve {', '.join(name.rpartition('.')[2] for name in names)}": (
                    lambda group=group, names=names: worker.solve(0, group, dict.fromkeys(names, Share(args.sparsity)))
                )
                for group, names in enumerate(worker.skeleton.family.kinds[0].inputs)
            },
            "write": lambda: worker.write(0, LayerRecord(0)),
            "propagate": lambda: (
                worker.finish(0),
                [worker.propagate(STREAM, wave, 0, "latest", False) for wave in waves],
            ),
            "written": lambda: worker.written(0),
        }
        seconds = {}
        for label, step in steps.items():
            started = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds[label] = time.perf_counter() - started
        return seconds


def peak_memory(device: str) -> str:
    """The peak of the last layer: of tensors and of what PyTorch holds for them on a GPU, of the process on a CPU."""
    if device != "cuda":
        return f"{peak_bytes(torch.device(device)) / 2**30:.1f} GiB resident"
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"{allocated / 2**30:.1f} GiB allocated, {reserved / 2**30:.1f} GiB reserved"


def measure(args: argparse.Namespace, warmup: bool) -> dict[str, float]:
    """Prune the layer `args.repeat` times, with `warmup` after a small one; the least seconds of each step."""
    small = argparse.Namespace(**{**vars(args), **SMALL})
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for turn, settings in enumerate(([small] if warmup else []) + [args] * args.repeat):
            model = f"{folder}/{'small' if settings is small else 'layer'}"
            if not Path(model).exists():
                make_checkpoint(model, llama(settings), args.device)
            seconds = prune_layer(model, f"{folder}/out{turn}", settings)
            if settings is not small:
                runs.append(seconds)
    return {label: min(run[label] for run in runs) for label in runs[0]}


def options() -> argparse.ArgumentParser:
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
    parser.add_argument("--warmup", action=argparse.BooleanOptionalAction, help="prune a small layer first (on a GPU)")
    parser.add_argument("--repeat", type=int, default=1, help="prune the layer so many times")
    return parser


def main() -> None:
    args = options().parse_args()
    warmup = args.device == "cuda" if args.warmup is None else args.warmup
    least = measure(args, warmup)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"hidden {args.hidden}, intermediate {args.intermediate}, {args.samples} x {args.seqlen} tokens, {name}")
    print(f"{args.method} {args.pattern}, least of {args.repeat}{', after a small layer' if warmup else ''}")
    for label, value in least.items():
        print(f"{label:32s} {value:8.3f} s")
    print(f"{'all':32s} {sum(least.values()):8.3f} s, peak memory {peak_memory(args.device)}")


if __name__ == "__main__":
    main()
