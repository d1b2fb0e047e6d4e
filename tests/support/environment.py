"""The environment of this process, put back after a test."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_environment() -> Iterator[None]:
    """Put back the variables that have changed, and only these.

    `mock.patch.dict` removes all variables and sets them again; a thread that asks for one meanwhile, as those of Ray
    and PyTorch do in C, ends the process.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
