"""The part of a worker that measures error curves: gradients of the dense model's loss, then changes of projections.

The driver has waves recorded before every layer on their way forward, and the last shard draw labels for them
(`draw_labels`). Gradients of the loss then go back through the layers, wave after wave (`backward`) or, where layers
are streamed, layer after layer (`differentiate`). At last each layer has its inputs gathered (`begin_curves`, `gather`)
and the errors of its projections measured (`measure_curves`).
"""

import torch
from torch import Tensor, nn

from shardprune.errors import SolverError
from shardprune.model.experts import DOWN
from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker, segment_stream
from shardprune.shard.gradients import power_near_one, repeatable
from shardprune.shard.peers import travels
from shardprune.shard.streams import to_device
from shardprune.shard.verbs import verb
from shardprune.solvers.allocation.knapsack import Curve
from shardprune.solvers.error_curves import LABEL_SEED, RowGradients, error_curves
from shardprune.solvers.sampling import drawn_tokens, draws
from shardprune.solvers.statistics import PRIOR_TOKENS, InputStatistics

GRADIENTS = "gradients"  # the stream of the loss's gradients by hidden states, float32
LOGITS = 2**24  # at once: labels are drawn in whole numbers of 64 bits


class ErrorCurves:
    """Gradients of a worker's shard, and what its projections lose by them."""

    def __init__(self, worker: ForwardWorker) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton = worker, worker.skeleton

    # -- gradients of the loss --------------------------------------------------------------------------------

    @verb("forward")
    def draw_labels(self, hidden: Tensor, labelled: tuple[int, int, int]) -> None:
        """Draw a label for every position of a wave from the model's own predictions, and keep the gradients of the
        loss with these labels by the last layer's output `hidden` [wave, seqlen, hidden].

        Args:
            labelled: the index of the wave, and the first and the last but one of its windows. Labels depend on the
                window and the position alone.

        Raises:
            SolverError: the logits are not finite.
        """
        wave, start, stop = labelled
        self._skeleton.load_frame(self._worker.checkpoint, head=True)
        uniform = draws(LABEL_SEED, range(start, stop), hidden.shape[1])
        gradients = [
            torch.cat([self._by_output(*part) for part in self._pieces(sequence, numbers)])
            for sequence, numbers in zip(hidden, uniform, strict=True)
        ]
        self._worker.activations.put(GRADIENTS, wave, torch.stack(gradients))

    @travels
    @verb("forward")
    def backward(self, wave: int, gradient: Tensor) -> Tensor:
        """Bring the gradients of a wave [wave, seqlen, hidden] back through all layers of the shard, whose squares at
        the outputs of projections add to sums; return those by the input of its first layer."""
        gradient = to_device(gradient, self._skeleton.device)
        for index in reversed(self.spec.layers):
            gradient = self._through(wave, index, gradient)
        return self._worker.leaving(gradient)

    @verb("propagate", layer="index")
    def differentiate(self, stream: str, wave: int, index: int) -> None:
        """Bring the kept gradients of a wave back through one layer, as `backward` does."""
        activations = self._worker.activations
        activations.replace(stream, wave, self._through(wave, index, activations.get(stream, wave)))

    # -- curves ---------------------------------------------------------------------------------------------------

    @verb("exchange", layer="index")
    def begin_curves(self, index: int) -> None:
        """Begin the sums over a layer's inputs; a replica without waves has sums, too."""
        worker = self._worker
        worker.sums.setdefault(index, {}).update(worker.empty_statistics(index, "gram"))
        self._row_gradients(index)

    @verb("statistics", layer="index")
    def gather(self, stream: str, wave: int, index: int) -> None:
        """Add one kept wave to the sums over a dense layer's inputs."""
        sums = self._worker.sums[index]
        inputs = {name: own for name, own in sums.items() if isinstance(own, InputStatistics)}
        self._worker.add_inputs(index, self._worker.activations.get(stream, wave), inputs)

    @verb("exchange", layer="index")
    def gathered(self, index: int, windows: int) -> None:
        """Have the experts' sums take a part of what all tokens of their mixture have added, when all waves have.

        Args:
            windows: of all replicas.
        """
        self._worker.add_priors(index, windows)

    @verb("solve", layer="index")
    def measure_curves(
        self, index: int, group: int, levels: list[float], damping: float, tokens: int
    ) -> dict[str, Curve]:
        """Return the error curves of the projections that read input `group`, by the sums of all replicas, which are
        given up.

        Args:
            tokens: of the text, all of which are behind the sums but those of experts.

        Raises:
            SolverError: names the projection.
        """
        layer, kind = self._worker.layers.get(index, "dense"), self._skeleton.family.kinds[index]
        names = kind.inputs[group]
        sums = self._worker.sums[index]
        inputs, gradients = sums.pop(names[0]), sums.pop(gradients_of(names[0]))
        if not sums:
            del self._worker.sums[index]
        assert isinstance(inputs, InputStatistics)
        assert isinstance(gradients, RowGradients)
        label = f"layer {index} {names[0]}"
        if not inputs.finite:
            raise SolverError(f"{label}: its inputs are not finite: the activations overflow")
        if not gradients.finite:
            raise SolverError(f"{label}: the gradients at its outputs are not finite")
        weights = {name: projection_weight(layer, name) for name in names}
        seen = tokens
        if inputs.tokens is not None and names[0].endswith(f".{DOWN}"):
            seen, damping = inputs.tokens, inputs.least_damping(damping)
        elif inputs.tokens is not None:
            seen = inputs.tokens + PRIOR_TOKENS
        try:
            return error_curves(weights, inputs, gradients, levels, damping, tokens, seen)
        except SolverError as error:
            raise SolverError(f"{label}: {error}") from error

    # -- inside -----------------------------------------------------------------------------------------------

    def _pieces(self, states: Tensor, uniform: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the positions of a sequence [seqlen, hidden] with their random numbers [seqlen], so many at a time
        that their logits do not take too much."""
        size = max(1, LOGITS // self._skeleton.config.vocab_size)
        return list(zip(states.split(size), uniform.split(size), strict=True))

    def _by_output(self, states: Tensor, uniform: Tensor) -> Tensor:
        """Return the gradients of the loss by states [positions, hidden] behind the last layer, float32."""
        leaf = states.to(self._skeleton.device).unsqueeze(1).requires_grad_()
        with torch.enable_grad():
            # Position by position, because that is all the head looks at.
            logits = self._skeleton.logits(leaf)[:, 0].float()
            if not bool(torch.isfinite(logits).all()):
                raise SolverError("the model's logits are not finite")
            labels = drawn_tokens(logits.detach(), 1.0, uniform).to(logits.device)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), leaf)
        return gradient[:, 0].float()

    def _through(self, wave: int, index: int, gradient: Tensor) -> Tensor:
        """Return the gradients of a wave by the input of a layer, from those by its output, float32.

        The pass itself is in the dtype of the computation, from gradients near 1: float16 has no room for others.
        """
        worker, skeleton = self._worker, self._skeleton
        layer, found = worker.layers.get(index, "dense"), self._row_gradients(index)
        hidden = worker.activations.get(segment_stream(index), wave).detach().requires_grad_()
        arguments = skeleton.layer_arguments(index, *hidden.shape[:2])
        power = power_near_one(gradient)

        def note(own: RowGradients, name: str, output: Tensor) -> None:
            output.register_hook(lambda by_output: own.add(name, by_output, 1 / power))

        hooks = [
            layer.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, own=own, name=name: note(own, name, output)
            )
            for own in found
            for name in own.rows
        ]
        try:
            with repeatable(hidden.device, True), torch.enable_grad():
                output = skeleton.forward_layer(layer, hidden, arguments)
                (before,) = torch.autograd.grad(output, hidden, (gradient * power).to(output.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        for own in found:
            own.samples += len(hidden)
        return before.float().div_(power)

    def _row_gradients(self, index: int) -> list[RowGradients]:
        """Return the sums of a layer, one for each of its inputs, which begin here."""
        inputs, shapes = self._skeleton.family.kinds[index].inputs, self._skeleton.projection_shapes(index)
        if not inputs:
            return []
        sums, found = self._worker.sums.setdefault(index, {}), []
        for names in inputs:
            rows = {name: shapes[name][0] for name in names}
            own = sums.get(gradients_of(names[0])) or RowGradients.empty(rows, self._skeleton.device)
            assert isinstance(own, RowGradients)
            sums[gradients_of(names[0])] = own
            found.append(own)
        return found


def gradients_of(name: str) -> str:
    """Return the name of the squared gradients at the projections that read an input, which the first of them names."""
    return f"{name}, gradients"
