"""Calibration on what the model itself writes: the text of a plain generation, whatever the layout and whoever dies."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.empty_model import attention_of
from shardprune.model.kept_keys import kept_argument
from shardprune.model.verification import KEEPING_STATES
from shardprune.report.result import read_result
from shardprune.shard.generation_worker import GenerationWorker, Room
from shardprune.storage import self_text
from shardprune.storage.folder import Folder
from tests.support.architectures import DENSE, MIXED, MIXTURES, make_architecture
from tests.support.entries import entries
from tests.support.running import rebuild_run, run, search_run
from tests.support.tiny import CONFIGS, differing, make_model, snapshot

CHEAP = {"method": "magnitude", "sparsity": 0.5, "measure_error": False, "calibration": "self", "targets": "own"}
BATCH = 5  # of 12 sequences: two whole batches and a rest


def text(out) -> np.ndarray:
    return np.load(out / "self.npy")


def plain_text(folder, sequences=12, seqlen=24, batch=BATCH, temperature=1.0, seed=0) -> np.ndarray:
    """What transformers' model writes by the same draws, batch by batch."""
    attention = attention_of(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    length = 8 + seqlen
    special = {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}
    ordinary = [token for token in range(model.config.vocab_size) if token not in special]
    draws = np.stack(
        [
            np.random.Generator(np.random.Philox(key=np.array([seed, sequence], dtype=np.uint64))).random(length)
            for sequence in range(sequences)
        ]
    )
    keeps, written = kept_argument(model), []
    for start in range(0, sequences, batch):
        own = draws[start : start + batch]
        tokens = torch.tensor([[ordinary[int(draw * len(ordinary))]] for draw in own[:, 0]])
        past, latest = None, tokens
        told = model.config.model_type == "bamba"  # transformers' own generation tells it its positions
        for position in range(1, length):
            with torch.no_grad():
                positions = {"position_ids": torch.tensor([[position - 1]])} if told else {}
                output = model(input_ids=latest, use_cache=True, **{keeps: past}, **positions)
            past = output[keeps]
            cumulative = (output.logits[:, -1] / temperature).softmax(-1).double().cumsum(-1).numpy()
            at = [[int((row <= draw).sum())] for row, draw in zip(cumulative, own[:, position], strict=True)]
            latest = torch.tensor(at)
            tokens = torch.cat([tokens, latest], 1)
        written.append(tokens[:, 8:])
    return torch.cat(written).numpy()


@pytest.mark.parametrize("family", entries(list(CONFIGS), "mistral", "phi3", "opt-350m", "qwen2"))
def test_every_family_writes_what_a_plain_generation_does(family, tmp_path):
    make_model(tmp_path / "model", family)
    run(tmp_path, "o", **CHEAP, self_batch=BATCH, shards=3)
    assert text(tmp_path / "o").tolist() == plain_text(tmp_path / "model").tolist()


@pytest.mark.parametrize("model_type", [*DENSE, *sorted(KEEPING_STATES), "llama4_text", "longcat_flash"])
def test_other_architectures_do_so_too(model_type, tmp_path):
    make_architecture(tmp_path / "model", model_type, {**MIXTURES, **DENSE, **MIXED}[model_type])
    run(tmp_path, "o", **CHEAP, samples=3, seqlen=16, self_batch=2, shards=2)
    assert text(tmp_path / "o").tolist() == plain_text(tmp_path / "model", 3, 16, 2).tolist()


@pytest.fixture(scope="module")
def written(folder):
    """The text of a run on one worker, and the run's output."""
    run(folder, folder / "written", **CHEAP, self_batch=BATCH)
    return folder / "written"


@pytest.mark.parametrize(
    "fields",
    [{"shards": 3}, {"replicas": 2}, {"weights": "streamed"}, {"weights": "streamed", "shards": 2, "replicas": 2}],
    ids=str,
)
def test_the_layout_does_not_change_a_token(folder, written, fields, tmp_path):
    run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH, **fields)
    assert (tmp_path / "o" / "self.npy").read_bytes() == (written / "self.npy").read_bytes()
    assert differing(tmp_path / "o", written) == []


@pytest.mark.parametrize("batches", [1, 3])
def test_streamed_layers_are_read_once_for_all_batches_that_fit(folder, written, batches, tmp_path, monkeypatch):
    small = lambda self, resident: Room(resident, 0 if resident else batches, 1, 1)  # noqa: E731
    monkeypatch.setattr(GenerationWorker, "_room", small)
    run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH, weights="streamed")
    assert (tmp_path / "o" / "self.npy").read_bytes() == (written / "self.npy").read_bytes()
    spans = [json.loads(line) for line in (tmp_path / "o" / "events.jsonl").read_text().splitlines()]
    calls = sum(span[5] for event in spans for span in event.get("spans", []) if span[0] == "draw")
    assert calls == {1: 3, 3: 1}[batches] * (8 + 24 - 1)


def test_a_worker_without_room_for_one_batch_is_told_so_before_anything_is_done(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(GenerationWorker, "_room", lambda self, resident: Room(resident, 0, 9 * 10**9, 10**9))
    with pytest.raises(InputError, match=r"^self_batch: the keys, values .* 9\.0 GB .* which has 1\.0 GB .*; use a"):
        run(folder, tmp_path / "o", **CHEAP)
    assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())


def test_seed_temperature_and_batch_make_another_text(folder, written, tmp_path):
    texts = [text(written).tolist()]
    for place, fields in enumerate(({"seed": 1}, {"self_temperature": 0.5})):
        run(folder, tmp_path / str(place), **CHEAP, self_batch=BATCH, **fields)
        texts.append(text(tmp_path / str(place)).tolist())
    model = folder / "model"
    assert texts == [
        plain_text(model).tolist(),
        plain_text(model, seed=1).tolist(),
        plain_text(model, temperature=0.5).tolist(),
    ]
    assert len({str(one) for one in texts}) == 3


class Died(KeyboardInterrupt):
    pass


def dying_at_call(monkeypatch, number):
    """Make a call of `draw` fail, once; return the numbers of all calls."""
    draw, calls, dead = GenerationWorker.draw, [], False

    @functools.wraps(draw)
    def failing(self, wave, position, incoming):
        nonlocal dead
        calls.append((wave.start, position))
        if len(calls) == number and not dead:
            dead = True
            raise Died
        return draw(self, wave, position, incoming)

    monkeypatch.setattr(GenerationWorker, "draw", failing)
    return calls


def test_a_kill_in_generation_ends_in_the_same_tensors(folder, written, tmp_path, monkeypatch):
    calls = dying_at_call(monkeypatch, 40)  # of 31 for each batch
    with pytest.raises(Died):
        run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    assert text(tmp_path / "o").tolist() == text(written)[:BATCH].tolist()
    calls.clear()
    run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    assert {start for start, _ in calls} == {5, 10}  # the first batch is not written again
    assert (tmp_path / "o" / "self.npy").read_bytes() == (written / "self.npy").read_bytes()
    assert differing(tmp_path / "o", written) == []


def test_a_text_that_is_there_is_not_written_again(folder, written, tmp_path, monkeypatch, dies_at_layer):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    calls = dying_at_call(monkeypatch, 1)
    run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    assert calls == []
    assert differing(tmp_path / "o", written) == []


@pytest.mark.parametrize("damage", ["tokens", "record", "both gone"])
def test_a_damaged_text_is_written_again_and_has_to_be_the_same(folder, written, damage, tmp_path, dies_at_layer):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    if damage == "record":
        (tmp_path / "o" / "self.json").write_text("{}")
    elif damage == "tokens":
        np.save(tmp_path / "o" / "self.npy", text(written)[::-1])
    else:
        (tmp_path / "o" / "self.json").unlink()
        (tmp_path / "o" / "self.npy").unlink()
    run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    assert (tmp_path / "o" / "self.npy").read_bytes() == (written / "self.npy").read_bytes()
    assert differing(tmp_path / "o", written) == []


def test_finished_layers_do_not_go_on_with_another_text(folder, tmp_path, monkeypatch, dies_at_layer):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)
    (tmp_path / "o" / "self.npy").unlink()
    # As on other hardware, which rounds differently.
    monkeypatch.setattr(
        "shardprune.shard.generation_worker.drawn_tokens", lambda logits, _, draws: torch.full((len(logits),), 3)
    )
    with pytest.raises(InputError, match=r"^out: .* the model now writes another; choose an empty directory"):
        run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH)


def test_a_finished_run_writes_nothing_again(folder, written, tmp_path, monkeypatch):
    shutil.copytree(written, tmp_path / "o")
    (tmp_path / "o" / "self.npy").unlink()
    calls = dying_at_call(monkeypatch, 1)
    before = read_result(Folder(str(tmp_path / "o"), "out"))
    result = run(folder, tmp_path / "o", **CHEAP, self_batch=BATCH, eval=(str(folder / "other.npy"),))
    assert calls == []
    assert result.calibration == before.calibration


def test_the_text_of_another_run_is_used_as_it_is(folder, written, tmp_path):
    source = f"self:{written}"
    result = run(folder, tmp_path / "o", **{**CHEAP, "calibration": source, "method": "wanda"})
    tokens = run(folder, tmp_path / "n", **{**CHEAP, "calibration": str(written / "self.npy"), "method": "wanda"})
    assert differing(tmp_path / "o", tmp_path / "n") == []
    assert result.calibration.tokens_sha256 == tokens.calibration.tokens_sha256
    assert result.calibration.source == source
    assert not (tmp_path / "o" / "self.npy").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"samples": 13}, r"samples: 13 is more than the 12 sequences of self:"),
        ({"seqlen": 16}, r"seqlen: 16 is not the length 24 of the sequences of self:"),
        ({"calibration": "self:nowhere"}, r"calibration: 'nowhere' holds no text that a model has written for itself"),
        ({"calibration": "self", "seqlen": 65}, r"seqlen: 65 is more than the model's 64 positions"),
        ({"self_batch": 3}, r"self_batch: 3 has no effect without calibration self"),
        ({"self_temperature": 0.5}, r"self_temperature: 0\.5 has no effect without calibration self"),
        ({"self_temperature": 0, "calibration": "self"}, r"self_temperature: 0 is not allowed"),
        ({"calibration": ["self", "c4:100"], "samples": 2}, r"samples: 2 windows leave none for 'self'"),
    ],
    ids=str,
)
def test_errors_are_found_before_any_work(folder, written, fields, reason, tmp_path):
    values = {**CHEAP, "calibration": f"self:{written}", **fields}
    with pytest.raises(InputError, match=f"^{reason}"):
        run(folder, tmp_path / "o", **values)
    assert not (tmp_path / "o").exists()


def test_a_damaged_text_of_another_run_is_refused(folder, written, tmp_path):
    shutil.copytree(written, tmp_path / "damaged")
    np.save(tmp_path / "damaged" / "self.npy", text(written)[::-1])
    with pytest.raises(InputError, match=r"^calibration: .*self\.npy holds other tokens than were written"):
        run(folder, tmp_path / "o", **{**CHEAP, "calibration": f"self:{tmp_path / 'damaged'}"})


def test_a_mixture_has_the_windows_of_all_in_turn(folder, written, tmp_path):
    tokens = str(folder / "tokens.npy")
    fields = {**CHEAP, "method": "wanda", "self_batch": BATCH}
    mixed = run(folder, tmp_path / "o", **{**fields, "calibration": [f"{tokens}:2", "self"]})
    given, own = np.load(tokens), text(tmp_path / "o")
    assert own.tolist() == text(written)[:4].tolist()
    windows = np.stack(
        [own[place // 3] if place % 3 == 1 else given[2 * (place // 3) + (place % 3) // 2] for place in range(12)]
    )
    np.save(tmp_path / "windows.npy", windows)
    as_given = {**CHEAP, "method": "wanda", "calibration": str(tmp_path / "windows.npy")}
    plain = run(folder, tmp_path / "plain", **as_given)
    assert differing(tmp_path / "o", tmp_path / "plain") == []
    assert mixed.calibration.tokens_sha256 == plain.calibration.tokens_sha256
    assert mixed.calibration.source == f"{tokens}:2 + self"
    assert mixed.recipe["calibration"] == [f"{tokens}:2", "self"]
    with pytest.raises(InputError, match="holds another run"):
        run(folder, tmp_path / "o", **{**fields, "calibration": ["self", f"{tokens}:2"]})


def test_structures_go_and_weights_become_zero_by_one_and_the_same_text(folder, written, tmp_path, dies_at_layer):
    fields = {"calibration": "self", "self_batch": BATCH, "structured": 0.2, "sparsity": 0.5}
    run(folder, tmp_path / "o", **fields)
    given = {**fields, "calibration": f"self:{written}"}
    del given["self_batch"]
    run(folder, tmp_path / "given", **given)
    assert differing(tmp_path / "o", tmp_path / "given") == []
    assert text(tmp_path / "o").tolist() == text(written).tolist()
    assert {path.name for path in (tmp_path / "o").iterdir()} - {
        path.name for path in (tmp_path / "given").iterdir()
    } == {
        "self.npy",
        "self.json",
    }
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "again", **fields)
    run(folder, tmp_path / "again", **fields)
    assert differing(tmp_path / "o", tmp_path / "again") == []
    before = snapshot(tmp_path / "again")
    assert run(folder, tmp_path / "again", **fields, eval=(str(folder / "other.npy"),)).perplexity
    after = snapshot(tmp_path / "again")
    assert {name for name in after if after[name] != before.get(name)} <= {"README.md", "result.json", "events.jsonl"}


def test_the_other_commands_calibrate_on_it(folder, written, tmp_path):
    search_run(folder, tmp_path / "mop", path="G", calibration="self", self_batch=BATCH)
    assert text(tmp_path / "mop").tolist() == text(written).tolist()
    rebuild_run(folder, tmp_path / "rebuilt", written, calibration="self", self_batch=BATCH)
    assert text(tmp_path / "rebuilt").tolist() == text(written).tolist()  # the dense model's


def test_a_text_says_what_it_was_decided_by(folder, written):
    record = json.loads((written / "self.json").read_text())
    assert record["draft"] | {"special": ""} == {
        "sequences": 12,
        "seqlen": 24,
        "seed": 0,
        "temperature": 1.0,
        "batch": BATCH,
        "dropped": 8,
        "bos": None,
        "vocabulary": 64,
        "special": "",
    }
    assert record["written"] == 12
    kept = {name: record[name] for name in ("model", "dtype", "draft")}
    assert self_text.found(Folder(str(written), "out"), kept).tolist() == text(written).tolist()
    assert self_text.found(Folder(str(written), "out"), {**kept, "model": "another"}) is None
