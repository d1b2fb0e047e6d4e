"""Rows of several sources: as many of each as its weight says, evenly spread, and the training that takes them."""

import json
from collections import Counter
from fractions import Fraction

import pytest
import torch
from transformers import AutoTokenizer

from shardprune.cluster.local_backend import LocalBackend
from shardprune.commands.prepare_recovery import prepare_recovery
from shardprune.errors import InputError
from shardprune.recovery.examples import load_rows
from shardprune.recovery.mixing import RowMixture, joined
from shardprune.report.progress import Reporter
from shardprune.storage.mixture import Part
from tests.recovery.test_best import SOON
from tests.recovery.trainings import checked, losses, train
from tests.support.tiny import VOCABULARY, differing


def mixture(sizes, weights):
    parts = [Part(f"{place}.txt", Fraction(weight)) for place, weight in enumerate(weights)]
    return RowMixture.of(parts, sizes)


def test_an_epoch_has_the_rows_of_every_source_by_its_weight():
    made = mixture([10, 30], [3, 1])
    assert (made.drawn, made.passes()) == ((30, 10), [3, 1 / 3])
    epochs = [made.order(epoch, 0).tolist() for epoch in range(6)]
    for rows in epochs:
        for start in range(0, 40, 4):
            assert sum(row < 10 for row in rows[start : start + 4]) == 3
    # A pass over a source has each of its rows once: 180 of the small one are 18 passes, 60 of the large one two.
    counts = Counter(row for rows in epochs for row in rows)
    assert counts == {row: 18 if row < 10 else 2 for row in range(40)}


def test_passes_go_on_from_epoch_to_epoch():
    made = mixture([7, 5], [1, 2])  # 4 and 8 rows an epoch
    small = [row for epoch in range(7) for row in made.order(epoch, 0).tolist() if row < 7]
    assert all(sorted(small[start : start + 7]) == list(range(7)) for start in range(0, 28, 7))
    assert len({tuple(small[start : start + 7]) for start in range(0, 28, 7)}) == 4


def test_the_order_depends_on_epoch_and_seed_alone():
    made = mixture([7, 7], [1, 1])
    assert torch.equal(made.order(3, 5), mixture([7, 7], [2, 2]).order(3, 5))
    assert len({tuple(made.order(epoch, seed).tolist()) for epoch in range(3) for seed in range(3)}) == 9
    first, second = (tuple(row % 7 for row in made.order(0, 0).tolist() if row // 7 == part) for part in (0, 1))
    assert first != second


def test_a_source_without_a_row_is_refused():
    with pytest.raises(InputError, match=r"^data: '1.txt' would give none of the 6 rows of an epoch by the weights"):
        mixture([3, 3], [100, 1])


@pytest.fixture(scope="module")
def sources(folder):
    """Two files of documents with different words."""
    other = folder / "others.jsonl"
    lines = (folder / "documents.jsonl").read_text().split("\n")
    other.write_text("\n".join(json.dumps({"text": json.loads(line)["text"][::-1] + " the"}) for line in lines[:9]))
    return str(folder / "documents.jsonl"), str(other)


def test_a_training_takes_the_rows_of_the_mixture(folder, sources, tmp_path, capsys):
    """Losses of a rate that changes nothing are those of the rows that are taken."""
    fields = {
        "full": True,
        "learning_rate": 1e-30,
        "zero": 0,
        "steps": 3,
        "data": [f"{sources[0]}:1", f"{sources[1]}:3"],
    }
    result = train(folder, tmp_path / "o", reporter=Reporter(), **fields)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sparse")
    parts = [load_rows(source, lambda: tokenizer, 16, False, False, VOCABULARY) for source in sources]
    sizes = [len(part) for part in parts]
    made = mixture(sizes, [1, 3])
    rows = joined(parts)
    assert [rows.row(sizes[0] + 2).tokens.tolist()] == [parts[1].row(2).tokens.tolist()]
    order = [*made.order(0, 0).tolist(), *made.order(1, 0).tolist()]
    assert losses(result) == pytest.approx([plain_loss(folder, rows, order[8 * step :][:8]) for step in range(3)], 1e-5)
    assert result.recovery.rows == sum(sizes)
    assert f"an epoch of {sum(sizes)} rows: {sources[0]} {sizes[0]} rows x " in capsys.readouterr().err
    assert result.recipe["data"] == fields["data"]


def plain_loss(folder, rows, chosen):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    total = targets = 0
    with torch.no_grad():
        for row in map(rows.row, chosen):
            chances = torch.log_softmax(model(row.tokens[None].long()).logits[0, :-1], 1)
            picked = chances.gather(1, row.tokens[1:, None].long())[row.learned[1:]]
            total, targets = total - float(picked.sum()), targets + len(picked)
    return total / targets


def test_every_source_holds_rows_out(folder, sources, tmp_path):
    recipe = checked(folder, tmp_path / "o", held_out=0.25, data=sources)
    inputs = prepare_recovery(recipe, LocalBackend()).inputs
    assert len(inputs.held_out) == sum(round(0.25 * size) for size in (sum(inputs.mixture.sizes[:1]) * 4 // 3, 9))


@pytest.mark.parametrize("change", [{"data": 0}, {"data": 1}, {"data": 2}])
def test_another_weight_is_another_training(folder, sources, tmp_path, change):
    first, second = sources
    ways = [(f"{first}:2", f"{second}:2"), (f"{first}:1", f"{second}:2"), (f"{second}:1", f"{first}:1")]
    reference = prepare_recovery(checked(folder, tmp_path / "o", data=sources), LocalBackend()).journal.fingerprint
    found = prepare_recovery(checked(folder, tmp_path / "o", data=ways[change["data"]]), LocalBackend())
    assert (found.journal.fingerprint == reference) == (change["data"] == 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (["novel"], "'novel' is no known source; use alpaca, FILE.json"),
        (["alpaca:0", "c4"], "'alpaca:0' weighs nothing; use a weight above 0"),
        (["c4", "c4:2"], "'c4' is given twice"),
        (["self"], "'self' is no known source"),
        ([], "is empty; use alpaca"),
    ],
)
def test_other_mixtures_are_refused(folder, data, reason):
    with pytest.raises(InputError, match=f"^data: {reason}"):
        checked(folder, "o", data=data)


# -- held-out losses of steps without checkpoints -------------------------------------------------------------------


def test_losses_are_measured_between_checkpoints(folder, tmp_path):
    """The lowest is that of step 2, which has no checkpoint of its own but for that."""
    way = {**SOON, "lora_rank": 4, "lora_alpha": 64.0, "lora_dropout": 0.0, "learning_rate": 2e-2, "zero": 1}
    every = {**way, "checkpoint_every": 1, "best": True}
    rarely = {**way, "checkpoint_every": 4, "evaluate_every": 1, "best": True}
    reference, result = train(folder, tmp_path / "a", **every), train(folder, tmp_path / "b", **rarely)
    assert result.recovery.losses == reference.recovery.losses
    assert result.recovery.best_step == 2
    assert differing(tmp_path / "a", tmp_path / "b") == []
    stopped = train(folder, tmp_path / "c", **{**rarely, "best": False, "early_stopping": 1})
    assert stopped.recovery.steps == 3


def test_losses_may_be_measured_less_often_than_checkpoints_are_written(folder, tmp_path):
    result = train(folder, tmp_path / "o", zero=0, steps=5, held_out=0.2, checkpoint_every=1, evaluate_every=3)
    assert [record.step for record in result.recovery.losses if record.held_out is not None] == [3, 5]


def test_an_interval_of_evaluations_needs_held_out_rows(folder):
    with pytest.raises(InputError, match="^evaluate_every: 3 has no effect without held_out"):
        checked(folder, "o", evaluate_every=3)
