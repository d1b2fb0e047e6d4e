"""The worker whose layers are changed for the better: weights that stay are trained, steps are judged by held-out
windows, and what one replica has solved or trained goes to the others. No Ray here."""

from collections.abc import Sequence

from torch import Tensor

from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.held_out import HeldOut
from shardprune.shard.reconstruction import Reconstruction
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.streams import to_host
from shardprune.shard.verbs import of_part, verb


class ImprovingWorker(ForwardWorker):
    """One replica of one shard; what it does first to a layer is up to the class."""

    spec: WorkerSpec

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.held_out = HeldOut(self)
        self.reconstruction = Reconstruction(self)

    aim = of_part("held_out", HeldOut.aim)
    miss = of_part("held_out", HeldOut.miss)
    remember = of_part("held_out", HeldOut.remember)
    put_back = of_part("held_out", HeldOut.put_back)
    lend = of_part("reconstruction", Reconstruction.lend)
    reconstruct = of_part("reconstruction", Reconstruction.reconstruct)

    # -- the result, for the other replicas ---------------------------------------------------------------------

    @verb("exchange", layer="index")
    def solved(self, index: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Hand out solved projections, for the other replicas."""
        layer = self.in_work(index)
        return {name: to_host(projection_weight(layer, name)) for name in names}

    @verb("exchange", layer="index")
    def install(self, index: int, weights: dict[str, Tensor]) -> None:
        """Put projections that another replica solved into the layer."""
        layer = self.in_work(index)
        for name, weight in weights.items():
            projection_weight(layer, name).copy_(weight)

    @verb("exchange", layer="index")
    def broadcast(self, index: int, names: tuple[str, ...], ranks: Sequence[int], source: int) -> None:
        """Put projections that the replica of rank `source` solved into the layer of those of all `ranks`, all of which
        are in this call."""
        assert self.peers is not None
        layer = self.in_work(index)
        for name in names:
            self.peers.broadcast(projection_weight(layer, name), ranks, source)
