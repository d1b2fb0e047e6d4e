"""Runs whose layers are improved by steps beyond the method: stream targets, and the held-out windows that judge."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.report.progress import Reporter, Step
from shardprune.shard import master_weights, reconstruction
from shardprune.solvers import sparsegpt
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_model

STREAM = {"targets": "stream", "sparsity": 0.6}
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def projections(layer) -> dict[str, torch.nn.Linear]:
    found = {name: getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"}
    return found | {name: getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")}


class Plain:
    """The dense and the sparse stream of a Llama through whole layers, every step written down where it happens."""

    def __init__(self, model: str, tokens: torch.Tensor, held_out: int) -> None:
        self.dense, self.sparse = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
        self.held_out = held_out
        places = torch.arange(tokens.shape[1])[None]
        self.positions = self.dense.model.rotary_emb(torch.zeros(1, 1), places)
        self.stream = {self.dense: self.dense.model.embed_tokens(tokens), self.sparse: None}
        self.stream[self.sparse] = self.stream[self.dense]
        self.errors: list[tuple[float, float, bool]] = []

    def through(self, model, index, windows=slice(None)):
        """A layer's input, the stream behind its attention, its output, and the inputs of its projections."""
        layer, seen, hidden = model.model.layers[index], {}, self.stream[model][windows]
        hooks = [
            module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.setdefault(name, inputs[0]))
            for name, module in projections(layer).items()
        ]
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _module, inputs: seen.setdefault("middle", inputs[0])
            )
        )
        output = layer(hidden, position_embeddings=self.positions, attention_mask=None)
        for hook in hooks:
            hook.remove()
        return hidden, seen, output

    def error(self, index) -> float:
        held = slice(len(self.stream[self.dense]) - self.held_out, None)
        _, _, output = self.through(self.sparse, index, held)
        before, _, dense = self.through(self.dense, index, held)
        return float((output - dense).double().square().sum() / (dense - before).double().square().sum())

    def prune(self, index, sparsity: float, groups=GROUPS) -> None:
        for group in groups:
            calibrating = slice(0, len(self.stream[self.dense]) - self.held_out)
            _, dense, dense_output = self.through(self.dense, index, calibrating)
            _, seen, output = self.through(self.sparse, index, calibrating)
            own = projections(self.sparse.model.layers[index])
            inputs = seen[group[0]].double().flatten(0, 1)
            hessian = inputs.t() @ inputs
            ridge = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
            statistics = InputStatistics.empty("gram", len(hessian))
            statistics.add(seen[group[0]], self.held_out)  # their number scales H and nothing else

            def install(weights, own=own, statistics=statistics):
                for name, weight in weights.items():
                    pruned = sparsegpt.prune(weight, statistics, parse_pattern("unstructured"), sparsity)
                    own[name].weight.data = pruned.weight.clone()

            weights = {name: own[name].weight.data.clone() for name in group}
            targets = {}
            for name, weight in weights.items():
                if name == "o":  # the dense stream behind attention, and how far it is
                    missed = dense["middle"] - seen["middle"]
                elif name == "down":
                    missed = dense_output - output
                else:
                    missed = 0.5 * (dense[name] - seen[name]) @ weight.t()
                change = torch.linalg.solve(hessian + ridge, inputs.t() @ missed.double().flatten(0, 1))
                targets[name] = (weight.double() + change.t()).float()
            install(weights)
            plain, solved = self.error(index), {name: own[name].weight.data.clone() for name in group}
            install(targets)
            corrected = self.error(index)
            if not corrected < plain:
                for name, weight in solved.items():
                    own[name].weight.data = weight
            self.errors.append((plain, corrected, corrected < plain))
        for model in (self.dense, self.sparse):
            self.stream[model] = self.through(model, index)[2]


@torch.no_grad()
@pytest.mark.parametrize("ignored", [(), ("o",)], ids=["all", "o_proj ignored"])
def test_a_run_equals_the_plain_formulation(folder, ignored, tmp_path):
    ignore = tuple(f"*.{name}_proj" for name in ignored)
    result = run(folder, tmp_path / "o", samples=12, ignore=ignore, **STREAM)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    held = [1, 4, 7, 10]  # four of twelve at equal distances
    order = [place for place in range(12) if place not in held] + held
    plain = Plain(str(folder / "model"), tokens[order], 4)
    for index in range(4):
        plain.prune(index, 0.6, [group for group in GROUPS if group != ignored])
    reports = result.sparsity.improvements
    assert [report.kept for report in reports] == [kept for _, _, kept in plain.errors]
    assert {report.kept for report in reports} == {True, False}
    for report, (before, after, _) in zip(reports, plain.errors, strict=True):
        assert report.error_before == pytest.approx(before, rel=1e-3)
        assert report.error_after == pytest.approx(after, rel=1e-3)
    written = load_tensors(tmp_path / "o")
    for name, weight in plain.sparse.state_dict().items():
        if name in written:
            assert torch.allclose(written[name], weight, atol=2e-3), name
    assert result.calibration.held_out == 4
    assert result.sparsity.achieved == pytest.approx(0.6, abs=1e-4)


def test_a_refit_is_judged_with_the_correction_it_belongs_to(folder, tmp_path):
    """Windows this short have too few tokens to fit as many weights as there are."""
    result = run(folder, tmp_path / "o", samples=8, seqlen=4, refit=True, calibration=short(folder, tmp_path), **STREAM)
    fitted = {(report.layer, report.name): report.refit_steps for report in result.sparsity.projections}
    kept = {}
    for step in result.sparsity.improvements:
        kept |= {(step.layer, name): step.kept for name in step.projections}
    assert set(kept.values()) == {True, False}
    assert {place: steps is not None for place, steps in fitted.items()} == kept


def short(folder, tmp_path):
    np.save(tmp_path / "short.npy", np.load(folder / "tokens.npy")[:8, :4])
    return str(tmp_path / "short.npy")


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "o"
    return out, run(folder, out, **STREAM)


def test_layout_does_not_change_a_bit(folder, single, tmp_path):
    sharded = run(folder, tmp_path / "o", shards=3, weights="streamed", **STREAM)
    assert differing(single[0], tmp_path / "o") == []
    assert sharded.sparsity == single[1].sparsity


def test_replicas_change_only_the_order_of_sums(folder, single, tmp_path):
    result = run(folder, tmp_path / "o", replicas=3, **STREAM)
    one, other = load_tensors(single[0]), load_tensors(tmp_path / "o")
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-3), name
    assert [report.kept for report in result.sparsity.improvements] == [
        report.kept for report in single[1].sparsity.improvements
    ]


@pytest.mark.parametrize(
    "fields",
    [STREAM, {"reconstruct": 2, "sparsity": 0.6, "rebuild": "barber"}, {**STREAM, "reconstruct": 2}],
    ids=["stream", "trained, rebuilt", "both"],
)
def test_progress_ends_where_the_work_does(folder, fields, dies_at_layer, tmp_path, monkeypatch):
    steps, show = [], Reporter.show

    def noting(self, step: Step) -> None:
        steps.append((step.done, step.total))
        show(self, step)

    monkeypatch.setattr(Reporter, "show", noting)
    dies_at_layer(1)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **fields)
    steps.clear()
    run(folder, tmp_path / "o", **fields)
    done, total = steps[-1]
    assert done == total


def test_parallel_segments_are_whole_runs_of_their_own(folder, tmp_path):
    fields = {"propagation": "parallel", "segments": 2, **STREAM}
    run(folder, tmp_path / "two", shards=2, **fields)
    run(folder, tmp_path / "one", shards=1, **fields)
    assert differing(tmp_path / "one", tmp_path / "two") == []
    assert differing(tmp_path / "one", folder / "model") != []


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(folder, single, dies_at_layer, layer, weights, tmp_path):
    dies_at_layer(layer)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", weights=weights, **STREAM)
    result = run(folder, tmp_path / "o", weights=weights, **STREAM)
    assert differing(single[0], tmp_path / "o") == []
    assert result.sparsity == single[1].sparsity


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_methods_without_a_gram_matrix_get_one(folder, method, tmp_path):
    result = run(folder, tmp_path / "o", method=method, pattern="2:4", targets="stream", measure_error=False)
    assert any(report.kept for report in result.sparsity.improvements)
    for name, weight in load_tensors(tmp_path / "o").items():
        if "_proj" in name:
            assert parse_pattern("2:4").holds(weight)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "opt", "opt-350m"])  # others have Llama's projections
def test_a_family_has_its_targets(family, tmp_path, folder):
    make_model(tmp_path / "model", family)
    result = run(tmp_path, tmp_path / "o", calibration=str(folder / "tokens.npy"), **STREAM)
    reports = result.sparsity.improvements
    inputs = Skeleton(Checkpoint(str(tmp_path / "model")).config, "cpu").family.kinds[0].inputs
    assert [tuple(report.projections) for report in reports] == [*inputs] * 4
    assert {report.kept for report in reports} == {True, False}
    assert result.sparsity.achieved == pytest.approx(0.6, abs=1e-3)


# -- reconstruction ---------------------------------------------------------------------------------------------------

TRAINED = {"reconstruct": 6, "sparsity": 0.6}
BOTH = {**TRAINED, "targets": "stream"}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "o"
    return out, run(folder, out, **BOTH)


def test_trained_layers_come_nearer_and_keep_their_zeros(folder, trained, single):
    out, result = trained
    steps = [report for report in result.sparsity.improvements if report.step == "reconstruction"]
    assert [report.layer for report in steps] == [0, 1, 2, 3]
    assert all(len(report.projections) == 7 for report in steps)
    kept = {report.layer for report in steps if report.kept}
    assert 0 in kept
    first, before = load_tensors(out), load_tensors(single[0])
    changed = 0
    for report in result.sparsity.projections:
        name = f"model.layers.{report.layer}.{report.name}.weight"
        assert report.achieved == int((first[name] == 0).sum()) / first[name].numel()
        assert (report.error is None) == (report.layer in kept)
        if report.layer == 0:
            assert torch.equal(first[name] == 0, before[name] == 0)
            changed += not torch.equal(first[name], before[name])
    assert changed == 7
    assert result.sparsity.achieved == pytest.approx(0.6, abs=1e-4)


def test_training_does_not_depend_on_shards(folder, trained, tmp_path):
    sharded = run(folder, tmp_path / "o", shards=3, weights="streamed", **BOTH)
    assert differing(trained[0], tmp_path / "o") == []
    assert sharded.sparsity == trained[1].sparsity


def test_replicas_lend_their_windows(folder, tmp_path):
    """Sums alone are in another order: a method without them leaves training to see the same."""
    fields = {"method": "magnitude", "measure_error": False, **TRAINED}
    alone, together = run(folder, tmp_path / "1", **fields), run(folder, tmp_path / "3", replicas=3, **fields)
    one, other = load_tensors(tmp_path / "1"), load_tensors(tmp_path / "3")
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-4), name
    kept = [[report.kept for report in result.sparsity.improvements] for result in (alone, together)]
    assert kept[0] == kept[1]


def test_as_many_replicas_as_windows_that_are_not_held_out(folder, tmp_path):
    """Half of them have no window that is held out."""
    fields = {"sparsity": 0.6, "refit": True, "damping": "auto", "reconstruct": 2, "samples": 12}
    one, eight = (run(folder, tmp_path / f"{replicas}", replicas=replicas, **fields) for replicas in (1, 8))
    assert one.calibration.held_out == eight.calibration.held_out == 4
    assert [found.achieved for found in one.sparsity.projections] == [
        found.achieved for found in eight.sparsity.projections
    ]
    for alone, shared in zip(one.sparsity.improvements, eight.sparsity.improvements, strict=True):
        assert shared.error_after == pytest.approx(alone.error_after, rel=0.05)


def test_a_run_cut_off_after_training_goes_on_to_the_same_bits(folder, trained, dies_at_layer, tmp_path):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **BOTH)
    result = run(folder, tmp_path / "o", **BOTH)
    assert differing(trained[0], tmp_path / "o") == []
    assert result.sparsity == trained[1].sparsity


def test_a_run_cut_off_while_it_trains_goes_on_to_the_same_bits(folder, trained, tmp_path, monkeypatch):
    steps, rate_at = itertools.count(), reconstruction.rate_at

    def interrupted(step, of):
        if next(steps) == 2 * 42 + 15:  # of six steps for seven projections: in the middle of the third layer
            raise KeyboardInterrupt
        return rate_at(step, of)

    monkeypatch.setattr(reconstruction, "rate_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **BOTH)
    assert (tmp_path / "o").exists()
    result = run(folder, tmp_path / "o", **BOTH)
    assert differing(trained[0], tmp_path / "o") == []
    assert result.sparsity == trained[1].sparsity


@pytest.mark.parametrize("rate", [10.0, float("nan")])
def test_training_that_does_not_help_is_undone_to_the_bit(folder, tmp_path, monkeypatch, rate):
    tokens = np.load(folder / "tokens.npy")
    np.save(tmp_path / "seen.npy", np.delete(tokens, [1, 4, 7, 10], axis=0))
    run(folder, tmp_path / "plain", sparsity=0.6, samples=8, calibration=str(tmp_path / "seen.npy"))
    monkeypatch.setattr(master_weights, "RATE", rate)
    result = run(folder, tmp_path / "o", **TRAINED)
    assert [report.kept for report in result.sparsity.improvements] == [False] * 4
    assert all(report.error is not None for report in result.sparsity.projections)
    assert differing(tmp_path / "plain", tmp_path / "o") == []


def test_rebuilt_masks_and_patterns_stay_while_weights_are_trained(folder, tmp_path):
    fields = {"pattern": "2:4", "method": "wanda", "rebuild": "barber", "rebuild_threshold": 0.3}
    result = run(folder, tmp_path / "o", reconstruct=6, **fields)
    assert any(report.kept for report in result.sparsity.improvements)
    for name, weight in load_tensors(tmp_path / "o").items():
        if "_proj" in name:
            assert parse_pattern("2:4").holds(weight)
            assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 7}, "samples: 7 is too few for targets stream, which holds out some; use at least 8"),
        (
            {"samples": 7, "targets": "own", "reconstruct": 5},
            "samples: 7 is too few for reconstruct, which holds out some; use at least 8",
        ),
        ({"rebuild": "barber"}, "rebuild: 'barber' does not go with targets stream; use targets own, or rebuild none"),
        (
            {"sparsity": None, "structured": 0.2},
            "targets: 'stream' has no effect without a sparsity or a pattern N:M",
        ),
        ({"targets": "dense"}, "targets: 'dense' is not allowed; use one of auto, stream, own"),
    ],
)
def test_what_cannot_be_held_out_is_refused(folder, fields, message, tmp_path):
    with pytest.raises(InputError) as raised:
        run(folder, tmp_path / "o", **{**STREAM, **fields})
    assert str(raised.value) == message
    assert not (tmp_path / "o").exists()
