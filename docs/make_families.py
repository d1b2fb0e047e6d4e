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
from shardprune.model.families import FAMILIES, LayerKind, Structures
from shardprune.model.left_dense import NOT_RUN
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import (
    ATTENDING,
    KEEPING_STATES,
    ROUNDING,
    difference_layer_by_layer,
    difference_token_by_token,
)
from shardprune.model.vision import SEEING
from tests.support.architectures import CARRYING, DENSE, MIXED, MIXTURES, REFUSED
from tests.support.tiny import CONFIGS
from tests.support.towers import TOWERS

HEAD = """\
# Architectures

A model needs no entry anywhere to be pruned by its weights. Its decoder layers, their linear maps, which of these read
the same input, and what the model passes to each layer come from transformers' own classes; names on disk are mapped as
transformers maps them. `make docs` writes this page: for each architecture, a tiny model with random weights is taken
apart and run layer by layer, and the logits are compared with those of the whole model.

An architecture that is not here is checked when it is first met: a small model of its class, with the features that
its config has, is run layer by layer and as a whole. If the logits differ in one bit, the command ends with one line
that says by how much, before any work.

Layers may be of several kinds (attention, linear attention, convolutions, state spaces): each kind has projections of
its own. What is no weight of an `nn.Linear` (convolutions, decays), what no layer calls as a module, and the small
matrices that choose or weigh (routers, gates, indexers, decays) stay dense; the run and the plan say which, in one
line. Where most of a layer is no `nn.Linear`, the command ends with a line that says so.

- **weights**: `prune`, `rebuild`, `evaluate`, and `recover` without `--packing` (mixtures of experts with `--zero` 0 to
  2). `yes`: the logits are equal to the bit; in the tests, each runs through `prune`, its perplexity before and after
  is that of transformers on the same windows, and what is written loads without a missing or unexpected tensor. `to
  rounding`: the same, but for logits that differ by less than 1e-5 (of Llama 4, see below).
- **structures**: `--structured`, `mop` and `--targets stream`; `neurons` where no attention head can go. They need to
  know which heads and neurons the rows and columns of the weights are, which no class says: see
  [extending.md](extending.md).
- **packing**: `recover --packing`.
- **text**: `--calibration self`, text that the model itself writes. `yes`: token by token, with what is kept of earlier
  tokens, the logits are those of a text as a whole, also where two texts grow in turn (of Gemma 4 E they are not).
  RecurrentGemma keeps states inside its modules, where such texts would share them.

Layers may pass more than hidden states to those behind them: several streams of them (Gemma 3n, DeepSeek-V4), inputs of
each layer's own (Gemma 3n; Gemma 4 E, of the class `gemma4_text`), keys and values that later layers use, too (the
same), indices of the tokens that attention chose (GLM-5, `glm_moe_dsa`), the tokens, by which a table chooses experts
(DeepSeek-V4). All of it travels with the hidden states from shard to shard, so that a wave is larger; the plan counts
it. Experts that a table chooses are pruned, but not removed.

The experts of a mixture may be tensors of their own in the files, one for each part, or all of a layer in one tensor
(`gpt_oss`, transposed and with the rows of gate and up in turn; `llama4_text`, transposed; `granitemoe`,
`gemma4_text`): each part of each expert is a projection, read alone, and what is written has the layout of what was
read. A convolution over queries, keys and values that lies in three tensors in the files (`kimi_linear`, `olmo_hybrid`)
is read as one, and written as three.

The class of Llama 4 hands every token to every expert, times zero where the router does not send it there. Here an
expert gets the tokens that are sent to it alone, times the router's weight as there, so that it multiplies fewer at
once, and rounds differently. A layer of LongCat-Flash has two attentions and, beside its experts, two MLPs, and its
routers choose among experts that have no weights, too, and pass tokens on as they are: these stay, and what a file has
for them is copied. `--expert-tokens all` and `shardprune experts` refuse it.

FP8 checkpoints, as DeepSeek-V3, MiniMax-M2 and the FP8 forms of Qwen3 ship them, are read as what they stand for: each
weight times the scales of its blocks ([storage.md](storage.md#fp8-checkpoints)). Other quantised checkpoints (GPTQ,
AWQ, MXFP4, compressed-tensors) are refused in one line: give the one from which they were made.

Of multimodal models, the language tower is pruned, if it is one of these, and all else is copied byte by byte: of
Gemma 3 and 4 (`gemma3`, `gemma4`), InternVL (`internvl`), Llama 4 (`llama4`), LLaVA (`llava`), Mistral Small 3
(`mistral3`), Qwen2-VL and 2.5-VL (`qwen2_vl`, `qwen2_5_vl`), Qwen3-VL and its mixtures (`qwen3_vl`, `qwen3_vl_moe`),
Qwen3.5 and its mixtures (`qwen3_5`, `qwen3_5_moe`), Llama 3.2 Vision (`mllama`). Calibration is text; in the tests,
perplexity before and after is that of the whole model. Of Gemma 3n (`gemma3n`), whose vision tower needs the package
timm, they run the language tower alone where that is not installed. Experts that lie transposed in the files
(`qwen3_vl_moe`) stay so.

Llama 3.2 Vision has layers whose attention is to images alone, one in five. For text, it passes them by: they are not
pruned, do nothing in calibration and perplexity, and no part of a target is theirs; the run and the plan say how many
there are. `recover` trains low-rank updates of the other layers; it refuses `--full`.

[Images with conversations](recovery.md#conversations-about-images) train and measure {seeing}: in the tests, the loss
of each conversation is that of transformers' class and processor of the whole model, before and after a training.

"""
TABLE = """\
| `model_type` | weights | structures | packing | text | projections of a layer by kind, those of one input together |
|---|---|---|---|---|---|
"""
NEARLY = 1e-5  # of logits near 1, in float32
REFUSALS = """
## Refused

| `model_type` | the line that it gets |
|---|---|
"""


def page() -> str:
    """Return the whole page."""
    ours = {config.model_type: config for config in map(_config, CONFIGS)}
    parts = {part["model_type"]: part for tower in TOWERS.values() if (part := tower["text_config"])}
    others = {**parts, **CARRYING, **DENSE, **MIXED, **MIXTURES}.items()
    configs = {name: AutoConfig.for_model(**{**values, "model_type": name}) for name, values in others} | ours
    rows = "".join(_row(name, configs[name]) for name in sorted(configs))
    refusals = "".join(_refusal(name, values) for name, (values, _) in sorted(REFUSED.items()))
    return HEAD.replace("{seeing}", ", ".join(f"`{name}`" for name in SEEING)) + TABLE + rows + REFUSALS + refusals


def _config(name: str) -> transformers.PretrainedConfig:
    class_name, values = CONFIGS[name]
    return getattr(transformers, class_name)(**values)


def _row(name: str, config: transformers.PretrainedConfig) -> str:
    difference = difference_layer_by_layer(config)
    structures = FAMILIES.get(name)
    kinds = {kind.inputs: kind for kind in Skeleton(config, "cpu").family.kinds}
    groups = " / ".join(_groups(kind) for kind in kinds.values())
    same = "yes" if not difference else "to rounding" if difference < NEARLY else "differs"
    works = same, _structures(structures), _packing(structures), _text(config)
    return f"| {' | '.join([f'`{name}`', *works, groups])} |\n"


def _groups(kind: LayerKind) -> str:
    """Return the inputs of a kind of layers; all experts of a mixture are alike."""
    if not kind.runs:
        return NOT_RUN
    inputs = dict.fromkeys(
        tuple(re.sub(r"\.experts\.\d+\.", ".experts.*.", one) for one in group) for group in kind.inputs
    )
    return "; ".join(", ".join(f"`{one}`" for one in group) for group in inputs)


def _structures(structures: Structures | None) -> str:
    if structures is None:
        return "no"
    return "neurons" if structures.fixed_heads else "yes"


def _packing(structures: Structures | None) -> str:
    return "yes" if structures and structures.packing else "no"


def _text(config: transformers.PretrainedConfig) -> str:
    if config.model_type in ATTENDING | KEEPING_STATES:  # of which the tests compare whole texts
        return "yes"
    try:
        differences = [difference_token_by_token(config, in_turn) for in_turn in (False, True)]
    except Exception:  # the model's own code, in a way for which it is not made
        return "no"
    return "yes" if all(difference < ROUNDING for difference in differences) else "no"


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
