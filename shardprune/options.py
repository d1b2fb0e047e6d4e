"""The fields of a recipe as options of a command."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer

from shardprune.settings import Settings


def _options(settings: type[Settings]) -> list[inspect.Parameter]:
    """One option for every field of a recipe, in the panel of the group that declares it."""
    parameters: dict[str, inspect.Parameter] = {}
    groups = [group for group in settings.__bases__ if issubclass(group, Settings)]
    panels = {name: group for group in groups for name in group.model_fields}  # the last one declares it
    for group in (*groups[-1:], *groups[:-1]):
        own = [name for name in group.model_fields if panels[name] is group and _is_option(settings, name)]
        for name in sorted(own, key=lambda name: name not in group.__annotations__):
            field = settings.model_fields[name]
            flag = name.replace("_", "-")
            flags = f"--{flag}/--no-{flag}" if field.default is True else f"--{flag}"
            notes = [" | ".join(settings.choices(name))] if settings.choices(name) else []
            if not field.is_required() and field.default not in (None, ()) and field.default is not False:
                notes.append(f"default: {field.default}")
            option = typer.Option(
                flags,
                help=(field.description or "") + (f" ({'; '.join(notes)})" if notes else ""),
                rich_help_panel=inspect.getdoc(group),
                metavar=_metavar(field.annotation),
                show_default=False,
            )
            parameters[name] = _parameter(name, Annotated[_plain_type(field.annotation) | None, option])
            if field.default is False:  # what a recipe sets can be taken back, which the help need not say
                negative = Annotated[bool | None, typer.Option(f"--no-{flag}", hidden=True)]
                parameters[f"no_{name}"] = _parameter(f"no_{name}", negative)
    return list(parameters.values())


def _is_option(settings: type[Settings], name: str) -> bool:
    """Whether a field has a value that fits on a command line: sections of a recipe stand in a file."""
    return not any(get_origin(choice) is dict for choice in get_args(settings.model_fields[name].annotation))


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """The type that the command line parses for a field; the recipe checks the value."""
    if get_origin(annotation) is tuple:
        return list[str]
    for plain in (bool, int, float):
        if annotation is plain or plain in get_args(annotation):
            return plain
    return str


def _metavar(annotation: Any) -> str | None:
    return {int: "N", float: "NUMBER", bool: None}.get(_plain_type(annotation), "TEXT")


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
    values = {name: value for name, value in options.items() if value not in (None, [])}
    return {name.removeprefix("no_"): False if name.startswith("no_") else value for name, value in values.items()}
