"""Log-likelihoods over shards against the model itself and against lm-eval's own model of it."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.evaluation.whole import whole_model
from tests.evaluation.material import make_readable, reading, requests_of, sharded, text
from tests.support.tiny import CONFIGS
from tests.support.words import words_tokenizer

POSITIONS = 64  # of the tiny models


def pairs(count: int = 30) -> list[tuple[str, str]]:
    """Contexts and continuations: empty ones, shared ones, spaces between, and more than the model takes."""
    draw = random.Random(1)
    drawn = [(text(draw, draw.randint(1, 40)), " " + text(draw, draw.randint(1, 6))) for _ in range(count)]
    drawn += [("", text(draw, words)) for words in (1, 5, 20)]
    drawn += [("one two", f" {word}") for word in ("three", "four", "five")]  # differ in their last token alone
    drawn += [("one two", " three four"), ("one two three", " four"), ("one ", "two")]
    drawn += [(text(draw, words), " six seven one") for words in (POSITIONS - 3, POSITIONS - 2, POSITIONS - 1, 100)]
    return drawn


def plain(model: str, context: str, continuation: str) -> tuple[float, bool]:
    """One text through the whole model, nothing around it."""
    tokenizer = words_tokenizer()
    before = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
    tokens = before + tokenizer.encode(continuation)
    count = len(tokens) - len(before)
    given = torch.tensor([tokens[-(POSITIONS + 1) :]])
    whole = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with torch.no_grad():
        logs = whole(given[:, :-1]).logits[0, -count:].log_softmax(-1)
    targets = given[0, -count:]
    total = sum(float(logs[position, token]) for position, token in enumerate(targets))
    return total, bool((logs.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readable")
    made = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = make_readable(folder / family, family)
        return made[family]

    return get


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_answers_as_the_model_itself(models, family):
    asked = pairs(8)
    lm = reading(sharded(models(family), wave=4))
    found = lm.loglikelihood(requests_of("loglikelihood", asked))
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        expected, expected_greedy = plain(models(family), context, continuation)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("family", ["llama-3.1", "qwen2", "gemma2", "opt"])
def test_the_conventions_are_those_of_the_harness(models, family):
    lm = reading(sharded(models(family)))
    harness = reading(whole_model(lm.model))
    harness.logits_cache = False  # which answers texts wrongly that are the same but for where they are split
    assert isinstance(harness, HFLM)
    assert lm.max_length == harness.max_length == POSITIONS
    asked = requests_of("loglikelihood", pairs())
    for one, other in zip(lm.loglikelihood(asked), harness.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    draw = random.Random(2)
    texts = requests_of("loglikelihood_rolling", [(text(draw, words),) for words in (1, 30, 63, 64, 65, 150, 300)])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        harness.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )


def test_texts_that_begin_with_the_first_token_get_it_once(models, tmp_path):
    from tokenizers.processors import TemplateProcessing

    model = make_readable(tmp_path / "m")
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    lm = sharded(model)
    harness = whole_model(lm.model)
    harness.logits_cache = False
    assert lm.tok_encode("one") == [1, 3]
    asked = requests_of("loglikelihood", [*pairs(4), ("<s> one", " two"), ("", "<s> one two")])
    for one, other in zip(lm.loglikelihood(asked), harness.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)


LAYOUTS = {
    "four shards": {"shards": 4},
    "replicas": {"shards": 2, "replicas": 3},
    "streamed": {"shards": 2, "weights": "streamed"},
    "one process": {"shards": 1},
}


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_changes_no_bit(models, settings):
    asked = requests_of("loglikelihood", pairs())
    expected = sharded(models("llama-3.1"), wave=4).loglikelihood(asked)
    assert sharded(models("llama-3.1"), wave=4, **settings).loglikelihood(asked) == expected


def test_many_lengths_leave_few_masks_behind(models):
    lm = sharded(models("mistral"), wave=1)
    draw = random.Random(3)
    lm.loglikelihood(requests_of("loglikelihood", [(text(draw, words), " one") for words in range(1, 64)]))
    for worker in lm.model._group._workers.values():
        assert len(worker.skeleton._arguments) <= 8


def test_what_cannot_be_answered(models):
    lm = sharded(models("llama-3.1"))
    with pytest.raises(InputError, match="a continuation has 65 tokens; the model takes 1 to 64"):
        lm.loglikelihood(requests_of("loglikelihood", [("one", " two" * 65)]))
    with pytest.raises(InputError, match="lets the model write text, which shards do not do; use --engine hf"):
        lm.generate_until(requests_of("generate_until", [("one", {})]))
