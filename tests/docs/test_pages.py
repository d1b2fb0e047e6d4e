"""Every command of README and docs/*.md runs as it stands, in the order of its page.

An indented block, and a fence named `console`, is of commands; other fences name their language. What cannot run here
(a download, a cluster, an installation) stands behind a comment, `<!-- not run: why -->`: of its commands the options
of ours and the files of the repository are checked, as in the headers of recipes and in the help. Nothing else needs
to be known to write a page.

The trade: pages run in this process with the sizes, models and data sets of conftest.py, whatever their recipes say.
So a mistyped option, field, value or file, a wrong order, Python that raises and a plan that prints something else are
found; numbers of real models, a hub name that does not exist, and the programs of others are not.
"""

import io
import json
import re
import shutil
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from shardprune.cli import app, main
from shardprune.recipes.settings import Settings
from tests.docs.conftest import OUTPUTS, provide
from tests.docs.pages import COMMANDS, ROOT, Block, Command, Page, commands_of

PARSERS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ALL_PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
# test_extending.py runs the one on a copy of the package; the other is made from the code, its examples are the help's.
PAGES = [path for path in ALL_PAGES if path.name not in ("extending.md", "reference.md")]
HEADERS = sorted(
    path for kind in ("jobs/recipes/*.yaml", "ray_configs/*.yaml", "cluster/**/*.sbatch") for path in ROOT.glob(kind)
)
REPOSITORY = re.compile(r"(?:benchmarks|cluster|dev|docs|jobs|ray_configs|shardprune|tests)/[\w./-]+\.\w+")
REMOTE = re.compile(r"^(s3://|gs://|/)")
MADE = {  # all outputs that a page makes
    REMOTE.sub("remote/", out)
    for path in ALL_PAGES
    for out in re.findall(r"(?:--out |\bout=\"|\"out\": \")([\w./:-]+)", path.read_text())
}


class Checked(BaseException):
    """What ends a command that is only checked, once its recipe is complete and right."""


def problems_of(page: Page, material: Path) -> list[str]:
    """What is wrong on a page, each with its line."""
    names = {"__name__": "__main__"}
    problems = []

    def attempt(line: int, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            said = str(error).partition("\nassert ")[0] or traceback.format_exc(limit=-3)
            said = said if isinstance(error, AssertionError) else traceback.format_exc(limit=-3)
            problems.append(f"{page.name}:{line}: {said}")

    for block in page.blocks:
        if block.language == "yaml" and block.runs:  # a command may stand before its recipe
            Path(block.file or "RECIPE.yaml").write_text(block.text)
    for block in page.blocks:
        if block.language in COMMANDS:
            for command in commands_of(block):
                attempt(command.line, lambda: run(command, material) if block.runs else check(command))
        elif block.language == "python" and block.runs:
            attempt(block.line, lambda: run_python(page, block, names, material))
        elif block.language == "json":
            attempt(block.line, lambda: [json.loads(value) for value in re.split(r"\n(?={)", block.text)])
        elif not block.language:
            problems.append(f"{page.name}:{block.line}: a fence without a language; use text for what is none")
    return problems


def run(command: Command, material: Path) -> None:
    """Run a command of shardprune and compare what it prints with what the page shows under a prompt."""
    assert command.words[0] == "shardprune", "only shardprune runs here; put <!-- not run: why --> before the block"
    words = [REMOTE.sub("remote/", word) for word in command.words[1:]]
    for before, word in zip(["", *words], words, strict=False):
        if before == "--out" and word == "OUT":
            shutil.rmtree(word, ignore_errors=True)  # which stands for another directory each time
        elif before not in ("--out", "--file"):
            provide_output(word, material)
    code, said = ended(words)
    fits = "does not fit" not in command.shown or code != 1
    assert code == 0 or not fits, f"exit code {code}: {said.strip().splitlines()[-1]}"
    for part in re.split(r"^\s*\.\.\.\s*$", command.shown, flags=re.MULTILINE):
        assert squeezed(part) in squeezed(said), f"it prints something else:\n{said}"


def run_python(page: Page, block: Block, names: dict, material: Path) -> None:
    made = re.findall(r'(?:\bout=|"out": )"([^"]*)"', block.text)
    for name in re.findall(rf'"({OUTPUTS.pattern})', block.text):
        if name not in made:
            provide_output(name.removesuffix("/result.json"), material)
    code = compile("\n" * (block.line - 1) + block.text, page.name, "exec")
    with redirect_stdout(io.StringIO()):
        exec(code, names)


def provide_output(name: str, material: Path) -> None:
    """Put a pruned model where a page reads what another page has made."""
    if OUTPUTS.fullmatch(name):
        assert name == "OUT" or name in MADE, f"no page makes {name!r}"
        provide(name, material / "pruned")


def check(command: Command) -> None:
    """Check of a command that cannot run here the parts that are ours: options, recipes, modules, files."""
    words = [REMOTE.sub("remote/", word) for word in command.words]
    for at, word in enumerate(words):
        rest = words[at + 1 :]
        if word == "shardprune" and (at == 0 or words[at - 1] == "--"):
            check_ours(rest)
        elif word == "-m" and rest[0].removeprefix("jobs.") in PARSERS:
            check_job(rest[0].removeprefix("jobs."), rest[1:])
        elif word == "-m":
            module = find_spec(rest[0])
            assert module, f"no module {rest[0]}"
            source = Path(module.origin).read_text()
            wrong = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
            assert not (wrong and rest[0].startswith("benchmarks.")), f"no option {wrong}"
        elif word.endswith(".sbatch"):
            check_job(Path(word).stem, rest) if Path(word).stem in PARSERS else check_job(rest[0], rest[1:])
        if REPOSITORY.fullmatch(word):
            assert Path(word).exists(), f"no file {word}"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == [], "no such target"


def check_job(command: str, words: list[str]) -> None:
    """A job takes its recipe first; pipeline does so on the command line, too."""
    check_ours([command, *([] if command == "pipeline" else ["--recipe"]), *words])


def check_ours(words: list[str]) -> None:
    """Let the parser read a command, and its recipe be built where it has one that exists."""
    command, *rest = words
    assert command in PARSERS, f"shardprune has no command {command!r}"
    try:
        parameters = PARSERS[command].make_context(command, list(rest)).params
    except typer.Exit:  # --help
        return
    except Exception as error:  # of whichever click typer uses
        raise AssertionError(getattr(error, "message", error)) from error
    recipe = parameters.get("recipe")
    if "recipe" not in parameters or (recipe and re.fullmatch(r"RECIPE(\.yaml)?|r\.yaml", str(recipe))):
        return
    load = Settings.load.__func__

    def stop(cls, *given):
        load(cls, *given)
        raise Checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "load", classmethod(stop))
        try:
            code, said = ended(words)
        except Checked:
            return
    raise AssertionError(f"exit code {code}: {said.strip()}")


def ended(words: list[str]) -> tuple[int, str]:
    """The exit code of a command of ours, and all that it prints."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(words)
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    raise AssertionError("a command ends with an exit code")


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_runs(path, folder, material):
    problems = problems_of(Page.read(path), material)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_the_commands_in_a_header_are_right(path, folder):
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    lines = re.findall(r"^#\s+((?:shardprune|sbatch|ray job|python -m) .*)$", text, re.MULTILINE)
    assert lines or path.name == "kuberay-rayjob.yaml"
    for line in lines:
        for command in commands_of(Block("console", line, 1, None, False)):
            check(command)


@pytest.mark.parametrize("name", PARSERS)
def test_the_example_in_the_help_of_a_command_is_right(name, folder):
    example = PARSERS[name].epilog.partition("\n")[2]
    (command,) = commands_of(Block("console", example, 1, None, False))
    assert command.words[:2] == ["shardprune", name]
    check(command)


WRONG = """\
    shardprune evaluate MODEL \\
      --perplexity c4 --windows 1   # right
    shardprune prune meta-llama/Llama-3.1-8B --out runs/b --sparsty 0.5
    shardprune prune meta-llama/Llama-3.1-8B --out runs/b --sparsity 1.5
    shardprnue prune MODEL --out OUT --sparsity 0.5
    shardprune evaluate runs/c --perplexity c4

<!-- not run: a cluster -->

    ray job submit -- python -m jobs.prune RECIPE --out OUT    # right
    ray job submit -- python -m jobs.prune RECIPE --ouput OUT
    ray job submit -- python -m jobs.prune jobs/recipes/owl-sparsegpt-70.yaml --out OUT --sparsity 2
    sbatch cluster/slurm/prune.sbatch jobs/recipes/nowhere.yaml MODEL --out OUT
    shardprune trim MODEL
    python -m benchmarks.solver --threads 2 --row 2

```console
$ shardprune plan ray_configs/models/llama-3.1-8b/config.json --gpu-memory 80GB
...
exact: does not fit
```

```python
raise KeyError("x")
```

```yaml
sparsity: 0.5
alocation: owl
```

    shardprune prune MODEL --out OUT --recipe RECIPE.yaml
"""
FOUND = {
    3: "No such option: --sparsty",
    4: "sparsity: 1.5 is not allowed",
    5: "only shardprune runs here",
    6: "no page makes 'runs/c'",
    11: "No such option: --ouput",
    12: "sparsity: 2.0 is not allowed",
    13: "'jobs/recipes/nowhere.yaml' cannot be read",
    14: "shardprune has no command 'trim'",
    15: "no option ['--row']",
    18: "it prints something else",
    24: "KeyError",
    32: "alocation: no field of a recipe has this name",
}


def test_what_is_wrong_on_a_page_is_found_with_its_line(folder, material):
    problems = problems_of(Page.parse("wrong.md", WRONG), material)
    assert [int(problem.split(":")[1]) for problem in problems] == list(FOUND), problems
    for problem, reason in zip(problems, FOUND.values(), strict=True):
        assert reason in problem
