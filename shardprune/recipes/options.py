"""The fields of a recipe as arguments and options of a command."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from shardprune.errors import InputError
from shardprune.recipes.panels import DescribedField, arguments_of, panels_of
from shardprune.recipes.settings import MISSING, Settings

S = TypeVar("S", bound=Settings)


def with_options(settings: type[Settings], file_first: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Give a command that takes `**options` the arguments and options of a recipe, and the recipe's file.

    Args:
        file_first: the file is the command's argument, and the recipe's own fields, such as model, are options;
            otherwise these are arguments and the file is `--recipe`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [_option(field) if file_first else _argument(field) for field in arguments_of(settings)]
        file = [_recipe_argument()] if file_first else []
        return _with_parameters(command, [*file, *own, *([] if file_first else [_recipe_option()])], settings)

    return decorate


def with_fields(settings: type[Settings]) -> Callable[[Callable[..., Any]], Any]:
    """Give a command that takes `**options` the options of settings that no file holds."""
    return lambda command: _with_parameters(command, [], settings)


def _with_parameters(
    command: Callable[..., Any], first: list[inspect.Parameter], settings: type[Settings]
) -> Callable[..., Any]:
    """Give a command its parameters in typer's way: `first`, its own ones, an option for each field of `settings`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        _option(field, panel.title, hidden=not panel.listed)
        for panel in panels_of(settings)
        for field in panel.fields
        if field.type is not dict  # a section of a recipe stands in its file
    ]
    parameters = [*first, *own, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def recipe_of(settings: type[S], options: dict[str, Any], file_first: bool = False) -> S:
    """Return the recipe that the options of a command make, with the file among them.

    Args:
        file_first: as for `with_options`.

    Raises:
        InputError: the file or a field is wrong.
    """
    try:
        return settings.load(options["recipe"], given({name: options[name] for name in options if name != "recipe"}))
    except InputError as error:
        if error.problem == MISSING and error.field in settings.model_fields:
            raise InputError(error.field, f"{MISSING}; {_ways_to_give(settings, error.field, file_first)}") from error
        raise


def _ways_to_give(settings: type[Settings], field: str, file_first: bool) -> str:
    """Say how a field is given, on the command line and in a recipe."""
    own = set() if file_first else {argument.name for argument in arguments_of(settings)}
    word = field.upper() if field in own else f"--{field.replace('_', '-')}"
    command = getattr(settings, "command", "plan")
    return f"give {word}, or {field} in a recipe; see shardprune {command} --help"


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that stand on the command line."""
    return {name: value for name, value in options.items() if value not in (None, [], ())}


def completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return a function that lists the choices that begin with what is typed, for a shell's completion."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _offers(field: DescribedField) -> Callable[[str], list[str]] | None:
    """Return the function that lists what a shell offers for an option; None where the shell offers files by itself."""
    if field.choices:
        return completion(field.choices)
    if not field.offered:
        return None
    return lambda incomplete: [*completion(field.offered)(incomplete), *_texts(incomplete)]


def _texts(incomplete: str) -> list[str]:
    """List the files of text, and the folders, whose paths begin with what is typed."""
    folder, _, name = incomplete.rpartition("/")
    try:
        entries = sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).expanduser().iterdir())
    except OSError:
        return []
    shown = [path for path in entries if path.name.startswith(name) and (name or not path.name.startswith("."))]
    place = incomplete[: len(incomplete) - len(name)]
    return [
        f"{place}{path.name}{'/' * path.is_dir()}"
        for path in shown
        if path.is_dir() or path.suffix in (".txt", ".json", ".jsonl", ".npy")
    ]


def _option(field: DescribedField, panel: str | None = None, hidden: bool = False) -> inspect.Parameter:
    option = typer.Option(
        f"--{field.flag}/--no-{field.flag}" if field.type is bool else f"--{field.flag}",
        help=field.help,
        rich_help_panel=panel,
        hidden=hidden,
        metavar=field.placeholder,
        show_default=False,
        autocompletion=_offers(field),
    )
    return _parameter(field.name, Annotated[field.type | None, option])


def _argument(field: DescribedField) -> inspect.Parameter:
    argument = typer.Argument(help=field.description, metavar=field.name.upper(), show_default=False)
    return _parameter(field.name, Annotated[str | None, argument])


def _recipe_option() -> inspect.Parameter:
    option = typer.Option(help="YAML recipe; options override its fields", metavar="FILE", show_default=False)
    return _parameter("recipe", Annotated[str | None, option])


def _recipe_argument() -> inspect.Parameter:
    argument = typer.Argument(help="YAML recipe; options override its fields", metavar="RECIPE")
    return _parameter("recipe", Annotated[str, argument], inspect.Parameter.empty)


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
