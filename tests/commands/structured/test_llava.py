"""Models with a language tower: only that is pruned."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.commands.structured.narrowed import COMPOSITE, cut, records
from tests.support.running import run
from tests.support.tiny import LLAVA_LAYOUTS, VOCABULARY, load_tensors, make_llava


@pytest.mark.parametrize(
    "fields", [{"sparsity": 0.5}, {"structured": 0.3, "score": "amp", "correction": False}, COMPOSITE], ids=str
)
@pytest.mark.parametrize("prefix", LLAVA_LAYOUTS)
@torch.no_grad()
def test_only_the_language_tower_of_a_llava_is_pruned(folder, prefix, fields, tmp_path):
    make_llava(tmp_path / "llava", **LLAVA_LAYOUTS[prefix])
    result = run(folder, tmp_path / "o", model=tmp_path / "llava", shards=2, **fields)
    before, after = load_tensors(tmp_path / "llava"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (name.startswith(f"{prefix}layers.") and "proj" in name), name
    config, old = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "o", tmp_path / "llava"))
    assert {**config, "text_config": None} == {**old, "text_config": None}
    assert config["text_config"]["model_type"] == ("mistral" if "structured" in fields else "llama")

    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor([[2, *[VOCABULARY - 1] * 4, 5, 9, 11]])
    image = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert model.generate(ids[:, -3:], max_new_tokens=4, do_sample=False).shape[1] > 3
    found = model.eval()(input_ids=ids, **image).logits
    assert torch.isfinite(found).all()
    if "correction" in fields:
        whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
        cut(whole.model.language_model.layers, "llama", records(tmp_path / "o"), result.structure.before.groups)
        assert torch.allclose(found, whole(input_ids=ids, **image).logits, atol=1e-4)


def test_the_layouts_of_a_llava_give_the_same_tensors(folder, tmp_path):
    found = []
    for number, (prefix, saving) in enumerate(LLAVA_LAYOUTS.items()):
        make_llava(tmp_path / f"llava{number}", **saving)
        run(folder, tmp_path / f"o{number}", model=tmp_path / f"llava{number}", **COMPOSITE)
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"o{number}")
        found.append(model.state_dict())
        assert any(name.startswith(f"{prefix}layers.0.") for name in load_tensors(tmp_path / f"o{number}"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
