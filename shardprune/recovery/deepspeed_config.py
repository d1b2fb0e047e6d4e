"""DeepSpeed's configuration, built from a recipe and overridden by the user's file."""

from typing import Any

from shardprune.errors import InputError
from shardprune.storage.json_file import parse_json
from shardprune.storage.malformed import located, shown
from shardprune.storage.whole_files import read_file

ADAM = "AdamW"
MIXING = "muon", "onebitadam", "onebitlamb", "zerooneadam"  # optimizers that move a weight by the gradients of others
# Settings that the training loop relies on and that the recipe determines.
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
    """Build the configuration of a training run.

    Args:
        zero: ZeRO stage, what is partitioned over the processes: 0 nothing, 1 optimizer states, 2 gradients too, 3
            parameters too.
        offload: keep optimizer states, and under stage 3 parameters, in host memory.
        batch: sequences of a step; `micro` of them pass through one process at a time.
        overrides: the user's own settings.
    """
    zero_optimization: dict[str, Any] = {"stage": zero}
    if zero == 2:  # reduce gradients beside the backward pass, as stage 3 does by default
        zero_optimization["overlap_comm"] = True
    if offload:
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    if offload and zero == 3:
        zero_optimization["offload_param"] = {"device": "cpu"}
    optimizer: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if overrides.get("optimizer", {}).get("type", ADAM) == ADAM:
        optimizer["eps"] = 1e-8
        if not offload:  # torch's AdamW needs no compiler, and in one kernel no temporaries as large as the partition
            optimizer |= {"torch_adam": True, "fused": True}
    ours = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * processes),
        "gradient_clipping": clip,
        "zero_optimization": zero_optimization,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},  # in bf16 a sum of micro-batches loses what is small beside it
        "optimizer": {"type": ADAM, "params": optimizer},
        "steps_per_print": 2**31 - 1,
    }
    return _merged(ours, overrides)


def read_overrides(file: str) -> dict[str, Any]:
    """Read the user's own part of DeepSpeed's configuration.

    Raises:
        InputError: the file is missing, no JSON object, or sets a value that belongs to the recipe.
    """
    with located("deepspeed", repr(file)):
        values = parse_json(read_file(file, "deepspeed"))
    if not isinstance(values, dict):
        raise InputError("deepspeed", f"{file!r} must hold an object with DeepSpeed's settings")
    for name in ("optimizer", "zero_optimization"):
        if not isinstance(values.get(name, {}), dict):
            raise InputError(
                "deepspeed", f"{file!r} sets {name} to {shown(values[name])}; use an object with its settings"
            )
    for path, field in OURS.items():
        if _has(values, path):
            raise InputError("deepspeed", f"{file!r} sets {'.'.join(path)}, which the recipe says; use {field}")
    return values


def check_keeps_zeros(file: str, overrides: dict[str, Any]) -> None:
    """Check that the optimizer of the user's settings leaves a weight without a gradient where it is.

    Raises:
        InputError: it mixes the entries of a tensor.
    """
    kind = overrides.get("optimizer", {}).get("type")
    if str(kind).lower() in MIXING:
        reason = "which moves weights that have no gradient, so that zeros are lost"
        raise InputError("deepspeed", f"{file!r} sets optimizer.type {kind}, {reason}; use AdamW, or no keep_sparsity")


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Merge two configurations recursively; `theirs` overrides."""
    merged = {**ours, **theirs}
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            merged[key] = _merged(ours[key], theirs[key])
    return merged
