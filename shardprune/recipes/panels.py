"""The fields of settings as `--help` and docs/reference.md show them: in panels, with choices, ranges and defaults."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from shardprune.recipes.settings import Settings

# The titles of all panels, in the order in which a command shows those that it has.
PANELS = (
    "Output",
    "Nodes",
    "Queue",
    "Environment",
    "Machines",
    "Layout",
    "Steps",
    "Pruned model",
    "Pruning",
    "Path",
    "Experts",
    "Structured pruning",
    "Mask rebuilding",
    "Improvement",
    "Tuned candidates",
    "Kept iterations",
    "Training",
    "Data",
    "Distillation",
    "DeepSpeed",
    "Calibration",
    "Perplexity",
    "Answers about images",
    "Tasks",
    "Latency",
    "Evaluation",
    "Workers",
)
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


@dataclass(frozen=True)
class DescribedField:
    """One field of a recipe.

    Attributes:
        type: the type that the command line reads: list[str] for a repeatable option, dict for a section of a recipe,
            which is no option.
        offered: values that a shell offers beside files, where others are allowed, too.
        value: the default; None where there is none, or only words can say it.
        default: the default in words; None where there is none.
    """

    name: str
    type: Any
    description: str
    choices: tuple[str, ...]
    offered: tuple[str, ...]
    bounds: str | None
    value: Any
    default: str | None
    required: bool

    @property
    def flag(self) -> str:
        """The option's name without the leading dashes."""
        return self.name.replace("_", "-")

    @property
    def placeholder(self) -> str:
        """The word for the option's value in a help text."""
        return "NAME" if self.choices else {int: "N", float: "NUMBER", bool: ""}.get(self.type, "TEXT")

    @property
    def help(self) -> str:
        """The description with choices and default, for a command line."""
        notes = [" | ".join(self.choices)] if self.choices else []
        if self.required:
            notes.append("required")
        if self.default not in (None, "off"):  # a switch is off unless it is given
            notes.append(f"default: {self.default}")
        return f"{self.description} ({'; '.join(notes)})" if notes else self.description


@dataclass(frozen=True)
class FieldPanel:
    """The fields under one title; not `listed` where a command accepts them and does nothing with them."""

    title: str
    fields: tuple[DescribedField, ...]
    listed: bool


def arguments_of(settings: type[Settings]) -> list[DescribedField]:
    """Return the fields that a recipe itself declares, such as its model: arguments of the command."""
    return [_described(settings, name) for name, title in _titles(settings).items() if not title]


def panels_of(settings: type[Settings]) -> list[FieldPanel]:
    """Return the panels of a recipe in the order of `PANELS`, each with its fields in the order of declaration."""
    titles = _titles(settings)
    panels = {title: [_described(settings, name) for name in titles if titles[name] == title] for title in PANELS}
    return [
        FieldPanel(title, tuple(panels[title]), title not in settings.unlisted) for title in PANELS if panels[title]
    ]


def _titles(settings: type[Settings]) -> dict[str, str]:
    """The title of every field's panel, stated by the group that declares it; a recipe's own fields have none."""
    titles = {name: "" for name in inspect.get_annotations(settings) if name in settings.model_fields}
    for group in settings.__mro__[1:]:  # the class that a field is taken from comes before those that it replaces
        for name in inspect.get_annotations(group):
            if name in settings.model_fields and issubclass(group, Settings):
                titles.setdefault(name, group.title)
    return titles


def _described(settings: type[Settings], name: str) -> DescribedField:
    field = settings.model_fields[name]
    extra = field.json_schema_extra
    known = extra if isinstance(extra, dict) else {}
    offered: Any = known.get("offered")
    default = str(known["default"]) if "default" in known else None
    if not field.is_required() and field.default not in (None, ()):
        shown = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        default = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else shown
    return DescribedField(
        name=name,
        type=_plain_type(field.annotation),
        description=field.description or "",
        choices=tuple(settings.choices(name)),
        offered=tuple(offered) if isinstance(offered, list) else (),
        bounds=_bounds(field.metadata),
        value=None if field.is_required() else field.default,
        default=default,
        required=field.is_required(),
    )


def _plain_type(annotation: Any) -> Any:
    """The type that the command line parses for a field; the recipe checks the value."""
    if get_origin(annotation) is tuple:
        return list[str]
    if any(get_origin(choice) is dict for choice in get_args(annotation)):
        return dict
    if any(get_origin(choice) is Literal for choice in get_args(annotation)):  # a word beside numbers
        return str
    for plain in (bool, int, float):
        if annotation is plain or plain in get_args(annotation):
            return plain
    return str


def _bounds(metadata: list[Any]) -> str | None:
    """The range of a number, in words."""
    found = {word: getattr(bound, word) for bound in metadata for word in BOUNDS if hasattr(bound, word)}
    return (
        ", ".join(
            BOUNDS[word].format(f"{value:,}" if isinstance(value, int) else f"{value:g}")
            for word, value in found.items()
        )
        or None
    )
