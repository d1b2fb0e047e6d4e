"""The fields of a recipe as options of a command."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from shardprune.recipes.panels import DescribedField, FieldPanel, panels_of
from shardprune.recipes.settings import Settings


def _options(settings: type[Settings]) -> list[inspect.Parameter]:
    """One option for every field of a recipe, in the panel of its group; sections of a recipe stand in a file."""
    parameters = []
    for panel in panels_of(settings):
        for field in panel.fields:
            if field.type is not dict:
                parameters.append(_option(field, panel))
            if field.default == "off":  # what a recipe sets can be taken back, which the help need not say
                negative = Annotated[bool | None, typer.Option(f"--no-{field.flag}", hidden=True)]
                parameters.append(_parameter(f"no_{field.name}", negative))
    return parameters


def _option(field: DescribedField, panel: FieldPanel) -> inspect.Parameter:
    option = typer.Option(
        f"--{field.flag}/--no-{field.flag}" if field.default == "on" else f"--{field.flag}",
        help=field.help,
        rich_help_panel=panel.title,
        hidden=not panel.listed,
        metavar=field.placeholder,
        show_default=False,
        autocompletion=completion(field.choices) if field.choices else None,
    )
    return _parameter(field.name, Annotated[field.type | None, option])


def completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """What a shell offers where one of some choices is typed."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_options(settings: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that takes `**options` the options of a recipe."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *_options(settings)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line."""
    values = {name: value for name, value in options.items() if value not in (None, [], ())}
    return {name.removeprefix("no_"): False if name.startswith("no_") else value for name, value in values.items()}
