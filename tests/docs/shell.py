"""Where the commands of one page run: a directory, an environment, a Python namespace; all in this process."""

import io
import os
import re
import runpy
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
import yaml

from shardprune.cli import ClickException, app, main
from shardprune.errors import InputError
from shardprune.planning.recipe import PlanRecipe
from shardprune.recipes.commands import RECIPES as RECIPES_OF
from shardprune.recipes.options import given
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.settings import Settings
from tests.docs.python import run_python
from tests.docs.standins import (
    CONFIG_OF,
    DROPPED,
    PLACEHOLDER,
    PLACES,
    RECIPE_OF,
    RECIPES,
    SCHEMES,
    SOURCES,
    Material,
    small_of,
    small_pipeline,
)

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


class Wrong(Exception):
    """What is wrong with a command or a block of a page."""


class Shell:
    """A page's commands run here one after another, each finding what those before it have made.

    Args:
        folder: an empty directory, which becomes the working directory until `close`.
        storage: an S3 server, started when it is asked for first.
    """

    def __init__(self, folder: Path, material: Material, storage: Callable[[], Any]) -> None:
        self.material, self.folder = material, folder
        self._storage = storage
        self._buckets: dict[str, str] = {}
        self._before, self._environment = Path.cwd(), dict(os.environ)
        self.names: dict[str, Any] = {"__name__": "__main__"}
        material.furnish(folder)
        os.chdir(folder)
        os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="250")

    def close(self) -> None:
        """Leave the directory and the environment as they were."""
        os.chdir(self._before)
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)
        if self._buckets:
            self._forget_storage()

    # -- words ----------------------------------------------------------------------------------------------------

    def placed(self, text: str) -> str:
        """Text of a page with its absolute paths and foreign storage moved to where they can be."""
        for scheme, stand_in in SCHEMES.items():
            text = text.replace(scheme, stand_in)
        text = re.sub(r"s3://([\w-][\w.-]*)", lambda match: f"s3://{self._bucket(match[1])}", text)
        return re.sub(rf"(?<![\w:/.-])/({'|'.join(PLACES)})/", rf"{self.folder}/\1/", text)

    def _bucket(self, name: str) -> str:
        """The bucket that a page calls so: one of its own."""
        if name not in self._buckets:
            server = self._storage()
            self._forget_storage()
            os.environ.update(server.environment)
            self._buckets[name] = server.bucket(f"{name.lower()}-{uuid.uuid4().hex[:8]}")
        return self._buckets[name]

    def _forget_storage(self) -> None:
        """Let no client go on that has read another environment."""
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()

    # -- shardprune -----------------------------------------------------------------------------------------------

    def settings(self, command: str, words: Sequence[str]) -> Settings | None:
        """What a command line of shardprune asks for, as it stands; None of a command without a recipe.

        Raises:
            Wrong: there is no such command or option, or a value is not allowed.
        """
        values = parsed(command, words)
        cls = {**RECIPES_OF, "plan": PlanRecipe}.get(command)
        if cls is None:
            return None
        recipe = values.pop("recipe", None)
        if recipe is not None:
            self.provide_recipe(command, Path(recipe))
        for own in ("simulate", "as_json"):
            values.pop(own, None)
        try:
            return cls.load(recipe, {"model" if name == "dense" else name: values[name] for name in values})
        except InputError as error:
            raise Wrong(f"{error}") from error

    def provide_recipe(self, command: str, file: Path) -> None:
        """Write the recipe that a placeholder such as RECIPE.yaml stands for, unless the page has it."""
        if RECIPES.fullmatch(file.name):
            file.write_text(yaml.safe_dump(RECIPE_OF[command]))

    def shardprune(self, words: Sequence[str], shown: str | None = None) -> None:
        """Check a command of shardprune as it stands, and run it with small sizes.

        Raises:
            Wrong: it is wrong, fails, or does not print what can be compared with what is shown.
        """
        command, *rest = words or [""]
        if command.startswith("-") or {"--help", "-h"} & set(rest):
            return self._help(list(words))
        if command == "slurm":
            return self._slurm(rest)
        if command == "plan":
            return self._plan(rest, shown)
        error = next((line for line in (shown or "").splitlines() if line.startswith("error: ")), None)
        try:
            settings = self.settings(command, rest)
        except Wrong as wrong:
            return self.expect(2, f"error: {wrong}", error)
        if command == "demo":
            return None  # Ray shards of the bundled model: tests/commands/test_demo.py prunes it, CI runs the command
        if settings is None:
            values = parsed(command, rest)
            for out in values.get("outs") or [values["out"]]:
                self.material.provide_model(str(out))
        else:
            self.clear(getattr(settings, "out", None))
            self.material.provide(settings)
            for source in SOURCES.values():
                self.material.provide_source(source)
        return self.expect(*self.call(main, [command, *self.small(command, rest, settings)]), error)

    def expect(self, code: int, said: str, error: str | None = None) -> None:
        """Check how a command ended: well, or with the error that the page shows, of which `...` leaves out a part.

        Raises:
            Wrong: it ended otherwise.
        """
        last = " ".join(said.strip().splitlines()[-1:])
        if error is None and code:
            raise Wrong(f"exit code {code}: {last}")
        if error is not None:
            pattern = ".*".join(re.escape(squeezed(part)) for part in error.split("..."))
            if not code or not re.search(pattern, squeezed(said)):
                raise Wrong(f"exit code {code} without {error!r}: {last}")

    def small(self, command: str, words: Sequence[str], settings: Settings | None) -> list[str]:
        """The words of a command that is small: options that come last count."""
        if settings is None:
            return list(words)
        kept: list[str] = []
        skip = False
        for word in (SOURCES.get(word, word) for word in words):
            if not skip and word not in DROPPED and not word.startswith(tuple(f"{name}=" for name in DROPPED)):
                kept.append(word)
            skip = word in DROPPED
        if isinstance(settings, PipelineRecipe):
            recipe = parsed(command, words)["recipe"]
            values = yaml.safe_load(Path(recipe).read_text())
            small = Path(f"small-{Path(recipe).name}")
            small.write_text(yaml.safe_dump(small_pipeline(settings, values)))
            kept[kept.index(str(recipe))] = str(small)
        for name, value in small_of(command, settings).items():
            option = name.replace("_", "-")
            kept += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        return kept

    def clear(self, out: str | None) -> None:
        """Remove what another command has written to OUT, which stands for any directory."""
        if out and PLACEHOLDER.match(out):
            shutil.rmtree(out, ignore_errors=True)

    def _help(self, words: list[str]) -> None:
        if {"--install-completion", "--show-completion"} & set(words):
            return  # would write to the shell's own files; typer's options of every app
        self.expect(*self.call(main, words))

    def _plan(self, words: list[str], shown: str | None) -> None:
        """Plan with the real configs, which need no weights, so that what is shown must be what is printed."""
        settings = self.settings("plan", words)
        assert isinstance(settings, PlanRecipe)
        config = CONFIG_OF.get(settings.model)
        if config is None and not Path(settings.model).exists():
            self.material.provide_model(settings.model)
        code, said = self.call(
            main, ["plan", *(config if word == settings.model and config else word for word in words)]
        )
        if config:
            said = said.replace(config, settings.model)
        if code == 1 and "does not fit" not in (shown or ""):
            raise Wrong(f"nothing fits: {said}")
        self.expect(0 if code == 1 else code, said)
        compare(shown, said)

    def _slurm(self, words: list[str]) -> None:
        """Write the script, without handing it to a Slurm; tests/cluster/slurm hands scripts to a real one."""
        values = parsed("slurm", words)
        recipe = Path(values["recipe"])
        script = Path(values.get("script") or f"{recipe.stem}.sbatch")
        self.provide_recipe(values.get("command") or "prune", recipe)
        if RECIPES.fullmatch(recipe.name):
            script.unlink(missing_ok=True)
        end = words.index("--") if "--" in words else len(words)
        self.expect(*self.call(main, ["slurm", *(word for word in words[:end] if word != "--submit"), *words[end:]]))
        if str(script) != "-" and not all(word in script.read_text() for word in words[end + 1 :]):
            raise Wrong(f"{script} lacks some of {words[end + 1 :]}")

    # -- Python ---------------------------------------------------------------------------------------------------

    def python(self, text: str) -> str:
        """Run Python in the namespace of the page, its recipes made small; what it prints.

        Raises:
            Wrong: it raises.
        """
        try:
            code, said = self.call(lambda _: run_python(self.placed(text), self.names, self.material), [])
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {error}") from error
        self.expect(code, said)
        return said

    def module(self, name: str, arguments: Sequence[str]) -> tuple[int, str]:
        """Run `python -m NAME ARGUMENTS`: its exit code, and what it prints."""
        with patch.object(sys, "argv", [name, *arguments]):
            return self.call(lambda _: runpy.run_module(name, run_name="__main__"), [])

    # -- running --------------------------------------------------------------------------------------------------

    def call(self, function: Callable[[list[str]], Any], words: list[str]) -> tuple[int, str]:
        """The exit code and all that is printed by a function that ends as a command does."""
        said = io.StringIO()
        code: Any = 0
        with redirect_stdout(said), redirect_stderr(said):
            try:
                function(words)
            except SystemExit as end:
                code = end.code
        return code if isinstance(code, int) else int(code is not None), said.getvalue()


def parsed(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The options and arguments that stand on a command line of shardprune, by its own parser.

    Raises:
        Wrong: there is no such command or option, or a value is not of its type.
    """
    if command not in COMMANDS:
        raise Wrong(f"shardprune has no command {command!r}; it has {', '.join(COMMANDS)}")
    try:
        return given(COMMANDS[command].make_context(command, list(words)).params)
    except ClickException as error:
        raise Wrong(error.format_message()) from error  # type: ignore[attr-defined]


def compare(shown: str | None, said: str) -> None:
    """Check that all that is shown, but for parts left out with `...`, is said; blanks and line ends do not count.

    Raises:
        Wrong: it is not.
    """
    for part in re.split(r"^\s*\.\.\.\s*$", shown or "", flags=re.MULTILINE):
        lines = [line for line in part.splitlines() if line.strip()]
        if squeezed(part) not in squeezed(said):
            missing = next((line for line in lines if squeezed(line) not in squeezed(said)), lines[0])
            raise Wrong(f"shown, but not printed: {missing!r}; printed:\n{said}")


def squeezed(text: str) -> str:
    return "".join(text.split())
