from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from shardprune.commands.prepare_mop import path_plan_of
from shardprune.errors import InputError
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.path import walk
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.solvers.pattern import NM, Mixed
from shardprune.solvers.rebuilding import Rebuilding

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"


OWL = {"sparsity": 0.5, "allocation": "owl"}
BARBER = {"sparsity": 0.5, "rebuild": "barber"}
STRUCTURED = {"structured": 0.2}


def recipe(**fields) -> PruneRecipe:
    return PruneRecipe.checked({"model": "m", "out": "o", **fields})


def test_options_override_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "out": "o", "sparsity": 0.5, "samples": 64, "eval": ["stdlib"]}))
    loaded = PruneRecipe.load(file, {"samples": 32})
    assert (loaded.samples, loaded.sparsity, loaded.eval) == (32, 0.5, ("stdlib",))


def test_one_source_may_stand_alone():
    assert recipe(sparsity=0.5, eval="stdlib").eval == ("stdlib",)


def test_a_pattern_fixes_the_sparsity():
    assert recipe(pattern="2:8").target == 0.75
    assert recipe(pattern="2:8").zeros == NM(2, 8)
    assert recipe(pattern="2:8", sparsity=0.75).target == 0.75


def test_what_is_removed_counts_towards_the_target():
    assert (recipe(**STRUCTURED).target, recipe(**STRUCTURED).zeroes) == (0.2, False)
    assert recipe(**STRUCTURED, sparsity=0.6).target == 0.6
    assert recipe(**STRUCTURED, sparsity=0.6).zeroing.of_rest(0.2) == pytest.approx(0.5)
    assert recipe(**STRUCTURED, pattern="2:4").target == pytest.approx(0.2 + 0.8 * 0.5)
    assert recipe(**STRUCTURED, pattern="2:4", sparsity=0.6).zeroing.of_rest(0.25) == 0.5
    assert recipe(**STRUCTURED, sparsity=0.6).structures.job().target == 0.2
    assert recipe(sparsity=0.6).job().removal is None


def test_the_run_that_removes_structures_takes_what_concerns_it():
    whole = recipe(
        **{**STRUCTURED, "sparsity": 0.5, "method": "wanda", "seed": 7, "shards": 2, "eval": ("stdlib",)},
        **{"score": "outlier", "outlier_m": 3.0, "correction": False, "measure_error": False},
    )
    narrowing = whole.structures
    shared = set(type(narrowing).model_fields) & set(PruneRecipe.model_fields)
    assert {"score", "correction", "outlier_m", "seed", "shards", "eval", "measure_error"} <= shared
    assert all(getattr(narrowing, name) == getattr(whole, name) for name in shared)
    assert not {"method", "sparsity", "rebuild"} & shared


def test_waves_do_not_depend_on_the_machine():
    assert recipe(sparsity=0.5, seqlen=256).sequences_per_wave == 16
    assert recipe(sparsity=0.5, seqlen=8192).sequences_per_wave == 1
    assert recipe(sparsity=0.5, wave=3).sequences_per_wave == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: 1.0 is not allowed; use a number from 0 to below 1"),
        ({"sparsity": -0.1}, "sparsity: -0.1 is not allowed; use a number from 0 to below 1"),
        ({}, "sparsity: missing; give a number from 0 to below 1, or a pattern such as 2:4"),
        (
            {"pattern": "4:2"},
            "pattern: '4:2' is not allowed; use 'unstructured', N:M with 0 < N < M such as 2:4, or mixed:M",
        ),
        ({"pattern": "2:4", "sparsity": 0.3}, "sparsity: 0.3 does not fit the pattern 2:4, which is 0.5"),
        (
            {"sparsity": 0.5, "method": "obs"},
            "method: 'obs' is not allowed; use one of magnitude, wanda, sparsegpt, alps",
        ),
        ({"sparsity": 0.5, "refit": True, "rebuild": "barber"}, "refit: True has no effect without keep_corrected"),
        ({"sparsity": 0.5, "damping": 1.5}, "damping: 1.5 is not allowed; use a number from 0 to 1, or auto"),
        ({"sparsity": 0.5, "damping": "much"}, "damping: 'much' is not allowed; use a number from 0 to 1, or auto"),
        ({"sparsity": 0.5, "damping": True}, "damping: True is not allowed; use a number from 0 to 1, or auto"),
        (
            {"sparsity": 0.5, "method": "wanda", "damping": 0.1},
            "damping: 0.1 has no effect without a method that takes",
        ),
        ({"sparsity": 0.5, "damping": "auto", "samples": 7}, "samples: 7 is too few for damping auto, which holds out"),
        ({"sparsity": 0.5, "refit": True, "samples": 7}, "samples: 7 is too few for refit, which holds out some"),
        ({"sparsity": 0.5, "damping": "auto", "targets": "stream"}, "damping: 'auto' does not go with targets stream"),
        ({"structured": 0.2, "refit": True}, "refit: True has no effect without a sparsity or a pattern N:M"),
        ({"pattern": "mixed:8"}, "sparsity: missing"),
        (
            {"pattern": "mixed:8", "sparsity": 0.9},
            "sparsity: 0.9 is more than mixed:8 can have, which keeps at least 1",
        ),
        (
            {"pattern": "mixed:8", "sparsity": 0.5, "allocation": "mosaic"},
            "allocation: 'mosaic' does not fit the pattern mixed:8; use owl",
        ),
        ({"pattern": "2:4", "allocation": "owl"}, "allocation: 'owl' needs a sparsity to share out; 2:4 gives every"),
        ({"sparsity": 0.99, "allocation": "owl"}, "sparsity: 0.99 leaves owl no room, which takes at most 0.99 of any"),
        ({"sparsity": 0.5, "allocation": "evenly"}, "allocation: 'evenly' is not allowed; use one of uniform, owl, mo"),
        ({**OWL, "outlier_m": 0}, "outlier_m: 0 is not allowed; use greater than 0"),
        ({**OWL, "outlier_m": float("inf")}, "outlier_m: inf is not allowed; use a finite number"),
        ({**OWL, "outlier_lambda": -0.1}, "outlier_lambda: -0.1 is not allowed; use greater than or equal to 0"),
        ({**OWL, "outlier_lambda": 0.6}, "outlier_lambda: 0.6 is not allowed; use less than or equal to 0.5"),
        ({**OWL, "outlier_lambda": float("nan")}, "outlier_lambda: nan is not allowed; use "),
        (
            {"sparsity": 0.5, "outlier_m": 3},
            "outlier_m: 3.0 has no effect without an allocation (owl, mosaic) or a score (outlier) that looks at them",
        ),
        (
            {"sparsity": 0.5, "wanda_variant": True},
            "wanda_variant: True has no effect without method wanda and pattern",
        ),
        (
            {"pattern": "2:4", "method": "wanda", "wanda_variant": True},
            "wanda_variant: True has no effect without method wanda and pattern unstructured",
        ),
        ({"sparsity": 0.5, "rebuild_threshold": 0.1}, "rebuild_threshold: 0.1 has no effect without rebuild barber"),
        ({"sparsity": 0.5, "keep_corrected": True}, "keep_corrected: True has no effect without rebuild barber"),
        ({**BARBER, "rebuild_threshold": 1.5}, "rebuild_threshold: 1.5 is not allowed; use less than or equal to 1"),
        (
            {**BARBER, "rebuild_granularity": "layer"},
            "rebuild_granularity: 'layer' is not allowed; use one of row, col",
        ),
        ({**BARBER, "rebuild_metric": "WD"}, "rebuild_metric: 'WD' is not allowed; use one of weight-gradient, weight"),
        ({"structured": 0}, "structured: 0 is not allowed; use a number above 0 and below 1"),
        ({"structured": 1}, "structured: 1 is not allowed; use a number above 0 and below 1"),
        ({"structured": 1.5, "sparsity": 0.5}, "structured: 1.5 is not allowed; use a number above 0 and below 1"),
        ({"structured": float("nan")}, "structured: nan is not allowed; use a finite number"),
        ({"structured": "x"}, "structured: 'x' is not allowed; use "),
        ({**STRUCTURED, "sparsity": 0.1}, "sparsity: 0.1 is less than structured removes, 0.2"),
        ({**STRUCTURED, "sparsity": 0}, "sparsity: 0.0 is less than structured removes, 0.2"),
        ({**STRUCTURED, "pattern": "2:4", "sparsity": 0.5}, "sparsity: 0.5 does not fit the pattern 2:4, which is 0.6"),
        (
            {**STRUCTURED, "pattern": "mixed:8", "sparsity": 0.5},
            "pattern: 'mixed:8' does not go with structured, after which N cannot average to the target",
        ),
        ({**STRUCTURED, "pattern": "mixed:8"}, "sparsity: missing"),
        ({**STRUCTURED, "sparsity": 0.995, "allocation": "owl"}, "sparsity: 0.995 leaves owl no room"),
        ({"sparsity": 0.5, "score": "amp"}, "score: 'amp' has no effect without structured"),
        ({"sparsity": 0.5, "correction": False}, "correction: False has no effect without structured"),
        ({**STRUCTURED, "score": "wanda"}, "score: 'wanda' is not allowed; use one of amp, outlier, obs"),
        ({**STRUCTURED, "method": "wanda"}, "method: 'wanda' has no effect without a sparsity or a pattern N:M"),
        ({**STRUCTURED, "allocation": "owl"}, "allocation: 'owl' has no effect without a sparsity or a pattern N:M"),
        ({**STRUCTURED, "rebuild": "barber"}, "rebuild: 'barber' has no effect without a sparsity or a pattern N:M"),
        ({**STRUCTURED, "wanda_variant": True}, "wanda_variant: True has no effect without"),
        ({**STRUCTURED, "outlier_m": 3}, "outlier_m: 3.0 has no effect without an allocation"),
        ({**STRUCTURED, "score": "outlier", "outlier_m": 0}, "outlier_m: 0 is not allowed; use greater than 0"),
        ({"sparsity": 0.5, "samples": 0}, "samples: 0 is not allowed; use greater than or equal to 1"),
        ({"sparsity": 0.5, "sparsty": 0.5}, "sparsty: no field of a recipe has this name; did you mean sparsity?"),
        ({"sparsity": 0.5, "eval": ["x.csv"]}, "eval: 'x.csv' is no known source"),
        ({"sparsity": 0.5, "out": ""}, "out: '' is not allowed"),
        ({"sparsity": 0.5, "out": "a\0b"}, r"out: 'a\x00b' holds a character that is in no text and no file's name"),
        ({"sparsity": 0.5, "eval": ["x\udc80.txt"]}, r"eval: 'x\udc80.txt' holds a character that is in no text"),
        ({"sparsity": 0.5, "a\ud800": 1}, r"a\ud800: 'a\ud800' holds a character that is in"),
        ({"sparsity": 0.5, "samples": 10**9}, "samples: 1000000000 is not allowed; use less than or equal to 1000000"),
        ({"sparsity": 0.5, "threads": 1_000_000}, "threads: 1000000 is not allowed; use less than or equal to 1024"),
        ({"sparsity": 0.5, "replicas": 10**9}, "replicas: 1000000000 is not allowed; use less than or equal to 10000"),
        ({"sparsity": 0.5, "seed": 10**30}, f"seed: {10**30} is not allowed; use at most 9223372036854775807"),
        ({"sparsity": 0.5, "method": ["x" * 10**6] * 9}, "method: ['xxx"),
        ({"sparsity": 0.5, "out": None}, "out: None is not allowed"),
    ],
)
def test_bad_fields_give_one_line(fields, message):
    with pytest.raises(InputError) as caught:
        recipe(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_mixed_patterns_are_allocated_by_owl():
    assert recipe(pattern="mixed:8", sparsity=0.5).allocation == "owl"
    assert recipe(pattern="mixed:8", sparsity=0.875).zeros == Mixed(8)
    assert recipe(sparsity=0.5).allocation == "uniform"


def test_a_recorded_recipe_is_a_recipe():
    """What result.json holds can be run again: fields without effect have their defaults there."""
    composite = {**STRUCTURED, "score": "outlier", "outlier_m": 3, "sparsity": 0.5}
    for fields in (OWL, BARBER, {"pattern": "2:4"}, {"pattern": "mixed:8", "sparsity": 0.5}, STRUCTURED, composite):
        assert PruneRecipe.checked(recipe(**fields).record()) == recipe(**fields)
    structured = recipe(**STRUCTURED, score="outlier", outlier_m=3)
    assert PruneRecipe.checked(structured.structures.record()) == structured


def test_a_recipe_for_rebuilding():
    rebuild = RebuildRecipe.checked({"model": "m", "sparse": "s", "out": "o", "rebuild_granularity": "block"})
    assert rebuild.job().rebuilding == Rebuilding(0.01, "block", "weight-gradient", False)
    assert recipe(sparsity=0.5).job().rebuilding is None
    assert recipe(**BARBER, rebuild_threshold=0.1).job().rebuilding == Rebuilding(0.1, "row", "weight-gradient", False)
    assert RebuildRecipe.checked({"model": "m", "sparse": "s", "out": "o", "pattern": "2:4"}).pattern == "2:4"
    with pytest.raises(InputError, match="pattern: 'mixed:8' is not allowed; use auto, which finds N of every layer"):
        RebuildRecipe.checked({"model": "m", "sparse": "s", "out": "o", "pattern": "mixed:8"})
    with pytest.raises(InputError, match="sparse: missing"):
        RebuildRecipe.checked({"model": "m", "out": "o"})
    with pytest.raises(InputError, match="sparsity: no field of a recipe has this name; did you mean sparse?"):
        RebuildRecipe.checked({"model": "m", "sparse": "s", "out": "o", "sparsity": 0.5})


def barber(method: str, granularity: str, threshold: float) -> dict:
    return {
        "method": method,
        "rebuild": "barber",
        "rebuild_granularity": granularity,
        "rebuild_threshold": threshold,
        "rebuild_metric": "weight-gradient",
        "keep_corrected": False,
        "allocation": "uniform",
    }


def outliers(method: str, allocation: str) -> dict:
    spread = {"outlier_m": 5, "outlier_lambda": 0.08}
    return {"method": method, "allocation": allocation, "target": 0.7, "rebuild": "none", **spread}


PUBLISHED = {
    "owl-wanda-70": outliers("wanda", "owl"),
    "owl-sparsegpt-70": outliers("sparsegpt", "owl"),
    "mosaic-70": outliers("sparsegpt", "mosaic"),
    "mosaic-released-70": outliers("sparsegpt", "mosaic-released"),
}
for name, settings in {
    "magnitude": barber("magnitude", "block", 0.1),
    "wanda": barber("wanda", "row", 0.01),
    "sparsegpt-llama": barber("sparsegpt", "projection", 0.1),
    "sparsegpt-llama-2": barber("sparsegpt", "column", 0.001),
    "sparsegpt-block": barber("sparsegpt", "block", 0.0),
}.items():
    PUBLISHED[f"barber-{name}-50"] = {**settings, "pattern": "unstructured", "target": 0.5}
    PUBLISHED[f"barber-{name}-2of4"] = {**settings, "pattern": "2:4", "target": 0.5}


for share, removed in ((0.5, 0.2), (0.7, 0.3)):
    settings = {
        "structured": removed,
        "score": "obs",
        "correction": True,
        "method": "sparsegpt",
        "allocation": "mosaic",
    }
    PUBLISHED[f"composite-{share * 100:.0f}"] = {**settings, "target": share}

PATHS = ("LGGLLLGGLLGLGLLGGL", "GGLLGGGLGGGLLLGGLL", "LGLGGLLGLLGLGLGLGG")  # published, of 18 iterations
LLAMA_2_7B = LlamaConfig(num_key_value_heads=32)
LLAMA_3_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
SEARCHES = {
    "mop-llama-2-7b-20": (LLAMA_2_7B, 7, 0.2),
    "mop-llama-2-7b-30": (LLAMA_2_7B, 11, 0.3),
    "mop-llama-2-7b-40": (LLAMA_2_7B, 15, 0.4),
    "mop-llama-3-8b-20": (LLAMA_3_8B, 8, 0.2),
    "mop-llama-3-8b-30": (LLAMA_3_8B, 12, 0.3),
    "mop-llama-3-8b-40": (LLAMA_3_8B, 17, 0.4),
}


PIPELINES = {
    "pipeline-mop-llama-3-8b-30": {"mop": "mop-llama-3-8b-30", "recover": "recover-mop"},
    "pipeline-mop-llama-2-7b-each": {"recover": "recover-mop"},
    "pipeline-mop-llama-3-8b-each": {"recover": "recover-mop"},
    "pipeline-sparsegpt-llama-3-70b-2of4": {},
}

DIALLED = ("best-50", "best-60", "best-70", "best-2of4")  # which test_quality.py reads


def test_every_recipe_of_the_repository_is_here():
    known = {*PUBLISHED, *SEARCHES, "recover-mop", *PIPELINES, *DIALLED}
    assert {file.stem for file in RECIPES.glob("*.yaml")} == known


def test_recovery_has_the_published_settings():
    loaded = RecoverRecipe.load(RECIPES / "recover-mop.yaml", {"model": "m", "out": "o"})
    update = (loaded.lora_rank, loaded.lora_alpha, loaded.lora_dropout, loaded.full)
    assert update == (32, 10, 0.05, False)
    assert (loaded.highest_rate, loaded.epochs, loaded.batch, loaded.length) == (3e-4, 2, 16, 512)
    assert (loaded.data, loaded.prompt_loss) == (("alpaca",), False)


@pytest.mark.parametrize(
    ("fields", "dropout"),
    [
        ({}, 0.05),
        ({"keep_sparsity": True}, 0),
        ({"keep_sparsity": True, "lora_dropout": 0.1}, 0.1),
        ({"lora_dropout": 0}, 0),
    ],
    ids=str,
)
def test_updates_that_are_masked_have_no_dropout_of_their_own(fields, dropout):
    loaded = RecoverRecipe.checked({"model": "m", "out": "o", "data": "alpaca", **fields})
    assert loaded.dropout == dropout


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_the_recipes_of_their_steps(name):
    loaded = PipelineRecipe.load(RECIPES / f"{name}.yaml", {"out": "o"})
    for step, file in PIPELINES[name].items():
        section = loaded.section(step)
        alone = type(section).load(
            str(RECIPES / f"{file}.yaml"), {"model": section.model, "out": section.out, "eval": ()}
        )
        assert section == alone
    assert loaded.section("evaluate").tasks == ("zeroshot",)
    assert "GiB" in (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize("model", ["mop-llama-2-7b", "mop-llama-3-8b"])
def test_pipelines_for_each_keep_the_published_shares_of_a_whole_path(model):
    loaded = PipelineRecipe.load(RECIPES / f"pipeline-{model}-each.yaml", {"out": "o"})
    search, shorter = loaded.section("mop"), MopRecipe.load(RECIPES / f"{model}-40.yaml", {"out": "o"})
    assert loaded.each
    assert search.path == PATHS[0]
    assert search.keep == ",".join(str(SEARCHES[f"{model}-{share}"][1]) for share in (20, 30, 40))
    assert loaded.model == shorter.model
    apart = {"path", "keep", "eval", "out", "model"}
    assert search.model_dump(exclude=apart) == shorter.model_dump(exclude=apart)
    path_plan_of(search, Skeleton(SEARCHES[f"{model}-20"][0], "cpu")).check()  # the model has room for it


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_have_the_published_settings_and_remove_what_they_say(name):
    config, iterations, share = SEARCHES[name]
    loaded = MopRecipe.load(RECIPES / f"{name}.yaml", {"out": "o"})
    assert loaded.path == PATHS[0][:iterations]
    assert (loaded.score, loaded.correction, loaded.depth_rule, loaded.remove) == ("amp", False, "third-last", None)
    comment = (RECIPES / f"{name}.yaml").read_text()
    for path in PATHS:
        course = path_plan_of(loaded.model_copy(update={"path": path[:iterations]}), Skeleton(config, "cpu"))
        course.check()
        *_, end = walk(course.start, lambda state, path=path: path[state.iteration], None, iterations)
        assert course.share(end) == pytest.approx(share, abs=0.015)
        assert path != PATHS[0] or f"remove {100 * course.share(end):.1f} % of all parameters" in comment
    assert all(part in comment for part in ("arXiv", "GiB", *PATHS[1:]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name):
    loaded = PruneRecipe.load(RECIPES / f"{name}.yaml", {"out": "o"})
    assert {field: getattr(loaded, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert (loaded.calibration, loaded.samples, loaded.seqlen) == (("c4",), 128, 2048)
    comment = (RECIPES / f"{name}.yaml").read_text()
    assert "arXiv" in comment
    assert "GiB" in comment  # the hardware that it needs


def test_missing_fields_are_named():
    with pytest.raises(InputError, match="out: missing"):
        PruneRecipe.checked({"model": "m", "sparsity": 0.5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not UTF-16 text"),
        (b"sparsity: 0.5\nsparsity: 0.6", "is not YAML: 'sparsity' stands there twice at line 2"),
        (b"- a", "must hold fields and values"),
        (b"1: 2", "must hold fields and values"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"recipe: .*{message}"):
        PruneRecipe.load(file, {})


@pytest.mark.parametrize(
    ("recipe", "late"),
    [
        (PruneRecipe.checked({"model": "m", "out": "o", "sparsity": 0.5}), {"ignore": ("*",), "expert_tokens": "all"}),
        (MopRecipe.checked({"model": "m", "out": "o", "remove": 0.2}), {"reconstruct": 4}),
        (ExpertsRecipe.checked({"model": "m", "out": "o", "keep": 4}), {"merge": True}),
    ],
    ids=["prune", "mop", "experts"],
)
def test_a_run_of_an_earlier_version_goes_on(recipe, late):
    """Fields that came later are no part of it, but with another value than the default."""
    assert recipe.shape().keys() & late.keys() == set()
    assert recipe.model_copy(update=late).shape().items() >= late.items()


BASE = {"model": "m", "out": "o", "sparsity": 0.5, "calibration": "stdlib"}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (PruneRecipe, {**BASE, "reconstruct": True}, "reconstruct: True is not allowed; use a number"),
        (PruneRecipe, {**BASE, "sparsity": False}, "sparsity: False is not allowed; use a number"),
        (PruneRecipe, {**BASE, "samples": True}, "samples: True is not allowed; use a number"),
        (ExpertsRecipe, {"model": "m", "out": "o", "keep": True, "calibration": "stdlib"}, "keep: True is not allowed"),
        (EvaluateRecipe, {"model": "m", "latency": True, "latency_batches": [True]}, "latency_batches: .*use a number"),
        (EvaluateRecipe, {"model": "m", "latency": True, "latency_batches": []}, "latency_batches: .* is not allowed"),
        (PruneRecipe, {**BASE, "quality": ["best"]}, "quality: .* is not allowed; use one of fast, balanced, best"),
        (PruneRecipe, {**BASE, "seed": -1}, "seed: -1 is not allowed"),
    ],
    ids=str,
)
def test_values_that_are_taken_for_others_are_refused(kind, fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        kind.checked(fields)


def test_truth_values_stay_where_they_are_meant():
    assert PruneRecipe.checked({**BASE, "refit": True, "measure_error": False}).refit
    assert EvaluateRecipe.checked({"model": "m", "latency": True, "latency_batches": 4}).latency_batches == (4,)


def test_null_is_what_a_field_without_a_value_has():
    best = {**BASE, "quality": "best"}
    for name in ("allocation_file", "structured", "shards"):
        made = PruneRecipe.checked({**best, name: None})
        assert made.allocation == PruneRecipe.checked(best).allocation == "fisher"


@pytest.mark.parametrize(("patience", "text"), [(1000000, "1000000"), (90, "90"), (0.5, "0.5"), ("10m", "10m")])
def test_patience_is_a_number_of_seconds_however_large(patience, text):
    assert PruneRecipe.checked({**BASE, "patience": patience}).patience == text
