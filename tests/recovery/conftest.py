"""What the trainings share: models, data and two processes, started once."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.recovery.trainings import Pair, make_documents, make_sparse
from tests.tiny import make_model
from tests.words import words_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    make_sparse(folder / "sparse")
    make_model(folder / "dense")
    words_tokenizer().save_pretrained(folder / "dense")
    make_documents(folder / "documents.jsonl")
    return folder


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.end()
