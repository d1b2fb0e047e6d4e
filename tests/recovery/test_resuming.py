"""Trainings that were cut off anywhere go on as if nothing had happened, with as many processes as there are."""

from unittest.mock import patch

import deepspeed
import pytest

import shardprune.commands.recover
from shardprune.recovery.loss_log import Losses
from shardprune.storage.folder import Folder
from shardprune.storage.journal import Journal
from tests.recovery.trainings import furthest, losses, train
from tests.support.tiny import differing

STEPS = {"steps": 5, "checkpoint_every": 2, "keep_sparsity": True, "held_out": 0.2}
FULL = {**STEPS, "full": True, "weight_decay": 0.1}
UPDATES = {**STEPS, "lora_rank": 4, "lora_dropout": 0.2}
WAYS = {"full": FULL, "low-rank": UPDATES}


BF16 = {"precision": "bf16", "zero": 1}  # the stage with an optimizer of its own for gradients in float32


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Output and result of a training that nothing cuts off."""
    made = {}

    def get(way, zero=2):
        if (way, zero) not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "o"
            made[way, zero] = out, train(folder, out, zero=zero, **WAYS[way])
        return made[way, zero]

    return get


def cut_off(owner, name, when=lambda *_: True, after=False):
    """Patch a function so that it raises KeyboardInterrupt where `when` says so, instead of or after its work."""
    function = getattr(owner, name)

    def cut(*arguments, **options):
        if after:
            function(*arguments, **options)
        if when(*arguments):
            raise KeyboardInterrupt
        return None if after else function(*arguments, **options)

    return patch.object(owner, name, cut)


# Checkpoints are those of steps 2, 4 and 5. Which function is cut off, in which call, and whether it has worked.
CUTS = {
    "before the first checkpoint": (Losses, "append", lambda _, loss: loss.step == 2, False),
    "between two checkpoints": (Losses, "append", lambda _, loss: loss.step == 3, True),
    "while a checkpoint is written": (
        deepspeed.DeepSpeedEngine,
        "save_checkpoint",
        lambda engine, *_: engine.global_steps == 4,
        True,
    ),
    "while the last checkpoint takes effect": (Folder, "write_text", lambda _, name, text: text == "step5", False),
    "while layers are written": (Journal, "write_layer", lambda _, shapes, tensor, record: record.layer == 1, False),
    "before the frame": (Journal, "write_frame", lambda *_: True, False),
    "before the index": (shardprune.commands.recover, "write_index", lambda *_: True, False),
    "before the result": (Journal, "finish", lambda *_: True, False),
    "before the state is removed": (
        shardprune.commands.recover.shutil,
        "rmtree",
        lambda path: str(path).endswith("/training"),
        False,
    ),
}


@pytest.mark.parametrize(
    ("way", "place"),
    [*(("full", place) for place in CUTS), ("low-rank", "between two checkpoints"), ("low-rank", "before the frame")],
)
def test_a_training_that_is_cut_off_goes_on(folder, undisturbed, way, place, tmp_path):
    owner, name, when, after = CUTS[place]
    if (way, place) == ("low-rank", "before the frame"):
        owner, name = shardprune.commands.recover, "write_frame"
    out = tmp_path / "o"
    with cut_off(owner, name, when, after), pytest.raises(KeyboardInterrupt):
        train(folder, out, **WAYS[way])
    assert (out / "training").is_dir()
    result = train(folder, out, **WAYS[way])
    reference, expected = undisturbed(way)
    assert result.recovery.losses == expected.recovery.losses
    assert differing(out, reference) == []
    assert result.sparsity == expected.sparsity
    assert result.recovery.workers == 1
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}


def test_a_training_in_bf16_goes_on_to_the_bit(folder, tmp_path):
    expected = train(folder, tmp_path / "reference", **FULL, **BF16)
    with cut_off(*CUTS["between two checkpoints"]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **FULL, **BF16)
    assert train(folder, tmp_path / "o", **FULL, **BF16).recovery.losses == expected.recovery.losses
    assert differing(tmp_path / "o", tmp_path / "reference") == []


def test_a_claim_that_a_kill_left_half_written_does_no_harm(folder, undisturbed, tmp_path):
    with cut_off(Folder, "write_text", lambda _, name, *__: name == "fingerprint"), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **FULL)
    (tmp_path / "o" / "training").mkdir(exist_ok=True)
    (tmp_path / "o" / "training" / ".fingerprint.860a09b3.tmp").write_text("abc")  # which only a SIGKILL leaves
    result = train(folder, tmp_path / "o", **FULL)
    assert result.recovery.losses == undisturbed("full")[1].recovery.losses


def test_a_line_of_losses_that_was_cut_off_does_no_harm(folder, undisturbed, tmp_path):
    with cut_off(*CUTS["between two checkpoints"]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **FULL)
    records = Losses(str(tmp_path / "o" / "training")).read()
    assert [record.step for record in records] == [1, 2, 3]
    assert all(record.tokens > record.targets > 0 for record in records)  # the first token of a row is no target
    assert all(record.seconds > 0 and record.peak_bytes > 2**20 for record in records)
    with next(tmp_path.glob("o/training/losses*")).open("a") as file:
        file.write('{"step": 4, "lo')
    result = train(folder, tmp_path / "o", **FULL)
    assert result.recovery.losses == undisturbed("full")[1].recovery.losses


# These and the next are half of what there is, so that the tests end in time; each stage goes both ways.
MORE = [pytest.param(*one, marks=pytest.mark.long) for one in (("full", 0), ("low-rank", 1), ("low-rank", 2))]


@pytest.mark.parametrize(
    ("way", "zero"), [("full", 1), ("full", 2), pytest.param("low-rank", 3, marks=pytest.mark.long)]
)
def test_one_process_goes_on_where_two_were(folder, pair, undisturbed, way, zero, tmp_path):
    pair.cut_after = 2
    try:
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "o", pair, zero=zero, **WAYS[way])
    finally:
        pair.cut_after = None
    goes_on(undisturbed(way, zero), train(folder, tmp_path / "o", zero=zero, **WAYS[way]), tmp_path / "o")


@pytest.mark.parametrize(("way", "zero"), [*MORE, ("full", 3)])
def test_two_processes_go_on_where_one_was(folder, pair, undisturbed, way, zero, tmp_path):
    with cut_off(*CUTS["between two checkpoints"]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", zero=zero, **WAYS[way])
    goes_on(undisturbed(way, zero), train(folder, tmp_path / "o", pair, zero=zero, **WAYS[way]), tmp_path / "o")


def goes_on(undisturbed, result, out):
    reference, expected = undisturbed
    assert losses(result) == pytest.approx(losses(expected), abs=1e-5)
    held_out = [[record.held_out for record in run.recovery.losses if record.held_out] for run in (result, expected)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    assert len(held_out[0]) == 3
    assert furthest(out, reference) < 1e-5
    assert result.sparsity == expected.sparsity


BRIEF = {"steps": 2, "lora_rank": 2, "batch": 4}


def test_a_finished_training_leaves_what_it_has_not_written(folder, tmp_path):
    """Files of the user's, the checkpoints of another training, and the directory around the output."""
    train(folder, tmp_path / "around" / "o", **BRIEF)
    mine, another = tmp_path / "mine", tmp_path / "another"
    for place, content in ((mine / "thesis.txt", "chapter one"), (another / "fingerprint", "another's")):
        place.parent.mkdir()
        place.write_text(content)
    for state in (mine, another, tmp_path / "around"):
        train(folder, tmp_path / "around" / "o", state=str(state), **BRIEF)
    assert (mine / "thesis.txt").read_text() == "chapter one"
    assert (another / "fingerprint").read_text() == "another's"
    assert (tmp_path / "around" / "o" / "result.json").is_file()


def test_checkpoints_behind_a_link_are_removed_and_the_link_stays(folder, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "scratch")
    train(folder, tmp_path / "o", state=str(tmp_path / "state"), **BRIEF)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert (tmp_path / "state").is_symlink()


def test_a_training_goes_on_from_the_state_that_its_first_attempt_named(folder, undisturbed, tmp_path):
    state, way = tmp_path / "scratch", WAYS["low-rank"]
    with cut_off(*CUTS["between two checkpoints"]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", state=str(state), **way)
    steps: list[int] = []
    append = Losses.append
    with patch.object(Losses, "append", lambda self, loss: (steps.append(loss.step), append(self, loss))[1]):
        result = train(folder, tmp_path / "o", **way)
    assert sorted(set(steps)) == [3, 4, 5]
    assert result.recovery.losses == undisturbed("low-rank")[1].recovery.losses
    assert not state.exists()


def test_files_that_are_made_again_leave_the_record_of_the_training(folder, tmp_path):
    before = train(folder, tmp_path / "o", **BRIEF)
    (tmp_path / "o" / "tokenizer_config.json").unlink()
    after = train(folder, tmp_path / "o", **BRIEF)
    assert (tmp_path / "o" / "tokenizer_config.json").is_file()
    assert (after.recovery, after.throughput) == (before.recovery, before.throughput)
    assert len(after.recovery.losses) == 2
    assert after.workers == before.workers
