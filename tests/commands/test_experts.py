"""Runs that remove experts, against transformers' own models."""

import json
import re
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from shardprune import ExpertsRecipe, PipelineRecipe, pipeline
from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.model.experts import is_mixture
from shardprune.report.page.experts_map import experts_map, lost_weight
from shardprune.report.progress import Reporter
from shardprune.report.summary import summary_rows
from shardprune.shard.forward_worker import ForwardWorker
from tests.commands.expert_runs import COUNTS, GROUPED, SAMPLES, SEQLEN, WAVE, load, material, remove
from tests.commands.test_architectures import perplexity
from tests.support.architectures import MIXTURES
from tests.support.entries import entries
from tests.support.infinities import FORMS, with_infinities
from tests.support.tiny import differing, load_tensors

UNCUT = {"longcat_flash"}  # whose routers choose among experts without weights, too


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Qwen3-MoE of six experts in both of its layers."""
    return material(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def mixtures_of(model):
    """The experts' modules of a model, in the order of its layers."""
    return [module for module in model.modules() if is_mixture(module)]


def scaled_and_routed(model):
    """Let the experts of Llama 4 be called as those of others: with tokens, and which experts these go to, times what.

    Their own code takes the tokens of one expert behind those of another, and zeros for those that others get.
    """
    for block in (module for module in model.modules() if type(module).__name__ == "Llama4TextMoe"):

        def forward(hidden, index, weights, experts=block.experts, own=block.experts.forward):
            every = torch.zeros(len(experts.down_proj), *hidden.shape)
            for choice, weight in zip(index.t(), weights.t(), strict=True):
                every[choice, torch.arange(len(hidden))] = hidden * weight[:, None]
            return own(every.flatten(0, 1)).view(every.shape).sum(0)

        def whole(hidden_states, block=block):
            hidden = hidden_states.flatten(0, 1)
            scores, logits = block.router(hidden)
            weights, index = scores.max(-1, keepdim=True)
            return block.shared_expert(hidden) + block.experts(hidden, index, weights), logits

        block.experts.forward, block.forward = forward, whole
    return model


def plain_statistics(model, windows):
    """Sums over the tokens of each expert by layer, each expert called alone with the tokens that are routed to it."""
    found = []
    for module in mixtures_of(model):
        sums = defaultdict(lambda: np.zeros(5))
        sums["largest"] = np.zeros(module.down_proj.shape[0])
        found.append(sums)

        def add(module, given, sums=sums, forward=module.forward):
            hidden, index, weights = given
            for expert in range(module.down_proj.shape[0]):
                tokens, places = torch.where(index == expert)
                if len(tokens):
                    alone = torch.full((len(tokens), 1), expert), torch.ones(len(tokens), 1, dtype=weights.dtype)
                    weight = weights[tokens, places]
                    scaled = type(module).__name__ == "Llama4TextExperts"
                    inputs = hidden[tokens] * weight[:, None] if scaled else hidden[tokens]
                    output, weight = forward(inputs, *alone).double(), weight.double()
                    norm = output.norm(dim=-1)
                    parts = (torch.ones_like(norm), weight, norm, norm if scaled else weight * norm, norm**2)
                    sums[expert] += np.array([float(part.sum()) for part in parts])
                    sums["largest"][expert] = max(sums["largest"][expert], float(output.abs().max()))

        module.register_forward_pre_hook(add)
    with torch.no_grad():
        for wave in windows.split(WAVE):
            model(wave, use_cache=False)
    return found


def choose_among(dense, small, kept):
    """Let the routers of a dense model have the rows of the kept experts alone, and its experts the tokens that these
    get."""
    inside = [f"{name}." for name, module in dense.named_modules() if is_mixture(module)]
    after = small.state_dict()
    for name, tensor in dense.state_dict().items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if name.startswith(tuple(inside)) or after[name].shape == tensor.shape:
            continue
        (dim,) = (d for d, sizes in enumerate(zip(tensor.shape, after[name].shape, strict=True)) if len({*sizes}) > 1)
        path, _, leaf = name.rpartition(".")
        module = dense.get_submodule(path)
        rows = tensor.index_select(dim, torch.tensor(kept[layer]))
        if leaf in module._buffers:
            module._buffers[leaf] = rows
        else:
            module._parameters[leaf] = torch.nn.Parameter(rows, requires_grad=False)
        for count in COUNTS:
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, len(kept[layer]))
    for module, own in zip(mixtures_of(dense), kept.values(), strict=True):
        places = torch.tensor(own)
        module.register_forward_pre_hook(lambda _module, given, places=places: (given[0], places[given[1]], *given[2:]))


@pytest.mark.parametrize("model_type", [name for name in MIXTURES if name not in UNCUT])
@torch.no_grad()
def test_the_output_is_the_dense_model_whose_router_chooses_among_the_kept_experts(model_type, tmp_path):
    folder = material(tmp_path, model_type)
    windows = torch.from_numpy(np.load(folder / "tokens.npy"))
    text = str(folder / "tokens.npy")
    count = 8 if model_type in GROUPED else MIXTURES["qwen3_moe"]["num_experts"] if model_type == "qwen3_moe" else 4
    result = remove(folder, "out", keep=count // 2 + (model_type == "qwen3_moe"), eval=(text,))
    kept = {layer.layer: layer.kept for layer in result.experts.layers}

    known = json.loads((folder / "out" / "experts.json").read_text())["routed"]
    plain = plain_statistics(scaled_and_routed(load(folder / "model")), windows)
    for (layer, own), sums in zip(known.items(), plain, strict=True):
        for row, name in enumerate(("tokens", "weights", "norms", "products", "squares")):
            assert own[name] == pytest.approx([sums[expert][row] for expert in range(count)], rel=1e-6), (layer, name)
        assert own["maxima"] == pytest.approx(sums["largest"].tolist(), rel=1e-6)
        means = [sums[expert][3] / max(1, sums[expert][0]) for expert in range(count)]
        scored = next(one for one in result.experts.layers if one.layer == int(layer))
        assert scored.scores == pytest.approx(means, rel=1e-6)
        gone = 1 - sum(sums[expert][1] for expert in scored.kept) / sum(sums[expert][1] for expert in range(count))
        assert scored.lost == pytest.approx(gone, abs=1e-6)

    dense, small = scaled_and_routed(load(folder / "model")), scaled_and_routed(load(folder / "out"))
    choose_among(dense, small, kept)
    assert torch.equal(small(windows[:4], use_cache=False).logits, dense(windows[:4], use_cache=False).logits)
    (measured,) = result.perplexity.values()
    assert measured.before == pytest.approx(perplexity(folder / "model", windows), rel=1e-4)
    assert measured.after == pytest.approx(perplexity(folder / "out", windows), rel=1e-4)
    assert (result.experts.before, result.experts.after) == (count, len(next(iter(kept.values()))))
    raw, before = (json.loads((folder / name / "config.json").read_text()) for name in ("out", "model"))
    named = [name for name in COUNTS if name in before]
    assert named
    assert {name: raw[name] for name in named} == dict.fromkeys(named, result.experts.after)
    assert {name for name in raw if raw[name] != before.get(name)} == set(named)
    assert result.model.parameters_after == sum(parameter.numel() for parameter in small.parameters())
    assert [verdict.faults for verdict in check(str(folder / "out"))] == [[]]


def test_routers_that_choose_among_experts_without_weights_are_not_cut(tmp_path):
    folder = material(tmp_path, "longcat_flash")
    reason = r"routers choose among 2 experts without weights, too \(zero_expert_num\), and cannot be cut yet"
    with pytest.raises(InputError, match=f"^model: {reason}$"):
        remove(folder, "out", keep=3)
    assert not (folder / "out").exists()


def test_on_any_workers_it_is_the_same(mixture):
    single = remove(mixture, "single", keep=4)
    for out, changed in (
        ("sharded", {"shards": 2}),
        ("streamed", {"weights": "streamed"}),
        ("streamed shards", {"shards": 2, "weights": "streamed"}),
        ("replicated", {"replicas": 2}),
        ("all", {"shards": 2, "replicas": 3, "weights": "streamed"}),
    ):
        result = remove(mixture, out, keep=4, **changed)
        assert differing(mixture / "single", mixture / out) == []
        files = [(mixture / name / "experts.json").read_bytes() for name in (out, "single")]
        if "replicas" not in changed:
            assert result.experts == single.experts
            assert files[0] == files[1]
        sums = [json.loads(file)["routed"] for file in files]
        for layer, columns in sums[0].items():
            for name, column in columns.items():
                assert column == pytest.approx(sums[1][layer][name], rel=1e-6)


@pytest.mark.parametrize("score", ExpertsRecipe.choices("score"))
def test_another_share_and_another_score_need_no_second_pass(score, mixture, tmp_path, monkeypatch):
    if not (mixture / "first").exists():
        remove(mixture, "first", keep=5)
    direct = remove(mixture, tmp_path / "direct", keep=3, score=score) if score != "aimer" else None
    text = {"calibration": ("c4",)}  # as they are where nobody gives them

    def no_pass(*_):
        raise AssertionError("a wave passes through")

    monkeypatch.setattr(ForwardWorker, "embed", no_pass)
    again = remove(mixture, tmp_path / "again", keep=3, score=score, statistics=str(mixture / "first"), **text)
    for layer in again.experts.layers:
        free = [place for place in range(6) if place not in layer.protected]
        ranked = sorted(free, key=lambda place: -layer.scores[place])[: 3 - len(layer.protected)]
        assert layer.kept == sorted({*layer.protected, *ranked})
    if direct:
        assert differing(tmp_path / "direct", tmp_path / "again") == []
        assert again.experts == direct.experts
        assert again.calibration is None


def test_aimer_looks_at_the_weights_alone(mixture, tmp_path):
    result = remove(mixture, tmp_path / "out", keep=4, score="aimer", calibration=("c4",))
    tensors = load_tensors(mixture / "model")
    for layer in result.experts.layers:
        ratios = []
        for expert in range(6):
            prefix = f"model.layers.{layer.layer}.mlp.experts.{expert}."
            weights = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.startswith(prefix)])
            ratios.append(float(weights.double().abs().mean() / weights.double().square().mean().sqrt()))
        assert layer.scores == pytest.approx([-ratio for ratio in ratios], rel=1e-6)
        assert layer.kept == sorted(sorted(range(6), key=lambda expert: ratios[expert])[:4])
        assert layer.tokens is None
    given = {"statistics": str(tmp_path / "out"), "calibration": ("c4",)}
    with pytest.raises(InputError, match="^statistics: .* has made no whole pass, and score reap needs one"):
        remove(mixture, tmp_path / "second", keep=4, **given)
    assert not (tmp_path / "second").exists()


def test_an_expert_of_zeros_goes_first(mixture, tmp_path):
    shutil.copytree(mixture / "model", tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    zeros = {name: tensor * 0 for name, tensor in tensors.items() if ".mlp.experts.3." in name}
    assert zeros
    save_file(tensors | zeros, file, metadata={"format": "pt"})
    result = remove(mixture, tmp_path / "out", tmp_path / "model", keep=5, score="aimer", calibration=("c4",))
    assert all(layer.kept == [0, 1, 2, 4, 5] for layer in result.experts.layers)


def test_every_group_keeps_as_many_experts(tmp_path):
    folder = material(tmp_path, "deepseek_v3")
    for layer in remove(folder, "out", keep=4).experts.layers:
        assert [sum(expert // 4 == group for expert in layer.kept) for group in range(2)] == [2, 2]


def test_an_expert_with_extreme_outputs_stays_whatever_its_score(tmp_path):
    folder = material(tmp_path, "qwen3_moe")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    lowest = remove(folder, "first", keep=4, protect=False).experts.layers[0]
    least = min(range(6), key=lambda expert: lowest.scores[expert])
    # One neuron that is seldom active: of one token the output is extreme, and its mean is not.
    down = tensors[f"model.layers.0.mlp.experts.{least}.down_proj.weight"]
    down[3] *= 40
    save_file(tensors, file, {"format": "pt"})
    kept = {}
    for protect in (True, False):
        result = remove(folder, f"protect-{protect}", keep=2, protect=protect, score="frequency")
        kept[protect] = result.experts.layers[0]
    rarest = min(range(6), key=lambda expert: kept[True].tokens[expert])
    assert kept[True].protected == [least]
    assert least in kept[True].kept
    assert kept[False].protected == []
    assert (least in kept[False].kept) == (least in sorted(range(6), key=lambda e: -kept[False].tokens[e])[:2])
    assert rarest not in kept[False].kept


@torch.no_grad()
def test_layers_may_see_the_activations_behind_those_that_were_cut(mixture, tmp_path):
    """The first layer is cut as ever; the second one's statistics are those of a model whose first layer is cut."""
    result = remove(mixture, tmp_path / "out", keep=4, propagate="pruned")
    for out, layout in (("sharded", {"shards": 2}), ("streamed", {"shards": 2, "weights": "streamed"})):
        other = remove(mixture, tmp_path / out, keep=4, propagate="pruned", **layout)
        assert differing(tmp_path / "out", tmp_path / out) == []
        assert other.experts == result.experts
    dense = remove(mixture, tmp_path / "dense", keep=4, protect=False)
    first, second = result.experts.layers
    assert (first, first.protected) == (dense.experts.layers[0], [])
    assert second.scores != dense.experts.layers[1].scores
    model, cut = load(mixture / "model"), load(tmp_path / "out")
    model.model.layers[0] = cut.model.layers[0]
    windows = torch.from_numpy(np.load(mixture / "tokens.npy"))
    sums = plain_statistics(model, windows)[1]
    means = [sums[expert][3] / max(1, sums[expert][0]) for expert in range(6)]
    assert second.scores == pytest.approx(means, rel=1e-6)
    text = {"calibration": ("c4",), "statistics": str(tmp_path / "out")}
    with pytest.raises(InputError, match="^statistics: .* has those of layers behind cut ones, which fit no other cut"):
        remove(mixture, tmp_path / "again", keep=3, **text)


TRAINED = {
    "routers": {"router_kd": 12},
    "all that is left": {"reconstruct": 12},
    "both, behind cut layers": {"router_kd": 6, "reconstruct": 6, "propagate": "pruned"},
}


@pytest.mark.parametrize("fields", entries(TRAINED, "both, behind cut layers"))
def test_what_a_layer_keeps_is_trained_towards_the_dense_layer(fields, mixture, tmp_path):
    text = str(mixture / "tokens.npy")
    result = remove(mixture, tmp_path / "out", keep=3, eval=(text,), **fields)
    steps = [name for name, asked in (("router", "router_kd"), ("reconstruction", "reconstruct")) if asked in fields]
    for layer in result.experts.layers:
        assert [one.step for one in layer.trained] == steps
        assert all(one.kept == (one.error_after < one.error_before) for one in layer.trained)
        assert layer.trained[0].kept
    kept = sum(one.kept for layer in result.experts.layers for one in layer.trained)
    assert ("trainings of a layer kept, of those tried", "", f"{kept} of {2 * len(steps)}") in summary_rows(result)
    plain = remove(mixture, tmp_path / "plain", keep=3, eval=(text,))
    if "propagate" not in fields:
        assert [layer.kept for layer in result.experts.layers] == [layer.kept for layer in plain.experts.layers]
        changed = set(differing(tmp_path / "plain", tmp_path / "out"))
        routers = {f"model.layers.{index}.mlp.gate.weight" for index in range(2)}
        assert changed == routers if "router_kd" in fields else not changed & routers
        assert {name for name in changed if "norm" in name or "embed" in name} == set()
    (after,), (before,) = result.perplexity.values(), plain.perplexity.values()
    measured = perplexity(tmp_path / "out", torch.from_numpy(np.load(text)))
    assert measured == pytest.approx(after.after, rel=1e-4)
    assert abs(after.after - after.before) < abs(before.after - before.before)
    for out, layout in (("sharded", {"shards": 2, "weights": "streamed"}), ("replicas", {"replicas": 2})):
        remove(mixture, tmp_path / out, keep=3, eval=(text,), **fields, **layout)
    assert differing(tmp_path / "out", tmp_path / "sharded") == []
    given = {"statistics": str(tmp_path / "plain")} if "propagate" not in fields else {}
    again = remove(mixture, tmp_path / "given", keep=3, eval=(text,), **fields, **given)
    assert differing(tmp_path / "out", tmp_path / "given") == []
    assert again.experts == result.experts


def test_a_pipeline_removes_experts_and_the_report_draws_them(mixture, tmp_path):
    text = str(mixture / "tokens.npy")
    section = {"keep": 4, "calibration": text, "samples": SAMPLES, "seqlen": SEQLEN, "wave": WAVE}
    recipe = {
        **{"model": str(mixture / "model"), "out": str(tmp_path / "o"), "backend": "local", "threads": 1},
        **{"experts": section, "evaluate": {"perplexity": text, "seqlen": SEQLEN}},
    }
    results = pipeline(PipelineRecipe.checked(recipe), Reporter(quiet=True))
    direct = remove(mixture, "for the report", keep=4)
    assert differing(tmp_path / "o" / "pruned", mixture / "for the report") == []
    assert results["experts"].experts == direct.experts
    page = (tmp_path / "o" / "report.html").read_text()
    assert "4 of 6 experts by reap" in page
    assert "Experts that stayed, by layer" in page
    assert "Routing weight lost by layer" in page
    drawn = experts_map(direct.experts).figure.data[0]
    for row, words, layer in zip(drawn.z, drawn.customdata, direct.experts.layers, strict=True):
        assert [place for place, score in enumerate(row) if score is not None] == layer.kept
        assert [f"{count:,} tokens" in said for count, said in zip(layer.tokens, words, strict=True)] == [True] * 6
    assert list(lost_weight(direct.experts).figure.data[0].y) == [100 * layer.lost for layer in direct.experts.layers]


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_that_predict_further_tokens_keep_the_experts_of_the_last_layer(stacked, tmp_path):
    folder = material(tmp_path, "qwen3_next")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(1)
    further = {
        name.replace("model.layers.1.", "mtp.layers.0."): torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    if stacked:
        parts = [name for name in further if re.search(r"experts\.\d", name)]
        down = [further[f"mtp.layers.0.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)]
        further = {name: tensor for name, tensor in further.items() if name not in parts}
        further["mtp.layers.0.mlp.experts.down_proj"] = torch.stack(down)
    further["mtp.fc.weight"] = torch.randn(4, 64, generator=draw)
    save_file({**tensors, **further}, file, {"format": "pt"})
    result = remove(folder, "out", keep=3)
    kept, after = result.experts.layers[-1].kept, load_tensors(folder / "out")
    load(folder / "out")
    written = {name: tensor for name, tensor in after.items() if name.startswith("mtp.")}
    for name, tensor in written.items():
        if own := re.fullmatch(r"(mtp\.layers\.0\.mlp\.experts\.)(\d)(\..*)", name):
            assert torch.equal(tensor, further[f"{own[1]}{kept[int(own[2])]}{own[3]}"])
        elif name in ("mtp.layers.0.mlp.gate.weight", "mtp.layers.0.mlp.experts.down_proj"):
            assert torch.equal(tensor, further[name][kept])
        else:
            assert torch.equal(tensor, further[name])
    assert len(written) == len(further) - (0 if stacked else 3)  # the parts of one expert
    assert [verdict.faults for verdict in check(str(folder / "out"))] == [[]]


@pytest.mark.parametrize("form", FORMS)
def test_infinite_numbers_of_the_config_stay(form, tmp_path):
    folder = material(tmp_path, "nemotron_h")
    file = folder / "model" / "config.json"
    file.write_text(with_infinities(AutoConfig.from_pretrained(folder / "model"), form))
    limits = json.loads(file.read_text())["time_step_limit"]
    remove(folder, "out", keep=2)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["n_routed_experts"], written["time_step_limit"]) == (2, limits)
    assert [*load(tmp_path / "out").config.time_step_limit] == [0.0, float("inf")]
