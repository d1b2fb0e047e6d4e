"""`shardprune plan` as users call it: layouts that fit, what is missing where none does, bad input."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from transformers import AutoConfig, Mamba2Config

from shardprune.cli import main
from shardprune.cluster.layout import plan_layout
from shardprune.errors import InputError
from shardprune.model.pruning_job import Zeroing
from shardprune.planning.chart import LEGEND
from shardprune.planning.choosing import choose, missing, remedies
from shardprune.planning.costs import Costs, Places
from shardprune.planning.hardware import HARDWARE
from shardprune.planning.memory import WorkerMemory
from shardprune.planning.moments import Setup
from shardprune.planning.plan import plan
from shardprune.planning.recipe import Machine, PlanRecipe
from shardprune.planning.workload import read_model, task_of
from shardprune.recipes.prune import PruneRecipe
from shardprune.shard.generation_worker import GenerationWorker
from shardprune.solvers.methods import METHODS, Effort
from shardprune.solvers.pattern import Unstructured
from tests.planning.material import CONFIGS
from tests.support.architectures import CARRYING, MIXED, make_architecture
from tests.support.running import run
from tests.support.tiny import make_model

SMALL = {"hardware": "rtx4090", "gpu_memory": "24GB"}
EIGHT = {"gpus": 8, "gpu_memory": "80GB", "storage": "20GB/s"}


def config(size):
    return str(CONFIGS / f"llama-3.1-{size}" / "config.json")


def planned(size, **fields):
    return {plan.propagation: plan for plan in plan(PlanRecipe.checked({"model": config(size), **fields})).plans}


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("size", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)]
)
def test_the_configs_are_those_of_llama(size, parameters):
    assert read_model(config(size)).parameters == parameters


@pytest.mark.parametrize("machines", [EIGHT, {**EIGHT, "nodes": 2}, SMALL], ids=["8 x 80", "2 x 8 x 80", "24"])
def test_70b_fits(machines):
    plans = planned("70b", **machines)
    assert set(plans) == ({"exact"} if machines is SMALL else {"exact", "parallel"})
    for one in plans.values():
        setup = one.candidate.setup
        assert one.fits
        assert one.missing is None
        assert setup.layout.workers <= machines.get("nodes", 1) * machines.get("gpus", 1)
        assert one.candidate.worst[0].device.peak < one.candidate.row.bytes
    if machines is SMALL:
        assert setup.streamed
    else:
        # Exact propagation divides a layer over its replicas, but not the solving of one input nor the writing.
        parallel, exact = (plans[name].candidate.seconds for name in ("parallel", "exact"))
        assert parallel.total < exact.total
        assert parallel.prune < exact.prune / 2


def test_405b_does_not_fit_where_its_widest_projection_does_not():
    (one,) = planned("405b", **SMALL).values()
    assert not one.fits
    # Sums and factor; columns, mask, the result in 16 bits, a float32 weight, an eighth of its image under the sums,
    # and the split operands of that product; two layers.
    least = (
        (4 + 4) * 53248**2
        + (4 + 1 + 2 + 4 + 1.5) * 16384 * 53248
        + 8 * 2**26
        + 2 * 2 * read_model(config("405b")).layer
    )
    device = one.candidate.worst[0].device
    assert device.peak == pytest.approx(least, rel=0.01)
    assert f"{least / 1e9:.1f} GB" in one.missing
    assert "error down" in one.missing
    assert "h100" in " ".join(one.helps)
    assert "l4" not in " ".join(one.helps)
    assert planned("405b", **EIGHT)["exact"].fits


@pytest.mark.parametrize(
    ("fields", "help_"),
    [
        ({**SMALL, "weights": "resident"}, "--weights streamed"),
        ({**SMALL, "activations": "device", "samples": 512, "weights": "streamed"}, "--activations host"),
        ({**EIGHT, "weights": "resident", "replicas": 8}, "--weights streamed"),
        ({**EIGHT, "weights": "resident", "shards": 1}, "a layout of its own choice"),
        ({**SMALL, "wave": 64}, "--wave 1"),
        ({**SMALL, "host_memory": "12GB", "samples": 256}, "--samples 128"),
        ({**SMALL, "host_memory": "32GB", "samples": 1024, "method": "wanda", "measure_error": False}, "--nodes 2"),
        ({**SMALL, "gpu_memory": "15GB"}, "--method wanda --no-measure-error"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_helps_is_named_and_does_help(fields, help_):
    recipe = PlanRecipe.checked({"model": config("70b"), "propagation": "exact", **fields})
    model = read_model(recipe.model)
    nearest = choose(recipe, model, "exact")
    assert not nearest.fits
    assert "are missing" in missing(nearest)
    assert any(line.startswith(help_) for line in remedies(recipe, model, "exact", nearest))


def test_a_checkpoint_says_in_what_its_weights_are_stored(tmp_path):
    make_model(tmp_path / "model")
    (tmp_path / "config").mkdir()
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps({**content, "dtype": "bfloat16"}))
    shutil.copy(tmp_path / "config" / "config.json", tmp_path / "model" / "config.json")
    assert str(read_model(str(tmp_path / "model")).stored) == "torch.float32"
    assert str(read_model(str(tmp_path / "config")).stored) == "torch.bfloat16"


def test_a_page_and_its_json_say_the_same(capsys, tmp_path):
    arguments = (config("8b"), "--gpus", 2, "--eval", "wikitext2", "--samples", 32)
    code, page, _ = printed(capsys, *arguments, "--simulate")
    assert code == 0
    for part in ("exact:", "parallel:", "error down", "between nodes", "expected:", "simulated:", "idle", "2 nodes"):
        assert part in page
    assert "activations statistics workspace" in page
    assert LEGEND in page.splitlines()
    assert max(len(line) for line in page.splitlines() if "idle" in line and "simulated" not in line) <= 80
    code, text, _ = printed(capsys, *arguments, "--simulate", "--json")
    content = json.loads(text)
    assert code == 0
    assert [plan["propagation"] for plan in content["plans"]] == ["exact", "parallel"]
    for plan_ in content["plans"]:
        layout = plan_["layout"]
        assert f"--shards {layout['shards']} --replicas {layout['replicas']}" in page
        phases = {"structure", "load", "curves", "observe", "prune", "write", "evaluate"}
        assert set(plan_["seconds"]) == {*phases, "total"}
        assert len(plan_["simulation"]["workers"]) == layout["shards"] * layout["replicas"]
        assert plan_["simulation"]["seconds"]["total"] == pytest.approx(plan_["seconds"]["total"], rel=0.1)
        assert 0 <= plan_["simulation"]["idle"] < 1


def test_where_nothing_fits_the_exit_code_is_one(capsys):
    code, page, _ = printed(capsys, config("405b"), "--gpu-memory", "24GB", "--hardware", "rtx4090")
    assert code == 1
    assert "does not fit" in page
    assert "missing: prune, error down" in page
    assert "what helps: GPUs of" in page


def test_the_recipe_of_a_run_is_planned_as_it_is(capsys, tmp_path):
    recipe = {
        "out": "runs/x",
        "backend": "ray",
        "method": "wanda",
        "pattern": "2:4",
        "weights": "streamed",
        "threads": 2,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": config("8b"), **recipe}))
    code, text, _ = printed(capsys, "--recipe", tmp_path / "r.yaml", "--propagation", "exact", "--json")
    content = json.loads(text)
    assert code == 0
    assert content["recipe"]["method"] == "wanda"
    assert content["plans"][0]["layout"]["weights"] == "streamed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--gpu-memory", "80"),
            "gpu_memory: '80' is not allowed; a number needs its unit: use 80GB, or",
        ),
        (("--gpu-memory", "1GB"), "gpu_memory: '1GB' is not allowed; use more than the 1.0 GB that a CUDA context"),
        (("--gpus", 8, "--shards", 8, "--segments", 4), "segments: 4 is fewer than the 8 shards"),
        (("--network", "fast"), "network: 'fast' is not allowed; use a rate such as 25GB/s or 100Gbit/s"),
        (("--hardware", "h1000"), f"hardware: 'h1000' is not allowed; use one of {', '.join(HARDWARE)}"),
        (("--nodes", 0), "nodes: 0 is not allowed"),
        (("--gpus", 2, "--shards", 4), "shards: 4 workers need as many GPUs; the machines have 2"),
        (("--replicas", 4), "replicas: 4 workers need as many GPUs; the machines have 1"),
        (("--rebuild", "barber"), "rebuild: 'barber' is not planned; plan the run without it"),
        (("--seqlen", 1_000_000), "seqlen: 1000000 is more than the model's 131072 positions"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, arguments, message):
    code, _, error = printed(capsys, config("8b"), *arguments)
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_machine_too_small_for_anything_is_planned_all_the_same():
    (one,) = planned("8b", gpu_memory="1000000001B", host_memory="1B").values()
    assert not one.fits
    assert one.helps


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": 8},
        {"gpus": 8, "segments": 4},
        {"gpus": 8, "segments": 16, "shards": 4},
        {"hardware": "cpu", "gpus": 2, "host_memory": "64GB"},
        {**SMALL, "gpus": 2},
    ],
    ids=str,
)
def test_the_options_that_are_printed_give_the_planned_run(fields):
    machines = {name: value for name, value in fields.items() if name in Machine.model_fields}
    for propagation, one in planned("8b", **fields).items():
        assert set(one.options) <= set(PruneRecipe.model_fields)
        again = planned("8b", **machines, **one.options)
        assert list(again) == [propagation]
        assert again[propagation].candidate.setup == one.candidate.setup
        assert len(one.candidate.setup.layout.shards) <= fields.get("segments", 32)


def test_why_there_is_no_parallel_plan_is_said(capsys):
    _, page, _ = printed(capsys, config("8b"), "--gpus", 8, "--replicas", 8)
    assert "parallel: needs two shards of 8 replicas each, 16 workers; the machines have 8" in page
    code, page, _ = printed(capsys, config("8b"), "--propagation", "parallel")
    assert code == 1
    assert "parallel: needs two shards, 2 workers; the machines have 1" in page


@pytest.mark.parametrize("model", ["nowhere/config.json", "no such model", "{folder}", "{folder}/broken.json"])
def test_a_model_without_a_config_is_bad_input(capsys, tmp_path, model):
    (tmp_path / "broken.json").write_text("{")
    code, _, error = printed(capsys, model.format(folder=tmp_path))
    assert code == 2
    assert error.startswith("error: model: ")
    assert "broken.json/" not in error
    assert error.count("\n") == 1


def test_an_unknown_field_of_a_recipe_is_named_with_the_nearest(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("gpu: 8\n")
    code, _, error = printed(capsys, config("8b"), "--recipe", tmp_path / "r.yaml")
    assert code == 2
    assert "did you mean gpus?" in error


@pytest.mark.parametrize(
    ("field", "text", "count"),
    [
        ("gpu_memory", "80GB", 80e9),
        ("host_memory", "1.5 TiB", 1.5 * 2**40),
        ("network", "25GB/s", 25e9),
        ("network", "100Gbit/s", 12.5e9),
        ("storage", "5GB", 5e9),
    ],
)
def test_sizes_and_rates_are_bytes(field, text, count):
    recipe = PlanRecipe.checked({"model": "m", field: text})
    assert getattr(recipe, field) == count
    assert getattr(PlanRecipe.checked(recipe.record()), field) == count


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("gpu_memory", "80"),
        ("gpu_memory", 80),
        ("host_memory", "64Gbit"),
        ("host_memory", "64GB/s"),
        ("network", "fast"),
        ("storage", "5"),
        ("storage", "-5GB/s"),
        ("host_memory", "0GB"),
    ],
)
def test_no_size_and_no_rate(field, text):
    allowed = "(a number needs its unit|use (a size|a rate|more than nothing))"
    with pytest.raises(InputError, match=f"{field}: {text!r} is not allowed; {allowed}"):
        PlanRecipe.checked({"model": "m", field: text})


ROOM = {"errors": False, "samples": 128, "seqlen": 2048, "wave": 2, "sources": 0, "windows": 0, "itemsize": 2}


def solving(name):
    """The seconds of solving the largest input of an 8B with a method, and the largest workspace of that."""
    task = task_of(read_model(config("8b")), Zeroing(name, Unstructured(), 0.5, "uniform", 5.0, 0.08), **ROOM)
    setup = Setup(plan_layout(32, 1, "exact", 1, 1, None), False, True, True)
    seconds = Costs(task, setup, HARDWARE["h100"], Places(1, 1)).solve(task.model.inputs[-1])
    prune = [moment for moment in WorkerMemory(task, setup, 0).moments() if moment.phase == "prune"]
    return seconds, max(moment.device.workspace for moment in prune), {moment.step.split()[0] for moment in prune}


def test_a_method_is_planned_by_its_own_effort(monkeypatch):
    """Whatever it is called, one that is described as another one takes what that takes, and others take their own."""
    (wanda, room, steps), (sparsegpt, *_), (magnitude, *_) = map(solving, ("wanda", "sparsegpt", "magnitude"))
    monkeypatch.setitem(METHODS, "sorted", replace(METHODS["wanda"], named=False))
    monkeypatch.setitem(METHODS, "iterated", replace(METHODS["sparsegpt"], effort=Effort(sweeps=True, passes=5)))
    monkeypatch.setitem(METHODS, "threshold", replace(METHODS["wanda"], effort=Effort(touched=240)))
    monkeypatch.setitem(
        METHODS, "running", replace(METHODS["wanda"], effort=Effort(sorts=True, touched=60, running=500))
    )
    assert solving("sorted") == (wanda, room, steps)
    assert "sweep" not in steps
    seconds, room_of_five, steps_of_five = solving("iterated")
    assert seconds == pytest.approx(5 * sparsegpt)
    assert (room_of_five, steps_of_five) == solving("sparsegpt")[1:]
    assert "sweep" in steps_of_five
    assert solving("threshold")[0] == pytest.approx(2 * magnitude)
    assert solving("running")[1] > 5 * room


def test_hardware_is_named_in_any_case_and_memory_has_its_unit():
    assert PlanRecipe.checked({"model": "m", "hardware": "H100"}).row.name == "h100"
    assert PlanRecipe.checked({"model": "m", "hardware": "A100-40GB"}).row.bytes == 40 * 10**9
    for value in ("80", 80, " 80 "):
        with pytest.raises(InputError, match="gpu_memory: .* is not allowed; a number needs its unit: use 80GB"):
            PlanRecipe.checked({"model": "m", "gpu_memory": value})
    with pytest.raises(InputError, match="network: .*use 12.5GB/s, or a rate such as"):
        PlanRecipe.checked({"model": "m", "network": "12.5"})


def test_a_plan_says_how_the_model_writes_its_text(capsys):
    """Of 70B on eight GPUs: 80 layers over all of them, keys and values by hand."""
    (one,) = plan(
        PlanRecipe.checked({"model": config("70b"), "propagation": "exact", "calibration": "self", **EIGHT})
    ).plans
    writing = one.writing
    assert (len(writing.layout.shards), writing.layout.replicas, writing.room.resident) == (8, 1, True)
    assert (writing.sequences, writing.batch) == (128, 16)
    assert writing.room.batch_bytes == 2 * 2 * 8 * 128 * 10 * 16 * (2048 + 8)  # bfloat16, key and value, heads, layers
    weights = 2 * (10 * 855_654_400 + 128_256 * 8192)
    assert writing.held == weights + 32 * 16 * 128_256
    assert writing.seconds > 2055 * 8 * weights / one.candidate.row.memory * 0.8
    code, out, _ = printed(capsys, config("70b"), "--propagation", "exact", "--calibration", "self", "--gpus", "8")
    assert code == 0
    assert "writes calibration text first: 128 sequences in batches of 16 on 8 x 1" in out


def test_a_plan_says_where_every_token_takes_a_reading_of_the_layers():
    (one,) = plan(
        PlanRecipe.checked({"model": config("8b"), "propagation": "exact", "calibration": "self", **SMALL})
    ).plans
    writing = one.writing
    assert one.fits
    assert not writing.room.resident
    assert writing.seconds > 2055 * one.candidate.costs.read(32 * read_model(config("8b")).layer)
    assert 1 <= writing.smaller < writing.batch
    fitting = {"model": config("8b"), "propagation": "exact", "calibration": "self", "self_batch": writing.smaller}
    (smaller,) = plan(PlanRecipe.checked({**fitting, **SMALL})).plans
    assert smaller.writing.room.resident
    assert smaller.writing.smaller is None
    assert smaller.writing.seconds < writing.seconds / 10


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2", "nemotron_h"])
def test_what_layers_keep_is_planned_as_workers_find_it(model_type, tmp_path, monkeypatch):
    rooms, found = [], GenerationWorker._room

    def noted(self, resident):
        rooms.append(found(self, resident).batch_bytes)
        return found(self, resident)

    monkeypatch.setattr(GenerationWorker, "_room", noted)
    make_architecture(tmp_path / "model", model_type, MIXED[model_type])
    fields = {"calibration": "self", "samples": 3, "seqlen": 16, "self_batch": 2, "shards": 2}
    run(tmp_path, "o", method="magnitude", sparsity=0.5, measure_error=False, **fields)
    values = {"model": str(tmp_path / "model"), "propagation": "exact", "hardware": "cpu", "gpus": 2, **fields}
    (one,) = plan(PlanRecipe.checked(values)).plans
    assert one.writing.batch == 2
    assert one.writing.room.batch_bytes == max(rooms) > 0


def test_states_of_mamba_2_by_hand(tmp_path):
    """Of 2.7B in bfloat16 on one GPU: 64 layers keep four inputs of a convolution, and states in float32."""
    sizes = {"hidden_size": 2560, "num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1, "conv_kernel": 4}
    Mamba2Config(**sizes, num_hidden_layers=64, vocab_size=50288, dtype="bfloat16").save_pretrained(tmp_path)
    fields = {"model": str(tmp_path / "config.json"), "propagation": "exact", "calibration": "self"}
    states = 64 * (2 * 4 * (5120 + 2 * 128) + 4 * 80 * 64 * 128)
    (one,) = plan(PlanRecipe.checked(fields)).plans
    assert (one.writing.batch, one.writing.room.batch_bytes) == (32, 32 * states)
    assert one.writing.seconds > 2055 * 2 * 32 * states / one.candidate.row.memory  # read, and written
    (one,) = plan(PlanRecipe.checked({**fields, "dtype": "float32"})).plans
    assert one.writing.room.batch_bytes == 32 * (states + 64 * 2 * 4 * (5120 + 2 * 128))


def test_a_class_that_does_not_write_is_not_planned_to(tmp_path):
    AutoConfig.for_model("gemma3n_text", **CARRYING["gemma3n_text"]).save_pretrained(tmp_path)
    fields = {"model": str(tmp_path / "config.json"), "propagation": "exact", "seqlen": 16}
    plan(PlanRecipe.checked(fields))
    with pytest.raises(InputError, match="^calibration: 'self' is not possible: .*; give a text$"):
        plan(PlanRecipe.checked({**fields, "calibration": "self"}))


def test_a_batch_that_fits_on_no_worker_is_missing():
    values = {"model": config("70b"), "propagation": "exact", "calibration": ["c4", "self:3"], "self_batch": 256}
    (one,) = plan(PlanRecipe.checked({**values, "samples": 512, **SMALL})).plans
    assert not one.fits
    assert one.writing.sequences == 384
    assert "writing calibration text, a batch of 256 sequences: keys, values and states 172" in one.missing
    assert "a smaller --self-batch" in one.helps


def test_text_that_is_read_takes_no_writing():
    values = {"model": config("8b"), "propagation": "exact", **EIGHT}
    assert [one.writing for one in plan(PlanRecipe.checked(values)).plans] == [None]
