"""`shardprune export`: sizes, the checkpoint back to the bit, models of transformers, what is refused, what goes on."""

import json
import shutil

import fsspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import shardprune
from shardprune.cli import main
from shardprune.commands import export as story
from shardprune.commands.check import check
from shardprune.errors import InputError, StorageError
from shardprune.model.semi_structured import RowsLinear
from shardprune.recipes.export import ExportRecipe
from shardprune.report.progress import Reporter
from shardprune.storage.sealed_json import sealed_fields
from shardprune.storage.sparse_file import write_sparse
from tests.support.running import run
from tests.support.tiny import CONFIGS, make_llava, make_model, make_tokens, snapshot
from tests.support.words import words_tokenizer


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Outputs of a model with wide layers in 16 bits: shares of zeros, 2:4, and one that lost structures, too."""
    folder = tmp_path_factory.mktemp("outputs")
    wide = {
        **CONFIGS["llama"][1],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
    }
    make_model(folder / "model", "wide", torch.bfloat16, {"wide": ("LlamaConfig", wide)})
    words_tokenizer().save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    magnitude = {"method": "magnitude", "measure_error": False}
    for share in (0.5, 0.6, 0.7):
        run(folder, f"{share:.0%}", sparsity=share, **magnitude)
    run(folder, "2:4", pattern="2:4", **magnitude)
    run(folder, "composite", structured=0.2, sparsity=0.5, **magnitude)
    return folder


def exported(source, to, **fields):
    return shardprune.export(
        ExportRecipe.checked({"model": str(source), "to": str(to), **fields}), Reporter(quiet=True)
    )


# Of the weights of the layers; embeddings and head, a fiftieth of this model, are dense.
SIZES = {"50%": 0.5 + 1 / 16, "60%": 0.4 + 1 / 16, "70%": 0.3 + 1 / 16, "2:4": 0.5 + 1 / 16}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_the_way_back(name, outputs, tmp_path):
    found = exported(outputs / name, tmp_path / "small")
    weights = sum(record.bytes for file, record in found.files.items() if file.endswith(".safetensors"))
    stored = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert stored / weights == pytest.approx(SIZES[name], abs=0.03)
    exported(tmp_path / "small", tmp_path / "back", restore=True)
    kept = {file: content for file, content in snapshot(outputs / name).items() if file != "events.jsonl"}
    assert snapshot(tmp_path / "back") == kept
    (verdict,) = check(str(tmp_path / "back"))
    assert not verdict.faults


@pytest.mark.parametrize("name", ["50%", "composite"])
def test_zstd_is_smaller_and_comes_back(name, outputs, tmp_path):
    plain = exported(outputs / name, tmp_path / "plain")
    small = exported(outputs / name, tmp_path / "small", compression="zstd")
    assert small.stored_bytes < 0.93 * plain.stored_bytes
    exported(tmp_path / "small", tmp_path / "back", restore=True)
    assert snapshot(tmp_path / "back").items() <= snapshot(outputs / name).items()


@pytest.mark.parametrize("name", ["60%", "composite"])
def test_the_loader_gives_the_model_of_transformers(name, outputs, tmp_path):
    exported(outputs / name, tmp_path / "small")
    ours = shardprune.load_exported(str(tmp_path / "small"))
    theirs = AutoModelForCausalLM.from_pretrained(outputs / name)
    assert type(ours) is type(theirs)
    assert ours.dtype == torch.bfloat16
    assert not ours.training
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    in_float = shardprune.load_exported(str(tmp_path / "small"), dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "small")("one two three", return_tensors="pt")
    logits = theirs.float()(**tokens).logits
    assert torch.equal(in_float(**tokens).logits, logits)


def test_a_language_tower_in_a_larger_model(tmp_path):
    make_llava(tmp_path / "model")
    exported(tmp_path / "model", tmp_path / "small")
    ours = shardprune.load_exported(str(tmp_path / "small"))
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.state_dict().items())


def test_object_storage_and_the_hubs_files(outputs):
    memory = fsspec.filesystem("memory")
    memory.put(str(outputs / "70%"), "/exports/model", recursive=True)
    memory.pipe("/exports/model/README.md", b"# A card")
    exported("memory://exports/model", "memory://exports/small")
    exported("memory://exports/small", "memory://exports/back", restore=True)
    assert memory.cat("/exports/back/README.md") == b"# A card"
    names = [path.rpartition("/")[2] for path in memory.ls("/exports/back", detail=False)]
    assert {name: memory.cat(f"/exports/back/{name}") == memory.cat(f"/exports/model/{name}") for name in names} == (
        dict.fromkeys(names, True)
    )
    shardprune.load_exported("memory://exports/small")
    memory.rm("/exports", recursive=True)


# -- what is cut off ------------------------------------------------------------------------------------------------


class Cut(Exception):
    pass


def test_an_export_that_was_cut_off_goes_on(outputs, tmp_path, monkeypatch):
    written = []

    def dying(source, file, *others):
        if len(written) == 2:
            raise Cut
        written.append(file)
        write_sparse(source, file, *others)

    monkeypatch.setattr(story, "write_sparse", dying)
    with pytest.raises(Cut):
        exported(outputs / "50%", tmp_path / "small")
    with pytest.raises(InputError, match="is not finished"):
        exported(tmp_path / "small", tmp_path / "back", restore=True)
    with pytest.raises(InputError, match="holds another export"):
        exported(outputs / "60%", tmp_path / "small")
    written.clear()
    exported(outputs / "50%", tmp_path / "small")
    assert len(written) == 1
    before = snapshot(tmp_path / "small")
    assert exported(outputs / "50%", tmp_path / "small").stored_bytes
    assert len(written) == 1
    assert snapshot(tmp_path / "small") == before
    monkeypatch.undo()
    exported(outputs / "50%", tmp_path / "other")
    assert snapshot(tmp_path / "other") == before


def test_a_restoring_that_was_cut_off_goes_on(outputs, tmp_path, monkeypatch):
    exported(outputs / "50%", tmp_path / "small")
    shown = tmp_path / "small" / "sparse-model-00003-of-00003.safetensors"
    whole = shown.read_bytes()
    middle = len(whole) // 2  # among the values, which stand before the masks
    shown.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(StorageError, match=r"00003-of-00003\.safetensors is damaged: .* is not what was written"):
        exported(tmp_path / "small", tmp_path / "back", restore=True)
    assert not (tmp_path / "back" / "model-00003-of-00003.safetensors").exists()
    shown.write_bytes(whole)
    exported(tmp_path / "small", tmp_path / "back", restore=True)
    assert snapshot(tmp_path / "back").items() <= snapshot(outputs / "50%").items()
    before = snapshot(tmp_path / "back")
    exported(tmp_path / "small", tmp_path / "back", restore=True)  # which finds it finished
    assert snapshot(tmp_path / "back") == before


# -- what is refused ------------------------------------------------------------------------------------------------


def said(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line_and_leaves_nothing(outputs, tmp_path, capsys):
    place = tmp_path / "small"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    shutil.copytree(outputs / "50%", tmp_path / "begun")
    (tmp_path / "begun" / "run.json").write_text("{}")
    half, two_four = outputs / "50%", "semi-structured"
    refused = {
        "error: to: missing; give --to": [outputs / "50%"],
        "error: to: hf://someone/x cannot be written": [outputs / "50%", "--to", "hf://someone/x"],
        "error: format: 'dense' is not allowed; use one of sparse": [
            outputs / "50%",
            "--to",
            place,
            "--format",
            "dense",
        ],
        "error: format: 'semi-structured': ": [half, "--to", place, "--format", two_four],
        "error: compression: 'zstd' has no effect": [place, "--to", place, "--restore", "--compression", "zstd"],
        "error: model: ": [tmp_path / "begun", "--to", place],
        f"error: model: '{tmp_path}/nowhere' is no directory": [tmp_path / "nowhere", "--to", place],
        f"error: model: '{outputs}/50%' holds no export.json": [outputs / "50%", "--to", place, "--restore"],
        f"error: to: {tmp_path}/mine is not empty and holds no export": [outputs / "50%", "--to", tmp_path / "mine"],
        f"error: to: {outputs}/50% is not empty and holds no": [outputs / "50%", "--to", outputs / "50%"],
        f"error: to: {tmp_path}/mine/notes.txt/x cannot be": [outputs / "50%", "--to", tmp_path / "mine/notes.txt/x"],
    }
    before = snapshot(tmp_path)
    for start, words in refused.items():
        line = said(capsys, *words)
        assert line.startswith(start), line
    assert snapshot(tmp_path) == before


def test_an_export_is_no_checkpoint(outputs, tmp_path, capsys):
    exported(outputs / "50%", tmp_path / "small")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(SystemExit):
        main(["prune", f"{tmp_path}/small", "--out", f"{tmp_path}/x", "--sparsity", "0.5", "--backend", "local"])
    assert "holds an export; `shardprune export --restore` makes a checkpoint of it" in capsys.readouterr().err
    held = (tmp_path / "small" / "export.json").read_text()

    def changed(old, new):
        fields = json.loads(held.replace(old, new))
        del fields["seal"]
        return json.dumps(sealed_fields(fields))

    for content, reason in (
        (changed('"version": 1', '"version": 2'), "holds 2 as version"),
        (changed('"model-0', '"../model-0'), "which is no file of a folder"),
        ("{", "is not JSON"),
        (held.replace('"version": 1', '"version": 2'), "is damaged: its seal is not that of its content"),
        (changed(json.loads(held)["fingerprint"], "0" * 32), "belongs to another export"),
    ):
        (tmp_path / "small" / "export.json").write_text(content)
        assert reason in said(capsys, "--restore", tmp_path / "small", "--to", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# -- 2:4 for torch's kernels ----------------------------------------------------------------------------------------


def test_semi_structured_names_the_weights_and_needs_a_gpu(outputs, tmp_path):
    found = exported(outputs / "2:4", tmp_path / "small", format="semi-structured")
    assert len(found.semi_structured) == 14
    assert "model.layers.1.mlp.down_proj.weight" in found.semi_structured
    with pytest.raises(InputError, match="device: 'cpu' has no kernels for 2:4"):
        shardprune.load_exported(str(tmp_path / "small"))
    dense = shardprune.load_exported(str(tmp_path / "small"), semi_structured=False)
    with pytest.raises(InputError, match="device: 'cpu' has no kernels for 2:4"):
        shardprune.to_semi_structured(dense)


class Calls(TorchDispatchMode):
    """The operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
def test_products_with_compressed_weights_are_of_matrices(bias):
    """Compressed weights have products of matrices alone, whose results lie transposed in memory."""
    torch.manual_seed(0)
    plain, ours = (kind(32, 16, bias=bias) for kind in (torch.nn.Linear, RowsLinear))
    ours.load_state_dict(plain.state_dict())
    for hidden in (torch.randn(5, 32), torch.randn(2, 7, 32), torch.randn(32, 5).T.unsqueeze(1)):
        with Calls() as calls:
            output = ours(hidden)
        assert {"mm", "addmm"} & set(calls.names)
        assert not {"expand", "bmm", "matmul"} & set(calls.names)
        assert torch.allclose(output, plain(hidden), atol=1e-6)
        assert output.shape == (*hidden.shape[:-1], 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_semi_structured_computes_what_dense_does(outputs, tmp_path):
    exported(outputs / "2:4", tmp_path / "small", format="semi-structured")
    ours = shardprune.load_exported(str(tmp_path / "small"), device="cuda")
    theirs = AutoModelForCausalLM.from_pretrained(outputs / "2:4").to("cuda")
    assert "SparseSemiStructured" in type(ours.model.layers[0].mlp.up_proj.weight).__name__
    tokens = torch.randint(0, 64, (2, 40), device="cuda")
    with torch.no_grad():
        one, other = ours(tokens).logits.float(), theirs(tokens).logits.float()
        assert float((one - other).norm() / other.norm()) < 2e-2
        prompts = {"input_ids": tokens[:, :8], "attention_mask": torch.ones(2, 8, device="cuda")}
        assert ours.generate(**prompts, max_new_tokens=8, do_sample=False).shape == (2, 16)
    with pytest.raises(InputError, match="has no 2:4 weight"):
        shardprune.to_semi_structured(AutoModelForCausalLM.from_pretrained(outputs / "50%").to("cuda"))
