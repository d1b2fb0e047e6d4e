"""DeepSpeed's configuration, built from a recipe; a file of the user's adds to it and overrides it."""

import json
from typing import Any

from shardprune.errors import InputError
from shardprune.storage.folder import read_file

ADAM = "AdamW"
# What the training loop relies on, which is the recipe's to say.
OURS = {
    ("train_batch_size",): "batch",
    ("train_micro_batch_size_per_gpu",): "micro_batch",
    ("gradient_accumulation_steps",): "batch and micro_batch",
    ("gradient_clipping",): "clip",
    ("zero_optimization", "stage"): "zero",
    ("bf16",): "precision",
    ("fp16",): "precision",
    ("scheduler",): "schedule",
    ("optimizer", "params", "lr"): "learning_rate",
}


def deepspeed_config(
    *,
    zero: int,
    offload: bool,
    bf16: bool,
    batch: int,
    micro: int,
    processes: int,
    clip: float,
    learning_rate: float,
    weight_decay: float,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """The configuration of one training.

    Args:
        zero: the stage: what is partitioned over the processes: nothing, optimizer states, gradients too, parameters
            too.
        offload: keep optimizer states, and under stage 3 parameters, in the hosts' memory.
        batch: sequences of a step; `micro` of them pass through one process at a time.
        overrides: of the user's own.
    """
    zero_optimization: dict[str, Any] = {"stage": zero}
    if offload:
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    if offload and zero == 3:
        zero_optimization["offload_param"] = {"device": "cpu"}
    optimizer: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if overrides.get("optimizer", {}).get("type", ADAM) == ADAM:
        optimizer["eps"] = 1e-8
        if not offload:  # torch's AdamW needs no compiler, and its updates are the same everywhere
            optimizer["torch_adam"] = True
    ours = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * processes),
        "gradient_clipping": clip,
        "zero_optimization": zero_optimization,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": ADAM, "params": optimizer},
        "steps_per_print": 2**31 - 1,
    }
    return _merged(ours, overrides)


def read_overrides(file: str) -> dict[str, Any]:
    """The user's own part of DeepSpeed's configuration.

    Raises:
        InputError: the file is missing, no JSON object, or sets what the recipe says.
    """
    content = read_file(file, "deepspeed")
    try:
        values = json.loads(content)
    except ValueError as error:
        raise InputError("deepspeed", f"{file!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError("deepspeed", f"{file!r} must hold an object with DeepSpeed's settings")
    for name in ("optimizer", "zero_optimization"):
        if not isinstance(values.get(name, {}), dict):
            raise InputError("deepspeed", f"{file!r} sets {name} to {values[name]!r}; use an object with its settings")
    for path, field in OURS.items():
        if _has(values, path):
            raise InputError("deepspeed", f"{file!r} sets {'.'.join(path)}, which the recipe says; use {field}")
    return values


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Both, object by object; theirs where both say something."""
    merged = {**ours, **theirs}
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            merged[key] = _merged(ours[key], theirs[key])
    return merged
