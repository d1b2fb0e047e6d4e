"""Verbs: the methods of a worker that a driver calls. Each says once what kind of work it is."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from shardprune.shard.device_errors import device_errors
from shardprune.shard.ledger import Kind, Ledger
from shardprune.shard.spec import ForwardSpec

P = ParamSpec("P")
T = TypeVar("T")


class _Worker(Protocol):
    ledger: Ledger
    spec: ForwardSpec


class _Verb(Protocol):
    kind: Kind
    layer: int | None  # the place of the layer's index among the arguments after `self`


def verb(kind: Kind, layer: str | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a method of a worker a verb: its calls run without gradients and enter the worker's ledger, and errors of
    its device say whose they are.

    Args:
        layer: the parameter that takes the index of the layer which a call is about; None where it is about none in
            particular.
    """

    def decorated(method: Callable[P, T]) -> Callable[P, T]:
        names = list(inspect.signature(method).parameters)
        place = names.index(layer) - 1 if layer else None

        @functools.wraps(method)
        def timed(self: _Worker, *args: Any) -> T:
            # A device's clock comes upon its errors as well: those of calls before.
            work = work_of(timed, args)
            with self.ledger.calls.during(work), device_errors(lambda: f"{self.spec.label}, {work}"):
                started = self.ledger.begin()
                try:
                    with torch.no_grad():
                        return method(self, *args)  # type: ignore[call-arg, arg-type]
                finally:
                    index = layer_of(cast(Callable[P, T], timed), args)
                    self.ledger.end(method.__name__, kind, index, started, _bytes(args))

        stated = cast(_Verb, timed)
        stated.kind, stated.layer = kind, place
        return cast(Callable[P, T], timed)

    return decorated


def of_part(part: str, method: Callable[P, T]) -> Callable[P, T]:
    """Return a verb of a worker's part as one of the worker's own: a group calls verbs by their names on the worker.

    Args:
        part: the worker's attribute that is the part.
    """

    @functools.wraps(method)
    def called(self: Any, *args: Any) -> T:
        return method(getattr(self, part), *args)  # type: ignore[call-arg]

    return cast(Callable[P, T], called)


def kind_of(method: Callable[..., Any]) -> Kind | None:
    """Return the kind of a verb, None for any other method."""
    return getattr(method, "kind", None)


def layer_of(method: Callable[..., Any], args: Sequence[Any]) -> int | None:
    """Return the index of the layer that a call of a verb with some arguments is about."""
    place = cast(_Verb, method).layer
    return None if place is None else args[place]


def work_of(method: Callable[..., Any], args: Sequence[Any]) -> str:
    """Return the name of a verb and the layer that a call with some arguments is about, for messages."""
    index = layer_of(method, args)
    return method.__name__ if index is None else f"layer {index}, {method.__name__}"


def verbs_of(worker: type) -> dict[str, Callable[..., Any]]:
    """Return all verbs of a class of workers by their names, inherited ones included."""
    methods = inspect.getmembers(worker, inspect.isfunction)
    return {name: method for name, method in methods if kind_of(method)}


def _bytes(value: Any) -> int:
    """The bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0
