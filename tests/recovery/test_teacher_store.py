"""Trainings from a teacher's stored predictions: those of a live one, made once, and resumed to the bit."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune.errors import InputError, TrainingError
from shardprune.model.head_logits import HeadLogits
from shardprune.recovery import teacher_store, teaching
from shardprune.recovery.batches import Batches
from shardprune.recovery.distillation import largest
from shardprune.recovery.rows import Example, Rows
from shardprune.recovery.teacher_store import TeacherStore, bytes_per_prediction
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.recovery.test_resuming import cut_off
from tests.recovery.trainings import checked, furthest, losses, plain_training, rows_of, train
from tests.support.tiny import VOCABULARY, differing

TOP = 5
TAUGHT = {
    "teacher_top": TOP,
    "temperature": 1.5,
    "teacher_weight": 0.7,
    "steps": 5,
    "lora_rank": 4,
    "lora_dropout": 0.2,
}


@pytest.fixture
def small_parts(monkeypatch):
    """Files of a few rows each."""
    monkeypatch.setattr(teacher_store, "PART", 20)


def taught(folder, **fields):
    return {"teacher": str(folder / "dense"), **TAUGHT, **fields}


@contextmanager
def no_teacher_in_memory():
    with patch.object(teaching, "load_model", side_effect=AssertionError("a teacher is loaded")):
        yield


def files(out):
    return sorted(Path(out, "training").glob("teacher-*"))


# -- what is learned ------------------------------------------------------------------------------------------------


def test_the_largest_predictions_are_learned_from(folder, small_parts, tmp_path):
    """In many files, beside plain PyTorch that puts the same predictions together."""
    fields = taught(folder, lora_dropout=0.0, teacher_top=2, teacher_weight=1.0)
    result = train(folder, tmp_path / "o", **fields)
    assert result.seconds["teacher"] > 0
    assert result.throughput.seconds["teacher"] > 0  # reading
    expected, weights = plain_training(checked(folder, "o", **fields))
    # Stored log-probabilities have eleven bits.
    assert losses(result) == pytest.approx(expected, abs=2e-4)
    assert furthest(tmp_path / "o", weights) < 1e-3
    whole, _ = plain_training(checked(folder, "o", **{**fields, "teacher_top": None}))
    assert max(abs(one - other) for one, other in zip(expected, whole, strict=True)) > 2e-3


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 3])
def test_all_predictions_but_one_are_a_live_teacher(folder, zero, tmp_path):
    """The mass of all others is that of the one that is left."""
    fields = taught(folder, zero=zero, full=True, lora_rank=32, lora_dropout=None)
    live = train(folder, tmp_path / "live", **{**fields, "teacher_top": None})
    stored = train(folder, tmp_path / "stored", **{**fields, "teacher_top": VOCABULARY - 1})
    assert losses(stored) == pytest.approx(losses(live), abs=1e-3)
    assert losses(live)[-1] < losses(live)[0] - 0.03
    assert "teacher" not in live.seconds


def test_two_processes_store_and_learn_what_one_does(folder, pair, tmp_path):
    """One of them has no part of the predictions and runs the teacher along, which is shared out under stage 3."""
    fields = taught(folder, zero=3, keep_sparsity=True, held_out=0.2, lora_dropout=0.0)
    one = train(folder, tmp_path / "one", **fields)
    two = train(folder, tmp_path / "two", pair, **fields)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5


# -- what is stored -------------------------------------------------------------------------------------------------


def make_store(folder, used, top=3, seed=1):
    """A store of rows of 1 to 6 predictions, and what every row's predictions are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [2 + 5 * number % 7 % 6 for number in range(12)]
    rows = Rows.of([[Example(torch.ones(size, dtype=torch.int32), torch.ones(size).bool())] for size in sizes])
    store = TeacherStore(Folder(str(folder), "state"), rows, used, top)
    found = {
        row: largest(torch.randn(sizes[row] - 1, 9, generator=generator), HeadLogits(), 1.0, top)
        for row in range(len(rows))
    }
    return store, found


def fill(store, found, parts):
    for part in parts:
        rows = [row for batch in store.batches(part, 2) for row in batch]
        tokens, chances = (torch.cat([found[row][place] for row in rows]) for place in (0, 1))
        store.write(part, tokens, chances)


def test_rows_are_read_back_in_any_order_from_any_part(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_store, "PART", 6)
    used = [0, 2, 3, 5, 6, 7, 9, 11]
    store, found = make_store(tmp_path, used)
    assert store.parts > 2
    rows = [row for part in range(store.parts) for batch in store.batches(part, 2) for row in batch]
    assert rows == used
    fill(store, found, [1, 0])
    assert store.missing() == list(range(2, store.parts))
    left = store.bytes_missing()
    fill(store, found, store.missing())
    assert 0 < left < store.bytes == sum(tensor.nbytes for row in used for tensor in found[row])
    assert (store.missing(), store.bytes_missing()) == ([], 0)
    assert store.bytes == store.predictions * bytes_per_prediction(3)
    for chosen in ([3], [11, 0, 7], used[::-1]):
        tokens, chances = store.read(chosen)
        assert torch.equal(tokens, torch.cat([found[row][0] for row in chosen]))
        assert torch.equal(chances, torch.cat([found[row][1] for row in chosen]))


def test_a_file_of_another_store_is_refused(monkeypatch, tmp_path):
    store, found = make_store(tmp_path, range(12))
    fill(store, found, [0])
    other, _ = make_store(tmp_path, range(11))
    with pytest.raises(InputError, match=r"^state: .*teacher-000000\.safetensors does not hold .*; remove it$"):
        other.read([1])


def test_only_rows_of_the_training_are_stored(folder, tmp_path):
    fields = taught(folder, steps=1)
    lines = []
    reporter = Reporter(quiet=True)
    with patch.object(reporter, "say", lines.append):
        train(folder, tmp_path / "o", reporter=reporter, **fields)
    rows, _ = rows_of(checked(folder, "o", **fields))
    used = Batches(rows, 8, 2, 0).used(1)
    assert len(used) == 8 < len(rows)
    (line,) = (line for line in lines if "teacher" in line)
    assert line.startswith(f"the teacher's {TOP} largest of {rows.targets(used)} predictions take ")


def test_rows_of_the_first_steps_are_those_of_all_of_them():
    rows = Rows.of([[Example(torch.ones(2, dtype=torch.int32), torch.ones(2).bool())] for _ in range(10)])
    batches = Batches(rows, 4, 2, seed=3)
    assert batches.used(1) == sorted(batches.step(0))
    assert batches.used(2) == sorted({*batches.step(0), *batches.step(1)})
    assert batches.used(100) == list(range(10))


# -- what is cut off ------------------------------------------------------------------------------------------------


def test_a_pass_of_the_teacher_that_is_cut_off_goes_on(folder, small_parts, tmp_path):
    fields = taught(folder)
    expected = train(folder, tmp_path / "reference", **fields)
    with (
        cut_off(TeacherStore, "write", lambda _, part, *__: part == 2, after=False),
        pytest.raises(KeyboardInterrupt),
    ):
        train(folder, tmp_path / "o", **fields)
    there = {file: file.stat().st_mtime_ns for file in files(tmp_path / "o")}
    assert [file.name for file in there] == ["teacher-000000.safetensors", "teacher-000001.safetensors"]
    written = []
    write = TeacherStore.write

    def counted(store, part, *tensors):
        written.append(part)
        write(store, part, *tensors)

    with patch.object(TeacherStore, "write", counted):
        result = train(folder, tmp_path / "o", **fields)
    assert written[0] == 2
    assert len(written) > 2
    assert result.recovery.losses == expected.recovery.losses
    assert differing(tmp_path / "o", tmp_path / "reference") == []


def test_a_training_that_is_cut_off_goes_on_without_the_teacher(folder, small_parts, tmp_path):
    fields = taught(folder, checkpoint_every=2)
    expected = train(folder, tmp_path / "reference", **fields)
    with cut_off(training_losses(), "append", lambda _, loss: loss.step == 3), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **fields)
    with no_teacher_in_memory():
        result = train(folder, tmp_path / "o", **fields)
    assert result.recovery.losses == expected.recovery.losses
    assert differing(tmp_path / "o", tmp_path / "reference") == []


def training_losses():
    from shardprune.recovery.loss_log import Losses

    return Losses


def test_another_number_of_predictions_is_another_training(folder, tmp_path):
    fields = taught(folder, steps=1)
    with cut_off(training_losses(), "append"), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **fields)
    with pytest.raises(InputError, match="^out: "):
        train(folder, tmp_path / "o", **{**fields, "teacher_top": TOP + 1})


# -- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"teacher": None, "temperature": 2.0, "teacher_weight": 0.5}, "5 has no effect without teacher"),
        ({"teacher_top": VOCABULARY}, "64 is not less than the teacher's 64 tokens"),
        ({"teacher_top": 0}, "0 is not allowed; .*greater than or equal to 1"),
    ],
    ids=str,
)
def test_predictions_that_cannot_be_stored_are_refused(folder, fields, reason, tmp_path):
    with pytest.raises(InputError, match=f"^teacher_top: {reason}"):
        train(folder, tmp_path / "o", **taught(folder, **fields))
    assert not list(tmp_path.iterdir())


def test_predictions_need_room(folder, tmp_path):
    room = type("Room", (), {"free": 10})
    with (
        patch("shardprune.commands.check_recovery.shutil.disk_usage", lambda _: room),
        pytest.raises(InputError, match=r"^teacher_top: 5 predictions of \d+ tokens take .* use fewer"),
    ):
        train(folder, tmp_path / "o", **taught(folder))
    assert not (tmp_path / "o").exists()


def test_a_teacher_without_finite_predictions_ends_the_training(folder, tmp_path):
    tensors = load_file(folder / "dense" / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "dense").iterdir():
        if file.name != "model.safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="^the teacher's predictions of rows 0 to 1 are not finite$"):
        train(folder, tmp_path / "o", **taught(folder, teacher=str(broken)))
    assert not files(tmp_path / "o")
