"""Training what a path has left of a model towards the dense one, layer after layer: a layer before a gap aims at the
dense activations behind the gap."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from shardprune.cluster.group import Group
from shardprune.cluster.held_out import HeldOut
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, to_all, to_waves
from shardprune.cluster.reconstruction import STEP, train
from shardprune.report.progress import Step
from shardprune.shard.current_layers import Saved
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.mop_worker import REFERENCE, MopWorker
from shardprune.storage.records import ImprovementReport, LayerRecord

STREAM = "what is left"
HELD_OUT_PASSES = 4  # depart, aim, and a miss before and after the training


@dataclass(frozen=True)
class Training:
    """The training of the layers that are left, by so many `steps` each.

    Attributes:
        saved: the files of the trained layers, written as each is done.
        finished: the layers whose files are there.
        originals: the number of layers of the original model.
        projections: names of a layer's.
    """

    steps: int
    saved: Saved
    finished: Collection[int]
    originals: int
    projections: tuple[str, ...]

    @property
    def pending(self) -> Sequence[int]:
        """The layers up to the last one that is not finished: nothing waits for the image of a later one."""
        layers = self.saved.layers
        unfinished = [place for place, layer in enumerate(layers) if layer not in self.finished]
        return layers[: unfinished[-1] + 1] if unfinished else ()

    def span(self, layer: int) -> range:
        """Return the layers of the original model in whose place one stands: itself and those that went behind it, for
        the first one also those that went before it."""
        layers = self.saved.layers
        place = layers.index(layer)
        stop = layers[place + 1] if place + 1 < len(layers) else self.originals
        return range(layer if place else 0, stop)

    def parts(self, waves: Waves) -> int:
        """Return the number of parts that `train_layers` reports to its progress step."""
        all_waves, held_out = len(waves.all), len(waves.held_out.all)
        carried = all_waves * sum(len(self.span(layer)) for layer in self.pending)
        passed_on = all_waves * max(0, len(self.pending) - 1)
        unfinished = sum(layer not in self.finished for layer in self.pending)
        return carried + passed_on + unfinished * (HELD_OUT_PASSES * held_out + 2)  # its training and its file


def train_layers(group: Group, layout: Layout, waves: Waves, training: Training, step: Step) -> None:
    """Train and write every unfinished layer.

    The dense activations go over the original layers, which workers read one at a time; the others over those that are
    left and trained. A step is kept where held-out windows say that it helps.
    """
    last = len(layout.shards) - 1
    to_all(group, layout, last, ForwardWorker.drop, REFERENCE)  # of the search
    for shard, layers in enumerate(layout.shards):
        if done := tuple(layer for layer in layers if layer in training.finished):
            to_all(group, layout, shard, MopWorker.read_again, done, training.saved)
    if not training.pending:
        return
    enter(group, layout, waves, STREAM)
    streams = STREAM, dense_stream(STREAM)
    to_all(group, layout, 0, ForwardWorker.fork, *streams)
    at = 0
    for index in training.pending:
        while at < layout.shard_of(index):
            for stream in streams:
                hand_on(group, layout, waves, stream, at)
            at += 1
        layer = LayerInWork(group, layout, waves, STREAM, index, step)
        if index in training.finished:
            _carry(layer, training.span(index))
        else:
            saved = training.saved
            step.describe(f"layer {saved.layers.index(index) + 1}/{len(saved.layers)}")
            record = LayerRecord(saved.layers.index(index), improvements=tuple(_train(layer, training)))
            group.get(group.submit(at, 0, MopWorker.write, saved.folder, len(saved.layers), index, record))
            step.advance()
        if index != training.pending[-1]:
            layer.over_waves(ForwardWorker.propagate, "dense", False)
    for stream in streams:
        to_all(group, layout, at, ForwardWorker.drop, stream)


def _train(layer: LayerInWork, training: Training) -> Sequence[ImprovementReport]:
    """Train a layer on every replica towards what the original layers in its place do, unless it does the same; return
    what came of it."""
    layer.held_out.over_waves(MopWorker.depart)
    _carry(layer, training.span(layer.layer))
    held_out = HeldOut(layer)
    held_out.measure()
    if held_out.error == 0:  # before the first gap of a path that only takes layers
        layer.step.advance(len(layer.waves.held_out.all) + 1)
        return ()
    names = training.projections
    held_out.improve(STEP, names, partial(train, layer, names, training.steps, held_out.norm))
    layer.step.advance()
    return held_out.reports


def _carry(layer: LayerInWork, span: range) -> None:
    """Replace the dense activations of all waves by their image under layers of the original model."""
    for index in span:
        for _ in to_waves(layer.group, layer.layout, layer.waves, layer.shard, MopWorker.carry, layer.stream, index):
            layer.step.advance()
    to_all(layer.group, layer.layout, layer.shard, MopWorker.forget_original)
