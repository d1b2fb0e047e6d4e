"""Commands that stand where nothing runs them, in pages, headers of recipes and the help, have options that exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from shardprune.cli import main
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.settings import Settings
from tests.docs.pages import OF_THE_REPOSITORY, PAGES, PARSERS, ROOT, Block, Page

HEADERS = sorted(
    path for kind in ("jobs/recipes/*.yaml", "ray_configs/*.yaml", "cluster/**/*.sbatch") for path in ROOT.glob(kind)
)
NO_FILE = re.compile(r"RECIPE(\.yaml)?|r\.yaml|\w+\.yaml")  # stands for any recipe


class Right(BaseException):
    """What ends a command once its recipe is complete and right."""


@pytest.fixture(autouse=True)
def _recipes_end_it(monkeypatch):
    load = Settings.load.__func__

    def stop(cls, *given):
        load(cls, *given)
        raise Right

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Settings, "load", classmethod(stop))


def check(words: list[str]) -> None:
    """Raise an error where a command names what is not there: an option, a value, a recipe, a module, a file."""
    assert [word for word in words if OF_THE_REPOSITORY.fullmatch(word) and not Path(word).exists()] == []
    for at, word in enumerate(words):
        before, rest = words[at - 1] if at else "--", words[at + 1 :]
        if word == "shardprune" and before == "--":
            check_ours(rest)
        elif word.endswith("shardprune.sbatch"):
            check_job(*rest)
        elif before == "-m" and word.removeprefix("jobs.") in PARSERS:
            check_job(word.removeprefix("jobs."), *rest)
        elif before == "-m":
            origin = Path(find_spec(word).origin)
            files = [*origin.parent.glob("*.py")] if origin.name == "__init__.py" else [origin]
            source = "".join(file.read_text() for file in files)
            if "from benchmarks.options" in source:
                source += (ROOT / "benchmarks" / "options.py").read_text()
            options = [word for word in rest if word.startswith("--")] if word.startswith("benchmarks.") else []
            assert [option for option in options if f'"{option}"' not in source] == []
        elif word == "make" and before == "--":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in rest if "=" not in target} <= {*targets}


def check_job(command: str, recipe: str, *words: str) -> None:
    check_ours([*COMMANDS[command].words(recipe), *words])


def check_ours(words: list[str]) -> None:
    """Let the parser read a command, and its recipe be built where it has one that exists."""
    command, *rest = words
    assert command in PARSERS, f"shardprune has no command {command!r}"
    try:
        parameters = PARSERS[command].make_context(command, list(rest)).params
    except typer.Exit:  # --help
        return
    if "recipe" in parameters and not NO_FILE.fullmatch(str(parameters["recipe"])):
        with pytest.raises(Right):
            main(words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_that_do_not_run(path):
    for block in Page.read(path).blocks:
        for line, words, _ in () if block.runs else block.commands():
            try:
                check(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{path.name}:{line}: {getattr(error, 'message', error)}") from error


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_commands_in_a_header(path):
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    lines = re.findall(r"^#\s+((?:shardprune|sbatch|ray job|python -m) .*)$", text, re.MULTILINE)
    assert lines or path.name == "kuberay-rayjob.yaml"
    for _, words, _ in Block("console", "\n".join(lines), 1, None, False).commands():
        check(words)


@pytest.mark.parametrize("name", PARSERS)
def test_the_example_in_the_help_of_a_command(name):
    example = PARSERS[name].epilog.partition("\n")[2].strip()
    ((_, words, _),) = Block("console", example, 1, None, False).commands()
    assert words[:2] == ["shardprune", name]
    check(words)


WRONG = {
    "ray job submit -- python -m jobs.prune RECIPE --ouput OUT": "No such option: --ouput",
    "python -m jobs.prune jobs/recipes/owl-sparsegpt-70.yaml --out OUT --sparsity 2": "sparsity: 2.0 is",
    "sbatch cluster/slurm/shardprune.sbatch prune jobs/recipes/nowhere.yaml --out OUT": "jobs/recipes/nowhere.yaml",
    "shardprune trim MODEL": "shardprune has no command 'trim'",
    "python -m benchmarks.solver --threads 2 --row 2": "--row",
    "make tests": "tests",
}


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_found(command, capsys):
    with pytest.raises((Exception, SystemExit)) as found:
        check(command.split())
    assert WRONG[command] in f"{getattr(found.value, 'message', found.value)} {capsys.readouterr().err}"
