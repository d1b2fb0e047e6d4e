"""Temporary files on machines that have no place for them."""

import errno
import tempfile

import pytest

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.storage.scratch import scratch_folder
from tests.support.tiny import make_model
from tests.support.words import words_tokenizer


def test_a_folder_goes_with_its_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert [str(path) for path in tmp_path.iterdir()] == [folder]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_where_nothing_temporary_can_be_written(tmp_path, monkeypatch):
    make_model(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    whole = Checkpoint(str(tmp_path / "model"))
    assert whole.config.num_hidden_layers == 4
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/nowhere")
    message = f"^TMPDIR: temporary files cannot be written: .*{tmp_path}/nowhere/.*; name a folder with room$"
    with pytest.raises(InputError, match=message):
        Checkpoint(str(tmp_path / "model")).config  # noqa: B018
    with pytest.raises(InputError, match=message):
        whole.tokenizer()


def test_a_temporary_folder_that_is_full(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"^TMPDIR: .* \[Errno 28\] No space left on device; name a folder"):  # noqa: SIM117
        with scratch_folder():
            full()
