"""Which matrices of a layer stay dense, and the line that says so."""

import pytest
from torch import nn

from shardprune.errors import InputError
from shardprune.model.families import Family, LayerKind
from shardprune.model.left_dense import IGNORED, ignoring, left_dense, not_run, pruned_of


def layer_of(**modules):
    """A layer with modules at dotted paths."""
    layer = nn.Module()
    for path, module in modules.items():
        parent = layer
        *above, leaf = path.split("__")
        for name in above:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, module)
    return layer


def linear(rows=16, cols=16):
    return nn.Linear(cols, rows, bias=False)


@pytest.mark.parametrize(
    "name",
    [
        *("mlp.gate", "mlp.router", "router.proj", "mlp.gate.wg", "mlp.shared_expert_gate", "self_attn.indexer.wq_b"),
        *("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba", "self_attn.forget_gate.f_a_proj"),
        *("self_attn.b_proj", "self_attn.dt_proj"),
    ],
)
def test_maps_that_choose_or_weigh_stay(name):
    layer = layer_of(**{name.replace(".", "__"): linear(), "mlp__up_proj": linear()})
    inputs, kept = pruned_of(layer, ((name, "mlp.up_proj"),))
    assert inputs == (("mlp.up_proj",),)
    assert list(kept.values()) == [(f"{name}.weight",)]


@pytest.mark.parametrize(
    "name",
    [
        *("mlp.gate_proj", "mlp.gate_up_proj", "self_attn.q_proj", "self_attn.kv_b_proj", "self_attn.q_a_proj"),
        *(
            "linear_attn.in_proj_qkv",
            "mamba.in_proj",
            "mixer.x_proj",
            "self_attn.g_b_proj",
            "mlp.shared_expert.gate_proj",
        ),
    ],
)
def test_maps_of_values_are_pruned(name):
    inputs, kept = pruned_of(layer_of(**{name.replace(".", "__"): linear()}), ((name,),))
    assert (inputs, kept) == (((name,),), {})


def test_matrices_that_are_no_maps_that_are_not_called_or_are_narrow_stay():
    layer = layer_of(conv=nn.Conv1d(8, 8, 2, groups=8), dark=linear(8, 8), thin=linear(4, 16), up=linear(64, 64))
    inputs, kept = pruned_of(layer, (("thin", "up"),))
    assert inputs == (("up",),)
    assert sorted(kept.values()) == [("conv.weight",), ("dark.weight",), ("thin.weight",)]


def test_narrow_maps_of_known_structures_are_pruned():
    layer = layer_of(thin=linear(4, 16), up=linear(64, 64))
    assert pruned_of(layer, (("thin", "up"),), {"thin"}) == ((("thin", "up"),), {})


def test_a_layer_of_which_most_would_stay_is_refused():
    layer = layer_of(conv=nn.Conv1d(32, 32, 8), up=linear(8, 8))
    with pytest.raises(
        InputError, match=r"most weights of its layers are no weights of an nn.Linear, such as conv.weight"
    ):
        pruned_of(layer, (("up",),))


def family(layers=3):
    kind = LayerKind(maps=(("q", "k"), ("o",)), inputs=(("q", "k"), ("o",)), attention=frozenset("qko"))
    return Family("model.layers", (kind,) * layers)


def test_layers_with_the_same_projections_ignored_are_of_one_kind():
    kinds = ignoring(family(), ("*.1.*", "model.layers.[12].o", "*.k")).kinds
    assert [kind.inputs for kind in kinds] == [(("q",), ("o",)), (), (("q",),)]
    assert kinds[1].kept == {IGNORED: ("q.weight", "k.weight", "o.weight")}
    first, second, third = ignoring(family(), ("*.k",)).kinds
    assert first is second is third
    assert first.maps == (("q", "k"), ("o",))
    assert left_dense(kinds) == "left dense: 6 of 9 projections (ignored; the target is the others')"
    assert left_dense(family().kinds) is None


def test_layers_that_are_not_run_are_counted_and_have_no_projections():
    kind = not_run(layer_of(cross__q=linear(), mlp__up=linear()))
    assert (kind.runs, kind.projections, kind.blocks, kind.chunks(2)) == (False, (), {}, ((),))
    assert list(kind.kept.values()) == [("cross.q.weight", "mlp.up.weight")]
    kinds = (kind, *family().kinds)
    assert left_dense(kinds) == "left dense: 1 of 4 layers (not run for text)"
    ignored = ignoring(Family("model.layers", kinds), ("*.k",)).kinds
    expected = "left dense: 1 of 4 layers (not run for text); 3 of 9 projections (ignored; the target is the others')"
    assert left_dense(ignored) == expected
    assert ignored[0] == kind
    with pytest.raises(InputError, match=r"names are such as model\.layers\.1\.q$"):
        ignoring(Family("model.layers", kinds), ("*.up",))
