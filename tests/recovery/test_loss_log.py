"""The file of losses: repeated steps, and a line that a kill cut off."""

import pytest

from shardprune.errors import StorageError
from shardprune.recovery.loss_log import Loss, Losses


def loss(step, value=1.0, held_out=None):
    return Loss(step, value, 0.1, gradient_norm=2.0, targets=7, tokens=9, seconds=0.5, peak_bytes=10, held_out=held_out)


def test_the_last_record_of_a_step_counts(tmp_path):
    losses = Losses(str(tmp_path))
    assert losses.read() == []
    for record in (loss(1), loss(2), loss(3), loss(2, 5.0), loss(3, 6.0, held_out=0.5)):
        losses.append(record)
    assert losses.read() == [loss(1), loss(2, 5.0), loss(3, 6.0, held_out=0.5)]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    losses = Losses(str(tmp_path))
    losses.mend()
    losses.append(loss(1))
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    losses.append(loss(2))
    for size in (len(whole), len(whole) + 1, len(file.read_bytes()) - 1):
        file.write_bytes(file.read_bytes()[:size])
        assert losses.read() == [loss(1)]
        losses.mend()
        assert file.read_bytes() == whole
        losses.append(loss(2))
    assert losses.read() == [loss(1), loss(2)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xff", "is not UTF-8 text"),
        (b"\0" * 40, "is not JSON"),
        (b'{"step": 1}', "lacks loss"),
        (b'{"step": "1"}', "holds '1' as step; use a valid integer"),
        (b"[" * 5000, "is not JSON: recursion limit exceeded"),
    ],
)
def test_a_line_that_is_damaged_is_named(tmp_path, line, reason):
    losses = Losses(str(tmp_path))
    losses.append(loss(1))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes() + line + b"\n")
    losses.mend()
    with pytest.raises(StorageError, match=f"^state: {file} line 2 {reason}"):
        losses.read()
