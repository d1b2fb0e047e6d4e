import pytest
import yaml

from shardprune.errors import InputError
from shardprune.recipe import Recipe
from shardprune.solvers.pattern import NM


def recipe(**fields) -> Recipe:
    return Recipe.checked({"model": "m", "out": "o", **fields})


def test_options_override_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "out": "o", "sparsity": 0.5, "samples": 64, "eval": ["stdlib"]}))
    loaded = Recipe.load(file, {"samples": 32})
    assert (loaded.samples, loaded.sparsity, loaded.eval) == (32, 0.5, ("stdlib",))


def test_one_source_may_stand_alone():
    assert recipe(sparsity=0.5, eval="stdlib").eval == ("stdlib",)


def test_a_pattern_fixes_the_sparsity():
    assert recipe(pattern="2:8").target == 0.75
    assert recipe(pattern="2:8").zeros == NM(2, 8)
    assert recipe(pattern="2:8", sparsity=0.75).target == 0.75


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
        ({"sparsity": 0.5, "method": "obs"}, "method: 'obs' is not allowed; use one of magnitude, wanda, sparsegpt"),
        ({"sparsity": 0.5, "samples": 0}, "samples: 0 is not allowed; use greater than or equal to 1"),
        ({"sparsity": 0.5, "sparsty": 0.5}, "sparsty: no field of a recipe has this name; did you mean sparsity?"),
        ({"sparsity": 0.5, "eval": ["x.csv"]}, "eval: 'x.csv' is no known source"),
        ({"sparsity": 0.5, "out": ""}, "out: '' is not allowed"),
        ({"sparsity": 0.5, "out": None}, "out: None is not allowed"),
    ],
)
def test_bad_fields_give_one_line(fields, message):
    with pytest.raises(InputError) as caught:
        recipe(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_missing_fields_are_named():
    with pytest.raises(InputError, match="out: missing"):
        Recipe.checked({"model": "m", "sparsity": 0.5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"- a", "must hold fields and values"),
        (b"1: 2", "must hold fields and values"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"recipe: .*{message}"):
        Recipe.load(file, {})
