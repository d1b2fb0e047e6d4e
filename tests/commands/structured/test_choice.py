"""Which structures stay, and what the rest becomes, against plain formulations over whole models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands.structured.narrowed import M, layers_of, loaded, outputs_of, records
from tests.solvers.test_structures import damped, plain_columns, plain_greedy, plain_hessian
from tests.support.running import run
from tests.support.tiny import GROUPED, load_tensors, make_model, make_tokens


def gather(model, layer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear module of a layer reads, [windows, tokens, cols] in float64."""
    linears = {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
    read: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _module, inputs, name=name: read.update({name: inputs[0].double().view(*tokens.shape, -1)})
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return read


def plain_outliers(layer, read, groups: int, unit: str) -> list[tuple[float, float]]:
    """Of each structure: its share of entries of Wanda's metric above M times the layer's mean, and their mean."""
    metric = {
        name: layer.get_parameter(f"{name}.weight").double().abs() * (x.square().sum((0, 1)) / len(x)).sqrt()
        for name, x in read.items()
    }
    threshold = M * torch.cat([entries.flatten() for entries in metric.values()]).mean()
    owned = []
    for name, entries in metric.items():
        own = ("mlp" in name or "fc" in name) == (unit == "neurons")
        if own and "qkv" in name:
            owned += entries.split([groups * 8, groups * 4, groups * 4])
        elif own and "gate_up" in name:
            owned += entries.chunk(2)
        elif own:
            owned.append(entries.t() if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")) else entries)
    count = groups if unit == "groups" else len(owned[0])
    entries = torch.cat([part.reshape(count, -1) for part in owned], 1)
    return list(zip((entries > threshold).double().mean(1).tolist(), entries.mean(1).tolist(), strict=True))


def plain_choice(layer, read, name: str, unit: str, score: str, groups: int, count: int) -> list[int]:
    """Indices of the structures that stay."""
    weight, x = layer.get_parameter(f"{name}.weight").data.double(), read[name]
    structures = groups if unit == "groups" else weight.shape[1]
    size = weight.shape[1] // structures
    if score == "obs":  # a ReLU leaves neurons that are never active, which cost nothing
        weight = weight * (x != 0).any(0).any(0)
        return plain_greedy(weight, damped(plain_hessian(x), 0.01), size, count)
    if score == "outlier":
        scores = plain_outliers(layer, read, groups, unit)
    elif unit == "neurons":
        scores = x.abs().sum((0, 1)).tolist()
    else:
        width = layer.self_attn.head_dim  # each query head of a group on its own
        heads = [
            (x[..., k : k + width] @ weight[:, k : k + width].T).abs().sum() for k in range(0, len(x[0, 0]), width)
        ]
        scores = torch.stack(heads).view(groups, -1).sum(1).tolist()
    return sorted(sorted(range(structures), key=lambda k: scores[k], reverse=True)[:count])


def corrected(weight: torch.Tensor, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The columns that stay where they take on what the others gave: ridge regression in float64."""
    hessian = plain_hessian(x)
    inner = damped(hessian[kept][:, kept], 0.01)
    change = weight.double() @ hessian[:, kept] - weight.double()[:, kept] @ hessian[kept][:, kept]
    return weight.double()[:, kept] + torch.linalg.solve(inner, change.T).T


def relative_error(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - other).double().T).square().sum() / (x @ weight.double().T).square().sum())


@pytest.mark.parametrize(
    ("family", "score", "correction"),
    [
        *((family, score, True) for family in ("llama-3.1", "phi3") for score in ("amp", "outlier", "obs")),
        *(("llama-3.1", score, False) for score in ("amp", "outlier", "obs")),
        ("qwen2", "outlier", True),
        ("opt", "amp", True),
        ("opt", "outlier", False),
        ("opt", "obs", True),
    ],
)
def test_equals_the_loop_over_a_whole_model(family, score, correction, tmp_path):
    make_model(tmp_path / "model", family, configs=GROUPED)
    make_tokens(tmp_path / "tokens.npy")
    fields = {"outlier_m": M} if score == "outlier" else {}
    result = run(tmp_path, "o", structured=0.3, score=score, correction=correction, shards=2, **fields)
    widths, groups = result.structure.after, result.structure.before.groups
    kept, written = records(tmp_path / "o"), load_tensors(tmp_path / "o")

    tokens = torch.from_numpy(np.load(tmp_path / "tokens.npy"))
    model, dense = loaded(tmp_path / "model"), loaded(tmp_path / "model")
    for index, layer in enumerate(layers_of(model)):
        # The layers below are narrow only where they are corrected; without that the dense model's activations judge.
        read = gather(*((model, layer) if correction else (dense, layers_of(dense)[index])), tokens)
        cuts = {}
        for name, unit in zip(outputs_of(family), ("groups", "neurons"), strict=True):
            count = getattr(widths, unit)
            choice = plain_choice(layer, read, name, unit, score, groups, count)
            assert kept[index][unit] == choice, (index, unit)
            weight = layer.get_parameter(f"{name}.weight").data
            columns = plain_columns(choice, weight.shape[1] // groups if unit == "groups" else 1)
            if len(columns) == weight.shape[1]:
                continue
            uncorrected, cuts[name] = torch.zeros_like(weight), torch.zeros_like(weight)
            uncorrected[:, columns] = weight[:, columns]
            cuts[name][:, columns] = (
                corrected(weight, read[name], columns).float() if correction else weight[:, columns]
            )
            found = next(tensor for key, tensor in written.items() if key.endswith(f"layers.{index}.{name}.weight"))
            assert torch.allclose(found, cuts[name][:, columns], rtol=1e-3 * correction, atol=1e-4 * correction)
            error = relative_error(weight, cuts[name], read[name])
            assert result.structure.layers[index].errors[name] == pytest.approx(error, rel=1e-2)
            assert not correction or error < 0.95 * relative_error(weight, uncorrected, read[name])
        for name, weight in cuts.items():
            layer.get_parameter(f"{name}.weight").data.copy_(weight)


@pytest.fixture(scope="module")
def texts(english_model, tmp_path_factory) -> dict[str, str]:
    """The beginnings of two texts that the trained model has not seen."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calibration-english.txt", "recovery-english.txt"):
        (folder / name).write_text((Path(english_model).parents[1] / "data" / name).read_text()[:100_000])
    return {"calibration": str(folder / "calibration-english.txt"), "eval": str(folder / "recovery-english.txt")}


@pytest.mark.parametrize("share", [pytest.param(0.2, marks=pytest.mark.long), 0.4])
def test_correction_lowers_the_perplexity_of_a_trained_model(english_model, texts, share, tmp_path):
    fields = {**texts, "model": english_model, "samples": 16, "seqlen": 128, "wave": 8, "eval_windows": 20}
    corrected, plain = (
        run(tmp_path, f"{correction}", structured=share, correction=correction, **fields).perplexity[texts["eval"]]
        for correction in (True, False)
    )
    assert corrected.before == plain.before < corrected.after < plain.after
