"""A page from its first block to its last: everything on it is run or checked, and what is wrong is collected."""

import ast
from dataclasses import dataclass
from pathlib import Path

import yaml

from shardprune.cluster.slurm.commands import command_of
from shardprune.errors import InputError
from shardprune.recipes.commands import RECIPES as COMMANDS
from tests.docs.blocks import ROOT, Block, Page, commands_of, json_values
from tests.docs.programs import run_command
from tests.docs.shell import Shell, Wrong


@dataclass(frozen=True)
class Problem:
    """What is wrong on a page."""

    page: str
    line: int
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}\n    {self.reason}"


def walk(page: Page, shell: Shell) -> list[Problem]:
    """Run and check the blocks of a page in their order."""
    problems = []
    for block in page.blocks:
        if block.kind == "commands":
            for command in commands_of(block):
                problems += _tried(page, command.line, command.text, lambda: run_command(shell, command))
        else:
            check = CHECKS[block.kind]
            problems += _tried(page, block.line, block.text.splitlines()[0], lambda: check(shell, block))
    return problems


def _tried(page: Page, line: int, text: str, action) -> list[Problem]:
    try:
        action()
    except Wrong as wrong:
        return [Problem(page.name, line, text, str(wrong))]
    except Exception as error:
        return [Problem(page.name, line, text, f"{type(error).__name__}: {error}")]
    return []


def _python(shell: Shell, block: Block) -> None:
    if block.file is None:
        shell.python(block.text)
    elif not _is_in_repository(block):
        _write(block)


def _yaml(shell: Shell, block: Block) -> None:
    """A file of the page, or a recipe of some command."""
    text = shell.placed(block.text)
    values = yaml.safe_load(text)
    if block.file is not None and not _is_in_repository(block):
        _write(Block(block.kind, text, block.line, block.file))
    if not isinstance(values, dict):
        raise Wrong("no fields and values")
    if "task" in values and "dataset_path" in values:
        return _task(shell, text, values["task"])
    file = Path("block.yaml")
    file.write_text(text)
    try:
        command_of(file, lambda name: COMMANDS[name].checked(_named(name, values)), None)
    except InputError as error:
        raise Wrong(f"no recipe: {error}") from error
    return None


def _named(command: str, values: dict) -> dict:
    """A recipe's values, with what may stand on the command line instead."""
    open_fields = {"model": "MODEL", "sparse": "SPARSE", "out": "OUT", "data": "alpaca"}
    fields = COMMANDS[command].model_fields
    given = {name: value for name, value in open_fields.items() if name in fields and fields[name].is_required()}
    return {**given, **values}


def _task(shell: Shell, text: str, name: str) -> None:
    """A task of lm-eval: a model is evaluated on it."""
    folder = Path(f"task-{name}")
    folder.mkdir()
    (folder / f"{name}.yaml").write_text(text)
    for file in yaml.safe_load(text).get("dataset_kwargs", {}).get("data_files", {}).values():
        shell.material.provide_source(file)
    shell.shardprune(["evaluate", "MODEL", "--tasks", name, "--tasks-dir", str(folder)])


def _json(shell: Shell, block: Block) -> None:
    json_values(block.text)
    if block.file is not None and not _is_in_repository(block):
        _write(block)


def _output(shell: Shell, block: Block) -> None:
    pass  # numbers that were measured elsewhere, with real models


def _unknown(shell: Shell, block: Block) -> None:
    raise Wrong("a fence of a language that LANGUAGES in tests/docs/blocks.py does not have")


CHECKS = {"unknown": _unknown, "python": _python, "yaml": _yaml, "json": _json, "output": _output}


def _write(block: Block) -> None:
    assert block.file
    file = Path(block.file)
    if file.parent.resolve().is_relative_to(ROOT):
        raise Wrong(f"{block.file!r} would be a file of the repository, which has none of that name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


def _is_in_repository(block: Block) -> bool:
    """Whether the repository has the file that a block is said to be, or to be a part of.

    Raises:
        Wrong: it has, with something else in it.
    """
    assert block.file
    file = ROOT / block.file
    if not file.is_file():
        return False
    if block.kind == "python":
        present = {ast.dump(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.stmt)}
        missing = [ast.unparse(node) for node in ast.parse(block.text).body if ast.dump(node) not in present]
        if missing:
            raise Wrong(f"{block.file} has no {missing[0]!r}")
    elif block.kind == "yaml":
        stored = yaml.safe_load(file.read_text())
        for name, value in yaml.safe_load(block.text).items():
            if stored.get(name) != value:
                raise Wrong(f"{block.file} has {name}: {stored.get(name)!r}, not {value!r}")
    return True
