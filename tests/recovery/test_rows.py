"""Rows of tokens: how they are stored, drawn, put into batches and packed."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.empty_model import attention_of
from shardprune.model.families import FAMILIES
from shardprune.recovery.rows import Example, Rows, check_packing, needs_mask, pack
from shardprune.storage.folder import Folder
from tests.support.tiny import CONFIGS, VOCABULARY, make_model


def example(tokens, learned=None):
    learned = [True] * len(tokens) if learned is None else learned
    return Example(torch.tensor(tokens, dtype=torch.int32), torch.tensor(learned, dtype=torch.bool))


def random_examples(sizes, seed=0):
    draw = random.Random(seed)
    return [example(draw.choices(range(VOCABULARY), k=n), draw.choices([True, True, False], k=n)) for n in sizes]


def small_rows():
    """Row 0 holds one example, row 1 two, of which the first has a prompt of two tokens."""
    first = example([5, 6, 7])
    return Rows.of([[first], [example([1, 2, 3], [True, False, True]), example([8, 9])]])


def many_rows(count=10):
    return Rows.of([[example([index, index + 1])] for index in range(count)])


def test_rows_of_examples():
    rows = small_rows()
    assert len(rows) == 2
    assert rows.tokens.tolist() == [5, 6, 7, 1, 2, 3, 8, 9]
    assert rows.learned.tolist() == [False, True, True, False, False, True, False, True]
    assert rows.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert rows.starts.tolist() == [0, 3, 8]
    kinds = [tensor.dtype for tensor in (rows.tokens, rows.learned, rows.positions, rows.starts)]
    assert kinds == [torch.int32, torch.bool, torch.int32, torch.int64]
    assert [part.tolist() for part in rows.row(0)] == [[5, 6, 7], [False, True, True], [0, 1, 2]]
    assert rows.targets([0]) == 2
    assert rows.targets([0, 1, 1]) == 6
    assert rows.targets([]) == 0


def test_a_batch_is_padded_on_the_right():
    batch = small_rows().collate([0, 1])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 0, 0], [1, 2, 3, 8, 9]],
        "labels": [[-100, 6, 7, -100, -100], [-100, -100, 3, -100, 9]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_counts_the_last_example_on():
    rows = Rows.of([[example([1, 2, 3]), example([4, 5])], [example([1] * 7)]])
    assert rows.collate([0, 1])["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]


def test_a_mask_where_a_row_is_packed():
    rows = small_rows()
    assert "attention_mask" not in rows.collate([0], mask=True)
    mask = rows.collate([0, 1], mask=True)["attention_mask"]
    assert (mask.dtype, mask.shape) == (torch.bool, (2, 1, 5, 5))
    assert mask[0, 0].int().tolist() == torch.ones(5, 5).int().tril().tolist()
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_the_order_depends_on_epoch_and_seed_alone():
    rows = many_rows(50)
    order = rows.order(1, 7)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(50))
    torch.manual_seed(5)
    assert torch.equal(order, rows.order(1, 7))
    others = {tuple(rows.order(epoch, seed).tolist()) for epoch in range(4) for seed in range(4)}
    assert len(others) == 16  # one seed's second epoch is not the next one's first


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 2), (0.01, 1), (0.999, 9), (0.25, 2)])
def test_a_share_is_held_out(held_out, count):
    rows = many_rows()
    kept, held = rows.split(held_out, seed=3)
    assert (len(kept), len(held)) == (10 - count, count)
    firsts = [[int(part.row(index).tokens[0]) for index in range(len(part))] for part in (kept, held)]
    assert sorted(firsts[0] + firsts[1]) == list(range(10))
    assert firsts == [sorted(part) for part in firsts]
    assert rows.split(held_out, seed=3)[1].digest() == held.digest()
    assert len({rows.split(held_out, seed)[1].digest() for seed in range(8)}) > 1


def test_nothing_is_held_out():
    kept, held = small_rows().split(0, seed=0)
    assert kept.digest() == small_rows().digest()
    assert len(held) == 0


def test_one_row_cannot_be_split():
    with pytest.raises(InputError, match=r"held_out: 0\.1 of 1 rows leaves none for one part"):
        many_rows(1).split(0.1, seed=0)


@pytest.mark.parametrize("url", ["{tmp}/state", "memory://rows"])
def test_stored_rows_are_the_same(tmp_path, url):
    folder = Folder(url.format(tmp=tmp_path), "out")
    rows = small_rows()
    rows.save(folder, "rows.safetensors")
    loaded = Rows.load(folder, "rows.safetensors")
    assert loaded.digest() == rows.digest()
    assert loaded.images is rows.images is None
    for name, tensor in vars(rows).items():
        if name != "images":
            found = getattr(loaded, name)
            assert (found.dtype, found.tolist()) == (tensor.dtype, tensor.tolist())
    none = rows.select([])
    none.save(folder, "none.safetensors")
    assert len(Rows.load(folder, "none.safetensors")) == 0
    with pytest.raises(InputError, match="out: .* does not exist"):
        Rows.load(folder, "other.safetensors")


def test_the_digest_tells_all_content_apart():
    a, b = example([1, 2, 3]), example([4, 5])
    different = [
        Rows.of([[a], [b]]),
        Rows.of([[a, b]]),
        Rows.of([[b], [a]]),
        Rows.of([[example([1, 2, 3], [True, True, False])], [b]]),
        Rows.of([[example([1, 2, 3, 4, 5])]]),
    ]
    assert len({rows.digest() for rows in different}) == len(different)


# -- packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [9], [10] * 5, [6] * 5, [1] * 25, random.Random(0).choices(range(1, 11), k=500)])
def test_packing_puts_every_example_into_one_row(sizes):
    rows = pack(sizes, 10)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[index] for index in row) for row in rows)
    assert all(total <= 10 for total in filled)
    assert all(total > 5 for total in filled[1:])
    assert rows == pack(sizes, 10)


def test_packing_is_best_fit_with_the_longest_first():
    assert pack([2, 7, 5, 3, 4], 10) == [[1, 3], [2, 4], [0]]


def test_packing_of_many_examples_wastes_little():
    sizes = random.Random(0).choices(range(20, 400), k=20_000)
    assert sum(sizes) / (1024 * len(pack(sizes, 1024))) > 0.99


def test_every_family_packs():
    for model_type in FAMILIES:
        check_packing(model_type)
    with pytest.raises(InputError, match="packing: not for model_type 'mamba', but for llama, mistral"):
        check_packing("mamba")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model"), request.param)
    attention = attention_of(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()


def summed_loss(model, batch):
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def loss_and_gradient(model, batches):
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0  # OPT's default
    total = sum(summed_loss(model, batch) for batch in batches)
    total.backward()
    return total.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def difference(found, expected):
    """The larger one of the relative differences of two losses and of their gradients."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_packed_examples_are_learned_as_if_they_were_alone(model, batch):
    sizes = [13, 9, 2, 11, 5, 12, 20, 3, 1, 17]  # beyond the sliding windows of 8, and one without targets
    examples = random_examples(sizes)
    alone = Rows.of([[one] for one in examples])
    packed = Rows.of([[examples[index] for index in row] for row in pack(sizes, 30)])
    assert (len(packed), max(packed.starts.diff())) == (4, 30)
    mask = needs_mask(model.config.model_type)
    expected = loss_and_gradient(model, [alone.collate([index]) for index in range(len(alone))])
    starts = range(0, len(packed), batch)
    batches = [packed.collate(range(start, min(start + batch, len(packed))), mask) for start in starts]
    assert difference(loss_and_gradient(model, batches), expected) < 1e-5
    key = "attention_mask" if mask else "position_ids"  # what keeps them apart
    mixed = [{name: tensor for name, tensor in one.items() if name != key} for one in batches]
    assert difference(loss_and_gradient(model, mixed), expected) > 1e-3


def test_padding_changes_nothing(model):
    rows = Rows.of([[one] for one in random_examples([20, 3, 11])])
    expected = loss_and_gradient(model, [rows.collate([index]) for index in range(3)])
    assert difference(loss_and_gradient(model, [rows.collate([0, 1, 2])]), expected) < 1e-5
