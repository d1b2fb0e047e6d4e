"""What every job makes of its arguments."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

import jobs
from shardprune import process
from shardprune.recipes.commands import RECIPES

WITHOUT_RECIPE = {
    "missing": ([], "recipe: missing; use python -m jobs.prune RECIPE [OPTIONS]"),
    "options first": (
        ["--out", "out", "recipe.yaml"],
        "recipe: '--out' stands in its place; use python -m jobs.prune RECIPE [OPTIONS]",
    ),
    "no such file": (["nowhere.yaml"], "recipe: 'nowhere.yaml' does not exist"),
}
WITHOUT_COMMAND = "gpus: give a number of at least 1 and a command: python -m jobs.with_gpus 16 COMMAND"


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run a job in this process; its exit code and last line."""

    def run(job: str, *arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [job, *arguments])
        monkeypatch.setattr(process, "quick_to_end", lambda: None)  # of a process of its own
        with pytest.raises(SystemExit) as ending:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        return ending.value.code, capsys.readouterr().err.splitlines()[-1]

    return run


def test_all_jobs_are_listed_here():
    files = Path(jobs.__file__).parent.glob("*.py")
    assert {file.stem for file in files if "from jobs.entry import run" in file.read_text()} == set(RECIPES)


@pytest.mark.parametrize("job", RECIPES)
def test_a_job_reads_the_recipe_of_its_command(job, tmp_path, fails):
    fields = RECIPES[job].model_fields
    required = {name: "stdlib" for name, field in fields.items() if field.is_required()}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**required, "zzzz": 1}))
    assert fails(job, str(file)) == (
        2,
        f"error: zzzz: no field of a recipe has this name; use one of {', '.join(sorted(fields))}",
    )


def test_options_override_the_recipe(tmp_path, fails):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: here\nout: there\nsparsity: 0.5\n")
    assert fails("prune", str(file), "--sparsity", "1.5") == (
        2,
        "error: sparsity: 1.5 is not allowed; use a number from 0 to below 1",
    )


@pytest.mark.parametrize("case", WITHOUT_RECIPE)
def test_without_a_recipe_the_usage_is_the_error(case, fails):
    arguments, message = WITHOUT_RECIPE[case]
    assert fails("prune", *arguments) == (2, f"error: {message}")


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["many", "true"]])
def test_waiting_needs_a_number_and_a_command(arguments, fails):
    assert fails("with_gpus", *arguments) == (2, f"error: {WITHOUT_COMMAND}")


def test_waiting_is_for_a_program_that_there_is(fails):
    assert fails("with_gpus", "2", "no-such-program", "x") == (
        2,
        "error: command: 'no-such-program' is no program that can be found",
    )
    assert fails("with_gpus", "9" * 30, "true") == (2, f"error: {WITHOUT_COMMAND}")
