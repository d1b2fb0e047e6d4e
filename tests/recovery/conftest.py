"""What the trainings share: models, data and two processes, started once."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.recovery.trainings import SHALLOW, Pair, make_documents, make_sparse
from tests.support.tiny import make_model
from tests.support.words import words_tokenizer


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.end()


@pytest.fixture(scope="session")
def folder(pair, tmp_path_factory):
    """Models and data; and the two processes, which start meanwhile."""
    folder = tmp_path_factory.mktemp("recovery")
    make_sparse(folder / "sparse", configs=SHALLOW)
    make_model(folder / "dense", configs=SHALLOW)
    words_tokenizer().save_pretrained(folder / "dense")
    make_documents(folder / "documents.jsonl")
    return folder
