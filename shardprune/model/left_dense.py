"""Matrices of decoder layers that stay dense: which, and why."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from shardprune.errors import InputError
from shardprune.model.families import Family, LayerKind

SMALLEST = 8  # rows and columns of a matrix that is pruned

# Linear maps that are not pruned, by a pattern of their names within a layer. They are small, and what they give is no
# value that others are added to: a few wrong weights of theirs change how everything behind them is weighed.
SENSITIVE: dict[str, str] = {
    r"(^|\.)(router|gate|wg)(\.(proj|wg|classifier))?$": "a router chooses experts",
    r"(^|\.)shared_expert_gate$": "the gate of shared experts",
    r"(^|\.)indexer(\.|$)": "an indexer chooses what attention sees",
    r"(^|\.)(in_proj_(a|b|ba)|a_proj|b_proj|f_a_proj|f_b_proj)$": "gates and decays of linear attention",
    r"(^|\.)dt_proj$": "step sizes of a state space",
    r"(^|\.)compressor\.gate_proj$": "a gate weighs the tokens that are compressed",
    r"(^|\.)o_a_proj$": "each group of its rows has inputs of its own",
}
NOT_A_MAP = "no weights of an nn.Linear"
NOT_CALLED = "linear maps that are not called as modules"
IGNORED = "ignored"
NOT_RUN = "not run for text"
SMALL = f"fewer than {SMALLEST} rows or columns"


def pruned_of(
    layer: nn.Module, maps: tuple[tuple[str, ...], ...], structured: Collection[str] = ()
) -> tuple[tuple[tuple[str, ...], ...], dict[str, tuple[str, ...]]]:
    """Return the projections among a layer's linear maps, in groups as these, and the parameters with two or more
    dimensions that stay as they are, by the reason.

    Args:
        maps: tuples of linear maps that read the same input.
        structured: maps of known heads and neurons, of which few may be left: they are projections at any size.

    Raises:
        InputError: most of the layer's weights would stay.
    """
    called = {name for names in maps for name in names}
    kept: dict[str, list[str]] = {}
    pruned, weights, left = set(), 0, 0
    for path, module in layer.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            weights += parameter.numel()
            name = f"{path}.{leaf}" if path else leaf
            if reason := _reason(module, path, called, SMALLEST if path not in structured else 0):
                kept.setdefault(reason, []).append(name)
                left += parameter.numel() * (reason in (NOT_A_MAP, NOT_CALLED))
            else:
                pruned.add(path)
    if 2 * left > weights:
        name, reason = next((names[0], reason) for reason, names in kept.items() if reason in (NOT_A_MAP, NOT_CALLED))
        shape = list(layer.get_parameter(name).shape)
        raise InputError("model", f"cannot be pruned: most weights of its layers are {reason}, such as {name} {shape}")
    groups = (tuple(name for name in names if name in pruned) for names in maps)
    return tuple(filter(None, groups)), {reason: tuple(names) for reason, names in kept.items()}


def not_run(layer: nn.Module) -> LayerKind:
    """Return the kind of a layer that a model does not run for text."""
    names = tuple(name for name, parameter in layer.named_parameters() if parameter.dim() > 1)
    return LayerKind(maps=(), inputs=(), attention=frozenset(), kept={NOT_RUN: names}, runs=False)


def ignoring(family: Family, patterns: Sequence[str]) -> Family:
    """Return decoder layers of which some projections are none.

    Args:
        patterns: globs over the projections' names in the model, such as `model.layers.0.*` or `*.down_proj`.

    Raises:
        InputError: a pattern matches no projection, or nothing is left.
    """
    if not patterns:
        return family
    used: set[str] = set()
    known: dict[tuple[int, tuple[str, ...]], LayerKind] = {}
    kinds = []
    for index, kind in enumerate(family.kinds):
        matches = {
            name: [one for one in patterns if fnmatchcase(f"{family.layers}.{index}.{name}", one)]
            for name in kind.projections
        }
        used.update(one for found in matches.values() for one in found)
        ignored = tuple(name for name, found in matches.items() if found)
        key = id(kind), ignored
        if key not in known:
            groups = (tuple(name for name in names if name not in ignored) for names in kind.inputs)
            kept = {**kind.kept, IGNORED: tuple(f"{name}.weight" for name in ignored)} if ignored else kind.kept
            known[key] = replace(kind, inputs=tuple(filter(None, groups)), kept=kept)
        kinds.append(known[key])
    layer, name = next((index, kind.projections[0]) for index, kind in enumerate(family.kinds) if kind.projections)
    example = f"{family.layers}.{layer}.{name}"
    if missing := [one for one in patterns if one not in used]:
        raise InputError("ignore", f"{missing[0]!r} matches no projection; their names are such as {example}")
    if not any(kind.inputs for kind in kinds):
        raise InputError("ignore", "leaves nothing to prune; ignore fewer projections")
    return replace(family, kinds=tuple(kinds))


def left_dense(kinds: Sequence[LayerKind]) -> str | None:
    """Return one line that says which matrices of a model's layers stay dense and why; None where none do."""
    names: dict[str, dict[str, None]] = {}
    for kind in kinds:
        for reason, kept in kind.kept.items():
            names.setdefault(reason, {}).update(dict.fromkeys(name.removesuffix(".weight") for name in kept))
    for reason in (IGNORED, NOT_RUN):  # of which there may be many
        names.pop(reason, None)
    parts = [f"{', '.join(kept)} ({reason})" for reason, kept in names.items()]
    if resting := sum(not kind.runs for kind in kinds):
        parts.append(f"{resting} of {len(kinds)} layers ({NOT_RUN})")
    ignored, pruned = ([len(some) for some in counts] for counts in zip(*map(_counts, kinds), strict=True))
    if sum(ignored):
        parts.append(f"{sum(ignored)} of {sum(ignored) + sum(pruned)} projections (ignored; the target is the others')")
    return f"left dense: {'; '.join(parts)}" if parts else None


def _counts(kind: LayerKind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the projections of a layer that are ignored, and the others."""
    return kind.kept.get(IGNORED, ()), kind.projections


def _reason(module: nn.Module, path: str, called: set[str], smallest: int) -> str | None:
    """Return why a parameter of a module stays as it is; None where it is a projection's weight."""
    for pattern, reason in SENSITIVE.items():
        if re.search(pattern, path):
            return reason
    if not isinstance(module, nn.Linear):
        return NOT_A_MAP
    if path not in called:
        return NOT_CALLED
    return SMALL if min(module.weight.shape) < smallest else None
