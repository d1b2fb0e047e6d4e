"""Expected seconds of a run's phases in closed form; the simulation runs the real driver instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardprune.planning.costs import Costs
from shardprune.planning.hardware import CALL_SECONDS
from shardprune.planning.moments import Setup
from shardprune.planning.shapes import Input
from shardprune.planning.workload import Task
from shardprune.shard.waves import waves_of


@dataclass(frozen=True)
class Phases:
    """Seconds of the phases of a run, with reads of weights that do not overlap with computation.

    `structure` is a whole run before it, which removes structures.
    """

    structure: float = field(default=0.0, kw_only=True)
    load: float
    curves: float
    observe: float
    prune: float
    write: float
    evaluate: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


class Expected:
    """The phases of a setup.

    A pass of W waves of a replica through shards that take t_k each is a pipeline, sum t_k + (W - 1) max t_k, where
    shards are resident, and W sum t_k where each takes all waves before the next. A layer is pruned in

        W (accumulate + propagate) + statistics + max over replicas of its solves + solved + install + unload,

    in a process group with one chain for each input before the solves and one after them instead:

        W (accumulate + propagate) + sums + max over replicas of its solves + broadcasts + unload,

    or in the time that its file takes, where that is longer: one is written while the next layer is in work.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs, self.places = costs, costs.places
        self.task: Task = costs.task
        self.setup: Setup = costs.setup
        self.layout = costs.setup.layout

    def phases(self) -> Phases:
        task, layout = self.task, self.layout
        segments = len(layout.segments)
        before, after = task.passes
        passes = before + after
        result = Expected(self.costs.of_cut) if task.model.narrower else self
        evaluate = before * self._pass(task.windows, task.model.layers, judged=True)
        evaluate += after * result._pass(task.windows, task.model.layers, judged=True)
        if task.model.fewer:
            return self._of_removal(passes, evaluate)
        observe = 0.0
        if task.outliers or segments > 1:
            observed = task.model.layers if task.outliers else layout.segments[-1].start
            observe = self._pass(task.samples, observed)
            observe += self._longest(lambda one: one.costs.outliers()) if task.outliers else 0.0
        pruned = [range(task.model.layers)] if segments == 1 else layout.shards
        prune = max(self._over(layers, Expected._layer) for layers in pruned) + self._relays()
        # The last layer's output is not needed.
        last = self.at(task.model.layers - 1)
        prune -= last._passing_on()
        reads = self._reads(passes + bool(observe) + 2 * task.curves)
        judged = passes or task.curves
        frame = self.costs.read(task.model.embedding) + (self.costs.read(task.model.head) if judged else 0.0)
        # The last layer's file, and as much of the others' as takes longer than a layer.
        write = last.costs.of_cut.write() + max(self._over(layers[:-1], Expected._left_to_write) for layers in pruned)
        return Phases(reads + frame, self._curves() if task.curves else 0.0, observe, prune, write, evaluate)

    def _of_removal(self, passes: int, evaluate: float) -> Phases:
        """Return the phases where experts are removed: shards read as the first wave comes to them, then every worker
        copies a part of its shard's layers."""
        costs, model, replicas = self.costs, self.task.model, self.layout.replicas
        in_turn = self.task.in_turn
        mixtures = [index for index, shape in enumerate(model.shapes) if shape.experts]
        looked_at = 1 + mixtures[-1] if self.task.scores == "pass" and not self.task.behind else 0
        if self.setup.streamed:
            load = self._reads(passes - (not looked_at)) if passes or looked_at else 0.0
        else:
            read = range(model.layers if passes else looked_at)
            load = self._over(read, lambda one: costs.read(one.task.model.layer))
        load += costs.read(model.embedding) if passes or looked_at or in_turn else 0.0
        load += costs.read(model.head) if passes else 0.0
        observe = Expected(costs.of_experts)._pass(self.task.samples, looked_at) if looked_at else 0.0
        if self.task.scores == "weights":
            observe = max(
                self._over([layer for layer in mixtures[replica::replicas] if layer in shard], _ratios)
                for shard in self.layout.shards
                for replica in range(replicas)
            )
        if in_turn:
            return Phases(load, 0.0, observe, self._in_turn(model.layers if passes else looked_at), 0.0, evaluate)
        write = max(
            self._over(shard[replica::replicas], lambda one: one.costs.copy_layer())
            for shard in self.layout.shards
            for replica in range(replicas)
        )
        return Phases(load, 0.0, observe, 0.0, write, evaluate)

    def _in_turn(self, read: int) -> float:
        """Return the seconds where experts are removed layer after layer: each is looked at or aimed at, cut, trained
        where that is asked for, copied, and read again as it has become.

        Args:
            read: the first layers, which resident shards have read already.
        """
        costs, task, model, streamed = self.costs, self.task, self.task.model, self.setup.streamed
        sizes = [*self._sizes(task.samples - task.held_out), *self._sizes(task.held_out)]
        streams = 2 if task.improving else 1

        def through(one: Expected) -> float:
            """The waves behind the layer; what no training has aimed at is there twice."""
            trained = one.task.model.shape.experts or not task.improving
            return (1 if trained else 2) * sum(one.costs.propagate(size) for size in sizes)

        def layer(one: Expected) -> float:
            shape, cut = one.task.model.shape, one.task.model.fewer
            assert cut is not None
            dense = sum(one.costs.tally(size) for size in sizes) if task.behind and shape.experts else 0.0
            dense += one._training_of_cut(sizes) if task.improving and shape.experts else 0.0
            reading = costs.read(one.task.model.layer)
            if streamed:
                before = max(dense + one.costs.copy_layer(), reading if dense else 0.0)
                return before + costs.read(cut.layer) + max(through(one), reading)
            return dense + one.costs.copy_layer() + costs.read(cut.layer) + through(one)

        spared = through(self.at(model.layers - 1))  # the last layer's output is not needed
        entering = sum(costs.embed(size) + costs.put(size) for size in sizes)
        entering += costs.fork(sum(sizes)) if task.improving else 0.0
        relays = streams * (len(self.layout.shards) - 1) * self._relay(sizes)
        first = 0.0
        if not streamed:
            used = [index for index in range(read, model.layers) if model.shapes[index].experts]
            first = self._over(used, lambda one: costs.read(one.task.model.layer))
        return entering + first + self._over(range(model.layers), layer) + relays - spared

    def _training_of_cut(self, sizes: Sequence[int]) -> float:
        """Return the seconds of training a layer that has lost experts: the waves through the dense one, whose outputs
        are the aim, the layer as it is cut, the trainings, and what the held-out waves miss before and after each."""
        task, changed = self.task, Expected(self.costs.of_cut)
        missing = sum(changed.costs.miss(size) for size in self._sizes(task.held_out))
        seconds = sum(self.costs.aim(size) for size in sizes) + self.costs.cut() + missing
        trainings = (changed._train(steps, task.trained(name)) for name, steps in task.trainings.items())
        return seconds + sum(trainings) + missing * len(task.trainings)

    def _curves(self) -> float:
        """Return the seconds to measure error curves: all waves forward and their gradients back, and what the shard
        with most to do takes to gather its inputs and to measure what its projections lose.
        """
        costs, task, layout = self.costs, self.task, self.layout
        sizes = self._sizes(task.curve_windows)
        forward = self._pass(task.curve_windows, task.model.layers)
        labels = sum(costs.draw_labels(size) for size in sizes)
        if self.setup.streamed:
            forward += labels + sum(costs.take(size) for size in sizes)
            width = costs.gradient_bytes(1) / costs.wave_bytes(1)
            relays = width * (len(layout.shards) - 1) * self._relay(sizes)
            back = self._over(range(task.model.layers), Expected._back) + relays
        else:
            # The last shard, which draws the labels, may be the slowest stage of the pipeline.
            stages = [costs.forward(sizes[0], shard) for shard in layout.shards]
            slowest = max(*stages, stages[-1] + costs.draw_labels(sizes[0]))
            forward += costs.draw_labels(sizes[0]) + (len(sizes) - 1) * (slowest - max(stages))
            stages = [costs.backward(sizes[0], shard) for shard in layout.shards]
            network = CALL_SECONDS + self._network(costs.gradient_bytes(sizes[0]))
            back = sum(stages) + (len(sizes) - 1) * max(stages) + (len(stages) - 1) * network
        return forward + back + self._longest(Expected._measuring)

    def _back(self) -> float:
        """Return the seconds of gradients back through one streamed layer."""
        layer = sum(self.costs.differentiate(size) for size in self._sizes(self.task.curve_windows))
        return max(layer, self._reading())

    def _measuring(self) -> float:
        """Return the seconds to gather the inputs of a layer, to bring its sums from replica to replica, and of the one
        that measures error curves longest."""
        costs, replicas = self.costs.of_curves, self.layout.replicas
        inputs, copied = self.task.model.inputs, self.setup.copies_sums
        gathering = sum(self.costs.gather(size) for size in self._sizes(self.task.curve_windows))
        merges = [costs.merge(one, replicas) if copied else 0.0 for one in inputs]
        exchange = 0.0
        if copied and inputs:
            arriving = (replicas - self.places.per_node) * max(costs.sums_bytes(one) for one in inputs)
            exchange = sum(costs.statistics(one) for one in inputs) + self._network(max(0, arriving))
        elif replicas > 1:
            exchange = sum(costs.sum_up(one, range(replicas)) for one in inputs)
        times = [merge + costs.measure_curves(one) for merge, one in zip(merges, inputs, strict=True)]
        return max(gathering + exchange + _shared(times, replicas), self._reading())

    def at(self, index: int) -> "Expected":
        """Return the phases as seen at a layer."""
        costs = self.costs.at(index)
        return self if costs is self.costs else Expected(costs)

    def _over(self, layers: Sequence[int], seconds: Callable[["Expected"], float]) -> float:
        """Return the sum over some layers of the seconds of each."""
        return sum(number * seconds(self.at(one)) for one, number in self.task.model.kinds(layers))

    def _longest(self, seconds: Callable[["Expected"], float]) -> float:
        """Return the largest sum over the layers of a shard of the seconds of each."""
        return max(self._over(shard, seconds) for shard in self.layout.shards)

    def _left_to_write(self) -> float:
        """Return by how much the file of a layer takes longer than the next layer."""
        return max(0.0, self.costs.of_cut.write() - self._layer())

    def _passing_on(self) -> float:
        """Return the seconds of all waves through the layer as it is in the end."""
        if self.task.passes_on_dense:  # by then they have been through the dense one
            return 0.0
        return sum(self.costs.of_cut.propagate(size) for size in self._sizes(self.task.samples))

    def _sizes(self, samples: int) -> list[int]:
        """Return the wave sizes of the replica with the most sequences."""
        share = -(-samples // self.layout.replicas)
        return [wave.stop - wave.start for wave in waves_of(share, 1, self.task.wave)]

    def _pass(self, samples: int, stop: int, judged: bool = False) -> float:
        """Return the seconds of all waves of a replica through the layers below `stop`."""
        costs, sizes = self.costs, self._sizes(samples)
        full = sizes[0]
        reached = [shard for shard in self.layout.shards if shard[0] < stop]
        passed = [[layer for layer in shard if layer < stop] for shard in reached]
        if self.setup.streamed:

            def layer(one: Expected) -> float:
                through = sum(one.costs.propagate(size) for size in sizes)
                return max(through, one.costs.read(one.task.model.layer))

            entering = sum(costs.embed(size) + costs.put(size) for size in sizes)
            relays = (len(reached) - 1) * self._relay(sizes)
            judging = sum(costs.take(size) + costs.losses(size) for size in sizes) if judged else 0.0
            return entering + self._over(range(stop), layer) + relays + judging
        stages = [costs.forward(full, layers) for layers in passed]
        stages[0] += costs.embed(full)
        if judged:
            stages[-1] += costs.losses(full)
        steps = sum(stages) + (len(sizes) - 1) * max(stages)
        return steps + (len(stages) - 1) * (CALL_SECONDS + self._network(costs.wave_bytes(full)))

    def _layer(self) -> float:
        """Return the seconds to prune one layer, without writing it."""
        parts = self.parts()
        reading = parts.pop("reading")
        return max(sum(parts.values()), reading)

    def parts(self) -> dict[str, float]:
        """Return the seconds of a layer: its waves, the replica that solves longest, what replicas exchange before and
        after that, the copy on the host for its file, and the reading of a streamed layer, which goes on meanwhile.
        """
        costs, task, replicas = self.costs, self.task, self.layout.replicas
        inputs, copied = task.model.inputs, self.setup.copies_sums
        held_out = self._sizes(task.held_out)
        if task.model.narrower:
            return {**self._narrowing(), "unloading": costs.of_cut.unload(), "reading": self._reading()}
        if task.model.fewer:
            waves = sum(costs.propagate(size) for size in self._sizes(task.samples))
            return {"waves": waves, "copying": costs.copy_layer() / replicas, "reading": self._reading()}
        waves = sum(costs.propagate(size) for size in (*self._sizes(task.samples - task.held_out), *held_out))
        if not inputs:  # nothing is pruned in the layer: waves pass through it, those of the dense model as well
            waves *= 2 if task.improving else 1
            return {"waves": waves, "unloading": costs.unload(), "reading": self._reading()}
        waves += self._training()
        if task.improving.stream_targets:
            return {**self._aiming(waves), "unloading": costs.unload(), "reading": self._reading()}
        if task.improving:
            waves += sum(costs.aim(size) for size in self._sizes(task.samples))
        for places in task.model.shape.kind.chunks(self.setup.chunks):
            waves += sum(costs.accumulate(size, places) for size in self._sizes(task.samples - task.held_out))
        merges = [costs.merge(one, replicas) if copied else 0.0 for one in inputs]
        solves = [merge + costs.solve(one) for merge, one in zip(merges, inputs, strict=True)]
        exchange = 0.0
        if copied and inputs:
            arriving = (replicas - self.places.per_node) * max(costs.sums_bytes(one) for one in inputs)
            exchange += sum(costs.statistics(one) for one in inputs) + self._network(max(0, arriving))
            exchange += max(costs.solved(one) for one in inputs) + sum(costs.install(one) for one in inputs)
        elif replicas > 1:
            ranks = range(replicas)
            exchange += sum(costs.sum_up(one, ranks) + costs.broadcast(one, ranks) for one in inputs)
        parts = {
            "waves": waves,
            "solving": _shared(solves, replicas),
            "exchange": exchange,
            "unloading": costs.unload(),
        }
        return {**parts, "reading": self._reading()}

    def _narrowing(self) -> dict[str, float]:
        """Return the seconds of a layer that loses structures: its waves, the replica that makes it narrower, and what
        replicas exchange before and after that."""
        costs, task, replicas = self.costs, self.task, self.layout.replicas
        inputs, copied, sizes = task.model.inputs, self.setup.copies_sums, self._sizes(task.samples - task.held_out)
        places = range(len(inputs))
        waves = sum(costs.pass_on(one) if task.passes_on_dense else costs.accumulate(one, places) for one in sizes)
        waves += self._passing_on()
        if task.improving:
            waves += sum(costs.aim(size) for size in (*sizes, *self._sizes(task.held_out)))
            waves += Expected(costs.of_cut)._training()
        solving, exchange = costs.narrow() + costs.sizes(), 0.0
        if copied:
            solving += sum(costs.merge(one, replicas) for one in inputs)
            arriving = (replicas - self.places.per_node) * sum(costs.sums_bytes(one) for one in inputs)
            exchange += sum(costs.statistics(one) for one in inputs) + self._network(max(0, arriving))
        elif replicas > 1:
            exchange += sum(costs.sum_up(one, range(replicas)) for one in inputs)
        if replicas > 1:
            exchange += costs.choice() + self._network(costs.choice_bytes()) + costs.install_narrowed()
        return {"waves": waves, "solving": solving, "exchange": exchange}

    def _training(self) -> float:
        """Return the seconds of training a layer that is pruned, and of the errors before and after."""
        costs, task = self.costs, self.task
        if not task.improving.reconstruction:
            return 0.0
        missing = sum(costs.miss(size) for size in self._sizes(task.held_out))
        return 2 * missing + self._train(task.improving.reconstruction, task.model.inputs)

    def _train(self, steps: int, inputs: Sequence[Input]) -> float:
        """Return the seconds of training what reads some inputs of a layer: the windows that replicas lend, in two
        streams, the steps, and what is sent back."""
        costs, replicas = self.costs, self.layout.replicas
        seconds, lent = costs.train(steps, inputs), costs.lent_windows(steps)
        for one in inputs:
            seconds += 2 * costs.copy(one)
            if self.setup.copies_sums:
                seconds += costs.solved(one) + costs.install(one) + self._network(costs.projections_bytes(one))
            elif replicas > 1:
                seconds += costs.broadcast(one, range(replicas))
        if lent:
            moved = costs.take(lent) / max(1, replicas - 1) + self._network(costs.wave_bytes(lent)) + costs.put(lent)
            seconds += 2 * moved
        return seconds

    def _reading(self) -> float:
        return self.costs.read(self.task.model.layer) if self.setup.streamed else 0.0

    def _aiming(self, waves: float) -> dict[str, float]:
        """Return the seconds of a layer whose inputs are solved one after the other, each as it is and towards the
        dense stream, and judged by the held-out waves.

        Args:
            waves: the seconds of all waves through the pruned layer.
        """
        costs, task, replicas = self.costs, self.task, self.layout.replicas
        inputs, held_out = task.model.inputs, self._sizes(task.held_out)
        waves += sum(costs.aim(size) for size in held_out) + 2 * len(inputs) * sum(
            costs.miss(size) for size in held_out
        )
        solving = exchange = 0.0
        for place, one in enumerate(inputs):
            last = place == len(inputs) - 1
            waves += sum(costs.confront(size, place, last) for size in self._sizes(task.samples - task.held_out))
            solving += costs.solve(one) + costs.correct(one) + 3 * costs.copy(one)
            for differences in (False, True):
                if self.setup.copies_sums:
                    solving += costs.merge(one, replicas, differences)
                    exchange += costs.statistics(one, differences)
                    exchange += self._network(
                        max(0, replicas - self.places.per_node) * costs.sums_bytes(one, differences)
                    )
                elif replicas > 1:
                    exchange += costs.sum_up(one, range(replicas), differences)
            if self.setup.copies_sums:
                exchange += 2 * (costs.solved(one) + costs.install(one) + self._network(costs.projections_bytes(one)))
            elif replicas > 1:
                exchange += 2 * costs.broadcast(one, range(replicas))
        return {"waves": waves, "solving": solving, "exchange": exchange}

    def _relays(self) -> float:
        """Return the seconds of sending waves to the first shard, and in exact propagation across every boundary."""
        sizes = self._sizes(self.task.samples)
        entering = sum(self.costs.embed(size) + self.costs.put(size) for size in sizes)
        boundaries = len(self.layout.shards) - 1 if len(self.layout.segments) == 1 else 0
        return entering + boundaries * self._relay(sizes)

    def _relay(self, sizes: list[int]) -> float:
        """Return the seconds to send all waves of a replica between two shards; fetching one overlaps with sending the
        next.
        """
        costs = self.costs
        stages = [
            (costs.take(size), self._network(costs.wave_bytes(size)), costs.put(size) + CALL_SECONDS) for size in sizes
        ]
        return sum(stages[0]) + sum(max(stage) for stage in stages[1:])

    def _network(self, count: int) -> float:
        """Return the seconds to send bytes between workers; 0 through the object store of a single node."""
        if self.layout.workers <= self.places.per_node:
            return count / self.costs.row.peer if self.setup.joined else 0.0
        return count / self.costs.row.network

    def _reads(self, passes: int) -> float:
        """Return the seconds of reads that nothing overlaps: the first layer of each pass of streamed shards, all
        layers of a resident shard while the other shards read theirs.
        """

        def layer(one: Expected) -> float:
            return one.costs.read(one.task.model.layer)

        if self.setup.streamed:
            return (passes + 1) * layer(self.at(0))
        return self._longest(layer)


def _ratios(one: Expected) -> float:
    return one.costs.ratios()


def _shared(seconds: Sequence[float], workers: int) -> float:
    """Return the seconds of the worker that has most to do where several share pieces of work, the longest first."""
    load = [0.0] * workers
    for piece in sorted(seconds, reverse=True):
        load[load.index(min(load))] += piece
    return max(load)
