"""The worker that owns a shard: what the driver can ask of it, verb by verb. No Ray here.

Pruning a layer takes the verbs in this order: `accumulate` for every wave, `solve` for every input,
`write`, then `propagate` for every wave, which turns the layer's inputs into the next layer's.
"""

import functools
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardprune.checkpoint import Checkpoint
from shardprune.journal import Journal
from shardprune.shard.layers import Layers, Version
from shardprune.shard.projections import Report, prune_projection
from shardprune.shard.waves import Activations
from shardprune.skeleton import Skeleton, projection_weight
from shardprune.solvers.methods import METHODS
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics, Kind

ACTIVATIONS_SHARE = 0.4  # of a GPU's memory that kept waves may take
Sums = tuple[Tensor, int]  # of an input over some sequences, and their number


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker must know, as plain values that travel to another process.

    `activation_bytes` is what the waves that it keeps take, `finished` are the layers whose files are in
    `out` already.
    """

    model: str
    out: str
    fingerprint: str
    shard: int
    replica: int
    layers: range
    method: str
    pattern: str
    measure_error: bool
    weights: Literal["resident", "streamed"]
    activations: Literal["auto", "device", "host"]
    activation_bytes: int
    device: str
    dtype: str
    threads: int
    finished: frozenset[int]


def timed(verb: Callable) -> Callable:
    """Count a verb's time as busy, in all and under its own name."""

    @functools.wraps(verb)
    def wrapper(self: "ShardWorker", *args: Any) -> Any:
        started = time.monotonic()
        try:
            with torch.no_grad():
                return verb(self, *args)
        finally:
            self.seconds[verb.__name__] = self.seconds.get(verb.__name__, 0.0) + time.monotonic() - started

    return wrapper


class ShardWorker:
    """One replica of one shard."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.seconds: dict[str, float] = {}
        self.checkpoint = Checkpoint(spec.model)
        self.skeleton = Skeleton(self.checkpoint.config, spec.device, getattr(torch, spec.dtype))
        self.skeleton.load_frame(self.checkpoint)
        self.journal = Journal(spec.out, spec.fingerprint, self.skeleton.layers)
        self.activations = Activations(self.skeleton.device, self._place())
        self.pattern = parse_pattern(spec.pattern)
        self.layers = Layers(
            self.skeleton,
            self.checkpoint,
            self.journal,
            spec.layers,
            set(spec.finished),
            stream=spec.weights == "streamed",
        )
        self._statistics: list[InputStatistics] | None = None
        self._reports: dict[str, Report] = {}
        if self.skeleton.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    # -- waves in and out -----------------------------------------------------------------------------------

    @timed
    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states [wave, seqlen, hidden] that enter the first layer."""
        self.skeleton.load_frame(self.checkpoint, embedding=True)
        return self.skeleton.embed(tokens).cpu().contiguous()

    @timed
    def put(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Keep a wave that has arrived."""
        self.activations.put(stream, wave, hidden)

    @timed
    def take(self, stream: str, wave: int) -> Tensor:
        """Hand a kept wave on."""
        return self.activations.take(stream, wave).contiguous()

    @timed
    def losses(self, hidden: Tensor, tokens: Tensor) -> list[float]:
        """The summed token loss of each sequence, from the last layer's output [wave, seqlen, hidden]."""
        self.skeleton.load_frame(self.checkpoint, head=True)
        sums = []
        for sequence, targets in zip(hidden, tokens, strict=True):
            # One sequence at a time: its logits alone can be a gigabyte.
            logits = self.skeleton.logits(sequence.unsqueeze(0).to(self.skeleton.device))[0, :-1].float()
            targets = targets[1:].to(logits.device)
            sums.append(float(nn.functional.cross_entropy(logits, targets, reduction="sum")))
        return sums

    # -- passing through ------------------------------------------------------------------------------------

    @timed
    def forward(self, wave: int, hidden: Tensor, version: Version, record: tuple[int, ...], stop: int) -> Tensor:
        """One wave through all layers of the shard below `stop`.

        Before each layer in `record` the wave is kept in the stream that starts there.
        """
        hidden = hidden.to(self.skeleton.device)
        for index in self.spec.layers:
            if index in record:
                self.activations.put(segment_stream(index), wave, hidden)
            if index < stop:
                hidden = self._run(index, version, hidden)
        return hidden.cpu().contiguous()

    @timed
    def propagate(self, stream: str, wave: int, index: int, version: Version) -> None:
        """Replace one kept wave by its image under one layer."""
        self.activations.replace(stream, wave, self._run(index, version, self.activations.get(stream, wave)))

    @timed
    def fork(self, stream: str, into: str) -> None:
        """Keep a copy of all waves of a stream under another name."""
        self.activations.fork(stream, into)

    @timed
    def discard(self, hidden: Tensor) -> None:
        """The end of a wave that nobody needs any more."""

    @timed
    def release(self) -> None:
        """Give back what only a finished pass needed: the embedding, the head, streamed layers."""
        if self.spec.weights == "streamed":
            self.skeleton.drop_embeddings()
            self.layers.release()

    # -- pruning a layer --------------------------------------------------------------------------------------

    @timed
    def accumulate(self, stream: str, wave: int, index: int) -> None:
        """Add one kept wave to the statistics of the layer's inputs; the wave stays as it is."""
        layer = self.layers.get(index, "dense")
        statistics = self._statistics_of(index)
        kind = self._kind()
        if kind is None:
            return
        hidden = self.activations.get(stream, wave)
        hooks = [
            layer.get_submodule(names[0]).register_forward_pre_hook(
                lambda _module, inputs, target=target: target.add(inputs[0], len(hidden))
            )
            for names, target in zip(self.skeleton.family.inputs, statistics, strict=True)
        ]
        try:
            self._run(index, "dense", hidden)
        finally:
            for hook in hooks:
                hook.remove()

    @timed
    def statistics(self, index: int, group: int) -> Sums:
        """The sums of the layer's input `group` over this replica's waves, and their number of sequences."""
        statistics = self._statistics_of(index)[group]
        return statistics.sums.cpu(), statistics.samples

    @timed
    def solve(self, index: int, group: int, sparsities: dict[str, float], *parts: Sums | None) -> list[Report]:
        """Prune the projections that read input `group` and put them into the layer.

        `parts` are the replicas' statistics in their order, None in this worker's own place; sums are
        added in that order, so that the result does not depend on who solves.
        """
        layer = self.layers.get(index, "dense")
        statistics = self._statistics_of(index)[group]
        if len(parts) > 1:
            statistics = self._merged(statistics, parts)
        reports = []
        for name in self.skeleton.family.inputs[group]:
            stored = self.checkpoint.entries[self.skeleton.projection_tensor(index, name)].dtype
            weight, report = prune_projection(
                METHODS[self.spec.method],
                projection_weight(layer, name),
                stored,
                statistics if self._kind() else None,
                self.pattern,
                sparsities[name],
                label=f"layer {index} {name}",
            )
            projection_weight(layer, name).copy_(weight)
            self._reports[name] = report = {"layer": index, "name": name, **report}
            reports.append(report)
        self._statistics_of(index)[group] = InputStatistics.empty("squares", 1)  # gives the memory back
        return reports

    @timed
    def solved(self, index: int, group: int) -> dict[str, Tensor]:
        """The solved projections of an input, for the other replicas."""
        layer = self.layers.get(index, "dense")
        return {name: projection_weight(layer, name).cpu() for name in self.skeleton.family.inputs[group]}

    @timed
    def install(self, index: int, reports: list[Report], weights: dict[str, Tensor]) -> None:
        """Put projections that another replica solved into the layer."""
        layer = self.layers.get(index, "dense")
        for name, weight in weights.items():
            projection_weight(layer, name).copy_(weight)
        self._reports.update({report["name"]: report for report in reports})

    @timed
    def write(self, index: int) -> None:
        """Write the solved layer: pruned projections in their stored dtype, everything else as it was."""
        layer = self.layers.get(index, "dense")
        pruned = {self.skeleton.projection_tensor(index, name): name for name in self.skeleton.family.projections}
        entries = {name: self.checkpoint.entries[name] for name in self.skeleton.layer_tensors(index)}

        def tensor(name: str) -> Tensor:
            if name in pruned:
                return projection_weight(layer, pruned[name]).to(entries[name].dtype)
            return self.checkpoint.read(name)

        shapes = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        reports = [self._reports[name] for name in self.skeleton.family.projections]
        self.journal.write_layer(index, shapes, tensor, reports)

    @timed
    def finish(self, index: int) -> None:
        """The layer is written: from now on it is the pruned one, and its statistics are gone."""
        self.layers.mark_pruned(index)
        self._statistics = None
        self._reports = {}

    @timed
    def drop(self, stream: str) -> None:
        """Forget the waves of a stream."""
        self.activations.drop(stream)

    # -- what it cost -----------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Where this worker ran, its peak memory in bytes and its busy seconds by verb."""
        return {
            "shard": self.spec.shard,
            "replica": self.spec.replica,
            "layers": [self.spec.layers.start, self.spec.layers.stop - 1],
            "node": socket.gethostname(),
            "peak_bytes": peak_bytes(self.skeleton.device),
            "busy_seconds": round(sum(self.seconds.values()), 3),
            "load_seconds": round(self.layers.load_seconds, 3),
            "write_seconds": round(self.seconds.get("write", 0.0), 3),
        }

    # -- inside -----------------------------------------------------------------------------------------------

    def _run(self, index: int, version: Version, hidden: Tensor) -> Tensor:
        arguments = self.skeleton.layer_arguments(index, *hidden.shape[:2])
        return self.skeleton.forward_layer(self.layers.get(index, version), hidden, arguments)

    def _place(self) -> Literal["device", "host"]:
        """Where waves are kept: in host memory where they would not leave a GPU room for the work."""
        if self.spec.activations != "auto":
            return self.spec.activations
        if self.skeleton.device.type == "cpu":
            return "host"
        memory = torch.cuda.get_device_properties(self.skeleton.device).total_memory
        return "device" if self.spec.activation_bytes <= ACTIVATIONS_SHARE * memory else "host"

    def _kind(self) -> Kind | None:
        """The statistics that this run needs: the error of a projection is known from the whole Gram matrix."""
        return "gram" if self.spec.measure_error else METHODS[self.spec.method].needs

    def _statistics_of(self, index: int) -> list[InputStatistics]:
        if self._statistics is None:
            shapes = self.skeleton.projection_shapes(index)
            self._statistics = [
                InputStatistics.empty(self._kind() or "squares", shapes[names[0]][1], self.skeleton.device)
                for names in self.skeleton.family.inputs
            ]
        return self._statistics

    def _merged(self, own: InputStatistics, parts: tuple[Sums | None, ...]) -> InputStatistics:
        total = InputStatistics(own.kind, torch.zeros_like(own.sums))
        for part in parts:
            total.merge(*(part or (own.sums, own.samples)))
        return total


def segment_stream(first_layer: int) -> str:
    """The name of the calibration waves that enter the segment starting at a layer."""
    return f"segment from layer {first_layer}"


def peak_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this does not count what the process was before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
