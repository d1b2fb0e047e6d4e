"""Mixtures of experts are trained as transformers' own code trains them, in one process and in two."""

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.experts import named_tensors
from shardprune.recovery.masks import freeze_zeros
from shardprune.recovery.schedule import learning_rate
from tests.recovery.trainings import checked, furthest, losses, rows_of, same_zeros, train
from tests.support.architectures import CARRYING, MIXED, MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import load_tensors, make_tokens

ALL = {**MIXED, **MIXTURES, "deepseek_v4": CARRYING["deepseek_v4"]}
WAYS = {"full": {"full": True}, "low-rank": {"lora_rank": 4}}
SHAPE = {"length": 24, "batch": 4, "micro_batch": 1, "steps": 3}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Fields of trainings of pruned models by their `model_type`, each made once."""
    made = tmp_path_factory.mktemp("pruned")
    make_tokens(made / "tokens.npy", 20, 24)

    def fields(model_type):
        if not (made / model_type).exists():
            make_architecture(made / "model", model_type, ALL[model_type])
            run(made, made / model_type, sparsity=0.5, method="magnitude")
        return {**SHAPE, "model": str(made / model_type), "data": str(made / "tokens.npy"), "keep_sparsity": True}

    return fields


def plain_training(recipe, targets):
    """The losses of a training of the model that transformers loads, row by row, and its tensors by part."""
    rows, _ = rows_of(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, experts_implementation="eager")
    weights = dict(model.named_parameters())
    if recipe.full:
        trained = list(weights.values())
        for weight in trained:
            freeze_zeros(weight)
    else:
        model.requires_grad_(False)
        parts, generator = named_tensors(model), torch.Generator().manual_seed(recipe.seed)
        masks = {name: parts[f"{name}.weight"] != 0 for name in targets}
        updates = {}
        for name in targets:
            count, cols = masks[name].shape
            drawn = torch.empty(recipe.lora_rank, cols).uniform_(-(cols**-0.5), cols**-0.5, generator=generator)
            updates[name] = torch.zeros(count, recipe.lora_rank, requires_grad=True), drawn.requires_grad_()
        trained = [factor for factors in updates.values() for factor in factors]

    def current():
        if recipe.full:
            return weights
        scale = recipe.lora_alpha / recipe.lora_rank
        moved = {name: masks[name] * (b @ a) * scale for name, (b, a) in updates.items()}
        found = dict(weights)
        for name, update in moved.items():
            path, _, leaf = name.rpartition(".")
            if (own := f"{name}.weight") in weights:
                found[own] = weights[own] + update
                continue
            mixture, _, expert = path.rpartition(".")
            stack = f"{mixture}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
            first = len(update) if leaf == "up_proj" else 0
            added = torch.zeros_like(weights[stack])
            added[int(expert), first : first + len(update)] = update
            found[stack] = found[stack] + added
        return found

    optimizer, record = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay), []
    sequence = torch.cat([rows.order(epoch, recipe.seed) for epoch in range(10)]).tolist()
    for step in range(recipe.steps):
        chosen = sequence[step * recipe.batch : (step + 1) * recipe.batch]
        loss = torch.zeros(())
        for row in chosen:
            tokens = rows.row(row).tokens[None].long()
            logits = functional_call(model, current(), kwargs={"input_ids": tokens, "use_cache": False}).logits
            loss = loss + torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
        loss = loss / rows.targets(chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        rate = learning_rate(step, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.schedule)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        record.append(loss.item())
    final = current()
    for name, weight in weights.items():
        weight.data.copy_(final[name].detach())
    return record, {name: tensor.detach() for name, tensor in named_tensors(model).items()}


@pytest.mark.parametrize("way", WAYS)
def test_experts_are_trained_as_transformers_would(folder, pruned, way, tmp_path):
    fields = {**pruned("qwen3_moe"), **WAYS[way], "zero": 2}
    result = train(folder, tmp_path / "o", **fields)
    projections = [f"model.layers.{entry.layer}.{entry.name}" for entry in result.sparsity.projections]
    record, weights = plain_training(checked(folder, tmp_path / "o", **fields), projections)
    assert losses(result) == pytest.approx(record, abs=1e-5)
    written = load_tensors(tmp_path / "o")
    assert furthest(written, weights) < 2e-5
    assert furthest(written, fields["model"]) > 1e-3
    assert same_zeros(fields["model"], tmp_path / "o")
    assert result.sparsity.achieved == result.sparsity.before == pytest.approx(0.5, abs=1e-3)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report


# Processes whose tokens go to other experts share gradients.
@pytest.mark.parametrize(
    ("way", "zero"),
    [("full", 2), *(pytest.param(*one, marks=pytest.mark.long) for one in [("low-rank", 1), ("full", 0)])],
)
def test_two_processes_train_the_same(folder, pruned, pair, way, zero, tmp_path):
    fields = {**pruned("qwen3_moe"), **WAYS[way], "zero": zero}
    alone = train(folder, tmp_path / "alone", **fields)
    shared = train(folder, tmp_path / "shared", pair, **fields)
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)
    assert furthest(tmp_path / "shared", tmp_path / "alone") < 2e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "model_type",
    [
        "gpt_oss",  # transposed and in turn, with biases
        *(
            pytest.param(model_type, marks=pytest.mark.long)
            for model_type in ("deepseek_v3", "deepseek_v4", "gemma4_text", "jamba", "llama4_text", "nemotron_h")
        ),
        pytest.param("longcat_flash", marks=pytest.mark.long),  # of whose tensors some are in no layer of the model
    ],
)
def test_mixtures_of_other_layouts_are_trained(folder, pruned, way, model_type, tmp_path):
    fields = pruned(model_type)
    result = train(folder, tmp_path / "o", **fields, **WAYS[way])
    before, after = load_tensors(fields["model"]), load_tensors(tmp_path / "o")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: one.shape for name, one in after.items()}
    experts = [name for name in before if ".experts." in name and "shared" not in name and before[name].dim() > 1]
    assert any(not torch.equal(before[name], after[name]) for name in experts)
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in experts)
    assert result.recovery.zeros_kept == result.recovery.zeros_before == result.recovery.zeros_after
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_layers_and_a_mixture_as_teacher(folder, pruned, way, tmp_path):
    fields = {**pruned("qwen3_moe"), **WAYS[way]}
    plain = train(folder, tmp_path / "plain", **fields)
    again = train(folder, tmp_path / "again", **fields, recompute=True)
    assert losses(again) == losses(plain)
    taught = train(folder, tmp_path / "taught", **fields, teacher=fields["model"], temperature=1.0, teacher_weight=1.0)
    assert losses(taught)[0] < losses(plain)[0]


def test_the_third_stage_is_refused(folder, pruned, tmp_path):
    with pytest.raises(InputError, match="^zero: 3 does not partition the experts of a mixture; use 0, 1 or 2$"):
        train(folder, tmp_path / "o", **pruned("qwen3_moe"), zero=3)
    dense = {"model": str(folder / "sparse"), "data": pruned("qwen3_moe")["data"], "length": 24}
    with pytest.raises(InputError, match="^zero: 3 does not partition"):
        train(folder, tmp_path / "o", **dense, teacher=pruned("qwen3_moe")["model"], zero=3)
    assert not (tmp_path / "o").exists()
