"""Other ways to train the weights that layers keep, beside that of `--reconstruct`.

    python -m benchmarks.reconstruction [--model DIR --calibration SOURCE --eval SOURCE] [--ways NAME ...]

Prunes the model once, untrained, and trains its layers one after the other towards the dense model's, once in each way
of `WAYS`. Prints a row for each: perplexity, the share of pruning's loss that is gone, and CPU seconds of the training.
The first way is the command's, but for two things: layers are pruned before any of them is trained, and no step is held
against windows that it has not seen. The zeros of a projection stay as many as they were, and the row says if not.
"""

import copy
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.options import parser_of
from shardprune import Recipe, prune
from shardprune.model.opening import OpenedModel, open_model, open_texts
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.report.progress import Reporter
from shardprune.shard.master_weights import MasterWeights
from shardprune.shard.taps import run_with, tap
from shardprune.solvers.training import rate_at, windows_of_steps
from shardprune.storage.windows import calibration_windows

WAVE = 8  # windows that go through a layer together
REDRAWS = 10  # of a mask, over the first half of the steps


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        steps: for each layer, or what is trained together in its place.
        rate: in that of `--reconstruct`.
        together: layers that are trained at the same time, towards the output of their last.
        norms: the layer's norms are trained, too.
        apart: attention is trained towards the stream behind it, then the MLP towards the layer's output.
        moving: share of the kept weights that give their place to zeros with the largest gradients the first time the
            mask is drawn anew; it falls as a cosine to nothing (as in RigL, arXiv 1911.11134).
    """

    steps: int = 100
    rate: float = 1.0
    together: int = 1
    norms: bool = False
    apart: bool = False
    moving: float = 0.0


WAYS = {
    "as `--reconstruct 100`": Way(),
    "a third of the rate": Way(rate=1 / 3),
    "three times the rate": Way(rate=3),
    "50 steps": Way(steps=50),
    "200 steps": Way(steps=200),
    "400 steps": Way(steps=400),
    "norms, too": Way(norms=True),
    "attention and MLP apart": Way(apart=True),
    "two layers together": Way(together=2),
    "two layers together, 200 steps": Way(together=2, steps=200),
    "masks that move, 5 %": Way(moving=0.05),
    "masks that move, 20 %": Way(moving=0.2),
}


class Training:
    """The training of some layers that follow one another, towards the dense ones.

    Args:
        layers: those that are trained, by their numbers in the model.
        hidden: what enters the first of them [windows, seqlen, hidden].
        way: how.
    """

    def __init__(self, skeleton: Skeleton, layers: dict[int, nn.Module], hidden: Tensor, way: Way) -> None:
        self._skeleton, self._layers, self._hidden, self._way = skeleton, layers, hidden, way

    def towards(self, target: Tensor, seed: int, upto: str | None = None, passed: Sequence[str] = ()) -> None:
        """Train towards some states [windows, seqlen, hidden]: of the last layer's output, or of the stream behind its
        projection `upto`. The projections of `passed` stay as they are."""
        masters = {
            (index, name): MasterWeights(layer.get_parameter(f"{name}.weight"), on_host=False)
            for index, layer in self._layers.items()
            for name in self._trained(index, upto, passed)
        }
        norm = float((target - self._hidden).square().sum()) / len(target)
        steps = windows_of_steps(len(target), target.shape[1], self._way.steps, seed)
        for step, windows in enumerate(steps):
            leaves = {key: master.weight.detach().requires_grad_() for key, master in masters.items()}
            with torch.enable_grad():
                error = self._output(self._hidden[windows], leaves, upto) - target[windows]
                (error.square().sum() / (len(windows) * norm)).backward()
            for key, master in masters.items():
                gradient = leaves[key].grad
                assert gradient is not None, key
                if master.weight.dim() == 2 and (moved := self._moved(step)):
                    move(master, gradient, moved)
                master.step(gradient, master.rate * self._way.rate * rate_at(step, self._way.steps))
                master.weight.mul_(master.mask)  # a moment of a weight that has just become zero

    def _trained(self, index: int, upto: str | None, passed: Sequence[str]) -> list[str]:
        kind, layer = self._skeleton.family.kinds[index], self._layers[index]
        names = [name for name in kind.projections if name not in passed and (upto is None or name in kind.attention)]
        norms = [name for name, module in layer.named_modules() if name not in names and is_norm(module)]
        return names + norms if self._way.norms else names

    def _output(self, hidden: Tensor, leaves: dict[tuple[int, str], Tensor], upto: str | None) -> Tensor:
        for index, layer in self._layers.items():
            weights = {name: leaf for (place, name), leaf in leaves.items() if place == index}
            arguments = self._skeleton.layer_arguments(index, *hidden.shape[:2])
            if upto is not None:
                return hidden + tap(layer, weights, hidden, arguments, upto, (upto,), False).outputs[0]
            hidden = run_with(layer, weights, hidden, arguments)
        return hidden

    def _moved(self, step: int) -> float:
        """Return the share of the kept weights that move at a step."""
        span = self._way.steps // 2
        every = max(1, span // REDRAWS)
        due = 0 < step < span and step % every == 0
        return self._way.moving * 0.5 * (1 + math.cos(math.pi * step / span)) if due else 0.0


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def move(master: MasterWeights, gradient: Tensor, share: float) -> None:
    """Let the smallest of the kept weights give their places to the zeros with the largest gradients."""
    kept = master.mask
    count = min(int(share * int(kept.sum())), int((~kept).sum()))
    smallest = master.weight.abs().masked_fill(~kept, math.inf).flatten().topk(count, largest=False).indices
    largest = gradient.abs().masked_fill(kept, -1.0).flatten().topk(count).indices
    kept.view(-1)[smallest], kept.view(-1)[largest] = False, True
    master.weight.mul_(kept)


@torch.no_grad()
def through(skeleton: Skeleton, layers: dict[int, nn.Module], hidden: Tensor) -> Tensor:
    """Return what leaves the last of some layers that follow one another [windows, seqlen, hidden]."""
    for index, layer in layers.items():
        waves = [
            skeleton.forward_layer(layer, wave, skeleton.layer_arguments(index, *wave.shape[:2]))
            for wave in hidden.split(WAVE)
        ]
        hidden = torch.cat(waves)
    return hidden


@torch.no_grad()
def train(skeleton: Skeleton, dense: list[nn.Module], sparse: list[nn.Module], tokens: Tensor, way: Way) -> None:
    """Train the layers of a sparse model towards the dense ones, on the tokens [windows, seqlen]."""
    hidden = truth = skeleton.embed(tokens)
    for first in range(0, len(sparse), way.together):
        indices = range(first, min(first + way.together, len(sparse)))
        layers, originals = ({index: model[index] for index in indices} for model in (sparse, dense))
        target = through(skeleton, originals, truth)
        training = Training(skeleton, layers, hidden, way)
        attention: list[str] = []
        if way.apart:
            (index,) = indices
            kind = skeleton.family.kinds[index]
            attention = [name for name in kind.projections if name in kind.attention]
            training.towards(behind(skeleton, index, dense[index], truth, attention[-1]), first, attention[-1])
        training.towards(target, first, passed=attention)
        hidden, truth = through(skeleton, layers, hidden), target


@torch.no_grad()
def behind(skeleton: Skeleton, index: int, layer: nn.Module, hidden: Tensor, name: str) -> Tensor:
    """Return the residual stream behind an output projection of a layer."""
    arguments = [skeleton.layer_arguments(index, *wave.shape[:2]) for wave in hidden.split(WAVE)]
    waves = zip(hidden.split(WAVE), arguments, strict=True)
    return torch.cat([wave + tap(layer, {}, wave, given, name, (name,), False).outputs[0] for wave, given in waves])


@torch.no_grad()
def perplexity(skeleton: Skeleton, layers: list[nn.Module], windows: Tensor) -> float:
    """Return exp of the mean loss of all tokens but the first of each window [windows, seqlen]."""
    total = 0.0
    for wave in windows.split(WAVE):
        logits = skeleton.logits(through(skeleton, dict(enumerate(layers)), skeleton.embed(wave)))
        total += float(
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wave[:, 1:].flatten(), reduction="sum")
        )
    return math.exp(total / (windows.numel() - len(windows)))


def layers_of(opened: OpenedModel) -> list[nn.Module]:
    skeleton, read = opened.skeleton, opened.checkpoint.read
    return [
        skeleton.build_layer(index, ((name, read(name)) for name in skeleton.layer_tensors(index)))
        for index in range(skeleton.layers)
    ]


def zeros(skeleton: Skeleton, layers: list[nn.Module]) -> dict[tuple[int, str], int]:
    """Return how many weights of each projection are zero."""
    return {
        (index, name): int((projection_weight(layer, name) == 0).sum())
        for index, layer in enumerate(layers)
        for name in skeleton.family.kinds[index].projections
    }


def main() -> None:
    parser = parser_of(__doc__, samples=64)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    opened = open_model(args.model)
    skeleton = opened.skeleton
    if not skeleton.adds_outputs:
        parser.error(f"--model {args.model}: its class norms the outputs of attention; what is behind it is not known")
    skeleton.load_frame(opened.checkpoint, embedding=True, head=True)
    vocabulary = skeleton.config.vocab_size
    tokens = calibration_windows(args.calibration, opened.tokenizer, args.samples, args.seqlen, 0, vocabulary)
    (windows,) = open_texts([args.eval], opened, args.seqlen, args.eval_windows).values()
    fields = {name: getattr(args, name) for name in ("model", "calibration", "sparsity", "method", "allocation")}
    fields |= {name: getattr(args, name) for name in ("samples", "seqlen", "threads")}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.checked({**fields, "out": f"{folder}/out", "backend": "local", "report": False})
        prune(recipe, Reporter(quiet=True))
        dense, sparse = layers_of(opened), layers_of(open_model(f"{folder}/out"))
    before = zeros(skeleton, sparse)
    best, pruned = perplexity(skeleton, dense, windows), perplexity(skeleton, sparse, windows)
    print("| training | perplexity | of the loss gone | CPU seconds |\n|---|---|---|---|")
    print(f"| none | {pruned:.3f} | | |", flush=True)
    for name in args.ways:
        layers, begun = copy.deepcopy(sparse), time.process_time()
        train(skeleton, dense, layers, tokens, WAYS[name])
        seconds = time.process_time() - begun
        value = perplexity(skeleton, layers, windows)
        lost = "" if zeros(skeleton, layers) == before else "; other zeros"
        print(f"| {name} | {value:.3f} | {(pruned - value) / (pruned - best):.0%} | {seconds:.0f}{lost} |", flush=True)
    print(f"dense {best:.3f}; {args.samples} x {args.seqlen} tokens, {len(windows)} windows")


if __name__ == "__main__":
    main()
