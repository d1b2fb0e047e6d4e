"""The fields of settings as people meet them: in panels, with their choices, ranges and defaults.

`--help` and docs/reference.md are both made of this.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from shardprune.recipes.settings import Settings

BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


@dataclass(frozen=True)
class DescribedField:
    """One field: `group` is the class that declares it, `type` what the command line reads (list[str] where an option
    is repeatable, dict for a section of a recipe, which is no option), `value` what the field is where it is not given,
    `default` the same in words (None: there is none)."""

    name: str
    group: type[Settings]
    type: Any
    description: str
    choices: tuple[str, ...]
    bounds: str | None
    value: Any
    default: str | None
    required: bool

    @property
    def flag(self) -> str:
        """The option's name without the dashes before it."""
        return self.name.replace("_", "-")

    @property
    def placeholder(self) -> str:
        """What stands for the option's value in a help text."""
        return "NAME" if self.choices else {int: "N", float: "NUMBER", bool: ""}.get(self.type, "TEXT")

    @property
    def help(self) -> str:
        """The description with everything that may be given, for a command line."""
        notes = [" | ".join(self.choices)] if self.choices else []
        if self.required:
            notes.append("required")
        if self.default not in (None, "off"):  # an option that is a switch is off where it is not given
            notes.append(f"default: {self.default}")
        return f"{self.description} ({'; '.join(notes)})" if notes else self.description


@dataclass(frozen=True)
class FieldPanel:
    """The fields that belong together; not `listed` where a command takes them and can do nothing with them."""

    title: str
    fields: tuple[DescribedField, ...]
    listed: bool


def panels_of(settings: type[Settings]) -> list[FieldPanel]:
    """The panels of a recipe: one for each group that it is made of, that with the output directory first."""
    groups = [group for group in settings.__bases__ if issubclass(group, Settings) and group is not Settings]
    last = {name: group for group in groups for name in group.model_fields}
    panels = []
    for group in sorted(groups, key=lambda group: "out" not in group.model_fields):
        fields = [_described(settings, name, group) for name in group.model_fields if last[name] is group]
        fields.sort(key=lambda field: group.__mro__.index(field.group))  # its own before what it has from others
        panels.append(FieldPanel(inspect.getdoc(group) or "", tuple(fields), group not in settings.unlisted))
    return panels


def _described(settings: type[Settings], name: str, group: type[Settings]) -> DescribedField:
    field = settings.model_fields[name]
    description, default = _split_default(field.description or "")
    if not field.is_required() and field.default not in (None, ()):
        default = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else str(field.default)
    return DescribedField(
        name=name,
        group=next(owner for owner in group.__mro__ if name in inspect.get_annotations(owner)),
        type=_plain_type(field.annotation),
        description=description,
        choices=tuple(settings.choices(name)),
        bounds=_bounds(field.metadata),
        value=None if field.is_required() else field.default,
        default=default,
        required=field.is_required(),
    )


def _split_default(description: str) -> tuple[str, str | None]:
    """A description, and the default that it ends with where only words can say it."""
    match = re.fullmatch(r"(.*) \(default: (.*)\)", description)
    return (match[1], match[2]) if match else (description, None)


def _plain_type(annotation: Any) -> Any:
    """The type that the command line parses for a field; the recipe checks the value."""
    if get_origin(annotation) is tuple:
        return list[str]
    if any(get_origin(choice) is dict for choice in get_args(annotation)):
        return dict
    for plain in (bool, int, float):
        if annotation is plain or plain in get_args(annotation):
            return plain
    return str


def _bounds(metadata: list[Any]) -> str | None:
    """The range of a number, in words."""
    found = {word: getattr(bound, word) for bound in metadata for word in BOUNDS if hasattr(bound, word)}
    return ", ".join(BOUNDS[word].format(f"{value:g}") for word, value in found.items()) or None
