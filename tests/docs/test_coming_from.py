"""What docs/coming-from.md says of other tools: their rules as plain code beside ours, and our options."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

from shardprune.cli import app
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import DROPOUT, RecoverRecipe
from shardprune.solvers import barber, magnitude, sparsegpt, wanda
from shardprune.solvers.allocation import mosaic, owl
from shardprune.solvers.allocation.allocation import Projection
from shardprune.solvers.allocation.mixed import in_groups
from shardprune.solvers.outliers import Outliers
from shardprune.solvers.pattern import NM, Unstructured
from shardprune.solvers.statistics import InputStatistics
from shardprune.storage.windows import calibration_windows

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
OF_LOW_RANK_UPDATES = {"--learning-rate": 3e-4, "--lora-dropout": DROPOUT}  # fields that other fields decide
RECIPES = {recipe.command: recipe for recipe in (PruneRecipe, RebuildRecipe, MopRecipe, RecoverRecipe)} | {
    "evaluate": EvaluateRecipe
}


# -- our options in its tables ----------------------------------------------------------------------------


def table_rows(page: str) -> list[tuple[str, str]]:
    """The command that a table's header names, and a cell of its columns after the first, for all such tables."""
    rows, command = [], None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            command = None
        elif len(cells) > 1 and (header := re.fullmatch(r"`shardprune (\w+)`", cells[1].strip(" |"))):
            command = header[1]
        elif command and not set(line) <= set("|-"):
            rows += [(command, cell) for cell in cells[1:]]
    return rows


def named_options(page: str) -> list[tuple[str, str, str | None]]:
    """Every (command, option, value) of ours in the tables."""
    found = []
    for command, cell in table_rows(page):
        for code in re.findall(r"`([^`]+)`", cell):
            words = shlex.split(code)
            own = words[1] if words[0] == "shardprune" else command
            for word, after in zip(words, [*words[1:], "--"], strict=True):
                if word.startswith("--"):
                    found.append((own, word, None if after.startswith("--") else after))
    return found


def options_of(command: str) -> set[str]:
    parameters = typer.main.get_command(app).commands[command].params
    return {flag for parameter in parameters for flag in [*parameter.opts, *parameter.secondary_opts]}


def test_every_option_of_ours_in_a_table_exists_and_takes_the_value():
    found = named_options(PAGE.read_text())
    assert len(found) > 70
    assert {command for command, _, _ in found} == set(RECIPES)
    for command, option, value in found:
        assert option in options_of(command), f"{command} has no {option}"
        field = option.removeprefix("--").replace("-", "_")
        choices = RECIPES[command].choices(field) if field in RECIPES[command].model_fields else []
        assert value is None or not choices or value in choices, f"{command} {option} does not take {value}"


def test_an_option_that_is_none_of_ours_is_found():
    page = (
        "| theirs | `shardprune prune` | |\n|---|---|---|\n| `--x` | `--method wanda` | `shardprune mop --paht L` |\n"
    )
    assert named_options(page) == [("prune", "--method", "wanda"), ("mop", "--paht", "L")]
    assert "--paht" not in options_of("mop")


def test_the_defaults_are_those_that_the_page_says():
    """What the tables call "our default" or "the default of both"."""
    page = PAGE.read_text()
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("|") and "default" in line]
    for line in rows:
        if not any(words in line[-1] for words in ("our default", "default of both")):
            continue
        command = next(name for name, cell in table_rows(page) if cell == line[1].strip())
        words = shlex.split(" ".join(re.findall(r"`([^`]+)`", line[1])))
        for option, value in zip(words[::2], words[1::2], strict=True):
            field = RECIPES[command].model_fields[option.removeprefix("--").replace("-", "_")]
            default = OF_LOW_RANK_UPDATES.get(option, field.default)
            default = ", ".join(default) if isinstance(default, tuple) else default
            assert str(default) == value or float(default) == float(value), (command, option, value)


# -- the same calibration tokens --------------------------------------------------------------------------


def test_tokens_that_the_page_exports_are_used_as_they_are(tmp_path, monkeypatch):
    """The page's code runs on a loader that gives what theirs gives: pairs of [1, seqlen] token ids."""
    [code] = [part for part in re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL) if "numpy.save" in part]
    tokens = torch.randint(0, 50, (128, 2048), generator=torch.Generator().manual_seed(0))

    def get_loaders(name, nsamples, seed, seqlen, tokenizer):
        assert (name, nsamples, seqlen, tokenizer) == ("c4", *tokens.shape, "tokenizer")
        return [(row[None], row[None].clone()) for row in tokens], None

    tokenizers = SimpleNamespace(from_pretrained=lambda name, use_fast: "tokenizer")
    for name, module in {
        "lib": SimpleNamespace(),
        "lib.data": SimpleNamespace(get_loaders=get_loaders),
        "transformers": SimpleNamespace(AutoTokenizer=tokenizers),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    for seed in (0, 1):
        windows = calibration_windows("calibration.npy", lambda: pytest.fail("no text"), *tokens.shape, seed, 50)
        assert torch.equal(windows, tokens)


# -- wanda, magnitude, sparsegpt --------------------------------------------------------------------------


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def statistics_of(x: torch.Tensor, kind: str = "squares") -> InputStatistics:
    statistics = InputStatistics.empty(kind, x.shape[-1])
    statistics.add(x, len(x))
    return statistics


def inputs(cols: int, samples: int = 4, tokens: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(cols)
    return torch.randn(samples, tokens, cols, generator=generator) * torch.rand(cols, generator=generator)


def their_wanda_metric(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|w| times the root of the samples' mean of ||x||^2, sample by sample."""
    running = torch.zeros(x.shape[-1])
    for count, sample in enumerate(x):
        running = running * (count / (count + 1)) + sample.norm(dim=0) ** 2 / (count + 1)
    return weight.abs() * running.sqrt()


def their_wanda_mask(weight: torch.Tensor, x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The first int(cols * sparsity) of each row in ascending order."""
    order = their_wanda_metric(weight, x).sort(dim=1, stable=True).indices
    mask = torch.zeros_like(weight, dtype=torch.bool)
    return mask.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)


def test_wanda_has_their_masks_where_the_share_of_a_row_is_whole_and_the_number_asked_for_elsewhere():
    weight, x = normal(40, 128), inputs(128)
    ours = wanda.prune(weight, statistics_of(x), Unstructured(), 0.5).mask
    assert torch.equal(ours, their_wanda_mask(weight, x, 0.5))

    ours = wanda.prune(weight, statistics_of(x), Unstructured(), 0.7).mask  # 89.6 of a row
    theirs = their_wanda_mask(weight, x, 0.7)
    assert set(theirs.sum(1).tolist()) == {89}
    assert set(ours.sum(1).tolist()) == {89, 90}
    assert int(ours.sum()) == 40 * 128 * 7 // 10 > int(theirs.sum())
    assert not (theirs & ~ours).any()


def test_what_cutting_down_costs_on_llama_7b():
    """The figures of the page: 2,867 and 7,705 of a row, 0.69995 in all."""
    rows = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    zeros = sum(count * int(cols * 0.7) for count, cols in rows)
    assert (int(4096 * 0.7), int(11008 * 0.7)) == (2867, 7705)
    assert f"{zeros / sum(count * cols for count, cols in rows):.5f}" == "0.69995"
    assert 32 * sum(cols // 128 for _, cols in rows) == 8896  # blocks of SparseGPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_magnitude_has_the_number_asked_for_where_their_threshold_takes_all_that_equal_it(dtype):
    weight = (normal(256, 256) * 0.02).to(dtype).float()
    wanted = int(weight.numel() * 0.7 + 0.5)
    theirs = weight.abs() <= weight.abs().flatten().sort().values[int(weight.numel() * 0.7)]
    ours = magnitude.prune(weight, None, Unstructured(), 0.7).mask
    assert int(ours.sum()) == wanted
    assert not (ours & ~theirs).any()
    assert int(theirs.sum()) >= int(weight.numel() * 0.7) + 1
    if dtype is not torch.float32:
        assert int(theirs.sum()) > wanted + 10


def their_sparsegpt(weight: torch.Tensor, x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Block by block of 128 columns, with a threshold that is taken along; in double precision."""
    x = x.double().reshape(-1, x.shape[-1])
    hessian = 2 / 4 * x.t() @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight, mask = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool)
    for left in range(0, weight.shape[1], 128):
        block = slice(left, left + 128)
        scores = weight[:, block] ** 2 / upper.diagonal()[block] ** 2
        mask[:, block] = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        for column in range(left, left + 128):
            lost = weight[:, column] * mask[:, column] / upper[column, column]
            weight[:, column:] -= lost[:, None] * upper[column, column:]
    return mask


def test_sparsegpt_has_one_zero_less_in_every_block():
    weight, x = normal(24, 256), inputs(256)
    theirs = their_sparsegpt(weight, x, 0.5)
    ours = sparsegpt.prune(weight, statistics_of(x, "gram"), Unstructured(), 0.5).mask
    assert [int(theirs[:, left : left + 128].sum()) for left in (0, 128)] == [24 * 64 + 1] * 2
    assert [int(ours[:, left : left + 128].sum()) for left in (0, 128)] == [24 * 64] * 2
    assert not (ours[:, :128] & ~theirs[:, :128]).any()
    assert int((ours ^ theirs).sum()) < 0.02 * ours.numel()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (5, 8)])
def test_n_of_m_counts_zeros_there_and_nonzeros_here(n, m):
    weight, x = normal(16, 64), inputs(64)
    metric = their_wanda_metric(weight, x)
    theirs = torch.zeros_like(weight, dtype=torch.bool)
    for left in range(0, 64, m):
        theirs.scatter_(1, left + metric[:, left : left + m].topk(n, dim=1, largest=False).indices, True)
    assert float(theirs.float().mean()) == n / m
    assert torch.equal(theirs, wanda.prune(weight, statistics_of(x), NM(m - n, m), 0).mask)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {n}:{m} |"))
    assert row == f"| {n}:{m} | {100 * (1 - n / m):g} % | {100 * n / m:g} % | `--pattern {m - n}:{m}` |"


def test_the_variant_has_the_number_asked_for_where_theirs_comes_near():
    weight, x = normal(64, 96), inputs(96)
    metric = their_wanda_metric(weight, x)
    ordered = metric.sort(dim=1).values
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        counts = (ordered.cumsum(1) <= alpha * metric.sum(1, keepdim=True)).sum(1, keepdim=True)
        theirs = metric <= ordered.gather(1, counts - 1)
        found = float(theirs.float().mean())
        if abs(found - 0.6) <= 0.001 or high - low < 0.001:
            break
        low, high = (low, alpha) if found > 0.6 else (alpha, high)
        alpha = (low + high) / 2
    ours = wanda.prune_variant(weight, statistics_of(x), Unstructured(), 0.6).mask
    assert int(ours.sum()) == int(64 * 96 * 0.6 + 0.5)
    assert int((ours ^ theirs).sum()) == abs(int(theirs.sum()) - int(ours.sum()))  # one holds the other
    assert len(set(ours.sum(1).tolist())) > 1


# -- OWL and Mosaic ---------------------------------------------------------------------------------------

NAMES = {"q": 64, "o": 64, "down": 192}  # numbers of weights


def model(layers: int, seed: int = 0) -> tuple[list[Projection], list[Outliers]]:
    draw = np.random.default_rng(seed)
    projections = [Projection(layer, name, size) for layer in range(layers) for name, size in NAMES.items()]
    return projections, [
        Outliers(draw.uniform(0, 9), {name: draw.uniform(0, 9) for name in NAMES}) for _ in range(layers)
    ]


def scaled(ratios: list[float], width: float) -> np.ndarray:
    values = np.array(ratios)
    return (values - values.min()) / (values.max() - values.min()) * width


def test_owl_has_their_shares_where_nothing_is_clipped_and_the_target_as_its_mean_where_something_is():
    projections, outliers = model(6)
    profile = scaled([layer.layer for layer in outliers], 2 * 0.08)
    theirs = 1 - (profile - profile.mean() + 1 - 0.7)
    ours = owl.allocate(projections, outliers, 0.7, 0.08)
    assert np.allclose([ours[layer, "q"] for layer in range(6)], theirs, atol=1e-12)

    profile = scaled([layer.layer for layer in outliers], 2 * 0.4)
    theirs = 1 - (profile - profile.mean() + 1 - 0.2)
    assert theirs.min() < 0
    theirs[theirs <= 0] = 0.01
    ours = owl.allocate(projections, outliers, 0.2, 0.4)
    assert np.mean([ours[layer, "q"] for layer in range(6)]) == pytest.approx(0.2, abs=1e-9)
    assert abs(theirs.mean() - 0.2) > 0.01


def test_mosaic_released_is_theirs():
    projections, outliers = model(5, seed=1)
    profile = scaled([layer.layer for layer in outliers], 2 * 0.08)
    ours = mosaic.allocate_as_released(projections, outliers, 0.7, 0.08)
    for name in NAMES:
        own = scaled([layer.projections[name] for layer in outliers], 2 * 0.08)
        theirs = 1 - (profile - own.mean() + 1 - 0.7)
        assert np.allclose([ours[layer, name] for layer in range(5)], theirs, atol=1e-12)
    assert abs(np.mean(list(ours.values())) - 0.7) > 1e-3


def test_mixed_n_of_m_has_the_mean_asked_for_where_theirs_is_rounded_layer_by_layer():
    means = []
    for seed in range(20):
        projections, outliers = model(8, seed)
        profile = scaled([layer.layer for layer in outliers], 2.0)
        theirs = 5 - np.round(profile - profile.mean())  # 5:8 with --Lamda 2: zeros of 8
        shares = in_groups(owl.allocate(projections, outliers, 5 / 8, 2.0 / 16), 5 / 8, 8, dict.fromkeys(range(8), 1))
        ours = np.array([8 * shares[layer, "q"] for layer in range(8)])
        assert ours.mean() == pytest.approx(5)
        assert np.abs(ours - theirs).max() <= 1
        means.append(theirs.mean())
    assert len(set(means)) > 1


# -- LLM-Barber -------------------------------------------------------------------------------------------


def test_wandd_is_wanda():
    weight, x = normal(20, 64), inputs(64)
    squares = torch.zeros_like(weight)
    for sample in x:
        squares += torch.ones(20, len(sample)) @ sample**2 / len(x)  # for every weight, not every column
    order = (weight.abs() * squares.sqrt()).sort(dim=1, stable=True).indices[:, :32]
    theirs = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(theirs, wanda.prune(weight, statistics_of(x), Unstructured(), 0.5).mask)


def their_swap(scores: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
    """One comparison group, flat: those above a threshold come back, those below another go."""
    pruned, kept = scores[mask].sort(descending=True).values, scores[~mask].sort().values
    size = min(len(pruned), len(kept))
    number = int((pruned[:size] > kept[:size]).sum() * threshold)
    return (mask & ~(scores > pruned[number])) | (~mask & (scores < kept[number]))


GRANULARITIES = dict(re.findall(r"`--prune_granularity (\w+)` \| `--rebuild-granularity (\w+)`", PAGE.read_text()))


@pytest.mark.parametrize("theirs", ["output1", "input1", "layer", "block"])
def test_barber_swaps_what_theirs_swaps_at_every_granularity(theirs):
    scores = [normal(30, 120, seed=1).abs(), normal(40, 90, seed=2).abs()]
    masks = [normal(30, 120, seed=3) > 0, normal(40, 90, seed=4) > 0]
    if theirs == "output1":
        wanted = [
            torch.stack([their_swap(*row, 0.2) for row in zip(s, m, strict=True)])
            for s, m in zip(scores, masks, strict=True)
        ]
    elif theirs == "input1":
        wanted = [
            torch.stack([their_swap(*column, 0.2) for column in zip(s.t(), m.t(), strict=True)]).t()
            for s, m in zip(scores, masks, strict=True)
        ]
    elif theirs == "layer":
        wanted = [their_swap(s.flatten(), m.flatten(), 0.2).view_as(m) for s, m in zip(scores, masks, strict=True)]
    else:
        flat = their_swap(torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks]), 0.2)
        wanted = [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in masks]), masks, strict=True)]
    block = [barber.Masked(s, m, Unstructured()) for s, m in zip(scores, masks, strict=True)]
    found, swaps = barber.rebuild(block, GRANULARITIES[theirs], 0.2)
    assert swaps > 0
    for mine, yours in zip(found, wanted, strict=True):
        assert torch.equal(mine, yours)
