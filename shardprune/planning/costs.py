"""Seconds and bytes of every call from driver to worker, computed from operations and bytes.

`Costs` has a method for every verb of `shardprune.shard.prune_worker`. A call's seconds exclude waiting, reading
weights, and the driver. docs/planning.md has the formulae.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from shardprune.planning.cuts import (
    activity_bytes,
    activity_seconds,
    building_seconds,
    choice_bytes,
    counting_seconds,
    narrowing_seconds,
)
from shardprune.planning.hardware import KERNEL_SECONDS, Hardware
from shardprune.planning.moments import Setup
from shardprune.planning.shapes import Input
from shardprune.planning.workload import Task
from shardprune.planning.workspaces import state_of_training
from shardprune.shard.peers import PIECE_BYTES
from shardprune.solvers.error_curves import LEVELS, ROWS
from shardprune.solvers.improving import NOTHING
from shardprune.solvers.methods import METHODS
from shardprune.solvers.training import STEP_TOKENS
from shardprune.solvers.triangles import lower_entries

KERNELS = 40  # kernel launches of a decoder layer's forward pass
EXPERT_KERNELS = 12  # of one expert, beside them
SORTED_BYTES = 60  # read and written for a weight of a group that is sorted, beside sorting
SWEEP_BYTES = METHODS["sparsegpt"].effort.touched  # read and written for a weight, beside products
KERNEL_ROWS = 2**15  # which a GPU sweeps over at the same time


@dataclass(frozen=True)
class Places:
    """The placement of workers: they fill one node after the other, shard by shard."""

    replicas: int
    per_node: int

    def rank(self, shard: int, replica: int) -> int:
        return shard * self.replicas + replica

    def node(self, shard: int, replica: int) -> int:
        return self.node_of(self.rank(shard, replica))

    def node_of(self, rank: int) -> int:
        return rank // self.per_node


@dataclass(frozen=True)
class Costs:
    """The costs of calls on one kind of hardware, at attained rates."""

    task: Task
    setup: Setup
    row: Hardware
    places: Places

    def at(self, index: int) -> "Costs":
        """Return the costs as seen at a layer."""
        task = self.task.at(index)
        return self if task is self.task else replace(self, task=task)

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

    def _leaves(self, count: float) -> float:
        """Return the seconds of bytes from the device into the object store; a process group takes them there."""
        return 0.0 if self.setup.joined else self._moved(count) + count / self.row.store

    def _arrives(self, count: float) -> float:
        """Return the seconds of bytes from the object store to the device."""
        return 0.0 if self.setup.joined else self._moved(count)

    @property
    def of_curves(self) -> "Costs":
        """The costs of the sums behind error curves, which are Gram matrices whatever the run itself takes."""
        return replace(self, task=replace(self.task, kind="gram", improving=NOTHING, scoring=None))

    @property
    def of_experts(self) -> "Costs":
        """The costs of the pass that looks at experts, all of which compute every token where they are merged."""
        return replace(self, task=replace(self.task, everywhere=True)) if self.task.merged else self

    @property
    def of_cut(self) -> "Costs":
        """The costs of a layer in work as it is in the end: with the experts or structures that it keeps."""
        left = self.task.model.left
        return replace(self, task=replace(self.task, model=left)) if left else self

    # -- waves --------------------------------------------------------------------------------------------------

    def wave_bytes(self, sequences: int) -> int:
        return self.task.kept_bytes(sequences)

    def layer(self, sequences: int) -> float:
        """Return the seconds of one wave of `sequences` through one decoder layer."""
        task, tokens = self.task, sequences * self.task.seqlen
        products = task.model.forward_operations(tokens, task.seqlen) / self._products
        temporaries = 2 * task.model.forward_bytes(sequences, task.seqlen, task.itemsize)
        shape = task.model.shape
        # Experts get few tokens each: reading their weights and launching their kernels is no small part.
        weights = self._touched(shape.expert_weights * task.itemsize)
        kernels = (KERNELS + EXPERT_KERNELS * shape.experts) * (KERNEL_SECONDS if self.row.gpu else 0.0)
        seconds = max(products, weights) + self._touched(temporaries) + kernels
        return seconds + self._everywhere(tokens) if task.everywhere and shape.experts else seconds

    def _everywhere(self, tokens: int) -> float:
        """Return the seconds of every expert's output for all tokens, and of the sums over these in float64."""
        model, itemsize = self.task.model, self.task.itemsize
        shape = model.shape
        products = 2 * tokens * shape.expert_weights / self._products
        weights = self._touched(shape.expert_weights * itemsize)
        outputs = self._touched(shape.experts * tokens * model.hidden * (4 * itemsize + 16))
        kernels = EXPERT_KERNELS * shape.experts * (KERNEL_SECONDS if self.row.gpu else 0.0)
        return max(products, weights) + outputs + kernels

    def embed(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        return self._touched(2 * count) + self._leaves(count)

    def forward(self, sequences: int, layers: Sequence[int]) -> float:
        """Return the seconds of one wave through some layers, from another worker and on its way to the next."""
        count = self.wave_bytes(sequences)
        through = sum(number * self.at(one).layer(sequences) for one, number in self.task.model.kinds(layers))
        return through + self._arrives(count) + self._leaves(count)

    def accumulate(self, sequences: int, places: Sequence[int]) -> float:
        """Return the seconds of one kept wave through a layer, with some of its inputs added to the sums."""
        inputs, extra = [self.task.model.inputs[place] for place in places], 0.0
        if self.task.all_tokens:  # which every expert multiplies with its weights, besides those that it is sent
            weights = sum(one.weights for one in inputs if one.share < 1)
            extra = 2 * sequences * self.task.seqlen * weights / self._products
            inputs = [replace(one, share=1.0) for one in inputs]
        return self._summing(sequences, inputs) + extra if self.task.kind and inputs else 0.0

    def pass_on(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a dense layer, whose output replaces it, with all inputs added to
        the sums."""
        return self.propagate(sequences) + self._sums(sequences * self.task.seqlen, self.task.model.inputs)

    def gather(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a dense layer, with its inputs added to sums for error curves."""
        return self.of_curves._summing(sequences, self.task.model.inputs) if self.task.model.inputs else 0.0

    def _sums(self, tokens: int, inputs: Sequence[Input]) -> float:
        """Return the seconds of adding tokens to the sums of some inputs."""
        seconds = 0.0
        for one in inputs:
            seconds += activity_seconds(self.task, self.row, one, tokens)
            if self.task.kind_of(one) == "gram":
                rate = self._products if self.task.itemsize == 2 else self.row.float32
                seconds += 2 * tokens * one.share * lower_entries(one.cols) / rate
            else:
                seconds += self._touched(12 * tokens * one.share * one.cols)
        return seconds

    def _summing(self, sequences: int, inputs: Sequence[Input]) -> float:
        tokens = sequences * self.task.seqlen
        sums = self._sums(tokens, inputs)
        # The pass ends at the last input: the projections that read it are not multiplied with it. It may come to no
        # end before the layer's where there are experts, some of which may get no token.
        last = inputs[-1]
        spared = 2 * tokens * last.weights / self._products if not self.task.model.shape.experts else 0.0
        return self._kept(self.wave_bytes(sequences)) + self.layer(sequences) - spared + sums

    def propagate(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a layer; the output replaces the wave."""
        return self.layer(sequences) + 2 * self._kept(self.wave_bytes(sequences))

    def aim(self, sequences: int) -> float:
        """Return the seconds of one held-out wave through the dense layer; the output replaces the wave."""
        return self.propagate(sequences) + self._touched(12 * self.wave_bytes(sequences))

    def miss(self, sequences: int) -> float:
        """Return the seconds of one held-out wave through the layer, compared with its dense output."""
        count = self.wave_bytes(sequences)
        return self.layer(sequences) + 2 * self._kept(count) + self._touched(12 * count)

    def confront(self, sequences: int, place: int, passed_on: bool) -> float:
        """Return the seconds of one wave up to an input, dense and pruned, with its sums and those of differences."""
        task, one, count = self.task, self.task.model.inputs[place], self.wave_bytes(sequences)
        tokens, before = sequences * task.seqlen, task.model.share_before(place, task.seqlen)
        passes = ((1.0 if passed_on else before) + before) * self.layer(sequences)
        operations = 2 * tokens * (lower_entries(one.cols) + one.differences)
        sums = operations / (self._products if task.itemsize == 2 else self.row.float32)
        return passes + sums + (3 if passed_on else 2) * self._kept(count)

    def gradient_bytes(self, sequences: int) -> int:
        """Return the bytes of the gradients of a wave, which are float32."""
        return self.wave_bytes(sequences) * 4 // self.task.itemsize

    def draw_labels(self, sequences: int) -> float:
        """Return the seconds to draw labels for a wave behind the last layer, and of the gradients by its output: the
        logits and their gradients are two products, beside probabilities in whole numbers of 64 bits.
        """
        task, count = self.task, self.wave_bytes(sequences)
        entries = sequences * task.seqlen * task.model.vocabulary
        products = 4 * entries * task.model.hidden / self._products
        return (
            self._arrives(count) + products + self._touched(80 * entries) + self._kept(self.gradient_bytes(sequences))
        )

    def backward(self, sequences: int, layers: Sequence[int]) -> float:
        """Return the seconds of the gradients of one wave back through some layers, each of which takes its forward
        pass again and a backward one of two."""
        count, kept = self.gradient_bytes(sequences), self._kept(self.wave_bytes(sequences))
        kinds = self.task.model.kinds(layers)
        through = sum(number * (3 * self.at(one).layer(sequences) + kept) for one, number in kinds)
        return through + self._arrives(count) + self._leaves(count)

    def differentiate(self, sequences: int) -> float:
        """Return the seconds of the kept gradients of one wave back through one layer."""
        kept = self._kept(self.wave_bytes(sequences)) + 2 * self._kept(self.gradient_bytes(sequences))
        return 3 * self.layer(sequences) + kept

    def put(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        on_host, joined = self.setup.waves_on_host, self.setup.joined
        return self._touched(2 * count) + (self._moved(count) if on_host == joined else 0.0)

    def take(self, sequences: int) -> float:
        count = self.wave_bytes(sequences)
        if self.setup.joined:
            return self._kept(count)
        return (0.0 if self.setup.waves_on_host else self._moved(count)) + count / self.row.store

    def fork(self, sequences: int) -> float:
        return self._touched(2 * self.wave_bytes(sequences))

    def losses(self, sequences: int) -> float:
        task = self.task
        tokens, vocabulary = sequences * task.seqlen, task.model.vocabulary
        products = 2 * tokens * task.model.hidden * vocabulary / self._products
        return self._arrives(self.wave_bytes(sequences)) + products + self._touched(24 * tokens * vocabulary)

    # -- layers -------------------------------------------------------------------------------------------------

    def sums_bytes(self, one: Input, differences: bool = False) -> int:
        """Return the bytes of an input's sums, or of those of differences, as replicas exchange them."""
        kind = self.task.kind_of(one)
        if kind is None:
            return 0
        if differences:
            return 4 * one.differences
        kinds = 2 if self.task.improving.measured else 1  # with those over held-out windows
        return 4 * kinds * (lower_entries(one.cols) if kind == "gram" else one.cols) + activity_bytes(self.task, one)

    def statistics(self, one: Input, differences: bool = False) -> float:
        """Return the seconds to send the sums of an input."""
        count = self.sums_bytes(one, differences)
        return self._moved(count) + count / self.row.store

    def merge(self, one: Input, parts: int, differences: bool = False) -> float:
        """Return the seconds to add the sums of an input over `parts` replicas."""
        count = self.sums_bytes(one, differences)
        return (parts - 1) * self._moved(count) + self._touched(3 * parts * count)

    def solve(self, one: Input) -> float:
        """Return the seconds to prune the projections that read an input, from the sums of all replicas."""
        task, row = self.task, self.row
        rows, cols = sum(one.rows.values()), one.cols
        weights = rows * cols
        norm = 2 * rows * lower_entries(cols) / row.large  # of the outputs, from the Gram matrix
        effort, sorted_by_group = task.effort, task.grouped and not (task.effort.sweeps or task.effort.sorts)
        seconds = self._touched((SORTED_BYTES if sorted_by_group else effort.touched) * weights)
        if effort.sweeps:
            seconds += self.row.factor(cols) + self._sweep(rows, cols)
        elif effort.sorts or sorted_by_group:
            seconds += weights / row.sorted
        seconds *= effort.passes
        # An ADMM iteration or a step of conjugate gradients: its product, and five weights read or written.
        seconds += effort.factors * self.row.factor(cols) + effort.products * (2 * weights * cols / row.large)
        seconds += self._touched(20 * effort.products * weights)
        known = 1 if effort.sweeps else 2  # products that the outputs' losses take: a sweep knows them
        return seconds + (known * norm + self._touched(40 * weights) if task.errors else 0.0)

    def _sweep(self, rows: float, cols: int) -> float:
        """Return the seconds of SparseGPT's sweep: the columns' own steps, the choice of zeros where they may stand
        anywhere, and the updates of all columns behind a block, products of 128 whose target is read and written."""
        row, weights = self.row, rows * cols
        steps = cols * row.step * max(1.0, rows / KERNEL_ROWS)
        updates = weights * cols / row.large, self._touched(weights * cols / 32)
        if not row.gpu:
            return steps + max(updates)
        return steps + sum(updates) + (0.0 if self.task.grouped else weights / row.sorted)

    def measure_curves(self, one: Input) -> float:
        """Return the seconds to measure the error curves of the projections that read an input: one factor, and at each
        level a sweep over some of the rows and what their outputs lose."""
        row, rows, cols = self.row, sum(one.rows.values()) / ROWS, one.cols
        weights = rows * cols
        sweep = self._sweep(rows, cols) + self._touched(SWEEP_BYTES * weights)
        return self.row.factor(cols) + LEVELS * (sweep + 2 * rows * lower_entries(cols) / row.large)

    def correct(self, one: Input) -> float:
        """Return the seconds to prune the projections that read an input towards the dense stream: the factor is known,
        and two products with it, for other than output projections one more with the weights."""
        products = (2 if one.output else 4) * one.weights * one.cols / self.row.large
        again = self.solve(one) - (self.row.factor(one.cols) if self.task.effort.sweeps else 0.0)
        return products + again + self._touched(16 * one.weights)

    def train(self, steps: int, inputs: Sequence[Input]) -> float:
        """Return the seconds to train what reads some inputs of a layer: a step is a pass forward and one backward,
        which takes two, and touches float32 weights, moments and gradients; what is on the host between steps comes and
        goes. Behind a router come the weights of sums alone, so that its gradients take no products of the layer.
        """
        task = self.task
        size = min(task.samples - task.held_out, max(1, STEP_TOKENS // task.seqlen))
        weights = sum(one.weights for one in inputs)
        touched = self._touched((26 + 4 * task.itemsize) * weights)
        moved = 2 * state_of_training(task.itemsize) * weights if self.setup.trains_on_host else 0
        passes = 1 if all(one in task.model.shape.routers for one in inputs) else 3
        return steps * (passes * self.layer(size) + touched + self._moved(moved))

    def lent_windows(self, steps: int) -> int:
        """Return how many windows the other replicas lend the one that trains a layer by so many steps."""
        task, replicas = self.task, self.setup.layout.replicas
        seen = steps * max(1, STEP_TOKENS // task.seqlen)
        windows = task.samples - task.held_out
        return min(windows, seen) * (replicas - 1) // replicas

    def copy(self, one: Input) -> float:
        """Return the seconds to copy the projections that read an input, on the device."""
        return self._touched(2 * self.projections_bytes(one))

    def projections_bytes(self, one: Input) -> int:
        """Return the bytes of the solved projections of an input, as they are sent."""
        return sum(one.rows.values()) * one.cols * self.task.itemsize

    def solved(self, one: Input) -> float:
        count = self.projections_bytes(one)
        return self._moved(count) + count / self.row.store

    def install(self, one: Input) -> float:
        count = self.projections_bytes(one)
        return self._moved(count) + self._touched(count)

    # -- structures ---------------------------------------------------------------------------------------------

    def narrow(self) -> float:
        """Return the seconds to make the layer narrower by the sums over its inputs."""
        return narrowing_seconds(self.task, self.row)

    def choice_bytes(self) -> int:
        """Return the bytes of what was chosen of the layer, as the other replicas get it."""
        return choice_bytes(self.task)

    def choice(self) -> float:
        """Return the seconds to hand out what was chosen of the layer: through the store, with a process group, too."""
        return self._moved(self.choice_bytes()) + self.choice_bytes() / self.row.store

    def install_narrowed(self) -> float:
        """Return the seconds to make the layer narrower as another replica has chosen."""
        return self._moved(self.choice_bytes()) + building_seconds(self.task, self.row)

    def sizes(self) -> float:
        """Return the seconds to count the zeros of the layer, before and after."""
        return counting_seconds(self.task, self.row)

    # -- process group ------------------------------------------------------------------------------------------

    def rate(self, ranks: Sequence[int]) -> float:
        """Return the bytes per second that go from rank to rank of a chain, where it is slowest."""
        nodes = {self.places.node_of(rank) for rank in ranks}
        return self.row.peer if len(nodes) == 1 else min(self.row.peer, self.row.network)

    def borders(self, ranks: Sequence[int]) -> int:
        """Return how often a chain of ranks goes from node to node."""
        nodes = [self.places.node_of(rank) for rank in ranks]
        return sum(one != other for one, other in pairwise(nodes))

    def sum_up(self, one: Input, ranks: Sequence[int], differences: bool = False) -> float:
        """Return the seconds to add up the sums of an input along a chain of ranks and on to the taker."""
        count = self.sums_bytes(one, differences)
        return self._along(count, len(ranks), ranks) + self._touched(3 * count)

    def broadcast(self, one: Input, ranks: Sequence[int]) -> float:
        """Return the seconds to send the solved projections of an input along a chain of ranks."""
        return self._along(self.projections_bytes(one), len(ranks) - 1, ranks)

    def _along(self, count: int, hops: int, ranks: Sequence[int]) -> float:
        """Return the seconds of bytes that go so many hops, piece behind piece."""
        return (count + (hops - 1) * min(count, PIECE_BYTES)) / self.rate(ranks)

    # -- the rest of a layer ------------------------------------------------------------------------------------

    def outliers(self) -> float:
        return self._touched(24 * self.task.model.projections)

    def unload(self) -> float:
        """Return the seconds to copy a layer to the host, for its file."""
        return self._moved(self.layer_bytes)

    def write(self) -> float:
        """Return the seconds to write a layer's file, which goes on beside the next layer, while the other shards of
        the node that prune at the same time write theirs.
        """
        layout = self.setup.layout
        shards = -(-self.places.per_node // layout.replicas) if len(layout.segments) > 1 else 1
        return min(shards, len(layout.shards)) * self.layer_bytes / self.row.storage

    def copy_layer(self) -> float:
        """Return the seconds to read the layer's tensors that stay where experts go, or all where they are merged,
        and to write those that stay, while all
        workers of the node do so with theirs."""
        model = self.task.model
        assert model.fewer is not None
        return self._together * (self.cut_elements + model.fewer.layer) * model.in_files / self.row.storage

    @property
    def cut_elements(self) -> int:
        """Elements of the layer's tensors from which it is built without some experts, or with averages of them."""
        model = self.task.model
        assert model.fewer is not None
        return model.layer if self.task.merged else model.fewer.layer

    def cut(self) -> float:
        """Return the seconds to build a layer without the experts that go, to be trained: all replicas read the same
        tensors, which come from storage once."""
        model = self.task.model
        seconds = self.cut_elements * model.in_files / self.row.storage
        return seconds + self._moved(self.cut_elements * self.task.itemsize)

    def tally(self, sequences: int) -> float:
        """Return the seconds of one kept wave through a dense layer whose experts are looked at."""
        return self.of_experts.layer(sequences) + self._kept(self.wave_bytes(sequences))

    def ratios(self) -> float:
        """Return the seconds to read the weights of the layer's experts for their own sake, while all workers of the
        node do so with theirs."""
        return self._together * self.task.model.shape.expert_weights * self.task.model.in_files / self.row.storage

    @property
    def _together(self) -> int:
        """Workers of a node that read and write at the same time: one where layer follows layer."""
        return 1 if self.task.in_turn else min(self.places.per_node, self.setup.layout.workers)

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def layer_bytes(self) -> int:
        """Bytes of a stored layer."""
        return self.task.model.layer * self.task.stored

    @property
    def crowd(self) -> int:
        """The number of reads of a node from storage that go on at the same time: of all its workers, or only of one
        shard's replicas when streamed shards are pruned in turn. Replicas read the same layer, which comes from files
        once (the rest from the page cache), and from object storage to each.
        """
        # Resident layers are read at the start, but where experts go, as the first wave comes to them.
        at_once = not self.setup.streamed and not self.task.model.fewer
        together = at_once or len(self.setup.layout.segments) > 1
        layout = self.setup.layout
        replicas = min(self.places.per_node, layout.replicas)
        shards = min(-(-self.places.per_node // replicas), len(layout.shards)) if together else 1
        readers = min(self.places.per_node, layout.workers if together else layout.replicas)
        return readers if "://" in self.task.model.name else shards

    def read(self, elements: int) -> float:
        """Return the seconds to read tensors of `elements` elements while others of the node read theirs."""
        stored = elements * self.task.model.in_files * self.crowd
        return stored / self.row.storage + self._moved(elements * self.task.itemsize)
