"""What a path has left is trained towards the dense model: layers before a gap aim at the activations behind it."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.report.page.write import plots_of
from shardprune.report.progress import Reporter, Step
from shardprune.shard import master_weights
from shardprune.shard.mop_worker import MopWorker
from shardprune.solvers.training import BETAS, RATE, rate_at, windows_of_steps
from tests.support.running import search_run as search
from tests.support.tiny import GROUPED, differing, load_tensors, make_model, make_tokens

HELD = [1, 4, 7, 10]  # four of twelve at equal distances
STEPS = 6
DEEP = ("LlamaConfig", {**GROUPED["llama-3.1"][1], "num_hidden_layers": 6})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_model(folder / "model", "llama-3.1", configs=GROUPED)
    make_tokens(folder / "tokens.npy")
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The output and the result of a path, trained, that nothing interrupts; each path once."""
    done = {}

    def once(path):
        if path not in done:
            out = tmp_path_factory.mktemp("once") / "o"
            done[path] = out, search(folder, out, path=path, reconstruct=STEPS)
        return done[path]

    return once


# -- a plain formulation ----------------------------------------------------------------------------------------------


def through(layers, hidden, model):
    """Hidden states [windows, seqlen, hidden] behind each of some decoder layers, one after the other."""
    places = torch.arange(hidden.shape[1])[None]
    angles = model.model.rotary_emb(hidden, places)
    mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for layer in layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, position_ids=places)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def plain_training(model, left, tokens):
    """Train copies of the layers that are left, in turn; return them and the errors of each, before and after."""
    dense = pruned = model.model.embed_tokens(tokens).detach()
    layers, errors = [], []
    for place, index in enumerate(left):
        span = range(index if place else 0, left[place + 1] if place + 1 < len(left) else len(model.model.layers))
        with torch.no_grad():
            target = through([model.model.layers[at] for at in span], dense, model)
        layer = copy.deepcopy(model.model.layers[index])
        norms = (target - dense).square().sum((1, 2))
        norm = float(norms[HELD].mean())

        def miss(layer=layer, pruned=pruned, target=target, norms=norms):
            with torch.no_grad():
                return float((through([layer], pruned, model) - target)[HELD].square().sum() / norms[HELD].sum())

        before, untrained = miss(), copy.deepcopy(layer.state_dict())
        if before > 1e-12:
            weights = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
            groups = [
                {"params": [weight], "full": RATE * float(weight.detach().square().mean().sqrt())} for weight in weights
            ]
            optimizer = torch.optim.Adam(groups, betas=BETAS)
            seen = [window for window in range(len(tokens)) if window not in HELD]
            for step, batch in enumerate(windows_of_steps(len(seen), tokens.shape[1], STEPS, index)):
                windows = [seen[window] for window in batch]
                for group in optimizer.param_groups:
                    group["lr"] = group["full"] * rate_at(step, STEPS)
                optimizer.zero_grad()
                missed = (through([layer], pruned[windows], model) - target[windows]).square().sum()
                (missed / len(windows) / norm).backward()
                optimizer.step()
            errors.append((index, before, miss()))
            if errors[-1][2] >= before:
                layer.load_state_dict(untrained)
        layers.append(layer)
        with torch.no_grad():
            dense, pruned = target, through([layer], pruned, model)
    return layers, errors


def test_a_layer_before_a_gap_aims_behind_it(folder, trained):
    out, result = trained("L")
    assert result.structure.kept == [0, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    layers, errors = plain_training(model, [0, 2, 3], torch.from_numpy(np.load(folder / "tokens.npy")))
    found = result.structure.improvements
    assert [(step.layer, step.step) for step in found] == [(index, "reconstruction") for index, _, _ in errors]
    assert found[0].kept
    for step, (_, before, after) in zip(found, errors, strict=True):
        assert step.error_before == pytest.approx(before, rel=1e-3)
        assert step.error_after == pytest.approx(after, rel=1e-2)
        assert step.kept == (after < before)
    written = load_tensors(out)
    for place, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            assert torch.allclose(written[f"model.layers.{place}.{name}"], tensor, atol=2e-3), (place, name)


def test_layers_before_the_first_gap_stay_as_they_are(folder, tmp_path):
    make_model(tmp_path / "deep", configs={"llama-3.1": DEEP})
    result = search(folder, tmp_path / "o", model=tmp_path / "deep", path="L", reconstruct=2)
    assert result.structure.kept == [0, 1, 2, 4, 5]
    assert [step.layer for step in result.structure.improvements] == [2, 4, 5]
    before, after = load_tensors(tmp_path / "deep"), load_tensors(tmp_path / "o")
    untouched = [name for name in after if ".layers.0." in name or ".layers.1." in name]
    assert untouched
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_the_path_and_what_it_leaves_are_those_without_training(folder, trained, tmp_path):
    out, result = trained("GL")
    plain = search(folder, tmp_path / "o", path="GL")
    assert result.structure.path == plain.structure.path
    assert result.structure.after == plain.structure.after
    assert plain.structure.improvements is None
    assert result.calibration.held_out == 4
    assert any(plot and plot.title.startswith("Error of layers") for plot in plots_of(result))
    assert not any(plot and plot.title.startswith("Error of layers") for plot in plots_of(plain))
    before, after = load_tensors(tmp_path / "o"), load_tensors(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {result.structure.kept.index(step.layer) for step in result.structure.improvements if step.kept}
    assert kept
    assert {int(name.split(".")[2]) for name in changed} == kept
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert not (tmp_path / "o" / "layers-01").exists()


def test_shards_do_not_change_a_bit(folder, trained, tmp_path):
    result = search(folder, tmp_path / "o", path="GL", reconstruct=STEPS, shards=3, activations="device")
    assert differing(trained("GL")[0], tmp_path / "o") == []
    assert result.structure == trained("GL")[1].structure


@pytest.mark.long
def test_a_shard_that_has_lost_all_its_layers_hands_on(folder, trained, tmp_path):
    search(folder, tmp_path / "o", path="LL", reconstruct=STEPS, shards=4)
    assert differing(trained("LL")[0], tmp_path / "o") == []


def test_replicas_lend_their_windows(folder, trained, tmp_path):
    result = search(folder, tmp_path / "o", path="LL", reconstruct=STEPS, replicas=3)
    one, other = load_tensors(trained("LL")[0]), load_tensors(tmp_path / "o")
    assert all(torch.allclose(tensor, other[name], atol=1e-3) for name, tensor in one.items())
    assert [step.kept for step in result.structure.improvements] == [
        step.kept for step in trained("LL")[1].structure.improvements
    ]


@pytest.mark.parametrize(
    ("path", "verb"), [("GL", "write"), pytest.param("LL", "reconstruct", marks=pytest.mark.long), ("GL", "usage")]
)
def test_a_run_that_was_cut_off_while_it_trains_goes_on_to_the_same_bits(
    folder, trained, path, verb, tmp_path, monkeypatch
):
    whole, calls = getattr(MopWorker, verb), []

    def dying(self, *args):
        if verb != "write" or not args[0].endswith("layers-01"):  # of the search
            calls.append(args)
        if len(calls) == (1 if verb == "usage" else 2):
            raise KeyboardInterrupt
        return whole(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(MopWorker, verb, dying)
        for name in ("kind", "layer", "__name__"):
            setattr(dying, name, getattr(whole, name, None))
        with pytest.raises(KeyboardInterrupt):
            search(folder, tmp_path / "o", path=path, reconstruct=STEPS)
    steps, show = [], Reporter.show

    def noting(self, step: Step) -> None:
        steps.append((step.label, step.done, step.total))
        show(self, step)

    monkeypatch.setattr(Reporter, "show", noting)
    result = search(folder, tmp_path / "o", path=path, reconstruct=STEPS)
    out, undisturbed = trained(path)
    assert result.structure == undisturbed.structure
    assert differing(out, tmp_path / "o") == []
    training = [(done, total) for label, done, total in steps if label == "train"]
    if verb == "usage":  # all of them were written
        assert training == []
    else:
        done, total = training[-1]
        assert done == total
    assert {entry.name for entry in (tmp_path / "o").iterdir()} == {entry.name for entry in out.iterdir()}


def test_training_that_does_not_help_is_undone_to_the_bit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(master_weights, "RATE", 10.0)
    result = search(folder, tmp_path / "o", path="GL", reconstruct=2)
    assert {step.kept for step in result.structure.improvements} == {False}
    search(folder, tmp_path / "plain", path="GL")
    assert differing(tmp_path / "plain", tmp_path / "o") == []


@pytest.mark.long
def test_trained_projections_are_written_in_their_own_dtype(folder, tmp_path):
    make_model(tmp_path / "half", "qwen2", dtype=torch.bfloat16)
    result = search(folder, tmp_path / "o", model=tmp_path / "half", path="L", reconstruct=3)
    assert any(step.kept for step in result.structure.improvements)
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "o").values()} == {torch.bfloat16}


@pytest.mark.long
def test_kept_iterations_are_not_trained(folder, tmp_path):
    search(folder, tmp_path / "o", path="GL", keep="1", reconstruct=2)
    search(folder, tmp_path / "plain", path="G")
    assert differing(tmp_path / "plain", tmp_path / "o" / "iteration-01") == []


def test_too_few_windows_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"^samples: 7 is too few for reconstruct, which holds out some"):
        search(folder, tmp_path / "o", path="L", reconstruct=2, samples=7)
    assert not (tmp_path / "o").exists()
