"""Error curves of a model's projections, for `shardprune prune --allocation-file`.

    python -m benchmarks.curves --model DIR --calibration SOURCE --sparsity 0.7 > curves.json

The loss rises by about 1/2 tr(G dW H dW^T) where a projection changes by dW: H is the second moment of its inputs, G
that of the gradients at its outputs (K-FAC), of which the diagonal is taken, for labels that the model draws itself. dW
is what SparseGPT makes of every fourth row at levels around the sparsity. The whole dense model is in this process,
forward and backward; a run shares the curves out.
"""

import argparse
import json

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shardprune.model.opening import open_model
from shardprune.recipes.demo import bundled_model
from shardprune.solvers.methods import Target
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sparsegpt import prune_together
from shardprune.solvers.statistics import InputStatistics
from shardprune.storage.windows import calibration_windows

ROWS = 4  # of which one is solved
SPAN, STEP, HIGHEST = 0.2, 0.1, 0.98  # of the levels around the sparsity


def levels_around(sparsity: float) -> list[float]:
    """Return the levels at which errors are measured, in ascending order."""
    steps = round(SPAN / STEP)
    found = {round(min(HIGHEST, max(0.05, sparsity + step * STEP)), 6) for step in range(-steps, steps + 1)}
    return sorted(found)


class Curvature:
    """What the loss says of each projection: second moments of its inputs, and of gradients at its rows."""

    def __init__(self, projections: dict[tuple[int, str], nn.Module]) -> None:
        self.inputs = {
            place: InputStatistics.empty("gram", module.weight.shape[1], module.weight.device)
            for place, module in projections.items()
        }
        self.rows = {
            place: torch.zeros(len(module.weight), device=module.weight.device) for place, module in projections.items()
        }
        for place, module in projections.items():
            module.register_forward_hook(lambda _m, inputs, _o, place=place: self._saw(place, inputs[0]))
            module.register_full_backward_hook(lambda _m, _i, grads, place=place: self._felt(place, grads[0]))

    def _saw(self, place: tuple[int, str], inputs: Tensor) -> None:
        self.inputs[place].add(inputs.detach(), len(inputs))

    def _felt(self, place: tuple[int, str], gradients: Tensor) -> None:
        self.rows[place] += gradients.float().flatten(0, -2).square().sum(0)

    def add(self, model: nn.Module, windows: Tensor, seed: int) -> None:
        """Pass windows [count, seqlen] forward and backward, with labels drawn from what the model predicts."""
        generator = torch.Generator().manual_seed(seed)
        embedded = model.get_input_embeddings()(windows).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits.flatten(0, 1).float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()


def curve(weight: Tensor, inputs: InputStatistics, rows: Tensor, levels: list[float]) -> list[tuple[float, float]]:
    """Return what the projection adds to the loss at each level of sparsity, up to a factor that all share."""
    some, weights = weight.float()[::ROWS], rows[::ROWS]
    found = []
    for level in levels:
        (solution,) = prune_together([Target(some, Unstructured(), level)], inputs)
        change = some - solution.weight
        found.append((level, float(((change @ inputs.gram) * change).sum(1) @ weights) * len(weight) / len(some)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--wave", type=int, default=8)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    opened = open_model(args.model, float32=True)
    skeleton = opened.skeleton
    windows = calibration_windows(
        args.calibration, opened.tokenizer, args.samples, args.seqlen, args.seed, model.config.vocab_size
    )
    places = {
        (layer, name): skeleton.projection_tensor(layer, name).removesuffix(".weight")
        for layer in range(skeleton.layers)
        for name in skeleton.family.kinds[0].projections
    }
    projections = {place: model.get_submodule(name) for place, name in places.items()}
    curvature = Curvature(projections)
    for index, part in enumerate(windows.split(args.wave)):
        curvature.add(model, part, args.seed + index)
    levels = levels_around(args.sparsity)
    shares = []
    for (layer, name), module in projections.items():
        place = layer, name
        found = curve(module.weight, curvature.inputs[place], curvature.rows[place], levels)
        shares.append({"layer": layer, "name": name, "curve": found})
    print(json.dumps({"version": 1, "projections": shares}, indent=1))


if __name__ == "__main__":
    main()
