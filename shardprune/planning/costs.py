"""Seconds and bytes of every call from driver to worker, computed from operations and bytes.

`Costs` has a method for every verb of `shardprune.shard.prune_worker`. A call's seconds exclude waiting, reading
weights, and the driver. docs/planning.md has the formulae.
"""

from dataclasses import dataclass

from shardprune.planning.hardware import KERNEL_SECONDS, Hardware
from shardprune.planning.memory import Setup
from shardprune.planning.workload import Input, Task
from shardprune.solvers.triangles import lower_entries

KERNELS = 40  # kernel launches of a decoder layer's forward pass


@dataclass(frozen=True)
class Places:
    """The placement of workers: they fill one node after the other, shard by shard."""

    replicas: int
    per_node: int

    def node(self, shard: int, replica: int) -> int:
        return (shard * self.replicas + replica) // self.per_node


@dataclass(frozen=True)
class Costs:
    """The costs of calls on one kind of hardware, at attained rates."""

    task: Task
    setup: Setup
    row: Hardware
    places: Places

    # -- rates --------------------------------------------------------------------------------------------------

    @property
    def _products(self) -> float:
        """Operations per second of products in the dtype of the computation."""
        return self.row.products if self.task.itemsize == 2 or not self.row.gpu else self.row.float32

    def _moved(self, count: float) -> float:
        """Return the seconds to copy bytes between host and device."""
        return count / self.row.link if self.row.gpu else 0.0

    def _touched(self, count: float) -> float:
        """Return the seconds to read or write bytes of device memory."""
        return count / self.row.memory

    def _kept(self, count: float) -> float:
        """Return the seconds to fetch bytes of a kept wave, or to store them."""
        return self._moved(count) if self.setup.waves_on_host else 0.0

    # -- waves --------------------------------------------------------------------------------------------------

    def wave_bytes(self, sequences: int) -> int:
        return self.task.kept_bytes(sequences)

    def layer(self, sequences: int) -> float:
        """Return the seconds of one wave of `sequences` through one decoder layer."""
        task, tokens = self.task, sequences * self.task.seqlen
        products = task.model.forward_operations(tokens, task.seqlen) / self._products
        temporaries = 2 * task.model.forward_bytes(sequences, task.seqlen, task.itemsize)
        return products + self._touched(temporaries) + KERNELS * (KERNEL_SECONDS if self.row.gpu else 0.0)

    def embed(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        return self._touched(2 * count) + self._moved(count) + count / self.row.store

    def forward(self, sequences: int, layers: int) -> float:
        """Return the seconds of one wave through `layers` layers, from the store and back to it."""
        count = self.wave_bytes(sequences)
        return layers * self.layer(sequences) + 2 * self._moved(count) + count / self.row.store

    def accumulate(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a layer, with its inputs added to the sums."""
        if self.task.kind is None:
            return 0.0
        tokens = sequences * self.task.seqlen
        if self.task.kind == "gram":
            operations = sum(2 * tokens * one.cols**2 for one in self.task.model.inputs)
            sums = operations / (self._products if self.task.itemsize == 2 else self.row.float32)
        else:
            sums = self._touched(sum(12 * tokens * one.cols for one in self.task.model.inputs))
        return self._kept(self.wave_bytes(sequences)) + self.layer(sequences) + sums

    def propagate(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a layer; the output replaces the wave."""
        return self.layer(sequences) + 2 * self._kept(self.wave_bytes(sequences))

    def put(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        return self._touched(2 * count) + (0.0 if self.setup.waves_on_host else self._moved(count))

    def take(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        return (0.0 if self.setup.waves_on_host else self._moved(count)) + count / self.row.store

    def fork(self, sequences: int) -> float:
        return self._touched(2 * self.wave_bytes(sequences))

    def losses(self, sequences: int) -> float:
        task = self.task
        tokens, vocabulary = sequences * task.seqlen, task.model.vocabulary
        products = 2 * tokens * task.model.hidden * vocabulary / self._products
        return self._moved(self.wave_bytes(sequences)) + products + self._touched(24 * tokens * vocabulary)

    # -- layers -------------------------------------------------------------------------------------------------

    def sums_bytes(self, one: Input) -> int:
        """Return the bytes of an input's sums, as replicas exchange them."""
        if self.task.kind is None:
            return 0
        return 4 * (lower_entries(one.cols) if self.task.kind == "gram" else one.cols)

    def statistics(self, one: Input) -> float:
        """Return the seconds to send the sums of an input."""
        count = self.sums_bytes(one)
        return self._moved(count) + count / self.row.store

    def merge(self, one: Input, parts: int) -> float:
        """Return the seconds to add the sums of an input over `parts` replicas."""
        count = self.sums_bytes(one)
        return (parts - 1) * self._moved(count) + self._touched(3 * parts * count)

    def solve(self, one: Input) -> float:
        """Return the seconds to prune the projections that read an input, from the sums of all replicas."""
        task, row = self.task, self.row
        seconds = 0.0
        if task.solver == "sparsegpt":
            seconds += 4 / 3 * one.cols**3 / row.float32
        for rows in one.rows.values():
            weights = rows * one.cols
            if task.solver == "sparsegpt":
                seconds += weights * one.cols / row.float32 + one.cols * row.step
                seconds += self._touched(120 * weights)  # bytes of selection, transposes and checks
            elif task.solver == "magnitude" and not task.grouped:
                seconds += self._touched(120 * weights)
            else:
                seconds += weights / row.sorted + self._touched(60 * weights)
            if task.errors:
                seconds += 4 * weights * one.cols / row.float32 + self._touched(40 * weights)
        return seconds

    def projections_bytes(self, one: Input) -> int:
        """Return the bytes of the solved projections of an input, as they are sent."""
        return sum(one.rows.values()) * one.cols * self.task.itemsize

    def solved(self, one: Input) -> float:
        count = self.projections_bytes(one)
        return self._moved(count) + count / self.row.store

    def install(self, one: Input) -> float:
        count = self.projections_bytes(one)
        return self._moved(count) + self._touched(count)

    def outliers(self) -> float:
        return self._touched(24 * self.task.model.projections)

    def unload(self) -> float:
        """Return the seconds to copy a layer to the host, for its file."""
        return self._moved(self.layer_bytes)

    def write(self) -> float:
        """Return the seconds to write a layer's file, which goes on beside the next layer."""
        return self.layer_bytes / self.row.storage

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def layer_bytes(self) -> int:
        """Bytes of a stored layer."""
        return self.task.model.layer * self.task.stored

    @property
    def crowd(self) -> int:
        """The number of a node's workers that read weights at the same time: all of them, or only one shard's replicas
        when streamed shards are pruned in turn.
        """
        together = not self.setup.streamed or len(self.setup.layout.segments) > 1
        layout = self.setup.layout
        return min(self.places.per_node, layout.workers if together else layout.replicas)

    def read(self, elements: int) -> float:
        """Return the seconds to read tensors of `elements` elements while others of the node read theirs."""
        stored = elements * self.task.stored * self.crowd
        return stored / self.row.storage + self._moved(elements * self.task.itemsize)
