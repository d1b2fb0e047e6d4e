"""The part of a worker that makes layers narrower: it removes key/value groups and neurons.

The driver has the inputs of a layer accumulated and merged, lets one replica `narrow` the layer, and the others
`install_narrowed` its `choice`. The layer as it was stays until the narrowed one takes its place.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import Heads, Widths, heads_of, reshaped
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.verbs import verb
from shardprune.shard.width_pruning import Choice, Narrowing, WidthStatistics, width_statistics
from shardprune.solvers.scoring import Scoring
from shardprune.storage.records import KeptStructures


class NarrowedLayers:
    """Narrowed layers of a worker that have not yet taken the place of those that they come from.

    Args:
        worker: has the layers, and the sums over their inputs.
        scoring: how structures are chosen; None where none are removed.
    """

    def __init__(self, worker: ForwardWorker, scoring: Scoring | None, measure_error: bool) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton, self._checkpoint = worker, worker.skeleton, worker.checkpoint
        self._scoring, self._measure_error = scoring, measure_error
        self._layers: dict[int, nn.Module] = {}
        self._choices: dict[int, Choice] = {}
        self._blanks: tuple[Widths, Skeleton] | None = None  # of the widths in work

    # -- verbs ------------------------------------------------------------------------------------------------

    @verb("solve", layer="index")
    def narrow(self, index: int, widths: Widths) -> KeptStructures:
        """Make a layer narrower by the sums over its inputs, which are given back; return what stays."""
        narrowing = self._narrowing(index, widths)
        statistics = self._worker.sums.pop(index)
        choice, kept = narrowing.choose({name: _of_widths(sums) for name, sums in statistics.items()})
        self._choices[index] = choice
        self._cut(narrowing, index, choice)
        return kept

    @verb("exchange", layer="index")
    def choice(self, index: int) -> Choice:
        """Hand out what was chosen of a layer, for the other replicas."""
        return self._choices[index].cpu()

    @verb("solve", layer="index")
    def install_narrowed(self, index: int, widths: Widths, choice: Choice) -> None:
        """Make a layer narrower as another replica has chosen."""
        self._cut(self._narrowing(index, widths), index, choice)

    # -- for the worker ---------------------------------------------------------------------------------------

    def empty_sums(self, index: int) -> dict[str, WidthStatistics]:
        """Return the empty sums over a layer's inputs that `narrow` needs."""
        assert self._scoring is not None
        layer = self._worker.layers.get(index, "dense")
        return width_statistics(
            layer, self._skeleton.family.kinds[index], self._heads, self._scoring, self._measure_error
        )

    def get(self, index: int) -> nn.Module | None:
        """Return a narrowed layer, if there is one."""
        return self._layers.get(index)

    def give_up(self) -> dict[int, nn.Module]:
        """Forget all narrowed layers, and return them by their index."""
        layers, self._layers, self._choices = self._layers, {}, {}
        return layers

    def build(self, index: int, widths: Widths, parameters: dict[str, Tensor]) -> nn.Module:
        """Build a layer of other widths from its parameters, in memory of its own."""
        prefix = f"{self._skeleton.family.layers}.{index}."
        if self._blanks is None or self._blanks[0] != widths:
            self._blanks = widths, skeleton_of_widths(self._skeleton, widths)
        tensors = ((prefix + name, parameter.clone()) for name, parameter in parameters.items())
        return self._blanks[1].build_layer(index, tensors)

    # -- inside -----------------------------------------------------------------------------------------------

    @property
    def _heads(self) -> Heads:
        return heads_of(self._skeleton.config)

    def _narrowing(self, index: int, widths: Widths) -> Narrowing:
        assert self._scoring is not None
        kind, layer = self._skeleton.family.kinds[index], self._worker.layers.get(index, "dense")
        stored = {
            name: self._checkpoint.entries[self._skeleton.projection_tensor(index, name)].dtype
            for name in kind.structures.columns
        }
        return Narrowing(layer, kind, self._heads, widths, self._scoring, stored, f"layer {index}")

    def _cut(self, narrowing: Narrowing, index: int, choice: Choice) -> None:
        parameters = {**dict(narrowing.layer.named_parameters()), **narrowing.cut(choice)}
        self._layers[index] = self.build(index, narrowing.widths, parameters)


def skeleton_of_widths(skeleton: Skeleton, widths: Widths, ignore: Sequence[str] = ()) -> Skeleton:
    """Return a skeleton of the same model with other widths.

    Args:
        ignore: globs over the names of projections that are left alone in it.
    """
    return Skeleton(reshaped(skeleton.config, widths), skeleton.device, skeleton.dtype, ignore)


def _of_widths(statistic: object) -> WidthStatistics:
    assert isinstance(statistic, WidthStatistics)
    return statistic
