"""Parameters of a test, of which some are left to `make test-all`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def entries(values: Mapping[str, Any] | Iterable[Any], *long: str) -> list[Any]:
    """Return the parameters of a test, those of the names `long` marked so: they show in a further way what the others
    show.

    Args:
        values: by their names; without names each has its own as text.
    """
    named = values if isinstance(values, Mapping) else {str(value): value for value in values}
    assert named.keys() >= set(long), set(long) - named.keys()
    return [
        pytest.param(value, id=name, marks=[pytest.mark.long] if name in long else []) for name, value in named.items()
    ]
