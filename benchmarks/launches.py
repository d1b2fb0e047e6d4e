"""What one decoder layer asks of a GPU, counted on a simulated one, and what that makes for a layer of Llama-70B.

    python -m benchmarks.launches [--pattern unstructured|2:4] [--no-error] [--activations device|host]

A layer of the proportions of Llama-70B's is pruned as a worker prunes it, at two small sizes. Operations launched,
synchronisations of the host and bytes over PCIe are counted by step, and so are the arithmetic of products and the
memory that operations read and write. Tokens of a wave grow with the hidden size, so that all of it follows a law of
the size: launches and synchronisations a + b s, arithmetic and bytes a s^2 + b s^3. The laws through the two sizes give
the layer of 8192 x 28672 with 64 waves of 4096 tokens.

Seconds are planned from the rates that were measured on an H200 (docs/benchmarks.md): a step takes what its launches
take the host and its work the device, both in turn where it synchronises, else whichever is more; and then the copies
and files that it waits for. Nothing here needs a GPU, and nothing is timed.
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from unittest import mock

import torch
from transformers import LlamaConfig

from benchmarks.layer_70b import STREAM, make_checkpoint
from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSettings, WorkerSpec
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.pattern import parse_pattern
from shardprune.storage.records import LayerRecord
from tests.support.simulated_cuda import SimulatedGpu, simulated_cuda

HIDDEN, WAVES = 8192, 64  # of the layer of Llama-70B: 262,144 tokens
SEQUENCES = 2  # of a wave
TOKENS = 0.5  # of a wave, for each hidden unit
COUNTED_WAVES = 2

# An H200, measured: seconds of the host for a launch, operations a second by precision, bytes a second.
LAUNCH_SECONDS = 17e-6
ARITHMETIC = {"bfloat16": 788e12, "float16": 788e12, "tf32": 406e12, "float32": 51e12, "float64": 34e12}
MEMORY = 4.3e12
TO_DEVICE, TO_HOST = 18e9, 1.5e9  # pageable, to the host into fresh memory
PINNED = 55e9
FILE = 1.2e9


@dataclass
class Asked:
    """What a step asked of the device and the host; `file` are bytes that it wrote before it returned, and bytes over
    PCIe are `waited` where the host waited for them."""

    launches: float = 0
    syncs: float = 0
    to_device: float = 0
    to_host: float = 0
    waited: float = 0
    file: float = 0
    arithmetic: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> float:
        """Return the seconds of the step on an H200."""
        products = {precision for precision in self.arithmetic if self.arithmetic[precision] > 0}
        device = sum(
            max(
                self.arithmetic[precision] / ARITHMETIC[precision.partition(" ")[0]],
                self.traffic.get(precision, 0.0) / MEMORY,
            )
            for precision in products
        )
        device += sum(size for kind, size in self.traffic.items() if kind not in products) / MEMORY
        moved = self.to_device + self.to_host
        share = self.waited / moved if moved else 0.0
        copies = share * (self.to_device / TO_DEVICE + self.to_host / TO_HOST)
        launching = self.launches * LAUNCH_SECONDS
        return (launching + device if self.syncs else max(launching, device)) + copies + self.file / FILE


def count_layer(
    hidden: int,
    method: str = "sparsegpt",
    pattern: str = "unstructured",
    error: bool = True,
    activations: str = "device",
) -> dict[str, Asked]:
    """Prune a layer of a hidden size on a simulated GPU, in bfloat16; return what each step asked, in the steps' order.

    Steps over waves are given for one wave.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        max_position_embeddings=hidden,
        dtype="bfloat16",
    )
    zeroing = Zeroing(method, parse_pattern(pattern), 0.5, "uniform", outlier_m=5.0, spread=0.08)
    seqlen = int(TOKENS * hidden / SEQUENCES)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, config, "cpu")
        settings = WorkerSettings(folder, "cuda", "bfloat16", 1, False, activations)  # type: ignore[arg-type]
        job = PruningJob(zeroing, None, None, measure_error=error)
        spec = WorkerSpec(
            settings=settings,
            out=f"{folder}/out",
            fingerprint="launches",
            shard=0,
            replica=0,
            layers=range(1),
            job=job,
            widths=None,
            activation_bytes=0,
            finished=frozenset(),
        )
        with simulated_cuda() as gpu, closing(PruneWorker(spec)) as worker:  # its file is written until it closes
            return _steps(worker, seqlen, hidden, gpu)


def _steps(worker: PruneWorker, seqlen: int, hidden: int, gpu: SimulatedGpu) -> dict[str, Asked]:
    generator = torch.Generator().manual_seed(0)
    for wave in range(COUNTED_WAVES + 1):
        states = torch.randn(SEQUENCES, seqlen, hidden, generator=generator).to(worker.skeleton.dtype)
        worker.put(STREAM, wave, states)
    worker.load("latest")
    waves = range(1, COUNTED_WAVES + 1)
    worker.accumulate(STREAM, 0, 0, False)  # masks and rotary embeddings are made once
    found = {"accumulate": _counted(gpu, lambda: [worker.accumulate(STREAM, wave, 0, False) for wave in waves])}
    for group, names in enumerate(worker.skeleton.family.kinds[0].inputs):
        shares = dict.fromkeys(names, Share(0.5))
        label = "solve " + ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in names)
        found[label] = _counted(gpu, lambda group=group, shares=shares: worker.solve(0, group, shares))
    found["write"] = _counted(gpu, lambda: worker.write(0, LayerRecord(0)))
    found["finish"] = _counted(gpu, lambda: worker.finish(0))
    worker.propagate(STREAM, 0, 0, "latest", False)
    found["propagate"] = _counted(gpu, lambda: [worker.propagate(STREAM, wave, 0, "latest", False) for wave in waves])
    for label in OF_WAVES:
        found[label] = _scaled(found[label], 1 / COUNTED_WAVES)
    return found


OF_WAVES = ("accumulate", "propagate")


def _counted(gpu: SimulatedGpu, step: Callable[[], object]) -> Asked:
    """Carry out a step, and return what it asked."""
    here, files, sync = threading.get_ident(), [], os.fsync

    def synced(file: int) -> None:
        if threading.get_ident() == here:
            files.append(os.fstat(file).st_size)
        sync(file)

    gpu.counts.clear()
    with mock.patch("os.fsync", synced):
        step()
    total = gpu.counts.total()
    return Asked(
        launches=total.launches,
        syncs=total.syncs,
        to_device=total.to_device,
        to_host=total.to_host,
        waited=total.pageable,
        file=sum(files),
        arithmetic=dict(gpu.counts.arithmetic),
        traffic=dict(gpu.counts.traffic),
    )


def _scaled(asked: Asked, factor: float) -> Asked:
    scaled = {name: value * factor for name, value in vars(asked).items() if not isinstance(value, dict)}
    work = {
        name: {key: value * factor for key, value in getattr(asked, name).items()} for name in ("arithmetic", "traffic")
    }
    return Asked(**scaled, **work)


def law(small: float, large: float, size: int, scale: int, target: int, powers: tuple[int, int]) -> float:
    """Return the value at a size, of a law a s^p + b s^q through the values at `size` and `scale` times it."""
    p, q = powers
    a = (large - small * scale**q) / (scale**p - scale**q)
    b = small - a  # both in units of the small size
    ratio = target / size
    return max(0.0, a * ratio**p + b * ratio**q)


def at_size(small: dict[str, Asked], large: dict[str, Asked], size: int, target: int = HIDDEN) -> dict[str, Asked]:
    """Return what the steps ask at a hidden size, from those of `size` and of twice that."""
    found = {}
    for label, one in small.items():
        other = large[label]

        def of(name: str, powers: tuple[int, int], one: Asked = one, other: Asked = other) -> float:
            return law(getattr(one, name), getattr(other, name), size, 2, target, powers)

        found[label] = Asked(
            launches=of("launches", (0, 1)),
            syncs=of("syncs", (0, 1)),
            **{name: of(name, (2, 3)) for name in ("to_device", "to_host", "waited", "file")},
            **{
                name: {
                    key: law(getattr(one, name).get(key, 0), getattr(other, name).get(key, 0), size, 2, target, (2, 3))
                    for key in getattr(one, name) | getattr(other, name)
                }
                for name in ("arithmetic", "traffic")
            },
        )
    return found


def layer(steps: dict[str, Asked]) -> dict[str, Asked]:
    """Return what the steps of a whole layer ask, all its waves included."""
    return {label: _scaled(asked, WAVES) if label in OF_WAVES else asked for label, asked in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="the smaller of the two sizes, 512 or more")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--no-error", action="store_true", help="do not measure the output errors")
    parser.add_argument("--activations", default="device", choices=("device", "host"))
    args = parser.parse_args()
    settings = (args.method, args.pattern, not args.no_error, args.activations)
    small, large = (count_layer(hidden, *settings) for hidden in (args.hidden, 2 * args.hidden))
    print(f"counted at hidden {2 * args.hidden}, a wave or a step: {args.method} {args.pattern}")
    _show(large)
    planned = layer(at_size(small, large, args.hidden))
    print(f"\na layer of hidden {HIDDEN}, {WAVES} waves, planned for an H200")
    _show(planned)


def _show(steps: dict[str, Asked]) -> None:
    print("| step | launches | syncs | MB to device | MB to host | TFLOP | GB of memory | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    rows = {label: (asked, asked.seconds()) for label, asked in steps.items()}
    rows["all"] = (_sum([asked for asked, _ in rows.values()]), sum(seconds for _, seconds in rows.values()))
    for label, (asked, seconds) in rows.items():
        work = f"{sum(asked.arithmetic.values()) / 1e12:.3g} | {sum(asked.traffic.values()) / 1e9:.3g}"
        copied = f"{asked.to_device / 1e6:.4g} | {asked.to_host / 1e6:.4g}"
        print(f"| {label} | {asked.launches:,.0f} | {asked.syncs:,.0f} | {copied} | {work} | {seconds:.3f} |")


def _sum(parts: list[Asked]) -> Asked:
    sums = Asked(*(sum(getattr(part, name) for part in parts) for name in list(vars(parts[0]))[:6]))
    for name in ("arithmetic", "traffic"):
        keys = {key for part in parts for key in getattr(part, name)}
        setattr(sums, name, {key: sum(getattr(part, name).get(key, 0) for part in parts) for key in keys})
    return sums


if __name__ == "__main__":
    main()
