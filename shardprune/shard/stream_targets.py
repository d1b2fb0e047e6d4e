"""The part of a worker that corrects projections towards the dense residual stream before their zeros are chosen.

Beside the waves of the model that is being pruned it keeps those of the dense one. For each input of a layer, in the
order of the forward pass, the driver has it `confront` every wave, which sums up what the solver needs, solve the input
as it is, and `correct` it.
"""

from torch import Tensor

from shardprune.model.families import LayerKind
from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.model.skeleton import projection_weight
from shardprune.shard.dense_weights import DenseWeights
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.projections import prune_projections
from shardprune.shard.taps import Taps, tap
from shardprune.shard.verbs import verb
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import METHODS
from shardprune.solvers.statistics import InputStatistics
from shardprune.solvers.stream_targets import HALF_WAY, Differences, aimed
from shardprune.storage.records import ProjectionReport


class StreamTargets:
    """Targets in the dense stream, for the projections of the layer in work."""

    def __init__(self, worker: ForwardWorker, dense: DenseWeights, job: PruningJob) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton, self._dense, self._job = worker, worker.skeleton, dense, job

    @verb("exchange", layer="index")
    def keep_dense(self, index: int) -> None:
        """Keep the dense weights of a layer, in which nothing is zero yet."""
        self._dense.keep(index)

    @verb("statistics", layer="index")
    def confront(self, stream: str, wave: int, index: int, group: int, passed_on: bool) -> None:
        """Add one kept wave and its dense activations to the sums of input `group`, which the layer sees with the
        projections before it pruned.

        The dense activations stay as they are, or are `passed_on`: replaced by their image under the dense layer.
        """
        worker, reader = self._worker, self._reader(index, group)
        sums = worker.sums.setdefault(index, {})
        if reader not in sums:
            assert len(sums) == 0, "the input before this one is not solved"
            sums.update(self._empty_sums(index, group))
        statistics, differences = sums[reader], sums[differences_of(reader)]
        assert isinstance(statistics, InputStatistics)
        assert isinstance(differences, Differences)

        dense_hidden, hidden = (worker.activations.get(name, wave) for name in (dense_stream(stream), stream))
        dense = self._tap(index, group, dense_hidden, self._dense.of(index), passed_on)
        sparse = self._tap(index, group, hidden, {}, False)
        assert dense.inputs is not None
        assert sparse.inputs is not None
        statistics.add(sparse.inputs, len(hidden))
        differences.add(
            self._missed(index, group, dense, sparse, dense_hidden, hidden).to(sparse.inputs.dtype),
            sparse.inputs,
            len(hidden),
        )
        if dense.end is not None:
            worker.activations.replace(dense_stream(stream), wave, dense.end)

    @verb("solve", layer="index")
    def correct(self, index: int, group: int, shares: dict[str, Share]) -> list[ProjectionReport]:
        """Prune the projections that read input `group` anew, from the weights that come nearest to their targets, by
        the sums of all replicas, which are given back."""
        names, reader = self._kind(index).inputs[group], self._reader(index, group)
        layer, sums = self._worker.layers.get(index, "dense"), self._worker.sums[index]
        statistics, differences = sums.pop(reader), sums.pop(differences_of(reader))
        assert isinstance(statistics, InputStatistics)
        assert isinstance(differences, Differences)
        job = self._job
        assert isinstance(job.zeroing, Zeroing)
        dense = self._dense.of(index, names)
        weights = {name: projection_weight(layer, name) for name in names}
        of_inputs, way = reader not in self._kind(index).outputs, self._way(index, group)
        targets = {name: aimed(weight, statistics, differences, of_inputs, way) for name, weight in dense.items()}
        for name, weight in dense.items():
            weights[name].copy_(weight)
        stored = self._worker.stored_dtypes(index, names)
        return prune_projections(
            METHODS[job.zeroing.method],
            weights,
            stored,
            statistics,
            job.zeroing.pattern,
            shares,
            restore=False,
            measure_error=job.measure_error,
            layer=index,
            refitted=job.zeroing.refit,
            damping=job.zeroing.damping,
            aims=targets,
        )

    # -- inside -----------------------------------------------------------------------------------------------

    def _kind(self, index: int) -> LayerKind:
        return self._skeleton.family.kinds[index]

    def _reader(self, index: int, group: int) -> str:
        return self._kind(index).input_names[group]

    def _way(self, index: int, group: int) -> float:
        """Return the fraction of the way to its target that a projection aims at."""
        last = self._reader(index, group) in self._kind(index).outputs
        return 1.0 if last and self._skeleton.adds_outputs else HALF_WAY

    def _empty_sums(self, index: int, group: int) -> dict[str, InputStatistics | Differences]:
        reader = self._reader(index, group)
        rows, cols = self._skeleton.projection_shapes(index)[reader]
        count = rows if reader in self._kind(index).outputs else cols
        return {
            reader: InputStatistics.empty("gram", cols, self._skeleton.device),
            differences_of(reader): Differences.empty(count, cols, self._skeleton.device),
        }

    def _tap(self, index: int, group: int, hidden: Tensor, weights: dict[str, Tensor], to_the_end: bool) -> Taps:
        kind, reader = self._kind(index), self._reader(index, group)
        maps = [name for names in kind.maps for name in names]
        outputs = [name for name in kind.output_maps if maps.index(name) <= maps.index(reader)]
        layer = self._worker.layers.get(index, "dense")
        arguments = self._skeleton.layer_arguments(index, *hidden.shape[:2])
        return tap(layer, weights, hidden, arguments, reader, outputs, to_the_end)

    def _missed(
        self, index: int, group: int, dense: Taps, sparse: Taps, dense_hidden: Tensor, hidden: Tensor
    ) -> Tensor:
        """Return by how much a wave misses its target, float32: the inputs of the projections, or the stream behind an
        output projection that still has its dense weights."""
        assert dense.inputs is not None
        assert sparse.inputs is not None
        if self._reader(index, group) not in self._kind(index).outputs:
            return dense.inputs.float() - sparse.inputs.float()
        if not self._skeleton.adds_outputs:
            return dense.outputs[-1].float() - sparse.outputs[-1].float()
        missed = dense_hidden.float() - hidden.float()
        for given, present in zip(dense.outputs, sparse.outputs, strict=True):
            missed += given.float() - present.float()
        return missed


def differences_of(reader: str) -> str:
    """Return the name of the sums of differences of an input, by the first projection that reads it."""
    return f"{reader} differences"
