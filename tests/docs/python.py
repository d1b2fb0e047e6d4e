"""The Python of a page, run with the tiny models and small sizes of `standins`."""

import ast
import doctest
from pathlib import Path
from typing import Any

from shardprune.recipes.commands import RECIPES as COMMANDS
from tests.docs.standins import Material, made_small

COMMAND_OF = {cls.__name__: command for command, cls in COMMANDS.items()}
READ = {"from_pretrained", "open", "Path", "status_of", "load_file"}  # whose first argument is read, not written


def run_python(text: str, names: dict[str, Any], material: Material) -> None:
    """Run a block in a namespace: a run's recipe is made small, and what it reads is put there first."""
    if text.lstrip().startswith(">>>"):
        text = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
    tree = ast.parse(text)
    names["_small"] = lambda cls, values: _small(cls, values, material)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            continue
        for inner in ast.walk(node):
            _provide_read(inner, material)
    tree = ast.fix_missing_locations(_Recipes().visit(tree))
    exec(compile(tree, "<page>", "exec"), names)


def _small(command: str, values: dict[str, Any], material: Material) -> dict[str, Any]:
    """The fields of a recipe, made small; what they name is provided."""
    settings = COMMANDS[command].checked(values)
    material.provide(settings)
    return made_small(command, values, settings)


class _Recipes(ast.NodeTransformer):
    """`Recipe(model=..., ...)` becomes `Recipe(**_small("prune", dict(model=..., ...)))`, and so do all recipes."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in COMMAND_OF:
            values = ast.Call(ast.Name("dict", ast.Load()), [], node.keywords)
            node.keywords = [ast.keyword(None, _made_small(node.func.id, values))]
        elif (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in COMMAND_OF
            and node.func.attr == "checked"
        ):
            name = node.func.value.id
            node.args = [_made_small(name, node.args[0])]
        return node


def _made_small(cls: str, values: ast.expr) -> ast.Call:
    return ast.Call(ast.Name("_small", ast.Load()), [ast.Constant(COMMAND_OF[cls]), values], [])


def _provide_read(node: ast.AST, material: Material) -> None:
    """Put a model where a call such as `from_pretrained("runs/x")` reads one."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    value = node.args[0].value
    if name not in READ or not isinstance(value, str):
        return
    folder = value if not Path(value).suffix[1:].isalpha() else str(Path(value).parent)
    if folder not in (".", ""):
        material.provide_model(folder)
