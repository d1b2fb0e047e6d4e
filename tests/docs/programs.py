"""Every program that stands on a page, and what is done with a command of it.

A command is run, or what runs it is named here together with what is checked of its words. A program that is not in
PROGRAMS makes its page fail.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from packaging.requirements import InvalidRequirement, Requirement

from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.evaluate import ShardFields
from tests.docs.blocks import ASSIGNMENT, ROOT, Command
from tests.docs.shell import Shell, Wrong
from tests.docs.standins import KEPT

Program = Callable[[Shell, list[str], Command], None]

# Programs of others, which are not here: the first words that pages may use, and what tries the same.
OTHERS = {
    "kubectl": "apply|logs|patch|get|delete",  # tests/test_ray_configs.py checks the file by KubeRay's own schema
    "squeue": ".*",  # tests/cluster/slurm/test_jobs.py works with a real Slurm
    "scancel": ".*",
    "sinfo": ".*",
    "hf": "download|auth",  # no network
    "git": "clone|switch|checkout",
    "ssh": "-.*|.*@.*|HEAD.*",
    "tail": "-f|-n|.*",
    "ls": ".*",
    "cat": ".*",
    "mkdir": ".*",
    "nvidia-smi": ".*",
    "apt-get": "update|install",
    "source": ".*/activate",
    ".": ".*/activate",
    "cd": ".*",
}
# Modules with a command line of argparse whose words are only parsed, and what runs them.
PARSED = {
    r"tests\.benchmarks\.\w+": "tests/benchmarks/test_benchmarks.py runs each at a small size",
    r"tests\.slurm\.sandbox": "tests/cluster/slurm/test_jobs.py starts one",
    r"jobs\.train_demo_model": "it made shardprune/assets, which tests/commands/test_demo.py reads",
    r"shardprune\.evaluation\.lm_eval": "tests/evaluation/test_lm_eval_command.py runs it",
}
SBATCH = ("nodes", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos", "mem", "job-name", "output")


def run_command(shell: Shell, command: Command) -> None:
    """Do with a command of a page what its program says.

    Raises:
        Wrong: it is wrong, or its program unknown.
    """
    for words in Command(shell.placed(command.text), command.line).simple:
        run_words(shell, words, command)


def run_words(shell: Shell, words: Sequence[str], command: Command) -> None:
    """The same of one command's words; variables before the program hold for it alone."""
    words = list(words)
    before = dict(os.environ)
    while words and ASSIGNMENT.match(words[0]):
        _set(words.pop(0))
    if not words:
        return
    program, *rest = words
    if program == "...":  # the beginning is that of a command above
        if "--" not in rest:
            raise Wrong("'...' without a -- that ends what it stands for")
        program, *rest = rest[rest.index("--") + 1 :]
    if program in OTHERS:
        _other(program, rest)
    elif program in PROGRAMS:
        PROGRAMS[program](shell, rest, command)
    else:
        raise Wrong(
            f"unknown program {program!r}; add it to tests/docs/programs.py. If it is output, put it after a command "
            "with a prompt, '$ ', or into a block of its own that begins otherwise"
        )
    if program != "export":
        os.environ.clear()
        os.environ.update(before)


def _shardprune(shell: Shell, words: list[str], command: Command) -> None:
    shell.shardprune(words, command.shown and shell.placed(command.shown))


def _python(shell: Shell, words: list[str], command: Command) -> None:
    if words[:1] == ["-m"]:
        return _module(shell, words[1], words[2:], command)
    if words[:1] == ["-c"]:
        shell.python(words[1])
        return None
    if not words or not Path(words[0]).is_file():
        raise Wrong(f"no file {' '.join(words[:1])!r}")
    file, *arguments = words
    if Path(file).resolve().is_relative_to(ROOT):
        return _module(shell, file.removesuffix(".py").replace("/", "."), arguments, command)
    shell.python(Path(file).read_text())
    return None


def _module(shell: Shell, name: str, words: list[str], command: Command) -> None:
    if name == "jobs.with_gpus":  # waits for a Ray cluster: tests/jobs/test_submitted.py
        if len(words) < 2 or not words[0].replace("N", "1").isdecimal():
            raise Wrong("give a number of GPUs and a command")
        return run_words(shell, words[1:], command)
    if name.startswith("jobs.") and name != "jobs.train_demo_model":
        return _job(shell, name, words)
    if name == "shardprune.evaluation.lm_eval":
        _model_arguments(words)
    if any(re.fullmatch(pattern, name) for pattern in PARSED):
        return _only_parsed(name, words)
    if name == "pip":
        return _pip(shell, words, command)
    if name == "venv":
        return None
    if name == "pytest":
        for word in words:
            if "/" in word and not (ROOT / word.split("::")[0]).exists():
                raise Wrong(f"no file {word!r}")
        return None
    if name == "shardprune":
        return _shardprune(shell, words, command)
    raise Wrong(f"unknown module {name!r}; add it to tests/docs/programs.py")


def _job(shell: Shell, module: str, words: list[str]) -> None:
    """Run a job of `jobs` through its own file, with small sizes at its end."""
    name = module.removeprefix("jobs.")
    if not (ROOT / "jobs" / f"{name}.py").is_file() or not words:
        raise Wrong(f"no job {module!r}, or one without a recipe")
    shell.provide_recipe(name, Path(words[0]))
    first = [] if name == "pipeline" else ["--recipe"]
    settings = shell.settings(name, [*first, *words])
    assert settings is not None
    shell.clear(getattr(settings, "out", None))
    shell.material.provide(settings)
    small = shell.small(name, [*first, *words], settings)
    shell.expect(*shell.module(module, small[len(first) :]))


def _model_arguments(words: list[str]) -> None:
    """lm-eval hands what `--model_args` says to the model, which takes the settings of its workers."""
    given = words[words.index("--model_args") + 1] if "--model_args" in words else ""
    names = {pair.partition("=")[0] for pair in given.split(",")}
    if unknown := names - {"", "pretrained", "max_length", *ShardFields.model_fields}:
        raise Wrong(f"--model_args: shardprune knows no {', '.join(unknown)}")


class _Parsed(Exception):
    pass


def _only_parsed(name: str, words: list[str]) -> None:
    """Let a module's own parser read the words, and go no further."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **named):
        parse(self, *arguments, **named)
        raise _Parsed

    module = importlib.import_module(name)
    with patch.object(argparse.ArgumentParser, "parse_args", stop), patch("sys.argv", [name, *words]):
        try:
            module.main()
        except _Parsed:
            return
        except SystemExit as end:
            raise Wrong(f"python -m {name} refuses {' '.join(words)}") from end
    raise Wrong(f"python -m {name} parses nothing")


def _ray(shell: Shell, words: list[str], command: Command) -> None:
    """Let Ray's own command line parse the words; what is submitted as a job runs here."""
    from ray.scripts.scripts import cli

    parser, rest, name = cli, list(words), "ray"
    while hasattr(parser, "commands"):
        name, rest = (rest[0], rest[1:]) if rest else ("", [])
        if name not in parser.commands:
            raise Wrong(f"ray has no command {' '.join(words[:2])!r}")
        parser = parser.commands[name]
    try:
        given = parser.make_context(name, list(rest)).params
    except Exception as error:  # of whichever click Ray uses
        raise Wrong(f"ray {name}: {error}") from error
    for word in rest[: rest.index("--") if "--" in rest else len(rest)]:
        if word.endswith(".yaml") and not Path(word).is_file():
            raise Wrong(f"no file {word!r}")
    if given.get("entrypoint"):
        run_words(shell, given["entrypoint"], command)


def _sbatch(shell: Shell, words: list[str], shown: Command) -> None:
    """Check sbatch's options, and run here what the script runs."""
    job = job_of_script(words)
    if job:
        command, *rest = job
        recipe = rest if command == "pipeline" else rest[1:]
        run_words(shell, ["python", "-m", f"jobs.{command}", *recipe], shown)


def job_of_script(words: Sequence[str]) -> list[str]:
    """What `sbatch WORDS` runs if its script is one of cluster/slurm: words of shardprune's command line; else none.

    Raises:
        Wrong: an option is none that pages use, or there is no such script.
    """
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, _ = rest.pop(0).lstrip("-").partition("=")
        if name not in SBATCH:
            raise Wrong(f"sbatch: unknown option --{name}")
        if not equals:
            rest.pop(0)
    if not rest or not Path(rest[0]).is_file():
        raise Wrong(f"no script {' '.join(rest[:1])!r}")
    if "words=(" not in Path(rest[0]).read_text():
        return []
    return [*COMMANDS[rest[1]].words(rest[2]), *rest[3:]]


def _make(shell: Shell, words: list[str], command: Command) -> None:
    """The target is there; `make demo`, `test` and `lint` are what CI does."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        variable, equals, _ = word.partition("=")
        if not re.search(rf"\$\({variable}\)" if equals else rf"^{re.escape(word)}:", text, re.MULTILINE):
            raise Wrong(f"the Makefile has no {word!r}")


def _pip(shell: Shell, words: list[str], command: Command) -> None:
    """The requirements parse, and extras of shardprune are there; `make demo` installs it."""
    extras = set(importlib.metadata.metadata("shardprune").get_all("Provides-Extra") or ())
    if words[:1] != ["install"]:
        raise Wrong("only `pip install` is known")
    takes_value = False
    for word in words[1:]:
        if takes_value:
            takes_value = False
            if word.endswith(".txt") and not Path(word).is_file():
                raise Wrong(f"no file {word!r}")
        elif word.startswith("-"):
            takes_value = word in ("-c", "--constraint", "-r", "--requirement", "--index-url", "--extra-index-url")
        else:
            try:
                wanted = Requirement(re.sub(r"^\.(?=\[|$)", "shardprune", word))
            except InvalidRequirement as error:
                raise Wrong(f"pip: {word!r} is no requirement") from error
            if wanted.name == "shardprune" and wanted.extras - extras:
                raise Wrong(f"shardprune has no extra {', '.join(wanted.extras - extras)}")


def _export(shell: Shell, words: list[str], command: Command) -> None:
    for word in words:
        if not ASSIGNMENT.match(word):
            raise Wrong(f"export: {word!r} is not NAME=VALUE")
        _set(word)


def _set(assignment: str) -> None:
    name, _, value = assignment.partition("=")
    if not KEPT.fullmatch(name):
        os.environ[name] = value


def _other(program: str, words: list[str]) -> None:
    if words and not re.fullmatch(OTHERS[program], words[0]):
        raise Wrong(f"{program} {words[0]!r} is not known; add it to tests/docs/programs.py")
    for word in words:
        if re.fullmatch(r"(docs|jobs|ray_configs|cluster|tests)/\S+", word) and not Path(word).exists():
            raise Wrong(f"no file {word!r}")


PROGRAMS: dict[str, Program] = {
    "shardprune": _shardprune,
    "python": _python,
    "python3": _python,
    "ray": _ray,
    "sbatch": _sbatch,
    "make": _make,
    "pip": _pip,
    "export": _export,
}
