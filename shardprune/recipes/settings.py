"""Settings: groups of validated fields, from a YAML file and overrides, with errors of one line."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shardprune.errors import InputError, without_credentials
from shardprune.storage.locations import UNWRITABLE
from shardprune.storage.malformed import located, shown
from shardprune.storage.whole_files import read_file
from shardprune.storage.yaml_file import parse_yaml

S = TypeVar("S", bound="Settings")
MISSING = "missing"  # the problem of a field without a value and a default

LARGEST = 2**63 - 1  # of a whole number: torch and NumPy count in signed 64 bits


def optional(default: str, description: str, **bounds: Any) -> Any:
    """A field that is None unless it is given: `default` says in words which value a run takes then."""
    return Field(None, description=description, json_schema_extra={"default": default}, **bounds)


class Settings(BaseModel):
    """Base of every group of settings: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    title: ClassVar[str] = ""  # of the panel in --help and docs/reference.md; a recipe's own fields are arguments
    unlisted: ClassVar[tuple[str, ...]] = ()  # panels of fields that a command accepts and does nothing with

    @model_validator(mode="before")
    @classmethod
    def _texts_can_be_written(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            for text in _texts([name, values[name]]):
                if UNWRITABLE.search(text):
                    reason = "holds a character that is in no text and no file's name (NUL, or half a surrogate pair)"
                    raise InputError(str(name), f"{shown(text)} {reason}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse YAML's yes, on and true where a number is meant, which they would be taken for."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            held = value if isinstance(value, list | tuple) else [value]
            checked = field and any(isinstance(one, BeforeValidator) for one in field.metadata)  # in its own way
            if field and not checked and any(isinstance(one, bool) for one in held):
                kinds = set(_kinds(field.annotation))
                if kinds & {int, float} and bool not in kinds:
                    raise InputError(name, f"{shown(value)} is not allowed; use a number")
        return values

    @model_validator(mode="after")
    def _numbers_fit_into_64_bits(self) -> "Settings":
        for name, value in self:
            if isinstance(value, int) and abs(value) > LARGEST:
                raise InputError(name, f"{shown(value)} is not allowed; use at most {LARGEST}")
        return self

    def record(self) -> dict[str, Any]:
        """All fields as plain values, for files that others read: URLs without credentials."""
        return {name: _without_credentials(value) for name, value in self.model_dump(mode="json").items()}

    @classmethod
    def load(cls: type[S], file: str | Path | None, overrides: dict[str, Any]) -> S:
        """Settings from a YAML file, its fields overridden by those given.

        Raises:
            InputError: the file or a field is wrong.
        """
        return cls.checked({**(read_yaml(str(file)) if file else {}), **overrides})

    @classmethod
    def checked(cls: type[S], values: dict[str, Any]) -> S:
        """Settings from plain values.

        Raises:
            InputError: names the first field that is wrong, its value and what is allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise _input_error(error, cls) from error

    @classmethod
    def choices(cls, field: str) -> list[str]:
        """The values that a field of fixed choices takes; none for other fields."""
        annotation = cls.model_fields[field].annotation
        return [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []

    def needs(self, reason: str, met: bool, *fields: str) -> None:
        """Check that fields that only mean something under a condition are left alone where it is not met.

        Raises:
            InputError: one of them has another value than its default.
        """
        for field in fields:
            value = getattr(self, field)
            if not met and value != type(self).model_fields[field].default:
                raise InputError(field, f"{value!r} has no effect without {reason}")


def checked_section(name: str, settings: type[S], values: dict[str, Any]) -> S:
    """The settings of a named section of a recipe.

    Raises:
        InputError: names the section and its first field that is wrong.
    """
    try:
        return settings.checked(values)
    except InputError as error:
        raise InputError(f"{name}.{error.field}", error.problem) from error


def read_yaml(file: str) -> dict[str, Any]:
    """The fields of a recipe's file, as they stand there.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    with located("recipe", repr(file)):
        values = parse_yaml(read_file(file, "recipe"))
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError("recipe", f"{file!r} must hold fields and values")
    return values


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types of which values of an annotation may be or consist."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of a recipe's file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _without_credentials(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _input_error(error: ValidationError, settings: type[Settings]) -> InputError:
    """The first problem of a validation as one line."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    field, held = str(first["loc"][0]) if first["loc"] else "recipe", shown(first["input"])
    if first["type"] == "missing":
        return InputError(field, MISSING)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, settings.model_fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(settings.model_fields))}"
        return InputError(field, f"no field of a recipe has this name; {known}")
    if first["type"] == "literal_error":
        return InputError(field, f"{held} is not allowed; use one of {', '.join(settings.choices(field))}")
    reason = str(cause) if cause else first["msg"].replace("Input should be", "use")
    return InputError(field, f"{held} is not allowed; {reason}")
