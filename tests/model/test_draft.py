"""Drafts: how a text begins, by the model's tokenizer or without one, and in which batches it is computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.draft import Kept, draft_of, kept_by
from shardprune.model.kept_keys import kept_argument
from shardprune.model.opening import open_model
from shardprune.recipes.groups import KEPT_ELEMENTS, batch_of
from tests.support.architectures import DENSE, MIXED, MIXTURES, make_architecture
from tests.support.tiny import VOCABULARY, make_model
from tests.support.words import WORDS, words_tokenizer


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    return open_model(make_model(tmp_path_factory.mktemp("draft") / "model")).skeleton  # of 64 positions


def drafted(skeleton, tokenizer=None, seqlen=24, **fields):
    values = {"sequences": 40, "seed": 0, "temperature": 1.0, "batch": 16, "beginning": False, **fields}
    return draft_of(skeleton, tokenizer, seqlen=seqlen, **values)


def test_without_a_tokenizer_the_config_names_the_tokens_that_no_text_begins_with(skeleton):
    draft = drafted(skeleton)
    openings = draft.openings(range(40))
    assert openings.shape == (40, 1)
    assert set(openings.flatten().tolist()) <= set(range(2, VOCABULARY))
    assert len(openings.unique()) > 20
    assert (draft.bos, draft.dropped, draft.length) == (None, 8, 32)


def test_a_tokenizer_says_which_tokens_there_are(skeleton):
    openings = drafted(skeleton, words_tokenizer(), sequences=200).openings(range(200))
    assert set(openings.flatten().tolist()) == set(range(3, len(WORDS)))


def test_texts_begin_with_the_token_that_the_tokenizer_puts_before_them_where_asked(skeleton):
    class Beginning:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def __call__(self, text):
            encoded = self.inner(text)
            encoded["input_ids"] = [self.inner.bos_token_id, *encoded.input_ids]
            return encoded

    assert drafted(skeleton, Beginning(words_tokenizer())).bos is None
    draft = drafted(skeleton, Beginning(words_tokenizer()), beginning=True)
    openings = draft.openings(range(40))
    assert openings.shape == (40, 2)
    assert openings[:, 0].unique().tolist() == [1]
    assert torch.equal(openings[5:9], draft.openings(range(5, 9)))
    assert (draft.bos, draft.dropped) == (1, 9)


@pytest.mark.parametrize("tokenizer", [None, words_tokenizer()], ids=["none", "one that puts none"])
def test_a_beginning_that_there_is_not_is_refused(skeleton, tokenizer):
    with pytest.raises(InputError, match=r"^self_bos: the model's tokenizer puts no token before a text; leave it out"):
        drafted(skeleton, tokenizer, beginning=True)


@pytest.mark.parametrize(("seqlen", "dropped"), [(56, 8), (60, 4), (64, 0)])
def test_as_many_tokens_are_dropped_as_the_model_has_positions_for(skeleton, seqlen, dropped):
    assert drafted(skeleton, seqlen=seqlen).dropped == dropped


def test_batches_are_cut_without_a_look_at_the_workers(skeleton):
    assert drafted(skeleton).batches == [range(16), range(16, 32), range(32, 40)]


@pytest.mark.parametrize(
    ("asked", "kept", "batch"),
    [(5, KEPT_ELEMENTS, 5), (None, 10, 32), (None, KEPT_ELEMENTS // 10, 8), (None, 10**11, 1)],
)
def test_a_batch_keeps_what_a_gpu_has_room_for(asked, kept, batch):
    assert batch_of(asked, kept) == batch


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "falcon_h1", "gemma", "longcat_flash", "mamba2", "nemotron_h", "qwen3_5_text"]
)
def test_layers_keep_what_transformers_keeps(model_type, tmp_path):
    make_architecture(tmp_path / "model", model_type, {**MIXTURES, **DENSE, **MIXED}[model_type])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    layers = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True)[kept_argument(model)].layers
    expected = []
    for layer in layers:
        keys = [tensor.numel() for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
        held = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        expected.append(Kept(sum(keys), sum(state.nbytes for state in held if state is not None)))
    opened = open_model(str(tmp_path / "model")).skeleton
    if model_type == "longcat_flash":  # each layer has two attentions
        expected = [sum(pair, Kept()) for pair in zip(expected[::2], expected[1::2], strict=True)]
    assert kept_by(opened, range(opened.layers)) == expected
    assert kept_by(opened, [1]) == expected[1:2]


def test_plain_attention_keeps_keys_and_values_alone(skeleton):
    kept = kept_by(skeleton, range(skeleton.layers))
    assert kept == [Kept(2 * 2 * 8, 0)] * 4  # keys and values, heads, width
    assert sum(kept, Kept(0, 5)).bytes_of(10, torch.bfloat16) == 10 * 4 * 32 * 2 + 5
