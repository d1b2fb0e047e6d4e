"""The same training under every stage of ZeRO, in one process, in two, and in plain PyTorch."""

import pytest

from tests.recovery.trainings import checked, furthest, loss_of, losses, plain_training, rows_of, same_zeros, train
from tests.support.entries import entries
from tests.support.tiny import load_tensors

FULL = {"full": True, "weight_decay": 0.1, "clip": 0.7}
UPDATES = {"lora_rank": 4, "lora_dropout": 0.0, "weight_decay": 0.1, "clip": 0.7}
WAYS = {"full": FULL, "low-rank": UPDATES}
SPARSE = {"keep_sparsity": True, "held_out": 0.2}


@pytest.fixture(scope="module")
def plain(folder):
    """Losses and weights in plain PyTorch, each computed once."""
    made = {}

    def get(**fields):
        key = str(sorted(fields.items()))
        if key not in made:
            made[key] = plain_training(checked(folder, "o", **fields))
        return made[key]

    return get


def check(result, out, expected):
    assert losses(result) == pytest.approx(expected[0], abs=1e-4)
    assert losses(result)[-1] < losses(result)[0] - 0.03  # it learns something
    assert furthest(out, expected[1]) < 1e-4


@pytest.mark.parametrize(("zero", "way"), [(0, "full"), (0, "low-rank"), (3, "full")])
def test_one_process_is_plain_pytorch(folder, plain, way, zero, tmp_path):
    fields = WAYS[way]
    result = train(folder, tmp_path / "o", zero=zero, micro_batch=4, **fields)
    check(result, tmp_path / "o", plain(**fields))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("zero", entries([1, 2, 3], "1"))
def test_two_processes_are_plain_pytorch_and_zeros_stay(folder, pair, plain, way, zero, tmp_path):
    fields = {**WAYS[way], **SPARSE}
    result = train(folder, tmp_path / "o", pair, zero=zero, **fields)
    check(result, tmp_path / "o", plain(**fields))
    assert same_zeros(folder / "sparse", tmp_path / "o")
    assert result.recovery.zeros_before == result.recovery.zeros_kept == result.recovery.zeros_after > 0
    # What was written is what was trained.
    _, held_out = rows_of(checked(folder, "o", **fields))
    assert loss_of(tmp_path / "o", held_out) == pytest.approx(result.recovery.losses[-1].held_out, abs=1e-5)


def test_two_processes_drop_what_one_drops_and_lose_the_zeros_that_it_loses(folder, pair, tmp_path):
    fields = {"lora_rank": 4, "lora_dropout": 0.3, "steps": 4}
    one, two = train(folder, tmp_path / "one", **fields), train(folder, tmp_path / "two", pair, **fields)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5
    assert two.recovery.zeros_after == two.recovery.zeros_kept == 0


def test_two_processes_that_train_all_weights_without_sparsity(folder, pair, plain, tmp_path):
    check(train(folder, tmp_path / "o", pair, zero=0, **FULL), tmp_path / "o", plain(**FULL))


@pytest.mark.parametrize(("zero", "shares"), [(2, 1), (3, 2)])
def test_under_stage_3_each_process_reads_its_own_part_of_the_model(folder, pair, zero, shares, tmp_path):
    train(folder, tmp_path / "o", pair, zero=zero, steps=1, lora_rank=2)
    tensors = load_tensors(folder / "sparse").values()
    assert pair.loaded_bytes == [sum(tensor.nbytes for tensor in tensors) // shares] * 2


# -- a teacher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "weight"), [("full", 1.0), ("low-rank", 0.3)])
def test_a_teacher_is_learned_from(folder, way, weight, tmp_path):
    taught = {"teacher": str(folder / "dense"), "temperature": 1.5, "teacher_weight": weight, "steps": 4, **WAYS[way]}
    result = train(folder, tmp_path / "o", zero=1, **taught)
    expected, weights = plain_training(checked(folder, "o", **taught))
    assert losses(result) == pytest.approx(expected, abs=1e-4)
    assert furthest(tmp_path / "o", weights) < 1e-4


def test_a_teacher_is_shared_out_with_the_student(folder, pair, tmp_path):
    taught = {"teacher": str(folder / "dense"), "steps": 4, "held_out": 0.2, "keep_sparsity": True, **UPDATES}
    result = train(folder, tmp_path / "o", pair, zero=3, **taught)
    expected, weights = plain_training(checked(folder, "o", **taught))
    assert losses(result) == pytest.approx(expected, abs=1e-4)
    assert furthest(tmp_path / "o", weights) < 1e-4
    # Held-out losses are of the student alone.
    _, held_out = rows_of(checked(folder, "o", **taught))
    assert loss_of(tmp_path / "o", held_out) == pytest.approx(result.recovery.losses[-1].held_out, abs=1e-5)


# -- other ways to the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "way"), [(0, "low-rank"), pytest.param(3, "low-rank", marks=pytest.mark.long), (3, "full")]
)
def test_recomputed_activations_are_the_same(folder, plain, way, zero, tmp_path):
    fields = {**WAYS[way], "keep_sparsity": True, "steps": 4}
    result = train(folder, tmp_path / "o", zero=zero, recompute=True, **fields)
    expected, weights = plain(**fields)
    assert losses(result) == pytest.approx(expected, abs=1e-4)
    assert furthest(tmp_path / "o", weights) < 1e-4


def test_recomputed_activations_have_the_same_dropout(folder, tmp_path):
    fields = {"lora_rank": 4, "lora_dropout": 0.3, "steps": 4, "zero": 2}
    kept, again = (train(folder, tmp_path / str(value), recompute=value, **fields) for value in (False, True))
    assert losses(again) == losses(kept)


def test_packed_rows_are_the_same_rows(folder, tmp_path):
    """Every step takes all rows, so that their order and their number do not matter."""
    found = []
    for packing in (False, True):
        recipe = checked(folder, "o", packing=packing)
        count = len(rows_of(recipe)[0])
        fields = {"packing": packing, "batch": count, "micro_batch": count, "steps": 3}
        found.append((count, train(folder, tmp_path / str(packing), **fields, **FULL)))
    (single, apart), (packed, together) = found
    assert packed < single
    assert losses(together) == pytest.approx(losses(apart), abs=1e-4)
    assert together.recovery.targets == apart.recovery.targets
    assert furthest(tmp_path / "True", tmp_path / "False") < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_trained_stays_as_it_is(folder, way, tmp_path):
    train(folder, tmp_path / "o", steps=1, zero=0, **WAYS[way])
    before, after = load_tensors(folder / "sparse"), load_tensors(tmp_path / "o")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == (set(before) if way == "full" else {name for name in before if "_proj" in name})
