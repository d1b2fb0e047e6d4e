"""The story of an evaluation in this process: what is measured, where it is kept, what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardprune.cli import main
from shardprune.commands.state import RunState
from shardprune.errors import InputError
from shardprune.evaluation.sharded import ShardedModel
from shardprune.report.result import Result
from shardprune.storage.relative_paths import absolute_paths
from tests.evaluation.material import evaluated, make_readable, write_task
from tests.support.running import run
from tests.support.tiny import VOCABULARY, load_tensors, make_tokens, snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_readable(folder / "model")
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    for seed, name in enumerate(("first", "second")):
        write_task(folder / "tasks", name, seed=seed)
    write_task(folder / "tasks", "writes", output_type="generate_until", doc_to_target="{{good}}")
    write_task(folder / "tasks", "rolls", output_type="loglikelihood_rolling", doc_to_target="{{good}}")
    rolling = folder / "tasks" / "rolls.yaml"
    rolling.write_text(rolling.read_text().replace("- metric: acc", "- metric: byte_perplexity"))
    (folder / "tasks" / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list:\n- metric: acc\n  weight_by_size: true\n"
    )
    (folder / "tasks" / "absent.yaml").write_text(
        (folder / "tasks" / "first.yaml").read_text().replace("first", "absent")
    )
    (folder / "bad").mkdir()
    (folder / "bad" / "task.yaml").write_text("task: [\n")
    return folder


def results_of(path) -> dict:
    """The result in an output, with absolute paths."""
    return absolute_paths(json.loads((path / "result.json").read_text()), str(path))


@pytest.mark.parametrize("settings", [{}, {"shards": 3, "replicas": 2}, {"shards": 2, "weights": "streamed"}])
def test_perplexity_is_that_of_the_whole_model(folder, settings):
    source = str(folder / "tokens.npy")
    result = evaluated(folder / "model", perplexity=source, seqlen=24, wave=5, **settings)
    found = result.evaluation.perplexity[source]
    tokens = torch.from_numpy(np.load(source))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert found.value == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert (found.seqlen, found.windows) == (24, 12)


def test_tasks_are_those_of_the_harness_on_one_model(folder):
    asked = {"tasks": "both,rolls", "tasks_dir": str(folder / "tasks")}
    shards = evaluated(folder / "model", **asked, shards=2).evaluation
    whole = evaluated(folder / "model", **asked, engine="hf").evaluation
    assert (shards.engine, whole.engine) == ("shards", "hf")
    assert shards.harness == whole.harness
    assert shards.tasks.keys() == whole.tasks.keys() == {"first", "second", "both", "rolls"}
    for name in ("first", "second", "both"):
        assert shards.tasks[name] == whole.tasks[name]
    assert shards.tasks["first"].samples == 6
    assert shards.tasks["first"].metrics["acc"].stderr is not None
    assert shards.tasks["both"].samples == 12
    assert [name for name, task in shards.tasks.items() if task.group] == ["both"]
    values = [found.tasks["rolls"].metrics["byte_perplexity"].value for found in (shards, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_limit_and_shots_reach_the_harness(folder, tmp_path):
    write_task(tmp_path, "shots", fewshot_split="test", doc_to_text="", fewshot_config={"sampler": "first_n"})
    asked = {"tasks": "shots", "tasks_dir": str(tmp_path), "limit": 4, "num_fewshot": 2}
    shards = evaluated(folder / "model", **asked).evaluation.tasks["shots"]
    assert (shards.samples, shards.num_fewshot) == (4, 2)
    assert shards == evaluated(folder / "model", **asked, engine="hf").evaluation.tasks["shots"]


def test_measurements_join_the_result_of_the_run_that_made_the_model(folder, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.5, method="magnitude")
    before = results_of(tmp_path / "o")
    source, other = str(folder / "tokens.npy"), str(folder / "other.npy")
    evaluated(tmp_path / "o", perplexity=source, seqlen=24)
    evaluated(tmp_path / "o", perplexity=other, seqlen=24, tasks="first", tasks_dir=str(folder / "tasks"), limit=3)
    again = evaluated(
        tmp_path / "o", perplexity=other, seqlen=24, windows=2, tasks="second,first", tasks_dir=str(folder / "tasks")
    )
    stored = results_of(tmp_path / "o")
    evaluation = stored.pop("evaluation")
    assert stored == before
    assert evaluation == again.as_json()["evaluation"]
    assert evaluation["perplexity"].keys() == {source, other}
    assert evaluation["perplexity"][other]["windows"] == 2
    assert evaluation["tasks"].keys() == {"first", "second"}
    assert evaluation["tasks"]["first"]["samples"] == 6
    assert Result(**results_of(tmp_path / "o")).evaluation == again.evaluation

    run(folder, tmp_path / "o", sparsity=0.5, method="magnitude", eval=(other,))  # adds to the finished run
    stored = results_of(tmp_path / "o")
    assert stored["evaluation"] == evaluation
    assert other in stored["perplexity"]


def test_two_evaluations_at_the_same_time_keep_what_both_measure(folder, tmp_path, monkeypatch):
    """While one measures, another one begins and ends."""
    run(folder, tmp_path / "o", sparsity=0.5, method="magnitude")
    source, other = str(folder / "tokens.npy"), str(folder / "other.npy")
    measure, meanwhile = ShardedModel.perplexity, []

    def slow(model, tokens):
        if not meanwhile:
            meanwhile.append(other)
            evaluated(tmp_path / "o", perplexity=other, seqlen=24)
        return measure(model, tokens)

    monkeypatch.setattr(ShardedModel, "perplexity", slow)
    found = evaluated(tmp_path / "o", perplexity=source, seqlen=24)
    assert found.evaluation.perplexity.keys() == {source, other}
    assert results_of(tmp_path / "o")["evaluation"]["perplexity"].keys() == {source, other}

    meanwhile.clear()
    before = results_of(tmp_path / "o")
    monkeypatch.setattr(
        RunState, "check_inputs", lambda state: evaluated(tmp_path / "o", perplexity=other, seqlen=24, windows=2)
    )
    run(folder, tmp_path / "o", sparsity=0.5, method="magnitude", eval=(other,))
    stored = results_of(tmp_path / "o")
    assert other in stored["perplexity"]
    assert stored["evaluation"]["perplexity"].pop(other)["windows"] == 2
    before["evaluation"]["perplexity"].pop(other)
    assert stored["evaluation"]["perplexity"] == before["evaluation"]["perplexity"]


def test_a_directory_of_its_own(folder, tmp_path):
    source = str(folder / "tokens.npy")
    before = snapshot(folder / "model")
    for windows in (3, 2):
        evaluated(folder / "model", perplexity=source, seqlen=24, windows=windows, out=str(tmp_path / "o"))
        assert not (left := [path.name for path in (tmp_path / "o").iterdir() if path.name.endswith(".tmp")]), left
        (tmp_path / "o" / ".probe.0123abcd.tmp").touch()  # as one that is killed leaves it
    evaluated(folder / "model", perplexity=source, seqlen=24, windows=2, out=str(tmp_path / "o"))
    assert not (tmp_path / "o" / ".probe.0123abcd.tmp").exists()
    stored = results_of(tmp_path / "o")
    assert (stored["command"], stored["recipe"]["model"]) == ("evaluate", str(folder / "model"))
    assert stored["evaluation"]["perplexity"][source]["windows"] == 2
    make_readable(tmp_path / "another", "llama")
    with pytest.raises(InputError, match="out: .* holds the evaluation of another model; choose an empty directory"):
        evaluated(tmp_path / "another", perplexity=source, seqlen=24, out=str(tmp_path / "o"))
    with pytest.raises(InputError, match="out: .* is not empty and holds no evaluation"):
        evaluated(folder / "model", perplexity=source, seqlen=24, out=str(folder / "tasks"))
    assert snapshot(folder / "model") == before  # which has no result.json, and gets none
    evaluated(folder / "model", perplexity=source, seqlen=24)
    assert snapshot(folder / "model") == before


def test_a_model_behind_a_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    run(folder, "memory://evaluated", sparsity=0.5, method="magnitude")
    evaluated("memory://evaluated", tasks="first", tasks_dir=str(folder / "tasks"), limit=2)
    stored = json.loads(memory.cat_file("/evaluated/result.json"))
    assert stored["evaluation"]["tasks"]["first"]["samples"] == 2
    with pytest.raises(InputError, match="engine: 'hf' cannot load 'memory://evaluated'; use shards"):
        evaluated("memory://evaluated", tasks="first", tasks_dir=str(folder / "tasks"), engine="hf")


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder / "model", tmp_path / "damaged")


@pytest.mark.parametrize("engine", ["shards", "hf"])
def test_a_tokenizer_that_does_not_fit_is_one_line_before_anything_is_measured(folder, damaged, engine):
    asked = {"tasks": "first", "tasks_dir": str(folder / "tasks"), "engine": engine}
    tokenizer = AutoTokenizer.from_pretrained(damaged)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(damaged)
    source = str(folder / "tokens.npy")
    out = damaged.parent / "out"
    with pytest.raises(InputError, match="^model: its tokenizer has no token that begins or ends a text"):
        evaluated(damaged, perplexity=source, seqlen=24, out=str(out), **asked)
    assert not out.exists()


@pytest.mark.parametrize("engine", ["shards", "hf"])
def test_tokens_that_the_model_does_not_know_are_one_line(folder, damaged, engine):
    tensors = load_tensors(damaged)
    tensors = {name: value[:5] if len(value) == VOCABULARY else value for name, value in tensors.items()}
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(InputError, match=r"^model: the tokenizer makes token \d+ of a task's text; the model has 5$"):
        evaluated(damaged, tasks="first", tasks_dir=str(folder / "tasks"), engine=engine)


def test_an_adapter_is_not_applied_by_one_engine_alone(folder, damaged):
    (damaged / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    asked = {"tasks": "first", "tasks_dir": str(folder / "tasks"), "limit": 1}
    assert evaluated(damaged, **asked).evaluation.tasks == evaluated(folder / "model", **asked).evaluation.tasks
    with pytest.raises(InputError, match=r"^engine: 'hf' would apply the adapter in .*; use shards$"):
        evaluated(damaged, engine="hf", **asked)


BAD = {
    "nothing": ((), "perplexity: missing; give a source, answers, tasks, or latency"),
    "source": (("--perplexity", "x.csv"), "perplexity: 'x.csv' is no known source"),
    "no text": (("--perplexity", "{folder}/none.txt", "--seqlen", "24"), "perplexity: "),
    "seqlen": (("--perplexity", "{folder}/tokens.npy"), "seqlen: 2048 is more than the model's 64 positions"),
    "directory": (("--tasks", "first", "--tasks-dir", "{folder}/none"), "tasks_dir: '{folder}/none' is no directory"),
    "no yaml": (("--tasks", "first", "--tasks-dir", "{folder}/bad"), "tasks_dir: '{folder}/bad/task.yaml' cannot be"),
    "writes": (
        ("--tasks", "first,writes", "--tasks-dir", "{folder}/tasks"),
        "tasks: 'writes' lets the model write text, which shards do not do; use --engine hf",
    ),
    "no data": (("--tasks", "absent", "--tasks-dir", "{folder}/tasks"), "tasks: 'absent' cannot be loaded: "),
    "twice": (("--tasks", "first,both", "--tasks-dir", "{folder}/tasks"), "tasks: 'first' is asked for twice"),
    "limit": (("--tasks", "first", "--tasks-dir", "{folder}/tasks", "--limit", "0"), "limit: 0 is not allowed; use"),
    "limit of nothing": (("--perplexity", "stdlib", "--limit", "3"), "limit: 3 has no effect without tasks"),
    "seqlen of nothing": (("--tasks", "first", "--seqlen", "8"), "seqlen: 8 has no effect without perplexity"),
    "shards": (("--perplexity", "stdlib", "--shards", "5"), "shards: 5 is more than the model's 4 layers"),
    "model": (("--perplexity", "stdlib"), "model: 'nowhere' is no directory"),
    "option": (("--task", "first"), "No such option: --task"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, case, tmp_path, capsys):
    options, message = BAD[case]
    before = snapshot(folder)
    model = "nowhere" if case == "model" else str(folder / "model")
    given = [option.format(folder=folder) for option in options]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", model, "--backend", "local", "--out", str(tmp_path / "o"), *given])
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err.startswith(f"error: {message.format(folder=folder)}")
    assert len(output.err.splitlines()) == 1
    assert snapshot(folder) == before
    assert not (tmp_path / "o" / "result.json").exists()


def test_names_that_the_harness_does_not_know(folder, monkeypatch):
    from shardprune.evaluation import tasks

    own = tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: own)  # reading the harness's own takes ten seconds
    with pytest.raises(InputError, match="tasks: 'frist' is no task; did you mean first"):
        evaluated(folder / "model", tasks="frist", tasks_dir=str(folder / "tasks"))
    with pytest.raises(InputError, match="tasks: 'piqa' is no task"):  # the first of the eight
        evaluated(folder / "model", tasks="zeroshot", tasks_dir=str(folder / "tasks"))


def test_a_pattern_of_names_and_the_table(folder, capsys):
    arguments = ["evaluate", folder / "model", "--backend", "local", "--tasks", "sec*", "--tasks", "first"]
    arguments += ["--tasks-dir", folder / "tasks", "--perplexity", folder / "tokens.npy", "--seqlen", "24"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 0
    output = capsys.readouterr()
    rows = [line.replace("│", " ").split() for line in output.out.splitlines()]
    assert [row[:2] for row in rows if row[1:2] == ["acc"]] == [["second", "acc"], ["first", "acc"]]
    assert any(row[:2] == ["tokens.npy", "perplexity"] for row in rows)
    assert "holds no result of shardprune: nothing is written" in " ".join(output.err.split())
