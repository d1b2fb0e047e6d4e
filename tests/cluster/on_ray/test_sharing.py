"""Pieces of work at the same time, each in a process of its own."""

import os

import pytest

from shardprune.cluster.ray_backend import RayBackend
from shardprune.errors import InputError, WorkerLost

ROUNDS = 12


def process(_backend):
    return os.getpid()


def refuse(_backend):
    raise InputError("model", "no such folder")


def die(_backend):
    os._exit(1)


@pytest.fixture
def backend(ray):
    return RayBackend(None, 60.0)


def test_each_round_has_processes_of_its_own_and_none_ends_the_driver(backend):
    processes = [number for _ in range(ROUNDS) for number in backend.in_shares([process, process])]
    assert len({*processes, os.getpid()}) == 2 * ROUNDS + 1


@pytest.mark.parametrize(("call", "error"), [(refuse, InputError), (die, WorkerLost)])
def test_an_error_of_one_is_raised(backend, call, error):
    with pytest.raises(error):
        backend.in_shares([process, call])
