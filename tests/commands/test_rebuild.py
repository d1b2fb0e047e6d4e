"""Runs that rebuild masks, of this tool's own pruning and of other checkpoints."""

import functools
import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter, Step
from shardprune.solvers.pattern import parse_pattern
from tests.support.running import rebuild_run, run
from tests.support.tiny import differing, load_tensors, make_model, make_tokens, snapshot

BARBER = {"rebuild": "barber", "rebuild_threshold": 0.2}
PROJECTION = "model.layers.{}.{}.weight"


def zeros_of(folder, result) -> dict[str, int]:
    tensors = load_tensors(folder)
    names = [PROJECTION.format(report.layer, report.name) for report in result.sparsity.projections]
    return {name: int((tensors[name] == 0).sum()) for name in names}


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """Outputs and results of runs that rebuild nothing, by their method and pattern."""

    @functools.cache
    def get(method: str, pattern: str):
        out = tmp_path_factory.mktemp("plain") / "o"
        return out, run(folder, out, method=method, pattern=pattern, sparsity=0.5)

    return get


# A method makes the masks that are rebuilt, and takes no other part: one has every granularity.
EVERY_GRANULARITY = itertools.product(["wanda"], ["unstructured", "2:4"], ["row", "column", "projection", "block"])
OTHER_METHODS = itertools.product(["magnitude", "sparsegpt"], [("unstructured", "block"), ("2:4", "row")])


@pytest.mark.parametrize(
    ("method", "pattern", "granularity"), [*EVERY_GRANULARITY, *((method, *way) for method, way in OTHER_METHODS)]
)
def test_zeros_stay_as_many(folder, plain, method, pattern, granularity, tmp_path):
    barber = {"rebuild": "barber", "rebuild_threshold": 0.5, "rebuild_granularity": granularity}
    result = run(folder, tmp_path / "o", method=method, pattern=pattern, sparsity=0.5, **barber)
    unchanged, expected = plain(method, pattern)
    before, after = zeros_of(unchanged, expected), zeros_of(tmp_path / "o", result)
    if granularity == "block" and pattern == "unstructured":  # pairs lie across a block's projections
        assert sum(before.values()) == sum(after.values())
        assert before != after
    else:
        assert before == after
    assert result.sparsity.achieved == expected.sparsity.achieved
    tensors, dense = load_tensors(tmp_path / "o"), load_tensors(folder / "model")
    for report in result.sparsity.projections:
        name = PROJECTION.format(report.layer, report.name)
        assert parse_pattern(pattern).holds(tensors[name])
        assert report.achieved == after[name] / tensors[name].numel()
        kept = tensors[name] != 0
        assert torch.equal(tensors[name][kept], dense[name][kept])  # dense values where they are kept
        assert 0 < report.error < 1
    blocks = result.sparsity.blocks
    assert [(block.layer, block.block) for block in blocks] == [
        (layer, block) for layer in range(4) for block in ("attention", "mlp")
    ]
    assert all(block.swaps > 0 for block in blocks)


@pytest.mark.parametrize(
    ("method", "pattern", "granularity"),  # every two of them together once
    [
        ("magnitude", "unstructured", "row"),
        ("magnitude", "2:4", "block"),
        ("wanda", "unstructured", "block"),
        ("wanda", "2:4", "row"),
    ],
)
def test_every_block_of_a_trained_model_gets_nearer_to_the_dense_one(method, pattern, granularity, tmp_path):
    text = {"calibration": "stdlib", "samples": 4, "seqlen": 256, "wave": 4}
    barber = {"rebuild": "barber", "rebuild_threshold": 0.1, "rebuild_granularity": granularity}
    fields = {"method": method, "pattern": pattern, "sparsity": 0.5}
    result = run(tmp_path, tmp_path / "o", model=bundled_model(), **fields, **text, **barber)
    assert len(result.sparsity.blocks) == 16
    for block in result.sparsity.blocks:
        assert block.swaps > 0
        assert block.error_after < block.error_before
    assert result.sparsity.achieved == 0.5


def attention_error(folder, out, inputs) -> float:
    """||dense - sparse||^2 / ||dense||^2 of the first layer's attention, from two checkpoints."""
    found = []
    for model in (folder / "model", out):
        layer = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
        seen = []
        layer.model.layers[0].self_attn.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output[0]))
        with torch.no_grad():
            layer(inputs)
        found.append(seen[0].double())
    return float((found[0] - found[1]).square().sum() / found[0].square().sum())


def test_reported_block_errors_are_those_of_the_checkpoints(folder, tmp_path):
    plain = run(folder, tmp_path / "plain", method="magnitude", sparsity=0.5)
    result = run(folder, tmp_path / "o", method="magnitude", sparsity=0.5, **BARBER)
    assert plain.sparsity.blocks is None
    first = result.sparsity.blocks[0]
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    assert first.error_before == pytest.approx(attention_error(folder, tmp_path / "plain", tokens), rel=1e-4)
    assert first.error_after == pytest.approx(attention_error(folder, tmp_path / "o", tokens), rel=1e-4)
    assert first.error_after < first.error_before


def test_no_swaps_at_threshold_zero_give_the_dense_weights_under_the_mask(folder, tmp_path):
    run(folder, tmp_path / "plain", method="sparsegpt", sparsity=0.5, propagation="parallel", shards=4)
    result = run(
        *(folder, tmp_path / "o"),
        **{"method": "sparsegpt", "sparsity": 0.5, "propagation": "parallel", "shards": 4},
        **{**BARBER, "rebuild_threshold": 0.0, "rebuild_granularity": "block"},
    )
    assert all(block.swaps == 0 and block.error_before == block.error_after for block in result.sparsity.blocks)
    dense, plain, tensors = (load_tensors(path) for path in (folder / "model", tmp_path / "plain", tmp_path / "o"))
    for name, weight in tensors.items():
        expected = dense[name].masked_fill(plain[name] == 0, 0) if "_proj" in name else dense[name]
        assert torch.equal(weight, expected), name


def test_corrected_weights_are_kept_where_asked(folder, tmp_path):
    # Every layer is a segment of its own, so that SparseGPT finds the same whatever was rebuilt before it.
    fields = {"method": "sparsegpt", "sparsity": 0.5, "propagation": "parallel", "shards": 4}
    run(folder, tmp_path / "plain", **fields)
    run(folder, tmp_path / "o", **fields, **BARBER, keep_corrected=True)
    dense, plain, tensors = (load_tensors(path) for path in (folder / "model", tmp_path / "plain", tmp_path / "o"))
    revived = 0
    for name, weight in tensors.items():
        if "_proj" in name:
            stayed = (weight != 0) & (plain[name] != 0)
            new = (weight != 0) & (plain[name] == 0)
            assert torch.equal(weight[stayed], plain[name][stayed])
            assert torch.equal(weight[new], dense[name][new])
            revived += int(new.sum())
    assert revived > 0


def test_other_metrics(folder, tmp_path):
    fields = {"method": "magnitude", "sparsity": 0.5, **BARBER, "rebuild_granularity": "projection"}
    run(folder, tmp_path / "both", **fields)
    by_gradient = run(folder, tmp_path / "gradient", **fields, rebuild_metric="gradient")
    assert differing(tmp_path / "both", tmp_path / "gradient") != []
    assert sum(block.swaps for block in by_gradient.sparsity.blocks) > 0
    by_weight = run(folder, tmp_path / "weight", **fields, rebuild_metric="weight")
    assert sum(block.swaps for block in by_weight.sparsity.blocks) == 0  # magnitude has kept the largest already


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_16_bits(dtype, tmp_path):
    make_model(tmp_path / "model", "qwen2", dtype=dtype)
    make_tokens(tmp_path / "tokens.npy")
    plain = run(tmp_path, tmp_path / "plain", method="wanda", pattern="2:4")
    result = run(tmp_path, tmp_path / "o", method="wanda", pattern="2:4", **{**BARBER, "rebuild_threshold": 0.5})
    assert zeros_of(tmp_path / "plain", plain) == zeros_of(tmp_path / "o", result)
    assert all(tensor.dtype == dtype for tensor in load_tensors(tmp_path / "o").values())
    assert sum(block.swaps for block in result.sparsity.blocks) > 0
    rebuild_run(tmp_path, tmp_path / "again", tmp_path / "plain", rebuild_threshold=0.5)
    written = load_tensors(tmp_path / "again")
    for report in result.sparsity.projections:
        assert parse_pattern("2:4").holds(written[PROJECTION.format(report.layer, report.name)])


def test_mixed_patterns_are_rebuilt_in_their_groups(folder, tmp_path):
    fields = {"method": "wanda", "pattern": "mixed:8", "sparsity": 0.5, "outlier_m": 3.0, "outlier_lambda": 0.3}
    plain = run(folder, tmp_path / "plain", **fields)
    result = run(folder, tmp_path / "o", **fields, rebuild="barber", rebuild_threshold=0.5)
    again = rebuild_run(
        folder, tmp_path / "again", tmp_path / "plain", rebuild_threshold=0.5, rebuild_granularity="block"
    )
    assert len({report.pattern for report in plain.sparsity.projections}) > 1
    for found, out in ((result, tmp_path / "o"), (again, tmp_path / "again")):
        assert sum(block.swaps for block in found.sparsity.blocks) > 0
        tensors = load_tensors(out)
        for report in plain.sparsity.projections:
            assert parse_pattern(report.pattern).holds(tensors[PROJECTION.format(report.layer, report.name)])
        assert found.sparsity.achieved == 0.5


def test_every_part_of_the_progress_is_reported(folder, tmp_path, monkeypatch):
    """The bar ends at its end, whatever is done."""
    ended = []
    line = Step.line
    monkeypatch.setattr(Step, "line", lambda self: ended.append((self.label, self.done, self.total)) or line(self))
    for index, fields in enumerate(
        (
            {},
            {"measure_error": False},
            {"rebuild_threshold": 0.0},
            {"rebuild_metric": "weight"},
            {"allocation": "owl", "propagation": "parallel", "shards": 2, "weights": "streamed"},
        )
    ):
        reporter = Reporter(Console(file=io.StringIO()))
        recipe = {"method": "wanda", "sparsity": 0.5, **BARBER, **fields}
        run(folder, tmp_path / f"o{index}", reporter=reporter, **recipe)
    assert len(ended) == 6
    assert all(done == total > 0 for _, done, total in ended), ended


def test_errors_need_not_be_measured(folder, tmp_path):
    fields = {"method": "wanda", "sparsity": 0.5, **BARBER}
    run(folder, tmp_path / "measured", **fields)
    result = run(folder, tmp_path / "o", **fields, measure_error=False)
    assert differing(tmp_path / "measured", tmp_path / "o") == []
    assert all(block.error_before is not None and block.error_after is None for block in result.sparsity.blocks)
    assert all(report.error is None for report in result.sparsity.projections)


LAYOUTS = [
    {"shards": 3},
    {"weights": "streamed", "shards": 2},
    {"propagation": "parallel", "shards": 1, "weights": "streamed"},
]


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_layout_does_not_change_a_bit(folder, fields, tmp_path):
    same = {"method": "sparsegpt", "sparsity": 0.6, "rebuild_granularity": "projection", **BARBER}
    plain = run(folder, tmp_path / "plain", **same)
    other = run(folder, tmp_path / "other", **same, **fields)
    assert differing(tmp_path / "plain", tmp_path / "other") == []
    assert other.sparsity == plain.sparsity


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_replicas_change_only_the_order_of_sums(folder, granularity, tmp_path):
    same = {"method": "wanda", "sparsity": 0.6, "rebuild_granularity": granularity, **BARBER}
    one = run(folder, tmp_path / "one", **same).sparsity
    three = run(folder, tmp_path / "three", replicas=3, shards=2, **same).sparsity
    first, second = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "three")
    assert all(torch.equal(first[name] == 0, second[name] == 0) for name in first)
    for found, expected in zip(three.blocks, one.blocks, strict=True):
        assert found.swaps == expected.swaps
        assert found.error_after == pytest.approx(expected.error_after, rel=1e-5)
    for report, expected_report in zip(three.projections, one.projections, strict=True):
        assert report.error == pytest.approx(expected_report.error, rel=1e-4)


@pytest.mark.parametrize("fields", [{}, {"propagation": "parallel", "shards": 2, "weights": "streamed"}], ids=str)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(folder, fields, dies_at_layer, tmp_path):
    fields = {"method": "wanda", "sparsity": 0.6, **BARBER, **fields}
    undisturbed = run(folder, tmp_path / "plain", **fields)
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(tmp_path / "plain", tmp_path / "cut") == []
    assert resumed.sparsity == undisturbed.sparsity


# -- a checkpoint that somebody else pruned -------------------------------------------------------------------


@pytest.mark.parametrize(("method", "pattern"), [("magnitude", "unstructured"), ("magnitude", "4:8")])
def test_rebuilding_a_checkpoint_is_pruning_and_rebuilding(folder, method, pattern, tmp_path):
    """Magnitude masks depend on nothing but the weights: the same, made in the run or before it."""
    run(folder, tmp_path / "sparse", method=method, pattern=pattern, sparsity=0.5)
    expected = run(folder, tmp_path / "expected", method=method, pattern=pattern, sparsity=0.5, **BARBER)
    result = rebuild_run(folder, tmp_path / "o", tmp_path / "sparse", rebuild_threshold=0.2, shards=2)
    assert differing(tmp_path / "expected", tmp_path / "o") == []
    assert result.command == "rebuild"
    assert result.sparsity.blocks == expected.sparsity.blocks
    assert [report.error for report in result.sparsity.projections] == [
        report.error for report in expected.sparsity.projections
    ]
    assert [report.pattern for report in result.sparsity.projections] == [
        report.pattern for report in expected.sparsity.projections
    ]
    assert result.sparsity.target == result.sparsity.achieved == expected.sparsity.achieved
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o")


def test_perplexity_before_is_that_of_the_sparse_checkpoint(folder, tmp_path):
    source = str(folder / "other.npy")
    pruned = run(folder, tmp_path / "sparse", method="wanda", sparsity=0.6, eval=(source,))
    for fields in ({}, {"weights": "streamed"}):
        out = tmp_path / f"o{len(fields)}"
        result = rebuild_run(folder, out, tmp_path / "sparse", rebuild_threshold=0.2, eval=(source,), **fields)
        assert result.perplexity[source].before == pytest.approx(pruned.perplexity[source].after, rel=1e-6)
        assert result.perplexity[source].after != result.perplexity[source].before
    assert differing(tmp_path / "o0", tmp_path / "o1") == []


def test_corrected_weights_of_another_tool(folder, tmp_path):
    run(folder, tmp_path / "sparse", method="sparsegpt", sparsity=0.5)
    rebuild_run(folder, tmp_path / "o", tmp_path / "sparse", rebuild_threshold=0.2, keep_corrected=True)
    sparse, tensors = load_tensors(tmp_path / "sparse"), load_tensors(tmp_path / "o")
    stayed = {name: (tensors[name] != 0) & (sparse[name] != 0) for name in tensors}
    assert all(torch.equal(tensors[name][stayed[name]], sparse[name][stayed[name]]) for name in tensors)
    assert sum(int(kept.sum()) for kept in stayed.values()) < sum(int((sparse[name] != 0).sum()) for name in tensors)


def test_a_rebuild_that_was_cut_off_goes_on(folder, dies_at_layer, tmp_path):
    run(folder, tmp_path / "sparse", method="wanda", sparsity=0.6)
    fields = {"rebuild_threshold": 0.2, "eval": (str(folder / "other.npy"),)}
    undisturbed = rebuild_run(folder, tmp_path / "plain", tmp_path / "sparse", **fields)
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        rebuild_run(folder, tmp_path / "cut", tmp_path / "sparse", **fields)
    resumed = rebuild_run(folder, tmp_path / "cut", tmp_path / "sparse", replicas=1, **fields)
    assert differing(tmp_path / "plain", tmp_path / "cut") == []
    assert (resumed.perplexity, resumed.sparsity) == (undisturbed.perplexity, undisturbed.sparsity)


def test_another_sparse_checkpoint_is_another_run(folder, tmp_path):
    run(folder, tmp_path / "sparse", method="wanda", sparsity=0.6)
    run(folder, tmp_path / "other", method="wanda", sparsity=0.5)
    rebuild_run(folder, tmp_path / "o", tmp_path / "sparse")
    before = snapshot(tmp_path / "o")
    with pytest.raises(InputError, match="out: .* holds another run"):
        rebuild_run(folder, tmp_path / "o", tmp_path / "other")
    assert snapshot(tmp_path / "o") == before


def test_a_pattern_is_kept_where_it_is_said(folder, tmp_path):
    """Few groups could be chance; what is asked for is checked, and then held."""
    run(folder, tmp_path / "sparse", method="magnitude", pattern="6:12")
    result = rebuild_run(folder, tmp_path / "o", tmp_path / "sparse", pattern="6:12", rebuild_threshold=0.5)
    tensors = load_tensors(tmp_path / "o")
    for report in result.sparsity.projections:
        assert report.pattern == "6:12"
        assert parse_pattern("6:12").holds(tensors[PROJECTION.format(report.layer, report.name)])
    assert sum(block.swaps for block in result.sparsity.blocks) > 0
    with pytest.raises(InputError, match=r"pattern: the zeros of model\.layers\.0\..* are not 2:4"):
        rebuild_run(folder, tmp_path / "other", tmp_path / "sparse", pattern="2:4")
    assert not (tmp_path / "other").exists()


def test_what_was_before_is_the_sparse_checkpoint(folder, tmp_path):
    pruned = run(folder, tmp_path / "sparse", method="wanda", sparsity=0.6)
    result = rebuild_run(folder, tmp_path / "o", tmp_path / "sparse", replicas=2)
    assert result.sparsity.before == pruned.sparsity.achieved == result.sparsity.achieved


def changed(folder, tmp_path, change) -> str:
    """A copy of the dense model whose tensors were changed."""
    shutil.copytree(folder / "model", tmp_path / "changed")
    tensors = change(load_tensors(folder / "model"))
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    return str(tmp_path / "changed")


def without_a_tensor(tensors):
    del tensors["model.layers.2.mlp.up_proj.weight"]
    return tensors


def narrower(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(40, 32)
    return tensors


def tuned(tensors):
    tensors["model.layers.1.input_layernorm.weight"] += 0.5
    return tensors


def with_a_bias(tensors):
    return {**tensors, "model.layers.1.mlp.down_proj.bias": torch.ones(32)}


def deeper(tensors):
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    return {**tensors, **{name.replace(".3.", ".4."): tensor.clone() for name, tensor in last.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict, "sparse: .* has no zeros in its projections; give a pruned checkpoint"),
        (without_a_tensor, r"sparse: .* has no tensor model\.layers\.2\.mlp\.up_proj\.weight, which the dense model"),
        (
            narrower,
            r"sparse: tensor model\.layers\.2\.mlp\.up_proj\.weight is \[40, 32\]; the dense model .* has \[48, 32\]",
        ),
        (deeper, r"sparse: .* has a tensor model\.layers\.4\..*, which the dense model .* has not"),
        (
            with_a_bias,
            r"sparse: .* has a tensor model\.layers\.1\.mlp\.down_proj\.bias, which the dense model .* has not",
        ),
        (
            tuned,
            r"sparse: tensor model\.layers\.1\.input_layernorm\.weight is not that of .*: more than pruning was done",
        ),
    ],
)
def test_a_sparse_checkpoint_that_does_not_fit(folder, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        rebuild_run(folder, tmp_path / "o", changed(folder, tmp_path, change))
    assert not (tmp_path / "o").exists()


def test_a_sparse_checkpoint_that_is_none(folder, tmp_path):
    with pytest.raises(InputError, match="sparse: .* is no directory"):
        rebuild_run(folder, tmp_path / "o", "nowhere")
    make_model(tmp_path / "qwen", "qwen2")
    with pytest.raises(InputError, match="sparse: "):
        rebuild_run(folder, tmp_path / "o", tmp_path / "qwen")
    assert not (tmp_path / "o").exists()
