"""The lowest held-out loss: the weights that belong to it are written, and a training stops when it comes no more."""

import math
from unittest.mock import patch

import pytest

from shardprune.cluster.local_backend import LocalBackend
from shardprune.commands.prepare_recovery import prepare_recovery
from shardprune.errors import TrainingError
from shardprune.recovery.best import Best, best_of
from shardprune.recovery.checkpoints import Checkpoints
from shardprune.recovery.loss_log import Loss, Losses
from shardprune.report.progress import Reporter
from shardprune.storage.journal import Journal
from shardprune.storage.json_file import dump_json
from tests.recovery.test_resuming import cut_off
from tests.recovery.trainings import checked, furthest, loss_of, rows_of, train
from tests.support.tiny import differing

# Four rows to learn from, which are soon learned by heart: the held-out loss of the others goes up again.
SOON = {
    **{"held_out": 0.8, "batch": 4, "steps": 5, "checkpoint_every": 1},
    **{"schedule": "constant", "warmup": 0.0},
}
WAYS = {
    "full": {**SOON, "full": True, "learning_rate": 5e-2},
    "low-rank": {**SOON, "lora_rank": 4, "lora_alpha": 64.0, "lora_dropout": 0.0, "learning_rate": 2e-2},
}
LOWEST = {"full": 4, "low-rank": 2}  # step after which the held-out loss is lowest


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Output and result of a training with `best` that nothing cuts off."""
    made = {}

    def get(way, zero):
        if (way, zero) not in made:
            out = tmp_path_factory.mktemp("best") / "o"
            made[way, zero] = out, train(folder, out, zero=zero, best=True, **WAYS[way])
        return made[way, zero]

    return get


@pytest.mark.parametrize(("way", "zero"), [("low-rank", 1), ("full", 3)])
def test_the_weights_with_the_lowest_held_out_loss_are_written(folder, undisturbed, way, zero, tmp_path):
    out, result = undisturbed(way, zero)
    recovery, step = result.recovery, LOWEST[way]
    measured = [record.held_out for record in recovery.losses]
    assert (recovery.steps, recovery.best_step) == (5, step)
    assert measured[step - 1] == min(measured) < measured[-1] - 0.01
    _, held_out = rows_of(checked(folder, "o", **WAYS[way]))
    assert loss_of(out, held_out) == pytest.approx(min(measured), abs=1e-5)
    # They are those of a training that ends there, to the bit.
    last = train(folder, tmp_path / "o", zero=zero, **{**WAYS[way], "steps": step})
    assert differing(tmp_path / "o", out) == []
    assert last.recovery.best_step is None


CUTS = {
    "after the lowest": (Losses, "append", lambda _, loss: loss.step == 4, True),
    "before the best ones are loaded": (Checkpoints, "load_best", lambda *_: True, False),
    "while layers are written": (Journal, "write_layer", lambda _, shapes, tensor, record: record.layer == 1, False),
}


@pytest.mark.parametrize("place", CUTS)
def test_a_training_that_is_cut_off_writes_the_same_weights(folder, undisturbed, place, tmp_path):
    fields = {**WAYS["low-rank"], "zero": 1, "best": True}
    with cut_off(*CUTS[place]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **fields)
    kept = {path.name for path in (tmp_path / "o" / "training").glob("step*")}
    assert "step2" in kept
    assert len(kept) == 2  # it and the last one
    result = train(folder, tmp_path / "o", **fields)
    reference, expected = undisturbed("low-rank", 1)
    assert result.recovery == expected.recovery
    assert differing(tmp_path / "o", reference) == []


@pytest.mark.parametrize(
    ("way", "zero", "cut_after"), [("low-rank", 1, 3), pytest.param("full", 3, 4, marks=pytest.mark.long)]
)
def test_one_process_writes_the_best_weights_of_two(folder, pair, undisturbed, way, zero, cut_after, tmp_path):
    fields = {**WAYS[way], "zero": zero, "best": True}
    pair.cut_after = cut_after
    try:
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "o", pair, **fields)
    finally:
        pair.cut_after = None
    result = train(folder, tmp_path / "o", **fields)
    assert result.recovery.best_step == LOWEST[way]
    assert furthest(tmp_path / "o", undisturbed(way, zero)[0]) < 1e-4


def test_a_training_stops_early(folder, undisturbed, tmp_path, capsys):
    """The lowest loss is that of step 2, and those of steps 3 and 4 are the last that are waited for."""
    fields = {**WAYS["low-rank"], "zero": 1, "early_stopping": 2}
    with cut_off(*CUTS["while layers are written"]), pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "o", **fields)
    assert {path.name for path in (tmp_path / "o" / "training").glob("step*")} == {"step4"}
    recovery = train(folder, tmp_path / "o", **fields, reporter=Reporter()).recovery  # which does not take step 5
    assert "stopped after step 4 of 5: no new lowest held-out loss in 2" in capsys.readouterr().err
    expected = undisturbed("low-rank", 1)[1].recovery
    assert recovery.losses == expected.losses[:4]
    assert (recovery.steps, recovery.best_step) == (4, None)
    _, held_out = rows_of(checked(folder, "o", **WAYS["low-rank"]))
    assert loss_of(tmp_path / "o", held_out) == pytest.approx(recovery.losses[-1].held_out, abs=1e-5)


@pytest.mark.parametrize("choice", [{"best": True}, {"early_stopping": 2}, {}])
def test_another_interval_is_another_training_only_where_it_chooses_the_weights(folder, choice, tmp_path):
    recipes = [checked(folder, tmp_path / "o", held_out=0.2, checkpoint_every=every, **choice) for every in (1, 2)]
    fingerprints = {prepare_recovery(recipe, LocalBackend()).journal.fingerprint for recipe in recipes}
    assert len(fingerprints) == (2 if choice else 1)


@pytest.mark.parametrize("choice", [{"best": True}, {"early_stopping": 2}])
def test_the_interval_keeps_its_place_in_the_fingerprint(folder, choice, tmp_path):
    """A training begun when losses were measured at checkpoints goes on: its hash covered `checkpoint_every`."""
    recipe = checked(folder, tmp_path / "o", held_out=0.2, checkpoint_every=9, evaluate_every=3, **choice)
    with patch("shardprune.commands.prepare_recovery.dump_json", wraps=dump_json) as hashed:
        prepare_recovery(recipe, LocalBackend())
    (content,) = (call.args[0] for call in hashed.call_args_list if call.args[0].get("command") == "recover")
    assert content["checkpoint_every"] == 3
    assert "evaluate_every" not in content


def test_the_first_of_equal_losses_is_the_lowest():
    assert lowest(3.0, 2.0, None, 2.0, 2.5) == Best(step=2, loss=2.0, since=2)
    assert lowest(None, None) == Best()


def test_a_loss_that_is_no_number_is_never_the_lowest(tmp_path):
    assert lowest(math.nan, 2.0, math.nan) == Best(step=2, loss=2.0, since=1)
    never = lowest(math.nan, math.inf)
    assert (never.step, never.since) == (0, 2)
    with pytest.raises(TrainingError, match="none of the held-out losses is finite"):
        Checkpoints(str(tmp_path), trained_only=True, keep_best=True).load_best(None, never)


def lowest(*held_out):
    """The lowest of the losses of steps 1, 2, ..."""
    figures = {"gradient_norm": 2.0, "targets": 7, "tokens": 9, "seconds": 0.5, "peak_bytes": 10}
    return best_of(Loss(step, 1.0, 0.1, **figures, held_out=loss) for step, loss in enumerate(held_out, 1))
