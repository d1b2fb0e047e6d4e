"""Structures first, then zeros in what remains."""

import io
import shutil

import fsspec
import pytest
from rich.console import Console
from safetensors.torch import save_file

from shardprune.errors import InputError
from shardprune.report.progress import Reporter
from shardprune.shard.prune_worker import PruneWorker
from shardprune.solvers.pattern import parse_pattern
from tests.commands.structured.narrowed import COMPOSITE, M, loaded, written
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_tokens, snapshot

COMPOSITES = [
    {"structured": 0.2, "sparsity": 0.5},
    {"structured": 0.2, "sparsity": 0.5, "method": "wanda", "allocation": "owl", "outlier_m": M},
    {"structured": 0.2, "pattern": "2:4"},
    {"structured": 0.2, "sparsity": 0.5, "rebuild": "barber", "rebuild_threshold": 0.3, "score": "amp"},
]


@pytest.mark.parametrize("fields", COMPOSITES, ids=str)
def test_removed_and_zeroed_make_up_the_target(folder, fields, tmp_path):
    source = str(folder / "other.npy")
    result = run(folder, tmp_path / "o", eval=(source,), **fields)
    narrow = run(folder, tmp_path / "narrow", eval=(source,), structured=0.2, score=fields.get("score", "obs"))
    before, after = load_tensors(folder / "model"), load_tensors(tmp_path / "o")
    projections = [name for name in before if "proj" in name]
    weights, left = (sum(tensors[name].numel() for name in projections) for tensors in (before, after))
    zeros = sum(int((after[name] == 0).sum()) for name in projections)

    sparsity, target = result.sparsity, 0.2 + 0.8 * 0.5 if "pattern" in fields else 0.5
    assert sparsity.removed == narrow.sparsity.removed == pytest.approx(1 - left / weights, abs=1e-12)
    assert sparsity.zeroed == pytest.approx(zeros / weights, abs=1e-12)
    assert sparsity.achieved == pytest.approx((weights - left + zeros) / weights, abs=1e-12)
    assert sparsity.target == pytest.approx(target)
    assert sparsity.achieved == pytest.approx(target, abs=28 / weights if "sparsity" in fields else 0.01)
    assert sparsity.allocated == pytest.approx(sparsity.achieved, abs=28 / weights)
    assert all(parse_pattern(fields.get("pattern", "unstructured")).holds(after[name]) for name in projections)

    assert result.structure == narrow.structure
    assert result.model.zeros_after == zeros
    assert result.model.model_copy(update={"zeros_after": 0}) == narrow.model
    assert result.perplexity[source].before == narrow.perplexity[source].before
    assert result.perplexity[source].after not in (narrow.perplexity[source].after, narrow.perplexity[source].before)
    assert result.recipe["model"] == str(folder / "model")
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in load_tensors(tmp_path / "narrow").items()
    }
    assert not any(path.is_dir() for path in (tmp_path / "o").iterdir())
    assert not (tmp_path / "o" / "run.json").exists()
    assert loaded(tmp_path / "o").config.num_key_value_heads == result.structure.after.groups


def test_the_second_run_is_that_of_the_narrowed_model(folder, undisturbed, tmp_path):
    out, _ = undisturbed(**COMPOSITE)
    narrowed, narrow = undisturbed(structured=0.3)
    share = (0.5 - narrow.sparsity.removed) / (1 - narrow.sparsity.removed)
    run(folder, tmp_path / "sparse", model=narrowed, sparsity=share)
    assert differing(out, tmp_path / "sparse") == []


@pytest.mark.parametrize("fields", [{"shards": 3, "weights": "streamed"}, {"shards": 2}], ids=str)
def test_composite_sharded_equals_single(folder, undisturbed, fields, tmp_path):
    out, plain = undisturbed(**COMPOSITE)
    other = run(folder, tmp_path / "other", **COMPOSITE, **fields)
    assert differing(out, tmp_path / "other") == []
    assert (other.sparsity, other.structure) == (plain.sparsity, plain.structure)


def test_composite_over_memory_urls(folder, undisturbed, tmp_path):
    out, _ = undisturbed(**COMPOSITE)
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder / 'model'}/", "/structured/in/", recursive=True)
    run(folder, "memory://structured/out", model="memory://structured/in", **COMPOSITE)
    memory.get("/structured/out/", f"{tmp_path / 'fetched'}/", recursive=True)
    assert differing(out, tmp_path / "fetched") == []
    assert snapshot(out).keys() == snapshot(tmp_path / "fetched").keys()


def test_zeros_that_the_model_had_are_those_before(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    for name in (name for name in tensors if "proj" in name):
        tensors[name][:, ::4] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    narrow = run(folder, tmp_path / "narrow", model=tmp_path / "model", structured=0.3, correction=False)
    composite = run(folder, tmp_path / "o", model=tmp_path / "model", **COMPOSITE, correction=False)
    assert narrow.sparsity.before == composite.sparsity.before == 0.25
    assert narrow.sparsity.achieved == pytest.approx(narrow.sparsity.removed + narrow.sparsity.zeroed)
    assert narrow.sparsity.zeroed > 0


@pytest.mark.parametrize("fields", [{}, {"weights": "streamed", "shards": 2}], ids=str)
def test_composite_cut_off_in_both_runs_goes_on_to_the_same_bits(folder, undisturbed, fields, dies_at_layer, tmp_path):
    measured = {**COMPOSITE, "eval": (str(folder / "other.npy"),)}
    (out, plain), fields = undisturbed(**measured), {**measured, **fields}
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    first = written(tmp_path / "cut" / "structured")
    assert (len(first), written(tmp_path / "cut")) == (2, {})
    dies_at_layer(1)  # which the first run has done, so that it is the second one's
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    narrowed, second = written(tmp_path / "cut" / "structured"), written(tmp_path / "cut")
    assert first.items() <= narrowed.items()
    assert (len(narrowed), len(second)) == (5, 1)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    assert written(tmp_path / "cut" / "structured") == narrowed
    assert not (tmp_path / "cut" / "result.json").exists()

    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(out, tmp_path / "cut") == []
    assert second.items() <= written(tmp_path / "cut").items()
    assert not (tmp_path / "cut" / "structured").exists()
    assert resumed.perplexity == plain.perplexity
    assert (resumed.sparsity, resumed.structure) == (plain.sparsity, plain.structure)
    assert resumed.model == plain.model


def test_a_finished_composite_is_not_done_again(folder, tmp_path):
    first = run(folder, tmp_path / "o", **COMPOSITE)
    before, said = snapshot(tmp_path / "o"), io.StringIO()
    again = run(folder, tmp_path / "o", **COMPOSITE, shards=2, reporter=Reporter(Console(file=said, width=500)))
    assert again == first
    assert said.getvalue() == f"{tmp_path / 'o'} is finished already\n"
    assert snapshot(tmp_path / "o") == before


def test_a_finished_parallel_composite_is_not_done_again_on_fewer_shards(folder, tmp_path):
    first = run(folder, tmp_path / "o", **COMPOSITE, propagation="parallel", shards=4)
    assert run(folder, tmp_path / "o", **COMPOSITE, propagation="parallel", shards=2) == first


def test_a_finished_composite_can_be_measured_on_more(folder, undisturbed, monkeypatch, tmp_path):
    source = str(folder / "other.npy")
    first = run(folder, tmp_path / "o", **COMPOSITE)
    layers = {name: data for name, data in snapshot(tmp_path / "o").items() if name.startswith("model-")}
    with monkeypatch.context() as patched:
        patched.setattr(PruneWorker, "narrow", None)  # nothing is removed again
        result = run(folder, tmp_path / "o", **COMPOSITE, eval=(source,))
    assert result.perplexity == undisturbed(**COMPOSITE, eval=(source,))[1].perplexity
    assert {name: data for name, data in snapshot(tmp_path / "o").items() if name in layers} == layers
    assert (result.sparsity, result.structure, result.model) == (first.sparsity, first.structure, first.model)
    assert not (tmp_path / "o" / "structured").exists()


def test_a_composite_measured_on_another_text_is_not_taken_for_this_one(folder, tmp_path):
    source = tmp_path / "eval.npy"
    make_tokens(source, samples=5, seed=2)
    run(folder, tmp_path / "o", **COMPOSITE, eval=(str(source),))
    make_tokens(source, samples=5, seed=3)
    second = run(folder, tmp_path / "o", **COMPOSITE, eval=(str(source),)).perplexity
    assert second == run(folder, tmp_path / "fresh", **COMPOSITE, eval=(str(source),)).perplexity


@pytest.mark.parametrize("state", ["finished", "first run", "second run"])
def test_another_composites_output_is_never_touched(folder, state, dies_at_layer, tmp_path):
    for layer in {"finished": (), "first run": (2,), "second run": (2, 1)}[state]:
        dies_at_layer(layer)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "o", **COMPOSITE)
    if state == "finished":
        run(folder, tmp_path / "o", **COMPOSITE)
    before = snapshot(tmp_path / "o")
    for changed in ({"sparsity": 0.6}, {"structured": 0.2}, {"score": "amp"}, {"sparsity": None}, {"structured": None}):
        with pytest.raises(InputError, match="out: .* holds another run; choose an empty directory"):
            run(folder, tmp_path / "o", **{**COMPOSITE, **changed})
        assert snapshot(tmp_path / "o") == before


def test_no_resume_starts_a_composite_and_refuses_what_is_there(folder, tmp_path):
    run(folder, tmp_path / "o", **COMPOSITE, resume=False)
    before = snapshot(tmp_path / "o")
    with pytest.raises(InputError, match="out: .* holds a run already"):
        run(folder, tmp_path / "o", **COMPOSITE, resume=False)
    assert snapshot(tmp_path / "o") == before


@pytest.mark.parametrize("allocation", ["uniform", "owl", "mosaic"])
@pytest.mark.parametrize("share", [0.2, 0.22])
def test_a_sparsity_that_removal_alone_has_met_leaves_nothing_to_zero(folder, share, allocation, tmp_path):
    """Widths are whole neurons: what is removed may be a little more than was asked for."""
    result = run(folder, tmp_path / "o", structured=share, sparsity=share, allocation=allocation)
    assert result.sparsity.achieved == pytest.approx(share, abs=0.01)
    assert result.sparsity.zeroed <= max(0, share - result.sparsity.removed) + 28 / 30720
