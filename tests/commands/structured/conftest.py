"""Tiny models with groups that can go, and undisturbed runs over them."""

import pytest

from tests.support.running import run
from tests.support.tiny import GROUPED, make_model, make_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    make_model(folder / "model", "llama-3.1", configs=GROUPED)
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Outputs and results of runs on one worker that several tests compare with, each done once."""
    done = {}

    def once(**fields):
        if str(fields) not in done:
            out = tmp_path_factory.mktemp("undisturbed")
            done[str(fields)] = out, run(folder, out, **fields)
        return done[str(fields)]

    return once
