"""docs/families.md: what works on which architecture, found out on tiny models.

python -m docs.make_families [FILE]     print the page, or write it
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from shardprune.errors import InputError
from shardprune.model.families import FAMILIES, Structures
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import difference_layer_by_layer
from tests.support.architectures import DENSE, MIXTURES, REFUSED
from tests.support.tiny import CONFIGS

HEAD = """\
# Architectures

A model needs no entry anywhere to be pruned by its weights. Its decoder layers, their linear maps, which of these read
the same input, and what the model passes to each layer come from transformers' own classes; names on disk are mapped as
transformers maps them. `make docs` writes this page: for each architecture, a tiny model with random weights is taken
apart and run layer by layer, and the logits are compared with those of the whole model.

An architecture that is not here is checked when it is first met: a small model of its class, with the features that
its config has, is run layer by layer and as a whole. If the logits differ in one bit, the command ends with one line
that says by how much, before any work. It also ends with a line where a layer has a matrix that could not be pruned:
nothing is left out in silence.

- **weights**: `prune`, `rebuild`, `evaluate`, and `recover` without `--packing`, which does not train mixtures of
  experts yet. `yes`: the logits are equal to the
  bit; in the tests, each runs through `prune`, its perplexity before and after is that of transformers on the same
  windows, and what is written loads without a missing or unexpected tensor.
- **structures**: `--structured`, `mop` and `--targets stream`; `neurons` where no attention head can go. They need to
  know which heads and neurons the rows and columns of the weights are, which no class says: see
  [extending.md](extending.md).
- **packing**: `recover --packing`.

Of multimodal models, the language tower of LLaVA (`llava`) is pruned, if it is one of these.

"""
TABLE = """\
| `model_type` | weights | structures | packing | linear maps of a layer, those with the same input together |
|---|---|---|---|---|
"""
REFUSALS = """
## Refused

| `model_type` | the line that it gets |
|---|---|
"""


def page() -> str:
    """Return the whole page."""
    ours = {config.model_type: config for config in map(_config, CONFIGS)}
    configs = {**ours, **{name: AutoConfig.for_model(name, **values) for name, values in {**DENSE, **MIXTURES}.items()}}
    rows = "".join(_row(name, configs[name]) for name in sorted(configs))
    refusals = "".join(_refusal(name, values) for name, (values, _) in sorted(REFUSED.items()))
    return HEAD + TABLE + rows + REFUSALS + refusals


def _config(name: str) -> transformers.PretrainedConfig:
    class_name, values = CONFIGS[name]
    return getattr(transformers, class_name)(**values)


def _row(name: str, config: transformers.PretrainedConfig) -> str:
    difference = difference_layer_by_layer(config)
    structures = FAMILIES.get(name)
    family = Skeleton(config, "cpu").family
    # The experts of a mixture are alike.
    inputs = dict.fromkeys(
        tuple(re.sub(r"\.experts\.\d+\.", ".experts.*.", one) for one in group) for group in family.inputs
    )
    groups = "; ".join(", ".join(f"`{one}`" for one in group) for group in inputs)
    cells = [f"`{name}`", "differs" if difference else "yes", _structures(structures), _packing(structures), groups]
    return f"| {' | '.join(cells)} |\n"


def _structures(structures: Structures | None) -> str:
    if structures is None:
        return "no"
    return "neurons" if structures.fixed_heads else "yes"


def _packing(structures: Structures | None) -> str:
    return "yes" if structures and structures.packing else "no"


def _refusal(name: str, values: dict[str, Any]) -> str:
    try:
        Skeleton(AutoConfig.for_model(name, **values), "cpu", torch.float32)
    except InputError as error:
        return f"| `{name}` | {str(error).replace('|', chr(92) + '|')} |\n"
    raise AssertionError(f"{name} is not refused")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page())
    else:
        print(page(), end="")
