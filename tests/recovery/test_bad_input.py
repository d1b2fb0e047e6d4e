"""What cannot work is said in one line that names the field, before anything is written."""

import json
import re
from dataclasses import replace

import pytest

from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.model.families import FAMILIES
from tests.recovery.trainings import make_sparse, train
from tests.support.tiny import CONFIGS, make_model, make_tokens, snapshot
from tests.support.words import WORDS, words_tokenizer


@pytest.fixture(scope="module")
def inputs(folder):
    """Files that do not fit."""
    make_model(folder / "wider", configs={"llama-3.1": _with_vocabulary(80)})
    words_tokenizer().save_pretrained(folder / "wider")
    make_model(folder / "opt", "opt")
    words_tokenizer().save_pretrained(folder / "opt")
    make_model(folder / "renamed")
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["eight"])
    tokenizer.save_pretrained(folder / "renamed")
    instructions = [{"instruction": "one", "output": "two"}, {"instruction": "one", "input": "two"}]
    (folder / "fields.json").write_text(json.dumps(instructions))
    (folder / "long.json").write_text(json.dumps([{"instruction": " ".join(WORDS * 4), "output": "two"}]))
    (folder / "one.jsonl").write_text(json.dumps({"text": "one two three"}))
    make_tokens(folder / "rows.npy", 4, 24)
    settings = {
        "list": [1],
        "batch": {"train_batch_size": 3},
        "stage": {"zero_optimization": 3},
        "nothing": {"optimizer": None},
        "rate": {"optimizer": {"params": {"lr": 0.5}}},
        "misspelt": {"zero_optimization": {"overlap_com": True}},
    }
    for name, content in settings.items():
        (folder / f"{name}.ds").write_text(json.dumps(content))
    (folder / "muon.ds").write_text(json.dumps({"optimizer": {"type": "Muon"}}))
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("chapter one")
    return folder


def _with_vocabulary(size):
    name, values = CONFIGS["llama-3.1"]
    return name, {**values, "vocab_size": size}


# The field, what is said of it, and what was asked for; {} is the folder.
WRONG = {
    "fields are missing": ("data", "row 2 .*'output'", {"data": "{}/fields.json"}),
    "no tokens are left": ("data", "no tokens left to learn at length 16", {"data": "{}/long.json"}),
    "the data is missing": ("data", "nowhere.jsonl", {"data": "{}/nowhere.jsonl"}),
    "rows of another length": ("data", "rows of 24 tokens, not of length 16", {"data": "{}/rows.npy"}),
    "an unknown source": ("data", "no known source", {"data": "poems"}),
    "no such stage": ("zero", "4 is no stage of ZeRO; use 0, 1, 2 or 3", {"zero": 4}),
    "workers that share unevenly": ("workers", "3 workers with micro-batches of 2 .* 8 evenly", {"workers": 3}),
    "micro-batches that do not fit": ("micro_batch", "3 does not divide the batch of 8", {"micro_batch": 3}),
    "one process is one worker": ("workers", "2 do not fit backend local", {"workers": 2, "backend": "local"}),
    "no zeros to keep": ("keep_sparsity", "is dense: 0 of its", {"model": "{}/dense", "keep_sparsity": True}),
    "a teacher of other words": ("teacher", "predicts 80 tokens, the model 64", {"teacher": "{}/wider"}),
    "a teacher with another tokenizer": ("teacher", "another tokenizer than the model", {"teacher": "{}/renamed"}),
    "no teacher there": ("teacher", "nowhere", {"teacher": "{}/nowhere"}),
    "rows longer than the model": ("length", "65 is more than the model's 64 positions", {"length": 65}),
    "windows longer than the model": ("seqlen", "64", {"seqlen": 65, "eval": ("{}/rows.npy",)}),
    "no file of settings": ("deepspeed", "nowhere.json", {"deepspeed": "{}/nowhere.json"}),
    "settings that are a list": ("deepspeed", "must hold an object", {"deepspeed": "{}/list.ds"}),
    "settings of the recipe's": ("deepspeed", "train_batch_size.* use batch", {"deepspeed": "{}/batch.ds"}),
    "a URL without a state": ("state", "'memory://o' is a URL", {"out": "memory://o"}),
    "a state that is not empty": ("state", "is not empty; choose an empty", {"state": "{}/occupied"}),
    "a state that cannot be written": ("state", "", {"state": "{}/documents.jsonl/state"}),
    "a stage in the place of an object": ("deepspeed", "", {"deepspeed": "{}/stage.ds"}),
    "no optimizer": ("deepspeed", "", {"deepspeed": "{}/nothing.ds"}),
    "a rate of DeepSpeed's": ("deepspeed", "use learning_rate", {"deepspeed": "{}/rate.ds"}),
    "a setting nobody knows": (
        "deepspeed",
        "does not work: .*overlap_com",
        {"deepspeed": "{}/misspelt.ds"},
    ),
    "an optimizer that loses zeros": (
        "deepspeed",
        "sets optimizer.type Muon, which moves weights",
        {"deepspeed": "{}/muon.ds", "full": True, "keep_sparsity": True},
    ),
    "nothing to offload": ("offload", "no effect without zero 1, 2 or 3", {"offload": True, "zero": 0}),
    "a stage without bf16": ("zero", "0 does not go with bf16; use 1", {"zero": 0, "precision": "bf16"}),
    "a teacher that is packed otherwise": (
        "teacher",
        "tells packed examples apart in another way",
        {"teacher": "{}/opt", "packing": True},
    ),
    "an output that is not empty": ("out", "is not empty and holds no run", {"out": "{}/occupied"}),
    "nothing to hold out": ("held_out", "leaves none", {"held_out": 0.5, "data": "{}/one.jsonl"}),
    "a rank of all weights": ("lora_rank", "no effect without low-rank", {"lora_rank": 8, "full": True}),
    "dropout of all weights": ("lora_dropout", "no effect without low-rank", {"lora_dropout": 0.1, "full": True}),
    "a rank above the projections'": ("lora_rank", "1000000000 is more than any projection has", {"lora_rank": 10**9}),
    "epochs without end": ("epochs", "use less than or equal to 1000000", {"epochs": 1e300}),
    "a batch beyond memory": ("batch", "use less than or equal to 1000000", {"batch": 10**9}),
    "more processes than nodes anywhere": ("workers", "use less than or equal to 10000", {"workers": 10**9}),
    "a temperature that overflows": ("temperature", "use less than or equal to 1000", {"temperature": 1e300}),
    "a temperature of nobody": ("temperature", "no effect without teacher", {"temperature": 3.0}),
    "steps and epochs": ("epochs", "3 has no effect beside steps", {"epochs": 3.0}),
    "no rate at all": ("learning_rate", "greater than 0", {"learning_rate": 0}),
    "a rate without an end": ("learning_rate", "finite", {"learning_rate": float("inf")}),
    "everything held out": ("held_out", "less than 1", {"held_out": 1.0}),
    "the best of nothing": ("best", "no effect without held_out", {"best": True}),
    "an early stop by nothing": ("early_stopping", "no effect without held_out", {"early_stopping": 3}),
    "a stop before the start": ("early_stopping", "greater than or equal to 1", {"early_stopping": 0, "held_out": 0.2}),
    "an unknown field": ("lorarank", "did you mean lora_rank", {"lorarank": 3}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_said_before_anything_is_written(inputs, case, tmp_path):
    field, problem, fields = WRONG[case]
    fields = {name: filled(value, inputs) for name, value in fields.items()}
    before = snapshot(inputs)
    with pytest.raises(InputError, match=rf"^{field}: .*{problem}"):
        train(inputs, fields.pop("out", tmp_path / "o"), **fields)
    assert not list(tmp_path.iterdir())
    assert snapshot(inputs) == before


def filled(value, folder):
    if isinstance(value, tuple):
        return tuple(filled(item, folder) for item in value)
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--zero", "4"], "zero: 4 is no stage of ZeRO; use 0, 1, 2 or 3"),
        (["--data", "{}/fields.json"], "data: .*row 2 .*"),
        (["--keep-sparsity", "--teacher", "{}/wider"], "teacher: .* predicts 80 tokens, the model 64"),
    ],
    ids=str,
)
def test_the_command_says_so_in_one_line(inputs, arguments, problem, tmp_path, capsys):
    command = ["recover", f"{inputs}/sparse", "--out", str(tmp_path / "o"), "--backend", "local", "--length", "16"]
    if "--data" not in arguments:
        command += ["--data", f"{inputs}/documents.jsonl"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *(filled(argument, inputs) for argument in arguments)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(f"error: {problem}", lines[0])
    assert not list(tmp_path.iterdir())


def test_a_state_of_another_training_is_left_alone(inputs, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "fingerprint").write_text("another's")
    with pytest.raises(InputError, match="^state: .* holds another training; choose an empty directory$"):
        train(inputs, tmp_path / "o", state=str(state))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (state / "fingerprint").read_text() == "another's"


@pytest.mark.parametrize("out", ["o", "o/model"])
def test_the_state_is_not_the_output_nor_around_it(inputs, out, tmp_path):
    with pytest.raises(InputError, match="^state: "):
        train(inputs, tmp_path / out, state=str(tmp_path / "o"), lora_rank=2, steps=1)
    assert not list(tmp_path.iterdir())


def test_examples_cannot_be_packed_for_every_model(inputs, tmp_path, monkeypatch):
    make_sparse(tmp_path / "phi3", "phi3")
    monkeypatch.setitem(FAMILIES, "phi3", replace(FAMILIES["phi3"], packing=None))
    with pytest.raises(InputError, match="^packing: not for model_type 'phi3'"):
        train(inputs, tmp_path / "o", model=str(tmp_path / "phi3"), packing=True)
    assert not (tmp_path / "o").exists()
