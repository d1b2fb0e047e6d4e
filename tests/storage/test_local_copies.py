"""Temporary copies of small files, on machines that have no place for them, too."""

import tempfile
from pathlib import Path

import pytest

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.storage.local_copies import local_copies
from tests.support.tiny import make_model
from tests.support.words import words_tokenizer


def test_copies_go_with_their_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with local_copies({"a": b"1", "b": b"22"}) as folder:
        assert [str(path) for path in tmp_path.iterdir()] == [folder]
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == {"a": b"1", "b": b"22"}
    assert not list(tmp_path.iterdir())


def test_errors_of_the_block_are_its_own():
    with pytest.raises(OSError, match="its own"), local_copies({"a": b""}):
        raise OSError("its own")


def test_a_checkpoint_where_nothing_temporary_can_be_written(tmp_path, monkeypatch):
    make_model(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    whole = Checkpoint(str(tmp_path / "model"))
    assert whole.config.num_hidden_layers == 4
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/nowhere")
    message = "^TMPDIR: no temporary file can be written: No such file or directory$"
    with pytest.raises(InputError, match=message):
        Checkpoint(str(tmp_path / "model")).config  # noqa: B018
    with pytest.raises(InputError, match=message):
        whole.tokenizer()
