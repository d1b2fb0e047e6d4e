"""The first line of a report, from results as runs of every kind have them."""

import math

import pytest

from shardprune.cli import show
from shardprune.report.result import Evaluation, Result
from shardprune.report.verdict import verdict

PROJECTION = {"layer": 0, "name": "mlp.up_proj", "target": 0.7, "achieved": 0.7}
SIZE = {"parameters_before": 1000, "parameters_after": 1000, "zeros_after": 700}
LESS = {"parameters_before": 1000, "parameters_after": 700}
TRY_ALL = "try --quality best, less sparsity, or calibration text like the text that counts."


def zeros(achieved=0.7, before=0.0, **fields):
    return {"target": 0.7, "allocated": 0.7, "before": before, "achieved": achieved, "layers": [], **fields}


def result(command="prune", after=40.0, before=26.525, recipe=(), size=SIZE, **fields):
    asked = {"method": "sparsegpt", "pattern": "unstructured", "rebuild": "none", "reconstruct": 0, "quality": "fast"}
    text = {"seqlen": 256, "windows": 300, "tokens_sha256": "a"}
    return Result(
        command=command,
        fingerprint="f",
        recipe={"model": "m", "out": "o", **(asked if command == "prune" else {}), **dict(recipe)},
        model=size,
        perplexity={} if after is None else {"../text/wiki.txt": {"before": before, "after": after, **text}},
        seconds={"total": 1.0},
        workers=[],
        restarts=0,
        **fields,
    )


def sparse(achieved=0.7, **fields):
    return result(sparsity={**zeros(achieved), "projections": [PROJECTION]}, **fields)


def removed(command="prune", **fields):
    path = [{"iteration": 1, "step": step, "shape": SHAPE, "removed": 0.3} for step in fields.pop("path", "")]
    structure = {"before": SHAPE, "after": SHAPE, "removed": 0.3, "path": path or None}
    return result(command, size=LESS, structure=structure, **fields)


SHAPE = {"layers": 4, "groups": 2, "heads": 4, "neurons": 64}
ZEROS = "Gained: 70.0% of the projections' weights zero. Lost: perplexity on wiki.txt 26.525 → "


@pytest.mark.parametrize(
    ("before", "achieved", "line"),
    [
        (0.001, 0.7, "Gained: 70.0% of the projections' weights zero. Lost: "),
        (0.5, 0.7, "Gained: 50.0% → 70.0% of the projections' weights zero. Lost: "),
        (0.5, 0.5, "Gained: nothing. Lost: "),
        (0.5, 0.4, "Gained: nothing. Lost: 50.0% → 40.0% of the projections' weights zero, "),
    ],
)
def test_zeros_that_were_there_are_no_gain(before, achieved, line):
    known = {**zeros(achieved, before), "projections": [PROJECTION]}
    assert verdict(result(sparsity=known)).startswith(f"{line}perplexity on wiki.txt 26.525 → 40.000 (1.51 times).")


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (40.0, "40.000 (1.51 times). That is usual for sparsegpt at 70% on small models (1.18 to 2.18 times)."),
        (28.0, "28.000 (1.06 times). That is less than usual for sparsegpt at 70% on small models (1.18 to 2.18"),
        (59.0, "59.000 (2.22 times). That is usual for"),  # another draw of windows does as much
        (
            90.0,
            "90.000 (3.39 times). That is more than is usual for sparsegpt at 70% on small models (1.18 to 2.18 "
            f"times): {TRY_ALL}",
        ),
        (math.nan, f"nan. A model with such a perplexity is of no use: {TRY_ALL}"),
        (math.inf, f"inf. A model with such a perplexity is of no use: {TRY_ALL}"),
    ],
)
def test_zeros_are_gained_and_perplexity_is_lost(after, line):
    assert verdict(sparse(after=after)).startswith(ZEROS + line)


def test_a_share_between_those_measured_is_held_against_the_next_larger_one():
    assert verdict(sparse(0.75, after=60.0)).endswith(
        "Nothing was measured at this share; usual for sparsegpt at 80% on small models: 1.46 to 4.93 times."
    )
    assert "more than is usual even for sparsegpt at 80% on small models" in verdict(sparse(0.75, after=200.0))
    assert verdict(sparse(0.9, after=60.0)).endswith("(2.26 times).")  # beyond what was measured


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"rebuild": "barber"}, "sparsegpt, rebuilt at 70%"),
        ({"reconstruct": 50}, "sparsegpt, trained at 70%"),
        ({"method": "alps", "reconstruct": 100, "quality": "best"}, "alps, trained at 70%"),
        ({"method": "wanda", "allocation": "owl"}, "wanda at 70%"),
    ],
)
def test_what_was_done_beside_the_method_counts(recipe, named):
    said = verdict(sparse(after=200.0, recipe=recipe))
    assert f"more than is usual for {named} on small models" in said
    assert ("--quality best" in said) == (recipe.get("quality") != "best")


def test_structures_are_parameters():
    said = verdict(removed(sparsity={**zeros(0.3, removed=0.3, zeroed=0.0), "projections": []}, after=200.0))
    assert said.startswith("Gained: 30.0% fewer parameters (1,000 → 700). Lost: perplexity")
    assert said.endswith(
        "That is more than is usual for width at 30% on small models (1.97 to 3.90 times): try --quality best, "
        "removing less, or calibration text like the text that counts."
    )
    assert "usual for depth at 30% on small models" in verdict(removed("mop", path="LL"))
    assert "usual for mop at 30% on small models" in verdict(removed("mop", path="LG"))
    assert "--quality" not in verdict(removed("mop", path="LG", after=900.0)), "mop has no dial"


def test_two_ways_together_are_compared_with_none():
    both = {**zeros(0.79, removed=0.3, zeroed=0.49), "projections": [PROJECTION]}
    said = verdict(removed(sparsity=both))
    assert said == (
        "Gained: 30.0% fewer parameters (1,000 → 700), 70.0% of the projections' remaining weights zero. Lost: "
        "perplexity on wiki.txt 26.525 → 40.000 (1.51 times)."
    )


def test_a_model_that_was_sparse_before_is_compared_with_none():
    said = verdict(result(sparsity={**zeros(before=0.5), "projections": [PROJECTION]}))
    assert said.endswith("(1.51 times).")


def test_what_fine_tuning_gives_back_is_gained():
    counts = {"steps": 1, "rows": 1, "held_out_rows": 0, "targets": 1, "parameters_trained": 1, "workers": 1}
    recovery = {**counts, "zeros_before": 700, "zeros_after": 0, "zeros_kept": 0, "losses": []}
    sparsity = {**zeros(0.0, before=0.7), "projections": [PROJECTION]}
    said = verdict(result("recover", 39.0, 52.0, recovery=recovery, sparsity=sparsity))
    assert said == "Gained: perplexity on wiki.txt 52.000 → 39.000 (0.75 times). Lost: zeros (700 → 0)."


def test_what_was_not_measured_is_no_loss_of_nothing():
    assert verdict(sparse(after=None)).endswith("weights zero. Lost: not measured (--eval).")


def test_a_perplexity_that_was_not_finite_before_says_nothing_of_the_model_after():
    healed = verdict(sparse(before=math.inf))
    assert "perplexity on wiki.txt inf → 40.000" in healed.split("Lost")[0]
    assert healed.endswith("Lost: nothing.")


def test_the_text_that_lost_most_is_named():
    found = sparse()
    found.perplexity["b.txt"] = found.perplexity["../text/wiki.txt"].model_copy(update={"before": 10.0, "after": 19.0})
    assert "Lost: perplexity on b.txt 10.000 → 19.000 (1.90 times)." in verdict(found)


@pytest.mark.parametrize(("pruned", "side"), [(151.3, "Gained"), (90.0, "Lost")])
def test_tokens_per_second_count_where_they_were_measured(pruned, side):
    def speed(model, decode):
        rate = {"median": decode, "least": decode, "most": decode}
        return {"model": model, "batch": 4, "prefill": rate, "decode": rate}

    found = sparse()
    latency = {"device": "cpu", "dtype": "float32", "threads": 1, "prompt": 8, "tokens": 8, "rounds": 3, "weights": {}}
    latency["speeds"] = [speed("pruned", pruned), speed("dense", 110.2)]
    found.evaluation = Evaluation.model_validate({"latency": latency})
    part = verdict(found).split("Lost:")[side == "Lost"]
    assert f"decoding 110.2 → {pruned} tokens/s (batch 4 on cpu)" in part
    del found.evaluation.latency.speeds[1]
    assert "tokens/s" not in verdict(found)


def test_a_run_ends_with_the_line_before_its_table(capsys):
    class Settings:
        out, report = None, False

    found = sparse()
    show(found, Settings())
    said = capsys.readouterr().out
    assert " ".join(said.partition("sparsegpt unstructured, o")[0].split()) == verdict(found)
