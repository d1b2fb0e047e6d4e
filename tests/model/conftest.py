"""A model with a tokenizer of words, and copies of it to be changed."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import make_model
from tests.support.words import words_tokenizer


@pytest.fixture(scope="session")
def readable_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readable")
    make_model(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(readable_model, tmp_path) -> Path:
    return shutil.copytree(readable_model, tmp_path / "model")
