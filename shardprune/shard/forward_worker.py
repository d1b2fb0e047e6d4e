"""Forward passes of one worker: waves in, through the layers of its shard, and out; losses and observed statistics."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardprune.errors import SolverError
from shardprune.model.checkpoint import reopened
from shardprune.model.experts import DOWN
from shardprune.model.families import LayerKind
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.shard.all_tokens import AllTokens
from shardprune.shard.clocks import clock_of
from shardprune.shard.cuda import keep_float32, set_allocator
from shardprune.shard.device_errors import device_errors
from shardprune.shard.device_room import device_room
from shardprune.shard.heap import keep_freed_blocks
from shardprune.shard.layers import Layers, LayerStore, Version
from shardprune.shard.ledger import Ledger, Span
from shardprune.shard.likelihoods import LogLikelihood, Targets, runs_of, scores_of
from shardprune.shard.memory import memory_of, peak_bytes
from shardprune.shard.peers import HeldTensor, Peers, travels
from shardprune.shard.spec import ForwardSpec
from shardprune.shard.streams import to_device, to_host
from shardprune.shard.verbs import verb
from shardprune.shard.waves import Activations
from shardprune.solvers.outliers import Outliers, outlier_ratios
from shardprune.solvers.statistics import InputStatistics, Kind, Part, Summed

LOGITS = 2**26  # at once, so that they take a quarter of a gigabyte in float32


class _AllSeen(Exception):
    """Ends a layer's forward pass of which only the inputs of projections were wanted."""


class ForwardWorker:
    """One replica of one shard: waves pass through its layers, which stay as they are."""

    def __init__(self, spec: ForwardSpec) -> None:
        settings = spec.settings
        torch.set_num_threads(settings.threads)
        if settings.device == "cuda":
            set_allocator()
            keep_float32()
        else:
            keep_freed_blocks()
        self.spec = spec
        self.peers: Peers | None = None  # where workers exchange tensors in a process group
        self.checkpoint = reopened(settings.model, spec.model)
        with device_errors(lambda: f"{spec.label}, start"):  # where CUDA starts in this process
            self.skeleton = Skeleton(self.checkpoint.config, settings.device, settings.compute_dtype, spec.ignore)
            self.skeleton.load_frame(self.checkpoint)
        self.ledger = Ledger(clock_of(self.skeleton.device))
        self.activations = Activations(self.skeleton.device, self._place())
        self.layers = self._open_layers()
        self.sums: dict[int, dict[str, Summed]] = {}  # by layer, then by the name of the statistic
        self._observed: set[int] = set()  # of these, what all windows add to, those that are held out, too
        self.all_tokens = False  # add to the sums of every expert, not those alone that are routed to it
        if self.skeleton.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _open_layers(self) -> LayerStore:
        """Return the decoder layers of the shard."""
        return Layers(self.skeleton, self.checkpoint, None, self.spec.layers, set(), stream=self.spec.settings.streamed)

    @verb("read")
    def load(self, version: Version) -> None:
        """Read all layers of the shard ahead of the first wave, so that shards read theirs at the same time."""
        for index in self.spec.layers:
            self.layers.get(index, version)

    # -- waves in and out -----------------------------------------------------------------------------------

    @travels
    @verb("forward")
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states [wave, seqlen, hidden] that enter the first layer, for tokens [wave, seqlen]."""
        self.skeleton.load_frame(self.checkpoint, embedding=True)
        return self.leaving(self.skeleton.embed(tokens))

    @verb("exchange")
    def put(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Keep a wave [wave, seqlen, hidden]."""
        self.activations.put(stream, wave, hidden)

    @travels
    @verb("exchange")
    def take(self, stream: str, wave: int) -> Tensor:
        """Give up a kept wave, for another worker."""
        return self.leaving(self.activations.take(stream, wave))

    @verb("exchange")
    def send(self, held: HeldTensor, to: int) -> None:
        """Send a tensor that is held here to the worker of another rank."""
        assert self.peers is not None
        self.peers.send(held, to)

    @verb("exchange")
    def receive(self, held: HeldTensor) -> Tensor:
        """Return a tensor that is held here or by another worker, which sends it."""
        assert self.peers is not None
        return self.peers.take(held)

    def leaving(self, hidden: Tensor) -> Tensor:
        """Return a tensor as it leaves this worker: on the device for a process group, else on the CPU."""
        return to_device(hidden, self.skeleton.device).contiguous() if self.peers else to_host(hidden)

    @verb("forward")
    def losses(self, hidden: Tensor, tokens: Tensor) -> list[float]:
        """Return the summed token loss (nats) of each sequence, from the last layer's output [wave, seqlen, hidden]."""
        self.skeleton.load_frame(self.checkpoint, head=True)
        sums = []
        for sequence, targets in zip(hidden, tokens, strict=True):
            # One sequence at a time: its logits alone can be a gigabyte.
            logits = self.skeleton.logits(sequence.unsqueeze(0).to(self.skeleton.device))[0, :-1].float()
            targets = targets[1:].to(logits.device)
            sums.append(float(nn.functional.cross_entropy(logits, targets, reduction="sum")))
        return sums

    @verb("forward")
    def log_likelihoods(self, hidden: Tensor, targets: Sequence[Targets]) -> list[list[LogLikelihood]]:
        """Return the log-likelihoods (nats) of continuations of sequences, from the last layer's output
        [wave, seqlen, hidden] for sequences that are padded on their right.

        Args:
            targets: of each sequence.
        """
        self.skeleton.load_frame(self.checkpoint, head=True)
        found: list[list[LogLikelihood]] = []
        for part in runs_of(targets, LOGITS // self.skeleton.config.vocab_size):
            # Only what predicts a token becomes logits; position by position, because that is all the head looks at.
            predicting = [hidden[place, targets[place].predicting] for place in part]
            states = torch.cat(predicting).unsqueeze(1).to(self.skeleton.device)
            logs = self.skeleton.logits(states)[:, 0].float().log_softmax(-1)
            counts = [len(rows) for rows in predicting]
            found += [scores_of(own, targets[place]) for own, place in zip(logs.split(counts), part, strict=True)]
        return found

    # -- passing through ------------------------------------------------------------------------------------

    @travels
    @verb("forward")
    def forward(
        self, wave: int, hidden: Tensor, version: Version, record: tuple[int, ...], stop: int, observed: bool
    ) -> Tensor:
        """Run one wave [wave, seqlen, hidden] through all layers of the shard below `stop`; return its image.

        Before each layer in `record` the wave is kept in the stream that starts there. If `observed`, the inputs of the
        layers' projections add to the sums that `outliers` needs.
        """
        hidden = to_device(hidden, self.skeleton.device)
        for index in self.spec.layers:
            if index in record:
                self.activations.put(segment_stream(index), wave, hidden)
            if index < stop:
                sums = self._observing(index) if observed else None
                hidden = self._run(index, version, hidden, sums, all_tokens=self.all_tokens)
        return self.leaving(hidden)

    @verb("propagate", layer="index")
    def propagate(self, stream: str, wave: int, index: int, version: Version, observed: bool) -> None:
        """Replace one kept wave by its image under one layer; `observed` as in `forward`."""
        hidden = self.activations.get(stream, wave)
        observing = self._observing(index) if observed else None
        image = self._run(index, version, hidden, observing, all_tokens=self.all_tokens)
        self.activations.replace(stream, wave, image)

    @verb("statistics", layer="index")
    def accumulate(
        self, stream: str, wave: int, index: int, passed_on: bool, places: tuple[int, ...] | None = None
    ) -> None:
        """Add one kept wave to the sums over a dense layer's inputs, all or those at some `places`.

        The wave stays as it is, or is `passed_on`: replaced by its image under the layer.
        """
        if index not in self.sums:
            self.sums[index] = self.empty_sums(index, places)
        if passed_on:
            hidden = self.activations.get(stream, wave)
            image = self._run(index, "dense", hidden, self.sums[index], all_tokens=self.all_tokens)
            self.activations.replace(stream, wave, image)
        elif self.sums[index]:  # a method that looks at the weights alone sums up nothing
            self.add_inputs(index, self.activations.get(stream, wave), self.sums[index], self.all_tokens)

    def add_inputs(self, index: int, hidden: Tensor, sums: Mapping[str, Summed], all_tokens: bool = False) -> None:
        """Run one wave through a dense layer up to the last of the inputs that add to `sums`; those of experts are the
        inputs of the tokens that are routed to them, or of `all_tokens`."""
        with suppress(_AllSeen):
            self._run(index, "dense", hidden, sums, to_the_end=False, all_tokens=all_tokens)

    # -- sums of replicas ---------------------------------------------------------------------------------------

    @verb("exchange", layer="index")
    def hand_out(self, index: int, name: str) -> Part | None:
        """Give a statistic of a layer up to another replica; None where this run does not need it.

        Those of an input are named by the first projection that reads it, those of a block by the block.
        """
        statistic = self._give_up(index, name)
        return statistic.part() if statistic else None

    @verb("exchange", layer="index")
    def merge(self, index: int, name: str, *parts: Part | None) -> None:
        """Make a statistic of a layer the sums of all replicas.

        `parts` are the replicas' sums in their order, None in this worker's own place.
        """
        if statistic := self._known(index).get(name):
            statistic.merge(parts)

    @verb("exchange", layer="index")
    def sum_up(self, index: int, name: str, ranks: Sequence[int], taker: int) -> None:
        """Add up a statistic of a layer over the replicas of some ranks, all of which are in this call; the one of rank
        `taker` has the sums of all then, the others have given theirs up. Nothing happens where this run does not need
        the statistic.

        The result is that of `hand_out` and `merge`, to the bit.
        """
        assert self.peers is not None
        if (statistic := self._known(index).get(name)) is None:
            return
        samples = torch.tensor([statistic.samples], device=self.skeleton.device)
        for tensor in (samples, *statistic.tensors().values()):
            gathered = tensor.contiguous()  # a panel of a triangle is not
            self.peers.sum_up(gathered, ranks, taker)
            if gathered is not tensor and self.peers.rank == taker:
                tensor.copy_(gathered)
        if self.peers.rank == taker:
            statistic.samples = int(samples)
        else:
            self._give_up(index, name)

    @verb("solve", layer="index")
    def outliers(self, index: int, m: float) -> Outliers:
        """Return the outlier ratios of a dense layer whose inputs were observed, by the sums of all replicas."""
        layer, sums = self.layers.get(index, "dense"), self._known(index)
        self._forget(index)
        squares: dict[str, Tensor] = {}
        for names in self.skeleton.family.kinds[index].inputs:
            statistics = sums[names[0]]
            assert isinstance(statistics, InputStatistics)
            statistics.settle()
            squares |= dict.fromkeys(names, statistics.mean_squares)
        weights = {name: projection_weight(layer, name) for name in self.skeleton.family.kinds[index].projections}
        if not all(bool(torch.isfinite(square).all()) for square in squares.values()):
            raise SolverError(f"layer {index}: its inputs are not finite: the activations overflow")
        return outlier_ratios({name: (weights[name], squares[name]) for name in weights}, m)

    @verb("exchange")
    def fork(self, stream: str, into: str) -> None:
        """Keep a copy of all waves of a stream under another name."""
        self.activations.fork(stream, into)

    @verb("exchange")
    def discard(self, hidden: Tensor) -> None:
        """Take a wave that is no longer needed: the driver waits for it here and sends the next one."""

    @verb("exchange")
    def drop(self, stream: str) -> None:
        """Free the waves of a stream."""
        self.activations.drop(stream)

    @verb("exchange")
    def release(self) -> None:
        """Free what only a finished pass needed: the embedding, the head, streamed layers."""
        if self.spec.settings.streamed:
            self.skeleton.drop_embeddings()
            self.layers.release()

    # -- accounts --------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Return where this worker ran, its peak memory in bytes and its busy seconds; `load_seconds` are those of
        reading layers after `load`, `write_seconds` those in which it could do nothing else for a layer's file."""
        seconds = self.ledger.seconds()
        return {
            "shard": self.spec.shard,
            "replica": self.spec.replica,
            "layers": [self.spec.layers[0], self.spec.layers[-1]],
            "node": socket.gethostname(),
            "peak_bytes": peak_bytes(self.skeleton.device),
            "busy_seconds": round(sum(seconds.values()), 3),
            "load_seconds": round(max(0.0, self.layers.load_seconds - seconds.get("load", 0.0)), 3),
            "exchange": self.peers.backend if self.peers else None,
            "write_seconds": round(seconds.get("write", 0.0) + seconds.get("written", 0.0), 3),
        }

    def digests(self) -> dict[str, dict[str, str]]:
        """Return the digests of the tensors that were read from each checkpoint, by the recipe's field that names it,
        since the last call."""
        return {"model": self.checkpoint.source.hand_out()}

    def account(self) -> list[Span]:
        """Return the calls of verbs since the last account."""
        return self.ledger.hand_out()

    def close(self) -> None:
        """End what goes on beside the calls; a worker in a process of its own ends with that."""

    # -- inside -----------------------------------------------------------------------------------------------

    def _give_up(self, index: int, name: str) -> Summed | None:
        """Remove a statistic of a layer and return it, if there is one."""
        sums = self._known(index)
        statistic = sums.pop(name, None)
        if not sums:
            self._forget(index)
        return statistic

    def _forget(self, index: int) -> None:
        """Remove the sums of a layer."""
        self.sums.pop(index, None)
        self._observed.discard(index)

    def _kind(self, index: int) -> LayerKind:
        return self.skeleton.family.kinds[index]

    def _known(self, index: int) -> dict[str, Summed]:
        """Return the sums over a layer's inputs when all waves have added to them."""
        self.add_priors(index, self.spec.samples - (0 if index in self._observed else self.spec.held_out))
        return self.sums.get(index, {})

    def add_priors(self, index: int, samples: int) -> None:
        """Have what all tokens of a mixture have added become a part of its experts' sums, once.

        Args:
            samples: of all replicas.
        """
        sums = self.sums.get(index, {})
        for path in self._kind(index).mixtures:
            if (common := sums.pop(path, None)) is None or not common.samples:
                continue
            assert isinstance(common, InputStatistics)
            assert common.tokens is not None
            tokens = common.tokens // common.samples * samples
            for name, statistics in sums.items():
                if not isinstance(statistics, InputStatistics) or name.endswith(f".{DOWN}"):
                    continue
                if self._kind(index).mixture_of(name) == path:
                    statistics.add_prior(common, tokens)

    def _run(
        self,
        index: int,
        version: Version,
        hidden: Tensor,
        sums: Mapping[str, Summed] | None = None,
        to_the_end: bool = True,
        all_tokens: bool = False,
    ) -> Tensor:
        """Run one wave through one layer; the inputs of its projections add to `sums`, for experts those of the tokens
        that are routed to them, or of `all_tokens`.

        Raises:
            _AllSeen: not `to_the_end`, and every input has been added.
        """
        layer = self._layer(index, version)
        arguments = self.skeleton.layer_arguments(index, *hidden.shape[:2])
        unseen = set(sums or ())

        # An expert may see no token of a wave, and counts its sequences nevertheless.
        routed = {name for name in sums or () if self._kind(index).mixture_of(name)}
        for name, statistics in (sums or {}).items():
            statistics.samples += len(hidden) if name in routed else 0

        showing = AllTokens({path: layer.get_submodule(path) for path in self._kind(index).mixtures}, routed)

        def add(name: str, statistics: InputStatistics, inputs: tuple[Tensor, ...]) -> None:
            if name in routed and showing.under_way is not all_tokens:
                return
            statistics.add(inputs[0], 0 if name in routed else len(hidden))
            unseen.discard(name)
            if not unseen and not to_the_end:
                raise _AllSeen

        hooks = []
        for name, statistics in (sums or {}).items():
            assert isinstance(statistics, InputStatistics)
            hooks.append(
                layer.get_submodule(name).register_forward_pre_hook(
                    lambda _module, inputs, name=name, statistics=statistics: add(name, statistics, inputs)
                )
            )
        try:
            with showing.passing() if all_tokens and routed else nullcontext():
                return self.skeleton.forward_layer(layer, hidden, arguments)
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(self, index: int, version: Version) -> nn.Module:
        return self.layers.get(index, version)

    def in_work(self, index: int) -> nn.Module:
        """Return the layer that is being changed, as it is now."""
        return self.layers.get(index, "dense")

    def _observing(self, index: int) -> dict[str, Summed]:
        """The sums over a layer's inputs that `outliers` needs."""
        if index not in self.sums:
            self.sums[index] = {**self.empty_statistics(index, "squares")}
            self._observed.add(index)
        return self.sums[index]

    def empty_sums(self, index: int, places: Sequence[int] | None = None) -> dict[str, Summed]:
        """Return what `accumulate` sums up over a layer's inputs, all or those at some `places`, from nothing; workers
        that change layers have their own."""
        return {**self.empty_statistics(index, "squares", places)}

    def stored_dtypes(self, index: int, names: Sequence[str]) -> dict[str, torch.dtype]:
        """Return the dtypes in which the checkpoint stores some of a layer's projections."""
        return {name: self.checkpoint.entries[self.skeleton.projection_tensor(index, name)].dtype for name in names}

    def empty_statistics(
        self, index: int, kind: Kind, places: Sequence[int] | None = None
    ) -> dict[str, InputStatistics]:
        """Return empty statistics of each input of a layer, all or those at some `places`, by the first projection that
        reads it."""
        shapes, own, device = self.skeleton.projection_shapes(index), self._kind(index), self.skeleton.device
        found = {}
        for name in own.input_names if places is None else [own.input_names[place] for place in places]:
            path = own.mixture_of(name)
            found[name] = InputStatistics.empty(kind, shapes[name][1], device, counting=path is not None)
            # What the first parts of all experts have a part of.
            if path is not None and path not in found and not name.endswith(f".{DOWN}"):
                found[path] = InputStatistics.empty(kind, shapes[name][1], device, counting=True)
        return found

    def _place(self) -> Literal["device", "host"]:
        """Return where waves are kept: in host memory if a GPU has no room for them beside all else."""
        if self.spec.settings.activations != "auto":
            return self.spec.settings.activations
        if self.skeleton.device.type == "cpu":
            return "host"
        needed = self.spec.other_bytes + self.spec.activation_bytes
        return "device" if needed <= device_room(memory_of(self.skeleton.device)) else "host"

    def trains_on_host(self) -> bool:
        """Return whether float32 weights and moments of a training are on the host between its steps: where a GPU has
        no room for them beside all else, kept waves included if they are there."""
        if self.skeleton.device.type == "cpu":
            return False
        kept = 0 if self.activations.on_host else self.spec.activation_bytes
        return self.spec.other_bytes + kept > device_room(memory_of(self.skeleton.device))


def segment_stream(first_layer: int) -> str:
    """Return the name of the calibration waves that enter the segment starting at a layer."""
    return f"segment from layer {first_layer}"


def dense_stream(stream: str) -> str:
    """Return the name of the dense model's activations beside those of a stream, which see the pruned layers."""
    return f"{stream}, dense"
